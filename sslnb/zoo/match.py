"""Fit the tensors of a file into a backbone, and say of every one of them where it went."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import InputError

# Where files keep the network that evaluation wants. Query and key encoder, online and target network often lie in one
# file: the first of each pair is the one that published numbers were measured with.
WRAPPERS = ("state_dict", "model", "model_state", "teacher", "backbone", "network")
PREFIXES = ("", "backbone.", "module.encoder_q.", "module.base_encoder.", "module.encoder.", "module.backbone.",
            "module.", "encoder_q.", "base_encoder.", "encoder.", "online_backbone.", "model.", "model.backbone.")
HEADS = ("fc.", "head.", "fc_norm.")  # of classifiers: never a part of a backbone


@dataclass
class Match:
    """What became of the tensors of a file: names are the backbone's, `leftover` are the file's own."""

    taken: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)  # the backbone's name -> the file's
    changed: dict[str, str] = field(default_factory=dict)  # the backbone's name -> what was done to the numbers
    missing: list[str] = field(default_factory=list)
    misshapen: dict[str, str] = field(default_factory=dict)
    leftover: list[str] = field(default_factory=list)
    prefix: str = ""

    def __str__(self) -> str:
        lines = [f"{len(self.taken)} tensors of the backbone come from the file"
                 + (f", whose names begin with {self.prefix!r}" if self.prefix else "")
                 + (f"; {len(self.renamed)} of them have another name there" if self.renamed else "")]
        lines += [f"  {name}: {what}" for name, what in self.changed.items()]
        for what, names in (("not in the file", self.missing), ("not used of the file", self.leftover)):
            if names:
                lines.append(f"  {len(names)} {what}: {', '.join(names[:4])}{' …' if len(names) > 4 else ''}")
        return "\n".join(lines)


def tensors(found: object) -> dict[str, Tensor]:
    """The state dict in what a file holds, inside its usual wrappings. Errors: InputError if there is none."""
    while isinstance(found, dict):
        flat = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        inner = next((found[name] for name in WRAPPERS if isinstance(found.get(name), dict)), None)
        if inner is None or len(flat) > 1:
            break
        found = inner
    if not isinstance(found, dict) or not any(isinstance(value, Tensor) for value in found.values()):
        raise InputError("There is no state dict in the file: it must hold tensors by name, possibly inside one of "
                         f"{', '.join(WRAPPERS)}.")
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def fit(state: dict[str, Tensor], backbone: nn.Module) -> tuple[dict[str, Tensor], Match]:
    """The part of `state` that is the backbone's, under its names, and the report.

    The prefix is the one under which most names and shapes agree. Nothing is loaded.
    """
    wanted = {name: tensor.shape for name, tensor in backbone.state_dict().items()}

    def agreeing(prefix: str) -> int:
        return sum(name in wanted and wanted[name] == tensor.shape for name, tensor in _below(state, prefix).items())

    prefix = max(PREFIXES, key=agreeing)
    inside = _below(state, prefix)
    match = Match(prefix=prefix)
    taken = {}
    for name, shape in wanted.items():
        if name not in inside:
            if name.endswith("num_batches_tracked"):  # older files lack this count, and nothing is computed from it
                taken[name] = torch.zeros((), dtype=torch.long)
            else:
                match.missing.append(name)
        elif inside[name].shape != shape:
            match.misshapen[name] = f"{tuple(inside[name].shape)} in the file, {tuple(shape)} in the backbone"
        else:
            taken[name] = inside[name]
            match.taken.append(name)
    used = {prefix + name for name in match.taken}
    match.leftover = [name for name in state if name not in used]
    return taken, match


def check(match: Match, file: str, backbone: str) -> None:
    """Errors: InputError unless every tensor of the backbone was found in the right shape."""
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


def _below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix):]: tensor for name, tensor in state.items() if name.startswith(prefix)}
