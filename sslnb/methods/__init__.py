"""Methods by name, imported only when asked for. `my_file.py:MyMethod` or `package.module:MyMethod` is a name too."""

import importlib
import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

from ..errors import InputError, unknown
from ..files import expanded
from .base import Method

METHODS = {  # name -> file:class, in the order of their years
    "relative_loc": "relative_loc:RelativeLoc",
    "inpainting": "inpainting:Inpainting",
    "rotation": "rotation:Rotation",
    "deepcluster": "deepcluster:DeepCluster",
    "npid": "npid:NPID",
    "odc": "odc:ODC",
    "mocov1": "moco:MoCoV1",
    "simclr": "simclr:SimCLR",
    "mocov2": "moco:MoCoV2",
    "byol": "byol:BYOL",
    "swav": "swav:SwAV",
    "densecl": "densecl:DenseCL",
    "simsiam": "simsiam:SimSiam",
    "barlowtwins": "barlowtwins:BarlowTwins",
    "mocov3": "mocov3:MoCoV3",
    "mae": "mae:MAE",
    "simmim": "simmim:SimMIM",
    "maskfeat": "maskfeat:MaskFeat",
    "cae": "cae:CAE",
    "a2mim": "a2mim:A2MIM",
}


USERS = "sslnb_user_"  # modules of users' files are called so, and a variable of that name says where the file is


class UsersFiles:
    """Finds them in processes that load images and are not forks of this one, as on a Mac: views of one's own are
    looked up there by the name of their module."""

    @staticmethod
    def find_spec(name: str, path=None, target=None):
        file = os.environ.get(name) if name.startswith(USERS) else None
        return importlib.util.spec_from_file_location(name, file) if file else None


sys.meta_path.append(UsersFiles)


def get(name: str) -> type[Method]:
    """The class of a method, by its name or as `file:Class` for one of your own."""
    return getattr(_module(name), METHODS.get(name, name).rpartition(":")[2])


def recipes(name: str) -> dict:
    """The recipes of a method, "demo" first. A file of two methods holds one dictionary for each."""
    found = _module(name).RECIPES
    if not isinstance(found, dict):
        raise InputError(f"RECIPES of {name} is a {type(found).__name__}; write RECIPES = {{\"demo\": …}}.")
    found = next((of for key, of in found.items() if Path(key).name == Path(name).name), found)
    if ":" in name:  # a copy of our file may still name our class, which would be trained in its place
        for key, recipe in found.items():
            if not _same_class(recipe.method, name):
                raise InputError(f"Recipe {key!r} of {name} names another method, {recipe.method!r}; write "
                                 f"method={name!r} in it, or for two methods in one file RECIPES = {{{name!r}: {{…}}, "
                                 "…} with a dictionary for each.")
        found = {key: replace(recipe, method=name) for key, recipe in found.items()}  # as it is reached from here
    return found


def located(name: str) -> str:
    """`my_file.py:MyMethod` with the whole path of the file, which holds from any folder; another name as it is."""
    file, _, part = name.rpartition(":")
    return f"{os.path.abspath(_path(file))}:{part}" if file and _path(file).is_file() else name


def _path(file: str) -> Path:
    return expanded(file if file.endswith(".py") else f"{file}.py")


def _same_class(one: str, other: str) -> bool:
    if ":" in one and Path(one).name == Path(other).name:
        return True
    try:
        return get(one) is get(other)
    except InputError:  # one is no method at all
        return False


def _module(name: str):
    if ":" in name:
        return users_module(name, "Method", "RECIPES")
    if name.endswith(".py"):
        raise InputError(f"Method {name!r}: say which class of the file, as in '{name}:MyMethod'.")
    if name not in METHODS:
        unknown("method", name, METHODS)
    return importlib.import_module("." + METHODS[name].partition(":")[0], __name__)


def users_module(name: str, kind: str, *needed: str):
    """The module that `my_file.py:part` or `package.module:part` names, a `kind` of thing such as "Method", which has
    the part, and what else is `needed`. Errors: InputError."""
    place, _, part = name.rpartition(":")
    path = _path(place)
    if not path.is_file():
        try:
            if place.startswith(".") or not place:
                raise ImportError("which is no name of a module")
            module = importlib.import_module(place)
        except ImportError as error:
            raise InputError(f"{kind} {name!r}: there is no file {path} here and no module {place!r} "
                             f"({error}).") from None
    elif (key := f"{USERS}{path.stem}_{path.stat().st_mtime_ns}") in sys.modules:
        module = sys.modules[key]
    else:  # the time of change is in the key, so an edited cell (%%writefile) is read again
        os.environ[key] = str(path.absolute())
        spec = importlib.util.spec_from_file_location(key, path)
        module = sys.modules[key] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except ImportError as error:
            if "relative import" in str(error):
                raise InputError(f"{path}: {error}; import from the package, as in `from sslnb.methods.base import "
                                 "Method`.") from error
            raise
    for one in (part, *needed):
        if not hasattr(module, one):
            raise InputError(f"{kind} {name!r}: {place} defines no {one}.")
    return module
