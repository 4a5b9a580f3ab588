"""What fine-tuning does to images besides cropping: RandAugment per image, random erasing and mixing per batch."""

import contextlib
import functools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..draws import Draws
from ..errors import InputError
from ..geometry import ImageOp
from ..views import IMAGENET_MEAN, BatchOp


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, Python's and numpy's global random numbers come from `seed`; afterwards both go on as they would have."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  timm draws from these
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@dataclass(frozen=True)
class RandAugment(ImageOp):
    """RandAugment (arXiv 1909.13719) as timm has it: of 15 operations `ops` are drawn, and each is done with
    probability 1/2, at a strength out of 10 that is N(`magnitude`, `std`).

    timm draws from the global random numbers, so they are set from ours for as long as it runs.
    """

    ops: int = 2
    magnitude: int = 9
    std: float = 0.5
    interpolation: str = "bicubic"

    @functools.cached_property
    def of_timm(self):
        from timm.data.auto_augment import rand_augment_transform

        grey = tuple(round(255 * m) for m in IMAGENET_MEAN)  # what turning and shifting leave empty
        # "inc1": the set in which a larger magnitude is a stronger change for every operation.
        transform = rand_augment_transform(
            f"rand-m{self.magnitude}-n{self.ops}-mstd{self.std}-inc1",
            {"img_mean": grey, "interpolation": Image.Resampling[self.interpolation.upper()]})
        for op in transform.ops:
            if op.name == "PosterizeIncreasing":
                op.aug_fn = _posterize
        return transform

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        with seeded(rng.getrandbits(32)):
            return self.of_timm(image)


def _posterize(image: Image.Image, bits: int, **_) -> Image.Image:
    """Only the first `bits` of every value. At full strength none is left, and today's Pillow refuses what the runs of
    the papers had there: a black image."""
    return image.point(lambda value: value & ~(2 ** (8 - bits) - 1) & 255)


@dataclass(frozen=True)
class RandomErasing(BatchOp):
    """With probability `p` a rectangle turns into noise N(0, 1): arXiv 1708.04896, timm's mode "pixel".

    Its area is uniform in `area` (shares of the image), the logarithm of its aspect uniform too; the first of ten
    draws that fits inside is taken. It belongs after `Normalize`, whose unit the noise has.
    """

    p: float = 0.25
    area: tuple[float, float] = (0.02, 1 / 3)
    aspect: tuple[float, float] = (0.3, 1 / 0.3)

    def sample(self, draws: Draws) -> tuple[Tensor, ...]:
        on = draws() < self.p
        tries = [torch.stack([draws(*self.area), draws(*map(math.log, self.aspect)), draws(), draws()], 1)
                 for _ in range(10)]
        return on, torch.stack(tries, 1), draws.seeds.cpu()

    def apply(self, x: Tensor, on: Tensor, tries: Tensor, seeds: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        area, aspect, down, right = tries.unbind(2)  # B x 10 each
        area, aspect = area * height * width, aspect.exp()
        h, w = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
        fits = (h < height) & (w < width)
        top, left = (down * (height - h + 1)).long(), (right * (width - w + 1)).long()
        x = x.clone()
        for i in (on & fits.any(1)).nonzero()[:, 0].tolist():
            n = int(fits[i].int().argmax())
            a, b, c, d = (int(v[i, n]) for v in (top, left, h, w))
            noise = torch.randn(x.shape[1], c, d, generator=torch.Generator().manual_seed(int(seeds[i])))
            x[i, :, a:a + c, b:b + d] = noise.to(x)
        return x


def mixed(x: Tensor, labels: Tensor, classes: int, *, mixup: float, cutmix: float, switch_prob: float = 0.5,
          smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Pairs of images made into one, and their labels too: (B, 3, H, W), (B,) -> (B, 3, H, W), (B, classes).

    mixup (arXiv 1710.09412):  x ← λ x + (1 − λ) x',  λ ~ Beta(α, α);   cutmix (arXiv 1905.04899): a box of x' in x.
    Targets are y ← λ y + (1 − λ) y' with λ the share of pixels that are x's, of labels smoothed before. `mixup` and
    `cutmix` are the α of each, 0 for none; with both, one is chosen per batch, cutmix with `switch_prob`.
    This is timm's: x' is the batch in reverse, where OpenMixup takes a random order. λ is the batch's and is drawn from
    torch's random numbers, which a resumed run gets back. Errors: InputError for an odd batch.
    """
    from timm.data.mixup import Mixup, mixup_target

    if not mixup and not cutmix:
        return x, mixup_target(labels, classes, 1.0, smoothing)
    if len(x) % 2:
        raise InputError(f"A batch of {len(x)} cannot be mixed in pairs; use an even one.")
    mix = Mixup(mixup, cutmix, switch_prob=switch_prob, label_smoothing=smoothing, num_classes=classes)
    with seeded(int(torch.randint(2**31, ()))):
        return mix(x.clone(), labels)
