"""Batched photometry: one parameter per image, one implementation for CPU and GPU, and the numbers it draws.

x is (B, 3, H, W) in [0, 1]; factors are (B,). Formulas agree with torchvision.transforms.functional. Colours change in
place: a large image and its copy would not fit into a CPU core's cache together.
"""

import functools
import math
from dataclasses import dataclass, field

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

    def __call__(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """float32 (B,) in [low, high), on the CPU."""
        self.drawn += 1
        counter = _signed((self.stream * 1000 + self.drawn) * GOLDEN)
        bits = _mix(_mix(self.seeds.cpu()) + counter)
        unit = _shift(bits, 11).double() * 2.0**-53
        return (low + (high - low) * unit).float()


def _shift(x: Tensor, k: int) -> Tensor:
    """Logical shift to the right; int64's own keeps the sign."""
    return (x >> k) & ((1 << (64 - k)) - 1)


def _signed(x: int) -> int:
    """A 64-bit pattern as the int64 torch wants; its products wrap around, which is what the mixing needs."""
    return (x + 2**63) % 2**64 - 2**63


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def luma(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)."""
    r, g, b = (x * per_channel(LUMA, x)).unbind(1)
    return (r + g).add_(b)[:, None]


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul_(per_image(factor)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean luma of the image."""
    grey = luma(x)
    grey.copy_(grey.mean((1, 2, 3), keepdim=True))  # spread out: a blend with one number takes five times as long
    return torch.lerp(grey, x, per_image(factor), out=x).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's own grey version."""
    return torch.lerp(luma(x), x, per_image(factor), out=x).clamp_(0, 1)


def adjust_hue(x: Tensor, factor: Tensor) -> Tensor:
    """Turn the hue circle by `factor` in (-0.5, 0.5), in turns: HSV's hue, without branches.

    With V the largest channel, m the smallest and C = V - m the hue is h = sign(G - B) (1 + (G + B - R - m) / C) / 6,
    and the channel c turns along the circle (0, 1/3, 2/3) is V - C clamp(6 |h - c| - 1, 0, 1), |h - c| the shorter way.
    """
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    least = torch.minimum(torch.minimum(r, g), b)
    chroma = (value - least).mul_(6)
    hue = (g + b).sub_(r).sub_(least).div_(chroma.clamp_min(1e-7)).add_(1 / 6).copysign_(g - b)
    away = (hue + factor[:, None, None])[:, None] - per_channel((0.0, 1 / 3, 2 / 3), x)
    away.sub_(away.round()).abs_().clamp_(1 / 6, 1 / 3)
    return torch.addcmul(value.add_(chroma, alpha=1 / 6)[:, None], chroma[:, None], away, value=-1, out=x)


def gaussian_blur(x: Tensor, sigma: Tensor, taps: int) -> Tensor:
    """Separable blur with its own σ per image, as weighted sums of shifted images; the borders are reflected."""
    reach = taps // 2
    if x.device.type == "cpu":  # what lies further away than 4 σ weighs less than 1e-4; asking a GPU for σ would wait
        reach = min(reach, max(1, math.ceil(4 * float(sigma.max()))))
    t = torch.arange(reach + 1, device=x.device)
    kernel = torch.exp(-0.5 * (t / sigma[:, None]) ** 2)
    kernel = (kernel / (2 * kernel.sum(1, keepdim=True) - kernel[:, :1]))[:, :, None, None, None].unbind(1)
    for d in (3, 2):
        padded = F.pad(x, [reach, reach, 0, 0] if d == 3 else [0, 0, reach, reach], mode="reflect")
        shifted = padded.unfold(d, x.shape[d], 1).movedim(-1, d + 1).unbind(d)  # views, from -reach to reach
        x = shifted[reach] * kernel[0]
        for shift in range(1, reach + 1):
            x.addcmul_(shifted[reach - shift] + shifted[reach + shift], kernel[shift])
    return x


def per_image(factor: Tensor) -> Tensor:
    return factor.view(-1, 1, 1, 1)


def per_channel(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    return _on_device(numbers, like.dtype, like.device)


@functools.cache
def _on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)[:, None, None]
