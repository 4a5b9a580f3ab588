"""Published files onto this machine: once, whole, and only if they are what they should be."""

import fcntl
import hashlib
import re
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

import torch

from ..errors import InputError
from .models import Model

TIMEOUT = 30  # seconds without a byte
PIECE = 1 << 20


def folder() -> Path:
    """Where torch keeps files of weights, too: TORCH_HOME moves it."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def fetch(model: Model) -> Path:
    """The file of a row of the zoo on this disk, fetched if it is not there; what was cut off is continued.

    Errors: InputError, one sentence with the address and the path where it may be put by hand.
    """
    path = folder() / model.file
    by_hand = f"fetch {model.url} elsewhere and save it as {path}"
    if path.is_file():
        verify(path, model.checksum)
        return path
    direct = urlparse(model.url).scheme in ("http", "https") and Path(urlparse(model.url).path).suffix
    if not direct:
        raise InputError(f"{model.name} is not on this machine, and its address is a page for people; {by_hand}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # several processes may ask for it at once
        if not path.is_file():
            try:
                print(f"{model.name}: fetching {model.url}")
                _append(model.url, file)
            except (OSError, urllib.error.URLError) as error:
                reason = getattr(error, "reason", error)
                had = f" {file.tell():,} bytes are kept and the same call continues;" if file.tell() else ""
                raise InputError(f"{model.name} is not on this machine and cannot be fetched ({reason});{had} "
                                 f"without a network, {by_hand}.") from None
            verify(part, model.checksum, remove=True)
            part.replace(path)
    return path


def _append(url: str, file) -> None:
    """Write what is missing at the end of an open file."""
    file.seek(0, 2)
    request = urllib.request.Request(url, headers={"User-Agent": "sslnb"})
    if file.tell():
        request.add_header("Range", f"bytes={file.tell()}-")
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        whole = re.search(r"/(\d+)$", error.headers.get("Content-Range") or "")
        if error.code != 416:  # nothing after this place
            raise
        if whole and int(whole[1]) == file.tell():
            return
        _emptied(file)
        raise OSError("what was there is longer than the file; it was thrown away") from None
    with answer:
        if "text/html" in (answer.headers.get("Content-Type") or ""):
            _emptied(file)
            raise OSError("the answer was a web page and no weights")
        if answer.status != 206:  # the server has no ranges and sends it all
            _emptied(file)
        expected = file.tell() + int(answer.headers.get("Content-Length") or 0)
        while piece := answer.read(PIECE):
            file.write(piece)
        file.flush()
    if answer.headers.get("Content-Length") and file.tell() != expected:
        raise OSError(f"cut off after {file.tell():,} of {expected:,} bytes")


def _emptied(file) -> None:
    file.seek(0)
    file.truncate()


def verify(path: Path, checksum: str, remove: bool = False) -> None:
    """Errors: InputError if the file's digest does not begin with the digits of "sha256:84784688" or "md5:b251726a".
    `remove` takes the file away then. No checksum, no complaint."""
    kind, _, digits = checksum.partition(":")
    if not digits:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    if not found.startswith(digits):
        if remove:
            path.unlink()
        remedy = "the next call begins anew" if remove else "remove it and fetch it again"
        raise InputError(f"{path} is damaged or another file: its {kind} begins with {found[:len(digits)]} and should "
                         f"begin with {digits}; {remedy}.")
