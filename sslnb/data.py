"""Images by name or by path, the 1 % and 10 % subsets, and what training reads: crops in a fixed order.

`load` finds a set of images. `ViewSet` turns one of its images into uint8 crops and hands its index back.
`EpochSampler` decides which image is read when; a run's data is a pure function of (seed, epoch, step).
"""

import gzip
import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from sslnb.errors import InputError, unknown

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
           "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
HELD_OUT = 0.1
MOST_REPLACEMENTS = 100


class BrokenImage(InputError):
    """An image that cannot be decoded; the message says which and why."""


class Images(Dataset):
    """A set of images with optional labels: `images[i]` is a PIL image in RGB.

    `items` is uint8 (N, h, w) or (N, h, w, 3) when `root` is None, else N file paths relative to `root`.
    `labels` is a LongTensor (N,) or None; `classes` names them, [] without labels.
    """

    def __init__(self, name: str, split: str, items: np.ndarray | list[str], *,
                 labels: Sequence[int] | np.ndarray | Tensor | None = None,
                 classes: Sequence[str] = (), root: Path | None = None) -> None:
        if isinstance(items, list):
            # One block of bytes: a million Python strings would be copied into every loader worker.
            items = np.array([os.fsencode(path) for path in items])
        self.name, self.split, self.items, self.root = name, split, items, root
        self.labels = None if labels is None else torch.as_tensor(np.array(labels, dtype=np.int64))
        self.classes = list(classes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Image.Image:
        """The i-th image in RGB. Raises BrokenImage if it cannot be decoded."""
        if self.root is None:
            return Image.fromarray(self.items[i]).convert("RGB")
        return read_image(self.where(i))

    def where(self, i: int) -> str:
        """The i-th image's file, or `name[i]` for a set that is held in memory."""
        return f"{self.name}[{i}]" if self.root is None else str(self.root / os.fsdecode(self.items[i]))

    def subset(self, indices: Sequence[int] | np.ndarray | Tensor) -> "Images":
        """The images at these positions, in this order, with the same classes."""
        indices = np.asarray(indices, dtype=np.int64)
        labels = None if self.labels is None else self.labels[indices]
        return Images(self.name, self.split, self.items[indices],
                      labels=labels, classes=self.classes, root=self.root)


def load(name: str | Path, split: str = "train", *, fraction: float | str | Path | None = None,
         classes: str | Path | None = None, root: str | Path | None = None, seed: int = 0) -> Images:
    """A set of images: by name, or by the path of a folder or a list file (a Path is never a name).

    A folder has class folders, or images without labels, possibly below train/ and val/ or test/ (val/ is
    taken if there are both, since test/ is often published without labels). A list file has one
    `path label` or `path` per line, relative to `root` or else to the file's folder. Where a path brings no
    split folders, 10 % of each class, drawn by `seed`, is the split "test", the rest is "train", and "all"
    is both: use one seed for both splits, or they overlap.

    `fraction` keeps a part in (0, 1] of each class, drawn by `seed` (a smaller part lies inside a larger
    one), or the images named in a file, one `file` or `class/file` per line. `classes` is a file that names
    one class per line and restricts the set to them; "imagenet100" needs it. `root` is the folder of a
    downloaded set (default: $SSLNB_DATA or ./data; for ImageNet $IMAGENET or ./data/imagenet).

    Raises InputError, in one sentence, for whatever is unknown, missing or contradictory.
    """
    readers = _readers()
    if isinstance(name, str) and name in readers:
        if name == "imagenet100" and classes is None:
            raise InputError("imagenet100 needs its class list, which sslnb does not ship: pass classes=FILE "
                             "with 100 ImageNet class folder names, one per line.")
        images = readers[name](name, split, root)
    else:
        images = _from_path(name, split, root, seed, readers)
    if classes is not None:
        images = _only_classes(images, Path(classes).expanduser())
    if isinstance(fraction, str | Path):
        return images.subset(_named_in(images, Path(fraction).expanduser()))
    if fraction is None or fraction == 1:
        return images
    if not 0 < fraction <= 1:
        raise InputError(f"fraction is {fraction}, but it must be in (0, 1], for example 0.1, or a list file.")
    return images.subset(_draw(images, fraction, seed))


def broken(images: Images) -> list[int]:
    """The positions of all images that cannot be decoded; it reads every image once."""
    return [i for i in range(len(images)) if _try(images, i) is None]


# Decoding

def read_image(path: str | Path) -> Image.Image:
    """The image file in RGB, upright. Raises BrokenImage(path and reason)."""
    try:
        with Image.open(path) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return to_rgb(image)
    except Exception as error:  # damaged files make Pillow raise OSError, SyntaxError, ValueError and others
        raise BrokenImage(f"Cannot read image {path}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL image in RGB: transparency on white, 16 bits scaled to 8, floats stretched from min to max."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        low, high = (values.min(), values.max()) if image.mode == "F" else (0, 65535)
        values = (values - low) / max(high - low, 1e-12) * 255
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _try(images: Images, i: int) -> Image.Image | None:
    try:
        return images[i]
    except BrokenImage:
        return None


# Sets known by name

def _readers() -> dict[str, Callable[[str, str, str | Path | None], Images]]:
    from sslnb.embedded import EMBEDDED
    return {**dict.fromkeys(EMBEDDED, _embedded), "fashion_mnist": _fashion_mnist,
            **dict.fromkeys(TORCHVISION, _torchvision), **dict.fromkeys(["imagenet", "imagenet100"], _imagenet)}


def _embedded(name: str, split: str, root: str | Path | None) -> Images:
    from sslnb.embedded import EMBEDDED
    _check_split(name, split)
    pixels, labels, classes = EMBEDDED[name](split)
    return Images(name, split, pixels, labels=labels, classes=classes)


def _fashion_mnist(name: str, split: str, root: str | Path | None) -> Images:
    _check_split(name, split)
    start = "train" if split == "train" else "t10k"
    folders = [_data_root(root) / "FashionMNIST" / "raw", DEBIAN_FASHION]
    for folder in folders:
        for end in ("", ".gz"):
            pixels, labels = folder / f"{start}-images-idx3-ubyte{end}", folder / f"{start}-labels-idx1-ubyte{end}"
            if pixels.is_file() and labels.is_file():
                return Images(name, split, _read_idx(pixels), labels=_read_idx(labels), classes=FASHION)
    raise InputError(f"fashion_mnist is neither in {folders[0]} nor in {folders[1]}; get it with "
                     f"torchvision.datasets.FashionMNIST({str(_data_root(root))!r}, download=True).")


def _read_idx(path: Path) -> np.ndarray:
    """An idx file: 4 bytes that end in the number of axes, their lengths as big-endian int32, then uint8."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and get it again.") from error


def _torchvision(name: str, split: str, root: str | Path | None) -> Images:
    _check_split(name, split, ("train", "test", "unlabeled") if name == "stl10" else ("train", "test"))
    from torchvision import datasets
    kind, folder = getattr(datasets, TORCHVISION[name]), _data_root(root)
    which = {"split": split} if name == "stl10" else {"train": split == "train"}
    try:
        found = kind(folder, download=False, **which)
    except (RuntimeError, OSError) as error:
        argument = ", ".join(f"{key}={value!r}" for key, value in which.items())
        raise InputError(f"{name} is not (or not whole) in {folder.absolute()}; get it with torchvision.datasets."
                         f"{TORCHVISION[name]}({str(folder)!r}, {argument}, download=True).") from error
    if split == "unlabeled":
        return Images(name, split, found.data.transpose(0, 2, 3, 1))
    if name == "stl10":
        return Images(name, split, found.data.transpose(0, 2, 3, 1), labels=found.labels, classes=found.classes)
    return Images(name, split, found.data, labels=found.targets, classes=found.classes)


def _imagenet(name: str, split: str, root: str | Path | None) -> Images:
    _check_split(name, split)
    folder = Path(root or os.environ.get("IMAGENET") or "data/imagenet").expanduser()
    if not folder.is_dir():
        raise InputError(f"ImageNet is not in {folder.absolute()}; set root= or the environment variable IMAGENET "
                         "to the folder that has train/<class>/*.JPEG and val/<class>/*.JPEG.")
    return _split_folder(folder, split, name)


def _data_root(root: str | Path | None) -> Path:
    return Path(root or os.environ.get("SSLNB_DATA") or "data").expanduser()


def _check_split(name: str, split: str, known: Sequence[str] = ("train", "test")) -> None:
    if split not in known:
        unknown(f"split of {name}", split, known)


# Folders and list files

def _from_path(name: str | Path, split: str, root: str | Path | None, seed: int, known: Sequence[str]) -> Images:
    path = Path(name).expanduser()
    if path.is_file():
        return _hold_out(_listed(path, Path(root).expanduser() if root else path.parent), split, seed)
    if not path.is_dir():
        if isinstance(name, str) and os.sep not in name:
            unknown("data set (a name, or a path to a folder or list file)", name, known)
        raise InputError(f"The data folder or list file {path} does not exist.")
    folders = set(_scan(path)[1])
    splits = folders & {"train", "val", "test"}
    # A class may be called "train" too: it is a split beside another split or when there is nothing else.
    if splits and (splits == folders or "train" in splits and len(splits) > 1):
        return _split_folder(path, split, str(path))
    return _hold_out(_folder(path, str(path), split), split, seed)


def _split_folder(root: Path, split: str, name: str) -> Images:
    _check_split(name, split)
    held = "test" if (root / "test").is_dir() and not (root / "val").is_dir() else "val"
    chosen = root / ("train" if split == "train" else held)
    if not chosen.is_dir():
        raise InputError(f"{root} has no folder {chosen.name}/ for the split {split!r}; add it, or load one of its "
                         "folders by its own path, and 10 % of that is held out for testing.")
    # Both splits number the classes alike, even when one of them lacks a class.
    names = {c for part in ("train", held) if (root / part).is_dir() for c in _scan(root / part)[1]}
    return _folder(chosen, name, split, sorted(names))


def _folder(folder: Path, name: str, split: str, classes: list[str] | None = None) -> Images:
    loose, folders = _scan(folder)
    found = {c: _tree(folder / c, c) for c in folders}
    if classes is None:
        classes = [c for c in folders if found[c]]
    if loose and classes:
        raise InputError(f"{folder} should have only class folders or only images, but has class folders "
                         f"({classes[0]}, ...) and {len(loose)} images beside them ({loose[0]}, ...).")
    files = loose or [file for c in classes for file in found.get(c, [])]
    if not files:
        raise InputError(f"{folder} has no images ({' '.join(EXTENSIONS)}).")
    labels = [k for k, c in enumerate(classes) for _ in found.get(c, [])]
    return Images(name, split, files, labels=labels or None, classes=classes, root=folder)


def _tree(folder: Path, prefix: str) -> list[str]:
    files, folders = _scan(folder)
    found = [f"{prefix}/{file}" for file in files]
    return found + [file for sub in folders for file in _tree(folder / sub, f"{prefix}/{sub}")]


def _scan(folder: Path) -> tuple[list[str], list[str]]:
    """The image files and the folders in a folder, sorted, hidden ones left out; no system call per image."""
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.name.lower().endswith(EXTENSIONS):
                files.append(entry.name)
            elif entry.is_dir():
                folders.append(entry.name)
    return sorted(files), sorted(folders)


def _listed(file: Path, root: Path) -> Images:
    lines = _lines(file)
    pairs = [line.rsplit(maxsplit=1) for line in lines]
    labelled = [pair for pair in pairs if len(pair) == 2 and pair[1].isdecimal()]
    if labelled and len(labelled) < len(lines):
        raise InputError(f"{file}: {len(labelled)} of {len(lines)} lines end in a label; label all or none.")
    paths = [path for path, _ in labelled] or lines
    missing = _missing(root, paths)
    if missing:
        raise InputError(f"{file} names {len(missing)} files that do not exist in {root}, the first is {missing[0]!r}.")
    labels = [int(label) for _, label in labelled]
    classes = [str(k) for k in range(max(labels) + 1)] if labels else []
    return Images(str(file), "all", paths, labels=labels or None, classes=classes, root=root)


def _missing(root: Path, paths: list[str]) -> list[str]:
    # Listing each folder once is far quicker on network disks than asking for a million files.
    there = {folder: set(os.listdir(root / folder)) if (root / folder).is_dir() else set()
             for folder in {os.path.dirname(path) for path in paths}}
    return [path for path in paths if os.path.basename(path) not in there[os.path.dirname(path)]]


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text("utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not a readable list file, one entry per line: {error}.") from error
    if not lines:
        raise InputError(f"The list file {file} is empty.")
    return lines


# Parts of a set

def _hold_out(images: Images, split: str, seed: int) -> Images:
    _check_split(images.name, split, ("train", "test", "all"))
    held = _draw(images, HELD_OUT, seed, leave=1)
    chosen = {"test": held, "train": np.setdiff1d(np.arange(len(images)), held), "all": np.arange(len(images))}[split]
    if not len(chosen):
        raise InputError(f"{images.name} has {len(images)} images, no class more than one: too few to hold out a test part.")
    part = images.subset(chosen)
    part.split = split
    return part


def _draw(images: Images, fraction: float, seed: int, leave: int = 0) -> np.ndarray:
    """Positions of a random part of each class: at least one image of it, but always `leave` not drawn."""
    labels = np.zeros(len(images)) if images.labels is None else images.labels.numpy()
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    rng = np.random.RandomState(seed)  # its numbers never change between numpy versions; default_rng's may
    drawn = [rng.permutation(group)[:min(max(1, round(fraction * len(group))), len(group) - leave)]
             for group in groups]
    return np.sort(np.concatenate(drawn))


def _only_classes(images: Images, file: Path) -> Images:
    wanted = sorted(set(_lines(file)))
    absent = [c for c in wanted if c not in images.classes]
    if absent:
        raise InputError(f"{file} names {len(absent)} classes that {images.name} does not have, e.g. {absent[0]!r}.")
    keep = torch.isin(images.labels, torch.tensor([images.classes.index(c) for c in wanted]))
    part = images.subset(keep.nonzero()[:, 0])
    part.labels = torch.tensor([wanted.index(images.classes[k]) for k in part.labels.tolist()])
    part.classes = wanted
    return part


def _named_in(images: Images, file: Path) -> list[int]:
    if images.root is None:
        raise InputError(f"{images.name} has no files, so fraction={str(file)!r} cannot name them; give a number.")
    wanted = set(_lines(file))
    found = {}
    for i, path in enumerate(map(os.fsdecode, images.items)):
        for name in {path, os.path.basename(path)} & wanted:
            found.setdefault(name, []).append(i)
    if len(found) < len(wanted):
        raise InputError(f"{len(wanted) - len(found)} of the {len(wanted)} files named in {file} are not in "
                         f"{images.name}, the first is {min(wanted - found.keys())!r}.")
    double = [name for name in sorted(found) if len(found[name]) > 1]
    if double:
        raise InputError(f"{file} names {double[0]!r}, which fits {len(found[double[0]])} images; write class/file.")
    return sorted({i for places in found.values() for i in places})


# What training reads

class ViewSet(Dataset):
    """`views[(index, seed)]` is (crops, index, seed, ok), where crops are uint8 tensors (3, h, w).

    `crop(image, rng)` cuts them; all its chance comes from rng, a `random.Random(seed)`, so the crops depend
    neither on the worker nor on the number of workers. A broken image is replaced by the next readable one
    and ok is False: every process keeps its full batch. InputError after 100 broken images in a row.
    Torch's default collate makes ([(B, 3, h, w) uint8, ...], index (B,), seed (B,), ok (B,) bool).
    """

    def __init__(self, images: Images, crop: Callable[[Image.Image, random.Random], list[Tensor]]) -> None:
        self.images, self.crop = images, crop

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index_and_seed: tuple[int, int]) -> tuple[list[Tensor], int, int, bool]:
        index, seed = index_and_seed
        for skipped in range(min(MOST_REPLACEMENTS, len(self))):
            image = _try(self.images, (index + skipped) % len(self))
            if image is not None:
                return self.crop(image, random.Random(seed)), index, seed, skipped == 0
        raise InputError(f"{skipped + 1} images in a row cannot be decoded, from {self.images.where(index)} on; "
                         "check the data.")


class EpochSampler(Sampler):
    """A batch sampler: lists of `batch` pairs (index, draw seed) for the process `rank` of `world`.

    All processes share one permutation per (seed, epoch), and global step t is its t-th slice of
    batch * world images, so W processes see together what one process with a W times larger batch sees.
    The incomplete last step is dropped. Raises InputError if not even one step fits the `size` images.
    """

    def __init__(self, size: int, batch: int, *, rank: int = 0, world: int = 1, seed: int = 0) -> None:
        if batch * world > size:
            raise InputError(f"A batch of {batch} on {world} processes needs {batch * world} images, but there are "
                             f"{size}: the batch is larger than the data; lower batch or take more images.")
        self.size, self.batch, self.rank, self.world, self.seed = size, batch, rank, world, seed
        self.epoch = self.step = 0

    def set_position(self, epoch: int, step: int = 0) -> None:
        """The next iteration starts at this step of this epoch."""
        self.epoch, self.step = epoch, step

    def __len__(self) -> int:
        return max(0, self.size // (self.batch * self.world) - self.step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        seed, epoch, total = self.seed, self.epoch, self.batch * self.world
        order = np.random.RandomState(draw_seed(seed, epoch, -1) % 2**32).permutation(self.size)
        for step in range(self.step, self.size // total):
            start = step * total + self.rank * self.batch
            yield [(i, draw_seed(seed, epoch, i)) for i in order[start:start + self.batch].tolist()]


def draw_seed(seed: int, epoch: int, index: int) -> int:
    """The 62-bit seed of an image's crops: a pure function, so a resumed or rescaled run draws the same."""
    digest = hashlib.blake2b(f"{seed} {epoch} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2
