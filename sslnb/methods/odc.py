"""ODC: Online Deep Clustering for Unsupervised Representation Learning (arXiv 2006.10645, CVPR 2020).

Predict the cluster of every image, while features, clusters and their centres move a little with every step.

    loss = Σ_b w_{y_b} CE(h(f_b), y_b) / Σ_b w_{y_b},   w_c ∝ |S_c|^(−1/2),   with the labels y as they were; then
    F_i ← m F_i + (1 − m) f̂_i, put back on the unit sphere,   y_i ← argmax_c C_c·F_i   for the images of the batch,
    C_c ← mean of F over the cluster S_c, every tenth step; clusters that are too small are emptied and filled anew

Follows OpenSelfSup, the official code. Where we differ: every process holds the memory (there: process 0, on its CPU),
and the weights of the loss are normalised over the batch of all processes (there: of each), so that it does not matter
how many there are.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clustering import check_clusters, halves, kmeans
from ..errors import InputError
from ..evaluate.features import extract
from ..optim import trainable
from ..parts import MemoryBank, agreed, full_precision, gather, normalized, sum_over_processes, world
from ..reading import draw_seed, loader_workers
from ..recipes import Recipe
from ..views import (
    ColorJitter,
    Greyscale,
    HorizontalFlip,
    Normalize,
    Pad,
    RandomResizedCrop,
    RandomRotation,
    View,
    Views,
)
from .base import Method


class ODC(Method):
    accumulable = True  # nearly: the weights of classes have a mean of 1 over a micro-batch
    sync_bn = True

    def __init__(self, backbone: nn.Module, *, images: int = 1_281_167, clusters: int = 10_000, min_cluster: int = 20,
                 hidden_dim: int = 512, dim: int = 256, dropout: float = 0.5, momentum: float = 0.5,
                 reweight: float = 0.5, every: int = 10, iterations: int = 20,
                 crop: tuple[float, float] = (0.08, 1.0), flip: float = 0.5, rotate: float = 2.0, jitter: float = 1.0,
                 hue: float = 0.5, grey: float = 0.2, pad: int = 0, head_lr: float = 1.0):
        super().__init__()
        if min_cluster * check_clusters(clusters, images) > images:
            raise InputError(f"{clusters} clusters of at least min_cluster={min_cluster} images need "
                             f"{min_cluster * clusters} images and there are {images}; use fewer or smaller ones.")
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(backbone.num_features, hidden_dim), nn.BatchNorm1d(hidden_dim, momentum=0.001, affine=False),
            nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(hidden_dim, dim), nn.ReLU(inplace=True))
        self.head = nn.Linear(dim, clusters)
        for layer in (self.projector[0], self.projector[4], self.head):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.head.weight, std=0.01)
        self.bank = MemoryBank(images, dim, momentum)
        self.register_buffer("labels", torch.arange(images) % clusters)  # arbitrary, until the run begins
        self.register_buffer("centroids", normalized(torch.randn(clusters, dim)))
        self.register_buffer("sizes", torch.zeros(clusters, dtype=torch.int64))
        self.steps = 0
        self.register_buffer("clustered", torch.tensor(False))
        self.clusters, self.min_cluster, self.momentum, self.reweight = clusters, min_cluster, momentum, reweight
        self.every, self.iterations, self.head_lr = every, iterations, head_lr
        self.crop, self.flip, self.rotate, self.pad = crop, flip, rotate, pad
        self.jitter, self.hue, self.grey = jitter, hue, grey

    def views(self, size: int) -> Views:
        s = self.jitter
        return Views(View(Pad(self.pad), RandomResizedCrop(size, self.crop), HorizontalFlip(self.flip),
                          RandomRotation(self.rotate), ColorJitter(0.4 * s, 0.4 * s, s, self.hue * s, p=1.0),
                          Greyscale(self.grey), Normalize()))

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> dict[str, Tensor]:
        (x,) = views
        index = torch.arange(len(x), device=x.device) if index is None else index  # without numbers: the first images
        f = self.projector(self.backbone(x))  # n x d, not negative
        out = {"loss": self.loss(self.head(f), self.labels[index]), "f": f}
        return {**out, "changed": self.remember(index, f)} if self.training else out

    @full_precision
    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy, a mean weighted by cluster: else large clusters would draw in the rest."""
        w = (self.sizes[y] + 1e-5) ** -self.reweight
        return (w * F.cross_entropy(logits, y, reduction="none")).mean() / gather(w).mean()

    @full_precision
    @torch.no_grad()
    def remember(self, index: Tensor, f: Tensor) -> Tensor:
        """The batch goes into the memory and each image to the nearest cluster; returns the share that moved."""
        index, vectors = self.bank.update(index, normalized(f))  # of all processes
        y = agreed((vectors @ self.centroids.T).argmax(1))
        moved = y != self.labels[index]
        self.labels[index] = y
        return moved.float().mean()

    # ------------------------------------------------------------ the clusters

    def before_train(self, run) -> None:
        """The first clusters: k-means of all images as the untrained network sees them. A resumed run has clusters."""
        if self.clustered:
            return
        images, (rank, processes), device = run.recipe.load(), world(), self.labels.device
        mine = torch.arange(len(images)).tensor_split(processes)[rank]
        found = extract(nn.Sequential(self.backbone, self.projector), images.subset(mine), size=run.recipe.size,
                        device=device, workers=loader_workers("auto", images, processes), title="Features to cluster")
        vectors = torch.zeros_like(self.bank.vectors)
        vectors[mine[found.index].to(device)] = normalized(found.x).to(device)
        self.bank.vectors.copy_(sum_over_processes(vectors))
        _, labels = kmeans(self.bank.vectors, self.clusters, self.iterations, draw_seed(run.seed, 0, -2))
        self.labels.copy_(agreed(labels))
        self.count()
        self.move_centroids()
        self.clustered.fill_(True)

    def get_extra_state(self) -> Tensor:
        """In the state dict as a buffer would be, but never on the device: a number there has to be waited for."""
        return torch.tensor(self.steps)

    def set_extra_state(self, steps: Tensor) -> None:
        self.steps = int(steps)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        self.steps += 1
        self.count()
        if self.steps % self.every == 0:
            self.move_centroids()
        self.repair()

    def count(self) -> None:
        """The sizes of the clusters. Not `bincount`, for which a GPU would have to wait."""
        self.sizes.zero_().index_add_(0, self.labels, torch.ones_like(self.labels))

    def move_centroids(self) -> None:
        """Every centroid to the mean of its cluster; that of an empty cluster stays."""
        sums = torch.zeros_like(self.centroids).index_add_(0, self.labels, self.bank.vectors)
        means = sums / self.sizes.clamp(min=1)[:, None]
        self.centroids.copy_(agreed(torch.where(self.sizes[:, None] > 0, means, self.centroids)))

    def repair(self) -> None:
        """Clusters below `min_cluster` dissolve into the nearest others; each is refilled with half of the largest."""
        small = self.sizes < self.min_cluster
        if not small.any():  # the one look of a step at what is on the device
            return
        others = (~small).nonzero()[:, 0]
        for some in small[self.labels].nonzero()[:, 0].split(1000):
            near = (self.bank.vectors[some] @ self.centroids[others].T).argmax(1)
            self.labels[some] = agreed(others[near])
        self.count()
        for empty in small.nonzero()[:, 0]:
            self.split(self.sizes.argmax(), empty)

    def split(self, largest: Tensor, empty: Tensor) -> None:
        """Half of the largest cluster, by 2-means, becomes the empty one."""
        members = (self.labels == largest).nonzero()[:, 0]
        goes = agreed(halves(self.bank.vectors[members], seed=int(self.steps)).long()) == 1
        self.labels[members[goes]] = empty
        for c, part in ((largest, members[~goes]), (empty, members[goes])):
            self.centroids[c] = agreed(self.bank.vectors[part].mean(0))
            self.sizes[c] = len(part)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """Drawn with replacement: an image may come twice in an epoch, or not at all."""
        images = len(self.labels)
        return np.random.RandomState(draw_seed(seed, epoch, -2) % 2**32).randint(images, size=images)

    def param_groups(self, recipe) -> list[dict]:
        """Weight decay on everything; no momentum for the head, whose targets change under it."""
        head = set(self.head.parameters())
        return [{"params": [p for p in trainable(self) if p not in head]},
                {"params": list(self.head.parameters()), "momentum": 0.0, "lr_scale": self.head_lr}]

    def snapshot(self, views: list[Tensor]) -> dict[str, Tensor]:
        return {"sizes": self.sizes}


RECIPES = {
    "demo": Recipe(
        method="odc", backbone="resnet_mini", size=20, data="digits_scattered", batch=64, epochs=60,
        optimizer="sgd", lr=0.1, weight_decay=1e-5,
        numbers={"images": 1300, "clusters": 25, "min_cluster": 3, "hidden_dim": 128, "dim": 64, "dropout": 0.0,
                 "crop": (0.5, 1.0), "pad": 2, "jitter": 0.5, "flip": 0.0, "rotate": 0.0, "hue": 0.0, "grey": 0.0},
        source="ours"),
    "r50_8xb64_step_ep440": Recipe(
        method="odc", backbone="resnet50", size=224, data="imagenet", gpus=8, batch=64, epochs=440, optimizer="sgd",
        lr=0.06, weight_decay=1e-5, schedule="step", milestones=(400,), gamma=0.4,
        numbers={"clusters": 10_000, "momentum": 0.5, "min_cluster": 20, "every": 10},
        backbone_numbers={"zero_init_last": False}, source="official code",
        published={"linear, MoCo protocol": 53.42}),
}
