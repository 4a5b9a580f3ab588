"""BYOL's official weights: a pickle of JAX arrays in Haiku's containers, read without JAX and without trust.

A pickle may ask for any function by name and call it. This reader hands out what arrays of numbers are made of and
nothing else that is real; for names of JAX's libraries and of BYOL's own code it hands out a Record, which keeps what
it is given and does nothing. So no library is imported for a file, and no function of one is called.

The state that BYOL's code saves (byol_experiment.py; by dill, in checkpointing.py) has, in this order, online_params,
target_params, online_state, target_state, opt_state: the first group of weights and the first of statistics belong to
the online network. Haiku's containers are pickled as their class, called with a plain dict (data_structures.py).
"""

import pickle
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError


class Record:
    """Takes the place of any object of the libraries in STAND_INS: it keeps what it is made of."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Record":
        record = super().__new__(cls)
        record.parts = [*args, kwargs]
        return record

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.parts.append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.parts.append({key: value})

    def append(self, value: Any) -> None:
        self.parts.append(value)


def latin1(text: str, encoding: str) -> bytes:
    """How older pickles write bytes; the real function, _codecs.encode, would decompress as well."""
    if encoding != "latin1" or not isinstance(text, str):
        raise pickle.UnpicklingError(f"the encoding {encoding!r}")
    return text.encode(encoding)


def scalar(dtype: np.dtype, data: bytes = b"") -> Any:
    """A number. An object instead of one would be a pickle inside the pickle."""
    if not isinstance(dtype, np.dtype) or dtype.hasobject or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a scalar that is no number")
    return np.frombuffer(data, dtype)[0]


def array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """The empty array that a pickle fills afterwards."""
    return np.ndarray((0,), np.int8)


# dill, with which BYOL's code saves, writes some of this in its own words: named tuples by their fields, functions as
# the attribute of a module, in later versions whole arrays. Its words are understood here; dill is not.


def named_tuple(name: str, fields: Any, module: str) -> type[Record]:
    return Record


class Module(str):
    """The name of a module, which is not imported."""

    def __new__(cls, name: str, safe: bool = False) -> "Module":
        return super().__new__(cls, name)


def attribute(module: Module, name: str) -> Any:
    if not isinstance(module, Module) or not isinstance(name, str):
        raise pickle.UnpicklingError(f"the attribute {name!r} of something that is no module")
    return resolve(module, name)


def whole_array(make: Any, arguments: Any, state: Any, attributes: Any = None) -> np.ndarray:
    empty = array(*arguments)  # whatever it was that should have made it
    empty.__setstate__(state)
    return empty


REAL = {("collections", "OrderedDict"): OrderedDict, ("numpy", "dtype"): np.dtype, ("numpy", "ndarray"): np.ndarray,
        ("_codecs", "encode"): latin1, ("dill._dill", "_create_namedtuple"): named_tuple,
        ("dill._dill", "_import_module"): Module, ("dill._dill", "_get_attr"): attribute,
        ("dill._dill", "_create_array"): whole_array}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray",
                "numpy.core._multiarray_umath", "numpy._core._multiarray_umath"):
    REAL |= {(_module, "scalar"): scalar, (_module, "_reconstruct"): array}
STAND_INS = ("byol", "haiku", "jax", "jaxlib", "optax")


def resolve(module: str, name: str) -> Any:
    """What a pickle gets for a name."""
    if (module, name) in REAL:
        return REAL[module, name]
    if module.partition(".")[0] in STAND_INS:
        return Record
    raise pickle.UnpicklingError(f"{module}.{name}")


class Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return resolve(module, name)


def read(path: Path) -> dict[str, torch.Tensor]:
    """The online network's tensors by Haiku's names, such as "resnet/~/block_group_0/~/block_0/~/conv_0/w", kernels as
    they are there, HWIO. Errors: InputError, one sentence."""
    try:
        with open(path, "rb") as file:
            found = Unpickler(file).load()
    except pickle.UnpicklingError as error:
        if "truncated" in str(error) or "ran out" in str(error):
            raise InputError(f"{path} is truncated; fetch it again.") from None
        raise InputError(f"{path} asks for {error}, and a file of weights may have numbers, BYOL's own containers and "
                         "nothing else; do not open it with anything that trusts it.") from None
    except Exception as error:  # whatever a damaged pickle makes of its own containers
        raise InputError(f"{path} is truncated or damaged ({type(error).__name__}); fetch it again.") from None
    groups = list(_groups(found))
    weights = next((group for group in groups if any("initial_conv" in name for name in group)), None)
    means = next((group for group in groups if any("mean_ema" in name for name in group)), None)
    if not weights or not means:
        raise InputError(f"{path} is a pickle, but not BYOL's: it has no weights with BatchNorm statistics under "
                         "Haiku's names.")
    state = {f"{module}/{name}": value for module, tensors in weights.items() for name, value in tensors.items()}
    # Statistics keep a running sum and the average that is corrected for its start from zero: the network uses that.
    state |= {module: tensors["average"] for module, tensors in means.items() if "average" in tensors}
    return {name: torch.from_numpy(np.array(value)) for name, value in state.items()}


def _groups(found: Any) -> Iterator[dict[str, dict[str, np.ndarray]]]:
    """Every mapping of a module's name to its tensors, in the order of the file."""
    if isinstance(found, Record):
        found = found.parts
    if isinstance(found, dict):
        group = {key: dict(_flat(value)) for key, value in found.items() if isinstance(key, str) and "/" in key}
        if group:
            yield group
            return
        found = list(found.values())
    if isinstance(found, list | tuple):
        for part in found:
            yield from _groups(part)


def _flat(found: Any) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(found, Record):
        found = found.parts
    if isinstance(found, dict):
        for key, value in found.items():
            if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
                yield str(key), value
            else:
                yield from _flat(value)
    elif isinstance(found, list | tuple):
        for part in found:
            yield from _flat(part)
