"""Inside a backbone: patches left out, a mask token put in, fixed positions, and where the class token looks."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .backbones import image_size, last_map
from .errors import InputError


@torch.no_grad()
def class_attention(vit: nn.Module, images: Tensor, block: int = -1) -> Tensor:
    """Where a ViT's class token looks in a block: (B, 3, H, W) -> (B, heads, L), shares of the patches, row by row.

    They sum to less than 1: the rest is the token's look at itself.
    """
    attention, found = vit.blocks[block].attn, []
    fused = attention.fused_attn
    attention.fused_attn = False  # the fused kernel keeps the shares to itself
    handle = attention.attn_drop.register_forward_hook(lambda _, inputs, output: found.append(inputs[0]))
    try:
        vit(images)
    finally:
        handle.remove()
        attention.fused_attn = fused
    return found[0][:, :, 0, vit.num_prefix_tokens:]


def encode_visible(vit: nn.Module, images: Tensor, keep: Tensor) -> Tensor:
    """Run a timm ViT on the visible patches ONLY: images (B, 3, H, W), keep (B, K) -> (B, 1 + K, D), class token first.

    Position embeddings are added before patches are dropped, so each visible patch keeps its own. A timm Beit will do
    too if it has no relative positions, which would have to be dropped as well.
    """
    x = vit.patch_embed(images)
    x = x + vit.pos_embed[:, 1:]
    x = x.gather(1, keep[:, :, None].expand(-1, -1, x.shape[-1]))
    cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(x), -1, -1)
    x = torch.cat([cls, x], 1)
    x = vit.norm_pre(x) if hasattr(vit, "norm_pre") else x  # CLIP's has one
    for block in vit.blocks:
        x = block(x)
    return vit.norm(x)


@contextlib.contextmanager
def mask_enters(module: nn.Module, change: Callable[[Tensor], Tensor], before: bool = False) -> Iterator[None]:
    """Inside, the output of `module`, a part of a backbone, goes through `change` (its input, if `before`).

    How a mask token gets into a plain timm model, which stays one: for a ViT, Beit or Swin after `patch_embed`, as
    (B, L, D) or (B, h, w, D), before class token and positions; for a ResNet before `layer4`, as (B, D, h, w).

        with mask_enters(vit.patch_embed, lambda cells: put_token(cells, mask, token)):
            tokens = cells(vit, images)
    """
    if before:
        handle = module.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:]))
    else:
        handle = module.register_forward_hook(lambda _, inputs, output: change(output))
    try:
        yield
    finally:
        handle.remove()


def put_token(cells: Tensor, mask: Tensor, token: Tensor) -> Tensor:
    """The token (1, 1, D) instead of every hidden cell: (B, L, D) of a ViT or (B, h, w, D) of a Swin; mask (B, L)."""
    hidden = mask.to(cells.device, non_blocking=True).view(*cells.shape[:-1], 1) > 0
    return torch.where(hidden, token.to(cells.dtype), cells)


def token_entrance(backbone: nn.Module, layer: int | None, method: str) -> tuple[str, bool]:
    """The name of the part of a ViT or ResNet where a mask token may enter, and whether before it: (name, before).

    A ViT has one such place, after its patch embedding; a ResNet one before each stage, None means the last.
    """
    vit = hasattr(backbone, "patch_embed") and hasattr(backbone, "cls_token")
    stages = ["patch_embed"] if vit else [f"layer{i}" for i in (1, 2, 3, 4) if len(getattr(backbone, f"layer{i}", ()))]
    kind = type(backbone).__name__
    if not stages:
        raise InputError(f"{method} needs a ResNet or a vision transformer with a class token, and {kind} is neither; "
                         "use resnet50 or beit_base_patch16_224, for example.")
    layer = len(stages) - 1 if layer is None else layer
    if not 0 <= layer < len(stages):
        raise InputError(f"mask_layer {layer} is impossible: the token can enter a {kind} in {len(stages)} place(s) "
                         f"here; use a number from 0 to {len(stages) - 1}.")
    return stages[layer], not vit


@torch.no_grad()
def token_map(backbone: nn.Module, part: str, before: bool) -> tuple[int, int, int]:
    """Channels where the token enters, pixels of a cell there, and pixels of a cell of the last map."""
    found, training, size = [], backbone.training, image_size(backbone)
    images = torch.zeros(1, 3, size, size, device=next(backbone.parameters()).device)
    with mask_enters(getattr(backbone, part), lambda x: found.append(x) or x, before):
        last = last_map(backbone.eval(), images)
    backbone.train(training)
    x = found[0] if before else found[0].transpose(1, 2)  # B x D x ...
    return x.shape[1], size // round(x[0, 0].numel() ** 0.5), size // last.shape[-1]


def sincos_position(side: int, dim: int, first: str = "column") -> Tensor:
    """Fixed 2-D sine-cosine positions for a class token and side² patches: (1, 1 + side², dim), the class row zero.

    Half of the vector encodes one axis as [sin, cos] with dim/4 frequencies 10000^(-k/(dim/4)). MAE's official code
    puts the column first, MoCo v3's the row: their tables differ, so a checkpoint must bring its own.
    """
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    axis = torch.arange(side, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([axis.sin(), axis.cos()], 1)  # side x dim/2
    row, column = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    halves = (column, row) if first == "column" else (row, column)
    table = torch.cat(halves, -1).reshape(side * side, dim)
    return torch.cat([torch.zeros(1, dim), table.float()])[None]
