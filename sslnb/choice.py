"""Which recipe is meant: by the parameters of a notebook, and by the data."""

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import limits, methods
from .backbones import kind
from .data import said
from .errors import unknown
from .files import expanded
from .recipes import Recipe

DRAWINGS = "digits", "digits_scattered", "fashion_small", "fashion_mnist"  # small and grey: what our demos are made for
OF_VIEWS = {"crop", "pad", "flip", "rotate", "jitter", "hue", "grey", "blur", "solarize", "small_views", "small_size",
            "small_crop", "zoom", "patch", "gap"}  # the numbers that say what views change


def is_imagenet(data: str | Path) -> bool:
    """The name "imagenet", or a folder whose train/ (or itself) holds synset folders such as n01440764."""
    if str(data) == "imagenet":
        return True
    root = expanded(data)  # as `load` does
    train = root / "train" if (root / "train").is_dir() else root
    return train.is_dir() and sum(bool(re.fullmatch(r"n\d{8}", p.name)) for p in train.iterdir()) >= 1000


def resolve(method: str, recipe: str = "auto", *, data: str = "auto", processes: int | str = "auto",
            **changes: Any) -> Recipe:
    """The recipe that a notebook's parameters mean. A value "auto" leaves the recipe's own.

    recipe "auto": the zoo's ImageNet recipe if `data` is ImageNet (the row with the wanted epochs if there is one),
    else the demo recipe; on other images than digits and clothes this has the views that the method has by default, as
    for photographs. `processes` keeps the total batch. Errors: InputError for unknown names and bad numbers.
    """
    data = said(data)
    limits.check("data", data)
    if processes != "auto":
        limits.check("processes", processes)
    changes = {k: v for k, v in changes.items() if not (isinstance(v, str) and v == "auto")}
    for name, value in changes.items():
        limits.check(name, value)
    known = methods.recipes(method)
    if recipe == "auto":
        rows = [r for name, r in known.items() if name != "demo"]
        if data != "auto" and is_imagenet(data) and rows:
            chosen = _nearest(rows, **changes)
            if data != "imagenet" and not os.path.isdir(expanded(data) / "train"):
                note = "A tenth of every class is held out for testing; give the folder above train/ to train on all."
                chosen = dataclasses.replace(chosen, published={}, note=f"{note} {chosen.note}".strip())
        else:
            chosen = known["demo"] if "demo" in known else unknown(f"recipe of {method}", "demo", known)
    elif recipe in known:
        chosen = known[recipe]
    else:
        unknown(f"recipe of {method}", recipe, known)
    if data != "auto":
        changes["data"] = data
        if chosen is known.get("demo") and limits.is_ours(method) and data not in DRAWINGS:
            others = {name: value for name, value in chosen.numbers.items() if name not in OF_VIEWS}
            note = f"Your images get the method's own views, not those that we chose for {chosen.data}."
            chosen = dataclasses.replace(chosen, numbers=others, note=note)
    sources = {**chosen.sources, **dict.fromkeys(changes, "you")}
    batch = changes.pop("batch") if "batch" in changes and "accum" not in changes else None
    chosen = chosen.with_(**changes, sources=sources)
    limits.check_fit(method, methods.get(method), chosen.numbers)
    gpus = chosen.gpus if processes == "auto" else processes
    if batch is not None:
        return chosen.in_batches(batch, gpus)
    return chosen if gpus == chosen.gpus else chosen.on(gpus)


def _nearest(rows: Sequence[Recipe], backbone: str = "", epochs: int = 0, **_: Any) -> Recipe:
    """Of a method's rows that for this network, or its kind, and for so many epochs; else the first."""
    for alike in (lambda r: r.backbone == backbone, lambda r: kind(r.backbone) == kind(backbone)):
        if backbone and any(map(alike, rows)):
            rows = list(filter(alike, rows))
            break
    return next((r for r in rows if r.epochs == epochs), rows[0])
