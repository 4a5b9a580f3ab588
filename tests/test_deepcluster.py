"""DeepCluster: what is clustered when, who gets which label, what the head forgets, and what the Sobel filter sees."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image
from test_distributed import leave

from sslnb import backbones, data, methods, optim
from sslnb.errors import InputError
from sslnb.evaluate.pixels import to_batch
from sslnb.methods import deepcluster
from sslnb.methods.deepcluster import DeepCluster
from sslnb.views import IMAGENET_MEAN, IMAGENET_STD, RandomRotation

DEMO = methods.recipes("deepcluster")["demo"]
ZOO = methods.recipes("deepcluster")["r50_sobel_8xb64_step_ep200"]


@pytest.fixture
def few(monkeypatch):
    """The demo on 60 digits, in 6 clusters, without loading more."""
    images = data.load("digits_scattered").subset(range(60))
    monkeypatch.setattr(data, "load", lambda *_, **__: images)
    recipe = DEMO.with_(images=60, clusters=6, pca=8, every=1, batch=20)
    return recipe.build(), SimpleNamespace(recipe=recipe, seed=0)


# ---------------------------------------------------------------- the Sobel stem


def test_sobel_is_the_two_kernels_on_the_mean_of_the_colours():
    x = torch.randn(3, 3, 9, 7)
    kernels = torch.tensor([[[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], [[1, 2, 1], [0, 0, 0], [-1, -2, -1]]])[:, None]
    grey = F.conv2d(x, torch.full((1, 3, 1, 1), 1 / 3))
    assert torch.allclose(backbones.sobel_maps(x), F.conv2d(grey, kernels, padding=1), atol=1e-5)


@pytest.mark.parametrize("name, size", [("resnet50", 224), ("resnet18", 32), ("resnet_mini", 20)])
def test_a_sobel_backbone_takes_colours_and_keeps_timms_names(name, size):
    model = backbones.build(name, size, sobel=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, model.num_features)
    assert torch.allclose(model(x), model(x.mean(1, keepdim=True).expand_as(x)), atol=1e-5), "colour must not matter"
    assert torch.equal(model(x), copy.deepcopy(model)(x))
    plain = backbones.build(name, size)
    assert model.state_dict().keys() == plain.state_dict().keys()
    first = [k for k, v in plain.state_dict().items() if v.shape != model.state_dict()[k].shape]
    assert len(first) == 1 and first[0].startswith("conv1") and model.state_dict()[first[0]].shape[1] == 2


def test_a_sobel_resnet50_loads_from_and_into_timm():
    model = backbones.build("resnet50", 224, sobel=True)
    plain = timm.create_model("resnet50", num_classes=0, in_chans=2)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval()(x), plain.eval()(backbones.sobel_maps(x)))


def test_sobel_needs_a_first_convolution():
    with pytest.raises(InputError, match="vit_mini does not have; use a ResNet"):
        backbones.build("vit_mini", 28, sobel=True)


# ---------------------------------------------------------------- loss and labels


def test_the_loss_is_the_mean_cross_entropy_with_the_labels_of_the_images():
    method = DEMO.with_(images=50, clusters=5, pca=4).build()
    method.labels.copy_(torch.randint(5, (50,)))
    views, index = [torch.randn(4, 3, 20, 20)], torch.tensor([41, 3, 3, 17])
    logits = method.head(method.backbone(views[0])).tolist()
    total = 0.0
    for row, i in zip(logits, index.tolist(), strict=True):
        total -= math.log(math.exp(row[method.labels[i]]) / sum(math.exp(v) for v in row))
    out = method(views, index)
    assert out["loss"].item() == pytest.approx(total / 4, rel=1e-4) and out["h"].shape == (4, 64)


def test_a_new_head_knows_nothing():
    method = DEMO.with_(images=500, clusters=50).build()
    loss = method([torch.randn(8, 3, 20, 20)], torch.arange(8))["loss"].item()
    assert loss == pytest.approx(math.log(50), abs=0.1)


def test_an_epoch_begins_with_new_clusters_and_a_new_head(few):
    method, run = few
    states = []
    for epoch in range(2):
        method.before_epoch(run, epoch)
        assert method.clustered == epoch and method.labels.min() == 0 and method.labels.max() == 5
        assert method.head.bias.abs().max() == 0 and 0.005 < method.head.weight.std() < 0.015
        with torch.no_grad():
            for p in method.parameters():
                p.add_(0.05 * torch.randn_like(p))
        states.append(copy.deepcopy(method.state_dict()))
    assert not torch.equal(states[0]["labels"], states[1]["labels"])
    assert 0 < states[1]["agreement"] < 1


def test_alike_images_share_a_cluster(few):
    method, run = few
    images = data.load("digits_scattered")
    images.items = np.concatenate([images.items[:6]] * 10)  # ten copies of six digits
    method.before_epoch(run, 0)
    assert torch.equal(method.labels.view(10, 6), method.labels[:6].expand(10, 6))


def test_what_is_clustered_is_what_the_head_reads(few, monkeypatch):
    recipe = few[1].recipe.with_(backbone="vit_mini", backbone_numbers={}, pool="mean")  # which is evaluation's
    method, seen = recipe.build(), []
    monkeypatch.setattr(deepcluster, "whiten", lambda x, *_, **__: seen.append(x) or x)
    method.cluster(recipe, 0)
    method.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    method.eval()([to_batch(data.load("digits_scattered"), range(60), 20, IMAGENET_MEAN, IMAGENET_STD)[0]])
    assert torch.allclose(*seen, atol=1e-5)


def test_a_resumed_epoch_keeps_clusters_and_head(few):
    method, run = few
    method.before_epoch(run, 0)
    twin = run.recipe.build()
    twin.load_state_dict(copy.deepcopy(method.state_dict()))
    with torch.no_grad():
        for m in (method, twin):
            for p in m.parameters():
                p.add_(0.1)  # training went on, then the process ended
    before = copy.deepcopy(twin.state_dict())
    twin.before_epoch(run, 0)
    assert all(torch.equal(before[k], v) for k, v in twin.state_dict().items())
    assert np.array_equal(method.order(0, 0), twin.order(0, 0))
    method.before_epoch(run, 1), twin.before_epoch(run, 1)
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in method.state_dict().items())


def test_clusters_may_last_several_epochs(few, monkeypatch):
    method, run = few
    method.every, method.iterations = 3, 7
    seen = []
    monkeypatch.setattr(deepcluster, "kmeans", lambda x, k, iterations, seed, shared: (
        seen.append((seed, iterations)), torch.arange(len(x)) % k))
    for epoch in range(7):
        method.before_epoch(run, epoch)
        assert method.clustered == epoch - epoch % 3
    assert len(seen) == len(set(seen)) == 3 and {iterations for _, iterations in seen} == {7}


def test_an_epoch_shows_every_cluster_equally_often(few):
    method, _ = few
    method.labels.copy_(torch.tensor([0] * 50 + [1] * 6 + [4] * 4))
    drawn = torch.bincount(method.labels[method.order(0, 3)], minlength=6)
    assert drawn.sum() == 60 and drawn[[0, 1, 4]].min() >= 18 and drawn[[2, 3, 5]].sum() == 0
    assert not np.array_equal(method.order(0, 3), method.order(0, 4))
    method.uniform = False
    assert method.order(0, 3) is None


def test_an_unreadable_image_is_in_no_cluster_and_never_drawn(tmp_path):
    for i in range(12):
        Image.effect_mandelbrot((24, 24), (-2, -1, 1, 1), 5 + 3 * i).convert("RGB").save(tmp_path / f"{i:02d}.png")
    (tmp_path / "05.png").write_bytes(b"nothing")
    recipe = DEMO.with_(data=str(tmp_path), images=12, clusters=3, pca=4, every=1)
    method = recipe.build()
    method.before_epoch(SimpleNamespace(recipe=recipe, seed=0), 0)
    assert method.labels[5] == -1 and method.labels[torch.arange(12) != 5].min() >= 0
    assert 5 not in method.order(0, 0)


# ---------------------------------------------------------------- optimizer and recipe


def test_the_head_has_no_momentum_and_everything_decays():
    method = ZOO.with_(backbone="resnet_mini", size=20, images=500, clusters=50, pca=64).build()
    optimizer = optim.build(method.param_groups(ZOO), ZOO)
    assert isinstance(optimizer, torch.optim.SGD)
    assert [g["momentum"] for g in optimizer.param_groups] == [0.9, 0.0]
    assert all(g["weight_decay"] == 1e-5 for g in optimizer.param_groups)
    held = [p for g in optimizer.param_groups for p in g["params"]]
    assert {id(p) for p in held} == {id(p) for p in method.parameters()} and len(held) == len(set(held))
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == {id(p) for p in method.head.parameters()}


def test_the_released_recipe_has_its_filter_its_optimizer_and_its_size():
    assert ZOO.total_batch == 512 and ZOO.optimizer == "sgd" and (ZOO.lr, ZOO.weight_decay) == (0.1, 1e-5)
    assert {ZOO.lr_at(epoch * 2502, 2502) for epoch in range(200)} == {0.1}
    with torch.device("meta"):
        built = ZOO.build()
    counts = {k: sum(p.numel() for p in m.parameters()) for k, m in built.named_children()}
    assert counts == {"backbone": 23_504_896, "head": 20_490_000}
    assert built.backbone.conv1.weight.shape == (64, 2, 7, 7)
    assert built.labels.shape == (1_281_167,) and built.head.out_features == built.clusters == 10_000
    assert (built.pca, built.iterations, built.every) == (256, 20, 1) and built.sync_bn


def test_the_views_of_the_zoo():
    (view,) = ZOO.with_(backbone="resnet18", size=32, images=10_000).build().views(224).views
    crop, flip, rotate, jitter, grey, _ = (*view.image_ops, *view.batch_ops)
    assert (crop.scale, crop.interpolation, flip.p, rotate.degrees, grey.p) == ((0.08, 1.0), "bilinear", 0.5, 2.0, 0.2)
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue, jitter.p) == (0.4, 0.4, 1.0, 0.5, 1.0)


def test_rotation_is_torchvisions():
    from torchvision.transforms.functional import rotate

    class Fixed:
        def uniform(self, low, high):
            assert (low, high) == (-30, 30)
            return 17.5
    image = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).convert("RGB")
    assert np.array_equal(np.asarray(RandomRotation(30)(image, Fixed())), np.asarray(rotate(image, 17.5)))
    assert RandomRotation(0)(image, None) is image


@pytest.mark.parametrize("numbers, words", [
    ({"clusters": 1301}, "1301 clusters of 1300 images"), ({"pca": 65}, "65 principal components of 64 features")])
def test_impossible_numbers_are_refused_before_any_work(numbers, words):
    with pytest.raises(InputError, match=words):
        DEMO.with_(**numbers).build()


# ---------------------------------------------------------------- several processes


def cluster_worker(rank, world, store, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.save(clustered(), f"{out}{rank}")
    leave()


def clustered():
    torch.manual_seed(0)
    method = DEMO.with_(clusters=30).build()
    assert isinstance(method, DeepCluster)
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 7)  # as in training, processes differ from here on
    method.before_epoch(SimpleNamespace(recipe=DEMO, seed=0), 0)
    return {**method.state_dict(), "order": torch.from_numpy(method.order(0, 0))}


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_all_processes_share_labels_head_and_order_and_they_are_those_of_one(tmp_path, world):
    from sklearn.metrics import normalized_mutual_info_score

    mp.spawn(cluster_worker, (world, tmp_path / "store", tmp_path / "out"), nprocs=world)
    first, *others = (torch.load(tmp_path / f"out{rank}") for rank in range(world))
    assert all(torch.equal(first[k], other[k]) for other in others for k in first)
    alone = clustered()
    assert torch.equal(first["head.weight"], alone["head.weight"])
    # Sums in another order differ in the last digit, which may move an image that lies between two clusters.
    assert normalized_mutual_info_score(first["labels"], alone["labels"]) > 0.98
