"""CAE's new parts: the regressor, which guesses what is hidden, the decoder, which says it in tokens; first weights."""

from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models.beit import Block
from torch import Tensor, nn

from ..tokens import sincos_position

norm = partial(nn.LayerNorm, eps=1e-6)


class Regressor(nn.Module):
    """Latents of visible patches -> latents of the hidden ones. The visible ones are read and never changed."""

    def __init__(self, dim: int, heads: int, depth: int, drop_path: float):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(CrossBlock(dim, heads, p) for p in _ramp(drop_path, depth))
        self.norm = norm(dim)

    def forward(self, visible: Tensor, at_visible: Tensor, at_hidden: Tensor) -> Tensor:
        """visible (B, K, D), the positions of visible (B, K, D) and hidden patches (B, n, D) -> (B, n, D)."""
        x = self.mask_token.expand_as(at_hidden)
        places = torch.cat([at_visible, at_hidden], 1)
        for block in self.blocks:
            x = block(x, torch.cat([visible.to(x.dtype), x], 1), at_hidden, places)
        return self.norm(x)


class CrossBlock(nn.Module):
    """Hidden patches look at all patches. Unlike in a usual block the stream itself is normalised, halfway."""

    def __init__(self, dim: int, heads: int, drop_path: float):
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_k, self.norm_v, self.norm_mlp = (norm(dim) for _ in range(4))
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.gamma_1, self.gamma_2 = (nn.Parameter(torch.full((dim,), 0.1)) for _ in range(2))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, everything: Tensor, at_x: Tensor, at_everything: Tensor) -> Tensor:
        """x (B, n, D) asks, everything (B, L, D) answers; positions steer the look, but are not in what is seen."""
        looked = self.attend(self.norm_q(x + at_x), self.norm_k(everything + at_everything), self.norm_v(everything))
        x = self.norm_mlp(x + self.drop_path(self.gamma_1 * looked))
        return x + self.drop_path(self.gamma_2 * self.mlp(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (layer(y).unflatten(2, (self.heads, -1)).transpose(1, 2)
                   for layer, y in ((self.q, q), (self.k, k), (self.v, v)))  # B x heads x length x D / heads
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """Latents of hidden patches -> a logit for every token of the vocabulary. It never sees a visible patch."""

    def __init__(self, dim: int, heads: int, depth: int, drop_path: float, vocab_size: int):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(dim, heads, qkv_bias=True, init_values=0.1, drop_path=p, norm_layer=norm)
                                      for p in _ramp(drop_path, depth)))
        self.norm, self.head = norm(dim), nn.Linear(dim, vocab_size)

    def forward(self, latents: Tensor, at_hidden: Tensor) -> Tensor:
        """(B, n, D) twice -> (B, n, vocab_size)"""
        return self.head(self.norm(self.blocks(latents + at_hidden)))


def _ramp(drop_path: float, depth: int) -> list[float]:
    """From 0 in the first block to `drop_path` in the last."""
    return [drop_path * i / max(1, depth - 1) for i in range(depth)]


def init_weights(method: nn.Module) -> None:
    """Xavier for every matrix, the head's too; patches and tokens normal, cut off at one deviation; fixed positions."""
    vit = method.backbone
    for layer in method.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for weight in (vit.patch_embed.proj.weight, vit.cls_token, method.regressor.mask_token):
        nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)
    nn.init.zeros_(vit.patch_embed.proj.bias)
    vit.pos_embed.data.copy_(sincos_position(vit.patch_embed.grid_size[0], vit.embed_dim, first="row"))
    vit.pos_embed.requires_grad_(False)
