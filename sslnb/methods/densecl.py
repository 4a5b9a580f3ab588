"""DenseCL: Dense Contrastive Learning for Self-Supervised Visual Pre-Training (arXiv 2011.09157, CVPR 2021).

MoCo v2 twice over: the image must find its other view, and every cell of its feature map must find its own cell there.

    global  L_q = −log  exp(q·k₊/τ)  /  (exp(q·k₊/τ) + Σ exp(q·k₋/τ))                   one q per image
    dense   L_r = 1/S² Σₛ −log  exp(rˢ·t₊ˢ/τ)  /  (exp(rˢ·t₊ˢ/τ) + Σ exp(rˢ·t₋/τ))      one r per cell, S² cells
    loss = (1 − λ) L_q + λ L_r,   t₊ˢ = t^c(s) with c(s) = argmax_j cos(fˢ, f'ʲ)

Cells are matched by what the BACKBONE says of them, f and f', not by where they are: nobody tells which way an image
was cropped or flipped. k₋ and t₋ come from two queues; the second holds one t per image, the mean over its cells.

Where we differ from the official code: the key encoder moves after the optimizer's step (there: before the next keys,
which is the same), and the differences of our MoCo. Like the official ImageNet run, λ holds from the first step on.
"""

import torch
from torch import Tensor, nn

from ..backbones import cells, for_maps
from ..batchnorm import average_statistics, split_batchnorm
from ..losses import info_nce, info_nce_of_many, look_up
from ..optim import trainable
from ..parts import (
    Queue,
    ema_update,
    frozen_copy,
    full_precision,
    mlp,
    normalized,
    shuffle,
    unshuffle,
)
from ..recipes import Recipe
from ..views import Blur, ColorJitter, Greyscale, HorizontalFlip, Normalize, RandomResizedCrop, View, Views
from .base import Method


class DenseCL(Method):
    accumulable = False  # keys are dealt among the groups of ONE batch: one group of 64 leaves nothing to deal
    sync_bn = False  # each group of images keeps its own statistics, and keys are shuffled between the groups

    def __init__(self, backbone: nn.Module, *, loss_lambda: float = 0.5, temperature: float = 0.2, queue: int = 65_536,
                 momentum: float = 0.999, hidden_dim: int = 2048, dim: int = 128, bn_images: int = 32,
                 shuffle: bool = True, matching: str = "features", crop: tuple[float, float] = (0.2, 1.0),
                 flip: float = 0.5, jitter: float = 1.0, hue: float = 0.1, grey: float = 0.2, blur: float = 0.5):
        super().__init__()
        self.backbone = split_batchnorm(for_maps(backbone), bn_images)
        # No batch norm in either. The paper's 1 x 1 convolutions are linear layers on the cells.
        self.projector, self.dense_projector = (
            mlp([backbone.num_features, hidden_dim, dim], hidden_bias=True, hidden_bn=False, last_bias=True)
            for _ in range(2))
        for layer in (self.projector[0], self.projector[-1]):
            nn.init.kaiming_normal_(layer.weight)  # official code; its convolutions keep torch's initialisation
            nn.init.zeros_(layer.bias)
        self.key_encoder = frozen_copy(nn.ModuleList([self.backbone, self.projector, self.dense_projector]))
        self.queue, self.dense_queue = Queue(dim, queue), Queue(dim, queue)
        self.loss_lambda, self.temperature, self.momentum = loss_lambda, temperature, momentum
        self.shuffle, self.matching = shuffle, matching
        self.crop, self.flip, self.jitter, self.hue, self.grey, self.blur = crop, flip, jitter, hue, grey, blur

    def views(self, size: int) -> Views:
        s = 0.4 * self.jitter
        return Views(View(RandomResizedCrop(size, self.crop), HorizontalFlip(self.flip),
                          ColorJitter(s, s, s, self.hue * self.jitter, p=0.8), Greyscale(self.grey), Blur(self.blur),
                          Normalize(), count=2))

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> dict[str, Tensor]:
        q, r, _, f = self.encode(views[0], self.backbone, self.projector, self.dense_projector)
        k, t, t_mean, f_key = self.keys(views[1])
        t = t.take_along_dim(self.match(f, f_key)[:, :, None], 1)  # n x S² x d: the right key of every cell
        single = info_nce(look_up(q, k, self.queue(), self.temperature))
        dense = info_nce_of_many(r.flatten(0, 1), t.flatten(0, 1), self.dense_queue(), self.temperature)
        if self.training:
            self.queue.enqueue(k), self.dense_queue.enqueue(t_mean)  # after the look-up: no key is its own negative
            average_statistics(self)
        loss = (1 - self.loss_lambda) * single + self.loss_lambda * dense
        return {"loss": loss, "global": single.detach(), "dense": dense.detach()}

    def encode(self, x: Tensor, backbone: nn.Module, projector: nn.Module, dense_projector: nn.Module) -> list[Tensor]:
        """-> q (n, d), r (n, S², d), the mean over cells of r BEFORE it is normalised (n, d), f (n, S², D)."""
        f = cells(backbone, x)
        r = dense_projector(f)
        return [normalized(y.float()) for y in (projector(f.mean(1)), r, r.mean(1), f.detach())]

    @torch.no_grad()
    def keys(self, x: Tensor) -> list[Tensor]:
        """The same four of the key encoder, which sees the images in other batch-norm groups (see MoCo)."""
        if not self.shuffle:
            return self.encode(x, *self.key_encoder)
        x, order = shuffle(x)
        return [unshuffle(y, order) for y in self.encode(x, *self.key_encoder)]

    @full_precision
    @torch.no_grad()
    def match(self, f: Tensor, f_key: Tensor) -> Tensor:
        """c(s), (n, S²): for every cell of the query the most similar cell of the key. "random" breaks the method."""
        similarity = f @ f_key.transpose(1, 2)  # n x S² x S², rows are the query's cells
        return (torch.rand_like(similarity) if self.matching == "random" else similarity).argmax(2)

    def param_groups(self, recipe) -> list[dict]:
        return [{"params": trainable(self)}]  # weight decay on every tensor, as in the official code

    def after_step(self, progress: float) -> None:
        for slow, fast in zip(self.key_encoder, (self.backbone, self.projector, self.dense_projector), strict=True):
            ema_update(slow, fast, self.momentum)


_imagenet = Recipe(
    method="densecl", backbone="resnet50", size=224, data="imagenet", gpus=4, batch=64, epochs=200, optimizer="sgd",
    lr=0.03, weight_decay=1e-4, lr_by_epoch=True, numbers={"bn_images": 64}, backbone_numbers={"zero_init_last": False},
    source="official code", sources={"batch": "zoo", "bn_images": "zoo"},
)

RECIPES = {
    "demo": Recipe(
        method="densecl", backbone="resnet_mini", size=20, data="digits_scattered", batch=64, epochs=30,
        warmup_epochs=2, optimizer="adamw", lr=2e-3, weight_decay=1e-4,
        numbers={"temperature": 0.1, "queue": 640, "momentum": 0.99, "hidden_dim": 256, "dim": 64, "bn_images": 8,
                 "crop": (0.5, 1.0), "jitter": 0.5, "flip": 0.0, "hue": 0.0, "grey": 0.0, "blur": 0.0},
        source="ours"),
    "r50_4xb64_cos": _imagenet.with_(
        published={"linear, MoCo protocol": 63.62},
        note="The published checkpoint ran as 8 x 32 images. OpenMixup holds lambda at 0 for 1000 steps, we do not."),
}
