"""Evaluation of frozen features: kNN and linear probe, always beside an untrained network and raw pixels.

    from sslnb.evaluate import evaluate, table
    print(table(evaluate("runs/simclr")))

A new protocol is one function `(subject, train, test, seed) -> Outcome` in PROTOCOLS.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from sslnb.errors import InputError, unknown
from sslnb.evaluate.features import IMAGENET_MEAN, IMAGENET_STD, Features, calibrated, extract, raw_pixels
from sslnb.evaluate.knn import weighted_knn
from sslnb.evaluate.linear import linear_probe
from sslnb.evaluate.results import append, interval, mean_interval, table

__all__ = ["PROTOCOLS", "Outcome", "Subject", "evaluate", "interval", "mean_interval", "table"]

DEFAULT_DATA = "digits_scattered"


@dataclass
class Subject:
    """What is being evaluated: a backbone with the input it expects, or raw pixels (`backbone=None`)."""

    name: str
    backbone: torch.nn.Module | None
    size: int
    pool: str = "model"
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    device: str | torch.device = "cpu"
    workers: int = 0
    _cache: dict[int, Features] = field(default_factory=dict, repr=False)

    def features(self, images) -> Features:
        """Features of `images`, computed once per set of images, so that several protocols share them."""
        if id(images) not in self._cache:
            self._cache[id(images)] = raw_pixels(images, self.size) if self.backbone is None else extract(
                self.backbone, images, size=self.size, pool=self.pool, mean=self.mean, std=self.std,
                device=self.device, workers=self.workers)
        return self._cache[id(images)]


@dataclass
class Outcome:
    """Of `n` test images `correct` were right; `protocol` names every setting; `more` holds what else is worth it."""

    protocol: str
    correct: int
    n: int
    more: dict = field(default_factory=dict)


def _knn(subject: Subject, train, test, seed: int) -> Outcome:
    bank, queries = subject.features(train), subject.features(test)
    result = weighted_knn(bank.x, bank.labels, queries.x, queries.labels, k=20, temperature=0.07)
    return Outcome("knn k20 t0.07", int((result.predictions == queries.labels).sum()), len(queries.x),
                   {"top5": result.top5, "broken": len(bank.broken) + len(queries.broken)})


def _linear(subject: Subject, train, test, seed: int) -> Outcome:
    bank, queries = subject.features(train), subject.features(test)
    probe = linear_probe(bank.x, bank.labels, queries.x, queries.labels, seed=seed)
    return Outcome("linear grid cached", int((probe.predictions == queries.labels).sum()), len(queries.x),
                   {"lr": probe.lr, "at_edge": probe.at_edge, "broken": len(bank.broken) + len(queries.broken)})


PROTOCOLS: dict[str, Callable[..., Outcome | None]] = {"knn": _knn, "linear": _linear}


def evaluate(source, data=None, protocols: Sequence[str] = ("knn", "linear"), *, baselines: bool = True,
             seed: int = 0, out: str | Path | None = None, size: int | None = None,
             device: str | torch.device = "cpu", workers: int = 0) -> list[dict]:
    """Evaluate features; one dict per (features, protocol), accuracies and their 95 % intervals in %.

    `source`: a Run, the path of a run directory, or a timm name (random weights). `data`: a name or folder for
    `sslnb.data.load`, or a pair (train, test) of loaded images; default: what the run was trained on, else
    "digits_scattered". `baselines` adds "random initialisation" (BatchNorm statistics calibrated) and "raw pixels".
    Rows go to `results.jsonl` in the run directory or in `out` as soon as each is known. A protocol that returns None
    does not apply to those features and gives no row. Data without labels give an empty list and a printed note.
    """
    for name in protocols:
        if name not in PROTOCOLS:
            unknown("protocol", name, PROTOCOLS)
    from sslnb.evaluate.sources import open_source

    opened = open_source(source, data or None, size=size, seed=seed, device=device, workers=workers,
                         default_data=DEFAULT_DATA)
    if opened.train.labels is None or opened.test.labels is None:
        print(f"{opened.train.name} has no labels: probes are switched off.")
        return []
    folder = out if out is not None else opened.folder
    rows = []
    for subject in opened.subjects(baselines):
        for name in protocols:
            outcome = PROTOCOLS[name](subject, opened.train, opened.test, seed)
            if outcome is not None:
                rows.append(_row(subject.name, opened.train.name, outcome, seed))
                if folder is not None:
                    append(Path(folder) / "results.jsonl", rows[-1])
    return rows
