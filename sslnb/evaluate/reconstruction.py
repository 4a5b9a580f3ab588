"""How well are hidden patches painted? Peak signal-to-noise ratio on removed pixels, beside a modest rival."""

from dataclasses import dataclass

import torch

from ..errors import InputError
from ..masking import upsample_mask
from ..methods.base import Masked
from .pixels import read


@dataclass
class Psnr:
    """Decibel on removed pixels of `n` images: the model's, and that of the mean of each image's visible pixels."""

    model: float
    baseline: float
    n: int


@torch.no_grad()
def masked_psnr(run, images, *, limit: int = 1000, batch: int = 250, seed: int = 0) -> Psnr:
    """PSNR of a masked-image run on held-out images, values in [0, 1], the error averaged over all removed pixels.

    Masks are drawn from `seed`. Errors: InputError for a run that paints nothing, and for one whose targets are
    standardised patches, since their brightness would have to be taken from the truth that is to be guessed.
    """
    method = run.method()
    if not isinstance(method, Masked):
        raise InputError(f"{run.recipe.method} paints no pixels, so there is nothing to measure; use the run of a "
                         "masked-image method.")
    if method.borrows:
        raise InputError(f"In pictures of what this run of {run.recipe.method} predicts, {method.borrows} taken from "
                         "the hidden truth, so their PSNR would not be the model's; measure one that predicts pixels.")
    normalize = method.views(run.recipe.size).normalize
    generator = torch.Generator().manual_seed(seed)
    errors = torch.zeros(2)
    removed = count = 0
    for indices in torch.arange(min(limit, len(images))).split(batch):
        pixels, kept, _ = read(images, indices.tolist(), run.recipe.size)
        truth = pixels.float() / 255
        x = normalize.apply(truth)
        mask = method.draw_mask(len(x), generator)
        hole = upsample_mask(mask, method.patch)
        visible = 1 - hole
        mean = (truth * visible).sum((2, 3), keepdim=True) / visible.sum((2, 3), keepdim=True)
        for i, painted in enumerate((normalize.undo(method.to_image(method.reconstruct(x, mask), x)), mean)):
            errors[i] += ((painted - truth) ** 2 * hole).sum()
        removed += int(hole.sum()) * truth.shape[1]
        count += len(kept)
    model, baseline = (-10 * torch.log10(errors / removed)).tolist()
    return Psnr(model, baseline, count)
