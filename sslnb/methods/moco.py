"""MoCo v1: Momentum Contrast for Unsupervised Visual Representation Learning (arXiv 1911.05722, CVPR 2020).
MoCo v2: Improved Baselines with Momentum Contrastive Learning (arXiv 2003.04297, 2020).

Every query must find its own key, the other view, in a large dictionary: a queue of keys that a slow encoder made.

    q = g(f(x₁)) / ‖·‖,   k₊ = g_k(f_k(x₂)) / ‖·‖,   loss = −log  exp(q·k₊ / τ)  /  (exp(q·k₊ / τ) + Σᵢ exp(q·kᵢ / τ))
    θ_k ← m θ_k + (1 − m) θ_q after every optimizer step;   then the oldest keys kᵢ of the queue make room for k₊

v2 puts SimCLR's hidden layer into g and SimCLR's blur and jitter into the views, and a cosine into the learning rate.

Where we differ from the official code: batch-norm groups are counted in images (there: one GPU's), so that one process
can do what eight do, and evaluation uses statistics averaged over all groups (there: those of the first GPU). Both
matter to no gradient. v2's blur is SimCLR's, a tenth of the image wide (there: PIL's approximation with three boxes).
"""

import torch
from torch import Tensor, nn

from ..batchnorm import average_statistics, split_batchnorm
from ..losses import info_nce, look_up
from ..optim import trainable
from ..parts import (
    Queue,
    ema_update,
    frozen_copy,
    mlp,
    normalized,
    shuffle,
    unshuffle,
)
from ..recipes import Recipe
from ..views import Blur, ColorJitter, Greyscale, HorizontalFlip, Normalize, Pad, RandomResizedCrop, View, Views
from .base import Method


class MoCo(Method):
    """What v1 and v2 share. They differ in their projector, their views and their temperature."""

    accumulable = False  # keys are dealt among the groups of ONE batch: one group of 64 leaves nothing to deal
    sync_bn = False  # each group of images keeps its own statistics, and keys are shuffled between the groups

    def __init__(self, backbone: nn.Module, projector: nn.Module, *, temperature: float, queue: int, momentum: float,
                 dim: int, bn_images: int, shuffle: bool):
        super().__init__()
        self.backbone, self.projector = split_batchnorm(backbone, bn_images), projector
        self.key_encoder = frozen_copy(nn.Sequential(self.backbone, self.projector))
        self.queue = Queue(dim, queue)
        self.temperature, self.momentum, self.shuffle = temperature, momentum, shuffle

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> dict[str, Tensor]:
        q, k = self.queries(views[0]), self.keys(views[1])  # n x d each
        logits = look_up(q, k, self.queue(), self.temperature)  # n x (1 + K), the right key first
        if self.training:
            self.queue.enqueue(k)  # after the look-up: no key is its own negative
            average_statistics(self)
        return {"loss": info_nce(logits), "accuracy": self.found(logits), "q": q, "k": k}

    def queries(self, x: Tensor) -> Tensor:
        return normalized(self.projector(self.backbone(x)).float())

    @torch.no_grad()
    def keys(self, x: Tensor) -> Tensor:
        """Keys are encoded in other groups than their queries: else the statistics of a group, which all of its
        images share, would give away which key belongs to a query."""
        if not self.shuffle:
            return normalized(self.key_encoder(x).float())
        x, order = shuffle(x)
        return unshuffle(normalized(self.key_encoder(x).float()), order)

    @torch.no_grad()
    def found(self, logits: Tensor) -> Tensor:
        """The share of queries whose nearest key in the dictionary is the right one."""
        return (logits.argmax(1) == 0).float().mean()

    def param_groups(self, recipe) -> list[dict]:
        return [{"params": trainable(self)}]  # weight decay on every tensor, as in the official code

    def after_step(self, progress: float) -> None:
        ema_update(self.key_encoder[0], self.backbone, self.momentum)
        ema_update(self.key_encoder[1], self.projector, self.momentum)


class MoCoV1(MoCo):
    def __init__(self, backbone: nn.Module, *, temperature: float = 0.07, queue: int = 65_536, momentum: float = 0.999,
                 dim: int = 128, bn_images: int = 32, shuffle: bool = True, crop: tuple[float, float] = (0.2, 1.0),
                 flip: float = 0.5, jitter: float = 1.0, hue: float = 0.4, grey: float = 0.2, pad: int = 0):
        projector = mlp([backbone.num_features, dim], hidden_bias=True, last_bias=True)
        super().__init__(backbone, projector, temperature=temperature, queue=queue, momentum=momentum, dim=dim,
                         bn_images=bn_images, shuffle=shuffle)
        self.crop, self.flip, self.jitter, self.hue, self.grey, self.pad = crop, flip, jitter, hue, grey, pad

    def views(self, size: int) -> Views:
        s = 0.4 * self.jitter
        return Views(View(Pad(self.pad), RandomResizedCrop(size, self.crop), HorizontalFlip(self.flip),
                          Greyscale(self.grey), ColorJitter(s, s, s, self.hue * self.jitter, p=1.0), Normalize(),
                          count=2))


class MoCoV2(MoCo):
    def __init__(self, backbone: nn.Module, *, hidden_dim: int = 2048, temperature: float = 0.2, queue: int = 65_536,
                 momentum: float = 0.999, dim: int = 128, bn_images: int = 32, shuffle: bool = True,
                 crop: tuple[float, float] = (0.2, 1.0), flip: float = 0.5, jitter: float = 1.0, hue: float = 0.1,
                 grey: float = 0.2, blur: float = 0.5, pad: int = 0):
        # No batch norm in the projector; hidden_dim 0 is v1's single layer.
        dims = [backbone.num_features, *[hidden_dim] * bool(hidden_dim), dim]
        super().__init__(backbone, mlp(dims, hidden_bias=True, hidden_bn=False, last_bias=True),
                         temperature=temperature, queue=queue, momentum=momentum, dim=dim, bn_images=bn_images,
                         shuffle=shuffle)
        self.crop, self.flip, self.jitter, self.hue = crop, flip, jitter, hue
        self.grey, self.blur, self.pad = grey, blur, pad

    def views(self, size: int) -> Views:
        s = 0.4 * self.jitter
        return Views(View(Pad(self.pad), RandomResizedCrop(size, self.crop), HorizontalFlip(self.flip),
                          ColorJitter(s, s, s, self.hue * self.jitter, p=0.8), Greyscale(self.grey), Blur(self.blur),
                          Normalize(), count=2))


_imagenet = Recipe(
    method="mocov2", backbone="resnet50", size=224, data="imagenet", gpus=4, batch=64, epochs=200, lr=0.03,
    weight_decay=1e-4, lr_by_epoch=True, numbers={"bn_images": 64}, backbone_numbers={"zero_init_last": False},
    source="official code", sources={"batch": "zoo", "bn_images": "zoo"},
)

RECIPES = {
    "mocov1": {
        "demo": Recipe(
            method="mocov1", backbone="resnet_mini", size=20, data="digits_scattered", batch=64, epochs=30,
            warmup_epochs=2, optimizer="adamw", lr=2e-3, weight_decay=1e-4,
            numbers={"queue": 640, "momentum": 0.99, "dim": 64, "bn_images": 8, "pad": 2,
                     "crop": (0.7, 1.0), "jitter": 0.5, "flip": 0.0, "hue": 0.0, "grey": 0.0},
            source="ours"),
        "r50_4xb64_step_ep200": _imagenet.with_(
            method="mocov1", schedule="step", milestones=(120, 160), published={"linear, MoCo protocol": 61.02},
            note="OpenMixup's views leave out the greyscale of paper and official code; ours have it."),
    },
    "mocov2": {
        "demo": Recipe(
            method="mocov2", backbone="resnet_mini", size=20, data="digits_scattered", batch=64, epochs=30,
            warmup_epochs=2, optimizer="adamw", lr=2e-3, weight_decay=1e-4,
            numbers={"hidden_dim": 256, "temperature": 0.07, "queue": 640, "momentum": 0.99, "dim": 64, "bn_images": 8,
                     "pad": 2, "crop": (0.7, 1.0), "jitter": 0.5, "flip": 0.0, "hue": 0.0, "grey": 0.0, "blur": 0.0},
            source="ours"),
        "r50_4xb64_cos": _imagenet.with_(
            published={"linear, MoCo protocol": 67.69}, note="The published checkpoint ran as 8 x 32 images."),
        "r50_4xb64_cos_fp16_ep200": _imagenet.with_(precision="fp16"),
    },
}
