"""Which network is it? Read from the names and shapes of its tensors, as far as they can tell."""

import math
import re
from typing import Any

from torch import Tensor, nn

from ..backbones import build, image_size
from ..errors import InputError
from .layouts import REGISTERS, TABLE, Plain

RESNETS = {  # blocks per stage, whether of three convolutions
    ((2, 2, 2, 2), False): "resnet18", ((3, 4, 6, 3), False): "resnet34", ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101", ((3, 8, 36, 3), True): "resnet152", ((3, 24, 36, 3), True): "resnet200",
}
VITS = {192: ("tiny", 12), 384: ("small", 12), 768: ("base", 12), 1024: ("large", 24), 1280: ("huge", 32)}  # depth
SWINS = {(96, (2, 2, 6, 2)): "tiny", (96, (2, 2, 18, 2)): "small", (128, (2, 2, 18, 2)): "base",
         (192, (2, 2, 18, 2)): "large"}


class Ambiguous(InputError):
    """A name alone would not do, either: two networks have the same name and shapes."""


Network = tuple[str, dict[str, Any], int]


def recognise(plain: Plain) -> Network:
    """timm name, numbers for backbones.build, and the size in px that it was made for.

    Errors: InputError, what to say instead, where names and shapes do not tell.
    """
    found = plain.tensors
    if "layer1.0.conv1.weight" in found:
        return _resnet(plain)
    if "patch_embed.proj.weight" in found and "layers.0.blocks.0.norm1.weight" in found:
        return _swin(plain)
    if "patch_embed.proj.weight" in found and "cls_token" in found and "blocks.0.norm1.weight" in found:
        return _transformer(plain)
    raise _ask("it holds weights, but of which network? Its tensors do not tell")


def _resnet(plain: Plain) -> Network:
    found = plain.tensors
    blocks = tuple(_count(found, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
    name = RESNETS.get((blocks, "layer1.0.conv3.weight" in found))
    stem = found.get("conv1.weight")
    if not name or stem is None or len(stem) != 64 or len(found["layer1.0.conv2.weight"]) != 64:
        raise _ask(f"it holds a ResNet of {'-'.join(map(str, blocks))} blocks with a stem or width of its own")
    # The 3x3 stem of CIFAR's networks has weights of another shape; build makes it for up to 64 px.
    size = 32 if stem.shape[-1] == 3 else 224
    return name, {"sobel": True} if stem.shape[1] == 2 else {}, size


def _transformer(plain: Plain) -> Network:
    found = plain.tensors
    width, _, patch, _ = found["patch_embed.proj.weight"].shape
    depth, beit = _count(found, r"blocks\.(\d+)\."), "blocks.0.attn.qkv.bias" not in found
    if width not in VITS or beit and width not in (768, 1024):
        raise _ask(f"it holds a vision transformer of width {width}, whose number of heads is not in any shape")
    kind, usual = VITS[width]
    numbers: dict[str, Any] = {} if depth == usual else {"depth": depth}
    size = size_in(plain)
    if not size:
        raise _ask("it holds a vision transformer without positions, so its size is unknown")
    if "fc_norm.weight" in found and "norm.weight" not in found:
        numbers["global_pool"] = "avg"  # fine-tuned: the pooled tokens are normalised, not each of them
    if beit:
        numbers |= {"use_abs_pos_emb": "pos_embed" in found,
                    "use_rel_pos_bias": f"blocks.0.attn.{TABLE}" in found,
                    "use_shared_rel_pos_bias": f"rel_pos_bias.{TABLE}" in found,
                    "init_values": 0.1 if "blocks.0.gamma_1" in found else None,  # 0.1: layer scale, then overwritten
                    "qkv_bias": "blocks.0.attn.q_bias" in found}
        return f"beit_{kind}_patch{patch}_224", numbers, size
    if any(name in found for name in REGISTERS):
        raise _ask("it holds a vision transformer with register tokens", "vit_small_patch14_reg4_dinov2")
    if plain.heads:
        numbers["num_heads"] = plain.heads
    elif width == 384 and any("layers." in origin for origin in plain.origin.values()):
        raise Ambiguous("it holds an OpenMMLab ViT-S with 12 heads (MoCo v3's) or 6 (DeiT's), which no shape tells: "
                        "give `backbone`, 'vit_small_patch16_224', and num_heads=12 or 6")
    return f"vit_{kind}_patch{patch}_224", numbers, size


def _swin(plain: Plain) -> Network:
    found = plain.tensors
    width = len(found["patch_embed.proj.weight"])
    depths = tuple(_count(found, rf"layers\.{stage}\.blocks\.(\d+)\.")
                   for stage in range(_count(found, r"layers\.(\d+)\.")))
    kind = SWINS.get((width, depths))
    if not kind or found["patch_embed.proj.weight"].shape[-1] != 4:
        raise _ask(f"it holds a Swin of width {width} with {'-'.join(map(str, depths))} blocks, none of timm's")
    if f"layers.0.blocks.0.attn.{TABLE}" not in found:  # a small network makes V2's positions, for windows of any size
        raise _ask("it holds a Swin V2, whose windows and size are in no shape", "swinv2_tiny_window8_256")
    window = _side(found[f"layers.0.blocks.0.attn.{TABLE}"])
    numbers = {} if window == 7 else {"window_size": window}
    return f"swin_{kind}_patch4_window7_224", numbers, size_in(plain)


def size_in(plain: Plain) -> int:
    """The size in px that a transformer's positions are made for, of whatever width; 0 if nothing tells it."""
    found = plain.tensors
    if "patch_embed.proj.weight" not in found:
        return 0
    patch, positions = found["patch_embed.proj.weight"].shape[-1], found.get("pos_embed")
    if positions is not None and "cls_token" in found:  # of a square grid; others, such as Hiera, have larger kernels
        return patch * round(math.sqrt(positions.shape[1] - 1))
    for name in (f"blocks.0.attn.{TABLE}", f"rel_pos_bias.{TABLE}"):
        if name in found:
            return patch * _side(found[name][:-3])  # the last three are of the class token
    last = _count(found, r"layers\.(\d+)\.") - 1
    table = found.get(f"layers.{last}.blocks.0.attn.{TABLE}")
    return 0 if table is None else patch * 2**last * _side(table)  # a Swin's last grid is one window


def _side(table: Tensor) -> int:
    """Of the window with (2 · side − 1)² offsets."""
    return (round(math.sqrt(len(table))) + 1) // 2


def usual_size(name: str) -> int:
    """That of the images which timm's weights of this name were trained with, else 224."""
    import timm

    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return known.input_size[-1] if known else 224


def _count(names, pattern: str) -> int:
    """One more than the largest number in a place."""
    return 1 + max((int(found[1]) for name in names if (found := re.match(pattern, name))), default=-1)


def _ask(what: str, such: str = "resnet50") -> InputError:
    return InputError(f"{what}: give `backbone`, a timm name such as {such!r}, and numbers that differ from its own")


def resized(model: nn.Module, name: str, numbers: dict[str, Any], size: int) -> tuple[nn.Module, list[str]]:
    """The same network for images of `size` px, and the names of the tensors that were resampled for it: positions of
    a ViT, tables of relative positions. A ResNet keeps its stem and only says the new size."""
    if image_size(model) == size:
        return model, []
    if not hasattr(model, "patch_embed"):
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, size, size)}
        return model, []
    from ..evaluate.start import carried_over

    new, old = build(name, size, **numbers), model.state_dict()
    state, _ = carried_over(old, new, f"{name} at {size} px")
    new.load_state_dict(state)
    return new.train(model.training), [key for key in state if state[key].shape != old[key].shape]
