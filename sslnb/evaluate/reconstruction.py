"""How well are hidden patches painted? Peak signal-to-noise ratio on removed pixels, beside a modest rival."""

from dataclasses import dataclass

import torch

from ..errors import InputError
from ..masking import upsample_mask
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
    if not hasattr(method, "reconstruct"):
        raise InputError(f"{run.recipe.method} paints no pixels, so there is nothing to measure; use the run of a "
                         "masked-image method.")
    if method.norm_pix:
        raise InputError("This run predicts standardised patches (norm_pix); their PSNR would borrow brightness and "
                         "contrast from the hidden truth. Measure a run with norm_pix=False.")
    normalize = method.views(run.recipe.size).normalize
    generator = torch.Generator().manual_seed(seed)
    errors = torch.zeros(2)
    removed = count = 0
    for indices in torch.arange(min(limit, len(images))).split(batch):
        pixels, kept, _ = read(images, indices.tolist(), run.recipe.size)
        truth = pixels.float() / 255
        x = normalize.apply(truth)
        noise = torch.rand(len(x), method.backbone.patch_embed.num_patches, generator=generator)
        prediction, mask = method.reconstruct(x, noise)
        hole = upsample_mask(mask, method.patch)
        visible = 1 - hole
        mean = (truth * visible).sum((2, 3), keepdim=True) / visible.sum((2, 3), keepdim=True)
        for i, painted in enumerate((normalize.undo(method.to_image(prediction, x)), mean)):
            errors[i] += ((painted - truth) ** 2 * hole).sum()
        removed += int(hole.sum()) * truth.shape[1]
        count += len(kept)
    model, baseline = (-10 * torch.log10(errors / removed)).tolist()
    return Psnr(model, baseline, count)
