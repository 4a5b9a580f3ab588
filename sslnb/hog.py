"""Histograms of oriented gradients (Dalal and Triggs, CVPR 2005) as MaskFeat uses them, and their drawing.

A square of pixels, a cell, is described by what edges run through it: nine bins of 20 degrees, a line and not an arrow.

    gx, gy = Sobel derivatives,   θ = atan2(gx, gy),   bin = ⌊9 θ / π⌋ mod 9,   h[bin] = Σ over the cell of √(gx² + gy²)
    h ← h / ‖h‖, which cancels the contrast as the derivative cancels the brightness

θ is the angle of the EDGE, with 0 for a horizontal one: a vertical one falls in bin 4. No pixel is shared between bins
or between cells.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .backbones import sobel
from .errors import InputError
from .parts import full_precision

BINS = 9


@torch.no_grad()
@full_precision
def hog(images: Tensor, cell: int = 8, gaussian_window: int = 0, local_norm: bool = True) -> Tensor:
    """Images (B, C, H, W) -> (B, C, 9, H / cell, W / cell), of each colour by itself, in float32.

    A `gaussian_window` of w > 0 px weighs pixels by a Gaussian of deviation w / 2 in the middle of every w x w tile.
    """
    h, w = images.shape[-2:]
    for name, side in (("cell", cell), ("gaussian_window", gaussian_window or 1)):
        if h % side or w % side:
            raise InputError(f"{name} {side} does not tile an image of {h} x {w} px; use a divisor of both, such as "
                             f"{math.gcd(h, w, 16)}.")
    gx, gy = gradients(images)
    magnitude = (gx**2 + gy**2).sqrt()
    if gaussian_window:
        tile = gaussian(gaussian_window).to(magnitude, non_blocking=True)
        magnitude = magnitude * tile.repeat(h // gaussian_window, w // gaussian_window)
    which = (torch.atan2(gx, gy) / math.pi * BINS).floor().remainder(BINS)
    # Bin after bin: no (B, C, 9, H, W) in memory, and no scatter, whose order of adding changes on a GPU.
    found = torch.stack([_sum_cells(magnitude * (which == k), cell) for k in range(BINS)], 2)
    return F.normalize(found, dim=2, eps=1e-12) if local_norm else found


def gradients(images: Tensor) -> tuple[Tensor, Tensor]:
    """Sobel derivatives (gx, gy), both (B, C, H, W): left minus right and above minus below; the border is mirrored."""
    return sobel(images, "reflect")


def gaussian(side: int) -> Tensor:
    """(side, side), sum 1, deviation side // 2 (what the official code takes), centred."""
    n = torch.arange(side) - (side - 1) / 2
    line = torch.exp(-0.5 * (n / max(1, side // 2)) ** 2)
    tile = torch.outer(line, line)
    return tile / tile.sum()


def _sum_cells(x: Tensor, cell: int) -> Tensor:
    *shape, h, w = x.shape
    return x.reshape(*shape, h // cell, cell, w // cell, cell).sum((-3, -1))


def to_patches(h: Tensor, side: int = 2) -> Tensor:
    """(B, C, 9, S·side, S·side) -> (B, S², C·9·side²): in a patch the order is (colour, bin, row, column)."""
    b, c, bins, rows, columns = h.shape
    x = h.reshape(b, c, bins, rows // side, side, columns // side, side)
    return x.permute(0, 3, 5, 1, 2, 4, 6).reshape(b, rows // side * (columns // side), -1)


def from_patches(patches: Tensor, side: int = 2, colours: int = 3) -> Tensor:
    """The inverse of `to_patches` for square images."""
    b, length, _ = patches.shape
    s = math.isqrt(length)
    x = patches.reshape(b, s, s, colours, BINS, side, side)
    return x.permute(0, 3, 4, 1, 5, 2, 6).reshape(b, colours, BINS, s * side, s * side)


@full_precision
def glyphs(h: Tensor, size: int = 16) -> Tensor:
    """(B, C, 9, R, S) -> black on white (B, 3, R·size, S·size): in every cell nine lines along the edges, 20 degrees
    apart, the darker the more; a mean over colours. Values below 0 are nothing and those above 1 are black."""
    strength = h.mean(1).clamp(0, 1)
    b, _, rows, columns = strength.shape
    ink = torch.einsum("bkrs,kyx->bkrysx", strength, strokes(size).to(h)).amax(1)
    return 1 - ink.reshape(b, 1, rows * size, columns * size).expand(-1, 3, -1, -1)


def strokes(size: int) -> Tensor:
    """(9, size, size): a line through the middle for every bin, in the direction of its edges (cos θ, -sin θ)."""
    middle = torch.arange(size) - (size - 1) / 2
    y, x = middle[:, None], middle[None, :]
    theta = (torch.arange(BINS)[:, None, None] + 0.5) * math.pi / BINS
    along = (x * theta.cos() - y * theta.sin()).abs()
    beside = (x * theta.sin() + y * theta.cos()).abs()
    thickness = max(1.0, size / 10)
    return (thickness / 2 + 0.5 - beside).clamp(0, 1) * (size / 2 - along).clamp(0, 1)
