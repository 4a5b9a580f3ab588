"""Batched photometry: one parameter per image, one implementation for CPU and GPU, and the numbers it draws.

x is (B, 3, H, W) in [0, 1]; factors are (B,), on the CPU or where x is, or a number for all. Formulas agree with
torchvision.transforms.functional. Colours change in place: a large image and its copy would not fit into a CPU core's
cache together.
"""

import functools
import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision
GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the step of splitmix64


@dataclass
class Draws:
    """Uniform numbers, one per image, that depend on (seed, stream, how many were drawn before) and nothing else.

    A counter-based generator (splitmix64's finaliser, Steele et al. 2014) instead of a stateful one: there is no
    state to save for an exact resume and no order to respect between images.
    """

    seeds: Tensor  # int64 (B,)
    stream: int = 0
    drawn: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.mixed = _mix(self.seeds.cpu().numpy().astype(np.uint64))

    def __call__(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """float32 (B,) in [low, high), on the CPU."""
        self.drawn += 1
        counter = (self.stream * 1000 + self.drawn) * GOLDEN % 2**64
        unit = (_mix(self.mixed + np.uint64(counter)) >> np.uint64(11)) * 2.0**-53
        return torch.from_numpy((low + (high - low) * unit).astype(np.float32))


def _mix(x: np.ndarray) -> np.ndarray:
    """uint64, whose products wrap around, which is what the mixing needs."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def luma(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)."""
    r, g, b = x.split(1, 1)
    return (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])


def adjust_brightness(x: Tensor, factor: Tensor | float) -> Tensor:
    factor = per_image(factor, x)
    return _clamped(x.mul_(factor), factor)


def adjust_contrast(x: Tensor, factor: Tensor | float) -> Tensor:
    """Blend with the mean luma of the image, which is the luma of its mean colour."""
    return _blended(x, (x.mean((2, 3), keepdim=True) * per_channel(LUMA, x)).sum(1, keepdim=True), factor)


def adjust_saturation(x: Tensor, factor: Tensor | float) -> Tensor:
    """Blend with the image's own grey version."""
    return _blended(x, luma(x), factor)


def adjust_hue(x: Tensor, factor: Tensor | float) -> Tensor:
    """Turn the hue circle by `factor` in (-0.5, 0.5), in turns: HSV's hue, without branches.

    With V the largest channel, m the smallest and C = V - m the hue is h = sign(G - B) (1 + (G + B - R - m) / C) / 6.
    Back, with h in [0, 1) and d = clamp(|h - (1/2, 1/3, 2/3)|, 1/6, 1/3) for the three channels, R = V - 2 C + 6 C d,
    G and B = V + C - 6 C d.
    Each step writes where numbers lie that are no longer needed: in new memory it all took a third longer.
    """
    r, g, b = x.split(1, 1)
    value, least = torch.maximum(r, g), torch.minimum(r, g)
    torch.maximum(value, b, out=value)
    torch.minimum(least, b, out=least)
    hue = (g + b).sub_(r).sub_(least)
    chroma = torch.sub(value, least, out=least).clamp_min_(1e-7)
    torch.addcdiv(per_channel((1 / 6,), x), hue, chroma, value=1 / 6, out=hue).copysign_(g.sub_(b))
    hue.add_(per_image(factor + 2, x)).frac_()  # h is at least -1/2 and factor too: of numbers above 0
    torch.sub(hue, per_channel((1 / 2, 1 / 3, 2 / 3), x), out=x).abs_().clamp_(1 / 6, 1 / 3)
    torch.addcmul(torch.sub(value, chroma, alpha=2, out=hue), chroma, r, value=6, out=r)
    value.add_(chroma)
    torch.addcmul(value, chroma, g, value=-6, out=g)
    torch.addcmul(value, chroma, b, value=-6, out=b)
    return x


def gaussian_blur(x: Tensor, sigma: Tensor | float, taps: int) -> Tensor:
    """Separable blur with its own σ per image; the borders are reflected."""
    sigmas = [sigma] if isinstance(sigma, float) else sigma.tolist()
    reach = min(taps // 2, max(1, round(4 * max(sigmas))))  # what lies further away weighs < 1e-4 in all
    reach = min(reach, min(x.shape[2:]) - 1)  # as far as borders can be reflected
    weights = torch.tensor([_gaussian(sigma, reach) for sigma in sigmas])
    padded = F.pad(x, [reach] * 4, mode="reflect")
    return (_banded if x.device.type == "cpu" else _convolved)(padded, weights)


def _gaussian(sigma: float, reach: int) -> list[float]:
    """What pixels 0, 1, … `reach` away weigh, and 0 for those that are further. As plain numbers, for a dozen small
    operations on tensors were a sixth of the time of a blur."""
    weights = [math.exp(-0.5 * (away / sigma) ** 2) for away in range(reach + 1)]
    whole = 2 * sum(weights) - weights[0]
    return [weight / whole for weight in weights] + [0.0]


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
@torch.inference_mode(False)  # as below
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


def per_image(factor: Tensor | float, x: Tensor) -> Tensor | float:
    """To calculate with x (B, …, H, W): (B, 1, 1, 1) on its device, or the plain number."""
    return factor if isinstance(factor, float) else factor.view(-1, 1, 1, 1).to(x.device, non_blocking=True)


def _blended(x: Tensor, other: Tensor, factor: Tensor | float) -> Tensor:
    """x times factor, and 1 - factor times the other, which may be overwritten."""
    factor = per_image(factor, x)
    return _clamped(x.mul_(factor).add_(other.mul_(1 - factor)), factor)


def _clamped(x: Tensor, factor: Tensor | float) -> Tensor:
    """Back to [0, 1], which factors up to 1 do not leave."""
    return x if isinstance(factor, float) and factor <= 1 else x.clamp_(0, 1)


def per_channel(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    return _on_device(numbers, like.dtype, like.device)


@functools.cache
@torch.inference_mode(False)  # what is kept must do for calculations with gradients too
def _on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)[:, None, None]
