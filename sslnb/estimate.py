"""Before a long run: how long, how much memory, and what holds it up? Measured on this machine, in a few steps.

    print(preflight(resolve("byol", data="/data/imagenet", epochs=300)))
"""

import contextlib
import io
import itertools
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .bench import peak, wait
from .checks import prepare
from .launch import frees_memory
from .monitor import Meter
from .optim import trainable
from .reading import next_batch
from .recipes import Recipe, method_numbers
from .train import Trainer

STEPS, FIRST = 20, 3  # measured, and steps before them that do not count: they find algorithms and fill caches
LIMIT = 120  # seconds, for batches and steps beyond those that were asked for
FEW = 4096  # images, or twice the clusters if that is more, that a method which works on all is timed with
NOTICED = 0.02  # seconds: hooks that take less do not work on images
WAITS, FULL = 0.3, 0.9  # a larger share of waiting, or of the GPU's memory, gets a suggestion


@dataclass(kw_only=True)
class Preflight:
    """What one process with its batch does here. Times in seconds; `memory` in bytes, of the GPU, or of the process."""

    step: float
    steps_per_epoch: int
    total_steps: int
    images_per_s: float
    data_wait: float  # share of the time
    memory: int
    available: int  # of the GPU, else 0
    processes: int
    epochs: float
    measured: int  # steps
    wanted: int  # steps, `measured` if there was time
    once: float = 0.0  # what the method does with the images before the first step
    again: float = 0.0  # and what it does with them before an epoch,
    rounds: int = 0  # so many times
    how: str = ""  # with which images this was timed, and as if who shared it

    @property
    def epoch(self) -> float:
        return self.step * self.steps_per_epoch

    @property
    def total(self) -> float:
        return self.step * self.total_steps + self.once + self.rounds * self.again

    @property
    def suggestion(self) -> str:
        if self.data_wait > WAITS:
            return f"It waits for images {self.data_wait:.0%} of the time: more workers, or a faster disk."
        if self.available and self.memory > FULL * self.available:
            return ("The memory is nearly full: a smaller batch, gathered with accum, or chunk where a method compares "
                    "the images of a batch.")
        if self.available and self.memory < self.available / 3:
            return "Most of the memory is free: a larger batch per process, with fewer processes or less accum."
        return "Nothing stands out."

    def __str__(self) -> str:
        where = f"of {self.available / 2**30:.0f} GiB on the GPU" if self.available else "so far in this process"
        many = f" on each of {self.processes} processes like this one" if self.processes > 1 else ""
        alone = "\nwithout what the others read meanwhile, and without their waiting for each other" * bool(many)
        short = f" instead of {self.wanted}, for the time was up" * (self.measured < self.wanted)
        parts = [f"{_duration(self.once)} before the first step"] * bool(self.once)
        parts += [f"{self.rounds} x {_duration(self.again)} before epochs"] * bool(self.rounds)
        images = f"\nof that {' and '.join(parts)}, in which the method works on the images{self.how}" * bool(parts)
        return (f"{1000 * self.step:,.0f} ms per step{many}, {self.images_per_s:,.0f} images/s here, in "
                f"{self.measured} steps{short}{alone}\n"
                f"{_duration(self.epoch)} per epoch of {self.steps_per_epoch:,} steps, {_duration(self.total)} for "
                f"{self.epochs:g} epochs, without measuring and saving between them{images}\n"
                f"peak memory {self.memory / 2**30:.2f} GiB {where}, {self.data_wait:.0%} of the time waiting for "
                f"images\n{self.suggestion}")


@frees_memory
def preflight(recipe: Recipe | str, data: str | Path | None = None, *, steps: int = STEPS, precision: str = "auto",
              workers: int | str = "auto", compile: bool = False) -> Preflight:
    """Train `steps` optimizer steps of the recipe in this process, or more, and throw them away.

    What workers read ahead says nothing about the disk: as many batches as they may hold are taken away, and at least
    as many are then trained with, unless that takes longer than LIMIT.
    A recipe for several processes is measured as one of them: its batch and accumulation, and with workers "auto" its
    share of the cores as if all were on this machine, not what the others read nor the time in which they wait for each
    other. What a method does with all images before the first step or before epochs, such as clustering, is timed with
    a few if they are many, and as if the processes shared it.
    Errors: InputError, as in `pretrain`, before any work.
    """
    from . import limits
    from .choice import resolve
    from .data import said

    limits.check("steps", steps, limits.COUNT)
    if isinstance(recipe, str):
        recipe = resolve(recipe, data="auto" if data is None else data)
    elif data is not None:
        recipe = recipe.with_(data=said(data))
    recipe.steps_per_epoch(len(recipe.load()))  # one process alone may have images enough
    one = recipe.with_(gpus=1, force_accum=True)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(), _one_of(recipe.gpus):
        with contextlib.redirect_stdout(io.StringIO()):
            run = prepare(one, None, Path(folder) / "run", precision=precision, workers=workers, compile=compile)
        held = 0
        if torch.cuda.is_available():  # what the kernel did before is not this recipe's
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        trainer = Trainer(run)
        try:
            return _measured(trainer, recipe, steps, held, _hooks(trainer, recipe, Path(folder)))
        finally:
            trainer.close()


@contextlib.contextmanager
def _one_of(processes: int) -> Iterator[None]:
    """As under torchrun: loaders, those of hooks too, and threads take one process's share of the cores."""
    before = os.environ.get("LOCAL_WORLD_SIZE")
    os.environ["LOCAL_WORLD_SIZE"] = before or str(processes)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_WORLD_SIZE"]


def _measured(trainer: Trainer, recipe: Recipe, steps: int, held: int, work: dict) -> Preflight:
    cuda, accum, workers = trainer.cuda, recipe.accum, trainer.loader.num_workers
    ahead = workers * trainer.loader.prefetch_factor if workers else 0
    batches, meter = _batches(trainer, hooks=not work), Meter(trainer)
    for _ in range(FIRST - 1):
        trainer._step(batches, meter)
    limit = time.monotonic() + LIMIT
    for _ in range(ahead):
        if time.monotonic() < limit:
            next_batch(batches)
    trainer._step(batches, meter)  # waits for workers that begin anew, if any did
    # Workers often deliver all at once and then nothing for a while, hence whole rounds.
    wanted = math.ceil(math.ceil(steps * accum / ahead) * ahead / accum) if ahead else steps
    steps, wanted = (min(n, max(1, trainer.total - FIRST)) for n in (steps, wanted))
    wait()
    began, waited, limit, n = time.perf_counter(), meter.waited, time.monotonic() + LIMIT, 0
    while n < steps or n < wanted and time.monotonic() < limit:
        trainer._step(batches, meter)
        n += 1
    wait()
    seconds = time.perf_counter() - began
    per_epoch = recipe.steps_per_epoch(len(trainer.images))
    available = torch.cuda.get_device_properties(0).total_memory if cuda else 0
    total = recipe.total_steps(per_epoch)
    memory = peak(cuda) - held
    if cuda and recipe.gpus > 1:  # DDP has a second copy of the gradients, its buckets
        memory += sum(p.numel() * p.element_size() for p in trainable(trainer.method))
    return Preflight(
        step=seconds / n, steps_per_epoch=per_epoch, total_steps=total, data_wait=(meter.waited - waited) / seconds,
        images_per_s=n * recipe.batch * accum / seconds, available=available, processes=recipe.gpus, memory=memory,
        epochs=total / per_epoch, measured=n, wanted=wanted, **work)


def _batches(trainer: Trainer, hooks: bool) -> Iterator:
    """Batches as `Trainer.fit` gets them, of one epoch after the other."""
    for epoch in itertools.count():
        if hooks:
            trainer.method.before_epoch(trainer.run, epoch)
        trainer._seek(epoch * trainer.per_epoch)
        yield from trainer.loader


def _hooks(trainer: Trainer, recipe: Recipe, folder: Path) -> dict:
    """How long a method works on the images before the first step and before epochs, such as clustering; {} if it does
    not. One with a memory of all images may work on all: where they are many, a method for a few of them does."""
    run, method, numbers = trainer.run, trainer.method, {**method_numbers(recipe.method), **recipe.numbers}
    many, share, how = len(trainer.images), 1.0, ""
    enough = max(FEW, 2 * numbers.get("clusters", 0))
    if "images" in numbers:
        share, how = 1 / recipe.gpus, f", as if {recipe.gpus} processes shared it" * (recipe.gpus > 1)
    if "images" in numbers and many > enough and not recipe.fraction:
        few = run.recipe.with_(fraction=enough / many)
        n = len(few.load())
        own = {"images": n, "min_cluster": 1}  # ODC wants so many images for a cluster, but only later
        print(f"{recipe.method} may work on all images: this is timed with {n:,} of them.", flush=True)
        how += f", timed with {n:,} of {many:,} and without the memory for the others"
        with contextlib.redirect_stdout(io.StringIO()):
            run = prepare(few.with_(**{k: v for k, v in own.items() if k in numbers}), None, folder / "few")
        method = run.recipe.build().to(trainer.device, memory_format=torch.channels_last)
        share *= many / n

    def timed(hook, *args) -> float:
        wait()
        start = time.perf_counter()
        hook(run, *args)
        wait()
        seconds = time.perf_counter() - start
        return share * seconds if seconds > NOTICED else 0.0

    once = timed(method.before_train)
    timed(method.before_epoch, 0)  # finds algorithms and fills caches
    every = numbers.get("every", 1)
    again = timed(method.before_epoch, every)
    per_epoch = recipe.steps_per_epoch(many)
    rounds = math.ceil(recipe.total_steps(per_epoch) / per_epoch / every) if again else 0
    return {"once": once, "again": again, "rounds": rounds, "how": how} if once or again else {}


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
