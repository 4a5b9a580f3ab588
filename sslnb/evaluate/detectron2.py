"""Weights for detectron2, in the form that MoCo's converter gives them: who has it can run MoCo's configs on a source.

    export(Run.open("runs/mocov2").backbone(), "mocov2.pkl")
    python train_net.py --config-file configs/pascal_voc_R_50_C4_24k_moco.yaml --num-gpus 8 MODEL.WEIGHTS mocov2.pkl
"""

import pickle
import re
from pathlib import Path

from torch import nn

from ..errors import InputError

NAMES = ((r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}"), (r"^(?!res)", "stem."), (r"\bbn(\d)", r"conv\1.norm"),
         (r"downsample\.0", "shortcut"), (r"downsample\.1", "shortcut.norm"))


def export(backbone: nn.Module, file: str | Path) -> Path:
    """Write a timm ResNet with one 7x7 convolution in its stem. Errors: InputError for any other network."""
    if not all(hasattr(backbone, name) for name in ("conv1", "bn1", "layer4")) or not isinstance(
            backbone.conv1, nn.Conv2d) or backbone.conv1.weight.shape[1:] != (3, 7, 7):
        raise InputError(f"detectron2's ResNets begin with a 7x7 convolution on three colours, and this "
                         f"{type(backbone).__name__} does not; export a resnet50 trained on images of more than 64 px.")
    model = {}
    for name, value in backbone.state_dict().items():
        for pattern, new in NAMES:
            name = re.sub(pattern, new, name)
        model[name] = value.detach().cpu().numpy()
    with Path(file).open("wb") as out:
        pickle.dump({"model": model, "__author__": "sslnb", "matching_heuristics": True}, out)
    return Path(file)
