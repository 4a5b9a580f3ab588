"""Stage two of the views: photometry, the whole batch at once, on the training device, be it a CPU or a GPU.

x is (B, 3, H, W) in [0, 1]; factors are (B,), on the CPU or where x is, or a number for all. Formulas agree with
torchvision.transforms.functional. Colours change in place: a large image and its copy would not fit into a CPU core's
cache together.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .blur import gaussian_blur
from .draws import Draws

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, as torchvision
CONTRAST, SATURATION, HUE = 1, 2, 3  # among the ops of ColorJitter, of which brightness is the first


class BatchOp:
    """An op of stage two: `apply(x, *sample(draws))` with x (B, 3, H, W) in [0, 1], which it may overwrite; parameters
    stay on the CPU, so that choosing the images an op applies to never waits for the device. A probability `p` is for
    `sample` alone: views that differ in nothing else are applied together.

    One with `on_numbers` also takes the parameters of a single image as numbers, or lists of them, and is faster so.
    """

    on_numbers = False

    def sample(self, draws: Draws) -> tuple[Tensor, ...]:
        return ()

    def apply(self, x: Tensor, *parameters: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class ColorJitter(BatchOp):
    """Brightness, contrast, saturation and hue changed in a random order per image, with probability `p`."""

    brightness: float
    contrast: float
    saturation: float
    hue: float
    p: float = 0.8

    on_numbers = True

    def sample(self, draws: Draws) -> tuple[Tensor, ...]:
        on = draws() < self.p
        factors = [draws(max(0.0, 1 - s), 1 + s) for s in (self.brightness, self.contrast, self.saturation)]
        factors.append(draws(-self.hue, self.hue))
        order = torch.stack([draws() for _ in range(4)], 1).argsort(1)  # B x 4: which op comes at which place, or -1
        used = torch.tensor([self.brightness, self.contrast, self.saturation, self.hue]) > 0
        return torch.stack(factors, 1), order.where(on[:, None] & used[order], -1)

    def apply(self, x: Tensor, factors: Tensor | list[float], order: Tensor | list[int]) -> Tensor:
        if isinstance(order, list):
            ops = adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue
            for which in order:
                if which >= 0:
                    ops[which](x, factors[which])
            return x
        return self._together(x, factors, order)

    def _together(self, x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
        """The same for many images in few operations, whose number is what takes time on a GPU.

        `mixed` does for every op but hue, so images whose turn is at different ones go together. And that hue need go
        only once, images are sorted by its place in their order: first those where it is last, which have three ops
        before it and none after it, then those where it is third, and so on; last those that stay as they are.
        """
        order, factors = order.numpy(), factors.numpy()  # torch takes twice as long for so few numbers
        place = np.where(order == HUE, 2, order < 0).argmax(1)  # of hue, or where it would be: B
        group = np.where((order >= 0).any(1), 3 - place, 4)
        rows = group.argsort(kind="stable")
        last, third, second, on = np.bincount(group, minlength=5).cumsum()[:4].tolist()  # where these groups end
        turns = place[:, None] + (-3, -2, -1, 1, 2, 3)  # B x 6: three before hue and three after it
        which = np.where((turns >= 0) & (turns < 4), np.take_along_axis(order, turns % 4, 1), -1)
        keep = np.where(which >= 0, np.take_along_axis(factors, which.clip(0), 1), np.float32(1))
        shares = np.stack([keep, (1 - keep) * (which == SATURATION), (1 - keep) * (which == CONTRAST)])[:, rows].T
        there, back, hue, shares = (torch.from_numpy(y).to(x.device, non_blocking=True) for y in (
            rows, rows.argsort(), factors[rows[:on], HUE], shares.copy()[..., None, None, None]))
        x = x[there]
        for turn, (first, end) in enumerate(((0, last), (0, third), (0, second),
                                             (last, on), (third, on), (second, on))):
            if turn == 3 and on and self.hue:
                adjust_hue(x[:on], hue)
            if first < end:
                mixed(x[first:end], *shares[turn, first:end].unbind(1))
        return x[back]


@dataclass(frozen=True)
class Greyscale(BatchOp):
    """All three channels become the luma, with probability `p`."""

    p: float = 0.2

    on_numbers = True

    def sample(self, draws: Draws) -> tuple[Tensor, ...]:
        return (draws() < self.p,)

    def apply(self, x: Tensor, on: Tensor | bool) -> Tensor:
        return _on_some(x, on, lambda some: some.copy_(luma(some)))


@dataclass(frozen=True)
class Blur(BatchOp):
    """Gaussian blur, σ uniform in `sigma` (pixels), with probability `p`.

    The kernel covers a tenth of the image as in SimCLR and BYOL (23 taps at 224) unless `kernel` is given.
    """

    p: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    kernel: int | None = None

    on_numbers = True

    def sample(self, draws: Draws) -> tuple[Tensor, ...]:
        return draws() < self.p, draws(*self.sigma)

    def apply(self, x: Tensor, on: Tensor | bool, sigma: Tensor | float) -> Tensor:
        taps = self.kernel or max(3, x.shape[-1] // 10 // 2 * 2 + 1)
        return _on_some(x, on, lambda some, s: gaussian_blur(some, s, taps), sigma)


@dataclass(frozen=True)
class Solarize(BatchOp):
    """Invert every value of at least `threshold` (0.5 stands for PIL's 128 of 255), with probability `p`."""

    p: float = 0.2
    threshold: float = 128 / 255

    on_numbers = True

    def sample(self, draws: Draws) -> tuple[Tensor, ...]:
        return (draws() < self.p,)

    def apply(self, x: Tensor, on: Tensor | bool) -> Tensor:
        # |1 - x| where x is bright and |0 - x| elsewhere: on a CPU torch.where takes 15 times as long
        return _on_some(x, on, lambda some: some.clone().ge_(self.threshold).sub_(some).abs_())


@dataclass(frozen=True)
class Normalize(BatchOp):
    """Subtract the channel mean and divide by the channel deviation."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def apply(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x stays as it is; the result can be written into `out`, then x is four-dimensional."""
        if out is None or x.device.type != "cpu":
            shift = per_channel(tuple(-m / s for m, s in zip(self.mean, self.std, strict=True)), x)
            return torch.addcmul(shift, x, per_channel(tuple(1 / s for s in self.std), x), out=out)
        # On a CPU batch norm passes over the images once, and addcmul takes three times as long.
        mean, var = per_channel(self.mean, x).flatten(), per_channel(tuple(s * s for s in self.std), x).flatten()
        torch.native_batch_norm(x, None, None, mean, var, False, 0.0, 0.0, out=(out, x.new_empty(0), x.new_empty(0)))
        return out

    def undo(self, x: Tensor) -> Tensor:
        """Back to [0, 1] for looking at: x (..., 3, H, W)."""
        return (x * per_channel(self.std, x) + per_channel(self.mean, x)).clamp(0, 1)


UNCHANGED = Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def _on_some(x: Tensor, on: Tensor | bool, op, *parameters: Tensor | float) -> Tensor:
    """Apply `op` to the chosen images only; images that are not chosen cost nothing."""
    if on is False or isinstance(on, Tensor) and not on.any():
        return x
    if on is True or on.all():
        return op(x, *parameters)
    chosen = on.nonzero()[:, 0]
    there = chosen.to(x.device, non_blocking=True)
    return x.index_copy_(0, there, op(x[there], *(p[chosen] for p in parameters)))


# ---------------------------------------------------------------- what the ops compute


def luma(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, H, W)."""
    r, g, b = x.split(1, 1)
    return (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])


def mean_luma(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 1, 1, 1): the luma of the mean colour."""
    return (x.mean((2, 3), keepdim=True) * per_channel(LUMA, x)).sum(1, keepdim=True)


def adjust_brightness(x: Tensor, factor: float) -> Tensor:
    return _clamped(x.mul_(factor), factor)


def adjust_contrast(x: Tensor, factor: float) -> Tensor:
    """Blend with the mean luma of the image."""
    return _blended(x, mean_luma(x), factor)


def adjust_saturation(x: Tensor, factor: float) -> Tensor:
    """Blend with the image's own grey version."""
    return _blended(x, luma(x), factor)


def mixed(x: Tensor, keep: Tensor, grey: Tensor, mean: Tensor) -> Tensor:
    """These three for images that differ in what they need, by the share (B, 1, 1, 1) of the image itself, of its grey
    version and of its mean luma."""
    added = luma(x).mul_(grey).add_(mean_luma(x).mul_(mean))
    return x.mul_(keep).add_(added).clamp_(0, 1)


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


def per_image(factor: Tensor | float, x: Tensor) -> Tensor | float:
    """To calculate with x (B, …, H, W): (B, 1, 1, 1) on its device, or the plain number."""
    return factor if isinstance(factor, float) else factor.view(-1, 1, 1, 1).to(x.device, non_blocking=True)


def _blended(x: Tensor, other: Tensor, factor: float) -> Tensor:
    """x times factor, and 1 - factor times the other, which may be overwritten."""
    return _clamped(x.mul_(factor).add_(other.mul_(1 - factor)), factor)


def _clamped(x: Tensor, factor: float) -> Tensor:
    """Back to [0, 1], which factors up to 1 do not leave."""
    return x if factor <= 1 else x.clamp_(0, 1)


def per_channel(numbers: tuple[float, ...], like: Tensor) -> Tensor:
    return _on_device(numbers, like.dtype, like.device)


@functools.cache
@torch.inference_mode(False)  # what is kept must do for calculations with gradients too
def _on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)[:, None, None]
