"""Stage one of the views: geometry, one PIL image at a time, in the loader's workers."""

import math
import random
from dataclasses import dataclass

import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from .errors import InputError

LARGE = 64  # px from which on torch resizes: the demos, which are smaller, were tuned and measured with Pillow


class ImageOp:
    """An op of stage one: `op(image, rng) -> image`, both PIL.

    One with `on_tensors` also takes and gives uint8 tensors (3, H, W), and is several times faster on them.
    """

    on_tensors = False


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

    @property
    def on_tensors(self) -> bool:
        return self.size >= LARGE and self.interpolation in ("bilinear", "bicubic")  # torch has no other filter

    def __call__(self, image: Image.Image | Tensor, rng: random.Random) -> Image.Image | Tensor:
        if isinstance(image, Tensor):
            left, top, right, bottom = self.box(image.shape[2], image.shape[1], rng)
            box = image[None, :, top:bottom, left:right]  # in photographs Pillow's within 2 of 255, bicubic 8
            return F.interpolate(box, (self.size, self.size), mode=self.interpolation, antialias=True)[0]
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
    on_tensors = True

    def __call__(self, image: Image.Image | Tensor, rng: random.Random) -> Image.Image | Tensor:
        if not self.pixels:
            return image
        return F.pad(image, [self.pixels] * 4) if isinstance(image, Tensor) else ImageOps.expand(image, self.pixels)


@dataclass(frozen=True)
class HorizontalFlip(ImageOp):
    """Mirror left and right with probability `p`."""

    p: float = 0.5
    on_tensors = True

    def __call__(self, image: Image.Image | Tensor, rng: random.Random) -> Image.Image | Tensor:
        if rng.random() >= self.p:
            return image
        return image.flip(-1) if isinstance(image, Tensor) else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


@dataclass(frozen=True)
class RandomRotation(ImageOp):
    """Turn about the centre by up to `degrees` either way, nearest pixel; the corners turn black."""

    degrees: float

    @property
    def on_tensors(self) -> bool:
        return not self.degrees  # then there is nothing to do

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


def _resampling(name: str) -> Image.Resampling:
    try:
        return Image.Resampling[name.upper()]
    except KeyError:
        raise InputError(f"Unknown interpolation {name!r}: use bilinear, bicubic, lanczos or nearest.") from None
