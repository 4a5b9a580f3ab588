"""From image files to the pixels a frozen backbone sees: the test transform of every probe.

Short side to `size * 256 / 224`, then the central square of `size`, bicubic (the convention of DINO's kNN
and MAE's probe). Below 96 pixels that margin would cost real content, so small images are resized to `size`
itself; what is cut off then is only what a square cannot hold.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..views import CenterCrop, Normalize, Resize

MARGIN, MARGIN_FROM = 256 / 224, 96


def to_batch(images, indices: Sequence[int], size: int, mean: Sequence[float], std: Sequence[float]
             ) -> tuple[Tensor, list[int]]:
    """The named images, resized, cropped, normalised: (B, 3, size, size) float32 and the B indices it holds.

    Images that cannot be read are left out of both, so `len(indices) - B` of them are broken.
    """
    pixels, kept, _ = read(images, indices, size)
    return normalise(pixels, mean, std), kept


def read(images, indices: Sequence[int], size: int) -> tuple[Tensor, list[int], list[str]]:
    """Pixels (B, 3, size, size) uint8, the indices they belong to, one sentence per broken image."""
    from ..decoding import BrokenImage

    resize, square = Resize(round(size * MARGIN) if size >= MARGIN_FROM else size), CenterCrop(size)
    pixels, kept, broken = [np.zeros((0, size, size, 3), np.uint8)], [], []
    for i in indices:
        try:
            pixels.append(np.asarray(square(resize(images[i])))[None])
            kept.append(int(i))
        except BrokenImage as error:
            broken.append(str(error))
    return torch.from_numpy(np.concatenate(pixels)).permute(0, 3, 1, 2), kept, broken


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (B, 3, H, W) -> float32, normalised."""
    return Normalize(tuple(mean), tuple(std)).apply(pixels.float() / 255)
