"""The image files below a folder. A long list is kept: to list a million files takes a network disk minutes.

A list is kept in $XDG_CACHE_HOME/sslnb (or ~/.cache/sslnb), never beside the images, and is good for as long as every
folder in it has the number and the times that it had: whoever adds, removes or renames a file changes those of its
folder. So a thousand folders are asked, and not their million files. What cannot be read or written is done without.
"""

import contextlib
import hashlib
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
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
            if any(_stamp(folder / name) != tuple(was) for name, was in zip(names, arrays["stamps"], strict=True)):
                return None
            return Listing(arrays["files"], arrays["owners"], _own(names))
    except Exception:  # on damaged or foreign files numpy raises OSError, ValueError, KeyError, BadZipFile and others
        return None


def subfolders(folder: Path) -> set[str]:
    """Names of the folders in a folder, without hidden ones."""
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")}


def _walk(folder: Path, prefix: str, stamps: dict[str, tuple]) -> list[str]:
    """Paths of all images, unsorted, and in `stamps` every folder; no system call per file."""
    stamps[prefix.rstrip("/")] = _stamp(folder)  # before it is read: a change in between is then seen next time
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith("."):
                found.append(prefix + entry.name)
            elif entry.is_dir() and not entry.name.startswith("."):
                found += _walk(folder / entry.name, f"{prefix}{entry.name}/", stamps)
    return found


def _stamp(folder: Path) -> tuple[int, int, int]:
    """A folder's number and times. Not the first time alone: copying programs set it back when they are done."""
    s = os.stat(folder)
    return s.st_ino % 2**63, s.st_mtime_ns, s.st_ctime_ns


def _own(folders) -> list[str]:
    return sorted(name for name in folders if name and "/" not in name)


def _place(folder: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
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
