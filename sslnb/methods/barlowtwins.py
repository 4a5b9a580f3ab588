"""Barlow Twins: Self-Supervised Learning via Redundancy Reduction (arXiv 2103.03230, ICML 2021).

Correlate every output of one view with every output of the other, over the batch: this matrix shall be the identity.

    C_ij = Σ_b z^A_{b,i} z^B_{b,j} / N   with z standardised over the batch of N images, each dimension by itself
    loss = Σ_i (1 − C_ii)²  +  λ Σ_{i≠j} C_ij²        (invariance: the views agree; redundancy: no output says it twice)

The 8192 x 8192 numbers of C are never made. Their squares have the same sum as N x N products of images:

    Σ_ij C_ij² = ‖Z^Aᵀ Z^B‖² / N² = tr(Z^A Z^Aᵀ Z^B Z^Bᵀ) / N² = Σ_ab (z^A_a · z^A_b) (z^B_a · z^B_b) / N²

Where we differ from the official code: its in-place all_reduce of C leaves each of W processes 1/W of the gradient.
LARS divides that out for matrices, but the vectors' own learning rate was tuned with it, so that a result depends on
how many GPUs there were. Our gradient is exact, and the recipes' `vector_lr` of 0.024 / W gives the vectors the step
that they had on the W GPUs of the published runs.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..optim import decay_groups
from ..parts import full_precision, gather, mlp, sum_over_processes, world
from ..recipes import Recipe
from ..views import (
    Blur,
    ColorJitter,
    Greyscale,
    HorizontalFlip,
    Normalize,
    Pad,
    RandomResizedCrop,
    Solarize,
    View,
    Views,
)
from .base import Method

SHOWN = 64  # outputs whose correlations a snapshot keeps: all 8192 x 8192 would be 268 MB each time


class BarlowTwins(Method):
    accumulable = False  # C is a statistic of ONE batch: four matrices of 512 images are not one of 2048
    chunks = True
    sync_bn = True  # the standardisation, too, is that of the whole batch; else C is no correlation

    def __init__(self, backbone: nn.Module, *, lambd: float = 0.0051, hidden_dim: int = 8192, dim: int = 8192,
                 crop: tuple[float, float] = (0.08, 1.0), flip: float = 0.5, jitter: float = 1.0, hue: float = 0.1,
                 grey: float = 0.2, blur: tuple[float, float] = (1.0, 0.1), solarize: tuple[float, float] = (0.0, 0.2),
                 pad: int = 0, vector_lr: float = 0.024):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp([backbone.num_features, hidden_dim, hidden_dim, dim], hidden_bias=False, last_bias=False)
        self.norm = nn.BatchNorm1d(dim, affine=False)  # one for both views, which pass through it one after the other
        self.lambd, self.vector_lr, self.pad = lambd, vector_lr, pad
        self.crop, self.flip, self.jitter, self.hue = crop, flip, jitter, hue
        self.grey, self.blur, self.solarize = grey, blur, solarize
        self.latest: tuple[Tensor, ...] = ()

    def views(self, size: int) -> Views:
        s = self.jitter
        return Views(*(
            View(Pad(self.pad), RandomResizedCrop(size, self.crop, interpolation="bicubic"), HorizontalFlip(self.flip),
                 ColorJitter(0.4 * s, 0.4 * s, 0.2 * s, self.hue * s, p=0.8), Greyscale(self.grey), Blur(blur),
                 Solarize(solarize), Normalize())
            for blur, solarize in zip(self.blur, self.solarize, strict=True)))

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> dict[str, Tensor]:
        z1, z2 = self.project(torch.cat([self.backbone(x) for x in views])).chunk(2)
        self.latest = tuple(z[:, :SHOWN].detach().float() for z in (z1, z2))
        invariance, redundancy = self.terms(z1, z2)
        return {"loss": invariance + self.lambd * redundancy, "invariance": invariance.detach(),
                "redundancy": redundancy.detach(), "z1": z1, "z2": z2}

    def project(self, h: Tensor) -> Tensor:
        """Features of two views, one below the other, (2n, features) -> z (2n, dim).

        Every batch norm sees one view after the other, each with its own statistics. The products take both at once:
        the weights are so many that reading them, and adding up their gradients, is work.
        """
        for layer in self.projector:
            h = torch.cat([layer(view) for view in h.chunk(2)]) if isinstance(layer, _BatchNorm) else layer(h)
        return h

    @full_precision
    def terms(self, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """Σ (1 − C_ii)² and Σ_{i≠j} C_ij² over the images of all processes, of which z1 and z2 (n, d) are this one's.

        Sums over thousands and millions of entries: large numbers are normal.
        """
        z1, z2, N = self.norm(z1), self.norm(z2), len(z1) * world()[1]
        diagonal = sum_over_processes((z1 * z2).sum(0)) / N  # d
        squares = sum_over_processes(((z1 @ gather(z1).T) * (z2 @ gather(z2).T)).sum()) / N**2  # over n x N products
        return ((1 - diagonal) ** 2).sum(), squares - (diagonal**2).sum()

    def param_groups(self, recipe) -> list[dict]:
        """Vectors (biases, norms), which LARS does not adapt, learn at a rate of their own: `vector_lr` times lr."""
        matrices, vectors = decay_groups(self.named_parameters(), recipe.weight_decay)
        return [matrices, {**vectors, "lr_scale": self.vector_lr}]

    def snapshot(self, views: list[Tensor]) -> dict[str, Tensor]:
        """C of the first outputs over the latest batch; the views given here are too few images for a correlation."""
        if not self.latest:
            return {}
        z1, z2 = (nn.functional.batch_norm(z, None, None, training=True) for z in self.latest)
        return {"correlation": z1.T @ z2 / len(z1)}


_imagenet = Recipe(
    method="barlowtwins", backbone="resnet50", size=224, data="imagenet", gpus=8, batch=256, epochs=300,
    warmup_epochs=10, optimizer="lars", lr=1.6, min_lr=0.0016, weight_decay=1e-6, precision="fp16",
    numbers={"vector_lr": 0.024 / 8}, source="official code", sources={"epochs": "zoo", "batch": "zoo"},
)

RECIPES = {
    "demo": Recipe(
        method="barlowtwins", backbone="resnet_mini", size=20, data="digits_scattered", batch=128, epochs=60,
        warmup_epochs=3, optimizer="adamw", lr=5e-3, weight_decay=1e-4,
        numbers={"lambd": 0.02, "hidden_dim": 256, "dim": 128, "vector_lr": 1.0, "pad": 2, "crop": (0.5, 1.0),
                 "jitter": 0.5, "flip": 0.0, "hue": 0.0, "grey": 0.0, "blur": (0.0, 0.0), "solarize": (0.0, 0.0)},
        source="ours"),
    "r50_8xb64_accu4_cos_lr1_6_ep300": _imagenet.with_(
        batch=64, accum=4, force_accum=True, published={"linear, BarlowTwins protocol": 71.66},
        note="As the zoo's file: C is estimated from 512 images and four gradients are averaged, which is noisier than "
             "C of 2048. The published 71.66 ran as 8 x 256 images: r50_8xb256_cos_lr1_6_fp16_ep300."),
    "r50_8xb256_cos_lr1_6_fp16_ep300": _imagenet.with_(
        published={"linear, BarlowTwins protocol": 71.66}, note="What the zoo's checkpoint was trained with."),
    "r50_16xb128_cos_lr1_6_fp16_ep1000": _imagenet.with_(
        gpus=16, batch=128, epochs=1000, vector_lr=0.024 / 16, published={"linear, official code": 73.5},
        sources={"epochs": "official code", "batch": "official code"}),
}
