"""`clothes_in_photos`: a small set for detection that comes with the package, with boxes and masks that are exact.

Clothes of `fashion_small`, tinted, lie in crops of the embedded photographs, up to five in each, at sizes from 26 to 64
px, sometimes one a little over another. The training images have other clothes and other photographs than the test
images. Everything follows from a fixed seed.
"""

import json
from functools import lru_cache

import numpy as np
from PIL import Image

from .boxes import Boxes, Objects
from .embedded import FASHION_CLASSES, fashion_small, photos
from .segments import runs

CLASSES = ("T-shirt", "trouser", "sneaker", "bag")
IMAGES = {"train": 600, "test": 150}
TEST_PHOTOS = (1, 4, 8, 10)  # cat, motorcycle, temple, portrait
SIZES = ((128, 112), (112, 128), (128, 128))  # width, height
LARGEST, SMALLEST, MOST = 64, 26, 5
COVERED = 0.25  # of what is seen of a thing a later one may cover this much


@lru_cache(maxsize=2)
def clothes_in_photos(split: str) -> Boxes:
    """600 training or 150 test images of 112 to 128 px."""
    rng = np.random.default_rng({"train": 1, "test": 2}[split])
    pictures = photos("train")[0]
    test = np.isin(np.arange(len(pictures)), TEST_PHOTOS)
    pictures = pictures[test if split == "test" else ~test]
    grey, labels, _ = fashion_small(split)
    shelves = [grey[labels == FASHION_CLASSES.index(name), ..., 0] for name in CLASSES]
    items, sizes, counts, boxes, kinds, masks = np.empty(IMAGES[split], object), [], [], [], [], []
    for i in range(len(items)):
        width, height = SIZES[rng.integers(len(SIZES))]
        items[i], found = _scene(_crop(pictures[rng.integers(len(pictures))], width, height, rng), shelves, rng)
        sizes.append((width, height))
        counts.append(len(found))
        for kind, mask in found:
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
            kinds.append(kind)
            masks.append(mask)
    objects = Objects(np.array(boxes, np.float64), np.array(kinds), np.zeros(len(boxes), bool),
                      np.array([m.sum() for m in masks], np.float64),
                      np.array([json.dumps(runs(m)) for m in masks], object))
    first = 1 if split == "train" else 100_001  # so that both splits may lie in one folder
    return Boxes("clothes_in_photos", split, items, sizes=np.array(sizes), counts=counts, objects=objects,
                 classes=CLASSES, rule="voc area", ids=range(first, first + len(items)),
                 category_ids=[FASHION_CLASSES.index(name) + 1 for name in CLASSES])


def _crop(picture: np.ndarray, width: int, height: int, rng) -> np.ndarray:
    """A part of a photograph, at least as many pixels as are wanted, half of them mirrored."""
    scale = rng.uniform(1, len(picture) / max(width, height))
    w, h = width * scale, height * scale
    left, top = rng.uniform(0, len(picture) - w), rng.uniform(0, len(picture) - h)
    part = np.array(Image.fromarray(picture).resize((width, height), box=(left, top, left + w, top + h)))
    return part[:, ::-1].copy() if rng.random() < 0.5 else part


def _scene(canvas: np.ndarray, shelves: list[np.ndarray], rng) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Clothes put on a photograph (h, w, 3), and of each its class and what is seen of it, a mask (h, w)."""
    height, width = canvas.shape[:2]
    seen: list[tuple[int, np.ndarray]] = []
    for _ in range(rng.integers(1, MOST + 1)):
        kind = int(rng.integers(len(shelves)))
        cloth, mask = _cloth(shelves[kind][rng.integers(len(shelves[kind]))], rng)
        h, w = mask.shape
        left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
        placed = np.zeros((height, width), bool)
        placed[top:top + h, left:left + w] = mask
        if any((placed & other).sum() > COVERED * other.sum() for _, other in seen):
            continue
        seen = [(k, other & ~placed) for k, other in seen] + [(kind, placed)]
        canvas[placed] = cloth[mask]
    return canvas, seen


def _cloth(grey: np.ndarray, rng) -> tuple[np.ndarray, np.ndarray]:
    """One piece (28, 28) enlarged, mirrored or not, and tinted: colours (h, w, 3), and its mask cut to fit."""
    from scipy import ndimage

    side = int(round(SMALLEST * (LARGEST / SMALLEST) ** rng.random() * 28 / 26))
    parts, _ = ndimage.label(ndimage.binary_fill_holes(grey > 16))
    body = parts == np.bincount(parts.ravel())[1:].argmax() + 1
    large = np.array(Image.fromarray(grey).resize((side, side), Image.Resampling.BILINEAR))
    mask = np.array(Image.fromarray(255 * body.astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR)) > 127
    mask = ndimage.binary_fill_holes(mask)
    if rng.random() < 0.5:
        large, mask = large[:, ::-1], mask[:, ::-1]
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    cut = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    tint = rng.uniform(0.45, 1.0, 3)
    return (large[cut][..., None] * (tint / tint.max())).round().astype(np.uint8), mask[cut]
