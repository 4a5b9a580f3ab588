"""Before a long run: how long, how much memory, and what holds it up? Measured on this machine, in twenty steps.

    print(preflight(resolve("byol", data="/data/imagenet", epochs=300)))
"""

import contextlib
import io
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .bench import peak, wait
from .checks import prepare
from .monitor import Meter
from .recipes import Recipe
from .train import Trainer

STEPS, FIRST = 20, 3  # measured, and steps before them that do not count: they find algorithms and fill caches
WAITS, FULL = 0.3, 0.9  # a larger share of waiting, or of the GPU's memory, gets a suggestion


@dataclass
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

    @property
    def epoch(self) -> float:
        return self.step * self.steps_per_epoch

    @property
    def total(self) -> float:
        return self.step * self.total_steps

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
        return (f"{1000 * self.step:,.0f} ms per step{many}, {self.images_per_s:,.0f} images/s here\n"
                f"{_duration(self.epoch)} per epoch of {self.steps_per_epoch:,} steps, {_duration(self.total)} for "
                f"{self.epochs:g} epochs, without what happens between them\n"
                f"peak memory {self.memory / 2**30:.2f} GiB {where}, {self.data_wait:.0%} of the time waiting for "
                f"images\n{self.suggestion}")


def preflight(recipe: Recipe | str, data: str | Path | None = None, *, steps: int = STEPS, precision: str = "auto",
              workers: int | str = "auto", compile: bool = False) -> Preflight:
    """Train `steps` optimizer steps of the recipe in this process and throw them away.

    A recipe for several processes is measured as one of them: its batch and accumulation, not the time in which they
    wait for each other. Errors: InputError, as in `pretrain`, before any work.
    """
    from . import methods

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng():
        if isinstance(recipe, str):
            recipe = methods.recipes(recipe)["demo"]
        one = recipe.with_(gpus=1, force_accum=True)
        run = prepare(one, data, Path(folder) / "run", precision=precision, workers=workers, compile=compile)
        trainer = Trainer(run)
        try:
            return _measured(trainer, recipe, min(steps, max(1, trainer.total - FIRST)))
        finally:
            trainer.close()


def _measured(trainer: Trainer, recipe: Recipe, steps: int) -> Preflight:
    cuda = trainer.cuda
    trainer.method.before_train(trainer.run)
    meter, began, waited = Meter(trainer), 0.0, 0.0
    for n in range(FIRST + steps):
        if n % trainer.per_epoch == 0:
            trainer.method.before_epoch(trainer.run, n // trainer.per_epoch)
            trainer._seek(n)
            batches = iter(trainer.loader)
        if n == FIRST:
            wait()
            began, waited = time.perf_counter(), meter.waited
        trainer._step(batches, meter)
    wait()
    seconds = time.perf_counter() - began
    per_epoch = recipe.steps_per_epoch(len(trainer.images))
    available = torch.cuda.get_device_properties(0).total_memory if cuda else 0
    total = recipe.total_steps(per_epoch)
    return Preflight(
        step=seconds / steps, steps_per_epoch=per_epoch, total_steps=total, data_wait=(meter.waited - waited) / seconds,
        images_per_s=steps * recipe.batch * recipe.accum / seconds, available=available, processes=recipe.gpus,
        memory=peak(cuda), epochs=total / per_epoch)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
