"""Weights from elsewhere, in and out.

    zoo.names("byol")                                                # what was published
    backbone, match = zoo.load("byol_resnet50_16xb256-coslr-200e_in1k")
    backbone, match = zoo.load("moco_v2_800ep_pretrain.pth.tar")     # a file that is here already
    print(match)                                                     # where every tensor went
    zoo.sanity(backbone, match)                                      # are those weights of a trained network?
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..backbones import build
from ..errors import InputError
from ..files import expanded
from ..run import Run
from . import layouts, networks
from .download import fetch, verify
from .files import read
from .match import Match, check, fit, tensors
from .models import MODELS, Model, names, of_file
from .sanity import sanity

__all__ = ["MODELS", "Match", "Model", "find", "fresh", "home_of", "load", "names", "network", "sanity"]

OURS = ("backbone.safetensors", "model.safetensors")  # of a run directory, of an exported folder


def load(source: str | Path, backbone: str | None = None, size: int | None = None, **numbers: Any
         ) -> tuple[nn.Module, Match]:
    """The backbone with the weights of a published file (a name of `names()`), of any file by its path, or of a run
    directory or exported folder of ours, and the report.

    `backbone` is a timm name, with `numbers` for backbones.build: needed only where the file does not tell. `size`: of
    the images, if not the file's; positions are resampled then. Never silently partial. Errors: InputError, one
    sentence, if the file cannot be had, read safely or recognised, or does not fill the backbone exactly.
    """
    opened = _open(source)
    name, numbers, native = _network(opened, backbone, numbers, size)
    model = build(name, native, **numbers)
    plain = opened.plain(model if backbone or ":" in name else None)
    taken, match = fit(opened.state, plain, model)
    check(match, str(opened.path), name)
    model.load_state_dict(taken)
    match.backbone, match.numbers, match.size = name, numbers, native
    if opened.row:
        match.notes += [opened.row.note] * bool(opened.row.note)
        if opened.row.layout != match.layout:
            match.notes.append(f"its layout was expected to be: {opened.row.layout}")
    if size and size != native:
        model, changed = networks.resized(model, name, numbers, size)
        match.changed |= dict.fromkeys(changed, f"resampled from {native} to {size} px")
    return model.eval(), match


def network(source: str | Path, backbone: str | None = None, **numbers: Any) -> networks.Network:
    """timm name, numbers and size of the network in a file, without building it. Errors: as in `load`."""
    return _network(_open(source), backbone, numbers, None)


def fresh(name: str, numbers: dict[str, Any], native: int, size: int) -> nn.Module:
    """The same network with fresh weights, for images of `size` px, by what `network` or a Match says."""
    return networks.resized(build(name, native, **numbers), name, numbers, size)[0]


def find(source: str | Path) -> Model | None:
    """The row of a published file, by its name in the zoo or by the name of the file."""
    path = expanded(source)
    return of_file(path.name) if path.is_file() else MODELS.get(str(source))


def home_of(file: str | Path) -> Path | None:
    """The run directory or exported folder that a file of weights belongs to, if its recipe is there."""
    path = expanded(file)
    home = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    ours = path.name in OURS or home != path.parent
    return home if ours and (home / "recipe.json").is_file() else None


@dataclass
class _Opened:
    path: Path
    row: Model | None
    state: dict[str, Tensor]

    def plain(self, model: nn.Module | None = None) -> layouts.Plain:
        wanted = {key: tensor.shape for key, tensor in model.state_dict().items()} if model else None
        return _saying(self.path, layouts.convert, dict(self.state), wanted)


def _open(source: str | Path) -> _Opened:
    path, row = expanded(source), find(source)
    if path.is_dir():
        path = next((path / name for name in OURS if (path / name).is_file()), path)
    if path.is_dir():
        raise InputError(f"{path} holds neither {' nor '.join(OURS)}; give a finished run, an exported folder or a "
                         "file.")
    if path.is_file():
        verify(path, row.checksum if row else "")
    elif not row and path.name != str(source):
        raise InputError(f"There is no file and no run {str(path)!r}; give one that is there, or one of zoo.names().")
    elif not row:
        near = difflib.get_close_matches(str(source), MODELS, n=3, cutoff=0.4)
        raise InputError(f"{str(source)!r} is neither a file nor the name of a published one"
                         f"{'; did you mean ' + ', '.join(near) + '?' if near else '.'} zoo.names() lists them all.")
    elif not row.backbone:
        raise InputError(f"{row.name} is not read here: {row.note.rstrip('.')}; it is at {row.url}.")
    else:
        path = fetch(row)
    return _Opened(path, row, _saying(path, tensors, read(path)))


def _network(opened: _Opened, backbone: str | None, numbers: dict[str, Any], size: int | None) -> networks.Network:
    """From the caller, from a recipe beside the file, from the row of the zoo, or from the tensors themselves."""
    row = opened.row
    if backbone is None and (home := home_of(opened.path)):
        recipe = Run.open(home).recipe
        return recipe.backbone, {**recipe.backbone_numbers, **numbers}, recipe.size
    if row and backbone in (None, row.backbone):
        return row.backbone, {**row.numbers, **numbers}, row.size
    plain = None
    try:  # beside the name: the size they are made for, heads that the layout knows
        plain = opened.plain()
        plain.heads = numbers.get("num_heads", plain.heads)
        name, found, native = _saying(opened.path, networks.recognise, plain)
    except InputError as error:
        if backbone is None or isinstance(error, networks.Ambiguous):
            raise
        return backbone, numbers, plain and networks.size_in(plain) or size or networks.usual_size(backbone)
    return backbone or name, {**(found if backbone in (None, name) else {}), **numbers}, native


def _saying(path: Path, do: Callable, *arguments: Any) -> Any:
    """An error within is one about this file."""
    try:
        return do(*arguments)
    except InputError as error:
        raise type(error)(f"{path} cannot be loaded: {error}.") from None
