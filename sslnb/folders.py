"""The image files below a folder. A long list is kept: to list a million files takes a network disk minutes.

A list is kept in $XDG_CACHE_HOME/sslnb (or ~/.cache/sslnb), never beside the images, and is good for as long as every
folder in it has the number and the times that it had: whoever adds, removes or renames a file changes those of its
folder. So a thousand folders are asked, and not their million files. What cannot be read or written is done without.
"""

import contextlib
import errno
import hashlib
import os
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import InputError
from .files import expanded

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
HIDDEN = (".", "__MACOSX", "lost+found")  # so begin the names of what is neither an image nor a folder of images
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
          "testing": "test"}  # the first ones are preferred
LONG = 20_000  # images: a shorter list is quicker made than missed
SETTLED = 3 * 10**9  # ns: the times of some file systems are that coarse, so a younger change may hide a second one


@dataclass(frozen=True)
class Listing:
    """`files` (N,) bytes: paths from the folder, sorted, none hidden. `owners` (N,): which of `folders`, the folder's
    own subfolders, each lies in; -1 if in none."""

    files: np.ndarray
    owners: np.ndarray
    folders: list[str]


def listing(folder: Path) -> Listing:
    """All images below a folder; kept, if they are many and nothing there changed just now."""
    found = kept(folder)
    if found is not None:
        return found
    now, stamps = time.time_ns(), {}
    files = sorted(_walk(folder, "", stamps))
    number = {name: k for k, name in enumerate(_own(stamps))}
    owners = np.array([number[file.partition("/")[0]] if "/" in file else -1 for file in files], dtype=np.int32)
    found = Listing(np.array([os.fsencode(file) for file in files]), owners, list(number))
    if len(files) > LONG and max(max(times) for _, *times in stamps.values()) < now - SETTLED:
        _keep(folder, found, stamps)
    return found


def kept(folder: Path) -> Listing | None:
    """What an earlier call has kept, unless a folder has changed since."""
    try:
        with np.load(_place(folder)) as arrays:
            names = [os.fsdecode(name) for name in arrays["folders"]]
            stamps = dict(zip(names, arrays["stamps"], strict=True))
            if any(_stamp(os.stat(folder / name)) != tuple(was) for name, was in stamps.items()):
                return None
            return Listing(arrays["files"], arrays["owners"], _own(names))
    except Exception:  # on damaged or foreign files numpy raises OSError, ValueError, KeyError, BadZipFile and others
        return None


def subfolders(folder: Path) -> set[str]:
    """Names of the folders in a folder, without hidden ones."""
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if _is_folder(entry)}


def layout(folder: Path, found: Listing | None = None) -> tuple[dict[str, str], list[str]]:
    """Which subfolders are splits by their names, as {"train": "Train", "val": "valid"}, and which others there are.

    Only those with images count. Others are not looked for if there are none of these, or train and one to test with.
    """
    names = found.folders if found else sorted(subfolders(folder)) if folder.is_dir() else []
    order = list(SPLITS)
    named = sorted((name for name in names if name.lower() in SPLITS), key=lambda name: order.index(name.lower()))
    parts = {SPLITS[name.lower()]: name for name in reversed(with_images(folder, named))}
    if not parts or parts.keys() > {"train"}:
        return parts, []
    return parts, with_images(folder, [name for name in names if name.lower() not in SPLITS])


def check_classes(folder: Path, found: Listing, parts: dict[str, str], others: list[str]) -> None:
    """InputError if these may be splits: one called train/ is a class only among several without folders in them."""
    # Of two, the other one may be what was held out; and whoever trains on that is never told.
    if parts and (len(others) == 1 or any(file.count(b"/") > 1 for file in found.files.tolist())):
        raise InputError(f"{folder} has {min(parts.values())}/ beside {others[0]}/, which may be splits or classes: "
                         "call splits train/ and val/ (or test/), move classes into a folder train/, or load one of "
                         "the folders.")


def with_images(folder: Path, names: Collection[str]) -> list[str]:
    """Those of these subfolders in which an image is, at any depth. Nothing is read after the first one."""
    above = (_identity(os.stat(folder)),) if names else ()
    return [name for name in names if _has_images(folder / name, above)]


def _has_images(folder: Path, above: tuple) -> bool:
    here, below = _identity(os.stat(folder)), []
    if here in above:
        return False
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_image(entry):
                return True
            if _is_folder(entry):
                below.append(entry.name)
    return any(_has_images(folder / name, (*above, here)) for name in below)


def _walk(folder: Path, prefix: str, stamps: dict[str, tuple], above: tuple = ()) -> list[str]:
    """Paths of all images, unsorted, and in `stamps` every folder; no system call per file."""
    found, stat = [], os.stat(folder)  # before it is read: a change in between is then seen next time
    if _identity(stat) in above:
        return []  # a link to a folder that it lies in, whose images are there already
    stamps[prefix.rstrip("/")], above = _stamp(stat), (*above, _identity(stat))
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_image(entry):
                found.append(prefix + entry.name)
            elif _is_folder(entry):
                found += _walk(folder / entry.name, f"{prefix}{entry.name}/", stamps, above)
    return found


def _is_image(entry: os.DirEntry) -> bool:
    """By its name. Folders may be called "a.jpg" too; what a link leads to is not asked, which takes a system call."""
    return (entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith(HIDDEN)
            and not entry.is_dir(follow_symlinks=False))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return not entry.name.startswith(HIDDEN) and entry.is_dir()
    except OSError as error:
        if error.errno != errno.ELOOP:  # else a link to itself, which leads to nothing
            raise
        return False


def _identity(s: os.stat_result) -> tuple[int, int]:
    return s.st_dev, s.st_ino


def _stamp(s: os.stat_result) -> tuple[int, int, int]:
    """A folder's number and times. Not the first time alone: copying programs set it back when they are done."""
    return s.st_ino % 2**63, s.st_mtime_ns, s.st_ctime_ns


def _own(folders) -> list[str]:
    return sorted(name for name in folders if name and "/" not in name)


def _place(folder: Path) -> Path:
    cache = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    said = repr((EXTENSIONS, os.path.abspath(folder))).encode(errors="surrogateescape")
    return cache / "sslnb" / f"images-{hashlib.sha256(said).hexdigest()[:16]}.npz"


def _keep(folder: Path, found: Listing, stamps: dict[str, tuple]) -> None:
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        place = _place(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as draft:
            np.savez(Path(draft, place.name), files=found.files, owners=found.owners,
                     folders=[os.fsencode(name) for name in stamps], stamps=np.array(list(stamps.values()), np.int64))
            os.replace(Path(draft, place.name), place)  # whole, also if several processes do this at once
