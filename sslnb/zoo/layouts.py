"""Whose file is this? Layouts by the names of their tensors, and the way from their names to timm's.

A layout is a prefix below which the backbone lies, and a dialect: how names below the prefix become timm's, and which
numbers stand in another order. Both are tables here. Two encoders often lie in one file, query and key, online and
target: the first of each pair is the one that published numbers were measured with, and the prefix of the second is in
no table. Sources: the algorithm classes of MMSelfSup 0.x and 1.x, OpenMixup, SlowFast and the official repositories,
read as code; the published files themselves were never opened.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InputError
from ..tokens import sincos_position

Tensors = dict[str, Tensor]


@dataclass
class Plain:
    """A file's backbone under timm's names: for every name the tensor, the file's own name, and what was done to it."""

    tensors: Tensors
    origin: dict[str, str]
    changed: dict[str, str] = field(default_factory=dict)
    layout: str = ""
    prefix: str = ""
    heads: int = 0  # of a ViT's attention, where the layout knows what no shape tells

    def put(self, name: str, tensor: Tensor, origin: str, change: str) -> None:
        self.tensors[name], self.origin[name], self.changed[name] = tensor, origin, change


# Name, prefix of the backbone, names that only this layout has ("" if the prefix says enough). The first that fits is
# taken. OpenMMLab 0.x and OpenMixup have the backbone twice, the second time as `backbone.`, the very same tensors.
JAX = r"/initial_conv(_1)?/w$"
LAYOUTS = (
    ("BYOL's JAX file", "", JAX),
    ("MoCo, official", "module.encoder_q.", ""),
    ("MoCo v3, official", "module.base_encoder.", ""),
    ("SimSiam, official", "module.encoder.", ""),
    ("Barlow Twins or DINO, whole file", "module.backbone.", ""),
    ("MoCo of OpenMMLab 0.x or OpenMixup", "backbone.", r"^encoder_q\.0\."),
    ("BYOL of OpenMMLab 0.x or OpenMixup", "backbone.", r"^online_net\.0\."),
    ("MoCo v3 of OpenMMLab 0.x or OpenMixup", "backbone.", r"^base_encoder\.0\."),
    ("SimSiam of OpenMMLab 0.x or OpenMixup", "backbone.", r"^encoder\.0\."),
    ("timm's model in OpenMixup", "backbone.timm_model.", ""),
    ("lightly, masked ViT", "backbone.vit.", ""),
    ("MoCo v3 of OpenMMLab 1.x", "backbone.", r"^momentum_encoder\.module\."),
    ("OpenMMLab 1.x", "backbone.", r"^(target_net|encoder_k)\.module\."),
    ("OpenMMLab or OpenMixup", "backbone.", r"^(neck|head|teacher|hog_layer|memory_bank)\."),
    ("solo-learn", "backbone.", r"^(classifier|projector|momentum_(backbone|projector|classifier)|prototypes)\."),
    ("lightly", "backbone.", r"^(projection_head|prediction_head|backbone_momentum|criterion|online_classifier)"),
    ("a method's backbone", "backbone.", ""),
    ("MoCo of OpenMMLab", "encoder_q.0.", ""),
    ("BYOL of OpenMMLab", "online_net.0.", ""),
    ("MoCo v3 of OpenMMLab", "base_encoder.0.", ""),
    ("SimSiam of OpenMMLab", "encoder.0.", ""),
    ("lightly, DINO's teacher", "teacher_backbone.", ""),
    ("CAE, official", "encoder.", r"^(pretext_neck|teacher)\."),
    ("SimMIM, official", "encoder.", r"^decoder\.0\."),
    ("solo-learn, old", "encoder.", r"^(classifier|projector)\."),
    ("an encoder", "encoder.", ""),
    ("a query encoder", "encoder_q.", ""),
    ("a base encoder", "base_encoder.", ""),
    ("an online network", "online_backbone.", ""),
    ("VISSL", "_feature_blocks.", ""),
    ("SwAV or DeepCluster-v2, official", "module.", r"^module\.(projection_head|prototypes)"),
    ("data parallel", "module.", ""),
    ("a model's backbone", "model.backbone.", ""),
    ("a model", "model.", ""),
    ("MaskFeat of SlowFast", "", r"^pred_head\.transforms\."),
    ("MAE with its decoder", "", r"^decoder_blocks\.0\."),
    ("BEiT, official", "", r"^lm_head\."),
    ("plain names", "", ""),
)

# A tensor that every backbone known here has, in one of the dialects: the way in.
ENTRANCES = ("conv1.weight", "conv1.0.weight", "patch_embed.proj.weight", "patch_embed.projection.weight", "0.weight")


def convert(state: Tensors, wanted: dict[str, torch.Size] | None = None) -> Plain:
    """The file's backbone under timm's names. Errors: InputError for an unknown layout.

    `wanted`: names and shapes of the backbone, if known: then the prefix of any network can be found, by agreement.
    """
    layout, prefix = next((pair for *pair, mark in LAYOUTS if _fits(state, pair[1], mark)), ("", ""))
    if not layout:
        layout, prefixes = "names of the backbone", list(dict.fromkeys(prefix for _, prefix, _ in LAYOUTS))
        prefix = max(prefixes, key=lambda prefix: _agreeing(state, prefix, wanted or {}))
        if not _agreeing(state, prefix, wanted or {}):
            raise InputError(f"its layout is unknown here: of which network are {', '.join(list(state)[:3])}? If those "
                             "are timm's names, give that network as `backbone`; if not, rename them first")
    inside = {name[len(prefix):]: tensor for name, tensor in state.items() if name.startswith(prefix)}
    plain = Plain(inside, {name: prefix + name for name in inside}, layout=layout, prefix=prefix)
    for mark, dialect in DIALECTS:
        if any(re.search(mark, name) for name in inside):
            dialect(plain)
            break
    vit = plain.tensors.get("patch_embed.proj.weight")
    if vit is not None and len(vit) == 384 and ("base_encoder" in prefix or "MoCo v3" in layout or _of_mocov3(plain)):
        plain.heads = 12  # official code: 32 numbers per head, where timm's ViT-S has 64 and 6 heads
    return plain


def _of_mocov3(plain: Plain) -> bool:
    """Its fixed positions, rows first, tell where the file's own converter has left plain names."""
    positions = plain.tensors.get("pos_embed")
    if positions is None or positions.is_meta:
        return False
    side = round((positions.shape[1] - 1) ** 0.5)
    ours = sincos_position(side, positions.shape[2], first="row")
    return ours.shape == positions.shape and torch.allclose(positions.float(), ours, atol=1e-5)


def _fits(state: Tensors, prefix: str, mark: str) -> bool:
    enters = mark == JAX or any(prefix + way in state for way in ENTRANCES)
    return enters and (not mark or any(re.search(mark, name) for name in state))


def _agreeing(state: Tensors, prefix: str, wanted: dict[str, torch.Size]) -> int:
    return sum(prefix + name in state and state[prefix + name].shape == shape for name, shape in wanted.items())


def _renamed(plain: Plain, *rules: tuple[str, str | Callable[[re.Match], str]]) -> None:
    tensors, origin = {}, {}
    for name, tensor in plain.tensors.items():
        new = renamed(name, rules)
        tensors[new], origin[new] = tensor, plain.origin[name]
    plain.tensors, plain.origin = tensors, origin


def renamed(name: str, rules: Iterable[tuple[str, str | Callable[[re.Match], str]]]) -> str:
    """All rules, one after the other: patterns and what takes their place."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


# ---------------------------------------------------------------- dialects

MLP = ((r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."), (r"\.ffn\.layers\.1\.", ".mlp.fc2."))


def _mm_vit(plain: Plain) -> None:
    _renamed(plain, (r"^patch_embed\.projection\.", "patch_embed.proj."), (r"^layers\.", "blocks."), *MLP,
             (r"^blocks\.(\d+)\.ln(\d)\.", r"blocks.\1.norm\2."), (r"^ln1\.", "norm."))


def _mm_swin(plain: Plain) -> None:
    _renamed(plain, (r"^patch_embed\.projection\.", "patch_embed.proj."), (r"^stages\.", "layers."), *MLP,
             (r"\.attn\.w_msa\.", ".attn."), (r"^norm3\.", "norm."))
    _later_merging(plain)
    for name in [name for name in plain.tensors if ".downsample." in name]:
        plain.put(name, merged_as_timm(plain.tensors[name]), plain.origin[name], "channels of the merged patches, "
                  "which OpenMMLab lays out by nn.Unfold, in timm's order")


def merged_as_timm(x: Tensor) -> Tensor:
    """Four merged patches per channel, (…, 4C), from nn.Unfold's order 4c + 2·row + column to timm's, where the patch
    is the slow index: (2·column + row)·C + c."""
    four = x.unflatten(-1, (-1, 2, 2))  # … x C x row x column
    return four.movedim(-3, -1).transpose(-3, -2).flatten(-3)


def _swin(plain: Plain) -> None:
    if any(name.startswith("layers.0.downsample.") for name in plain.tensors):
        _later_merging(plain)


def _later_merging(plain: Plain) -> None:
    """Patches merge at the end of a stage in the official Swin, at the beginning of the next one in timm's."""
    _renamed(plain, (r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample."))


def _slowfast(plain: Plain) -> None:
    """The last norm is the head's there; query, key and value are one tensor or, in some versions, three."""
    _renamed(plain, (r"^pred_head\.transforms\.0\.0\.", "norm."))
    for name in [name for name in plain.tensors if re.search(r"^blocks\.\d+\.attn\.q\.", name)]:
        three = [name.replace(".attn.q.", f".attn.{letter}.") for letter in "qkv"]
        if all(part in plain.tensors for part in three):
            tensors, origins = zip(*((plain.tensors.pop(part), plain.origin.pop(part)) for part in three), strict=True)
            plain.put(name.replace(".attn.q.", ".attn.qkv."), torch.cat(tensors), ", ".join(origins),
                      "query, key and value joined")


def _sequence(plain: Plain) -> None:
    """lightly's habit, nn.Sequential(*resnet.children()): torchvision's four stages are number 4 to 7 then, those of
    lightly's own small ResNets, which have neither a module for ReLU nor a pool, 2 to 5."""
    first = 4 if any(name.startswith("7.") for name in plain.tensors) else 2
    _renamed(plain, (r"^0\.", "conv1."), (r"^1\.", "bn1."), (r"\.shortcut\.", ".downsample."),
             (r"^(\d)\.", lambda m: f"layer{int(m[1]) - first + 1}."))


NORM = {"scale": "weight", "offset": "bias", "mean_ema": "running_mean", "var_ema": "running_var"}


def _haiku(plain: Plain) -> None:
    """resnet/~/block_group_0/~/block_2/~/batchnorm_1/scale becomes layer1.2.bn2.weight; kernels are HWIO there."""
    for name in list(plain.tensors):
        tensor, origin = plain.tensors.pop(name), plain.origin.pop(name)
        path = [part for part in name.split("/") if part != "~"]
        if len(path) < 3 or re.search(r"projector|predictor|classifier", name):
            continue  # heads: `match.fit` lists them as left over
        group, block = (re.search(rf"/{what}_(\d+)/", name) for what in ("block_group", "block"))
        place = f"layer{int(group[1]) + 1}.{block[1]}." if group and block else ""
        kind, number = re.match(r"(\D+?)_?(\d*)$", path[-2]).groups()
        norm = "batchnorm" in kind
        if "shortcut" in kind:
            module = f"downsample.{int(norm)}"
        else:
            module = f"{'bn' if norm else 'conv'}{int(number or 0) + 1 if place else 1}"
        if norm and path[-1] in NORM:
            plain.put(f"{place}{module}.{NORM[path[-1]]}", tensor.flatten(), origin, "BatchNorm under JAX's names")
        elif path[-1] == "w" and tensor.ndim == 4:
            plain.put(f"{place}{module}.weight", tensor.permute(3, 2, 0, 1).contiguous(), origin,
                      "kernels from HWIO to OIHW")


DIALECTS: tuple[tuple[str, Callable[[Plain], None]], ...] = (
    (JAX, _haiku),
    (r"^layers\.0\.ffn\.", _mm_vit),
    (r"^stages\.0\.blocks\.0\.attn\.w_msa\.", _mm_swin),
    (r"^layers\.0\.blocks\.0\.attn\.", _swin),
    (r"^pred_head\.transforms\.|^blocks\.0\.attn\.q\.weight$", _slowfast),
    (r"^0\.weight$", _sequence),
)


# ---------------------------------------------------------------- towards the backbone

TABLE = "relative_position_bias_table"
REGISTERS = ("reg_token", "register_tokens")  # in timm, in DINOv2's files


def adapt(plain: Plain, wanted: dict[str, torch.Size]) -> None:
    """Three things that a BEiT may keep in two ways, and DINOv2's register tokens, turned into the way of the backbone:
    names and shapes `wanted`."""
    found = plain.tensors
    if "reg_token" in wanted and found.keys() >= {"register_tokens", "cls_token", "pos_embed"}:
        _renamed(plain, ("^register_tokens$", "reg_token"))
        found = plain.tensors
        first, places = found["pos_embed"].tensor_split([1], dim=1)
        plain.put("cls_token", found["cls_token"] + first, plain.origin["cls_token"], "with its position added")
        plain.put("pos_embed", places, plain.origin["pos_embed"], "without that of the class token")
    shared = f"rel_pos_bias.{TABLE}"
    if shared in found and shared not in wanted:
        for name in [name for name in wanted if name.endswith(f".attn.{TABLE}") and name not in found]:
            plain.put(name, found[shared], plain.origin[shared], "the table that all blocks shared, a copy for each")
        found.pop(shared)
    for name in [name for name in found if name.endswith(".attn.q_bias")]:
        base = name.removesuffix("q_bias")
        joined = f"{base}qkv.bias"
        if joined in wanted and name not in wanted and f"{base}v_bias" in found:
            q, v = found.pop(name), found.pop(f"{base}v_bias")
            origin = f"{plain.origin.pop(name)}, {plain.origin.pop(f'{base}v_bias')}"
            plain.put(joined, torch.cat([q, torch.zeros_like(q), v]), origin,
                      "biases of query and value, with zeros for the key")
    for name in [name for name in found if re.search(r"\.gamma_[12]$", name) and name not in wanted]:
        new = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
        if new in wanted:
            found[new], plain.origin[new] = found.pop(name), plain.origin.pop(name)
