"""SimMIM: A Simple Framework for Masked Image Modeling (arXiv 2111.09886, CVPR 2022).

Hide large squares of an image behind one learned token, let the WHOLE grid through an ordinary ViT or Swin, and regress
the hidden colours with a single linear layer.

    zᵢ = patch embedding of cell i, or the mask token if Mᵢ = 1,   x̂ = PixelShuffle(W f(z) + b)
    loss = Σ M |x̂ − x| / 3 Σ M,   over pixels, M = 1 where hidden

Follows the official code: squares of 32 px whatever the patch, ⌈0.6 · number⌉ of them; a ViT without absolute
positions, with one table of relative ones for all blocks, and with BEiT's initial weights. Left out is the 10⁻⁵ in its
denominator. The zoo's "rgb_m" paints the hidden squares of the input with the mean colour, which the token replaces
before anything sees it: it is this method (its current code predicts the painted image, which we do not follow).
"""

import torch
from torch import Generator, Tensor, nn

from ..backbones import last_map
from ..errors import InputError
from ..losses import masked_mean
from ..masking import check_mask_ratio, check_unit, unit_mask, upsample_mask
from ..parts import full_precision
from ..recipes import Recipe
from ..tokens import mask_enters, put_token
from ..views import HorizontalFlip, Normalize, RandomResizedCrop, View, Views
from .base import Masked


class SimMIM(Masked):
    def __init__(self, backbone: nn.Module, *, mask_ratio: float = 0.6, unit: int = 32, hidden_only: bool = True,
                 crop: tuple[float, float] = (0.67, 1.0), flip: float = 0.5):
        super().__init__()
        self.units = units_of(backbone, unit)
        self.backbone, self.mask_ratio, self.unit = backbone, check_mask_ratio(mask_ratio), unit
        self.patch, self.hidden_only, self.crop, self.flip = backbone.patch_embed.patch_size[0], hidden_only, crop, flip
        self.mask_token = nn.Parameter(torch.zeros(1, 1, backbone.patch_embed.proj.out_channels))
        stride = backbone.feature_info[-1]["reduction"]  # pixels per cell of the last map: a ViT's patch, 32 for Swin-B
        self.head = nn.Sequential(nn.Conv2d(backbone.num_features, 3 * stride**2, 1), nn.PixelShuffle(stride))
        # The token of a Swin is cut off at ±2, as good as never, that of a ViT at one deviation, as its weights are.
        nn.init.trunc_normal_(self.mask_token, std=0.02, **({} if is_swin(backbone) else ONE_DEVIATION))
        if hasattr(backbone, "fix_init_weight"):
            init_beit(backbone)

    def views(self, size: int) -> Views:
        return Views(View(RandomResizedCrop(size, self.crop), HorizontalFlip(self.flip), Normalize()))

    def draw_mask(self, batch: int, generator: Generator | None = None) -> Tensor:
        noise = torch.rand(batch, self.units**2, generator=generator)
        return unit_mask(noise, self.mask_ratio, self.unit // self.patch)

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """-> the predicted colours of every pixel, hidden or not (B, 3, H, W)."""
        with mask_enters(self.backbone.patch_embed, lambda cells: self.hide(cells, mask)):
            return self.head(last_map(self.backbone, images))

    def hide(self, cells: Tensor, mask: Tensor) -> Tensor:
        """The mask token instead of every hidden cell."""
        return put_token(cells, mask, self.mask_token)

    @full_precision
    def loss(self, prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """L1 on hidden pixels. `hidden_only=False` asks for the visible ones too, which only need to be copied."""
        counted = upsample_mask(mask if self.hidden_only else torch.ones_like(mask), self.patch)
        return masked_mean((prediction - target).abs().mean(1, keepdim=True), counted)

    def param_groups(self, recipe) -> list[dict]:
        """No decay on vectors. Of the rest a Swin spares the mask token, a ViT class token and positions; tables of
        relative positions decay: the official list of exceptions names them, but by a name that they do not have."""
        spared = ("mask_token",) if is_swin(self.backbone) else ("backbone.cls_token", "backbone.pos_embed")
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        free = [p for name, p in trained if p.ndim <= 1 or name in spared]
        decayed = [p for name, p in trained if p.ndim > 1 and name not in spared]
        return [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]


def units_of(backbone: nn.Module, unit: int) -> int:
    """-> how many units are in a row of the image."""
    if not hasattr(backbone, "patch_embed"):
        raise InputError(f"simmim hides cells of a patch embedding, and {type(backbone).__name__} has none; use "
                         "swin_mini, beit_mini or swin_base_patch4_window7_224, for example.")
    size, patch = backbone.patch_embed.img_size[0], backbone.patch_embed.patch_size[0]
    return check_unit(unit, patch, size)


def is_swin(backbone: nn.Module) -> bool:
    return not hasattr(backbone, "cls_token")


ONE_DEVIATION = {"a": -0.02, "b": 0.02}  # what is left has a deviation of 0.0108


def init_beit(beit: nn.Module) -> None:
    """BEiT's weights: cut off at one deviation, then smaller the deeper the block. timm has the second only."""
    for module in beit.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(module.weight, std=0.02, **ONE_DEVIATION)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for token in (beit.cls_token, beit.pos_embed):
        if token is not None:
            nn.init.trunc_normal_(token, std=0.02, **ONE_DEVIATION)
    beit.fix_init_weight()


# The official ViT: no absolute positions (timm's default), one table of relative ones instead of one per block.
SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
_imagenet = Recipe(
    method="simmim", backbone="swin_base_patch4_window7_224", size=192, data="imagenet", gpus=8, batch=128, accum=2,
    epochs=100, warmup_epochs=10, warmup_from=0.005, optimizer="adamw", lr=8e-4, weight_decay=0.05, clip=5.0,
    source="official code", sources={"batch": "zoo", "accum": "zoo"},
)

RECIPES = {
    "demo": Recipe(
        method="simmim", backbone="swin_mini", backbone_numbers={"depths": (1, 2), "drop_path_rate": 0.0}, size=28,
        data="fashion_small", batch=50, epochs=8, warmup_epochs=1, optimizer="adamw", lr=8e-3, weight_decay=0.05,
        clip=5.0, numbers={"unit": 4, "crop": (0.9, 1.0)},
        source="ours", sources={"weight_decay": "official code", "clip": "official code", "mask_ratio": "paper"}),
    "swin_base_sz192_8xb128_accu2_cos_ep100": _imagenet.with_(
        backbone_numbers={"window_size": 6, "drop_path_rate": 0.0}, min_lr=4e-5, cosine_from_start=True,
        published={"fine-tune at 192 px, BEiT (SimMIM)": 82.9},
        note="lr is 2e-4 x 2048 / 512, from 4e-6 to 4e-5. Windows of 6 cells, which divide the grids of 192 px."),
    "vit_base_rgb_m_sz224_8xb128_accu2_step_fp16_ep800": _imagenet.with_(
        backbone="beit_base_patch16_224", backbone_numbers={**SHARED, "drop_path_rate": 0.1}, size=224, epochs=800,
        lr=4e-4, schedule="step", milestones=(700,), precision="fp16", pool="mean",
        published={"fine-tune, BEiT (SimMIM)": 83.9},
        note="lr is 1e-4 x 2048 / 512, from 2e-6. The zoo's file adds absolute positions and a table per block."),
}
