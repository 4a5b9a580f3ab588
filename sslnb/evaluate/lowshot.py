"""PASCAL VOC 2007 by linear SVMs on the frozen maps of a ResNet: with all labels, and with very few.

    row = svm("runs/simclr", "data/VOCdevkit")          the mean average precision of every layer
    row = low_shot("runs/simclr", "data/VOCdevkit")     with 1, 2, 4 … 96 images that show the class

An image may show several of the 20 classes, so every class is a yes-no question of its own. Its classifier minimises

    ½‖w‖² + C Σ_i c_i max(0, 1 − y_i (w·f_i + b))²,    y = ±1,  c = 2 for y = 1, 1 for y = −1

(with b in the first term as well, as liblinear has it). f is a pooled map as in multihead.py, divided by its length.
Source: arXiv 1905.01235 and its code, fair_self_supervision_benchmark: tools/svm; settings of MMSelfSup 0.x.
"""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import InputError, unknown
from ..files import append_jsonl, expanded
from . import voc_ap
from .protocol import named
from .results import result_row
from .voc07 import VocFeatures, voc_features

COSTS = (1.0, 10.0, 100.0, *(0.5**k for k in range(4, 20)))  # C; in this order, the first of equals is chosen
SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)
SAMPLES, FOLDS, MOST_STEPS = 5, 3, 2000


# ---------------------------------------------------------------- the classifier and its measure


def average_precision(targets: np.ndarray, scores: np.ndarray) -> float:
    """Area under precision against recall, 0 to 1: at each recall the best precision at that recall or a higher one.

    targets (N,): 1, 0, and -1 for those that do not count; NaN without a 1. Equal scores are one threshold, where the
    published code lets the order of the images decide.
    """
    scores, hits = scores[targets != -1], targets[targets != -1] == 1
    if not hits.any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    whole = np.append(np.diff(scores[order]) != 0, True)  # the last of equal scores
    found = hits[order].cumsum()[whole]
    return voc_ap.average_precision(found / (np.flatnonzero(whole) + 1), found / hits.sum(), eleven_points=False)


def classifier(cost: float, seed: int = 0):
    """scikit-learn's LinearSVC with the published settings."""
    from sklearn.svm import LinearSVC

    return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, intercept_scaling=1.0, penalty="l2", loss="squared_hinge",
                     tol=1e-4, dual=True, max_iter=MOST_STEPS, random_state=seed)


def _fit(x: np.ndarray, y: np.ndarray, cost: float, seed: int):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it did not converge, as is usual for the large costs: rows count it
        return classifier(cost, seed).fit(x, y)


def _validated(x: np.ndarray, y: np.ndarray, cost: float, seed: int) -> float:
    """Average precision on parts that were not trained on, the mean over 3; scikit-learn's, which is the area under
    the steps. The folds are not shuffled and have equal shares of the class."""
    from sklearn.model_selection import cross_val_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(cross_val_score(classifier(cost, seed), x, y, cv=FOLDS, scoring="average_precision").mean())


# ---------------------------------------------------------------- all labels


def svm(source, data: str | Path | None = None, *, costs: Sequence[float] = COSTS, levels: Sequence[str] | None = None,
        jobs: int = 1, seed: int = 0, out: str | Path | None = None, **features) -> dict:
    """All labels; C is chosen per class by cross-validation on trainval. Returns a row, and writes it down.

    `source`: as in train_protocol, or VocFeatures, without `data`. `features` goes to
    voc_features. Images that are difficult to see train as negatives, as in the published code, and do not count in
    the test. `jobs` processes work at a time, each on about 1 GB at VOC's size. Average precisions are in %; `mAP` is
    that of the best level, on the test images as published; `chosen` is the level that cross-validation prefers.
    """
    voc = _ready(source, data, seed, features)
    y, test = np.where(voc.targets["train"] == 1, 1, -1), voc.targets["test"]
    _enough(voc, (y == 1).sum(0), (y == -1).sum(0), (FOLDS, FOLDS), f"Cross-validation in {FOLDS} parts")
    rows, C = {}, range(len(voc.classes))
    for level in _levels(voc, levels):
        x = voc.unit(level, "train")
        valid = np.reshape(_parallel(jobs, _validated, [(x, y[:, c], k, seed) for c in C for k in costs]), (len(C), -1))
        best = [costs[i] for i in valid.argmax(1)]
        fits = _parallel(jobs, _fit, [(x, y[:, c], best[c], seed) for c in C])
        scores = voc.unit(level, "test")
        ap = [100 * average_precision(test[:, c], fits[c].decision_function(scores)) for c in C]
        rows[level] = {"mAP": float(np.mean(ap)), "validated": float(100 * valid.max(1).mean()),
                       "classes": dict(zip(voc.classes, ap, strict=True)),
                       "costs": dict(zip(voc.classes, best, strict=True)),
                       "unconverged": sum(int(f.n_iter_) >= MOST_STEPS for f in fits)}
    best, chosen = (max(rows, key=lambda level: rows[level][by]) for by in ("mAP", "validated"))
    name = named("voc07_svm", {} if tuple(costs) == COSTS else {"costs": len(costs)})
    return _written(voc, name, {"mAP": rows[best]["mAP"], "best_level": best, "chosen": chosen, **rows}, seed, out)


# ---------------------------------------------------------------- a few labels


def draw(targets: np.ndarray, shots: int, rng: np.random.RandomState) -> np.ndarray:
    """Targets (N, C) that are -1 but for, of every class, `shots` images that show it and C - 1 times as many that do
    not, drawn for each class by itself."""
    drawn = np.full_like(targets, -1)
    for c, column in enumerate(targets.T):
        for value, number in ((1, shots), (0, shots * (targets.shape[1] - 1))):
            drawn[rng.choice(np.flatnonzero(column == value), number, replace=False), c] = value
    return drawn


def low_shot(source, data: str | Path | None = None, *, shots: Sequence[int] = SHOTS, samples: int = SAMPLES,
             costs: Sequence[float] = COSTS, levels: Sequence[str] | None = None, jobs: int = 1, seed: int = 0,
             out: str | Path | None = None, **features) -> dict:
    """Few labels: of every class k images that show it, for each k of `shots`, drawn `samples` times. As `svm`.

    Under a level and a k stand mean, min, max and std over the samples of the mAP on test, in %, with the one cost for
    all classes that is best there: chosen on the test images, as published. Under "held_out" the same with the cost
    that is best on the trainval images which the sample left: of more labels than k, but not of the test.
    """
    voc = _ready(source, data, seed, features)
    targets, k = voc.targets["train"], max(shots)
    _enough(voc, (targets == 1).sum(0), (targets == 0).sum(0), (k, k * (len(voc.classes) - 1)), f"shots {k}")
    rng = np.random.RandomState(seed)
    draws = [[draw(targets, k, rng) for k in shots] for _ in range(samples)]
    rows = {}
    for level in _levels(voc, levels):
        x, test, C = voc.unit(level, "train"), voc.unit(level, "test"), range(len(voc.classes))
        tasks = [(x, sample[:, c], targets[:, c], test, voc.targets["test"][:, c], costs, seed)
                 for line in draws for sample in line for c in C]
        ap = np.reshape(_parallel(jobs, _few, tasks), (samples, len(shots), len(C), len(costs), 2))
        # Over classes: samples x shots x costs x (test, held out). A sample may leave no image of a class.
        ap = 100 * np.ma.masked_invalid(ap).mean(axis=2).filled(np.nan)
        rows[level] = {str(k): _summary(ap[:, i], costs) for i, k in enumerate(shots)}
    best = max(rows, key=lambda level: np.mean([row["mean"] for row in rows[level].values()]))
    changed = {**({} if tuple(costs) == COSTS else {"costs": len(costs)}),
               **({} if samples == SAMPLES else {"samples": samples})}
    numbers = {"mAP": {k: row["mean"] for k, row in rows[best].items()}, "best_level": best, **rows,
               "cost_chosen_on": "test images, as published; under held_out: trainval images that were not drawn"}
    return _written(voc, named("voc07_low_shot", changed), numbers, seed, out)


def _few(x, sample, targets, test, test_targets, costs, seed) -> list[list[float]]:
    """Average precision, for each cost, on test and on what the sample left."""
    found, rest = [], np.where(sample == -1, targets, -1)
    for cost in costs:
        fit = _fit(x[sample != -1], np.where(sample[sample != -1] == 1, 1, -1), cost, seed)
        found.append([average_precision(test_targets, fit.decision_function(test)),
                      average_precision(rest, fit.decision_function(x))])
    return found


def _summary(ap: np.ndarray, costs: Sequence[float]) -> dict:
    """ap (samples, costs, 2): of the test images and of those held out."""
    def numbers(i: int) -> dict:
        x = ap[:, i, 0]
        return {"mean": float(x.mean()), "min": float(x.min()), "max": float(x.max()), "std": float(x.std()),
                "cost": costs[i]}
    mean = ap.mean(0)
    left = numbers(int(mean[:, 1].argmax())) if np.isfinite(mean).all() else None
    return {**numbers(int(mean[:, 0].argmax())), "held_out": left}


# ---------------------------------------------------------------- shared


def _ready(source, data, seed: int, features: dict) -> VocFeatures:
    return source if isinstance(source, VocFeatures) else voc_features(source, data, seed=seed, **features)


def _enough(voc: VocFeatures, shown: np.ndarray, absent: np.ndarray, needed: tuple[int, int], what: str) -> None:
    for name, *there, tested in zip(voc.classes, shown, absent, (voc.targets["test"] == 1).sum(0), strict=True):
        if there[0] < needed[0] or there[1] < needed[1] or not tested:
            raise InputError(f"{what} cannot be had of {voc.data}: {name!r} is shown by {there[0]} images of trainval, "
                             f"not by {there[1]}, and by {tested} of test; {needed[0]}, {needed[1]} and 1 are needed.")


def _levels(voc: VocFeatures, levels: Sequence[str] | None) -> list[str]:
    for level in levels or ():
        if level not in voc.levels:
            unknown("level", level, voc.levels)
    return list(levels or voc.levels)


def _parallel(jobs: int, function, tasks: list[tuple]) -> list:
    from joblib import Parallel, delayed

    return Parallel(n_jobs=jobs)(delayed(function)(*task) for task in tasks)


def _written(voc: VocFeatures, protocol: str, numbers: dict, seed: int, out: str | Path | None) -> dict:
    # Of a shuffled list the area is a little more than the share of the class, for the best precision to come is taken.
    rng, test = np.random.RandomState(0), voc.targets["test"]
    chance = np.mean([average_precision(t, rng.permutation(len(t))) for t in test.T for _ in range(20)])
    row = result_row(voc.source, voc.data, protocol, {**numbers, "chance": 100 * float(chance), "n": len(test)}, seed)
    folder = expanded(out) if out else voc.folder
    if folder:
        append_jsonl(folder / "results.jsonl", row)
    return row
