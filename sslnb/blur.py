"""Gaussian blur of a batch whose images differ in σ, by the fastest way that each device has."""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian_blur(x: Tensor, sigma: Tensor | float, taps: int) -> Tensor:
    """Separable blur of x (B, C, H, W) with kernels of `taps` numbers and σ in px, (B,) on the CPU or one number; the
    borders are reflected."""
    sigmas = np.array([sigma] if isinstance(sigma, float) else sigma.numpy(), float)
    reach = min(taps // 2, max(1, round(4 * sigmas.max())))  # what lies further away weighs < 1e-4 in all
    reach = min(reach, min(x.shape[2:]) - 1)  # as far as borders can be reflected
    weights = torch.from_numpy(_gaussian(sigmas, reach))
    padded = F.pad(x, [reach] * 4, mode="reflect")
    return (_banded if x.device.type == "cpu" else _convolved)(padded, weights)


def _gaussian(sigmas: np.ndarray, reach: int) -> np.ndarray:
    """What pixels 0, 1, … `reach` away weigh, and 0 for those that are further: (B, reach + 2), float32. In numpy, for
    a dozen small operations on tensors were a sixth of the time of a blur."""
    weights = np.zeros((len(sigmas), reach + 2), np.float32)
    bell = np.exp(-0.5 * (np.arange(reach + 1) / sigmas[:, None]) ** 2)
    weights[:, :-1] = bell / (2 * bell.sum(1, keepdims=True) - bell[:, :1])
    return weights


def _banded(x: Tensor, weights: Tensor, block: int = 16) -> Tensor:
    """Along rows and then columns, products of windows with a band matrix, which has the kernel once for each of the
    `block` numbers that a window gives: the fastest way for large images on a CPU.

    x (B, C, H + 2 reach, W + 2 reach), weights (B, reach + 2) -> (B, C, H, W).
    """
    reach = weights.shape[1] - 2
    height, width, window = x.shape[2] - 2 * reach, x.shape[3] - 2 * reach, block + 2 * reach
    if height % block or width % block:
        x = F.pad(x, (0, -width % block, 0, -height % block))
    band = weights[:, _distances(block, reach)]
    rows = x.unfold(3, window, block).reshape(len(x), -1, window) @ band.mT
    columns = rows.view(*x.shape[:3], -1).unfold(2, window, block).mT  # B x C x blocks x window x W
    return (band[:, None, None] @ columns).flatten(2, 3)[:, :, :height, :width]


@functools.cache
@torch.inference_mode(False)  # what is kept must do for calculations with gradients too
def _distances(block: int, reach: int) -> Tensor:
    """How far each number of a window is from each that it gives, at most reach + 1: (block, block + 2 reach)."""
    window, given = torch.arange(-reach, block + reach), torch.arange(block)
    return (window - given[:, None]).abs().clamp(max=reach + 1)


def _convolved(x: Tensor, weights: Tensor) -> Tensor:
    """The same as two convolutions, each channel of each image with its own kernel: half the time on a GPU."""
    kernel = weights[:, _distances(1, weights.shape[1] - 2)[0]].to(x.device, non_blocking=True)
    each = kernel.repeat_interleave(x.shape[1], 0)[:, None, None]
    channels = x.flatten(0, 1)[None]  # 1 x B·C x height x width
    blurred = F.conv2d(F.conv2d(channels, each, groups=len(each)), each.mT, groups=len(each))
    return blurred.unflatten(1, x.shape[:2])[0]
