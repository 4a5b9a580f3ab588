"""Batched photometry: one parameter per image, one implementation for CPU and GPU, and the numbers it draws.

x is (B, 3, H, W) in [0, 1]; factors are (B,). Formulas agree with torchvision.transforms.functional.
"""

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
    return (x * per_channel(LUMA, x)).sum(1, keepdim=True)


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * per_image(factor)).clamp_(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean luma of the image."""
    return torch.lerp(luma(x).mean((1, 2, 3), keepdim=True), x, per_image(factor)).clamp_(0, 1)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's own grey version."""
    return torch.lerp(luma(x), x, per_image(factor)).clamp_(0, 1)


def adjust_hue(x: Tensor, factor: Tensor) -> Tensor:
    """Turn the hue circle by `factor` in (-0.5, 0.5): RGB -> HSV -> RGB without branches."""
    value, smallest = x.amax(1), x.amin(1)
    chroma = value - smallest
    r, g, b = x.unbind(1)
    safe = chroma.clamp_min(1e-8)
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = hue + 6 * factor[:, None, None]  # in sixths of the circle

    def channel(n: int) -> Tensor:
        k = (n + hue) % 6
        return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)

    return torch.stack([channel(5), channel(3), channel(1)], 1)


def gaussian_blur(x: Tensor, sigma: Tensor, taps: int) -> Tensor:
    """Separable blur with its own σ per image; the borders are reflected."""
    b, c, h, w = x.shape
    t = torch.arange(taps, device=x.device) - taps // 2
    kernel = torch.exp(-0.5 * (t / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)  # (B*C) x taps
    x = F.pad(x, [taps // 2] * 4, mode="reflect").reshape(1, b * c, h + taps - 1, w + taps - 1)
    x = F.conv2d(x, kernel[:, None, None, :], groups=b * c)
    return F.conv2d(x, kernel[:, None, :, None], groups=b * c).reshape(b, c, h, w)


def per_image(factor: Tensor) -> Tensor:
    return factor[:, None, None, None]


def per_channel(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype).to(like.device, non_blocking=True)[:, None, None]
