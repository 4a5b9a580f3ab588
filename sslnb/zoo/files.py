"""Weights out of files, safely: nothing that a file says is ever executed.

Pickles are read by torch's `weights_only` unpickler, which makes tensors and plain values alone. Files of OpenMMLab and
of official repositories also hold a few objects that say how they were made; ALLOWED and DICTIONARIES name them, and
stand-ins without behaviour take their place: nothing by these names is imported or called. Whatever else a file asks
for is refused, and the sentence says what it was. BYOL's JAX file is no torch file; haiku.py reads it by the same rule.
"""

import importlib
import pickle
import re
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..files import expanded


class StandIn:
    """Takes the place of an object that nobody needs: it swallows what it is made of."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Metadata in published files: how a run was logged or configured, never a tensor. Each by the name that pickle uses.
ALLOWED = (
    "mmengine.logging.history_buffer.HistoryBuffer", "mmengine.config.config.Config", "mmcv.utils.config.Config",
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata",
                                       "base.Metadata", "nodes.AnyNode", "nodes.StringNode", "nodes.IntegerNode",
                                       "nodes.FloatNode", "nodes.BooleanNode")),
    # A HistoryBuffer is pickled with its statistics, methods of the class: pickle asks for them by getattr. The
    # stand-in that it gets looks nothing up. The others are named as types in omegaconf's metadata.
    "builtins.getattr", "builtins.list", "builtins.dict", "builtins.int", "typing.Any", "collections.defaultdict",
)
# Dictionaries with manners of their own, which become plain ones: torch's unpickler fills no other kind. SimMIM's
# official code saves a CfgNode beside the weights.
DICTIONARIES = ("yacs.config.CfgNode", "addict.addict.Dict", "mmcv.utils.config.ConfigDict",
                "mmengine.config.config.ConfigDict")


def _allowed() -> list:
    import numpy as np

    multiarray = importlib.import_module("numpy._core.multiarray")  # no attribute of numpy 1
    numbers = [np.dtype, *(type(np.dtype(t)) for t in ("f2", "f4", "f8", "i4", "i8", "u1", "?"))]
    for name in ("numpy._core.multiarray", "numpy.core.multiarray"):
        numbers += [(multiarray.scalar, f"{name}.scalar"), (multiarray._reconstruct, f"{name}._reconstruct")]
    return [Namespace, np.ndarray, *numbers, *((StandIn, name) for name in ALLOWED),
            *((OrderedDict, name) for name in DICTIONARIES)]


def read(path: str | Path) -> Any:
    """What a file of weights holds: a state dict, or a dictionary around one. Tensors are on the CPU.

    Errors: InputError, one sentence, for a file that is missing, truncated, a web page, a pointer to a file, or that
    needs more than tensors and plain values.
    """
    path = expanded(path)
    if not path.is_file():
        raise InputError(f"There is no file {str(path)!r}.")
    with open(path, "rb") as file:
        head = file.read(200).lstrip()
    if not head:
        raise InputError(f"{path} is empty; fetch it again.")
    if head[:1] == b"<" or b"<html" in head.lower():
        raise InputError(f"{path} is a web page and no weights: the download was answered with one; open its URL in a "
                         "browser and save the file itself.")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(f"{path} is a Git LFS pointer and no weights; run `git lfs pull` where it came from.")
    if path.suffix == ".pkl" and head.startswith(b"\x80"):
        from . import haiku

        return haiku.read(path)
    allowed = _allowed()
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if not wanted:
            raise InputError(f"{path} is no file of weights that torch can read; was it fetched completely?") from None
        raise InputError(f"{path} wants {wanted[1]} to be called while it is read, and a file of weights must not call "
                         "anything; ask its author for tensors alone, or save its state dict as safetensors in an "
                         "environment you can afford to lose.") from None
    except Exception as error:  # zip, safetensors and torch each have errors of their own for damaged files
        raise InputError(f"{path} is truncated or damaged ({_first_line(error)}); fetch it again.") from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].split(". ")[0]
