"""MAE: Masked Autoencoders Are Scalable Vision Learners (arXiv 2111.06377, CVPR 2022).

Hide three quarters of the patches; a ViT sees only the rest, a small decoder paints the hidden ones.

    tᵢ = (xᵢ − μᵢ) / √(σᵢ² + 10⁻⁶) per patch,   loss = mean over hidden patches of ‖pᵢ − tᵢ‖² / values per patch

Follows the official PyTorch code: column-first sine-cosine positions, unbiased variance, weight decay on every tensor
with more than one dimension (class and mask token included), Xavier initialisation.
"""

from functools import partial

import torch
from torch import Generator, Tensor, nn

from ..backbones import need_absolute_positions
from ..losses import masked_mean
from ..masking import check_mask_ratio, patchify, random_mask, unpatchify, visible_first
from ..parts import full_precision
from ..recipes import Recipe
from ..tokens import encode_visible, sincos_position
from ..views import HorizontalFlip, Normalize, RandomResizedCrop, View, Views
from .base import Masked


class MAE(Masked):
    def __init__(self, backbone: nn.Module, *, mask_ratio: float = 0.75, decoder_dim: int = 512, decoder_depth: int = 8,
                 decoder_heads: int = 16, norm_pix: bool = True, crop: tuple[float, float] = (0.2, 1.0),
                 flip: float = 0.5):
        super().__init__()
        need_absolute_positions(backbone, "mae")
        self.backbone, self.mask_ratio, self.norm_pix = backbone, check_mask_ratio(mask_ratio), norm_pix
        self.patch, (side, _) = backbone.patch_embed.patch_size[0], backbone.patch_embed.grid_size
        self.crop, self.flip = crop, flip
        self.decoder = Decoder(backbone.embed_dim, decoder_dim, decoder_depth, decoder_heads, side, 3 * self.patch**2)
        self.apply(_xavier)
        nn.init.xavier_uniform_(backbone.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(backbone.cls_token, std=0.02)
        backbone.pos_embed.data.copy_(sincos_position(side, backbone.embed_dim))
        backbone.pos_embed.requires_grad_(False)

    def views(self, size: int) -> Views:
        return Views(View(RandomResizedCrop(size, self.crop, interpolation="bicubic"), HorizontalFlip(self.flip),
                          Normalize()))

    @property
    def borrows(self) -> str:
        return "brightness and contrast of each patch are" if self.norm_pix else ""

    def draw_mask(self, batch: int, generator: Generator | None = None) -> Tensor:
        noise = torch.rand(batch, self.backbone.patch_embed.num_patches, generator=generator)
        return random_mask(noise, self.mask_ratio)

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """-> the prediction for every patch, hidden or not (B, L, patch²·3)."""
        keep, restore = (i.to(images.device, non_blocking=True) for i in visible_first(mask))
        return self.decoder(encode_visible(self.backbone, images, keep), restore)

    @full_precision
    def target(self, images: Tensor) -> Tensor:
        """Pixels per patch, standardised by each patch's own mean and deviation if `norm_pix`."""
        x = patchify(images, self.patch)
        if not self.norm_pix:
            return x
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()

    @full_precision
    def loss(self, prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return masked_mean(((prediction - target) ** 2).mean(-1), mask)

    def to_image(self, prediction: Tensor, images: Tensor) -> Tensor:
        """Predicted patches -> normalised images (B, 3, H, W).

        A `norm_pix` model predicts no brightness, so the mean and deviation are taken from the TRUE patches: a help
        that the model does not have, and that a figure must mention.
        """
        if self.norm_pix:
            x = patchify(images, self.patch)
            prediction = prediction * (x.var(-1, keepdim=True) + 1e-6).sqrt() + x.mean(-1, keepdim=True)
        return unpatchify(prediction.float(), self.patch)


class Decoder(nn.Module):
    """Visible tokens and one shared mask token in every hole -> pixels of every patch."""

    def __init__(self, encoder_dim: int, dim: int, depth: int, heads: int, side: int, values: int):
        from timm.models.vision_transformer import Block

        super().__init__()
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(sincos_position(side, dim), requires_grad=False)
        self.blocks = nn.Sequential(*(Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
        self.norm, self.predict = norm(dim), nn.Linear(dim, values)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, restore: Tensor) -> Tensor:
        """latent (B, 1 + K, D) with the class token first, restore (B, L) -> (B, L, values)."""
        x = self.embed(latent)
        holes = self.mask_token.expand(len(x), restore.shape[1] + 1 - x.shape[1], -1)
        patches = torch.cat([x[:, 1:], holes.to(x.dtype)], 1).gather(1, restore[:, :, None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], patches], 1) + self.position
        return self.predict(self.norm(self.blocks(x)))[:, 1:]


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


RECIPES = {
    "demo": Recipe(
        method="mae", backbone="vit_mini", size=28, data="fashion_small", batch=125, epochs=20, warmup_epochs=1,
        optimizer="adamw", lr=4e-3, betas=(0.9, 0.95), weight_decay=0.05, pool="mean",
        numbers={"decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 4, "norm_pix": False, "crop": (0.9, 1.0)},
        source="ours", sources={"betas": "paper", "weight_decay": "paper"},
        note="Raw pixels as target, because their reconstructions can be looked at as they are."),
    "vit_base_dec8_dim512_8xb128_accu4_cos_fp16_ep400": Recipe(
        method="mae", backbone="vit_base_patch16_224", size=224, data="imagenet", gpus=8, batch=128, accum=4,
        epochs=400, warmup_epochs=40, optimizer="adamw", lr=2.4e-3, betas=(0.9, 0.95), weight_decay=0.05,
        precision="fp16", source="official code", sources={"epochs": "zoo", "batch": "zoo", "accum": "zoo"},
        published={"fine-tune, BEiT (MAE)": 83.1},
        note="The zoo's file is gone; its old version accumulated 8 times at the lr of 4. lr is 1.5e-4 x 4096 / 256."),
}
