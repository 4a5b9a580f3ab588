"""Masks, patches and painted holes for masked image modelling. In a mask 1 means REMOVED, in every method.

A mask is (B, L): one number for each of the L = side² cells of a square image, row by row. Masks are drawn on the CPU,
so that one seed gives the same masks on every device, and drawing never waits for a GPU.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .errors import InputError


def check_mask_ratio(ratio: float) -> float:
    if not 0 < ratio < 1:
        raise InputError(f"mask_ratio {ratio} is impossible: it is the share of patches that is removed; "
                         "use a number between 0 and 1, such as 0.75.")
    return ratio


def check_unit(unit: int, cell: int, size: int) -> int:
    """-> how many squares of `unit` px are in a row of the image; they consist of whole cells."""
    if unit % cell or size % unit or unit == size:
        fits = [u for u in range(cell, size, cell) if size % u == 0]
        raise InputError(f"unit {unit} does not fit: squares to hide must consist of cells of {cell} px and tile "
                         f"images of {size} px; use one of {fits}.")
    return size // unit


# ---------------------------------------------------------------- which cells are removed


def random_mask(noise: Tensor, mask_ratio: float) -> Tensor:
    """The same number of cells of every image, anywhere (MAE's masking).

    noise (B, L), U(0, 1): the cells with the smallest stay. -> (B, L) with exactly L - int(L * (1 - mask_ratio)) ones.
    Noise that is kept while the ratio grows gives nested masks, which is what a slider should show.
    """
    return _smallest_stay(noise, int(noise.shape[1] * (1 - mask_ratio)))


def unit_mask(noise: Tensor, mask_ratio: float, cells: int) -> Tensor:
    """Squares of cells x cells are removed as one (SimMIM's masking: 32 px whatever the patch).

    noise (B, U²) for the units; the largest go, U² * mask_ratio of them, rounded up. -> (B, (U * cells)²)
    """
    units = noise.shape[1]
    side = round(units**0.5)
    grid = _smallest_stay(noise, units - math.ceil(units * mask_ratio)).view(-1, side, side)
    return grid.repeat_interleave(cells, 1).repeat_interleave(cells, 2).flatten(1)


def _smallest_stay(noise: Tensor, count: int) -> Tensor:
    return torch.ones_like(noise).scatter_(1, noise.argsort(1)[:, :count], 0.0)


def block_mask(batch: int, side: int, count: int, least: int, exact: bool,
               generator: Generator | None = None) -> Tensor:
    """Overlapping rectangles until `count` cells of each image are removed (BEiT's masking, arXiv 2106.08254).

    A rectangle has an area between `least` and what is still missing, an aspect between 0.3 and 1/0.3 (uniform in the
    logarithm), and counts if it removes something new but not too much. After ten in a row that do not count, an image
    is done with fewer cells than asked (MaskFeat), unless `exact` (CAE). -> (batch, side²)
    """
    if not 0 < count < side * side:
        raise InputError(f"{count} of {side * side} cells cannot be masked; use a mask_ratio between 0 and 1.")
    if min(least, count) > (side - 0.5)**2:  # both sides of a rectangle are shorter than the image's
        raise InputError(f"No block of {min(least, count)} cells or more fits into {side} x {side} and leaves a row "
                         "and a column; use a lower mask_ratio, larger images or smaller patches.")
    # In numpy, for the last images take a hundred rounds and torch twice as long for so few numbers.
    mask = np.zeros((batch, side, side), bool)
    missing, misses = np.full(batch, count), np.zeros(batch, int)
    place, todo = np.arange(side), np.arange(batch)
    while len(todo):
        area, aspect, y, x = torch.rand(4, len(todo), generator=generator)
        aspect = torch.exp((2 * aspect - 1) * math.log(1 / 0.3)).numpy()
        area = least + area.numpy() * (missing[todo] - least).astype(np.float32)
        height, width = np.sqrt(area * aspect).round(), np.sqrt(area / aspect).round()
        top, left = (np.floor(u.numpy() * (side - length + 1)) for u, length in ((y, height), (x, width)))
        rows, columns = ((place >= start[:, None]) & (place < (start + length)[:, None])
                         for start, length in ((top, height), (left, width)))
        block = rows[:, :, None] & columns[:, None, :]
        new = (block & ~mask[todo]).sum((1, 2))
        counts = (height < side) & (width < side) & (new > 0) & (new <= missing[todo])
        mask[todo] |= block & counts[:, None, None]
        missing[todo] -= new * counts
        misses[todo] = np.where(counts, 0, misses[todo] + 1)
        todo = todo[(missing[todo] > 0) & (exact | (misses[todo] < 10))]
    return torch.from_numpy(mask).flatten(1).float()


def region_mask(batch: int, side: int, least: float, most: float, generator: Generator | None = None) -> Tensor:
    """One rectangle anywhere (for Context Encoders, arXiv 1604.07379): its share of the image is between `least` and
    `most`, it is at most twice as long as wide, and all such shapes are equally likely. -> (batch, side²)"""
    shapes = [(h, w) for h in range(1, side + 1) for w in range(1, side + 1)
              if least <= h * w / side**2 <= most and max(h, w) <= 2 * min(h, w)]
    if not shapes:
        raise InputError(f"No rectangle covers {least:.0%} to {most:.0%} of {side} x {side} cells; use another "
                         "mask_ratio or smaller cells.")
    shape, y, x = torch.rand(3, batch, generator=generator)
    height, width = torch.tensor(shapes)[(shape * len(shapes)).long()].unbind(1)
    return _rectangles(side, (y * (side - height + 1)).long(), (x * (side - width + 1)).long(), height, width)


def centre_mask(batch: int, side: int, length: int) -> Tensor:
    """A square of length x length cells in the middle, the same for every image. -> (batch, side²)"""
    length = torch.full((batch,), length)
    return _rectangles(side, (side - length) // 2, (side - length) // 2, length, length)


def _rectangles(side: int, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    place = torch.arange(side)
    rows = (place >= top[:, None]) & (place < (top + height)[:, None])
    columns = (place >= left[:, None]) & (place < (left + width)[:, None])
    return (rows[:, :, None] & columns[:, None, :]).flatten(1).float()


def visible_first(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L) with equally many ones per image -> keep (B, K), the visible cells in order, and restore (B, L), which
    puts [visible, removed] back in place. On the CPU, where looking at a number waits for nothing."""
    visible = mask.cpu() == 0
    count = visible.sum(1)
    if (count != count[0]).any():
        raise InputError(f"These masks leave {int(count.min())} to {int(count.max())} visible cells, and one batch "
                         "needs the same number for every image.")
    before = visible.cumsum(1)  # how many visible cells there are up to here; what is removed comes after all of them
    restore = torch.where(visible, before - 1, count[0] + torch.arange(mask.shape[1]) - before)
    return visible.nonzero()[:, 1].view(len(mask), int(count[0])), restore


def regrid(mask: Tensor, side: int) -> Tensor:
    """A mask (B, L) of one grid on another of side x side cells: hidden is a cell that any hidden one overlaps."""
    old = round(mask.shape[1] ** 0.5)
    fine = math.lcm(old, side)
    pixels = upsample_mask(mask, fine // old)
    return F.max_pool2d(pixels, fine // side).flatten(1)


# ---------------------------------------------------------------- cells and pixels


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, L, patch²·C); within a patch the order is (row, column, channel), MAE's.

    A head with nn.PixelShuffle has (channel, row, column) instead: their weights are not interchangeable as they are.
    """
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, h // patch * (w // patch), patch * patch * c)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify` for square images: (B, L, patch²·C) -> (B, C, H, W)."""
    b, length, values = patches.shape
    side, c = round(length**0.5), values // patch**2
    x = patches.reshape(b, side, side, patch, patch, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, side * patch, side * patch)


def upsample_mask(mask: Tensor, patch: int) -> Tensor:
    """(B, L) -> (B, 1, H, W) of the square image, each value repeated over its patch."""
    side = round(mask.shape[1] ** 0.5)
    return mask.reshape(-1, 1, side, side).repeat_interleave(patch, 2).repeat_interleave(patch, 3)


def paint_mean(images: Tensor, mask: Tensor, patch: int) -> Tensor:
    """Removed cells take the mean colour of their WHOLE image, what is hidden included (A2MIM, arXiv 2205.13943)."""
    hole = upsample_mask(mask, patch)
    return images * (1 - hole) + images.mean((2, 3), keepdim=True) * hole
