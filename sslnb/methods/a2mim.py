"""A2MIM: Architecture-Agnostic Masked Image Modeling, From ViT back to CNN (arXiv 2205.13943, ICML 2023).

Holes are painted with the image's mean colour, and a learned token joins them inside the network: for a ResNet before
its last stage, for a ViT after its patch embedding. A second loss compares Fourier spectra.

    f ← f ⊙ (1 − M) + (γ ⊙ f + τ) ⊙ M     loss = L_spa + λ L_freq
    L_spa = mean over hidden pixels of |d|, or of |d| tanh(|d|/10),   d = x̂ − x
    L_freq = focal frequency loss of x̃ and x,   x̃ = x̂ ⊙ W + (x̂ + x)/2 ⊙ (1 − W),   W = M + ε (1 − M)

γ is 1 for a ViT; a ResNet learns it, from 10⁻⁶, so that what came out of a hole is at first forgotten. Outside W the
prediction counts as a constant.

Follows the configs of the official code, the released ViT-B's λ = 0.1 included. Where we differ: no weight decay on
any norm or on γ in all rows (one file forgets it), an exact mean instead of one over 10⁻⁵ + count, and timm's first
weights for the ViT (attention and MLP outputs over √(2 · block)).
"""

import torch
from torch import Generator, Tensor, nn

from ..backbones import image_size, last_map
from ..errors import unknown
from ..losses import focal_frequency, masked_mean
from ..masking import check_mask_ratio, check_unit, paint_mean, unit_mask, upsample_mask
from ..optim import decay_groups
from ..parts import full_precision
from ..recipes import Recipe
from ..tokens import mask_enters, token_entrance, token_map
from ..views import HorizontalFlip, Normalize, RandomResizedCrop, View, Views
from .base import Masked

FILLS = ("mean", "zero")


class A2MIM(Masked):
    sync_bn = True

    def __init__(self, backbone: nn.Module, *, mask_ratio: float = 0.6, unit: int = 32, fill: str = "mean",
                 mask_layer: int | None = None, gamma_init: float = 1e-6, token_lr: float = 0.1, focal: bool = True,
                 fft_weight: float = 0.5, fft_visible: float = 1e-3, fft_images: int = 256,
                 crop: tuple[float, float] = (0.8, 1.0), flip: float = 0.5):
        """`unit`: pixels of the squares that go as one. `fill`: "mean", or "zero" to break the method. `mask_layer`:
        the stages of a ResNet before the token; None: all but the last. `gamma_init`: where γ starts; 0: a γ of 1 that
        stays. `fft_weight`, `fft_visible`, `fft_images`: λ, ε, and how many images share a spectrum."""
        super().__init__()
        self.backbone, self.mask_ratio, self.unit = backbone, check_mask_ratio(mask_ratio), unit
        self.fill = fill if fill in FILLS else unknown("fill", fill, FILLS)
        self.size, self.token_lr, self.focal = image_size(backbone), token_lr, focal
        self.fft_weight, self.fft_visible, self.fft_images = fft_weight, fft_visible, fft_images
        self.crop, self.flip = crop, flip
        self.part, self.before = token_entrance(backbone, mask_layer, "a2mim")
        width, self.patch, stride = token_map(backbone, self.part, self.before)
        self.units = check_unit(unit, self.patch, self.size)
        shape = (1, width, 1, 1) if self.before else (1, 1, width)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))
        self.mask_gamma = nn.Parameter(torch.full(shape, gamma_init)) if self.before and gamma_init else None
        self.head = nn.Sequential(nn.Conv2d(backbone.num_features, 3 * stride**2, 1), nn.PixelShuffle(stride))
        nn.init.trunc_normal_(self.head[0].weight, std=0.02)
        nn.init.zeros_(self.head[0].bias)

    def views(self, size: int) -> Views:
        return Views(View(RandomResizedCrop(size, self.crop), HorizontalFlip(self.flip), Normalize()))

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> dict[str, Tensor]:
        (images,) = views
        mask = self.draw_mask(len(images)).to(images.device, non_blocking=True)
        prediction = self.reconstruct(images, mask)
        spatial, frequency = self.losses(prediction, self.target(images), mask)
        return {"loss": spatial + self.fft_weight * frequency, "spatial": spatial, "frequency": frequency,
                "prediction": prediction, "mask": mask}

    def draw_mask(self, batch: int, generator: Generator | None = None) -> Tensor:
        noise = torch.rand(batch, self.units**2, generator=generator)
        return unit_mask(noise, self.mask_ratio, self.unit // self.patch)

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """-> pictures (B, 3, H, W), in the visible parts too."""
        mask = mask.to(images.device, non_blocking=True)
        with mask_enters(getattr(self.backbone, self.part), lambda f: self.add_token(f, mask), self.before):
            return self.head(last_map(self.backbone, self.seen(images, mask)))

    def seen(self, images: Tensor, mask: Tensor) -> Tensor:
        """Holes in the mean colour of the whole image: what is hidden tells that much of itself."""
        mask = mask.to(images.device, non_blocking=True)
        if self.fill == "mean":
            return paint_mean(images, mask, self.patch)
        return images * (1 - upsample_mask(mask, self.patch))

    def add_token(self, f: Tensor, mask: Tensor) -> Tensor:
        """Features (B, D, h, w) or (B, L, D), mask (B, L): the hidden ones are weakened by γ, then τ is added."""
        m = upsample_mask(mask, 1) if self.before else mask[:, :, None]
        if self.mask_gamma is not None:
            f = f * (1 - m) + self.mask_gamma * f * m
        return f + self.mask_token * m

    @full_precision
    def losses(self, prediction: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """L_spa and L_freq."""
        hole = upsample_mask(mask, self.patch)
        error = (prediction - target).abs()
        if self.focal:  # arXiv 2102.09554: small errors count less
            error = error * (error / 10).tanh()
        W = hole + self.fft_visible * (1 - hole)
        mixed = prediction * W + (prediction.detach() + target) / 2 * (1 - W)
        return masked_mean(error.mean(1, keepdim=True), hole), focal_frequency(mixed, target, self.fft_images)

    def param_groups(self, recipe) -> list[dict]:
        """No weight decay on vectors, tokens, positions and their biases; token and γ may be slower than the rest."""
        slow = {"mask_token", "mask_gamma"}
        free = ("cls_token", "pos_embed", "relative_position_bias_table")
        named = [(name, p) for name, p in self.named_parameters() if name not in slow]
        groups = decay_groups([(name, p) for name, p in named if not name.endswith(free)], recipe.weight_decay)
        groups[1]["params"] += [p for name, p in named if name.endswith(free) and p.requires_grad]
        tokens = [p for name, p in self.named_parameters() if name in slow]
        return [*groups, {"params": tokens, "weight_decay": 0.0, "lr_scale": self.token_lr}]


_resnet = Recipe(
    method="a2mim", backbone="resnet50", size=224, data="imagenet", gpus=8, batch=256, epochs=100, warmup_epochs=10,
    optimizer="adamw", lr=1.2e-3, weight_decay=0.05, min_lr=1e-5, source="official code",
    sources={"batch": "zoo", "epochs": "zoo"}, published={"fine-tune, RSB A3": 78.8},
    note="lr is 3e-4 x 2048 / 512.")

RECIPES = {
    "demo": Recipe(
        method="a2mim", backbone="resnet_mini", size=28, data="fashion_small", batch=125, epochs=12, warmup_epochs=1,
        optimizer="adamw", lr=4e-3, weight_decay=0.05, numbers={"unit": 4, "fft_images": 1, "crop": (0.9, 1.0)},
        source="ours", sources={"weight_decay": "official code", "mask_ratio": "paper"},
        note="Every image has a spectrum of its own; the rows of the zoo compare means, as the official code does."),
    "r50_l3_sz224_init_8xb256_cos_ep100": _resnet,
    "r50_l3_sz224_init_8xb256_cos_ep300": _resnet.with_(
        epochs=300, published={"fine-tune, RSB A3": 78.9, "fine-tune, RSB A2": 80.4}),
    "vit_base_l0_sz224_8xb128_accu2_step_ep800": Recipe(
        method="a2mim", backbone="beit_base_patch16_224", size=224, data="imagenet", gpus=8, batch=128, accum=2,
        backbone_numbers={"use_abs_pos_emb": True, "use_rel_pos_bias": True, "drop_path_rate": 0.1}, epochs=800,
        warmup_epochs=10, warmup_from=0.005, schedule="step", milestones=(700,), optimizer="adamw", lr=4e-4,
        weight_decay=0.05, clip=5.0, pool="mean",
        numbers={"focal": False, "fft_weight": 0.1, "fft_visible": 0.0, "fft_images": 128, "token_lr": 1.0,
                 "crop": (0.67, 1.0)},
        source="official code", sources={"batch": "zoo", "accum": "zoo", "epochs": "zoo"},
        published={"fine-tune, BEiT (SimMIM)": 84.3},
        note="lr is 1e-4 x 2048 / 512, from 2e-6. The released weights were trained in fp16 with the same numbers."),
}
