"""Masks of objects in COCO's forms: runs, packed runs, polygons."""

import json

import numpy as np

from .errors import InputError


def runs(mask: np.ndarray) -> dict:
    """A mask (h, w) as the lengths of its runs down the columns, zeros first: COCO's uncompressed form."""
    flat = np.concatenate([[False], mask.flatten(order="F")])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return {"counts": np.diff([0, *edges, mask.size]).tolist(), "size": list(mask.shape)}


def decoded(text: str, width: int, height: int) -> np.ndarray:
    """COCO's "segmentation" as JSON, polygons or runs, to (height, width) bool."""
    form = json.loads(text)
    if isinstance(form, dict) and isinstance(form["counts"], list):
        values = np.arange(len(form["counts"])) % 2 == 1
        return np.repeat(values, form["counts"]).reshape(form["size"][::-1]).T
    tool = coco_masks()
    if isinstance(form, list):  # the tool would take a polygon of two corners for a box
        form = tool.frPyObjects([p for p in form if len(p) >= 6] or [[0.0] * 6], int(height), int(width))
    return tool.decode(tool.merge(form) if isinstance(form, list) else form) > 0


def coco_masks():
    """The tools for COCO's masks. Errors: InputError that says what to install."""
    try:
        from faster_coco_eval.core import mask
    except ImportError:
        raise InputError("COCO's masks and numbers need a package: pip install faster-coco-eval.") from None
    return mask
