"""ODC: memory, labels and centroids that move with every step, repair of small clusters, and the zoo's row."""

import math
from types import SimpleNamespace

import conftest
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from test_distributed import leave
from torch.nn.functional import cosine_similarity

from sslnb import data, embedded, methods
from sslnb.batchnorm import sync_batchnorm
from sslnb.errors import InputError
from sslnb.evaluate.pixels import to_batch
from sslnb.optim import build as build_optimizer
from sslnb.parts import normalized

ROW = methods.recipes("odc")["r50_8xb64_step_ep440"]


def small(images=12, clusters=3, min_cluster=2, dim=2, **numbers):
    torch.manual_seed(0)
    return methods.recipes("odc")["demo"].with_(images=images, clusters=clusters, min_cluster=min_cluster, dim=dim,
                                                **numbers).build()


def circle(*degrees):
    return torch.tensor([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


def arranged(method, vectors, labels):
    """Put vectors and labels into the memory, and everything that follows from them."""
    method.bank.vectors.copy_(vectors)
    method.labels.copy_(torch.tensor(labels))
    method.sizes.copy_(method.labels.bincount(minlength=method.clusters))
    method.move_centroids()
    return method


# ---------------------------------------------------------------- the loss


def test_the_loss_is_the_mean_weighted_by_one_over_the_root_of_the_clusters_size():
    method = small()
    method.sizes.copy_(torch.tensor([100, 4, 25]))
    logits, y = torch.randn(5, 3), [0, 1, 1, 2, 0]
    above = below = 0.0
    for row, c in zip(logits.tolist(), y, strict=True):
        w = 1 / math.sqrt([100, 4, 25][c])
        above += w * (math.log(sum(math.exp(v) for v in row)) - row[c])
        below += w
    assert method.loss(logits, torch.tensor(y)).item() == pytest.approx(above / below, rel=1e-4)


def test_the_loss_is_torchs_weighted_mean_and_no_smaller_for_ten_thousand_clusters():
    """OpenMixup divides by the batch size: with weights that sum to 1 the loss shrinks ten-thousandfold."""
    method = small(images=10_000, clusters=1000)
    method.sizes.copy_(torch.randint(1, 50, (1000,)))
    logits, y = torch.randn(64, 1000), torch.randint(1000, (64,))
    w = (method.sizes + 1e-5) ** -0.5
    expected = torch.nn.functional.cross_entropy(logits, y, weight=w / w.sum())
    assert method.loss(logits, y).item() == pytest.approx(expected.item(), rel=1e-4)
    assert method.loss(torch.zeros(64, 1000), y).item() == pytest.approx(math.log(1000), rel=1e-4)


def test_without_reweighting_it_is_the_plain_mean():
    method = small(reweight=0.0)
    method.sizes.copy_(torch.tensor([10, 1, 1]))
    logits, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 2, 0])
    assert torch.allclose(method.loss(logits, y), torch.nn.functional.cross_entropy(logits, y))


# ---------------------------------------------------------------- the memory


def test_a_step_learns_the_old_labels_and_then_moves_memory_and_labels():
    angles = [0, 2, 4, 6, 90, 92, 94, 96, 45, 45, 45, 45]
    method = arranged(small(momentum=0.75), circle(*angles), [0] * 4 + [1] * 4 + [2] * 4)
    x, index = torch.randn(4, 3, 20, 20), torch.tensor([1, 5, 9, 4])
    before, labels, centroids = method.bank.vectors.clone(), method.labels.clone(), method.centroids.clone()
    out = method([x], index)
    h = method.head(out["f"])
    assert torch.allclose(out["loss"], method.loss(h, labels[index])), "the labels as they were"
    expected = normalized(0.75 * before[index] + 0.25 * normalized(out["f"].detach()))
    assert torch.allclose(method.bank.vectors[index], expected, atol=1e-6)
    y = [max(range(3), key=lambda c: float(centroids[c] @ v)) for v in expected]
    assert method.labels[index].tolist() == y and torch.equal(method.centroids, centroids)
    assert out["changed"].item() == (torch.tensor(y) != labels[index]).float().mean()
    rest = [i for i in range(12) if i not in index]
    assert torch.equal(method.bank.vectors[rest], before[rest]) and torch.equal(method.labels[rest], labels[rest])


def test_an_image_that_is_there_twice_has_one_label():
    method = small()
    index = torch.tensor([3, 7, 3, 3])
    f = torch.rand(4, 2)
    before = method.bank.vectors.clone()
    method.remember(index, f)
    expected = normalized(before[3].lerp(normalized(f[3]), 1 - method.momentum))
    assert torch.allclose(method.bank.vectors[3], expected)
    assert method.labels[3] == (expected @ method.centroids.T).argmax()


def test_looking_changes_nothing():
    method = small().eval()
    before = {k: v.clone() for k, v in method.state_dict().items()}
    assert "changed" not in method([torch.randn(4, 3, 20, 20)], torch.arange(4))
    assert all(torch.equal(before[k], v) for k, v in method.state_dict().items())


# ---------------------------------------------------------------- centroids


def test_centroids_move_every_tenth_step_to_the_plain_mean():
    method = arranged(small(min_cluster=0), circle(*[0, 90] * 6), [0, 1] * 6)
    method.bank.vectors.copy_(circle(*[0, 10] * 6))
    method.labels.copy_(torch.tensor([0] * 12))
    start = method.centroids.clone()
    for step in range(1, 10):
        method.after_step(step / 20)
        assert torch.equal(method.centroids, start), step
    method.after_step(0.5)
    assert torch.allclose(method.centroids[0], circle(0, 10).mean(0)) and method.centroids[0].norm() < 1
    assert torch.equal(method.centroids[1:], start[1:]), "an empty cluster keeps its centroid"
    assert method.sizes.tolist() == [12, 0, 0] and method.steps == 10


# ---------------------------------------------------------------- small clusters


def test_a_small_cluster_goes_to_its_nearest_and_gets_half_of_the_largest():
    angles = [0, 1, 2, 3, 30, 31, 32, 88, 90, 80]  # two heaps in cluster 0, cluster 1 about 90, one image in cluster 2
    method = arranged(small(images=10), circle(*angles), [0] * 7 + [1, 1, 2])
    method.after_step(0.1)
    assert method.labels[9] == 1, "80 degrees is nearer to 89 than to 14"
    assert method.labels[7:9].tolist() == [1, 1] and sorted(method.sizes.tolist()) == [3, 3, 4]
    parts = {frozenset(i for i in range(7) if method.labels[i] == c) for c in (0, 2)}
    assert parts == {frozenset({0, 1, 2, 3}), frozenset({4, 5, 6})}
    for c in (0, 2):
        assert torch.allclose(method.centroids[c], method.bank.vectors[method.labels == c].mean(0))
    assert torch.equal(method.sizes, method.labels.bincount(minlength=3))


def test_a_small_cluster_is_not_dissolved_into_another_small_one():
    angles = [0, 1, 2, 3, 4, 5, 6, 7, 60, 61]
    method = arranged(small(images=10, min_cluster=2), circle(*angles), [0] * 8 + [1, 2])
    method.after_step(0.1)
    assert (method.sizes >= 2).all() and torch.equal(method.sizes, method.labels.bincount(minlength=3))
    assert len(set(method.labels[8:].tolist())) == 1, "60 and 61 both joined cluster 0, and left it together"


def test_images_that_cannot_be_told_apart_are_split_all_the_same():
    method = arranged(small(images=8), circle(*[20] * 8), [0] * 8)
    method.after_step(0.1)
    assert (method.sizes >= 2).all() and method.centroids.isfinite().all()


def test_where_no_cluster_is_small_nothing_is_touched():
    method = arranged(small(min_cluster=4), circle(*range(12)), [0, 1, 2] * 4)
    labels, centroids = method.labels.clone(), method.centroids.clone()
    method.after_step(0.1)
    assert torch.equal(labels, method.labels) and torch.equal(centroids, method.centroids)


def test_repair_draws_nothing_from_the_generator_that_masks_and_negatives_are_drawn_from():
    method = arranged(small(images=8), circle(*[20] * 8), [0] * 8)
    state = torch.get_rng_state()
    method.after_step(0.1)
    assert torch.equal(state, torch.get_rng_state())


# ---------------------------------------------------------------- the first clusters


@pytest.fixture
def begun():
    recipe = methods.recipes("odc")["demo"].with_(data="few_digits", images=130)
    torch.manual_seed(0)
    method = recipe.build()
    run = SimpleNamespace(recipe=recipe, seed=0)
    method.before_train(run)
    return method, run


def test_the_first_clusters_are_k_means_of_the_untrained_projections(begun):
    method, _ = begun
    method.eval()
    images = data.load("few_digits")
    x = torch.stack([torch.from_numpy(images.items[i]) for i in (0, 50, 129)]).permute(0, 3, 1, 2).float() / 255
    f = method.projector(method.backbone(method.views(20).normalize.apply(x)))
    assert torch.allclose(cosine_similarity(f, method.bank.vectors[[0, 50, 129]]), torch.ones(3), atol=1e-4)
    assert torch.equal(method.sizes, method.labels.bincount(minlength=25)) and (method.sizes > 0).sum() > 20
    c = int(method.sizes.argmax())
    assert torch.allclose(method.centroids[c], method.bank.vectors[method.labels == c].mean(0), atol=1e-6)


def test_an_unreadable_image_leaves_the_others_their_places(tmp_path):
    for i in range(8):
        Image.effect_mandelbrot((20, 20), (-2, -1, 1, 1), 5 + 9 * i).convert("RGB").save(tmp_path / f"{i}.png")
    (tmp_path / "5.png").write_bytes(b"nothing")
    method = small(images=8, data=str(tmp_path))
    method.before_train(SimpleNamespace(recipe=methods.recipes("odc")["demo"].with_(data=str(tmp_path)), seed=0))
    method.eval()
    (x,) = method.views(20).normalize.apply(to_batch(data.load(str(tmp_path)), [6], 20, (0.0,) * 3, (1.0,) * 3)[0])
    f = method.projector(method.backbone(x[None]))
    assert cosine_similarity(f, method.bank.vectors[6:7]).item() == pytest.approx(1, abs=1e-4)
    assert method.bank.vectors[5].abs().max() == 0


def test_a_resumed_run_keeps_the_clusters_it_has(begun):
    method, run = begun
    method.labels.fill_(7)
    method.steps = 13
    twin = run.recipe.build()
    twin.load_state_dict(method.state_dict())
    twin.before_train(run)
    assert (twin.labels == 7).all() and twin.clustered
    assert twin.steps == 13, "of which every tenth moves the centroids"


# ---------------------------------------------------------------- order and optimizer


def test_images_are_drawn_with_replacement_the_same_in_every_process():
    method = small(images=5000)
    order = method.order(3, 7)
    assert len(order) == 5000 and order.min() >= 0 and order.max() < 5000
    assert len(set(order.tolist())) == pytest.approx(5000 * (1 - 1 / math.e), rel=0.03)
    assert (order == method.order(3, 7)).all()
    assert (order != method.order(3, 8)).any() and (order != method.order(4, 7)).any()


def test_the_head_has_no_momentum_and_everything_is_decayed():
    method = small()
    optimizer = build_optimizer(method.param_groups(ROW), ROW)
    rest, head = optimizer.param_groups
    assert (rest["momentum"], head["momentum"]) == (0.9, 0) and rest["weight_decay"] == head["weight_decay"] == 1e-5
    assert {id(p) for p in head["params"]} == {id(p) for p in method.head.parameters()}
    assert len(rest["params"]) + 2 == len(list(method.parameters()))


# ---------------------------------------------------------------- the zoo


def test_the_zoo_row():
    assert [n for n in methods.recipes("odc") if n != "demo"] == ["r50_8xb64_step_ep440"]
    assert ROW.total_batch == 512 and ROW.precision == "fp32" and (ROW.optimizer, ROW.sgd_momentum) == ("sgd", 0.9)
    assert [ROW.lr_at(e * 2502, 2502) for e in (0, 399, 400, 439)] == pytest.approx([0.06, 0.06, 0.024, 0.024])
    with torch.device("meta"):
        method = ROW.build()
    assert (method.clusters, method.min_cluster, method.momentum, method.reweight) == (10_000, 20, 0.5, 0.5)
    assert (method.every, method.iterations, method.sync_bn) == (10, 20, True)


def test_the_real_model():
    with torch.device("meta"):
        method = ROW.build()
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in method.named_children()}
    assert counts == {"backbone": 23_508_032, "projector": 1_180_416, "head": 2_570_000, "bank": 0}
    first, norm, _, dropout, second, last = method.projector
    assert (first.in_features, first.out_features, second.out_features) == (2048, 512, 256)
    assert norm.momentum == 0.001 and not norm.affine and dropout.p == 0.5 and isinstance(last, torch.nn.ReLU)
    assert method.bank.vectors.shape == (1_281_167, 256) and method.bank.vectors.numel() * 4 == 1_311_915_008
    assert method.centroids.shape == (10_000, 256) and method.labels.shape == (1_281_167,)


def test_its_layers_start_as_the_official_code_draws_them():
    method = small(hidden_dim=256, dim=200, clusters=3)
    first, second = method.projector[0], method.projector[4]
    for layer, std in ((first, (2 / 64) ** 0.5), (second, (2 / 256) ** 0.5), (method.head, 0.01)):
        assert layer.weight.std().item() == pytest.approx(std, rel=0.1) and layer.bias.abs().max() == 0


def test_views_are_deepclusters():
    with torch.device("meta"):
        (view,) = ROW.build().views(224).views
    ops = [type(op).__name__ for op in view.image_ops + view.batch_ops]
    assert ops == ["Pad", "RandomResizedCrop", "HorizontalFlip", "RandomRotation",
                   "ColorJitter", "Greyscale", "Normalize"]
    assert view.image_ops[1].scale == (0.08, 1.0) and view.image_ops[3].degrees == 2 and view.image_ops[0].pixels == 0
    assert vars(view.batch_ops[0]) == {"brightness": 0.4, "contrast": 0.4, "saturation": 1.0, "hue": 0.5, "p": 1.0}
    assert view.batch_ops[1].p == 0.2


def test_clusters_that_cannot_all_be_large_enough_are_refused():
    with pytest.raises(InputError, match="500 clusters of at least min_cluster=20 images need 10000 images"):
        small(images=1300, clusters=500, min_cluster=20)


# ---------------------------------------------------------------- several processes


def lived(rank, world):
    """First clusters, a batch with duplicates and lopsided sizes, upkeep with repair: the state after it."""
    recipe = methods.recipes("odc")["demo"].with_(data="few_digits", images=130, every=1)
    torch.manual_seed(0)
    method = recipe.build().train()
    if world > 1:
        sync_batchnorm(method, cuda=False)
    torch.manual_seed(100 + rank)  # as in train.py: processes differ in what they draw
    method.before_train(SimpleNamespace(recipe=recipe, seed=0))
    generator = torch.Generator().manual_seed(1)
    x, index = torch.randn(16, 3, 20, 20, generator=generator), torch.randint(130, (16,), generator=generator)
    index[9] = index[2]
    method.sizes.copy_(torch.arange(25) ** 2)
    mine = slice(rank * 16 // world, (rank + 1) * 16 // world)
    loss = method([x[mine]], index[mine])["loss"]
    loss.backward()
    method.labels[method.labels < 5] = 6  # five clusters die
    method.after_step(0.1)
    return {"loss": loss.detach(), "grad": method.head.weight.grad, **dict(method.named_buffers())}


def worker(rank, world, store, out):
    embedded.EMBEDDED["few_digits"] = conftest.few_digits
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.save(lived(rank, world), f"{out}{rank}.pt")
    leave()


@pytest.mark.distributed
def test_clusters_are_the_same_in_all_processes_and_those_of_one(tmp_path):
    mp.spawn(worker, (2, tmp_path / "store", tmp_path / "out"), nprocs=2)
    first, second = (torch.load(tmp_path / f"out{rank}.pt") for rank in range(2))
    alone = lived(0, 1)
    for key, value in alone.items():
        if key not in ("loss", "grad"):
            assert torch.equal(first[key], second[key]), key
            assert torch.allclose(first[key].float(), value.float(), rtol=1e-4, atol=1e-5), key
        else:  # DDP averages gradients, and so are losses to be read
            assert torch.allclose((first[key] + second[key]) / 2, value, rtol=1e-4, atol=1e-6), key
    assert alone["sizes"].min() >= 1, "the dead ones live again"
