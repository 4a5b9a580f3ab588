"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments (arXiv 2006.09882, NeurIPS 2020).

Which of K prototypes does an image belong to? Every crop must answer what a large crop of the same image answered; the
answers ("codes") are balanced: over a batch all prototypes get equal shares, so one answer for all is no way out.

    z = g(f(x)) / ‖g(f(x))‖,   p⁽ᵛ⁾ = softmax(C z⁽ᵛ⁾ / τ),   Q = Diag(u) exp(C Z / ε) Diag(v), u and v such that all
    prototypes have equal sums and all images, too
    loss = mean over large crops i and all other crops v of  −Σ_k q⁽ⁱ⁾_k log p⁽ᵛ⁾_k,   no gradient through q

Where we differ from the official code: Sinkhorn works with logarithms (same numbers, no overflow at a small ε), the
projections and their scores are float32 under fp16, the queue keeps the features of all processes and its full length
(there: each process its own, rounded down to whole batches), red is divided by 0.229 as everywhere (there: 0.228), and
LARS divides by ‖∇ + λw‖ (there, apex: ‖∇‖ + λ‖w‖).
"""

from itertools import groupby

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..optim import trainable
from ..parts import full_precision, gather, mlp, normalized, share
from ..recipes import Recipe
from ..views import Blur, ColorJitter, Greyscale, HorizontalFlip, Normalize, RandomResizedCrop, View, Views
from .base import Method


class SwAV(Method):
    accumulable = False  # codes are balanced within ONE batch: with few images there is little to balance
    chunks = True
    sync_bn = True

    def __init__(self, backbone: nn.Module, *, temperature: float = 0.1, epsilon: float = 0.05, iterations: int = 3,
                 prototypes: int = 3000, hidden_dim: int = 2048, dim: int = 128, freeze_prototypes: int = 1,
                 queue: int = 0, queue_from: int = 15, crop: tuple[float, float] = (0.14, 1.0), small_views: int = 6,
                 small_size: float = 3 / 7, small_crop: tuple[float, float] = (0.05, 0.14), flip: float = 0.5,
                 jitter: float = 1.0, hue: float = 0.2, grey: float = 0.2, blur: float = 0.5):
        super().__init__()
        if small_views and getattr(getattr(backbone, "patch_embed", None), "strict_img_size", False):
            raise InputError(f"swav shows its backbone crops of two sizes, and a {type(backbone).__name__} takes one "
                             "only; use a ResNet, or build it with dynamic_img_size=True.")
        self.backbone = backbone
        self.projector = mlp([backbone.num_features, hidden_dim, dim], hidden_bias=True, last_bias=True)
        self.prototypes = nn.Linear(dim, prototypes, bias=False)  # C: one unit vector per row
        self.normalize_prototypes()
        self.register_buffer("queue", torch.zeros(queue, 2, dim))  # of the large crops, newest first
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations
        self.freeze_prototypes, self.queue_from = freeze_prototypes, queue_from  # both in epochs
        self.frozen = self.queueing = self.full = False
        self.crop, self.small_views, self.small_crop = crop, small_views, small_crop
        self.small_size = small_size  # of the size of a large view: 96 px beside 224
        self.flip, self.jitter, self.hue, self.grey, self.blur = flip, jitter, hue, grey, blur

    def views(self, size: int) -> Views:
        s = 0.8 * self.jitter
        return Views(*(
            View(RandomResizedCrop(pixels, scale), HorizontalFlip(self.flip),
                 ColorJitter(s, s, s, self.hue * self.jitter, p=0.8), Greyscale(self.grey),
                 Blur(self.blur, kernel=23), Normalize(), count=count)
            for count, pixels, scale in ((2, size, self.crop),
                                         (self.small_views, round(size * self.small_size), self.small_crop))))

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> dict[str, Tensor]:
        z = self.embed(views)  # n x V x d
        codes = self.codes(z[:, :2].detach())  # n x 2 x K
        return {"loss": self.loss(self.scores(z), codes), "z1": z[:, 0], "z2": z[:, 1], "codes": codes}

    def embed(self, views: list[Tensor]) -> Tensor:
        """V views -> unit vectors (n, V, d). Views of equal size share a forward, and so their BN statistics."""
        sizes = [torch.cat(list(same)) for _, same in groupby(views, key=lambda x: x.shape[-1])]
        z = self.projector(torch.cat([self.backbone(x) for x in sizes]))  # Vn x d
        return normalized(z.float()).unflatten(0, (len(views), -1)).transpose(0, 1)

    @full_precision
    def scores(self, z: Tensor) -> Tensor:
        """Cosines with the prototypes: (…, d) -> (…, K)."""
        return self.prototypes(z)

    @torch.no_grad()
    def codes(self, z: Tensor) -> Tensor:
        """z (n, 2, d) of the large crops -> their assignments (n, 2, K), balanced for each of the two on its own.

        In small batches every process adds its share of the queue, scored with the prototypes of today.
        """
        older = share(self.queue) if self.queue_is_full() else z[:0]
        codes = sinkhorn(self.scores(torch.cat([older, z])), self.epsilon, self.iterations)[len(older):]
        if self.queueing and self.training:  # only now: `older` is a view of the queue
            self.queue.copy_(torch.cat([gather(z), self.queue])[:len(self.queue)])
        return codes

    @full_precision
    def loss(self, scores: Tensor, codes: Tensor) -> Tensor:
        """Cross-entropy of the codes of large crop i with the prediction of crop v, averaged over all pairs v ≠ i."""
        log_p = (scores / self.temperature).log_softmax(-1)  # n x V x K
        pairs = -torch.einsum("nik,nvk->iv", codes, log_p) / len(codes)  # 2 x V
        return (pairs.sum() - pairs.diagonal().sum()) / (pairs.numel() - 2)

    def queue_is_full(self) -> bool:
        self.full = self.full or self.queueing and bool(self.queue[-1].any())  # asked until it is: a GPU has to wait
        return self.full

    @torch.no_grad()
    def normalize_prototypes(self) -> None:
        self.prototypes.weight.copy_(normalized(self.prototypes.weight))

    def param_groups(self, recipe) -> list[dict]:
        """Nothing is excluded: weight decay and LARS's adaptation reach biases and norms too."""
        return [{"params": trainable(self), "weight_decay": recipe.weight_decay, "adapt_vectors": True}]

    def before_epoch(self, run, epoch: int) -> None:
        self.frozen = epoch < self.freeze_prototypes
        self.queueing, self.full = len(self.queue) > 0 and epoch >= self.queue_from, False

    def before_step(self, progress: float) -> None:
        if self.frozen:
            self.prototypes.weight.grad = None  # a gradient of zero would still bring momentum and decay

    def after_step(self, progress: float) -> None:
        self.normalize_prototypes()


@torch.no_grad()
@full_precision
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Scores (B, …, K) of this process's images -> codes of the same shape: positive, and each image's sum to 1.

    Every iteration first gives all prototypes equal sums over the images of ALL processes, then all images. Without any
    (break it!) each image just takes its softmax.
    """
    log_q = scores / epsilon
    for _ in range(iterations):
        per_prototype = gather(log_q.logsumexp(0, keepdim=True)).logsumexp(0)
        log_q = (log_q - per_prototype).log_softmax(-1)
    return log_q.softmax(-1)


RECIPES = {
    "demo": Recipe(
        method="swav", backbone="resnet_mini", size=20, data="digits_scattered", batch=64, epochs=20, warmup_epochs=2,
        optimizer="adamw", lr=3e-3, weight_decay=1e-4,
        numbers={"epsilon": 0.01, "prototypes": 100, "hidden_dim": 256, "dim": 64, "crop": (0.5, 1.0),
                 "small_views": 4, "small_size": 0.6, "small_crop": (0.2, 0.5), "jitter": 0.5, "flip": 0.0, "hue": 0.0,
                 "grey": 0.0, "blur": 0.0},
        source="ours", note="With the paper's epsilon of 0.05 the loss stayed at log K to the end: the scores of an "
                            "untrained network differ little, and its codes came out too even to be predicted."),
    "r50_8xb64_accu8_cos_lr9_6-mcrop-224_2-96_6_fp16_ep200": Recipe(
        method="swav", backbone="resnet50", size=224, data="imagenet", gpus=8, batch=64, accum=8, force_accum=True,
        epochs=200, warmup_epochs=10, warmup_from=0.0625, min_lr=6e-4, optimizer="lars", lr=9.6, weight_decay=1e-6,
        precision="fp16", numbers={"queue": 3840, "queue_from": 15, "freeze_prototypes": 1},
        backbone_numbers={"zero_init_last": False}, source="zoo",
        sources={"warmup_from": "official code", "zero_init_last": "official code"},
        published={"linear, SimSiam protocol": 70.47},
        note="The published checkpoint ran as 8 x 32 images at lr 0.6. Eight micro-batches of 512 are accumulated, and "
             "codes are balanced over 512 + 3840 queued images, not 4096; the official code takes lr 4.8 at 4096. "
             "OpenMixup's file leaves vectors out of LARS and weight decay and crops bicubically; we do not."),
}
