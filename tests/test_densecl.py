"""DenseCL: which cell is matched with which, both losses by hand, what enters the two queues, the zoo's row."""

import math

import pytest
import torch
from torch import nn

from sslnb import backbones, losses, methods, optim
from sslnb.backbones import cells
from sslnb.methods.densecl import RECIPES, DenseCL
from sslnb.parts import normalized
from sslnb.views import Blur, ColorJitter, Greyscale, HorizontalFlip, RandomResizedCrop

ROW = RECIPES["r50_4xb64_cos"]


def built(**numbers):
    torch.manual_seed(0)
    return RECIPES["demo"].with_(**numbers).build()


@pytest.fixture
def views():
    return [torch.randn(4, 3, 12, 12) for _ in range(2)]  # maps of 3 x 3 cells


# The cells of a map

def test_cells_of_a_resnet_come_row_by_row_and_their_mean_is_what_is_evaluated():
    backbone, x = backbones.build("resnet_mini", 20).eval(), torch.randn(2, 3, 20, 20)
    y, mapped = cells(backbone, x), backbone.forward_features(x)
    assert y.shape == (2, 25, 64) and torch.equal(y[1, 5 * 3 + 1], mapped[1, :, 3, 1])
    assert torch.allclose(y.mean(1), backbone(x), atol=1e-6)


def test_cells_of_a_vit_are_its_patches():
    vit, x = backbones.build("vit_mini", 28).eval(), torch.randn(2, 3, 28, 28)
    assert torch.equal(cells(vit, x), vit.forward_features(x)[:, 1:]) and cells(vit, x).shape == (2, 49, 64)


def test_a_vit_trains_too():
    method = built(backbone="vit_mini", size=28, data="fashion_small")
    assert method([torch.randn(4, 3, 28, 28) for _ in range(2)])["loss"].isfinite()


# The matching

def test_every_query_cell_gets_the_most_similar_key_cell():
    """By hand: both query cells are nearest to key cell 1, while key cell 0 is nearest to query cell 0."""
    f = normalized(torch.tensor([[[1.0, 0.0], [0.6, 0.8]]]))
    f_key = normalized(torch.tensor([[[0.0, -1.0], [0.9, 0.3]]]))
    assert built().match(f, f_key).tolist() == [[1, 1]]
    assert built().match(f_key, f).tolist() == [[0, 0]]


def test_a_permuted_map_is_matched_back():
    f = normalized(torch.randn(3, 9, 16))
    order = torch.stack([torch.randperm(9) for _ in range(3)])
    assert torch.equal(built().match(f, f.take_along_dim(order[:, :, None], 1)), order.argsort(1))


def test_random_matching_looks_at_nothing():
    f, method = normalized(torch.randn(200, 9, 16)), built(matching="random")
    found = method.match(f, f)
    assert set(found.flatten().tolist()) == set(range(9))
    assert (found == torch.arange(9)).float().mean() == pytest.approx(1 / 9, abs=0.03)


# The losses

def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(a):
    return [x / math.sqrt(dot(a, a)) for x in a]


@pytest.mark.parametrize("queries, others", [(1, 100), (3, 7), (100, 1), (100, 100)])
def test_queries_compared_few_at_a_time_have_the_loss_and_the_gradient_of_all(queries, others, monkeypatch):
    monkeypatch.setattr(losses, "ON_CPU", (queries, others))
    q, k, negatives = (torch.nn.functional.normalize(torch.randn(n, 8), dim=1) for n in (10, 10, 41))
    weights = torch.randn(8, 8, requires_grad=True)
    found = []
    for loss in (lambda x: losses.info_nce_of_many(x, k, negatives, 0.2),
                 lambda x: losses.info_nce(losses.look_up(x, k, negatives, 0.2))):
        value = loss(q @ weights)
        found.append((value, *torch.autograd.grad(3 * value, weights)))
    for ours, whole in zip(*found, strict=True):
        assert torch.allclose(ours, whole, rtol=1e-5, atol=1e-6)


def info_nce(query, key, negatives, temperature):
    right = math.exp(dot(query, key) / temperature)
    return -math.log(right / (right + sum(math.exp(dot(query, u) / temperature) for u in negatives)))


def layers(method, x, key=False):
    """Global output (n, d), dense outputs (n, S², d) and features (n, S², D), none of them normalised, as lists."""
    query = method.backbone, method.projector, method.dense_projector
    backbone, projector, dense = method.key_encoder if key else query
    f = backbone.forward_features(x)
    r = torch.stack([torch.stack([dense(f[:, :, i, j]) for j in range(f.shape[3])], 1) for i in range(f.shape[2])], 1)
    return (y.tolist() for y in (projector(f.mean((2, 3))), r.flatten(1, 2), f.flatten(2).transpose(1, 2)))


def papers_losses(method, views):
    negatives, dense_negatives, tau = method.queue().tolist(), method.dense_queue().tolist(), method.temperature
    q, r, f = layers(method, views[0])
    k, t, f_key = layers(method, views[1], key=True)
    single = [info_nce(unit(a), unit(b), negatives, tau) for a, b in zip(q, k, strict=True)]
    dense = []
    for b in range(len(q)):
        for s in range(len(r[b])):
            likeness = [dot(unit(f[b][s]), unit(other)) for other in f_key[b]]
            best = likeness.index(max(likeness))
            dense.append(info_nce(unit(r[b][s]), unit(t[b][best]), dense_negatives, tau))
    return sum(single) / len(single), sum(dense) / len(dense)


@pytest.mark.parametrize("loss_lambda", [0.5, 0.3, 0.0, 1.0])
def test_the_loss_is_the_papers_sum_over_images_and_cells(views, loss_lambda):
    views = [x[:2] for x in views]
    method = built(shuffle=False, queue=8, dim=16, hidden_dim=24, loss_lambda=loss_lambda)
    single, dense = papers_losses(method, views)
    out = method(views)
    assert out["global"].item() == pytest.approx(single, rel=1e-4)
    assert out["dense"].item() == pytest.approx(dense, rel=1e-4)
    assert out["loss"].item() == pytest.approx((1 - loss_lambda) * single + loss_lambda * dense, rel=1e-4)


def test_lambda_holds_in_every_step_of_the_shortest_epoch(views):
    """A public code base counts a warm-up of λ anew in every epoch, and short epochs never leave it."""
    method, run = built(), None
    for epoch in range(3):
        method.before_epoch(run, epoch)
        out = method(views)
        assert out["loss"].item() == pytest.approx((out["global"] + out["dense"]).item() / 2, rel=1e-6)
        method.after_step((epoch + 1) / 3)


def test_losses_are_full_precision_under_autocast(views):
    method = built()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = method(views)
    assert {out[name].dtype for name in out} == {torch.float32}
    assert method.queue().dtype == method.dense_queue().dtype == torch.float32


def test_keys_get_no_gradient_and_everything_else_does(views):
    method = built()
    method(views)["loss"].backward()
    assert all(p.grad is None for p in method.key_encoder.parameters())
    assert all(p.grad.abs().sum() > 0 for p in optim.trainable(method))


@pytest.mark.parametrize("loss_lambda, still", [(0.0, "dense_projector"), (1.0, "projector")])
def test_lambda_zero_and_one_switch_one_loss_off(views, loss_lambda, still):
    method = built(loss_lambda=loss_lambda)
    method(views)["loss"].backward()
    learning = [(name.split(".")[0], p.grad) for name, p in method.named_parameters() if p.requires_grad]
    assert {part for part, grad in learning if grad.abs().sum() == 0} == {still}


# The keys and the queues

def test_the_second_queue_gets_the_mean_over_cells_of_what_is_not_yet_normalised(views):
    method = built(shuffle=False, queue=8)
    k, t, _ = layers(method, views[1], key=True)
    method(views)
    t = torch.tensor(t)
    assert torch.allclose(method.queue()[:4], normalized(torch.tensor(k)), atol=1e-5)
    assert torch.allclose(method.dense_queue()[:4], normalized(t.mean(1)), atol=1e-5)
    assert not torch.allclose(normalized(t.mean(1)), normalized(normalized(t).mean(1)), atol=1e-3), "not the same thing"
    assert method.queue.place.item() == method.dense_queue.place.item() == 4


def test_all_four_outputs_of_a_key_come_back_to_their_image(views):
    """With all images in one batch-norm group a shuffle that is undone changes nothing."""
    shuffled, plain = (built(bn_images=64).train() for _ in range(2))
    plain.shuffle = False
    for a, b in zip(shuffled.keys(views[1]), plain.keys(views[1]), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert shuffled(views)["loss"].item() == pytest.approx(plain(views)["loss"].item(), rel=1e-5)


def test_keys_are_encoded_in_other_groups_than_their_queries():
    method = built(bn_images=2)
    x = torch.randn(8, 3, 12, 12)
    with_shuffle = method.keys(x)[0]
    method.shuffle = False
    assert not torch.allclose(with_shuffle, method.keys(x)[0], atol=1e-3)


def test_looking_leaves_the_queues_alone(views):
    method = built().eval()
    before = method.queue(), method.dense_queue()
    method(views)
    assert torch.equal(before[0], method.queue()) and torch.equal(before[1], method.dense_queue())


def test_the_key_encoder_starts_as_a_copy_and_follows_slowly():
    method = built(momentum=0.9)
    online = [p for part in (method.backbone, method.projector, method.dense_projector) for p in part.parameters()]
    slow = list(method.key_encoder.parameters())
    assert all(torch.equal(a, b) for a, b in zip(slow, online, strict=True))
    with torch.no_grad():
        for p in online:
            p.add_(1.0)
    before = [p.clone() for p in slow]
    for progress in (0.1, 0.9):  # constant: the momentum does not grow
        method.after_step(progress)
    for old, new, p in zip(before, slow, online, strict=True):
        assert torch.allclose(new, p - 0.81 * (p - old), atol=1e-5)


# The real model and the row of the zoo

def test_the_imagenet_row_builds_the_real_model():
    with torch.device("meta"):
        method = ROW.build()
    count = {k: sum(p.numel() for p in m.parameters()) for k, m in method.named_children()}
    assert count["backbone"] == 23_508_032
    assert count["projector"] + count["dense_projector"] == 8_917_248
    assert sum(count.values()) == 64_850_560
    assert method.queue.keys.shape == method.dense_queue.keys.shape == (65_536, 128)
    f = cells(method.backbone.eval(), torch.zeros(2, 3, 224, 224, device="meta"))
    assert f.shape == (2, 49, 2048) and method.dense_projector(f).shape == (2, 49, 128)
    assert [type(m).__name__ for m in method.dense_projector] == ["Linear", "ReLU", "Linear"]


def test_the_first_queues_say_nothing():
    method = built(queue=4096, dim=128)
    method.temperature = 1e6
    out = method([torch.randn(4, 3, 12, 12) for _ in range(2)])
    assert out["global"].item() == pytest.approx(math.log(4097), rel=1e-4)
    assert out["dense"].item() == pytest.approx(math.log(4097), rel=1e-4)


def test_only_the_global_projector_is_initialised_as_in_the_official_code():
    method = DenseCL(backbones.build("resnet_mini", 20), queue=8)
    for layer, plain in zip((method.projector[0], method.projector[2]),
                            (method.dense_projector[0], method.dense_projector[2]), strict=True):
        fan_in = layer.weight.shape[1]
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.05)
        assert layer.bias.abs().max() == 0
        assert plain.weight.abs().max() <= 1 / math.sqrt(fan_in) + 1e-6 and plain.bias.abs().max() > 0


def test_the_row_is_the_official_recipe():
    assert (ROW.total_batch, ROW.epochs, ROW.lr, ROW.weight_decay) == (256, 200, 0.03, 1e-4)
    assert (ROW.optimizer, ROW.sgd_momentum, ROW.precision, ROW.warmup_epochs) == ("sgd", 0.9, "fp32", 0)
    assert ROW.published == {"linear, MoCo protocol": 63.62}
    method = ROW.with_(backbone="resnet_mini", size=20).build()
    assert (method.loss_lambda, method.temperature, method.momentum) == (0.5, 0.2, 0.999)
    assert method.shuffle and method.matching == "features"
    steps = ROW.steps_per_epoch(1_281_167)
    assert steps == 5004 and ROW.lr_at(0, steps) == ROW.lr_at(steps - 1, steps) == 0.03
    assert ROW.lr_at(200 * steps - 1, steps) == pytest.approx(0.03 * (1 + math.cos(math.pi * 199 / 200)) / 2)


def test_the_views_are_those_of_moco_v2():
    views = ROW.with_(backbone="resnet_mini", queue=8).build().views(224)
    assert len(views) == 2
    (ops,) = {(*view.image_ops, *view.batch_ops) for view in views.views}
    found = {type(op): op for op in ops}
    assert found[RandomResizedCrop] == RandomResizedCrop(224, (0.2, 1.0)) and found[HorizontalFlip].p == 0.5
    assert found[ColorJitter] == ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
    assert (found[Greyscale].p, found[Blur].p, found[Blur].sigma) == (0.2, 0.5, (0.1, 2.0))


def test_every_tensor_that_learns_decays():
    method = built()
    (group,) = optim.build(method.param_groups(ROW), ROW).param_groups
    assert group["weight_decay"] == 1e-4
    assert {id(p) for p in group["params"]} == {id(p) for p in method.parameters() if p.requires_grad}
    assert not {id(p) for p in group["params"]} & {id(p) for p in method.key_encoder.parameters()}


def test_the_method_is_found_by_its_name():
    assert methods.get("densecl") is DenseCL and methods.recipes("densecl") is RECIPES
    assert isinstance(built(), nn.Module)
