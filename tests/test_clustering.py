"""k-means, whitening, splitting, even sampling: against plain loops, scikit-learn and one process; bounded memory."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_distributed import leave
from torch.utils._python_dispatch import TorchDispatchMode

from sslnb import clustering
from sslnb.clustering import assign, evenly, halves, kmeans, whiten
from sslnb.errors import InputError


def blobs(each=30, k=5, d=6, spread=8.0):
    return (torch.randn(k, d) * spread).repeat_interleave(each, 0) + torch.randn(k * each, d)


def inertia(x, centroids, labels):
    return ((x - centroids[labels]) ** 2).sum().item()


def nearest(row, centroids):
    return min(range(len(centroids)), key=lambda c: sum((a - b) ** 2 for a, b in zip(row, centroids[c], strict=True)))


# ---------------------------------------------------------------- k-means


@pytest.mark.parametrize("chunk", [1, 24, 2**22])
def test_assign_finds_the_nearest_centroid_in_any_chunks(monkeypatch, chunk):
    monkeypatch.setattr(clustering, "CHUNK", chunk)
    x, centroids = torch.randn(53, 4), torch.randn(7, 4)
    assert assign(x, centroids).tolist() == [nearest(row, centroids.tolist()) for row in x.tolist()]


def test_kmeans_is_lloyds_algorithm():
    x, k = torch.randn(60, 3), 4
    centroids = x[torch.randperm(60, generator=torch.Generator().manual_seed(5))[:k]].tolist()
    for _ in range(6):
        labels = [nearest(row, centroids) for row in x.tolist()]
        members = [[row for row, y in zip(x.tolist(), labels, strict=True) if y == c] for c in range(k)]
        centroids = [[sum(column) / len(rows) for column in zip(*rows, strict=True)] for rows in members]
    found, y = kmeans(x, k, iterations=6, seed=5)
    assert torch.allclose(found, torch.tensor(centroids), atol=1e-5)
    assert y.tolist() == [nearest(row, centroids) for row in x.tolist()]


def test_kmeans_ends_where_scikit_learn_ends():
    from sklearn.cluster import KMeans

    x = blobs(k=8)
    start = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:8]]
    theirs = KMeans(8, init=start.numpy(), n_init=1, max_iter=50, tol=0).fit(x.numpy())
    centroids, labels = kmeans(x, 8, iterations=50)
    assert inertia(x, centroids, labels) == pytest.approx(theirs.inertia_, rel=1e-5)


def test_more_iterations_never_make_it_worse_and_seeds_matter():
    x = torch.randn(400, 5)
    costs = [inertia(x, *kmeans(x, 12, iterations=i, seed=1)) for i in range(0, 16, 3)]
    assert all(a >= b for a, b in zip(costs, costs[1:], strict=False)) and costs[-1] < 0.9 * costs[0]
    first, again, other = (kmeans(x, 12, seed=s)[1] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_an_empty_cluster_takes_half_of_the_largest():
    centroids = torch.tensor([[1.0, 2.0, 4.0], [9.0, 9.0, 9.0], [5.0, 5.0, 5.0], [7.0, 7.0, 7.0]])
    before = centroids.clone()
    clustering._fill_empty(centroids, torch.tensor([10, 0, 3, 0]))
    a, b = 1 - 1 / 1024, 1 + 1 / 1024
    # Cluster 0 (10 members) is halved for cluster 1, then cluster 0 (5) or 1 (5), the first, for cluster 3.
    assert torch.allclose(centroids[1], before[0] * torch.tensor([b, a, b]))
    assert torch.allclose(centroids[0], before[0] * torch.tensor([a, b, a]) * torch.tensor([a, b, a]))
    assert torch.allclose(centroids[3], before[0] * torch.tensor([a, b, a]) * torch.tensor([b, a, b]))
    assert torch.equal(centroids[2], before[2])


def test_clusters_that_lose_all_rows_come_back():
    """Where two start rows are the same point, one gets all its rows; the other must not stay empty for ever."""
    x = torch.cat([torch.ones(40, 2), torch.randn(60, 2) + 20])
    for seed in range(8):
        assert torch.bincount(kmeans(x, 3, seed=seed)[1], minlength=3).min() > 0


def test_a_collapsed_network_is_clustered_without_harm():
    centroids, labels = kmeans(torch.full((40, 4), 0.5), 10)
    assert centroids.isfinite().all() and len(labels) == 40
    assert whiten(torch.full((40, 4), 0.5), 2).abs().max() == 0


class Largest(TorchDispatchMode):
    """The number of values of the largest tensor that any op returned."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not op.is_view:
            self.values = max(self.values, out.numel())
        return out


def test_memory_does_not_grow_with_the_number_of_images(monkeypatch):
    monkeypatch.setattr(clustering, "CHUNK", 4000)
    for n in (2_000, 16_000):
        x, wide, mode = torch.randn(n, 4), torch.randn(n, 16), Largest()
        with mode:
            kmeans(x, 100, iterations=2)
        assert mode.values <= max(4000, n), "beside the labels (n,), nothing is larger than a chunk"
        with mode:
            whiten(wide, 2)
        assert mode.values <= max(4000, 2 * n), "nor beside the result (n, 2)"


# ---------------------------------------------------------------- 2-means, whitening, sampling


def test_halves_separates_what_is_apart_and_always_splits():
    x = torch.cat([torch.randn(30, 4), torch.randn(10, 4) + 20])[(order := torch.randperm(40))]
    side = halves(x)
    assert torch.equal(side, order >= 30) or torch.equal(side, order < 30)
    for n in (2, 7):
        assert 1 <= halves(torch.ones(n, 3), seed=n).sum() <= n - 1
    assert sorted(halves(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).tolist()) == [False, True]


def test_whitened_directions_are_those_of_scikit_learn():
    from sklearn.decomposition import PCA

    x = torch.randn(200, 8) @ torch.randn(8, 8) + 1000  # far from the origin, where E[x²] − E[x]² would lose everything
    theirs = torch.tensor(PCA(3, whiten=True, svd_solver="full").fit_transform(x.double().numpy())).float()
    mine, theirs = whiten(x, 3), torch.nn.functional.normalize(theirs)
    assert torch.allclose(mine @ mine.T, theirs @ theirs.T, atol=2e-3)  # signs and order are free, similarities are not
    assert torch.allclose(mine.norm(dim=1), torch.ones(200), atol=1e-5)


def test_a_constant_feature_is_not_blown_up():
    x = torch.cat([torch.randn(100, 3), torch.full((100, 2), 0.3)], 1)
    assert torch.allclose(whiten(x, 5).norm(dim=1), torch.ones(100), atol=1e-5)
    same = whiten(x, 5) @ whiten(x, 5).T - whiten(x[:, :3], 3) @ whiten(x[:, :3], 3).T
    assert same.abs().max() < 1e-3


def test_evenly_gives_every_cluster_the_same_share():
    labels = torch.tensor([0] * 90 + [-1] * 6 + [5] * 3 + [2] * 1)  # clusters 1, 3 and 4 are empty, -1 is none
    drawn = evenly(labels, seed=0)
    assert len(drawn) == 100 and set(labels[drawn].tolist()) == {0, 2, 5}
    counts = torch.bincount(labels[drawn])
    assert counts[[0, 2, 5]].min() >= 31 and counts.max() <= 34  # 100 // 3 + 1 = 34 each, then cut to 100
    many = drawn[labels[drawn].numpy() == 0]
    assert len(set(many)) == len(many), "a cluster with more images than its share repeats none"
    assert np.array_equal(drawn, evenly(labels, 0)) and not np.array_equal(drawn, evenly(labels, 1))
    assert evenly(torch.arange(50), 0).max() < 50 and len(evenly(torch.zeros(50, dtype=torch.int64), 0)) == 50


@pytest.mark.parametrize("call, words", [
    (lambda: kmeans(torch.randn(5, 2), 6), "6 clusters of 5 images are impossible; use between 1 and 5"),
    (lambda: kmeans(torch.randn(5, 2), 0), "0 clusters of 5"),
    (lambda: whiten(torch.randn(9, 4), 5), "5 principal components of 4 features are impossible")])
def test_impossible_numbers(call, words):
    with pytest.raises(InputError, match=words):
        call()


# ---------------------------------------------------------------- several processes


def shared_worker(rank, world, store, x, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    mine = x[: len(x) // 5] if rank == 0 else x[len(x) // 5:].tensor_split(world - 1)[rank - 1]  # shares of any length
    z = whiten(mine, 4, shared=True)
    centroids, labels = kmeans(z, 5, seed=3, shared=True)
    torch.save((z, centroids, labels), f"{out}{rank}")
    leave()


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_shared_rows_give_the_clusters_of_all_rows(tmp_path, world):
    x = blobs()[torch.randperm(150)]
    mp.spawn(shared_worker, (world, tmp_path / "store", x, tmp_path / "out"), nprocs=world)
    parts = [torch.load(tmp_path / f"out{rank}") for rank in range(world)]
    z = whiten(x, 4)
    centroids, labels = kmeans(z, 5, seed=3)
    there = torch.cat([z for z, _, _ in parts])
    assert torch.allclose(there @ there.T, z @ z.T, atol=1e-4)
    assert all(torch.equal(c, parts[0][1]) for _, c, _ in parts)
    assert torch.allclose(parts[0][1] @ parts[0][1].T, centroids @ centroids.T, atol=1e-4)
    assert torch.equal(torch.cat([y for _, _, y in parts]), labels)


def test_clusters_come_mixed():
    from sslnb.clustering import evenly

    labels = torch.arange(1000) // 100
    drawn = labels[evenly(labels, seed=0)]
    batches = drawn[:992].view(31, 32)
    assert all(len(batch.unique()) > 5 for batch in batches), "not one cluster after the other"
