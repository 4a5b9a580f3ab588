"""PASCAL VOC 2007 for classification: which classes an image shows, and the frozen features of its images."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from ..data import Images
from ..errors import InputError, unknown
from ..files import expanded
from ..geometry import ImageOp, Resize
from ..reading import in_order
from ..views import Normalize, View, Views
from .features import raw_pixels, the_device
from .multihead import maps, pools
from .pixels import MARGIN, MARGIN_FROM
from .sources import LARGEST_SIZE, open_source

KINDS = ("trained", "random initialisation", "raw pixels")


# ---------------------------------------------------------------- VOC's classes


def voc_classes(folder: str | Path, split: str, classes: Sequence[str] | None = None
                ) -> tuple[Images, np.ndarray, list[str]]:
    """VOC2007's images in the order of their ids, targets (N, C) and class names in order.

    `folder` is VOCdevkit or its VOC2007. A target is 1 if the class is there, 0 if not, and -1, which is not counted,
    if it can hardly be seen: the lists call these 1, -1 and 0. `split`: "train" is VOC's trainval, or "test".
    """
    root = expanded(folder)
    root = root / "VOC2007" if (root / "VOC2007").is_dir() else root
    if split not in ("train", "test"):
        unknown("split of VOC", split, ("train", "test"))
    name, lists = "trainval" if split == "train" else "test", root / "ImageSets" / "Main"
    # Classes are those of both splits: one that lacks a list in one of them is a mistake.
    there = sorted({f.name.rpartition("_")[0] for part in ("trainval", "test") for f in lists.glob(f"*_{part}.txt")})
    if not there:
        raise InputError(f"{lists} has no list of a class, such as dog_trainval.txt; give the folder VOCdevkit of "
                         "PASCAL VOC 2007.")
    for c in classes or ():
        if c not in there:
            unknown(f"class of {root}", c, there)
    chosen = sorted(classes or there)
    columns = [_read_list(lists / f"{c}_{name}.txt") for c in chosen]
    ids = sorted(columns[0])
    for c, column in zip(chosen, columns, strict=True):
        if column.keys() != columns[0].keys():
            raise InputError(f"{c}_{name}.txt and {chosen[0]}_{name}.txt in {lists} name different images; unpack them "
                             "again.")
    targets = np.array([[column[i] for column in columns] for i in ids], dtype=np.int8).reshape(len(ids), len(chosen))
    return Images("VOC2007", split, [f"{i}.jpg" for i in ids], root=root / "JPEGImages"), targets, chosen


def _read_list(file: Path) -> dict[str, int]:
    """id -> target."""
    if not file.is_file():
        raise InputError(f"There is no list {file.name} in {file.parent}: VOC's labels of trainval and of test come in "
                         "two archives, unpack both.")
    meaning = {"1": 1, "-1": 0, "0": -1}
    try:
        return {i: meaning[said] for i, said in (line.split() for line in file.read_text().splitlines() if line)}
    except (ValueError, KeyError):
        raise InputError(f"{file} is no list of a class: every line should be an image's id and 1, 0 or -1.") from None


def write_voc_labels(folder: str | Path, split: str, images: Sequence[np.ndarray], targets: np.ndarray,
                      classes: Sequence[str]) -> Path:
    """Images (h, w, 3) uint8 and targets (N, C) in VOC's layout, for `voc_classes`; returns the folder VOCdevkit."""
    root = Path(folder) / "VOCdevkit"
    lists, pictures = root / "VOC2007/ImageSets/Main", root / "VOC2007/JPEGImages"
    for part in (lists, pictures):
        part.mkdir(parents=True, exist_ok=True)
    name, first = ("trainval", 1) if split == "train" else ("test", 500_001)
    for i, image in enumerate(images, first):
        Image.fromarray(image).save(pictures / f"{i:06d}.jpg", quality=95)
    said = {1: " 1", 0: "-1", -1: " 0"}
    for c, column in zip(classes, targets.T, strict=True):
        lines = [f"{i:06d} {said[int(t)]}\n" for i, t in enumerate(column, first)]
        (lists / f"{c}_{name}.txt").write_text("".join(lines))
    return root


def digits_in_photos(split: str, images: int = 300, digits: int = 5) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """A small set of this kind out of embedded images: (N, 40, 40, 3) uint8, targets (N, digits), class names.

    Up to four digits, 0 to 4, lie on a dark crop of a photograph; one in ten is so faint that it counts as difficult.
    """
    from ..embedded import digits_scattered, photos

    pictures, labels, names = digits_scattered(split)
    photographs, rng = photos(split)[0], np.random.RandomState({"train": 1, "test": 2}[split])
    of = np.flatnonzero(labels < digits)
    scenes, targets = [], np.zeros((images, digits), np.int8)
    for row in targets:
        top, left = rng.randint(0, 256 - 40, 2)
        scene = (0.3 * photographs[rng.randint(len(photographs)), top:top + 40, left:left + 40]).astype(np.uint8)
        places = rng.permutation(4)[:rng.randint(1, 5)]
        for place, i in zip(places, rng.choice(of, len(places), replace=False), strict=True):
            faint = rng.random_sample() < 0.1
            y, x = 20 * (place // 2), 20 * (place % 2)
            digit = (pictures[i] * (0.3 if faint else 1)).astype(np.uint8)
            scene[y:y + 20, x:x + 20] = np.maximum(scene[y:y + 20, x:x + 20], digit)
            row[labels[i]] = 1 if row[labels[i]] == 1 or not faint else -1
        scenes.append(scene)
    return np.stack(scenes), targets, names[:digits]


# ---------------------------------------------------------------- features


@dataclass
class VocFeatures:
    """Levels' features of both splits, (N, D) float32 each, and targets (N, C)."""

    source: str
    data: str
    classes: list[str]
    targets: dict[str, np.ndarray]
    levels: dict[str, dict[str, np.ndarray]]  # level -> split -> features
    folder: Path | None = None
    images: dict[str, Images] = field(default_factory=dict, repr=False)

    def unit(self, level: str, split: str) -> np.ndarray:
        """float64, every row divided by its length."""
        x = self.levels[level][split].astype(np.float64)
        return x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-5)


@dataclass(frozen=True)
class Squash(ImageOp):
    """`size` x `size` pixels, whatever the aspect."""

    size: int

    def __call__(self, image: Image.Image, rng=None) -> Image.Image:
        return image.resize((self.size, self.size), Image.Resampling.BILINEAR)


def voc_features(source, data: str | Path, *, kind: str = "trained", size: int | None = None,
                 backbone: str | None = None, classes: Sequence[str] | None = None, batch: int = 64,
                 device: str = "auto", workers: int | str = "auto", seed: int = 0) -> VocFeatures:
    """The pooled maps of all images. `source` and `backbone` are as in train_protocol; `kind`: the source as it is
    "trained", its "random initialisation", or "raw pixels" of the same images. Errors: InputError for missing lists and
    images."""
    if kind not in KINDS:
        unknown("kind of features", kind, KINDS)
    source = open_source(source, seed, backbone)
    size = size or source.size or LARGEST_SIZE
    found = {split: voc_classes(data, split, classes) for split in ("train", "test")}
    images, names = {split: rows[0] for split, rows in found.items()}, found["train"][2]
    for part in images.values():
        there = set(os.listdir(part.root)) if part.root.is_dir() else set()
        missing = [i for i in range(len(part)) if os.path.basename(part.where(i)) not in there]
        if missing:
            raise InputError(f"{len(missing)} images of the lists are not in {part.root}, first "
                             f"{os.path.basename(part.where(missing[0]))}: every image must be there.")
    device = the_device(device)
    if kind == "raw pixels":
        levels = {"pixels": {split: raw_pixels(part, size).x.numpy() for split, part in images.items()}}
    else:
        network = source.backbone(size) if kind == "trained" else source.rival(images["train"], size, seed)
        rows = {split: _maps_of(network.to(device), part, size, batch, workers) for split, part in images.items()}
        levels = {f"feat{i}": {split: rows[split][i - 1] for split in rows} for i in range(1, len(rows["test"]) + 1)}
    return VocFeatures(source.name if kind == "trained" else kind, str(data), names,
                       {split: rows[1] for split, rows in found.items()}, levels, source.folder, images)


@torch.no_grad()
def _maps_of(backbone: nn.Module, images: Images, size: int, batch: int, workers: int | str) -> list[np.ndarray]:
    pooled, _ = pools(backbone.eval(), size=size)
    short = [Resize(round(size * MARGIN), "bilinear")] if size >= MARGIN_FROM else []
    view = Views(View(*short, Squash(size), Normalize()))  # to 256 first and then to a square: as published
    loader = in_order(images, view, batch, workers)
    device, levels = next(backbone.parameters()).device, [[] for _ in pooled]
    for (crops,), _, seeds, broken in loader:
        if (broken >= 0).any():
            images[int(broken.max())]  # says which file and why; no image may be missing here
        (x,) = view.photometric([crops.to(device)], seeds)
        for rows, pool, one in zip(levels, pooled, maps(backbone, x), strict=True):
            rows.append(pool(one).flatten(1).cpu().numpy())
    return [np.concatenate(rows) for rows in levels]
