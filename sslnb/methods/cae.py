"""CAE: Context Autoencoder for Self-Supervised Representation Learning (arXiv 2202.03026, IJCV 2023).

The encoder understands what it sees and is spared the guessing: a regressor guesses the encoder's own latents of the
hidden patches, and a decoder, which sees nothing else, says which visual token stands at each hidden place.

    Z_v = F(x_v),   Ẑ_m = R(Z_v; positions),   Z̄_m = sg F'(x_m),   y_m = tokens of the second view
    loss = CE(D(Ẑ_m), y_m) + λ · mean (Ẑ_m − Z̄_m)²

F' is F of the step before: its weights are copied at every step before the optimizer moves F (momentum 0). Follows the
official code: biases for q and v only, row-first sine-cosine positions, layer scale 0.1, Xavier weights, weight decay
on every tensor with more than one dimension (class and mask token included), a mask of whole blocks with an exact
count: 98 of 196 there, 75 in mmselfsup, whose run is the zoo's number. OpenMixup's file of that name cannot run.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .. import tokenizers
from ..backbones import need_absolute_positions
from ..masking import block_mask, check_mask_ratio, upsample_mask, visible_first
from ..parts import ema_update, frozen_copy, full_precision
from ..recipes import Recipe
from ..tokens import encode_visible
from ..views import HorizontalFlip, Normalize, RandomResizedCrop, View, Views
from .base import Masked
from .cae_neck import Decoder, Regressor, init_weights


class CAE(Masked):
    def __init__(self, backbone: nn.Module, *, mask_ratio: float = 0.383, least: int = 16, align: float = 2.0,
                 regressor_depth: int = 4, decoder_depth: int = 4, neck_drop_path: float = 0.0, momentum: float = 0.0,
                 tokenizer: str = "dalle_encoder.pth", vocab_size: int = 8192, cell: int = 8,
                 crop: tuple[float, float] = (0.08, 1.0), flip: float = 0.5):
        """`least`: cells of the smallest masked block; `align`: λ; `tokenizer`: see sslnb.tokenizers."""
        super().__init__()
        need_absolute_positions(backbone, "cae")
        self.backbone, self.mask_ratio, self.least = backbone, check_mask_ratio(mask_ratio), least
        self.patch, (self.side, _) = backbone.patch_embed.patch_size[0], backbone.patch_embed.grid_size
        self.align, self.momentum, self.crop, self.flip = align, momentum, crop, flip
        dim, heads = backbone.embed_dim, backbone.blocks[0].attn.num_heads
        self.regressor = Regressor(dim, heads, regressor_depth, neck_drop_path)
        self.decoder = Decoder(dim, heads, decoder_depth, neck_drop_path, vocab_size)
        init_weights(self)
        self.target_encoder = frozen_copy(backbone)
        self.tokenizer = tokenizers.build(tokenizer, vocab_size, cell)

    def views(self, size: int) -> Views:
        """One crop at two sizes: for the encoder, and for the tokenizer."""
        small = size // self.patch * self.tokenizer.cell
        flip = HorizontalFlip(self.flip)
        return Views(View(RandomResizedCrop(size, self.crop, interpolation="bicubic"), flip, Normalize()),
                     View(RandomResizedCrop(small, self.crop, interpolation="lanczos"), flip, tokenizers.SECOND_VIEW,
                          aligned=True))

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> dict[str, Tensor]:
        images, second = views
        visible, hidden = self.places(self.draw_mask(len(images)), images.device)
        regressed = self.regress(images, visible, hidden)
        logits = self.decoder(regressed, self.position(hidden))
        tokens = self.tokenizer.tokenize(second).gather(1, hidden)
        cross_entropy, distance = self.loss(logits, tokens, regressed, self.latents(images, hidden))
        return {"loss": cross_entropy + self.align * distance, "cross_entropy": cross_entropy, "distance": distance,
                "accuracy": (logits.argmax(-1) == tokens).float().mean(), "logits": logits, "tokens": tokens}

    def draw_mask(self, batch: int, generator: Generator | None = None) -> Tensor:
        count = round(self.mask_ratio * self.side**2)
        return block_mask(batch, self.side, count, self.least, exact=True, generator=generator)

    def places(self, mask: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where the visible (B, K) and the hidden patches (B, n) are, each in order."""
        visible, hidden = (visible_first(m)[0].to(device, non_blocking=True) for m in (mask, 1 - mask))
        return visible, hidden

    def position(self, places: Tensor) -> Tensor:
        return self.backbone.pos_embed[0, 1:][places]

    def regress(self, images: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Ẑ_m (B, n, D): what the encoder would say about the hidden patches, guessed from the visible ones."""
        z = encode_visible(self.backbone, images, visible)[:, 1:]  # without the class token
        return self.regressor(z, self.position(visible), self.position(hidden))

    @torch.no_grad()
    def latents(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Z̄_m (B, n, D): what the target encoder says about the hidden patches when it sees them, and only them."""
        return encode_visible(self.target_encoder, images, hidden)[:, 1:]

    @full_precision
    def loss(self, logits: Tensor, tokens: Tensor, regressed: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Every image hides equally many patches, so these means are exact over processes too."""
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten()), F.mse_loss(regressed, latents)

    def before_step(self, progress: float) -> None:
        ema_update(self.target_encoder, self.backbone, self.momentum)

    def before_train(self, run) -> None:
        if not self.tokenizer.ready:
            self.fit_tokenizer(run.recipe.load(), run.seed)

    def fit_tokenizer(self, images, seed: int = 0) -> None:
        """Make the tokenizer ready: k-means clusters cells of these images' second views, DALL-E reads its file."""
        views = self.views(self.side * self.patch)
        self.tokenizer.fit(images, lambda some: views(some, seed)[1], seed)

    def target(self, images: Tensor) -> Tensor:
        """The tokens of the whole image (B, L), of a second view made out of the first; training has its own."""
        return self.tokenizer.tokenize(tokenizers.second_view(images, self.side * self.tokenizer.cell))

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """-> tokens (B, L): the likeliest in every hidden place; visible places, of which the network says nothing,
        have those of the image with its holes painted grey."""
        mask = mask.to(images.device, non_blocking=True)
        visible, hidden = self.places(mask, images.device)
        logits = self.decoder(self.regress(images, visible, hidden), self.position(hidden))
        return self.target(images * (1 - upsample_mask(mask, self.patch))).scatter(1, hidden, logits.argmax(-1))

    def to_image(self, prediction: Tensor, images: Tensor) -> Tensor:
        return tokenizers.first_view(self.tokenizer.decode(prediction), images.shape[-1])

    def snapshot(self, views: list[Tensor]) -> dict[str, Tensor]:
        return super().snapshot(views) if self.tokenizer.decodes else {}


_beit = {"use_abs_pos_emb": True, "use_rel_pos_bias": False, "init_values": 0.1}
_official = Recipe(
    method="cae", backbone="beit_base_patch16_224", backbone_numbers={**_beit, "drop_path_rate": 0.1}, size=224,
    data="imagenet", gpus=32, batch=64, epochs=300, warmup_epochs=10, optimizer="adamw", lr=1.5e-3, min_lr=1e-5,
    weight_decay=0.05, clip=3.0, precision="fp16", pool="mean",
    numbers={"mask_ratio": 0.5, "neck_drop_path": 0.1, "tokenizer": "dalle_encoder.pth"}, source="official code",
)

RECIPES = {
    "demo": Recipe(
        method="cae", backbone="beit_mini", backbone_numbers=_beit, size=28, data="fashion_small", batch=125, epochs=10,
        warmup_epochs=1, optimizer="adamw", lr=4e-3, weight_decay=0.05, clip=3.0, pool="mean",
        numbers={"mask_ratio": 0.5, "least": 4, "regressor_depth": 2, "decoder_depth": 1, "tokenizer": "kmeans",
                 "vocab_size": 256, "cell": 4, "crop": (0.9, 1.0)},
        source="ours", sources=dict.fromkeys(("mask_ratio", "align", "weight_decay", "clip"), "official code"),
        note="A second view of the same size: k-means needs no more than a patch for a token."),
    "vit_base_sz224_8xb64_accu4_cos_fp16_ep300": _official.with_(
        gpus=8, accum=4, backbone_numbers=_beit, mask_ratio=0.383, neck_drop_path=0.0,
        sources={"batch": "zoo", "mask_ratio": "mmselfsup", "neck_drop_path": "mmselfsup"},
        published={"fine-tune, BEiT (CAE)": 83.2},
        note="75 of 196 patches hidden and no drop path, as in mmselfsup, whose run the zoo's number and weights are; "
             "the official code hides 98 and drops paths at 0.1: vit_base_32xb64_cos_fp16_ep300."),
    "vit_base_32xb64_cos_fp16_ep300": _official.with_(published={"fine-tune, official code": 83.6}),
    "vit_base_32xb64_cos_fp16_ep800": _official.with_(
        epochs=800, warmup_epochs=20, published={"fine-tune, official code": 83.8}),
    "vit_base_32xb64_cos_fp16_ep1600": _official.with_(
        epochs=1600, warmup_epochs=40, published={"fine-tune, official code": 83.9}),
}
