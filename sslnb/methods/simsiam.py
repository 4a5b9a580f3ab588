"""SimSiam: Exploring Simple Siamese Representation Learning (arXiv 2011.10566, CVPR 2021).

One network, two views. A predictor turns the output for one view into the output for the other, which is held still:
no gradient flows into what is being predicted. No negatives, no second network, no queue.

    zᵢ = f(xᵢ),   pᵢ = h(zᵢ),   D(p, z) = − p/‖p‖ · z/‖z‖,   loss = ½ D(p₁, sg(z₂)) + ½ D(p₂, sg(z₁))

The loss lies between -1 and 1. The log also gets the paper's measure of collapse: the standard deviation of z/‖z‖ over
the batch, which is 1/√d if the outputs fill the sphere and 0 if they are all the same.

Where we differ from the official code: its projector ends in a frozen bias, which the batch norm behind it subtracts
again; we leave it out.
"""

import torch
from torch import Tensor, nn

from ..parts import full_precision, mlp, normalized
from ..recipes import Recipe
from ..views import Blur, ColorJitter, Greyscale, HorizontalFlip, Normalize, RandomResizedCrop, View, Views
from .base import Method


class SimSiam(Method):
    accumulable = True
    chunks = True
    sync_bn = True

    def __init__(self, backbone: nn.Module, *, hidden_dim: int = 2048, dim: int = 2048, predictor_dim: int = 512,
                 crop: tuple[float, float] = (0.2, 1.0), flip: float = 0.5, jitter: float = 1.0, hue: float = 0.1,
                 grey: float = 0.2, blur: float = 0.5, predictor_lr: float = 1.0, stop_gradient: bool = True):
        super().__init__()
        self.backbone = backbone
        # f ends in a batch norm that can neither scale nor shift (affine=False).
        self.projector = mlp([backbone.num_features, hidden_dim, hidden_dim, dim], hidden_bias=False, last_bias=False,
                             last_bn=True, last_affine=False)
        self.predictor = mlp([dim, predictor_dim, dim], hidden_bias=False, last_bias=True)  # h, a bottleneck
        self.predictor_lr, self.stop_gradient = predictor_lr, stop_gradient
        self.crop, self.flip, self.jitter, self.hue, self.grey, self.blur = crop, flip, jitter, hue, grey, blur

    def views(self, size: int) -> Views:
        s = 0.4 * self.jitter
        return Views(View(RandomResizedCrop(size, self.crop), HorizontalFlip(self.flip),
                          ColorJitter(s, s, s, self.hue * self.jitter, p=0.8), Greyscale(self.grey), Blur(self.blur),
                          Normalize(), count=2))

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> dict[str, Tensor]:
        z1, z2 = (self.projector(self.backbone(x)) for x in views)  # one forward per view: each has its BN statistics
        p1, p2 = self.predictor(z1), self.predictor(z2)
        if self.stop_gradient:  # False breaks the method
            z1, z2 = z1.detach(), z2.detach()
        loss = (self.loss(p1, z2) + self.loss(p2, z1)) / 2
        return {"loss": loss, "std": self.spread(z1), "z1": z1, "z2": z2}

    @full_precision
    def loss(self, p: Tensor, z: Tensor) -> Tensor:
        """D(p, z), the mean negative cosine: -1 if every prediction points the right way."""
        return -(normalized(p) * normalized(z)).sum(-1).mean()

    @full_precision
    @torch.no_grad()
    def spread(self, z: Tensor) -> Tensor:
        """How different the outputs are: the standard deviation of z/‖z‖ over the batch, a mean over the d axes."""
        return normalized(z).std(0, correction=0).mean()

    def param_groups(self, recipe) -> list[dict]:
        """Weight decay on every tensor, and a predictor whose learning rate never falls: it must keep up with z."""
        slow = [p for module in (self.backbone, self.projector) for p in module.parameters()]
        fast = list(self.predictor.parameters())
        return [{"params": slow}, {"params": fast, "fixed_lr": self.predictor_lr * recipe.lr}]


_imagenet = Recipe(
    method="simsiam", backbone="resnet50", size=224, data="imagenet", gpus=4, batch=64, epochs=100, optimizer="sgd",
    lr=0.05, lr_by_epoch=True, weight_decay=1e-4, source="official code",
    sources={"batch": "zoo", "epochs": "zoo"},
)

RECIPES = {
    "demo": Recipe(
        method="simsiam", backbone="resnet_mini", size=20, data="digits_scattered", batch=64, epochs=60,
        warmup_epochs=2, optimizer="adamw", lr=2e-3, weight_decay=1e-4,
        numbers={"predictor_lr": 10.0, "hidden_dim": 256, "dim": 256, "predictor_dim": 64, "crop": (0.5, 1.0),
                 "jitter": 0.5, "flip": 0.0, "hue": 0.0, "grey": 0.0, "blur": 0.0},
        source="ours", note="Twelve hundred steps instead of half a million: hence a predictor that learns ten times "
                            "as fast as what it predicts."),
    "r50_4xb64_cos_lr0_05_ep100": _imagenet.with_(
        published={"linear, SimSiam protocol": 68.28},
        note="The zoo's table says batch 512; config and checkpoint (8 x 32 images) have 256."),
    "r50_4xb64_cos_lr0_05_ep200": _imagenet.with_(
        epochs=200, published={"linear, SimSiam protocol": 69.84},
        note="The zoo's table says batch 512; config and checkpoint (8 x 32 images) have 256."),
}
