"""Evaluation: what is a network worth? Always beside one that has not learned.

    from sslnb.evaluate import evaluate, table
    print(table(evaluate("runs/simclr")))                              quick: kNN and a linear probe
    evaluate("runs/simclr", "imagenet", ["linear_moco"], processes=8)  a published protocol, which trains

A new quick protocol is one function `(subject, train, test, seed) -> Outcome` in PROTOCOLS, its keywords what can be
set; a new one that trains is a class (protocol.py) and a recipe in RECIPES.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import limits
from ..errors import InputError, unknown
from ..files import append_jsonl, check_writable, expanded
from ..reading import loader_workers
from . import few_labels
from .detection import DETECTION
from .features import the_device
from .finetune import FINETUNE
from .knn import KS, knn_grid
from .linear import LINEAR, linear_probe
from .multihead import MULTIHEAD
from .protocol import fitted_to, named, train_from, train_protocol
from .results import accuracy, interval, mean_interval, result_row, table
from .semi import SEMI, check_rates, semi_supervised
from .sources import Subject, open_source, subjects

__all__ = ["PROTOCOLS", "RECIPES", "Outcome", "Subject", "evaluate", "interval", "mean_interval",
           "semi_supervised", "table", "train_protocol"]

DEFAULT_DATA = "digits_scattered"


@dataclass
class Outcome:
    """Of `n` test images `correct` were right; `protocol` names every setting; `more` goes into the row."""

    protocol: str
    correct: int
    n: int
    more: dict = field(default_factory=dict)


def _knn(subject: Subject, train, test, seed: int) -> Outcome:
    bank, queries = subject.features(train), subject.features(test)
    k = min(20, len(bank.x))
    # The tests go to the device, and the bank follows piece by piece.
    found = knn_grid(bank.x, bank.labels, queries.x.to(subject.device), queries.labels, temperature=0.07,
                     ks=sorted({k, *(other for other in KS if other <= len(bank.x))}))
    correct = int((found[k].predictions.cpu() == queries.labels).sum())
    return Outcome(f"knn k{k} t0.07", correct, len(queries.x), {
        "top5": found[k].top5, "by_k": {str(k): result.top1 for k, result in found.items()},
        "broken": len(bank.broken) + len(queries.broken)})


def _linear(subject: Subject, train, test, seed: int) -> Outcome:
    bank, queries = subject.features(train), subject.features(test)
    probe = linear_probe(bank.x, bank.labels, queries.x, queries.labels, seed=seed, device=subject.device)
    correct = int((probe.predictions == queries.labels).sum())
    broken = len(bank.broken) + len(queries.broken)
    return Outcome("linear grid cached", correct, len(queries.x),
                   {"lr": probe.lr, "at_edge": probe.at_edge, "broken": broken})


def _few_labels(subject: Subject, train, test, seed: int, *, steps: int = few_labels.STEPS) -> Outcome | None:
    if subject.backbone is None:
        return None  # raw pixels have no weights to tune
    predictions, labels, more = few_labels.few_labels(subject, train, test, seed, steps)
    correct = int((predictions == labels).sum())
    changed = {} if steps == few_labels.STEPS else {"steps": steps}
    name = named(f"fine-tune {more['per_class']} labels per class", changed)
    return Outcome(name, correct, len(labels), more)


PROTOCOLS: dict[str, Callable[..., Outcome | None]] = {"knn": _knn, "linear": _linear, "few_labels": _few_labels}
RECIPES = {**LINEAR, **SEMI, **FINETUNE, **MULTIHEAD, **DETECTION}  # of protocols that train


def evaluate(source, data=None, protocols: Sequence[str] = ("knn", "linear"), *, baselines: bool = True,
             backbone: str | None = None, seed: int = 0, out: str | Path | None = None, size: int | None = None,
             device: str | torch.device = "auto", workers: int | str = "auto", processes: int = 1,
             **settings: Any) -> list[dict]:
    """Evaluate a network; one dict per (network, protocol), accuracies and their 95 % intervals in %.

    `protocols`: "knn" and "linear" of frozen features, "few_labels" for fine-tuning on (at most) ten images per class,
    for which "random initialisation" means training from scratch; or a name in RECIPES, which trains as `pretrain` does
    ("semi_…" nine settings, of which held-out labels choose one). `source`: a Run, the path of a run directory or of
    what it exported, a file of weights of a `backbone`, a name of the zoo, or a timm name (random weights). `data`: a
    name or folder for `sslnb.data.load`, or a pair (train, test) of loaded images, for protocols that do not train;
    default: what the run was trained on, else "digits_scattered". `baselines` adds "random initialisation" (BatchNorm
    statistics calibrated) and "raw pixels" to those. Rows go to `results.jsonl` in the run directory or in `out` as
    soon as each is known. `size`: of the images, if not that of the run. A protocol that returns None does not apply to
    those features and gives no row. Data without labels give an empty list and a printed note. `device` "auto" is the
    GPU if there is one; `workers` "auto" reads files with most of the cores. `processes`: as many as GPUs; features are
    then computed in pieces that stay in the folder of the results, so that an interrupted evaluation continues.
    `settings` are those of `train_protocol`, epochs, batch …, or the `steps` of "few_labels".
    """
    protocols = [protocols] if isinstance(protocols, str) else list(protocols)
    for name, value in (("processes", processes), ("seed", seed), ("workers", workers)):
        limits.check(name, value)
    if size is not None:
        limits.check("size", size)
    for name in protocols:
        if name not in PROTOCOLS and name not in RECIPES:
            unknown("protocol", name, [*PROTOCOLS, *RECIPES])
    quick = [name for name in protocols if name in PROTOCOLS]
    for name in quick:
        if wrong := settings.keys() - inspect.signature(PROTOCOLS[name]).parameters.keys():
            raise InputError(f"{', '.join(sorted(wrong))} cannot be set for {name}; leave it out, or evaluate in two "
                             "calls.")
    source = open_source(source, seed, backbone)
    folder = source.folder if out is None else expanded(out)
    if folder is not None:
        check_writable(folder)
    train, test = _load(data or source.data or DEFAULT_DATA) if quick else (None, None)
    trainers = {name: semi_supervised if name in SEMI else train_protocol for name in protocols if name in RECIPES}
    for name, train_it in trainers.items():  # everything is looked at before anything trains
        about_the_run = {*inspect.signature(train_from).parameters, *inspect.signature(train_it).parameters}
        changes = {key: value for key, value in settings.items() if key not in about_the_run}
        if name in SEMI:
            check_rates(name, settings)
        fitted_to(source, RECIPES[name], data, size, processes, **changes)
    trained = []
    for name, train_it in trainers.items():
        trained.append(train_it(source, name, data, seed=seed, size=size, workers=workers, processes=processes,
                                **settings))
        if folder not in (None, source.folder):
            append_jsonl(folder / "results.jsonl", trained[-1])
    if not quick:
        return trained
    if train.labels is None or test.labels is None:
        print(f"{train.name} has no labels: probes are switched off.")
        return trained
    device = the_device(device)
    workers = loader_workers(workers, train)
    rows = []
    for subject in subjects(source, train, size=size, baselines=baselines, seed=seed, device=device, workers=workers,
                            processes=processes, folder=folder):
        for name in quick:
            outcome = PROTOCOLS[name](subject, train, test, seed, **settings)
            if outcome is None:
                continue
            about = {"size": subject.size, **source.judged, **(source.progress if subject.name == source.name else {})}
            numbers = {**accuracy(outcome.correct, outcome.n), **outcome.more, **about}
            rows.append(result_row(subject.name, train.name, outcome.protocol, numbers, seed))
            if folder is not None:
                append_jsonl(folder / "results.jsonl", rows[-1])
    return trained + rows


def _load(data) -> tuple:
    """(train, test), loaded by name unless they are given."""
    if isinstance(data, tuple | list) and len(data) == 2:
        return tuple(data)
    if not isinstance(data, str | Path):
        kind = f"{len(data)} sets" if isinstance(data, tuple | list) else f"one {type(data).__name__}"
        raise InputError(f"data is {kind}, and a protocol needs images to learn from and others to test on: give a "
                         "pair (train, test) of loaded images, or the name or folder of both.")
    from ..data import load

    return load(data, "train"), load(data, "test")
