"""Clocks for notebooks/throughput.ipynb: everything side by side, in turns, with the floor that no code can beat.

And scales: what memory a step needs, each in a process of its own.
"""

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .backbones import shapes_only
from .data import load
from .errors import InputError, unknown
from .evaluate.features import the_device
from .launch import DTYPES
from .reading import EpochSampler, ViewSet
from .recipes import Recipe
from .views import Views


def choose_device(device: str) -> str:
    """Where all that follows is measured, in this process and in those it starts: "auto", "cpu" or "cuda" -> which.

    A GPU is hidden rather than left out, so it must be chosen before anything has used the GPU. Errors: InputError.
    """
    if device not in ("auto", "cpu", "cuda"):
        unknown("device", device, ("auto", "cpu", "cuda"))
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    found = the_device("auto")
    if device not in ("auto", found):
        remedy = "restart the kernel and choose the device first" if found == "cuda" else "use 'auto' or 'cpu'"
        raise InputError(f"device {device!r} cannot be had here, only {found!r}; {remedy}.")
    return found


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of the rounds, the fastest and the slowest."""

    median: float
    low: float
    high: float


def in_turns(cases: Mapping[str, Callable[[], object]], rounds: int = 5, row: int = 1) -> dict[str, Timing]:
    """Time each case once per round, one after the other, so that a busy moment of the machine hits all alike.

    A first round does not count: it fills caches and finds algorithms. `row` calls are timed together, as a trainer
    makes its steps: a GPU is then still busy with one while Python prepares the next.
    """
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for n in range(rounds + 1):
        for name, call in cases.items():
            wait()
            start = time.perf_counter()
            for _ in range(row):
                call()
            wait()
            if n:
                taken[name].append((time.perf_counter() - start) / row)
    return {name: Timing(statistics.median(t), min(t), max(t)) for name, t in taken.items()}


def wait() -> None:
    """For what a GPU has been given to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---------------------------------------------------------------- floors


def matmul_rate(precision: str = "fp32", device: str = "auto", n: int = 0) -> float:
    """Floating-point operations per second of a product of two n x n matrices, the best of a few; 0: large enough."""
    device = the_device(device)
    n = n or (8192 if device == "cuda" else 2048)
    a, b = (torch.randn(n, n, device=device, dtype=DTYPES[precision]) for _ in range(2))
    return 2 * n**3 / in_turns({"product": lambda: a @ b}, 7)["product"].low


def copy_rate(device: str = "auto", megabytes: int = 0) -> float:
    """Bytes per second that are read and written by a copy, the best of a few; 0: more than fits into any cache."""
    device = the_device(device)
    megabytes = megabytes or (1024 if device == "cuda" else 64)
    a = torch.empty(megabytes * 2**20, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * len(a) / in_turns({"copy": lambda: b.copy_(a)}, 7)["copy"].low


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of a call, as torch counts them: products and convolutions, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


# ---------------------------------------------------------------- what is timed


def photo_files(folder: str | Path, count: int = 32, shape: tuple[int, int] = (500, 375)) -> list[Path]:
    """JPEG files of ImageNet's usual size: four of the embedded photographs on each, as rich in detail as any."""
    photos, folder = load("photos"), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for i in range(count):
        sheet, (width, height) = Image.new("RGB", shape), (-(-shape[0] // 2), -(-shape[1] // 2))
        for n in range(4):
            sheet.paste(photos[(i + 3 * n) % len(photos)].resize((width, height)), (n % 2 * width, n // 2 * height))
        files.append(folder / f"{i:04d}.jpg")
        sheet.save(files[-1], quality=90)
    return files


def loading(folder: str | Path, views: Views, batch: int = 64) -> Callable[[], object]:
    """All images of a folder from file to normalised views, through the loader, in this process."""
    images = load(Path(folder))

    def epoch() -> None:
        order = EpochSampler(len(images), min(batch, len(images)))
        for crops, _, seeds, _ in torch.utils.data.DataLoader(ViewSet(images, views), batch_sampler=order):
            views.photometric([x.to(the_device("auto")) for x in crops], seeds)
    return epoch


def loading_with(transform: Callable, folder: str | Path, batch: int = 64) -> Callable[[], object]:
    """The same with a transform from PIL image to tensors in the dataset, as lightly and others do it."""
    files = sorted(Path(folder).iterdir())

    class Transformed(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, i: int):
            with Image.open(files[i]) as image:
                return transform(image.convert("RGB"))

    return lambda: [None for _ in torch.utils.data.DataLoader(Transformed(), batch_size=batch)]


# ---------------------------------------------------------------- memory


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step, beyond what Python and PyTorch hold by themselves: {batch: bytes}."""

    peaks: dict[int, int]

    @property
    def line(self) -> tuple[float, float]:
        """(bytes per image, fixed part) of the straight line through the peaks, by least squares."""
        per_image, fixed = np.polyfit(list(self.peaks), list(self.peaks.values()), 1)
        return float(per_image), float(fixed)


def memory(recipes: Mapping[str, Recipe], batches: Sequence[int] = (16, 32, 64, 128)) -> dict[str, Memory]:
    """Weigh the training step of each recipe at each batch, in the recipe's precision: memory of the GPU if there is
    one, else of the process.

    Every measurement has a process to itself, in which glibc returns large blocks at once: what it would otherwise keep
    for later makes half as much again of what is needed, or nothing, as it happens.
    With few images the optimizer's step may be the peak, for it has numbers of its own: there the line bends.
    Errors: InputError for what does not fit into a GPU.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what this process holds in stock the others cannot have
    cases = [r.with_(batch=batch, gpus=1, accum=1) for r in recipes.values() for batch in batches]
    found = subprocess.run([sys.executable, "-c", "from sslnb.bench import _weigh; _weigh()"], text=True, check=True,
                           env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}, stdout=subprocess.PIPE,
                           input="\n".join(json.dumps(r.to_json()) for r in cases)).stdout
    peaks = iter(int(line) for line in found.split())
    weighed = {name: Memory({batch: next(peaks) for batch in batches}) for name in recipes}
    for name, m in weighed.items():
        for batch, most in m.peaks.items():
            if not most:
                raise InputError(f"{name}: a step in {recipes[name].precision} with {batch} images of "
                                 f"{recipes[name].size} px does not fit into this GPU; weigh smaller batches.")
    return weighed


def peak(cuda: bool) -> int:
    """The most bytes this process has held so far, of the GPU or of main memory."""
    if cuda:
        return torch.cuda.max_memory_allocated()
    if os.path.exists("/proc/self/status"):  # of this process alone: getrusage's peak begins with its parent's
        with open("/proc/self/status") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _weigh() -> None:
    """Peaks, one a line, of the recipes on standard input, one a line, each in a fork of this process; 0 for one that
    does not fit into the GPU."""
    from . import train  # noqa: F401
    from .bench_steps import training_step

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a fork has no other threads, and would wait for them for ever
    load("digits_scattered")  # like `train`, for what it imports: that is no part of a step
    for line in sys.stdin:
        recipe = Recipe.from_json(json.loads(line))
        with shapes_only():  # imports the rest, and holds nothing
            recipe.build()
        if (child := os.fork()) == 0:
            torch.set_num_threads(threads)
            cuda = torch.cuda.is_available()
            before, most = peak(cuda), 0
            with contextlib.suppress(torch.OutOfMemoryError):
                step = training_step(recipe)
                for _ in range(2):  # the optimizer's own numbers are there from the second step on
                    step()
                most = peak(cuda) - before
            print(most, flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(1)
