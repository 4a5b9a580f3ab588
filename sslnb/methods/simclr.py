"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations (arXiv 2002.05709, ICML 2020).

Two views of every image; of all 2N views in the batch, each must find its partner.

    z = g(f(x)),   ℓ(i) = −log  exp(ẑᵢ·ẑ_p(i) / τ)  /  Σ_{j≠i} exp(ẑᵢ·ẑⱼ / τ),   loss = mean over the 2N anchors

Where we differ from the official TF code: the mean over anchors (there: the sum of two means, a factor 2 that LARS
cancels for all adapted tensors), an offset in the projector's last batch norm (there: only a scale), and crops with
bilinear interpolation as in the zoo's runs (there: bicubic).
"""

import torch
from torch import Tensor, nn

from ..losses import nt_xent
from ..parts import mlp
from ..recipes import Recipe
from ..views import Blur, ColorJitter, Greyscale, HorizontalFlip, Normalize, RandomResizedCrop, View, Views
from .base import Method


class SimCLR(Method):
    accumulable = False  # the negatives ARE the batch: eight batches of 64 are not one of 512
    chunks = True
    sync_bn = True  # statistics of one GPU would let the network recognise which images share its batch

    def __init__(self, backbone: nn.Module, *, temperature: float = 0.1, hidden_dim: int = 2048, dim: int = 128,
                 crop: tuple[float, float] = (0.08, 1.0), flip: float = 0.5, jitter: float = 1.0, hue: float = 0.2,
                 grey: float = 0.2, blur: float = 0.5):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp([backbone.num_features, hidden_dim, dim], hidden_bias=False, last_bias=False, last_bn=True)
        for layer in self.projector:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)  # official TF code
        self.temperature = temperature
        self.crop, self.flip, self.jitter, self.hue, self.grey, self.blur = crop, flip, jitter, hue, grey, blur

    def views(self, size: int) -> Views:
        s = 0.8 * self.jitter  # the paper's strength 1.0 is jitter 0.8
        return Views(View(RandomResizedCrop(size, self.crop), HorizontalFlip(self.flip),
                          ColorJitter(s, s, s, self.hue * self.jitter, p=0.8), Greyscale(self.grey), Blur(self.blur),
                          Normalize(), count=2))

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> dict[str, Tensor]:
        z1, z2 = self.embed(views).chunk(2)  # n x d each
        return {"loss": nt_xent(z1, z2, self.temperature), "z1": z1, "z2": z2}

    def embed(self, views: list[Tensor]) -> Tensor:
        return self.projector(self.backbone(torch.cat(views)))  # both views in one forward share their BN statistics


_imagenet = Recipe(
    method="simclr", backbone="resnet50", size=224, data="imagenet", gpus=8, batch=64, epochs=200, warmup_epochs=10,
    optimizer="lars", lr=0.6, weight_decay=1e-6, precision="fp16", numbers={"temperature": 0.1},
    source="zoo", sources={"weight_decay": "paper", "warmup_epochs": "official code", "temperature": "zoo"},
)

RECIPES = {
    "demo": Recipe(
        method="simclr", backbone="resnet_mini", size=20, data="digits_scattered", batch=64, epochs=30,
        warmup_epochs=2, optimizer="adamw", lr=5e-3, weight_decay=1e-4,
        numbers={"temperature": 0.2, "hidden_dim": 256, "dim": 64, "crop": (0.5, 1.0), "jitter": 0.5, "flip": 0.0,
                 "hue": 0.0, "grey": 0.0, "blur": 0.0},
        source="ours", note="Digits mean something else in a mirror, hence no flip; they are grey, hence no hue."),
    "r50_8xb64_cos_lr0_6_fp16_ep200": _imagenet.with_(
        published={"linear, SimSiam protocol": 62.56},
        note="The published 62.56 belongs to a checkpoint trained with 8 x 32 images at lr 0.3."),
    "r50_16xb256_cos_lr4_8_fp16_ep200": _imagenet.with_(
        gpus=16, batch=256, lr=4.8, published={"linear, SimSiam protocol": 66.66},
        note="OpenMixup's file of this name loads 64 images per GPU; we load the 256 it is named for."),
}
