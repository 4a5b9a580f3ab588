"""Clustering of every image: PCA whitening, k-means, 2-means, and drawing images evenly over clusters.

Plain torch on the device of the features. Similarities are computed and used up in chunks of CHUNK numbers, so what is
needed beside the features does not grow with their number. With `shared=True` the features are spread over processes:
each holds its own rows, all call together, only sums travel, and every process gets the centroids of all rows.
"""

import heapq

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .parts import gather, normalized, sum_over_processes, world

CHUNK = 2**22  # numbers at once: 16 MiB


@torch.no_grad()
def kmeans(x: Tensor, k: int, iterations: int = 20, seed: int = 0, *, shared: bool = False) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from k random rows: x (N, d) float32 -> centroids (k, d), nearest centroid of each row (N,).

    A cluster that is empty gets half of the largest one, as in faiss. The labels are those of the last centroids, so a
    cluster may still be empty in them.
    """
    total = int(_sum(torch.tensor(len(x), device=x.device), shared))
    check_clusters(k, total)
    centroids = _rows(x, torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:k], shared)
    for _ in range(iterations):
        labels = assign(x, centroids)
        counts = _sum(torch.bincount(labels, minlength=k), shared)
        sums = _sum(torch.zeros_like(centroids).index_add_(0, labels, x), shared)
        centroids = sums / counts.clamp(min=1)[:, None]
        _fill_empty(centroids, counts)
    return centroids, assign(x, centroids)


@torch.no_grad()
def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of each row: argmin ‖x − c‖² = argmax x·c − ‖c‖²/2.  (N, d), (k, d) -> (N,) int64."""
    shift = -(centroids**2).sum(1) / 2
    rows = max(1, CHUNK // len(centroids))
    labels = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for start in range(0, len(x), rows):
        labels[start:start + rows] = torch.addmm(shift, x[start:start + rows], centroids.T).argmax(1)
    return labels


def _fill_empty(centroids: Tensor, counts: Tensor) -> None:
    """In place: each empty cluster becomes a copy of the largest, the two pushed apart by 1/1024 of themselves."""
    counts = counts.tolist()
    push = torch.ones_like(centroids[0]) / 1024
    push[1::2] *= -1
    sizes = [(-n, c) for c, n in enumerate(counts) if n > 0]  # a heap: of a collapsed network nearly all are empty
    heapq.heapify(sizes)
    for empty in (c for c, n in enumerate(counts) if n == 0):
        n, largest = heapq.heappop(sizes)
        centroids[empty] = centroids[largest] * (1 + push)
        centroids[largest] *= 1 - push
        half = -n // 2
        heapq.heappush(sizes, (-half, empty))
        heapq.heappush(sizes, (n + half, largest))


@torch.no_grad()
def halves(x: Tensor, seed: int = 0) -> Tensor:
    """Split the rows in two by 2-means: x (n, d), n ≥ 2 -> (n,) bool with at least one row on either side.

    Rows that cannot be told apart are halved at random.
    """
    _, labels = kmeans(x, 2, seed=seed)
    if labels.min() == labels.max():
        labels = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device) % 2
    return labels == 1


@torch.no_grad()
def whiten(x: Tensor, dim: int, device: torch.device | str | None = None, *, shared: bool = False) -> Tensor:
    """PCA to `dim` directions, each scaled to variance 1, then rows of length 1: x (N, D) -> (N, dim) on `device`.

    Only chunks of x move to `device`. A direction in which nothing varies stays 0: dividing by its deviation would
    turn rounding errors into features.
    """
    check_components(dim, x.shape[1])
    device, chunks = device or x.device, x.split(max(1, CHUNK // x.shape[1]))
    total = _sum(torch.tensor(len(x), device=device), shared)
    mean = _sum(sum(c.to(device).sum(0) for c in chunks), shared) / total
    covariance = x.new_zeros(x.shape[1], x.shape[1], device=device)
    for c in chunks:
        c = c.to(device) - mean  # centred first: E[x²] − E[x]² cancels badly in float32
        covariance.addmm_(c.T, c)
    variance, basis = torch.linalg.eigh(_sum(covariance, shared).double().cpu() / int(total))  # ascending
    variance, basis = variance[-dim:], basis[:, -dim:]
    basis = basis * torch.where(variance > 1e-6 * variance[-1], variance, torch.inf)**-0.5
    # Eigenvectors have no sign of their own, and another processor may choose another: all take those of process 0.
    basis = basis.to(device, x.dtype)
    if shared and world()[0] > 0:
        basis.zero_()
    basis = _sum(basis, shared)
    return torch.cat([normalized((c.to(device) - mean) @ basis) for c in chunks])


def evenly(labels: Tensor, seed: int) -> np.ndarray:
    """As many images as there are labels, every cluster equally often: labels (N,) -> image numbers (N,), shuffled.

    A small cluster repeats its images, a large one leaves some out, a label below 0 is no cluster.
    """
    labels, rng = labels.cpu().numpy(), np.random.RandomState(seed % 2**32)
    order = np.argsort(labels, kind="stable")[np.count_nonzero(labels < 0):]
    clusters = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    each = len(labels) // len(clusters) + 1
    drawn = [rng.choice(cluster, each, replace=len(cluster) <= each) for cluster in clusters]
    return rng.permutation(np.concatenate(drawn))[:len(labels)]


def check_clusters(k: int, images: int) -> int:
    if not 1 <= k <= images:
        raise InputError(f"{k} clusters of {images} images are impossible; use between 1 and {images}.")
    return k


def check_components(dim: int, features: int) -> int:
    if not 1 <= dim <= features:
        raise InputError(f"{dim} principal components of {features} features are impossible; "
                         f"use between 1 and {features}.")
    return dim


def _sum(x: Tensor, shared: bool) -> Tensor:
    return sum_over_processes(x) if shared else x


def _rows(x: Tensor, numbers: Tensor, shared: bool) -> Tensor:
    """x[numbers], where the numbers count the rows of all processes, those of process 0 first."""
    if not shared:
        return x[numbers.to(x.device)].clone()
    lengths = gather(torch.tensor([len(x)], device=x.device)).tolist()
    here = numbers.to(x.device) - sum(lengths[:world()[0]])
    mine = (here >= 0) & (here < len(x))
    rows = x.new_zeros(len(numbers), x.shape[1])
    rows[mine] = x[here[mine]]
    return sum_over_processes(rows)
