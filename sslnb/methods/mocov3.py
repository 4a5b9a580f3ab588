"""MoCo v3: An Empirical Study of Training Self-Supervised Vision Transformers (arXiv 2104.02057, ICCV 2021).

Each view's query must find, among the other views of the whole batch, the key of its own image; a slowly moving copy of
the encoder makes the keys. For a vision transformer the patch projection stays as it was drawn: training is steadier.

    q = predictor(projector(f(x))),   k = projector'(f'(x)),   both on the unit sphere
    ctr(q, k) = − 2τ · mean_i log  exp(qᵢ·kᵢ / τ) / Σⱼ exp(qᵢ·kⱼ / τ),   loss = ctr(q₁, k₂) + ctr(q₂, k₁)
    f' ← m f' + (1 − m) f after every optimizer step,   m = 1 − (1 − m₀) (cos(π t/T) + 1) / 2

Follows the official code. Its ResNets have a projector of two layers and no batch norm after the predictor, τ = 1 and
crops of at least 0.2; its key encoder moves at the start of a step, ours at the end of the one before.
"""

import math

from torch import Tensor, nn

from ..backbones import need_absolute_positions
from ..optim import trainable
from ..parts import cosine_to_one, ema_update, frozen_copy, full_precision, gather, mlp, normalized
from ..recipes import Recipe
from ..tokens import sincos_position
from ..views import Blur, ColorJitter, Greyscale, HorizontalFlip, Normalize, RandomResizedCrop, Solarize, View, Views
from .base import Method


class MoCoV3(Method):
    accumulable = False  # the keys ARE the batch: eight batches of 512 keys are not one of 4096
    chunks = True
    sync_bn = True

    def __init__(self, backbone: nn.Module, *, temperature: float = 0.2, momentum: float = 0.99, hidden_dim: int = 4096,
                 dim: int = 256, projector_layers: int = 3, predict: bool = True, predictor_bn: bool = True,
                 freeze_patch: bool = True, crop: tuple[float, float] = (0.08, 1.0), flip: float = 0.5,
                 jitter: float = 1.0, hue: float = 0.1, grey: float = 0.2, blur: tuple[float, float] = (1.0, 0.1),
                 solarize: tuple[float, float] = (0.0, 0.2)):
        super().__init__()
        self.backbone = backbone
        if hasattr(backbone, "patch_embed"):
            need_absolute_positions(backbone, "mocov3", rotary=True)
            init_vit(backbone)
            backbone.patch_embed.requires_grad_(not freeze_patch)  # before the optimizer is built, and before the copy
        # Batch norms at the outputs neither scale nor shift.
        self.projector = mlp([backbone.num_features, *[hidden_dim] * (projector_layers - 1), dim], hidden_bias=False,
                             last_bias=False, last_bn=True, last_affine=False)
        self.predictor = mlp([dim, hidden_dim, dim], hidden_bias=False, last_bias=False, last_bn=predictor_bn,
                             last_affine=False) if predict else nn.Identity()
        self.key = frozen_copy(nn.Sequential(self.backbone, self.projector))
        self.temperature, self.momentum = temperature, momentum
        self.crop, self.flip, self.jitter, self.hue = crop, flip, jitter, hue
        self.grey, self.blur, self.solarize = grey, blur, solarize

    def views(self, size: int) -> Views:
        s = self.jitter
        return Views(*(
            View(RandomResizedCrop(size, self.crop), HorizontalFlip(self.flip),
                 ColorJitter(0.4 * s, 0.4 * s, 0.2 * s, self.hue * s, p=0.8), Greyscale(self.grey), Blur(blur),
                 Solarize(solarize), Normalize())
            for blur, solarize in zip(self.blur, self.solarize, strict=True)))

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> dict[str, Tensor]:
        q1, q2 = (self.predictor(self.projector(self.backbone(x))) for x in views)  # each view has its BN statistics
        k1, k2 = (self.key(x).detach() for x in views)  # in train mode: the key encoder's BN uses the batch too
        return {"loss": self.contrast(q1, k2) + self.contrast(q2, k1), "q1": q1, "q2": q2}

    @full_precision
    def contrast(self, q: Tensor, k: Tensor) -> Tensor:
        """ctr(q, k): n queries of this process among the N keys of all; 2τ makes its gradient as long as BYOL's."""
        q, k = normalized(q), normalized(k)
        right = (q * k).sum(1) / self.temperature  # n
        every = q @ gather(k).T / self.temperature  # n x N, the right key among them
        return 2 * self.temperature * (every.logsumexp(1) - right).mean()

    def param_groups(self, recipe) -> list[dict]:
        """Weight decay on every trained tensor, biases and norms too; LARS leaves out vectors by itself."""
        return [{"params": trainable(self), "weight_decay": recipe.weight_decay}]

    def after_step(self, progress: float) -> None:
        m = cosine_to_one(self.momentum, progress)
        ema_update(self.key[0], self.backbone, m)
        ema_update(self.key[1], self.projector, m)


def init_vit(vit: nn.Module) -> None:
    """Fixed sine-cosine positions, row first; Xavier weights, where q, k and v count as three matrices and a patch as
    a vector; a class token of nearly zero."""
    vit.pos_embed.data.copy_(sincos_position(vit.patch_embed.grid_size[0], vit.embed_dim, first="row"))
    vit.pos_embed.requires_grad_(False)
    for name, module in vit.named_modules():
        if isinstance(module, nn.Linear):
            outputs = module.out_features // 3 if name.endswith("qkv") else module.out_features
            uniform(module, module.in_features + outputs)
    patch = vit.patch_embed.proj
    uniform(patch, patch.weight[0].numel() + vit.embed_dim)
    nn.init.normal_(vit.cls_token, std=1e-6)


def uniform(layer: nn.Module, fans: int) -> None:
    nn.init.uniform_(layer.weight, -math.sqrt(6 / fans), math.sqrt(6 / fans))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


_vit = Recipe(
    method="mocov3", backbone="vit_small_patch16_224", backbone_numbers={"num_heads": 12}, size=224, data="imagenet",
    gpus=32, batch=128, epochs=300, warmup_epochs=40, optimizer="adamw", lr=2.4e-3, weight_decay=0.1, precision="fp16",
    numbers={"temperature": 0.2, "momentum": 0.99}, published={"linear, MoCoV3 protocol": 73.19},
    source="official code", sources={"batch": "zoo"},
)
_resnet = Recipe(
    method="mocov3", backbone="resnet50", size=224, data="imagenet", gpus=16, batch=256, epochs=100, warmup_epochs=10,
    optimizer="lars", lr=9.6, weight_decay=1e-6, precision="fp16",
    numbers={"temperature": 1.0, "momentum": 0.99, "projector_layers": 2, "predictor_bn": False, "crop": (0.2, 1.0)},
    source="official code",
)

RECIPES = {
    "demo": Recipe(
        method="mocov3", backbone="vit_mini", backbone_numbers={"depth": 2}, size=28, data="fashion_small", batch=125,
        epochs=10, warmup_epochs=1,
        optimizer="adamw", lr=2e-3, weight_decay=0.1,
        numbers={"hidden_dim": 256, "dim": 64, "crop": (0.3, 1.0), "jitter": 1.0, "hue": 0.0, "grey": 0.0,
                 "blur": (0.0, 0.0), "solarize": (0.0, 0.0)},
        source="ours"),
    "vit_small_8xb64_accu8_cos_fp16_ep300": _vit.with_(
        gpus=8, batch=64, accum=8, force_accum=True, sources={"batch": "zoo"},
        note="As the zoo's file: each query sees 512 keys, eight times per step, instead of 4096 once. Betas and "
             "weight decay are the official code's, which the published 73.19 (32 x 128 images, 300 epochs, not "
             "400) had too: vit_small_32xb128_cos_fp16_ep300."),
    "vit_small_32xb128_cos_fp16_ep300": _vit.with_(note="What the zoo's checkpoint was trained with."),
    "r50_4xb256_accu4_cos_fp16": _resnet.with_(
        gpus=4, accum=4, force_accum=True, epochs=200, sources={"batch": "zoo", "epochs": "zoo"},
        note="As OpenMixup's file, but with the official temperature of 1 and no batch norm after the predictor; each "
             "query sees 1024 keys, four times per step."),
    "r50_16xb256_cos_lr9_6_fp16_ep100": _resnet.with_(published={"linear, official code": 68.9}),
    "r50_16xb256_cos_lr4_8_fp16_ep300": _resnet.with_(epochs=300, lr=4.8, published={"linear, official code": 72.8}),
    "r50_16xb256_cos_lr4_8_fp16_ep1000": _resnet.with_(
        epochs=1000, lr=4.8, weight_decay=1.5e-6, momentum=0.996, published={"linear, official code": 74.6}),
}
