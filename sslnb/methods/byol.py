"""BYOL: Bootstrap Your Own Latent (arXiv 2006.07733, NeurIPS 2020).

An online network predicts what a slowly moving copy of itself, the target, sees in the other view. No negatives.

    p₁ = q(g(f(x₁))),   z₂' = g_ξ(f_ξ(x₂)),   loss = 2 − 2 cos(p₁, sg(z₂'))  +  2 − 2 cos(p₂, sg(z₁'))
    ξ ← m ξ + (1 − m) θ after every optimizer step,   m = 1 − (1 − m₀) (cos(π t/T) + 1) / 2

Where we differ from DeepMind's code: brightness is multiplicative as in torchvision (there: an additive shift), the
target starts as a copy (there: from another seed), linear layers keep torch's initialisation (there: Haiku's).
"""

from torch import Tensor, nn

from ..losses import regression
from ..optim import decay_groups
from ..parts import cosine_to_one, ema_update, frozen_copy, mlp
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


class BYOL(Method):
    accumulable = True
    chunks = True
    sync_bn = True

    def __init__(self, backbone: nn.Module, *, hidden_dim: int = 4096, dim: int = 256, momentum: float = 0.99,
                 crop: tuple[float, float] = (0.08, 1.0), flip: float = 0.5, jitter: float = 1.0, hue: float = 0.1,
                 grey: float = 0.2, blur: tuple[float, float] = (1.0, 0.1), solarize: tuple[float, float] = (0.0, 0.2),
                 pad: int = 0, predictor_lr: float = 1.0, projector_bn: bool = False, predict: bool = True,
                 stop_gradient: bool = True):
        super().__init__()
        self.backbone = backbone
        # No bias and NO batch norm at the projector's output, which MoCo v3 adds; the predictor has the same shape.
        self.projector = mlp([backbone.num_features, hidden_dim, dim], hidden_bias=True, last_bias=False,
                             last_bn=projector_bn)
        self.predictor = mlp([dim, hidden_dim, dim], hidden_bias=True, last_bias=False) if predict else nn.Identity()
        self.target = frozen_copy(nn.Sequential(self.backbone, self.projector))
        self.momentum, self.stop_gradient, self.predictor_lr, self.pad = momentum, stop_gradient, predictor_lr, pad
        self.crop, self.flip, self.jitter, self.hue = crop, flip, jitter, hue
        self.grey, self.blur, self.solarize = grey, blur, solarize

    def views(self, size: int) -> Views:
        s = self.jitter
        return Views(*(
            View(Pad(self.pad), RandomResizedCrop(size, self.crop, interpolation="bicubic"), HorizontalFlip(self.flip),
                 ColorJitter(0.4 * s, 0.4 * s, 0.2 * s, self.hue * s, p=0.8), Greyscale(self.grey), Blur(blur),
                 Solarize(solarize), Normalize())
            for blur, solarize in zip(self.blur, self.solarize, strict=True)))

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> dict[str, Tensor]:
        z1, z2 = (self.projector(self.backbone(x)) for x in views)  # one forward per view: each has its BN statistics
        p1, p2 = self.predictor(z1), self.predictor(z2)
        t1, t2 = self.targets(views, [z1, z2])
        return {"loss": regression(p1, t2) + regression(p2, t1), "z1": z1, "z2": z2}

    def targets(self, views: list[Tensor], z: list[Tensor]) -> list[Tensor]:
        """What is predicted. Without the stop-gradient (break it!) the online network itself is the target."""
        if not self.stop_gradient:
            return z
        return [self.target(x).detach() for x in views]  # in train mode: the target's BN uses the batch too

    def param_groups(self, recipe) -> list[dict]:
        """The predictor may learn faster: it must stay near its optimum for the target to mean anything."""
        fast = [(n, p) for n, p in self.named_parameters() if n.startswith("predictor.")]
        slow = [(n, p) for n, p in self.named_parameters() if not n.startswith("predictor.")]
        return [*decay_groups(slow, recipe.weight_decay),
                *({**g, "lr_scale": self.predictor_lr} for g in decay_groups(fast, recipe.weight_decay))]

    def after_step(self, progress: float) -> None:
        m = cosine_to_one(self.momentum, progress)
        ema_update(self.target[0], self.backbone, m)
        ema_update(self.target[1], self.projector, m)


_imagenet = Recipe(
    method="byol", backbone="resnet50", size=224, data="imagenet", gpus=8, batch=64, accum=8, epochs=200,
    warmup_epochs=10, optimizer="lars", lr=4.8, weight_decay=1e-6, precision="fp16", numbers={"momentum": 0.99},
    source="zoo", sources={"lr": "official code", "weight_decay": "official code", "momentum": "official code"},
)

RECIPES = {
    "demo": Recipe(
        method="byol", backbone="resnet_mini", size=20, data="digits_scattered", batch=64, epochs=60, warmup_epochs=2,
        optimizer="adamw", lr=2e-3, weight_decay=1e-4,
        numbers={"momentum": 0.7, "predictor_lr": 10.0, "projector_bn": True, "hidden_dim": 256, "dim": 64, "pad": 2,
                 "crop": (0.5, 1.0), "jitter": 0.5, "flip": 0.0, "hue": 0.0, "grey": 0.0, "blur": (0.0, 0.0),
                 "solarize": (0.0, 0.0)},
        source="ours", note="Twelve hundred steps instead of ninety thousand: hence a target that follows quickly, and "
                            "a fast predictor. Batch norm at the projector's output, as in MoCo v3, makes seeds differ "
                            "less: kNN 82, 82 and 86 % with it, 83, 81 and 75 % without."),
    "r50_8xb64_accu8_cos_lr4_8_fp16_ep200": _imagenet.with_(
        published={"linear, SimSiam protocol": 71.88}, note="The published checkpoint ran as 16 x 256 images."),
    "r50_8xb64_accu8_cos_lr4_8_fp16_ep300": _imagenet.with_(
        epochs=300, published={"linear, SimSiam protocol": 72.93},
        note="The published checkpoint ran as 8 x 32 images, accumulated 16 times."),
}
