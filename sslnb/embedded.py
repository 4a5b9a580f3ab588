"""Real images that come with the package or its dependencies: nothing here is downloaded.

| name | images (train + test) | what it is |
|---|---|---|
| `digits` | 1,300 + 497, 8x8 | scikit-learn's handwritten digits as they are |
| `digits_scattered` | 1,300 + 497, 20x20 | the same digits, each placed once on a larger canvas |
| `fashion_small` | 5,000 + 1,000, 28x28 | the first images of Fashion-MNIST (MIT licence, Zalando SE) |
| `photos` | 11, 256x256 | colour photographs shipped by scikit-image, scikit-learn and matplotlib, no labels |

Every loader takes the split and returns `(images uint8 (N, H, W, 3), labels int64 (N,) or None, class names)`.
"""

import gzip
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

Loaded = tuple[np.ndarray, np.ndarray | None, list[str]]

ASSETS = Path(__file__).parent / "assets"
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
TRAIN_DIGITS = 1300  # scikit-learn keeps the writers together, so the tail is mostly other people's handwriting


def digits(split: str) -> Loaded:
    """scikit-learn's digits (1,797 real 8x8 images, 16 grey levels), the last 497 held out."""
    # Its file, because importing scikit-learn takes most of a second, in every process of a run.
    with gzip.open(_folder("sklearn") / "datasets" / "data" / "digits.csv.gz") as file:
        table = np.loadtxt(file, np.uint8, delimiter=",")  # 64 pixels and the digit
    rows = table[:TRAIN_DIGITS] if split == "train" else table[TRAIN_DIGITS:]
    grey = np.round(rows[:, :64].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return _to_rgb(grey), rows[:, 64].astype(np.int64), [str(c) for c in range(10)]


def digits_scattered(split: str, canvas: int = 20) -> Loaded:
    """Each digit placed ONCE on a `canvas` x `canvas` field: turned, scaled, shifted, dimmed by a fixed seed.

    Why: on clean digits raw pixels already give 98 % kNN, so nothing could be learned on top of them. Scattering
    keeps the real strokes but makes pixels a poor feature; seeing through it is what views teach a network.
    """
    import torch
    import torch.nn.functional as F

    images, labels, classes = digits(split)
    n = len(images)
    rng = np.random.default_rng({"train": 1, "test": 2}[split])
    angle, scale = rng.uniform(-20, 20, n) * np.pi / 180, rng.uniform(0.85, 1.2, n)
    shift, light = rng.uniform(-0.3, 0.3, (n, 2)), rng.uniform(0.5, 1.0, n)
    zoom = 1.5 / scale  # output coordinates -> digit coordinates: at scale 1 the digit fills two thirds
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    rows = np.stack([np.stack([cos, -sin], 1), np.stack([sin, cos], 1)], 1)  # n x 2 x 2
    offset = -np.einsum("nij,nj->ni", rows, shift)
    theta = torch.from_numpy(np.concatenate([rows, offset[:, :, None]], 2)).float()
    grey = torch.from_numpy(images[..., 0]).float()[:, None]
    grid = F.affine_grid(theta, [n, 1, canvas, canvas], align_corners=False)
    placed = F.grid_sample(grey, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0]
    return _to_rgb((placed.numpy() * light[:, None, None]).round().astype(np.uint8)), labels, classes


def fashion_small(split: str) -> Loaded:
    """The first 5,000 training and 1,000 test images of Fashion-MNIST (arXiv 1708.07747), package data."""
    with np.load(ASSETS / "fashion_small.npz") as file:
        return _to_rgb(file[f"{split}_images"]), file[f"{split}_labels"].astype(np.int64), FASHION_CLASSES


def photos(split: str) -> Loaded:
    """Natural colour photographs, the central square at 256x256; both splits are the same pictures.

    They are for looking at views, masks and targets. There are no classes to tell apart, hence no labels.
    """
    import matplotlib
    from PIL import Image

    skimage_data, sklearn_data = _folder("skimage") / "data", _folder("sklearn") / "datasets" / "images"
    files = [skimage_data / f for f in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg",
                                        "motorcycle_left.png", "hubble_deep_field.jpg", "retina.jpg", "ihc.png")]
    files += [sklearn_data / f for f in ("china.jpg", "flower.jpg")]
    files += [Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"]
    return np.stack([_central_square(Image.open(f).convert("RGB")) for f in files]), None, []


EMBEDDED: dict[str, Callable[[str], Loaded]] = {
    "digits": digits, "digits_scattered": digits_scattered, "fashion_small": fashion_small, "photos": photos,
}


def read_idx(path: Path) -> np.ndarray:
    """Read one MNIST-style idx file (uint8), gzipped or not."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    shape = tuple(int.from_bytes(raw[4 + 4 * d: 8 + 4 * d], "big") for d in range(raw[3]))
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def make_fashion_small(source: Path = DEBIAN_FASHION_MNIST, out: Path = ASSETS / "fashion_small.npz") -> None:
    """Write the package's subset from the four idx files (Debian: `apt install dataset-fashion-mnist`)."""
    arrays = {}
    for split, prefix, n in (("train", "train", 5000), ("test", "t10k", 1000)):
        arrays[f"{split}_images"] = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")[:n]
        arrays[f"{split}_labels"] = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")[:n]
    np.savez_compressed(out, **arrays)


def _folder(package: str) -> Path:
    """Where a package lies, which is not imported for that."""
    return Path(importlib.util.find_spec(package).origin).parent


def _to_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=-1)


def _central_square(photo, size: int = 256) -> np.ndarray:
    side = min(photo.size)
    left, top = (photo.width - side) // 2, (photo.height - side) // 2
    return np.asarray(photo.resize((size, size), box=(left, top, left + side, top + side)))
