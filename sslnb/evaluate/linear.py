"""Linear probes: how much of the classes a straight cut through feature space can read.

LINEAR holds the published protocols, which are trained on crops by protocol.train_protocol. `linear_probe` is quick
and works on cached features.

The rate matters more than anything else here, so a whole grid of learning rates is trained at once (one
weight tensor G x D x C, one pass over the features). The rate is chosen on a fifth of TRAIN, trained again
on all of TRAIN, and only then is the test split touched, once. Schedule and initialisation follow MoCo's
probe (arXiv 1911.05722): SGD, cosine per epoch, weights N(0, 0.01), biases 0. It is not the published
protocol: features are cached, without augmentation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..recipes import Recipe
from .features import the_device

GRID = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # for standardised features at batch 256
HELD_OUT = 0.2
TINY = 1e-20


@dataclass
class Probe:
    """Accuracies in %."""

    top1: float
    lr: float
    validation: dict[float, float]  # learning rate -> accuracy on the held-out part of train
    at_edge: bool  # the best rate is the first or last of the grid: a wider grid might do better
    predictions: Tensor  # (M,) int64
    weight: Tensor  # (D, C), for standardised features


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *,
                 lrs: Sequence[float] = GRID, epochs: int = 100, batch: int = 256, momentum: float = 0.9,
                 weight_decay: float = 0.0, seed: int = 0, device: str | torch.device = "cpu") -> Probe:
    """Fit a linear classifier on train (N, D) and score it on test (M, D); labels (N,), (M,) count from 0.

    Features and labels stay on the CPU and go to the `device` ("auto": the GPU if there is one) batch by batch:
    ImageNet's are 10 GB. Raises InputError for sizes that do not fit and for a train set where no class has two
    images, since then no rate can be chosen.
    """
    lrs = sorted(lrs)
    _check(train, train_labels, test, test_labels, lrs)
    settings = dict(classes=1 + int(train_labels.max()), epochs=epochs, batch=batch, momentum=momentum,
                    weight_decay=weight_decay, seed=seed, device=the_device(device))
    fit, held = _stratified(train_labels, seed)
    if len(held) == 0:
        raise InputError("No class has two training images, so none can be held out to choose the rate.")
    heads = _fit(train[fit], train_labels[fit], lrs, **settings)
    accuracy = [_accuracy(p, train_labels[held]) for p in heads.predict(train[held])]
    # Equal accuracies are common on small sets: take the middle one of the best, not one at an edge.
    best = [g for g, a in enumerate(accuracy) if a == max(accuracy)]
    g = best[len(best) // 2]

    head = _fit(train, train_labels, [lrs[g]], **settings)
    predictions = head.predict(test)[0]
    return Probe(_accuracy(predictions, test_labels), lrs[g], dict(zip(lrs, accuracy, strict=True)),
                 g in (0, len(lrs) - 1), predictions, head.weight[:, 0].T.cpu())


@dataclass
class _Heads:
    """G linear classifiers on features standardised with the mean and std they were fitted on; all on one device.

    Classes first, images last: one product for all heads, and a softmax over long rows. The other way round, G x B x C,
    the whole probe takes a CPU 1.5 to 2 times as long.
    """

    weight: Tensor  # C x G x D
    bias: Tensor  # C x G x 1
    mean: Tensor  # D
    std: Tensor  # D

    def inputs(self, x: Tensor) -> Tensor:
        return (x.to(self.mean.device).float() - self.mean) / self.std

    def logits(self, z: Tensor) -> Tensor:
        """Of the inputs (B, D), C x G x B."""
        return (self.weight.flatten(0, 1) @ z.T).view(*self.bias.shape[:2], -1) + self.bias

    def predict(self, x: Tensor) -> Tensor:
        """Classes (G, M), on the CPU, in pieces: C x G x M logits never exist at once. Diverged heads predict 0."""
        return torch.cat([self.logits(self.inputs(p)).nan_to_num(0.0).argmax(0).cpu() for p in x.split(4096)], 1)


def _fit(x: Tensor, labels: Tensor, lrs: Sequence[float], *, classes: int, epochs: int, batch: int,
         momentum: float, weight_decay: float, seed: int, device: str | torch.device) -> _Heads:
    """SGD with momentum on the cross-entropy, one head per rate; all heads see the same batches."""
    generator = torch.Generator().manual_seed(seed)
    std = x.float().std(0, correction=0)
    std = torch.where(std > 1e-6, std, 1.0)  # a dead dimension stays dead instead of becoming amplified noise
    weight = 0.01 * torch.randn(x.shape[1], classes, generator=generator).T[:, None].repeat(1, len(lrs), 1)
    heads = _Heads(weight.to(device), torch.zeros(classes, len(lrs), 1, device=device), x.float().mean(0).to(device),
                   std.to(device))
    rate = torch.tensor(lrs, device=device, dtype=torch.float32)[:, None]  # G x 1
    speed_w, speed_b = torch.zeros_like(heads.weight), torch.zeros_like(heads.bias)
    for epoch in range(epochs):
        lr = 0.5 * rate * (1 + math.cos(math.pi * epoch / epochs))
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            z, y = heads.inputs(x[rows]), labels[rows].to(device)  # B x D, B
            # The gradient of the cross-entropy with respect to the logits is softmax minus one-hot.
            error = heads.logits(z).softmax(0)  # C x G x B
            error.add_(TINY).sub_(TINY)  # below 1e-27 it is 0: with denormal numbers a CPU can take 4 times as long
            error.sub_(F.one_hot(y, classes).T[:, None]).div_(len(rows))
            gradient = (error.flatten(0, 1) @ z).view_as(speed_w).add_(heads.weight, alpha=weight_decay)
            speed_w.mul_(momentum).add_(gradient)
            speed_b.mul_(momentum).add_(error.sum(2, keepdim=True))
            heads.weight -= lr * speed_w
            heads.bias -= lr * speed_b
    return heads


def _stratified(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit on and rows held out: a fifth of every class, at least one where a class has two images."""
    generator = torch.Generator().manual_seed(seed)
    fit, held = [], []
    for c in labels.unique():
        rows = (labels == c).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        n = max(1, round(HELD_OUT * len(rows))) if len(rows) > 1 else 0
        held.append(rows[:n])
        fit.append(rows[n:])
    return torch.cat(fit), torch.cat(held)


def _accuracy(predictions: Tensor, labels: Tensor) -> float:
    return 100 * int((predictions == labels).sum()) / len(labels)


def _check(train, train_labels, test, test_labels, lrs) -> None:
    if len(train) != len(train_labels) or len(test) != len(test_labels):
        raise InputError(f"Features and labels differ in number: {len(train)} and {len(train_labels)} in "
                         f"train, {len(test)} and {len(test_labels)} in test. Give one label per row.")
    if len(train) == 0 or len(test) == 0:
        raise InputError(f"The probe needs images: train has {len(train)}, test has {len(test)}.")
    if not lrs or lrs[0] <= 0:
        raise InputError(f"lrs={lrs} must hold at least one rate, all positive.")
    if min(train_labels.min(), test_labels.min()) < 0:
        raise InputError("Labels must count from 0: take unlabelled images (-1) out first.")


# ---------------------------------------------------------------- the published protocols, for protocol.train_protocol

_probe = Recipe(
    method="sslnb.evaluate.supervised:Supervised", backbone="resnet50", size=224, data="imagenet", gpus=8, batch=32,
    epochs=100, optimizer="sgd", weight_decay=0.0, lr_by_epoch=True, source="official code",
)

LINEAR = {
    "linear_demo": _probe.with_(
        backbone="resnet_mini", size=20, data="digits_scattered", gpus=1, batch=64, epochs=20, lr=1.0, crop=(0.7, 1.0),
        flip=0.0, source="ours", note="Digits must not be mirrored, and half a digit may be another one."),
    "linear_moco": _probe.with_(
        lr=30.0, schedule="step", milestones=(60, 80),
        note="lr 30 is for 256 images as it stands and is not scaled. 76.17, which stands for the supervised ResNet-50 "
             "in the zoo's table, is its multi-head result; by this protocol it has 74.12."),
    "linear_simsiam": _probe.with_(
        batch=512, epochs=90, optimizer="lars", lr=1.6, numbers={"adapt_vectors": True},
        note="lr is 0.1 x 4096 / 256. LARS adapts the bias too, as apex's LARC does."),
    "linear_barlowtwins": _probe.with_(lr=0.3, weight_decay=1e-6),
    "linear_mocov3": _probe.with_(
        backbone="vit_small_patch16_224", backbone_numbers={"num_heads": 12}, batch=128, epochs=90, lr=12.0,
        note="lr is 3 x 1024 / 256, for its vision transformers; its ResNet-50 takes 0.4."),
}
