"""Batched photometry: one parameter per image, one implementation for CPU and GPU, and the numbers it draws.

x is (B, 3, H, W) in [0, 1]; factors are (B,). Formulas agree with torchvision.transforms.functional.
"""

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
    r, g, b = x.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    is_red, is_green = value == r, value == g
    hue = torch.where(is_red, g - b, torch.where(is_green, b - r, r - g)).div_(chroma.clamp_min(1e-8))
    hue += torch.where(is_red, 0.0, torch.where(is_green, 2.0, 4.0))
    hue = hue.div_(6).add_(factor[:, None, None] + 1)  # in turns, never negative: then frac is the remainder
    turned = torch.empty_like(x)
    for place, n in enumerate((5, 3, 1)):
        k = (hue + n / 6).frac_().mul_(6)
        torch.addcmul(value, chroma, torch.minimum(k, 4 - k).clamp_(0, 1), value=-1, out=turned[:, place])
    return turned


def gaussian_blur(x: Tensor, sigma: Tensor, taps: int) -> Tensor:
    """Separable blur with its own σ per image, as weighted sums of shifted slices; the borders are reflected."""
    reach = taps // 2
    if x.device.type == "cpu":  # what lies further away than 5 σ weighs less than 1e-5; asking a GPU for σ would wait
        reach = min(reach, max(1, math.ceil(5 * float(sigma.max()))))
    t = torch.arange(reach + 1, device=x.device)
    kernel = torch.exp(-0.5 * (t / sigma[:, None]) ** 2)
    kernel = (kernel / (2 * kernel.sum(1, keepdim=True) - kernel[:, :1]))[:, :, None, None, None]
    for d in (3, 2):
        padded = F.pad(x, [reach, reach, 0, 0] if d == 3 else [0, 0, reach, reach], mode="reflect")
        n = x.shape[d]
        x = padded.narrow(d, reach, n) * kernel[:, 0]
        for shift in range(1, reach + 1):
            pair = padded.narrow(d, reach - shift, n) + padded.narrow(d, reach + shift, n)
            x.addcmul_(pair, kernel[:, shift])
    return x


def per_image(factor: Tensor) -> Tensor:
    return factor[:, None, None, None]


def per_channel(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(numbers, dtype=like.dtype).to(like.device, non_blocking=True)[:, None, None]
