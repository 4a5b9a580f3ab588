"""DeepCluster: Deep Clustering for Unsupervised Learning of Visual Features (arXiv 1807.05520, ECCV 2018).

Cluster the features of all images, learn for an epoch to predict the clusters, cluster the better features, and so on.

    before every epoch   min_C 1/N Σᵢ min_{yᵢ} ‖φ(f(xᵢ)) − C yᵢ‖²,   φ = PCA-whitening, then length 1
                         W ~ N(0, 0.01²), b = 0: cluster 7 is not what was cluster 7 before
    in the epoch         loss = −log softmax(W f(xᵢ) + b)[yᵢ], every cluster drawn equally often

A fixed Sobel filter before the first convolution (`sobel=True` of the backbone) hides colour, too easy to cluster by.

Follows OpenSelfSup, where the zoo's checkpoint is from: pooled ResNet-50 features go straight to W (official code:
AlexNet, its last hidden layer without ReLU). Where we differ: batch norm spans all processes, k-means runs on all of
them together (there: on one), an empty cluster gets half of the largest one (faiss: of one drawn by size), and images
are resized bicubically before clustering (there: bilinearly). `every` and `head_lr` are ours: on a small data set an
epoch is too short to learn a new W.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..clustering import check_clusters, check_components, evenly, kmeans, whiten
from ..evaluate.features import extract
from ..parts import full_precision, share, sum_over_processes, world
from ..reading import draw_seed, loader_workers
from ..recipes import Recipe
from ..views import ColorJitter, Greyscale, HorizontalFlip, Normalize, RandomResizedCrop, RandomRotation, View, Views
from .base import Method


class DeepCluster(Method):
    accumulable = True
    sync_bn = True  # then all processes hold one network, and each can cluster its share of the images with it

    def __init__(self, backbone: nn.Module, *, images: int = 1_281_167, clusters: int = 10_000, pca: int = 256,
                 iterations: int = 20, crop: tuple[float, float] = (0.08, 1.0), flip: float = 0.5, rotate: float = 0.0,
                 jitter: float = 0.0, hue: float = 0.5, grey: float = 0.0, every: int = 1, head_lr: float = 1.0,
                 uniform: bool = True, redraw: bool = True):
        super().__init__()
        self.backbone = backbone
        self.clusters, self.pca = check_clusters(clusters, images), check_components(pca, backbone.num_features)
        self.iterations, self.every, self.head_lr = iterations, every, head_lr
        self.uniform, self.redraw = uniform, redraw
        self.crop, self.flip, self.rotate, self.jitter, self.hue, self.grey = crop, flip, rotate, jitter, hue, grey
        self.head = nn.Linear(backbone.num_features, clusters)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("labels", torch.arange(images) % clusters)  # arbitrary, until the first epoch begins
        self.register_buffer("agreement", torch.tensor(0.0))
        self.register_buffer("clustered", torch.tensor(-1))

    def views(self, size: int) -> Views:
        s = self.jitter
        return Views(View(RandomResizedCrop(size, self.crop), HorizontalFlip(self.flip), RandomRotation(self.rotate),
                          ColorJitter(0.4 * s, 0.4 * s, s, self.hue * s, p=1.0), Greyscale(self.grey), Normalize()))

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> dict[str, Tensor]:
        (x,) = views
        y = self.labels[:len(x)] if index is None else self.labels[index]
        h = self.backbone(x)  # n x d
        return {"loss": self.loss(self.head(h), y), "h": h, "agreement": self.agreement}

    @full_precision
    def loss(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y)

    def before_epoch(self, run, epoch: int) -> None:
        """New clusters, hence new labels and a new head."""
        epoch -= epoch % self.every
        if self.clustered == epoch:  # a run that resumes inside an epoch goes on with what it had
            return
        from sklearn.metrics import normalized_mutual_info_score

        seed = draw_seed(run.seed, epoch, -2)
        labels = self.cluster(run.recipe, seed)
        self.agreement.fill_(normalized_mutual_info_score(self.labels.cpu(), labels.cpu()))
        self.labels.copy_(labels)
        if self.redraw:
            self.draw_head(seed)
        self.clustered.fill_(epoch)

    def cluster(self, recipe: Recipe, seed: int) -> Tensor:
        """The cluster of every image (N,); each process works on its share of the images, and all get the same."""
        images, device = recipe.load(), self.labels.device
        mine = share(torch.arange(len(images)))
        f = extract(self.backbone, images.subset(mine), size=recipe.size, device=device,
                    workers=loader_workers("auto", images, world()[1]), title="Features to cluster")
        x = whiten(f.x, self.pca, device, shared=True)  # my rows of N x pca
        _, y = kmeans(x, self.clusters, self.iterations, seed, shared=True)
        labels = torch.zeros_like(self.labels)
        labels[mine[f.index]] = y + 1
        return sum_over_processes(labels) - 1  # -1: an image that cannot be read, in no cluster and never drawn

    @torch.no_grad()
    def draw_head(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same head in all processes
        self.head.weight.copy_(0.01 * torch.randn(self.head.weight.shape, generator=generator))
        self.head.bias.zero_()

    def order(self, seed: int, epoch: int):
        """Every cluster equally often: else predicting the largest one always would be a good solution."""
        return evenly(self.labels, draw_seed(seed, epoch, -2)) if self.uniform else None

    def snapshot(self, views: list[Tensor]) -> dict[str, Tensor]:
        return {"labels": self.labels}

    def param_groups(self, recipe) -> list[dict]:
        """Weight decay on everything; no momentum for the head, which would push the new one with the old one's."""
        return [{"params": list(self.backbone.parameters()), "weight_decay": recipe.weight_decay},
                {"params": list(self.head.parameters()), "weight_decay": recipe.weight_decay, "momentum": 0.0,
                 "lr_scale": self.head_lr}]


RECIPES = {
    "demo": Recipe(
        method="deepcluster", backbone="resnet_mini", size=20, data="digits_scattered", batch=64, epochs=40,
        optimizer="sgd", lr=0.03, weight_decay=1e-5, schedule="constant", backbone_numbers={"sobel": True},
        numbers={"images": 1300, "clusters": 100, "pca": 16, "every": 8, "head_lr": 30.0, "crop": (0.5, 1.0),
                 "flip": 0.0, "jitter": 0.5, "hue": 0.0},
        source="ours", sources={"weight_decay": "zoo"},
        note="An epoch of ImageNet has 2502 steps, here it has 20: hence clusters that last 8 epochs and a head that "
             "learns 30 times as fast as the backbone."),
    "r50_sobel_8xb64_step_ep200": Recipe(
        method="deepcluster", backbone="resnet50", size=224, data="imagenet", gpus=8, batch=64, epochs=200,
        optimizer="sgd", lr=0.1, weight_decay=1e-5, schedule="step", milestones=(400,),
        backbone_numbers={"sobel": True, "zero_init_last": False},
        numbers={"rotate": 2.0, "jitter": 1.0, "hue": 0.5, "grey": 0.2},
        source="zoo", published={"linear, MoCo protocol": 46.92},
        note="The recipe of the published checkpoint: its only milestone, 400, lies beyond the end. OpenMixup's file "
             "of this name has no Sobel filter, lr 0.03, weight decay 1e-4 and milestones 120 and 160."),
}
