"""Files that survive a crash: whole or as they were before, on the disk when the call returns."""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what the system says of a disk that takes no more


def checksum(path: Path) -> str:
    """First 8 hex digits of the file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


@contextlib.contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """The file is whole or as it was before: the draft that is written here gets its name once it is on the disk."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """UTF-8 wherever we are. Names of files that are no text in it come out with the bytes that they have."""
    with drafted(path) as draft:
        draft.write_bytes(text.encode(errors="surrogateescape"))


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file of a state dict, from any device."""
    from safetensors.torch import save  # not save_file, whose files nobody but their owner may read

    held = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    with drafted(path) as draft:
        draft.write_bytes(save(held, metadata={"format": "pt"}))


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """One row, on a line of its own even if a crash tore the line before; on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
            file.write(b"\n")
        file.write((json.dumps(row) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All rows that are whole."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def os_error(error: BaseException) -> OSError | None:
    """What the system said, if that is what an error is about: torch has words of its own for a full disk."""
    return error if isinstance(error, OSError) else os_error(error.__context__) if error.__context__ else None


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def expanded(path: str | os.PathLike) -> Path:
    """`~` is the home folder. `~x` of an unknown user x, for which Path.expanduser raises, is a folder of that name."""
    return Path(os.path.expanduser(path))


def check_place(out: str | Path) -> None:
    """Whether `out` can be written or made, without making it. Errors: InputError."""
    place = os.path.abspath(expanded(out))
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        raise InputError(f"out {str(out)!r} cannot be a folder, for {place} is none; choose another one.")
    if not os.access(place, os.W_OK):
        raise InputError(f"out {str(out)!r} cannot be written, for this user may not write to {place}; choose another "
                         "folder.")


def check_writable(folder: Path) -> None:
    """Make the folder, if it is not there. Errors: InputError, before any work whose results it could not take."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be a folder for results: {error.strerror}; choose another one.") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder} cannot be written by this user; choose another folder for results.")
