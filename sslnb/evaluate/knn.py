"""Weighted k-nearest-neighbour classification of frozen features: nothing is learned, nothing is tuned.

The k most similar training images vote for their class with weight exp(s / τ), s the cosine similarity
(arXiv 1805.01978; k = 20 and τ = 0.07 as in facebookresearch/dino eval_knn.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

KS = (10, 20, 100, 200)  # DINO's
BANK_CHUNKS = 16  # bank rows per step, as a multiple of the test rows: 1024 x 16384 similarities are 64 MB


@dataclass
class KNN:
    """Accuracies in %; `top5` is None where it means nothing (k < 5 or at most 5 classes)."""

    top1: float
    top5: float | None
    predictions: Tensor  # (M,) int64


def weighted_knn(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, k: int = 20,
                 temperature: float = 0.07, chunk: int = 1024, exclude_self: bool = False) -> KNN:
    """Classify test (M, D) by its k nearest rows of train (N, D); labels (N,), (M,) count from 0, gaps allowed.

    Works in pieces of `chunk` tests by 16 * `chunk` training rows, so the N x M similarities never exist at once; the
    bank may stay on the CPU, in 16 bits, while the tests are on a GPU. Beside the features it holds two float copies of
    16 * `chunk` rows of the bank and their similarities: 0.4 GB at D = 2048, whatever N and M. `exclude_self`: train
    and test are the same rows, and no image may be its own neighbour (leave-one-out). A class nobody voted for is never
    a top-5 hit. Raises InputError for sizes that do not fit and for k larger than the bank.
    """
    return knn_grid(train, train_labels, test, test_labels, ks=[k], temperature=temperature, chunk=chunk,
                    exclude_self=exclude_self)[k]


def knn_grid(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *, ks: Sequence[int] = KS,
             temperature: float = 0.07, chunk: int = 1024, exclude_self: bool = False) -> dict[int, KNN]:
    """`weighted_knn` for several k at the cost of the largest: {k: its result}."""
    for k in ks:
        _check(train, train_labels, test, test_labels, k, temperature, exclude_self)
    train_labels, test_labels = train_labels.to(test.device), test_labels.to(test.device)
    classes = 1 + int(max(train_labels.max(), test_labels.max()))
    predictions: dict[int, list[Tensor]] = {k: [] for k in ks}
    hits5 = dict.fromkeys(ks, 0)
    for start in range(0, len(test), chunk):
        queries = F.normalize(test[start:start + chunk].float(), dim=1)  # m x D
        s, rows = _nearest(train, queries, max(ks), BANK_CHUNKS * chunk, start if exclude_self else None)
        for k in ks:
            votes = _votes(s[:, :k], train_labels[rows[:, :k]], classes, temperature)  # m x C
            predictions[k].append(votes.argmax(1))
            best, ranked = votes.topk(min(5, classes), dim=1)
            hits5[k] += int(((ranked == test_labels[start:start + chunk, None]) & (best > 0)).sum())
    found = {}
    for k in ks:
        predicted = torch.cat(predictions[k])
        top5 = 100 * hits5[k] / len(test) if k >= 5 and classes > 5 else None
        found[k] = KNN(100 * int((predicted == test_labels).sum()) / len(test), top5, predicted)
    return found


def _nearest(bank: Tensor, queries: Tensor, k: int, step: int, first: int | None) -> tuple[Tensor, Tensor]:
    """The k largest cosine similarities (m, k) and their rows in the bank (m, k), keeping a running best k.

    `first`: number of the first query when the queries are rows of the bank that must not find themselves.
    """
    best = queries.new_full((len(queries), 0), 0)
    rows = torch.zeros(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(bank), step):
        part = F.normalize(bank[start:start + step].to(queries.device).float(), dim=1)  # n x D
        s = queries @ part.T  # m x n
        number = torch.arange(start, start + len(part), device=queries.device)
        if first is not None:
            own = torch.arange(first, first + len(queries), device=queries.device)
            s = s.masked_fill(own[:, None] == number, -torch.inf)
        s, near = s.topk(min(k, len(part)), dim=1)
        best, order = torch.cat([best, s], 1).topk(min(k, best.shape[1] + s.shape[1]), dim=1)
        rows = torch.cat([rows, number[near]], 1).gather(1, order)
    return best, rows


def _votes(s: Tensor, labels: Tensor, classes: int, temperature: float) -> Tensor:
    """Sum of exp(s / τ) per class, (m, C), in float32.

    The nearest neighbour's similarity is taken off first: it scales a whole row, so the ranking stays, and
    small temperatures cannot overflow.
    """
    weights = ((s - s[:, :1]) / temperature).exp()  # m x k
    return torch.zeros(len(s), classes, device=s.device).scatter_add_(1, labels, weights)


def _check(train, train_labels, test, test_labels, k, temperature, exclude_self) -> None:
    if len(train) != len(train_labels) or len(test) != len(test_labels):
        raise InputError(f"Features and labels differ in number: {len(train)} and {len(train_labels)} in "
                         f"train, {len(test)} and {len(test_labels)} in test. Give one label per row.")
    if exclude_self and len(train) != len(test):
        raise InputError(f"exclude_self needs the same rows on both sides, not {len(train)} and {len(test)}.")
    bank = len(train) - 1 if exclude_self else len(train)
    if bank < 1:
        raise InputError("The bank has no image that could be a neighbour: give more images, or some that can be read.")
    if not 1 <= k <= bank:
        raise InputError(f"k={k} neighbours cannot be taken from {bank} images: choose k from 1 to {bank}.")
    if len(test) == 0:
        raise InputError("The test set is empty: there is nothing to classify.")
    if temperature <= 0:
        raise InputError(f"temperature={temperature} must be positive, for example 0.07.")
    if min(train_labels.min(), test_labels.min()) < 0:
        raise InputError("Labels must count from 0: take unlabelled images (-1) out first.")
