"""Evaluation: kNN, linear probe and a few labels, always beside an untrained network and raw pixels.

    from sslnb.evaluate import evaluate, table
    print(table(evaluate("runs/simclr")))

A new protocol is one function `(subject, train, test, seed) -> Outcome` in PROTOCOLS.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import unknown
from ..reading import loader_workers
from ..run import append_jsonl
from . import finetune
from .knn import KS, knn_grid
from .linear import LINEAR, linear_probe
from .multihead import MULTIHEAD
from .results import accuracy, interval, mean_interval, result_row, table
from .sources import Subject, open_source, subjects

__all__ = ["PROTOCOLS", "Outcome", "Subject", "evaluate", "interval", "mean_interval", "table"]

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
    found = knn_grid(bank.x, bank.labels, queries.x, queries.labels, temperature=0.07,
                     ks=[k for k in KS if k <= max(20, len(bank.x))])
    correct = int((found[20].predictions == queries.labels).sum())
    return Outcome("knn k20 t0.07", correct, len(queries.x), {
        "top5": found[20].top5, "by_k": {str(k): result.top1 for k, result in found.items()},
        "broken": len(bank.broken) + len(queries.broken)})


def _linear(subject: Subject, train, test, seed: int) -> Outcome:
    bank, queries = subject.features(train), subject.features(test)
    probe = linear_probe(bank.x, bank.labels, queries.x, queries.labels, seed=seed)
    correct = int((probe.predictions == queries.labels).sum())
    broken = len(bank.broken) + len(queries.broken)
    return Outcome("linear grid cached", correct, len(queries.x),
                   {"lr": probe.lr, "at_edge": probe.at_edge, "broken": broken})


def _few_labels(subject: Subject, train, test, seed: int) -> Outcome | None:
    if subject.backbone is None:
        return None  # raw pixels have no weights to tune
    predictions, labels, more = finetune.few_labels(subject, train, test, seed)
    correct = int((predictions == labels).sum())
    return Outcome(f"fine-tune {finetune.LABELS} labels per class", correct, len(labels), more)


PROTOCOLS: dict[str, Callable[..., Outcome | None]] = {"knn": _knn, "linear": _linear, "few_labels": _few_labels}
RECIPES = {**LINEAR, **MULTIHEAD}  # of protocols that train, for protocol.train_protocol


def evaluate(source, data=None, protocols: Sequence[str] = ("knn", "linear"), *, baselines: bool = True,
             seed: int = 0, out: str | Path | None = None, size: int | None = None,
             device: str | torch.device = "auto", workers: int | str = "auto") -> list[dict]:
    """Evaluate features; one dict per (features, protocol), accuracies and their 95 % intervals in %.

    `protocols`: "knn" and "linear" of frozen features, "few_labels" for fine-tuning on ten images per class, for which
    "random initialisation" means training from scratch.
    `source`: a Run, the path of a run directory, or a timm name (random weights). `data`: a name or folder
    for `sslnb.data.load`, or a pair (train, test) of loaded images; default: what the run was trained on,
    else "digits_scattered". `baselines` adds "random initialisation" (BatchNorm statistics calibrated) and
    "raw pixels". Rows go to `results.jsonl` in the run directory or in `out` as soon as each is known. A
    protocol that returns None does not apply to those features and gives no row. Data without labels give
    an empty list and a printed note. `device` "auto" is the GPU if there is one; `workers` "auto" reads files
    with most of the cores.
    """
    for name in protocols:
        if name not in PROTOCOLS:
            unknown("protocol", name, PROTOCOLS)
    source = open_source(source, seed)
    train, test = _load(data or source.data or DEFAULT_DATA)
    if train.labels is None or test.labels is None:
        print(f"{train.name} has no labels: probes are switched off.")
        return []
    folder = source.folder if out is None else Path(out)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    workers = loader_workers(workers, train)
    rows = []
    for subject in subjects(source, train, size=size, baselines=baselines, seed=seed,
                            device=device, workers=workers):
        for name in protocols:
            outcome = PROTOCOLS[name](subject, train, test, seed)
            if outcome is None:
                continue
            numbers = {**accuracy(outcome.correct, outcome.n), **outcome.more}
            rows.append(result_row(subject.name, train.name, outcome.protocol, numbers, seed))
            if folder is not None:
                append_jsonl(folder / "results.jsonl", rows[-1])
    return rows


def _load(data) -> tuple:
    """(train, test), loaded by name unless they are given."""
    if not isinstance(data, str | Path):
        return data
    from ..data import load

    return load(data, "train"), load(data, "test")
