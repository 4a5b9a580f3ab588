"""Weights from elsewhere, in and out.

    backbone, match = zoo.load("moco_v2_800ep_pretrain.pth.tar", "resnet50")
    print(match)
"""

from pathlib import Path
from typing import Any

from torch import nn

from ..backbones import build
from .files import read
from .match import Match, check, fit, tensors

__all__ = ["Match", "load"]


def load(file: str | Path, backbone: str, size: int = 224, **numbers: Any) -> tuple[nn.Module, Match]:
    """The backbone (a timm name, with `numbers` for backbones.build) with the weights of a file, and the report.

    Never silently partial. Errors: InputError if the file cannot be read safely, or does not fill the backbone.
    """
    model = build(backbone, size, **numbers)
    taken, match = fit(tensors(read(file)), model)
    check(match, str(file), backbone)
    model.load_state_dict(taken)
    return model.eval(), match
