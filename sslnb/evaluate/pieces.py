"""Frozen features of many images by several processes, in pieces of files: what is there already is not computed again.

    python -m sslnb.evaluate.pieces JOB 3 8      the 4th of 8 processes; evaluate(processes=8) starts all of a machine

Processes need not talk to each other, so a job's pieces may be computed on any machines that share the folder. Two
evaluations may write the same file: each writes in a folder of its own and moves it in when it is whole.
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from ..data import Images, load
from ..errors import InputError
from ..files import checksum, save_tensors, write_atomic
from ..launch import limit_threads
from ..nodes import contents
from ..notebook import TimeLeft
from ..reading import loader_workers
from .features import Features, extract, joined
from .sources import Source, open_source

PIECE = 20_000


@dataclass(frozen=True)
class Job:
    """One network and one set of images, by names that another process can open; `piece`: images of a file."""

    source: str
    backbone: str | None
    seed: int
    fresh: bool
    size: int
    pool: str
    data: str
    split: str
    piece: int


def features_by_pieces(source: Source, network: nn.Module, images: Images, size: int, seed: int, folder: Path,
                       processes: int, device: str = "auto") -> Features:
    """Features of all images, in their order. Pieces lie in `folder`/features/…, the same for the same job.

    `network`: the source's, or one like it with weights of its own, which are handed over in a file.
    Errors: InputError if the images cannot be loaded by their name or features are not finite, RuntimeError if a
    process fails.
    """
    job = Job(source.origin, source.given, seed, source.fresh_weights, size, source.pool, images.name, images.split,
              PIECE)
    these = contents(images)
    if contents(load(job.data, job.split)) != these:
        raise InputError(f"{job.data} ({job.split}) loads other images than those that are evaluated, and other "
                         "processes load them by name; give the name or the path of the whole set, or processes=1.")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as apart:
        save_tensors(weights := Path(apart, "weights.safetensors"), network.state_dict())
        said = json.dumps({**vars(job), "weights": checksum(weights), **these})
        place = folder / "features" / hashlib.sha256(said.encode()).hexdigest()[:10]
        place.mkdir(parents=True, exist_ok=True)
        weights.replace(place / weights.name)
        write_atomic(told := Path(apart, "job.json"), said)
        told.replace(place / told.name)
    pieces = [_piece(place, n) for n in range(_count(job, images))]
    if not all(piece.exists() for piece in pieces):
        _start(place, min(processes, len(pieces)), device, pieces)
    return joined(images, map(_read, pieces), len(images), source=source.name)


def _read(piece: Path) -> tuple[Tensor, list[int], list[str]]:
    from safetensors.torch import load_file

    part = load_file(piece)
    return part["x"], part["index"].tolist(), json.loads(piece.with_suffix(".json").read_text())


def _start(place: Path, processes: int, device: str, pieces: Sequence[Path]) -> None:
    """All processes of this machine, each with a GPU of its own if there are any."""
    def done() -> int:
        return sum(piece.exists() for piece in pieces)

    told = TimeLeft(f"Features by {processes} processes: pieces", len(pieces), done())
    visible, count, children = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count(), []
    gpus = visible.split(",") if visible else [str(n) for n in range(count)]  # on a shared machine not all are ours
    for rank in range(processes):
        own = {"CUDA_VISIBLE_DEVICES": gpus[rank % len(gpus)]} if count else {}
        command = [sys.executable, "-m", "sslnb.evaluate.pieces", str(place), str(rank), str(processes), device]
        children.append(subprocess.Popen(command, env={**os.environ, **own}, stderr=subprocess.PIPE, text=True))
    try:
        errors = [_last_words(child, lambda: told(done())) for child in children]
    except BaseException:
        for child in children:
            child.kill()
        raise
    for child, error in zip(children, errors, strict=True):
        if child.returncode:
            said = error.strip().split("\n")[-1]
            raise RuntimeError(f"A process that computes features ended with code {child.returncode}: {said}. What is "
                               f"done lies in {place}; the same command continues.")


def _last_words(child: subprocess.Popen, meanwhile: Callable[[], None]) -> str:
    """What a process says on stderr until it ends."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return child.communicate(timeout=5)[1]
        meanwhile()


def compute(place: Path, rank: int, processes: int, device: str) -> None:
    """The pieces of one process that are not there yet."""
    from safetensors.torch import load_file

    said = json.loads((place / "job.json").read_text())
    job = Job(**{name: said[name] for name in Job.__dataclass_fields__})
    images = load(job.data, job.split)
    mine = [n for n in range(_count(job, images)) if n % processes == rank and not _piece(place, n).exists()]
    if not mine:
        return
    limit_threads(processes)
    source = open_source(job.source, job.seed, job.backbone)
    network = (source.fresh if job.fresh else source.backbone)(job.size)
    network.load_state_dict(load_file(place / "weights.safetensors"))
    for n in mine:
        part = images.subset(range(n * job.piece, min(len(images), (n + 1) * job.piece)))
        found = extract(network, part, size=job.size, pool=job.pool, device=device,
                        workers=loader_workers("auto", part, processes))
        with TemporaryDirectory(dir=place) as apart:
            save_tensors(piece := Path(apart, "x"), {"x": found.x, "index": found.index + n * job.piece})
            write_atomic(broken := Path(apart, "broken"), json.dumps(found.broken))
            broken.replace(_piece(place, n).with_suffix(".json"))
            piece.replace(_piece(place, n))  # last: a piece that is there is whole


def _count(job: Job, images: Images) -> int:
    return -(-len(images) // job.piece)


def _piece(place: Path, n: int) -> Path:
    return place / f"piece-{n:05d}.safetensors"


if __name__ == "__main__":
    compute(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
