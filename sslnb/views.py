"""Views: what a method sees of an image. Two stages, declared once in the method's `views()`.

    Views(View(RandomResizedCrop(224, scale=(0.08, 1)), HorizontalFlip(0.5),            per image, in the workers
               ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8), Greyscale(0.2), Blur(0.5), Normalize(), count=2))   per batch

Stage one works on one PIL image and ends in uint8. Stage two works on the whole batch on the training device, with
parameters drawn PER IMAGE. Every draw is a pure function of the image's seed, so the views of an image depend on
(run seed, epoch, image) alone: not on workers, processes, batch composition or device. Each op agrees with
torchvision's functional op for the same parameters (tests/test_views.py). Augmentation is most of the CPU time of
self-supervision; this split is what makes it cheap.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .errors import InputError
from .photometry import (
    Draws,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    gaussian_blur,
    luma,
    per_channel,
)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---------------------------------------------------------------- stage one: geometry, one PIL image at a time


class ImageOp:
    """An op of stage one: `op(image, rng) -> image`."""


@dataclass(frozen=True)
class RandomResizedCrop(ImageOp):
    """A random box of `scale` x the area and aspect `ratio`, resized to `size` (torchvision's ten tries)."""

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"

    def box(self, width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
        """Draw (left, top, right, bottom) in pixels of the source image."""
        for _ in range(10):
            area = width * height * rng.uniform(*self.scale)
            aspect = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = rng.randint(0, width - w), rng.randint(0, height - h)
                return left, top, left + w, top + h
        aspect = min(max(width / height, self.ratio[0]), self.ratio[1])  # nothing fitted: the largest central box
        w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        # Cropped first: Pillow's resize(box=…) lets pixels from outside the box bleed in, torchvision's does not.
        cropped = image.crop(self.box(*image.size, rng))
        return cropped.resize((self.size, self.size), _resampling(self.interpolation))


@dataclass(frozen=True)
class Resize(ImageOp):
    """Resize so that the SHORT side is `size`, keeping the aspect."""

    size: int
    interpolation: str = "bicubic"

    def __call__(self, image: Image.Image, rng: random.Random | None = None) -> Image.Image:
        w, h = image.size
        short = min(w, h)
        if short == self.size:
            return image
        return image.resize((int(w * self.size / short), int(h * self.size / short)),
                            _resampling(self.interpolation))


@dataclass(frozen=True)
class CenterCrop(ImageOp):
    """The central `size` x `size` square."""

    size: int

    def __call__(self, image: Image.Image, rng: random.Random | None = None) -> Image.Image:
        left, top = round((image.width - self.size) / 2), round((image.height - self.size) / 2)
        return image.crop((left, top, left + self.size, top + self.size))


@dataclass(frozen=True)
class Pad(ImageOp):
    """A black margin of `pixels` on every side, so that crops after it also move the image about."""

    pixels: int

    def __call__(self, image: Image.Image, rng: random.Random | None = None) -> Image.Image:
        return ImageOps.expand(image, self.pixels) if self.pixels else image


@dataclass(frozen=True)
class HorizontalFlip(ImageOp):
    """Mirror left and right with probability `p`."""

    p: float = 0.5

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < self.p else image


@dataclass(frozen=True)
class RandomRotation(ImageOp):
    """Turn about the centre by up to `degrees` either way, nearest pixel; the corners turn black."""

    degrees: float

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        return image.rotate(rng.uniform(-self.degrees, self.degrees)) if self.degrees else image


@dataclass(frozen=True)
class PatchGrid(ImageOp):
    """A square of 3 x 3 cells at a random place, and of each cell a patch at a random place: relative location's nine.

    A cell is `gap` pixels wider than a patch, so neighbours lie 0 to 2 x `gap` apart. The patches come back side by
    side as ONE picture of 3 x `patch` pixels: what stage two draws for an image, all nine of them share.
    """

    patch: int
    gap: int

    def boxes(self, width: int, height: int, rng: random.Random) -> list[tuple[int, int, int, int]]:
        """Draw the nine (left, top, right, bottom), row by row."""
        cell = self.patch + self.gap
        if min(width, height) < 3 * cell:
            raise InputError(f"Nine patches of {self.patch} px with gaps of {self.gap} need an image of {3 * cell} px, "
                             f"and this one has {min(width, height)}; make them smaller, or the image larger.")
        left, top = rng.randint(0, width - 3 * cell), rng.randint(0, height - 3 * cell)
        corners = [(left + c * cell + rng.randint(0, self.gap), top + r * cell + rng.randint(0, self.gap))
                   for r in range(3) for c in range(3)]
        return [(x, y, x + self.patch, y + self.patch) for x, y in corners]

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        mosaic = Image.new("RGB", (3 * self.patch, 3 * self.patch))
        for place, box in enumerate(self.boxes(*image.size, rng)):
            mosaic.paste(image.crop(box), (place % 3 * self.patch, place // 3 * self.patch))
        return mosaic


# ---------------------------------------------------------------- stage two: photometry, the whole batch at once


class BatchOp:
    """An op of stage two: `apply(x, *sample(draws))` with x (B, 3, H, W) in [0, 1]; parameters stay on the CPU,
    so that choosing the images an op applies to never waits for the device."""

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

    def sample(self, draws: Draws) -> tuple[Tensor, ...]:
        on = draws() < self.p
        factors = [draws(max(0.0, 1 - s), 1 + s) for s in (self.brightness, self.contrast, self.saturation)]
        factors.append(draws(-self.hue, self.hue))
        order = torch.stack([draws() for _ in range(4)], 1).argsort(1)  # B x 4: which op comes at which place
        return on, torch.stack(factors, 1), order

    def apply(self, x: Tensor, on: Tensor, factors: Tensor, order: Tensor) -> Tensor:
        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        ops = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
        for place in range(4):
            for which, (op, strength) in enumerate(zip(ops, strengths, strict=True)):
                if strength:
                    x = _on_some(x, on & (order[:, place] == which), op, factors[:, which])
        return x


@dataclass(frozen=True)
class Greyscale(BatchOp):
    """All three channels become the luma, with probability `p`."""

    p: float = 0.2

    def sample(self, draws: Draws) -> tuple[Tensor, ...]:
        return (draws() < self.p,)

    def apply(self, x: Tensor, on: Tensor) -> Tensor:
        return _on_some(x, on, lambda some: luma(some).expand_as(some))


@dataclass(frozen=True)
class Blur(BatchOp):
    """Gaussian blur, σ uniform in `sigma` (pixels), with probability `p`.

    The kernel covers a tenth of the image as in SimCLR and BYOL (23 taps at 224) unless `kernel` is given.
    """

    p: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    kernel: int | None = None

    def sample(self, draws: Draws) -> tuple[Tensor, ...]:
        return draws() < self.p, draws(*self.sigma)

    def apply(self, x: Tensor, on: Tensor, sigma: Tensor) -> Tensor:
        taps = self.kernel or max(3, x.shape[-1] // 10 // 2 * 2 + 1)
        return _on_some(x, on, lambda some, s: gaussian_blur(some, s, taps), sigma)


@dataclass(frozen=True)
class Solarize(BatchOp):
    """Invert every value of at least `threshold` (0.5 stands for PIL's 128 of 255), with probability `p`."""

    p: float = 0.2
    threshold: float = 128 / 255

    def sample(self, draws: Draws) -> tuple[Tensor, ...]:
        return (draws() < self.p,)

    def apply(self, x: Tensor, on: Tensor) -> Tensor:
        return _on_some(x, on, lambda some: torch.where(some >= self.threshold, 1 - some, some))


@dataclass(frozen=True)
class Normalize(BatchOp):
    """Subtract the channel mean and divide by the channel deviation."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def apply(self, x: Tensor) -> Tensor:
        return (x - per_channel(self.mean, x)) / per_channel(self.std, x)

    def undo(self, x: Tensor) -> Tensor:
        """Back to [0, 1] for looking at: x (..., 3, H, W)."""
        return (x * per_channel(self.std, x) + per_channel(self.mean, x)).clamp(0, 1)


# ---------------------------------------------------------------- putting views together


class View:
    """One way of looking at an image: ops in order, geometry first; `count` independent draws of it."""

    def __init__(self, *ops: ImageOp | BatchOp, count: int = 1):
        split = next((i for i, op in enumerate(ops) if isinstance(op, BatchOp)), len(ops))
        late = [type(op).__name__ for op in ops[split:] if isinstance(op, ImageOp)]
        if late:
            raise InputError(f"View: {late[0]} works on single images and must come before "
                             f"{type(ops[split]).__name__}, which works on the batch; put the geometry first.")
        self.image_ops, self.batch_ops, self.count = ops[:split], ops[split:], count

    def crop(self, image: Image.Image, rng: random.Random) -> Tensor:
        """PIL RGB -> uint8 (3, h, w)."""
        for op in self.image_ops:
            image = op(image, rng)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def photometric(self, x: Tensor, draws: Draws) -> Tensor:
        """uint8 (B, 3, h, w) -> float32, normalised if the view says so."""
        x = x.float() / 255
        for op in self.batch_ops:
            x = op.apply(x, *op.sample(draws))
        return x


class Views:
    """All views of a method, in order. `crop` runs in the workers, `photometric` on the training device."""

    def __init__(self, *views: View):
        self.views = [view for view in views for _ in range(view.count)]

    def __len__(self) -> int:
        return len(self.views)

    @property
    def normalize(self) -> Normalize:
        """The normalisation of the first view (the same for all views of every method here)."""
        return next((op for op in self.views[0].batch_ops if isinstance(op, Normalize)),
                    Normalize((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))

    def crop(self, image: Image.Image, rng: random.Random) -> list[Tensor]:
        """PIL RGB -> one uint8 tensor (3, h, w) per view."""
        return [view.crop(image, rng) for view in self.views]

    def photometric(self, crops: list[Tensor], seeds: Tensor) -> list[Tensor]:
        """uint8 batches (B, 3, h, w) and the images' seeds (B,) -> one float batch per view."""
        return [view.photometric(x, Draws(seeds, stream=v)) for v, (view, x) in
                enumerate(zip(self.views, crops, strict=True))]

    def __call__(self, images: list[Image.Image], seed: int = 0) -> list[Tensor]:
        """Views of a few PIL images for looking and trying: one float batch (B, 3, h, w) per view."""
        seeds = [seed * 1_000_003 + i for i in range(len(images))]
        crops = [self.crop(image, random.Random(s)) for image, s in zip(images, seeds, strict=True)]
        return self.photometric([torch.stack(view) for view in zip(*crops, strict=True)], torch.tensor(seeds))


def _on_some(x: Tensor, on: Tensor, op, *parameters: Tensor) -> Tensor:
    """Apply `op` to the chosen images only; images that are not chosen cost nothing."""
    chosen = on.nonzero()[:, 0]
    if len(chosen) == 0:
        return x
    chosen = chosen.to(x.device, non_blocking=True)
    return x.index_copy(0, chosen, op(x[chosen], *(p.to(x.device, non_blocking=True)[chosen] for p in parameters)))


def _resampling(name: str) -> Image.Resampling:
    try:
        return Image.Resampling[name.upper()]
    except KeyError:
        raise InputError(f"Unknown interpolation {name!r}: use bilinear, bicubic, lanczos or nearest.") from None
