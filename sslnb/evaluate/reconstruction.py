"""How well are hidden patches guessed? Errors where the image is removed, beside a modest rival.

`masked_psnr` for methods that paint pixels; `masked_error` in the space of the targets, whatever they are.
"""

from dataclasses import dataclass

import torch

from ..errors import InputError
from ..masking import patchify, upsample_mask
from ..methods.base import Masked
from .pixels import read


@dataclass
class Psnr:
    """Decibel on removed pixels of `n` images: the model's, of the mean of each image's visible pixels, and of a
    perfect prediction, which for methods that guess tokens is not the image itself."""

    model: float
    baseline: float
    n: int
    ceiling: float


@torch.no_grad()
def masked_psnr(run, images, *, limit: int = 1000, batch: int = 250, seed: int = 0) -> Psnr:
    """PSNR of a masked-image run on held-out images, values in [0, 1], the error averaged over all removed pixels.

    Of more than `limit` images so many are taken, evenly from the whole set: folders are sorted by class. Masks are
    drawn from `seed`. Errors: InputError for a run that paints nothing, and for one whose targets are
    standardised patches, since their brightness would have to be taken from the truth that is to be guessed.
    """
    method = _masked(run)
    if not method.paints:
        raise InputError(f"{run.recipe.method} paints no pixels; use masked_error, which compares what it "
                         "predicts to its targets.")
    if method.borrows:
        raise InputError(f"In pictures of what this run of {run.recipe.method} predicts, {method.borrows} taken from "
                         "the hidden truth, so their PSNR would not be the model's; measure one that predicts pixels.")
    normalize = method.views(run.recipe.size).normalize
    errors = torch.zeros(3)
    removed = count = 0
    for truth, x, mask in _batches(run, method, images, limit, batch, seed):
        hole = upsample_mask(mask, method.patch)
        visible = 1 - hole
        mean = (truth * visible).sum((2, 3), keepdim=True) / visible.sum((2, 3), keepdim=True)
        ours, best = (normalize.undo(method.to_image(y, x)) for y in (method.reconstruct(x, mask), method.target(x)))
        for i, painted in enumerate((ours, mean, best)):
            errors[i] += ((painted - truth) ** 2 * hole).sum()
        removed += int(hole.sum()) * truth.shape[1]
        count += len(x)
    model, baseline, ceiling = (-10 * torch.log10(errors / removed)).tolist()
    return Psnr(model, baseline, count, ceiling)


@dataclass
class TargetError:
    """Mean squared error on hidden patches of `n` images: the model's, and that of the mean of the visible targets."""

    model: float
    baseline: float
    n: int

    @property
    def explained(self) -> float:
        """The share of the rival's error that the model does not make: 1 is perfect, 0 no better, below 0 worse."""
        return 1 - self.model / self.baseline


@torch.no_grad()
def masked_error(run, images, *, limit: int = 1000, batch: int = 250, seed: int = 0) -> TargetError:
    """How far a masked-image run is from its own targets, averaged over all hidden patches of held-out images.

    The rival predicts for every hidden patch the mean of the targets of the visible patches of the same image. Images
    and masks are chosen as by `masked_psnr`. Errors of methods with different targets are different quantities.
    Errors: InputError for a run that hides nothing, and for one that guesses tokens, whose numbers have no distance.
    """
    method = _masked(run)
    errors = torch.zeros(2)
    removed = count = 0
    for _, x, mask in _batches(run, method, images, limit, batch, seed):
        if not method.target(x[:1]).is_floating_point():
            raise InputError(f"{run.recipe.method} guesses tokens, and the numbers of two tokens say nothing about how "
                             "far they are apart; use masked_psnr, which compares their pictures.")
        target, prediction = (y.float() if y.ndim == 3 else patchify(y.float(), method.patch)  # pictures too
                              for y in (method.target(x), method.reconstruct(x, mask)))
        visible = (1 - mask)[:, :, None]
        mean = (target * visible).sum(1, keepdim=True) / visible.sum(1, keepdim=True)
        for i, guess in enumerate((prediction, mean)):
            errors[i] += ((guess - target) ** 2 * mask[:, :, None]).sum()
        removed += int(mask.sum()) * target.shape[2]
        count += len(x)
    model, baseline = (errors / removed).tolist()
    return TargetError(model, baseline, count)


def _masked(run) -> Masked:
    method = run.method()
    if not isinstance(method, Masked):
        raise InputError(f"{run.recipe.method} paints no pixels, so there is nothing to measure; use the run of a "
                         "masked-image method.")
    return method


def _batches(run, method: Masked, images, limit: int, batch: int, seed: int):
    """Pixels in [0, 1], normalised, and the masks of this seed, batch after batch."""
    normalize = method.views(run.recipe.size).normalize
    generator = torch.Generator().manual_seed(seed)
    count = min(limit, len(images))
    for indices in (torch.arange(count) * len(images) // max(1, count)).split(batch):
        pixels, kept, _ = read(images, indices.tolist(), run.recipe.size)
        truth = pixels.float() / 255
        yield truth, normalize.apply(truth), method.draw_mask(len(kept), generator)
