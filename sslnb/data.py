"""Images by name or by path, in RGB, and parts of a set such as the 1 % and 10 % subsets."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .decoding import BrokenImage, pixels, read_image, read_pixels
from .embedded import DEBIAN_FASHION_MNIST, EMBEDDED, FASHION_CLASSES, read_idx
from .errors import InputError, unknown
from .files import expanded
from .folders import EXTENSIONS, Listing, check_classes, kept, layout, listing, subfolders, with_images

DOWNLOADS = {"fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}
NAMES = [*EMBEDDED, "clothes_in_photos", *DOWNLOADS, "imagenet"]
HELD_OUT = 0.1


class Images(Dataset):
    """A set of images: `images[i]` is a PIL image in RGB, or BrokenImage is raised.

    `items` is uint8 (N, h, w) or (N, h, w, 3), or with `root` a list of N file paths relative to it.
    `labels` is a LongTensor (N,) or None; `classes` names them, [] without labels.
    """

    def __init__(self, name: str, split: str, items: np.ndarray | list[str], *, root: Path | None = None,
                 labels: Sequence[int] | Tensor | None = None, classes: Sequence[str] = ()) -> None:
        if isinstance(items, list):  # one block of bytes: a million strings would be copied into every worker
            items = np.array([os.fsencode(path) for path in items])
        self.name, self.split, self.items, self.root = name, split, items, root
        self.labels = None if labels is None else torch.tensor(np.asarray(labels), dtype=torch.int64)
        self.classes = [] if labels is None else list(classes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Image.Image:
        return read_image(self.where(i)) if self.root else Image.fromarray(self.items[i]).convert("RGB")

    def pixels(self, i: int) -> Tensor:
        """The i-th image as uint8 (3, H, W), with the channels of a pixel side by side in memory; `images[i]`, sooner.
        """
        return read_pixels(self.where(i)) if self.root else pixels(self[i])

    def first(self, count: int) -> list[Image.Image]:
        """The first `count` that can be read, or all of them if they are fewer. Errors: InputError if there is none."""
        found: list[Image.Image] = []
        for i in range(len(self)):
            if len(found) == count:
                break
            with suppress(BrokenImage):
                found.append(self[i])
        if not found:
            raise InputError(f"No image can be decoded from {self.where(0)} on; is the folder still there?")
        return found

    def where(self, i: int) -> str:
        """The i-th image's file, or `name[i]` for a set that is held in memory."""
        return f"{self.name}[{i}]" if self.root is None else str(self.root / os.fsdecode(self.items[i]))

    def subset(self, indices: Sequence[int] | np.ndarray | Tensor) -> "Images":
        """The images at these positions, in this order, with the same classes."""
        at = np.asarray(indices, dtype=np.int64)
        labels = None if self.labels is None else self.labels[at]
        return Images(self.name, self.split, self.items[at], root=self.root,
                      labels=labels, classes=self.classes)


def load(name: str | Path, split: str = "train", *, fraction: float | str | Path | None = None,
         classes: str | Path | None = None, root: str | Path | None = None, seed: int = 0) -> Images:
    """A set of images by name, or by the path of a folder or list file (a Path is never taken for a name).

    A folder has class folders, or images without labels, possibly below train/ and val/ or valid/ (or else test/). A
    list file has one `path label` or `path` per line, relative to `root` or else to its own folder; train.txt and
    val.txt in a folder are one for each split. Where nothing splits labelled images, "test" is 10 % of each class
    drawn by `seed` and "train" is the rest, so use the same seed for both; without labels both are all images.
    `fraction` keeps a part in (0, 1] of each class drawn by `seed`, or the images named in a file (`file` or
    `class/file` per line). `classes` is a file with the classes to keep, one per line.
    A folder in the layout of VOC or COCO has boxes too, see sslnb.boxes.
    The list of a folder with more than 20,000 images is kept in $XDG_CACHE_HOME/sslnb (else ~/.cache/sslnb), and made
    anew as soon as a file or folder was added, removed or renamed; see sslnb.folders.
    `root` is where a downloaded set lies: otherwise $SSLNB_DATA or ./data (or, of Fashion-MNIST, Debian's package), for
    ImageNet $IMAGENET or ./data/imagenet. Whatever is unknown, missing or contradictory raises InputError.
    """
    splits = ["train", "test", "unlabeled"] if name == "stl10" else ["train", "test"]
    if split not in splits:
        unknown(f"split of {name}", split, splits)
    if name == "imagenet100" and classes is None and not Path(name).is_dir():
        raise InputError("imagenet100 is a part of ImageNet's classes, and we ship no list: with yours, class folders "
                         "one per line, make a folder of links: `for s in train val; do mkdir -p imagenet100/$s; ln -s "
                         "$(sed \"s|^|$(realpath ${IMAGENET:-data/imagenet})/$s/|\" classes.txt) imagenet100/$s; done`")
    try:
        images = _find(name, split, root, seed)
    except PermissionError as error:
        raise InputError(f"{name} cannot be read by this user ({error.strerror}: {error.filename}); change who may "
                         "read it, or give another folder.") from None
    if classes is not None and images.labels is None:
        raise InputError(f"{images.name} has no labels of whole images, by which classes={classes} could keep some.")
    if classes is not None:
        images = _only_classes(images, Path(classes))
    if fraction is None:
        return images
    if isinstance(fraction, str | Path):
        return images.subset(_named_in(images, Path(fraction)))
    if not 0 < fraction <= 1:
        raise InputError(f"fraction={fraction} is outside (0, 1]: give a part such as 0.1, or a list file.")
    return images.subset(_draw(images, fraction, seed))


def said(data: object) -> object:
    """A path as text, for a recipe; it stays one: `Path("photos")` is a folder and no set of ours. All else as it is,
    for the recipe to judge."""
    if not isinstance(data, os.PathLike):
        return data
    return str(data.absolute()) if str(data) in NAMES else str(data)


def located(name: str) -> str:
    """The name, or the whole path of what is no name: it holds from any folder."""
    return name if name in (*NAMES, *EMBEDDED) else str(expanded(name).absolute())


def _find(name: str | Path, split: str, root: str | Path | None, seed: int) -> Images:
    path = expanded(name)
    if isinstance(name, str) and name in NAMES and path.is_dir():
        raise InputError(f"{name!r} is a set of ours and a folder here; write './{name}' for the folder, or rename it.")
    if name in EMBEDDED:
        pixels, labels, classes = EMBEDDED[name](split)
        return Images(name, split, pixels, labels=labels, classes=classes)
    if name in DOWNLOADS:
        return _downloaded(name, split, root)
    known = None if name in NAMES else kept(path)
    if known is None or any(folder.startswith(("VOC", "annotations")) for folder in known.folders):
        from . import boxes
        if (found := boxes.find(name, split)) is not None:
            return found
    if name in NAMES or name == "imagenet100" and not path.is_dir():
        folder = expanded(root or os.environ.get("IMAGENET", "data/imagenet"))
        return _split_folder(folder, split, name, layout(folder)[0])
    if path.is_file():
        return _hold_out(_listed(path, expanded(root or path.parent), split, str(path)), seed)
    if not path.is_dir():
        unknown("data set (a name, or a path to a folder or list file that exists)", str(name), NAMES)
    parts, others = layout(path, known)
    if parts and not others:
        return _split_folder(path, split, str(path), parts)
    lists = path / "train.txt", path / "val.txt"
    if all(file.is_file() for file in lists):
        return _listed(lists[split != "train"], expanded(root or path), split, str(path))
    found = known or listing(path)
    check_classes(path, found, parts, others)
    return _hold_out(_folder(path, str(path), split, [], found), seed)


def _downloaded(name: str, split: str, given: str | Path | None) -> Images:
    which = {"split": split} if name == "stl10" else {"train": split == "train"}
    root = expanded(given or os.environ.get("SSLNB_DATA", "data"))
    try:
        if name == "fashion_mnist":
            return _fashion_mnist(split, root / "FashionMNIST" / "raw", given is None)
        from torchvision import datasets
        found = getattr(datasets, DOWNLOADS[name])(root, **which)
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise InputError(f"{name} is not whole in {root.absolute()}: set root= or SSLNB_DATA, or run "
                         f"torchvision.datasets.{DOWNLOADS[name]}({str(root)!r}, download=True).") from error
    if name != "stl10":
        return Images(name, split, found.data, labels=found.targets, classes=found.classes)
    labels = None if split == "unlabeled" else found.labels
    return Images(name, split, found.data.transpose(0, 2, 3, 1), labels=labels, classes=found.classes)


def _fashion_mnist(split: str, folder: Path, or_debians: bool) -> Images:
    start = "train" if split == "train" else "t10k"
    for place, end in [(folder, ""), (folder, ".gz")] + [(DEBIAN_FASHION_MNIST, ".gz")] * or_debians:
        pixels, labels = (place / f"{start}-{part}-ubyte{end}" for part in ("images-idx3", "labels-idx1"))
        if pixels.is_file():
            return Images("fashion_mnist", split, read_idx(pixels),
                          labels=read_idx(labels), classes=FASHION_CLASSES)
    raise FileNotFoundError(folder)


def _split_folder(root: Path, split: str, name: str, parts: dict[str, str]) -> Images:
    held = "val" if "val" in parts else "test"  # val/ first: test/ is often published without labels
    chosen = "train" if split == "train" else held
    if chosen not in parts:
        raise InputError(f"{name}: there is no folder {root.absolute() / chosen} for the split {split!r}, or no "
                         "image in it: add it, or load another folder (for ImageNet: root= or the variable IMAGENET).")
    # Classes of both splits, so that both number them alike even where one split lacks a class.
    classes = {part: subfolders(root / parts[part]) for part in ("train", held) if part in parts}
    folder = root / parts[chosen]
    images = _folder(folder, name, split, sorted(set().union(*classes.values())), listing(folder))
    if images.labels is None and "train" in parts and with_images(root / parts["train"], classes["train"]):
        raise InputError(f"{folder}/ has no class folders, {parts['train']}/ has; sort its images into class folders.")
    return images


def _folder(folder: Path, name: str, split: str, classes: list[str], found: Listing) -> Images:
    if len(found.files) == 0:
        raise InputError(f"{folder} has no images ({' '.join(EXTENSIONS)}); save other kinds, "
                         "such as a phone's .heic, as JPEG, and unpack archives such as .tar.")
    used = np.unique(found.owners)  # -1 first, for images in no folder
    own = [found.folders[k] for k in used if k >= 0]
    if own and used[0] < 0:
        raise InputError(f"{folder} has {np.count_nonzero(found.owners < 0)} images beside class folders such as "
                         f"{own[0]}/: it must have only class folders, or only images.")
    classes = own and (classes or own)  # a split without folders has no labels, though another may have
    place = {c: k for k, c in enumerate(classes)}
    number = np.array([place.get(c, -1) for c in found.folders], dtype=np.int64)  # -1: no image is in it
    labels = number[found.owners] if classes else None
    return Images(name, split, found.files, root=folder, labels=labels, classes=classes)


def _listed(file: Path, root: Path, split: str, name: str) -> Images:
    lines = _lines(file)
    pairs = [pair for pair in (line.rsplit(maxsplit=1) for line in lines) if pair[1:] and pair[1].isdecimal()]
    if pairs and len(pairs) < len(lines):
        raise InputError(f"{file}: {len(pairs)} of {len(lines)} lines end in a label; label all or none.")
    paths = [path for path, _ in pairs] or lines
    # Each folder is listed once: asking a network disk for a million files one by one takes minutes.
    folders = {folder: root / folder for folder in map(os.path.dirname, paths)}
    there = {key: set(os.listdir(folder)) if folder.is_dir() else set() for key, folder in folders.items()}
    missing = [path for path in paths if os.path.basename(path) not in there[os.path.dirname(path)]]
    if missing:
        raise InputError(f"{file} names {len(missing)} files that are not in {root}, first {missing[0]!r}.")
    labels = [int(label) for _, label in pairs]
    classes = [str(k) for k in range(max(labels, default=-1) + 1)]
    return Images(name, split, paths, root=root, labels=labels or None, classes=classes)


def _lines(file: Path) -> list[str]:
    try:
        text = expanded(file).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        remedy = " Unpack it, and give the folder." if file.name.endswith((".tar", ".tgz", ".tar.gz", ".zip")) else ""
        raise InputError(f"{file} cannot be read as a list file, one entry per line: {error}.{remedy}") from error
    if not text.strip():
        raise InputError(f"The list file {file} is empty.")
    return [line.strip() for line in text.split("\n") if line.strip()]


def _hold_out(images: Images, seed: int) -> Images:
    if images.labels is None:
        return images  # nothing can be tested without labels, so nothing is kept from training
    test = _draw(images, HELD_OUT, seed, leave=1)
    part = images.subset(test if images.split == "test" else _others(test, len(images)))
    if len(part) == 0:
        raise InputError(f"{images.name} has {len(images)} image(s), too few to hold out a part for testing.")
    return part


def _draw(images: Images, fraction: float, seed: int, leave: int = 0) -> np.ndarray:
    """Sorted positions of a random part of each class: at least one image, but `leave` stay undrawn."""
    labels = np.zeros(len(images)) if images.labels is None else images.labels.numpy()
    rng = np.random.RandomState(seed % 2**32)  # the same in every numpy version; default_rng may change
    order, drawn = np.argsort(labels, kind="stable"), []
    for group in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        group = rng.permutation(group)
        drawn.append(group[:min(max(1, round(fraction * len(group))), len(group) - leave)])
    return np.sort(np.concatenate(drawn))


def _others(drawn: np.ndarray, images: int) -> np.ndarray:
    """Sorted positions of the images that are not drawn."""
    rest = np.ones(images, dtype=bool)
    rest[drawn] = False
    return np.flatnonzero(rest)


def parted(images: Images, fraction: float, seed: int = 0) -> tuple[Images, Images]:
    """The images without a part of every class, and that part, drawn by `seed`; a class of one image stays whole."""
    if not 0 < fraction < 1:
        raise InputError(f"A part of {fraction} cannot be held out: give a number between 0 and 1.")
    held = _draw(images, fraction, seed, leave=1)
    return images.subset(_others(held, len(images))), images.subset(held)


def _only_classes(images: Images, file: Path) -> Images:
    wanted = sorted(set(_lines(file)))
    absent = sorted(set(wanted).difference(images.classes))
    if absent:
        raise InputError(f"{file}: {images.name} lacks {len(absent)} of {len(wanted)} classes: {absent[:3]}")
    place = {c: k for k, c in enumerate(wanted)}
    number = torch.tensor([place.get(c, -1) for c in images.classes])[images.labels]
    part = images.subset((number >= 0).nonzero()[:, 0])
    part.labels, part.classes = number[number >= 0], wanted
    return part


def _named_in(images: Images, file: Path) -> list[int]:
    wanted, found = set(_lines(file)), {}
    for i in range(len(images) if images.root else 0):
        path = os.fsdecode(images.items[i])
        for name in {path, os.path.basename(path)} & wanted:
            found.setdefault(name, []).append(i)
    wrong = sorted(name for name in wanted if len(found.get(name, [])) != 1)
    if wrong:
        raise InputError(f"{file}: {len(wrong)} of {len(wanted)} file names are not in {images.name}, or fit "
                         f"several images there: {wrong[:3]}.")
    return sorted({places[0] for places in found.values()})
