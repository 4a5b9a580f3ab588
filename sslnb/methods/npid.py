"""NPID: Unsupervised Feature Learning via Non-Parametric Instance Discrimination (arXiv 1805.01978, CVPR 2018).

Every image is a class of its own, and its weight vector is what the network last said about it, kept in a memory bank.

    f = g(f_θ(x)) / ‖·‖,   p(i|f) = exp(vᵢ·f / τ) / Σⱼ exp(vⱼ·f / τ),   loss = −log p(i|f) with K random j in the sum
    vᵢ ← m vᵢ + (1 − m) fᵢ, put back on the unit sphere, after the loss

Where we differ from the paper: a softmax over 65,536 negatives, which the official README recommends (there by default:
noise-contrastive estimation with 4,096 and a constant for the sum). The bank starts on the unit sphere, as in the
paper; in the official code its entries are uniform in ±√(3 / d).
"""

import torch
from torch import Tensor, nn

from ..losses import GradientIsKnown
from ..optim import trainable
from ..parts import MemoryBank, full_precision, mlp, normalized
from ..recipes import Recipe
from ..views import ColorJitter, Greyscale, HorizontalFlip, Normalize, Pad, RandomResizedCrop, View, Views
from .base import Method

SIMILARITIES = 2**27  # that are there at a time: 0.54 GB, those of 104 images to all of ImageNet


class NPID(Method):
    accumulable = True  # an image is compared with the bank, never with its batch
    sync_bn = True

    def __init__(self, backbone: nn.Module, *, images: int = 1_281_167, dim: int = 128, temperature: float = 0.07,
                 momentum: float = 0.5, negatives: int = 65_536, ensure_neg: bool = False,
                 crop: tuple[float, float] = (0.2, 1.0), flip: float = 0.5, jitter: float = 1.0, hue: float = 0.4,
                 grey: float = 0.2, pad: int = 0):
        super().__init__()
        self.backbone = backbone
        self.projector = mlp([backbone.num_features, dim], hidden_bias=True, last_bias=True)
        nn.init.kaiming_normal_(self.projector[0].weight, nonlinearity="relu")
        nn.init.zeros_(self.projector[0].bias)
        self.bank = MemoryBank(images, dim, momentum)
        self.temperature, self.momentum, self.negatives, self.ensure_neg = temperature, momentum, negatives, ensure_neg
        self.crop, self.flip, self.jitter, self.hue, self.grey, self.pad = crop, flip, jitter, hue, grey, pad

    def views(self, size: int) -> Views:
        s = self.jitter
        return Views(View(Pad(self.pad), RandomResizedCrop(size, self.crop), HorizontalFlip(self.flip),
                          Greyscale(self.grey), ColorJitter(0.4 * s, 0.4 * s, 0.4 * s, self.hue * s, p=1.0),
                          Normalize()))

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> dict[str, Tensor]:
        (x,) = views
        index = torch.arange(len(x), device=x.device) if index is None else index  # without numbers: the first images
        f = self.embed(x)  # n x d
        loss = self.loss(f, torch.cat([index[:, None], self.others(index)], 1))  # n
        if self.training:
            self.bank.update(index, f)
        return {"loss": loss.mean(), "probability": loss.detach().neg().exp().mean(), "f": f}

    def embed(self, x: Tensor) -> Tensor:
        return normalized(self.projector(self.backbone(x)).float())  # the bank is float32 under autocast too

    def others(self, index: Tensor) -> Tensor:
        """K negatives for every image, (n, K). The image itself may be among them, unless `ensure_neg`."""
        images = len(self.bank.vectors)
        if not self.ensure_neg:
            return random_images(len(index), self.negatives, images, index.device)
        j = random_images(len(index), self.negatives, images - 1, index.device)
        return j + (j >= index[:, None])  # leaves its own number out and all others equally likely

    @full_precision
    def loss(self, f: Tensor, entries: Tensor) -> Tensor:
        """−log p of the first entry of the bank among all `entries` (n, 1 + K) -> (n,)."""
        return sampled_softmax(f, self.bank.vectors, entries, self.temperature)

    @full_precision
    def probabilities(self, f: Tensor) -> Tensor:
        """p(i|f) of EVERY image i, (n, d) -> (n, images): what the loss estimates, for looking."""
        return (f @ self.bank.vectors.T / self.temperature).softmax(1)

    def param_groups(self, recipe) -> list[dict]:
        return [{"params": trainable(self)}]  # weight decay on every tensor, as in the official code

    def snapshot(self, views: list[Tensor]) -> dict[str, Tensor]:
        p, nearest = self.probabilities(self.embed(views[0])).topk(8)
        return {"images": views[0], "nearest": nearest, "probability": p}


def random_images(batch: int, count: int, images: int, device: torch.device) -> Tensor:
    """Numbers of images, (batch, count), uniform and with replacement."""
    return torch.randint(images, (batch, count), device=device)


def sampled_softmax(f: Tensor, bank: Tensor, entries: Tensor, temperature: float) -> Tensor:
    """f (n, d), bank (M, d), entries (n, 1 + K) -> −log p of each row's first entry, (n,); the bank gets no gradient.

    Every image is compared with the whole bank, and then those that were drawn are picked. To look those up would move
    K x d numbers for each image, 65,536 x 128 in the zoo; its similarities to all of ImageNet are 1.28 million.
    """
    some = max(1, SIMILARITIES // len(bank))
    parts = zip(f.split(some), entries.split(some), strict=True)
    found = [softmax_and_gradient(fs, bank, rows, temperature) for fs, rows in parts]
    return GradientIsKnown.apply(f, *map(torch.cat, zip(*found, strict=True)))


@torch.no_grad()
def softmax_and_gradient(f: Tensor, bank: Tensor, entries: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(−log p (n,), its gradient at f (n, d)). In backward the bank is another one, and the similarities are gone."""
    similar = (f / temperature) @ bank.T  # n x M
    logits = similar.gather(1, entries)
    log_sum = logits.logsumexp(1, keepdim=True)
    p = similar.zero_().scatter_add_(1, entries, (logits - log_sum).exp_())  # an image drawn twice counts twice
    return (log_sum - logits)[:, 0], (p @ bank - bank[entries[:, 0]]) / temperature


_imagenet = Recipe(
    method="npid", backbone="resnet50", size=224, data="imagenet", gpus=4, batch=64, epochs=200, optimizer="sgd",
    lr=0.03, weight_decay=1e-4, schedule="step", milestones=(120, 160),
    numbers={"temperature": 0.07, "momentum": 0.5, "negatives": 65_536}, source="zoo",
    sources={"temperature": "official code", "momentum": "official code", "negatives": "official code"},
)

RECIPES = {
    "demo": Recipe(
        method="npid", backbone="resnet_mini", size=20, data="digits_scattered", batch=64, epochs=40, warmup_epochs=2,
        optimizer="adamw", lr=3e-3, weight_decay=1e-4,
        numbers={"images": 1300, "temperature": 0.1, "momentum": 0.8, "negatives": 256, "dim": 64, "pad": 2,
                 "crop": (0.5, 1.0), "jitter": 0.5, "flip": 0.0, "hue": 0.0, "grey": 0.0},
        source="ours", note="A slower memory averages over more views of an image: kNN on held-out training digits is "
                            "90 to 92 % with momentum 0.8 and 88 to 89 % with the paper's 0.5 (two seeds)."),
    "r50_4xb64_step_ep200": _imagenet.with_(
        published={"linear, MoCo protocol": 56.60}, note="The published checkpoint ran as 8 x 32 images."),
    "r50_ensure_neg_4xb64_step_ep200": _imagenet.with_(
        ensure_neg=True, note="OpenMixup's file of this name never sets ensure_neg; here it is set."),
}
