"""Fit the tensors of a file into a backbone, and say of every one of them where it went."""

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .layouts import REGISTERS, Plain, adapt

# Where files keep the network that evaluation wants; DINO's teacher is the one that its numbers were measured with.
WRAPPERS = ("state_dict", "model", "model_state", "teacher", "backbone", "network", "classy_state_dict", "base_model",
            "trunk", "method", "model_state_dict", "net")
# Parts that a file may have beside the backbone, under names of its own level: never a part of a backbone without them.
BESIDE = re.compile(r"(fc|head|fc_norm)\.|(mask_token|mask_gamma)$"
                    r"|.*(relative_position_index|relative_coords_table|attn_mask)$")


@dataclass
class Match:
    """What became of the tensors of a file: names are the backbone's, `leftover` are the file's own."""

    taken: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)  # the backbone's name -> the file's, if not only the prefix
    changed: dict[str, str] = field(default_factory=dict)  # the backbone's name -> what was done to the numbers
    missing: list[str] = field(default_factory=list)
    misshapen: dict[str, str] = field(default_factory=dict)
    leftover: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)  # of `leftover`: parts of a backbone, but not of this one
    prefix: str = ""
    layout: str = ""
    backbone: str = ""  # for backbones.build, with these
    size: int = 0
    numbers: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.taken)} tensors of the backbone come from the file"
                 + (f", whose names begin with {self.prefix!r}" if self.prefix else "")
                 + (f"; {len(self.renamed)} of them have another name there" if self.renamed else "")]
        if self.layout:
            numbers = "".join(f", {key} {value}" for key, value in self.numbers.items())
            lines.append(f"  layout: {self.layout}; network: {self.backbone} at {self.size} px{numbers}")
        for what in dict.fromkeys(self.changed.values()):
            names = [name for name, change in self.changed.items() if change == what]
            lines.append(f"  {len(names)} changed, {what}: {_some(names)}")
        for what, names in (("not in the file", self.missing), ("not used of the file", self.leftover)):
            if names:
                lines.append(f"  {len(names)} {what}: {_some(names, self.prefix)}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def _some(names: list[str], prefix: str = "") -> str:
    """A few names, or where there are many, the parts that they belong to, each with its number of tensors."""
    if len(names) <= 4:
        return ", ".join(names)
    parts: dict[str, int] = {}
    for name in names:
        known = prefix if name.startswith(prefix) else "module." if name.startswith("module.") else ""
        part = known + name[len(known):].split(".")[0]
        parts[part] = parts.get(part, 0) + 1
    shown = [f"{part} ({count})" for part, count in list(parts.items())[:6]]
    return ", ".join(shown) + (" …" if len(parts) > 6 else "")


def tensors(found: object) -> dict[str, Tensor]:
    """The state dict in what a file holds, inside its usual wrappings. Errors: InputError if there is none."""
    if state := _unwrapped(found):
        return state
    raise InputError("there is no state dict in it: it must hold tensors by name, possibly inside one of "
                     f"{', '.join(WRAPPERS)}")


def _unwrapped(found: object) -> dict[str, Tensor]:
    """{} if there is none. Beside a wrapper may be tensors, such as the best accuracies, but not more than inside it:
    then it is a state dict itself."""
    if not isinstance(found, dict):
        return {}
    flat = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    inner = next((state for name in WRAPPERS if (state := _unwrapped(found.get(name)))), {})
    return flat if len(flat) > len(inner) else inner


def fit(state: dict[str, Tensor], plain: Plain, backbone: nn.Module) -> tuple[dict[str, Tensor], Match]:
    """The part of the file's `state` that is the backbone's, under its names, and the report. Nothing is loaded.

    `plain`: the same file under timm's names, see layouts.convert.
    """
    wanted = {name: tensor.shape for name, tensor in backbone.state_dict().items()}
    adapt(plain, wanted)
    match = Match(prefix=plain.prefix, layout=plain.layout)
    taken = {}
    for name, shape in wanted.items():
        tensor = plain.tensors.get(name)
        if tensor is None:
            if name.endswith("num_batches_tracked"):  # older files lack this count, and nothing is computed from it
                taken[name] = torch.zeros((), dtype=torch.long)
            else:
                match.missing.append(name)
        elif tensor.shape != shape:
            match.misshapen[name] = f"{tuple(tensor.shape)} in the file, {tuple(shape)} in the backbone"
        else:
            taken[name] = tensor
            match.taken.append(name)
            if plain.origin[name] != plain.prefix + name:
                match.renamed[name] = plain.origin[name]
            if name in plain.changed:
                match.changed[name] = plain.changed[name]
    used = {origin for name in match.taken for origin in plain.origin[name].split(", ")}
    match.leftover = [name for name in state if name not in used]
    parts = {name.split(".")[0] for name in wanted} | {"pos_embed", "rel_pos_bias", "norm", "cls_token", *REGISTERS}
    match.foreign = [name for name in plain.tensors
                     if name not in wanted and name.split(".")[0] in parts and not BESIDE.match(name)]
    return taken, match


def check(match: Match, file: str, backbone: str) -> None:
    """Errors: InputError unless every tensor of the backbone was found in the right shape, and the file has no more of
    such a network, of which a part would be loaded in silence."""
    if lost := next((name for name in match.foreign if name in REGISTERS), None):  # first: no shape is to blame
        import timm

        near = timm.list_models(re.sub(r"(_patch\d+).*|$", r"\1_reg*", backbone, count=1))
        raise InputError(f"{file} has register tokens ({lost}), and {backbone} has no place for them; give the "
                         f"backbone that it was trained with{', such as ' if near else ''}{' or '.join(near)}.")
    if match.misshapen:
        name, what = next(iter(match.misshapen.items()))
        sobel = what.startswith("(64, 2,")
        stem = " A first convolution of 2 channels sees Sobel maps: give sobel=True." if sobel else ""
        raise InputError(f"{file} does not fit {backbone}: {len(match.misshapen)} tensors have another shape, "
                         f"{name} is {what}.{stem}")
    if match.missing:
        raise InputError(f"{file} does not fill {backbone}: {len(match.missing)} of "
                         f"{len(match.missing) + len(match.taken)} tensors are missing, such as {match.missing[0]}; "
                         f"the file has names such as {', '.join(match.leftover[:2]) or 'none more'}.")
    if match.foreign:
        raise InputError(f"{file} is of a larger network than {backbone}: {len(match.foreign)} of its tensors would be "
                         f"lost, such as {match.foreign[0]}; give the backbone that it was trained with.")
