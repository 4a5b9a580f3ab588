"""MaskFeat: Masked Feature Prediction for Self-Supervised Visual Pre-Training (arXiv 2112.09133, CVPR 2022).

Hide blocks of patches behind one learned token and let the network say not their pixels but where their edges run: the
histogram of oriented gradients (HOG) of every hidden patch, through a single linear layer.

    h̃ = h / ‖h‖₂ for each colour c and cell u, h of hog.py;   loss = 1/|M| Σᵢ over M of ‖pᵢ − h̃ᵢ‖² / values per patch

Follows the official code and mmselfsup, whose run is the zoo's number: BEiT's blocks over 40 % of the patches, which
give up if nothing fits (|M| differs between images), a plain ViT, clipping at 0.02. With `gaussian_window` 0 it is the
official HOG, with 16 mmselfsup's, which also weighs pixels by their distance from the middle of their patch. Cells are
half a patch wide: 8 of 16 px, and as much of a smaller patch. OpenMixup's config by this name has SimMIM's squares over
60 % and a BEiT; we do not follow it. All initial weights are normal with deviation 0.02.
"""

import torch
from torch import Generator, Tensor, nn

from ..backbones import cells, need_vit
from ..errors import InputError, unknown
from ..hog import BINS, from_patches, glyphs, hog, to_patches
from ..losses import masked_mean
from ..masking import block_mask, check_mask_ratio, patchify, unpatchify
from ..parts import full_precision
from ..recipes import Recipe
from ..tokens import mask_enters, put_token
from ..views import HorizontalFlip, Normalize, RandomResizedCrop, View, Views
from .base import Masked

PREDICT = ("hog", "pixels")
SIDE = 2  # cells in a row of a patch
GLYPH = 12  # px of a drawn cell


class MaskFeat(Masked):
    def __init__(self, backbone: nn.Module, *, mask_ratio: float = 0.4, gaussian_window: int = 16, predict: str = "hog",
                 local_norm: bool = True, crop: tuple[float, float] = (0.5, 1.0), flip: float = 0.5):
        """To compare and to break the method: `predict` "pixels", and no `local_norm`, the length 1 of a histogram."""
        super().__init__()
        self.predict = predict if predict in PREDICT else unknown("predict", predict, PREDICT)
        need_vit(backbone, "maskfeat")
        self.backbone, self.mask_ratio, self.crop, self.flip = backbone, check_mask_ratio(mask_ratio), crop, flip
        self.patch, (self.grid, _) = backbone.patch_embed.patch_size[0], backbone.patch_embed.grid_size
        if self.patch % SIDE:
            raise InputError(f"maskfeat divides a patch into {SIDE} x {SIDE} cells, and {self.patch} px cannot be so "
                             "divided; use a backbone with another patch size.")
        self.gaussian_window, self.local_norm, self.paints = gaussian_window, local_norm, predict == "pixels"
        self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.embed_dim))
        self.head = nn.Linear(backbone.embed_dim, 3 * (self.patch**2 if self.paints else BINS * SIDE**2))
        self.apply(_normal)
        for token in (self.mask_token, backbone.cls_token, backbone.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)

    def views(self, size: int) -> Views:
        return Views(View(RandomResizedCrop(size, self.crop, interpolation="bicubic"), HorizontalFlip(self.flip),
                          Normalize()))

    def draw_mask(self, batch: int, generator: Generator | None = None) -> Tensor:
        count = round(self.mask_ratio * self.grid**2)
        return block_mask(batch, self.grid, count, count // 5, exact=False, generator=generator)

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """-> the prediction for every patch, hidden or not (B, L, 108)."""
        with mask_enters(self.backbone.patch_embed, lambda tokens: self.hide(tokens, mask)):
            return self.head(cells(self.backbone, images))

    def hide(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """The mask token instead of every hidden patch; both before positions are added."""
        return put_token(tokens, mask, self.mask_token)

    def target(self, images: Tensor) -> Tensor:
        """The HOG of every patch (B, L, 108), order (colour, bin, cell row, cell column)."""
        if self.predict == "pixels":
            return patchify(images.float(), self.patch)
        return to_patches(hog(images, self.patch // SIDE, self.gaussian_window, self.local_norm), SIDE)

    @full_precision
    def loss(self, prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return masked_mean(((prediction - target) ** 2).mean(-1), mask)

    def to_image(self, prediction: Tensor, images: Tensor) -> Tensor:
        """HOG as glyphs, every cell GLYPH px wide. What exceeds 1, without `local_norm`, is scaled down to it."""
        if self.predict == "pixels":
            return unpatchify(prediction.float(), self.patch)
        h = from_patches(prediction.float(), SIDE)
        return Normalize().apply(glyphs(h / h.amax((1, 2, 3, 4), keepdim=True).clamp(min=1), GLYPH))


def _normal(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


RECIPES = {
    "demo": Recipe(
        method="maskfeat", backbone="vit_mini", size=28, data="fashion_small", batch=125, epochs=20, warmup_epochs=1,
        optimizer="adamw", lr=4e-3, weight_decay=0.05, clip=0.02, pool="mean",
        numbers={"gaussian_window": 0, "crop": (0.9, 1.0)},
        source="ours", sources={"weight_decay": "official code", "clip": "official code", "mask_ratio": "paper",
                                "gaussian_window": "official code"},
        note="Patches of 4 px, so cells of 2 px: too small for an orientation to be measured well."),
    "vit_base_hog_108_sz224_8xb128_accu2_cos_fp16_ep300": Recipe(
        method="maskfeat", backbone="vit_base_patch16_224", size=224, data="imagenet", gpus=8, batch=128, accum=2,
        epochs=300, warmup_epochs=30, warmup_from=8e-6 / 1.6e-3, optimizer="adamw", lr=1.6e-3, min_lr=8e-6,
        weight_decay=0.05, clip=0.02, precision="fp16", pool="mean",
        source="official code", sources={"batch": "zoo", "accum": "zoo", "precision": "zoo",
                                         "gaussian_window": "mmselfsup"},
        published={"fine-tune, BEiT (MaskFeat)": 83.5},
        note="lr is 2e-4 x 2048 / 256, from and to 1e-6 x 2048 / 256: SlowFast scales all three. The zoo's file is "
             "another method; its number and weights are those of mmselfsup, whose HOG has the Gaussian window."),
}
