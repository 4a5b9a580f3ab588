"""Protocols that train: a Method with labels on the loop of train.py, started from the backbone of any source.

    row = train_protocol("runs/simclr", "linear_moco", data="imagenet", processes=8)

So a protocol runs on many GPUs, in 16 bits, resumes exactly and writes a run directory like any pretraining.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import methods
from ..backbones import build, shapes_only
from ..data import said
from ..errors import InputError, unknown
from ..files import append_jsonl, checksum, save_tensors
from ..methods.base import Method
from ..parts import world
from ..recipes import Recipe, method_numbers
from ..run import Run
from .results import result_row
from .sources import Source, open_source


class Protocol(Method):
    """What a protocol adds to the contract of a method; subclasses also write `views` and `forward`.

    Labels are looked up by the number of the image, in `before_train`: the contract hands over nothing else.
    """

    monitored = False

    def __init__(self, backbone: nn.Module, start: str, test_every: int):
        """`start`: safetensors of the backbone to begin with; the network is tested every `test_every` epochs, and at
        the end. 0: at the end only."""
        super().__init__()
        self.backbone, self.start, self.test_every = backbone, start, test_every
        self.images, self.per_epoch, self.total = None, 1, 1  # of a run, from its beginning on
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))  # a resumed run must not begin again

    @classmethod
    def fitted(cls, recipe: Recipe) -> Recipe:
        """The recipe with what its data decide, such as the number of classes. Errors: InputError if they do not fit
        the protocol, before any work."""
        return recipe

    @classmethod
    def on_source(cls, recipe: Recipe, source: Source, size: int | None) -> Recipe:
        """The recipe with the backbone of a source, at the size of the source's run unless another is given."""
        size = size or (source.size if source.folder else recipe.size) or recipe.size
        return recipe.with_(backbone=source.architecture, backbone_numbers=dict(source.numbers), size=size,
                            pool=source.pool)

    @classmethod
    def frozen_in(cls, recipe: Recipe) -> bool:
        """Whether the backbone stays as it is: then one with fresh weights needs batch-norm statistics of the data."""
        return False

    @classmethod
    def normalises(cls, run: Run) -> bool:
        """Whether batch norm learns in the backbone: then it matters how many images it sees at a time."""
        frozen = cls.frozen_in(run.recipe)
        return not frozen and any(isinstance(module, _BatchNorm) for module in run.backbone().modules())

    @classmethod
    def starting_point(cls, recipe: Recipe, backbone: nn.Module) -> tuple[dict[str, torch.Tensor], str]:
        """The state dict that the recipe's backbone begins with, from the source's backbone, and a sentence about it.
        Errors: InputError if they do not fit, before any work."""
        tensors = backbone.state_dict()
        with shapes_only():  # a ResNet for more than 64 px has another stem than one that is built for less
            wanted = build(recipe.backbone, recipe.size, **recipe.backbone_numbers).state_dict()
        wrong = next((k for k in wanted if k in tensors and tensors[k].shape != wanted[k].shape), None)
        if wrong:
            raise InputError(f"The source does not fit {recipe.backbone} at {recipe.size} px, where {wrong} has the "
                             f"shape {tuple(wanted[wrong].shape)} and not {tuple(tensors[wrong].shape)}; give a `size` "
                             "of the kind that it was made for.")
        return tensors, f"{len(tensors)} tensors of {recipe.backbone} come from the source; the rest is new."

    def test(self, run: Run) -> dict[str, Any]:
        """Numbers for a "test" row of the log. Called in every process, and must return the same in each."""
        raise NotImplementedError

    @staticmethod
    def results(tests: list[dict[str, Any]]) -> dict[str, Any]:
        """What goes into results.jsonl, from the "test" rows of a finished run, oldest first."""
        raise NotImplementedError

    def before_train(self, run: Run) -> None:
        self.images = run.recipe.load()
        self.per_epoch = run.recipe.steps_per_epoch(len(self.images))
        self.total = run.recipe.total_steps(self.per_epoch)
        if self.started:
            return
        if self.start:
            from safetensors.torch import load_file

            self.backbone.load_state_dict(load_file(self.start))
        self.started.fill_(True)

    def after_epoch(self, run: Run, epoch: int) -> None:
        last = (epoch + 1) * self.per_epoch >= self.total
        if last or self.test_every and (epoch + 1) % self.test_every == 0:
            found = self.test(run)
            if world()[0] == 0:
                run.append("test", step=min((epoch + 1) * self.per_epoch, self.total), epoch=epoch + 1, **found)


def train_protocol(source, protocol: str, data: str | Path | None = None, out: str | Path = "auto", *,
                   recipe: Recipe | None = None, backbone: str | None = None, fresh: bool = False, seed: int = 0,
                   **settings: Any) -> dict:
    """Train a protocol from the backbone of `source` and return its row, which is written down too.

    `source`, `backbone`: as in `open_source`, or a Source that it returned; `fresh` takes the source's network with
    fresh weights instead, the baseline. `protocol`: a name in `RECIPES` of sslnb.evaluate, or any name, with a `recipe`
    of your own. `settings`: as in `train_from`; what changes the recipe makes another protocol of it, and the row says
    so. The row goes to results.jsonl of the source and of the protocol's run. Errors: InputError before any work.
    """
    source = open_source(source, seed, backbone)
    source = source.untrained() if fresh else source
    run = train_from(source, recipe or find(protocol), data, out, seed=seed, **settings)
    return write_row(run, source, named(protocol, settings, run))


def find(protocol: str, known: Mapping[str, Recipe] | None = None) -> Recipe:
    """The recipe of a protocol, one of a kind such as LINEAR if these are `known`. Errors: InputError."""
    if known is None:
        from . import RECIPES as known

    if protocol not in known:
        unknown("protocol", protocol, known)
    return known[protocol]


HOW_IT_RUNS = ("processes", "precision", "workers", "resume")  # and not what runs


def named(protocol: str, settings: Mapping[str, Any], run: Run | None = None) -> str:
    """The name of a protocol, with what was changed of it: "linear_moco, with epochs 3". A batch is no change where the
    `run` has the protocol's total; other groups of batch norm are, where it learns."""
    from . import RECIPES

    recipe, groups = RECIPES.get(protocol), {}
    if run and recipe and run.recipe.total_batch == recipe.total_batch:
        settings = {name: value for name, value in settings.items() if name != "batch"}
        together = run.recipe.gpus * run.recipe.batch
        if together != recipe.gpus * recipe.batch and methods.get(recipe.method).normalises(run):
            groups = {"batch norm over": together}
    own = {**method_numbers(recipe.method), **vars(recipe), **recipe.numbers} if recipe else {}
    changes = [f"{name} {value}" for name, value in {**settings, **groups}.items()
               if name not in HOW_IT_RUNS and value is not None and value != own.get(name)]
    return f"{protocol}, with {', '.join(changes)}" if changes else protocol


def train_from(source: Source, recipe: Recipe, data: str | Path | None = None, out: str | Path = "auto", *,
               size: int | None = None, processes: int = 1, precision: str = "auto", seed: int = 0,
               workers: int | str = "auto", resume: bool = True, **changes: Any) -> Run:
    """Train the recipe of a protocol, with `changes`, from the backbone of `source`.

    `size`: of the crops, if not the protocol's, or the run's where that was trained at another size. A `batch` among
    the changes keeps the total where it can (`Recipe.in_batches`). The rest is as in `pretrain`.
    """
    from ..train import pretrain  # which measures features while it trains, with this package

    recipe = fitted_to(source, recipe, data, size, processes, **changes)
    start = _start(source, recipe, seed)
    return pretrain(recipe.with_(start=str(start)), out=out, processes=processes, precision=precision, seed=seed,
                    workers=workers, resume=resume)


def fitted_to(source: Source, recipe: Recipe, data: str | Path | None, size: int | None, processes: int,
              batch: int | None = None, **changes: Any) -> Recipe:
    """The recipe for this source, these data and `changes`. Errors: InputError if they do not fit."""
    kind = methods.get(recipe.method)
    recipe = kind.on_source(recipe, source, size).with_(data=said(data or source.data or recipe.data)).with_(**changes)
    if batch is not None:
        recipe = recipe.with_(batch=batch) if "accum" in changes else recipe.in_batches(batch, processes)
    return kind.fitted(recipe)


def write_row(run: Run, source: Source, protocol: str, **more: Any) -> dict:
    """The row of a finished run of a protocol, written beside it and beside its source."""
    numbers = methods.get(run.recipe.method).results(run.history("test"))
    about = {"size": run.recipe.size, **source.judged, **source.progress, **more, "run": str(run.path.resolve())}
    row = result_row(source.name, run.recipe.data, protocol, {**numbers, **about}, run.seed)
    for folder in {run.path, *([source.folder] if source.folder else [])}:
        append_jsonl(folder / "results.jsonl", row)
    return row


def _start(source: Source, recipe: Recipe, seed: int) -> Path:
    """The file of tensors that the recipe begins with. Its name tells its content: the same start is the same file."""
    kind, folder = methods.get(recipe.method), source.folder or Path("runs")
    folder.mkdir(parents=True, exist_ok=True)
    rival = source.fresh_weights and kind.frozen_in(recipe)
    if rival:
        # Statistics that are estimated again differ in the last digit on other threads or another card, and a run that
        # goes on must find its own start: the name tells what it was made from.
        made_from = json.dumps([recipe.to_json(), source.origin, seed], sort_keys=True, default=str)
        start = folder / f"start-{hashlib.sha256(made_from.encode()).hexdigest()[:8]}.safetensors"
        if start.exists():
            print(f"Source {source.name}: as in {start}.")
            return start.resolve()
    network = source.rival(recipe.load(), recipe.size, seed) if rival else source.backbone(recipe.size)
    tensors, said = kind.starting_point(recipe, network)
    save_tensors(draft := folder / f".start-{os.getpid()}.safetensors", tensors)  # others may evaluate it too
    if not rival:
        start = folder / f"start-{checksum(draft)}.safetensors"
    draft.replace(start)
    print(f"Source {source.name}: {said}")
    return start.resolve()
