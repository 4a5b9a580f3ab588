"""Backbones: timm models by name, made ready for self-supervision.

A backbone is a timm model with `num_classes=0`: (B, 3, H, W) -> (B, num_features). Its state dict has timm's plain
names, so what is trained here loads anywhere timm does. `my_file.py:my_net` is a name too, for any network: see `own`.
Where patches are left out and mask tokens enter is in tokens.py.
"""

import contextlib
import difflib
import inspect
import re
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError, unknown

# Small backbones for a CPU and small images, as timm base name and arguments. resnet_mini has a stem of three 3x3
# convolutions and two residual blocks: 20 px become maps of 10 and 5. On held-out training digits, seeds 0 and 1: a
# third block, with maps of 3x3, takes kNN from 90 and 86 % to 84 and 83 % (SimCLR, 600 steps); a stem of stride 1, 8
# channels and three narrower blocks need 84 s instead of 50 s, for 86 and 87 % instead of 86 and 89 (BYOL, 1200 steps).
MINI = {
    "resnet_mini": ("resnet18", {"layers": (1, 1, 0, 0), "channels": (32, 64, 64, 64), "stem_type": "deep",
                                 "stem_width": 16, "zero_init_last": False}),
    "vit_mini": ("vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4}),
    "beit_mini": ("beit_base_patch16_224", {"patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4}),
    "swin_mini": ("swin_tiny_patch4_window7_224", {"patch_size": 2, "embed_dim": 32, "depths": (2, 2),
                                                   "num_heads": (2, 4), "window_size": 7}),
}
SHAPE = {"layers", "channels", "depth", "depths", "embed_dim", "num_heads", "patch_size"}  # arguments of one network
SMALL_IMAGE = 64  # up to this size a ResNet gets the 3x3 stem without pooling; 7x7/2 + pool would leave 2x2 maps


def build(name: str, size: int, *, sobel: bool = False, **arguments) -> nn.Module:
    """A randomly initialised backbone for square images of `size` pixels; `arguments` go to timm.create_model.

    `sobel` makes its first convolution see the two Sobel derivatives of the grey image instead of colours.

    ResNets for images of at most 64 px get the small-image stem (3x3 stride 1, no max-pool) that every published
    CIFAR number of these methods uses; ViTs get `img_size` and must be divisible by their patch.
    """
    import timm

    if ":" in name:
        if sobel:
            raise InputError(f"sobel=True is for timm's ResNets; let {name} filter its images itself.")
        return own(name, size, **arguments)
    for given, remedy in (("in_chans", "images are RGB, grey ones too; leave it out, or sobel=True for their edges"),
                          ("num_classes", "a backbone has no classifier; leave it out"),
                          ("pretrained", "begin with `weights` in the recipe, a file or a name of zoo.names()")):
        if given in arguments:
            raise InputError(f"{given} {arguments[given]!r} of {name} is impossible: {remedy}.")
    check_name(name)
    base, arguments = as_timm(name, size, **arguments)
    if sobel:
        arguments["in_chans"] = 2
    model = timm.create_model(base, pretrained=False, num_classes=0,
                              pretrained_cfg_overlay={"input_size": (3, size, size)}, **arguments)
    given = getattr(model, "head_hidden_size", model.num_features)
    if given != model.num_features:
        raise InputError(f"{name} gives {given:,} numbers, more than the {model.num_features:,} of its last map, which "
                         "methods and protocols count with; use another backbone, resnet50 for example.")
    if small_stem(model, size):
        model.maxpool = nn.Identity()
        if name not in MINI:  # those are made for small images and keep the stem they have
            _small_image_stem(model)
    if sobel:
        if not hasattr(model, "conv1"):
            raise InputError(f"sobel=True filters what goes into conv1, which {name} does not have; use a ResNet.")
        # A hook has no state: the state dict stays plain timm.
        model.conv1.register_forward_pre_hook(lambda _, inputs: sobel_maps(inputs[0]))
    return model


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """What is built inside has shapes and no numbers, and takes no time. timm is imported before: parts of torch 2.6
    that come with it cannot be imported inside."""
    import timm  # noqa: F401

    with torch.device("meta"):
        yield


def check_name(name: str) -> None:
    """InputError if there is no timm model, and none of MINI, of this name."""
    import timm

    if name not in MINI and not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=10, cutoff=0.5)
        unknown("backbone", name, {*MINI, "resnet50", "vit_base_patch16_224", *near})


def own(name: str, size: int, **arguments) -> nn.Module:
    """A network of the user's own: what the function or class of `my_file.py:my_net`, or `package.module:my_net`, makes
    of `(size, **arguments)`, with fresh weights: an nn.Module, (B, 3, size, size) -> (B, num_features), of which
    `num_features` is an attribute. Errors: InputError."""
    from . import methods

    make = getattr(methods.users_module(name, "Backbone"), name.rpartition(":")[2])
    try:
        inspect.signature(make).bind(size, **arguments)
    except TypeError as error:
        raise InputError(f"Backbone {name!r} is called with the size of the images, {size}, and {arguments}: {error}."
                         ) from None
    net = make(size, **arguments)
    width = getattr(net, "num_features", None)
    if not isinstance(net, nn.Module) or not isinstance(width, int):
        raise InputError(f"Backbone {name!r} gives a {type(net).__name__} whose num_features is {width!r}; it must be "
                         "an nn.Module that says with an int how many features its forward gives an image.")
    net.pretrained_cfg = {**getattr(net, "pretrained_cfg", {}), "input_size": (3, size, size)}
    return net


def as_timm(name: str, size: int, **arguments) -> tuple[str, dict]:
    """timm's name of a backbone, and the arguments that its create_model makes it of. Errors: InputError."""
    base, mini = MINI.get(name, (name, {}))
    arguments = {**mini, **arguments}
    if base.startswith(("vit", "deit", "beit", "swin")):
        patch = arguments.get("patch_size") or _patch_in(base)
        if patch and size % patch:
            raise InputError(f"size {size} cannot be cut into patches of {patch} px for {name}; "
                             f"use {size // patch * patch or patch} or another multiple of {patch}.")
        arguments["img_size"] = size
    if base.startswith("beit"):
        # With "avg", its default, timm has no norm at the end of the tokens: a head's own norm takes its place.
        arguments.setdefault("global_pool", "token")
    return base, arguments


def kind(name: str) -> str:
    """The family of a network: "resnet" of resnet_mini, resnet18 and resnet50, "vit" of vit_small_patch16_224."""
    return re.match("[a-z]*", name)[0]


def carried_over(arguments: Mapping[str, object], old: str, new: str) -> dict[str, object]:
    """Those of a network's arguments that hold for another one too: within a kind all but its shape, else `sobel`."""
    same = kind(old) == kind(new)
    return {name: value for name, value in arguments.items() if name == "sobel" or same and name not in SHAPE}


def small_stem(backbone: nn.Module, size: int) -> bool:
    """Whether a network gets the stem for small images, of which timm knows nothing."""
    import timm

    return size <= SMALL_IMAGE and isinstance(backbone, timm.models.ResNet)


def image_size(backbone: nn.Module) -> int:
    """The side of the images that a backbone was built for."""
    return backbone.pretrained_cfg["input_size"][-1]


def need_vit(backbone: nn.Module, method: str) -> None:
    """One sentence for a method that works on patches and got a backbone without them."""
    if not hasattr(backbone, "patch_embed") or not hasattr(backbone, "cls_token"):
        raise InputError(f"{method} needs a vision transformer, whose patches it can hide, and "
                         f"{type(backbone).__name__} is none; use vit_mini or vit_base_patch16_224, for example.")


def need_absolute_positions(backbone: nn.Module, method: str, rotary: bool = False) -> None:
    """One sentence for a method that drops patches and got a transformer where a patch would lose its place by it.
    `rotary`: positions of that kind may be there too, as where nothing is dropped."""
    need_vit(backbone, method)
    tables = [name for name, _ in backbone.named_parameters() if name.endswith("relative_position_bias_table")]
    turns = getattr(backbone, "rope", None) is not None and not rotary
    if tables or turns or not isinstance(getattr(backbone, "pos_embed", None), Tensor):
        raise InputError(f"{method} drops patches, so it needs absolute positions and no relative or rotary ones, "
                         f"which this {type(backbone).__name__} has; use vit_mini or vit_base_patch16_224, or build a "
                         "Beit with use_abs_pos_emb=True and use_rel_pos_bias=False.")
    places, patches = backbone.pos_embed.shape[1], backbone.patch_embed.num_patches
    if places != 1 + patches:
        raise InputError(f"{method} needs a position for the class token and one for each of the {patches} patches, "
                         f"and this {type(backbone).__name__} has {places} in all; use vit_mini or "
                         "vit_base_patch16_224, for example.")


def _patch_in(name: str) -> int | None:
    """16 from "vit_base_patch16_224"."""
    digits = name.partition("patch")[2].partition("_")[0]
    return int(digits) if digits.isdigit() else None


def _small_image_stem(resnet: nn.Module) -> None:
    if isinstance(resnet.conv1, nn.Sequential):  # a deep stem is 3x3 already
        resnet.conv1[0].stride = (1, 1)
    else:
        old = resnet.conv1
        resnet.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")


def sobel_maps(x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, 2, H, W): the two derivatives of the grey image (the mean of colours), zeros around it."""
    return torch.cat(sobel(x.mean(1, keepdim=True), "constant"), 1)


def sobel(x: Tensor, padding: str) -> tuple[Tensor, Tensor]:
    """Left minus right and above minus below, each smoothed by 1 2 1 across: (B, C, H, W) -> two of the same shape.

    `padding` as in F.pad: "constant" (zeros) or "reflect". Sums of slices, not convolutions, which autocast and TF32
    would round.
    """
    x = F.pad(x, (1, 1, 1, 1), mode=padding)
    down = x[..., :-2, :] + 2 * x[..., 1:-1, :] + x[..., 2:, :]
    across = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    return down[..., :-2] - down[..., 2:], across[..., :-2, :] - across[..., 2:, :]


POOLS = ("model", "mean", "cls")


def features(backbone: nn.Module, x: Tensor, pool: str = "model") -> Tensor:
    """(B, 3, H, W) -> (B, D). pool: "model" (timm's own forward), "mean" (of a ViT's patch tokens), "cls"."""
    if pool not in POOLS:
        unknown("pool", pool, POOLS)
    if pool == "model":
        return backbone(x)
    tokens = backbone.forward_features(x)  # B x (prefix + L) x D, after the final norm
    prefix = backbone.num_prefix_tokens
    return tokens[:, prefix:].mean(1) if pool == "mean" else tokens[:, 0]


def cells(backbone: nn.Module, x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, S², D): the S x S cells of a ResNet or Swin, or the patches of a ViT, row by row."""
    if not hasattr(backbone, "forward_features"):
        raise InputError(f"{type(backbone).__name__} has no forward_features, which gives the map (B, D, h, w) that is "
                         "looked at here; add it, or use another backbone.")
    y = backbone.forward_features(x)
    if y.ndim == 4:
        return y.flatten(1, 2) if getattr(backbone, "output_fmt", "") == "NHWC" else y.flatten(2).transpose(1, 2)
    return y[:, backbone.num_prefix_tokens:]


def last_map(backbone: nn.Module, x: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, D, S, S): the last map of any backbone, a ViT's patches in their places."""
    y = cells(backbone, x)
    side = round(y.shape[1] ** 0.5)
    return y.transpose(1, 2).reshape(len(y), -1, side, side)


def for_maps(backbone: nn.Module) -> nn.Module:
    """The backbone, of which only the last map is wanted: what may come after that (a ConvNeXt's norm) does not learn,
    because processes on GPUs wait for the gradients of all that learns."""
    for name in ("head", "fc_norm"):
        getattr(backbone, name, nn.Identity()).requires_grad_(False)
    return backbone
