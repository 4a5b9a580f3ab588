"""MoCo v1 and v2: the dictionary look-up, the queue, the slow key encoder, and batch norm that gives nothing away."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import measured
from test_distributed import leave
from timm.layers import BatchNormAct2d
from torch import nn

from sslnb import backbones, batchnorm, methods
from sslnb.batchnorm import SplitBatchNorm, split_batchnorm, sync_batchnorm
from sslnb.errors import InputError
from sslnb.losses import info_nce, look_up
from sslnb.parts import Queue, normalized, shuffle, unshuffle
from sslnb.views import Blur, ColorJitter, Greyscale, RandomResizedCrop

BOTH = ["mocov1", "mocov2"]
both = pytest.mark.parametrize("name", BOTH)


def built(name, **numbers):
    torch.manual_seed(0)
    return methods.recipes(name)["demo"].with_(**numbers).build()


def two_views(n=8):
    return [torch.randn(n, 3, 20, 20) for _ in range(2)]


# ---------------------------------------------------------------- the loss


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def papers_loss(q, k, negatives, temperature):
    total = 0.0
    for i in range(len(q)):
        right = math.exp(dot(q[i], k[i]) / temperature)
        wrong = sum(math.exp(dot(q[i], u) / temperature) for u in negatives)
        total -= math.log(right / (right + wrong))
    return total / len(q)


@pytest.mark.parametrize("n, d, K, temperature", [(3, 4, 5, 0.2), (1, 2, 7, 0.5), (4, 8, 3, 0.07)])
def test_the_loss_is_the_papers_sum(n, d, K, temperature):
    q, k, negatives = (normalized(torch.randn(m, d)) for m in (n, n, K))
    logits = look_up(q, k, negatives, temperature)
    assert logits.shape == (n, 1 + K)
    expected = papers_loss(q.tolist(), k.tolist(), negatives.tolist(), temperature)
    assert info_nce(logits).item() == pytest.approx(expected, rel=1e-4)


def test_the_loss_at_known_points():
    assert info_nce(torch.zeros(2, 65_537)).item() == pytest.approx(11.09, abs=0.001), "no information: ln(1 + K)"
    e = torch.eye(4)
    assert info_nce(look_up(e[:2], e[:2], e[2:], 0.05)).item() < 1e-6
    assert info_nce(look_up(e[:2], e[:2].flip(0), e[:2], 0.1)).item() > 9, "the query itself is among the negatives"


@both
def test_the_methods_loss_is_the_papers_with_the_queue_as_it_was_before(name):
    method, views = built(name, shuffle=False, bn_images=8), two_views()
    before = method.queue()
    q = normalized(method.projector(method.backbone(views[0])))
    k = normalized(method.key_encoder(views[1]))
    out = method(views)
    expected = papers_loss(q.tolist(), k.tolist(), before.tolist(), method.temperature)
    assert out["loss"].item() == pytest.approx(expected, rel=1e-4)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ before.T], 1)
    assert out["accuracy"].item() == (logits.argmax(1) == 0).float().mean().item()
    assert torch.equal(method.queue()[:8], out["k"]) and torch.equal(method.queue()[8:], before[8:])


@both
def test_logits_are_full_precision_under_autocast(name):
    method = built(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = method(two_views())
    assert out["loss"].dtype == out["q"].dtype == out["k"].dtype == method.queue().dtype == torch.float32
    assert torch.allclose(out["k"].norm(dim=1), torch.ones(8), atol=1e-5)


# ---------------------------------------------------------------- the queue


def test_the_queue_is_first_in_first_out_and_wraps_around():
    queue = Queue(2, 6)
    assert torch.allclose(queue().norm(dim=1), torch.ones(6)) and queue.place.dtype == torch.int64
    for t in range(4):  # 0 0 1 1 2 2, then 3 3 takes the place of 0 0
        queue.enqueue(torch.full((2, 2), float(t)))
    assert queue()[:, 0].tolist() == [3, 3, 1, 1, 2, 2] and queue.place.item() == 2


def test_a_copy_of_the_queue_does_not_change_with_it():
    queue, q = Queue(2, 4), torch.randn(3, 2, requires_grad=True)
    seen = queue()
    loss = (q @ seen.T).sum()
    queue.enqueue(torch.ones(4, 2))
    loss.backward()  # raises if what the gradient needs was overwritten
    assert torch.allclose(q.grad, seen.sum(0).expand(3, 2)) and not torch.equal(seen, queue())


@pytest.mark.parametrize("size, batch, remedy", [(10, 4, 12), (10, 16, 16)])
def test_a_queue_that_is_no_multiple_of_the_batch_is_refused(size, batch, remedy):
    with pytest.raises(InputError, match=f"queue of {size} keys is no multiple .* {batch}; use queue={remedy}"):
        Queue(2, size).enqueue(torch.ones(batch, 2))


@both
def test_looking_leaves_the_queue_alone(name):
    method = built(name).eval()
    before = method.queue()
    method(two_views())
    assert torch.equal(before, method.queue())


# ---------------------------------------------------------------- batch norm in groups


@pytest.mark.parametrize("groups", [2, 3, 5])
@pytest.mark.parametrize("momentum", [0.1, 0.7, None])  # None averages over all batches
def test_split_batch_norm_is_batch_norm_of_every_group(groups, momentum):
    """What a batch norm on each of several GPUs would do, the running statistics being the mean over them."""
    plain = nn.BatchNorm2d(3, momentum=momentum)
    nn.init.normal_(plain.weight)
    twins = [copy.deepcopy(plain) for _ in range(groups)]
    split = split_batchnorm(nn.Sequential(plain), 4)[0]
    assert isinstance(split, SplitBatchNorm) and split.weight is plain.weight
    for batch in 1, 2, 3:
        x = torch.randn(4 * groups, 3, 4, 4) * 3 + batch
        expected = torch.cat([twin(part) for twin, part in zip(twins, x.split(4), strict=True)])
        assert torch.allclose(split(x), expected, atol=1e-6)
        for key in ("running_mean", "running_var"):
            mean = torch.stack([getattr(twin, key) for twin in twins]).mean(0)
            assert torch.allclose(getattr(split, key), mean, rtol=1e-5, atol=1e-6)
    assert split.num_batches_tracked == 3
    plain.load_state_dict(split.state_dict())
    assert torch.equal(split.eval()(x), plain.eval()(x)), "the same state dict, and the same in evaluation"


@pytest.mark.parametrize("images, sizes", [(5, [5, 5]), (4, [4, 3, 3]), (3, [3, 3, 2, 2]), (10, [10]), (64, [10])])
def test_groups_hold_at_most_so_many_images_and_are_as_equal_as_can_be(images, sizes):
    x = torch.randn(10, 2, 3, 3)
    expected = torch.cat([nn.BatchNorm2d(2)(group) for group in x.split(sizes)])
    assert torch.allclose(split_batchnorm(nn.Sequential(nn.BatchNorm2d(2)), images)(x), expected, atol=1e-6)


def test_shuffled_rows_come_back():
    x = torch.arange(16.0)[:, None] * torch.ones(16, 3)
    dealt, order = shuffle(x)
    assert not torch.equal(dealt, x) and torch.equal(dealt, x[order])
    assert torch.equal(order.sort().values, torch.arange(16))
    assert torch.equal(unshuffle(dealt * 2, order), x * 2)


def test_without_shuffling_the_groups_of_keys_are_those_of_their_queries():
    method, x = built("mocov1", bn_images=4), torch.randn(16, 3, 20, 20) * torch.randn(16, 1, 1, 1).exp()
    together = normalized(torch.cat([method.key_encoder(part) for part in x.split(4)]))
    method.shuffle = False
    assert torch.allclose(method.keys(x), together, atol=1e-5)
    method.shuffle = True
    torch.manual_seed(5)
    order = torch.randperm(16)
    apart = normalized(torch.cat([method.key_encoder(part) for part in x[order].split(4)]))[order.argsort()]
    torch.manual_seed(5)
    assert torch.allclose(method.keys(x), apart, atol=1e-5) and not torch.allclose(apart, together, atol=1e-2)


# ---------------------------------------------------------------- the key encoder


@both
def test_the_key_encoder_follows_slowly_and_never_by_gradient(name):
    method = built(name, momentum=0.75)
    assert all(torch.equal(a, b) for a, b in zip(
        method.key_encoder.parameters(), [*method.backbone.parameters(), *method.projector.parameters()], strict=True))
    trained = {id(p) for group in method.param_groups(methods.recipes(name)["demo"]) for p in group["params"]}
    assert not trained & {id(p) for p in method.key_encoder.parameters()}
    assert trained == {id(p) for p in [*method.backbone.parameters(), *method.projector.parameters()]}  # all decay
    with torch.no_grad():
        for p in [*method.backbone.parameters(), *method.projector.parameters()]:
            p.add_(1.0)
    before = [p.clone() for p in method.key_encoder.parameters()]
    for progress in (0.01, 1.0):  # constant, unlike BYOL's
        method.after_step(progress)
    moved = [new - old for old, new in zip(before, method.key_encoder.parameters(), strict=True)]
    assert all(torch.allclose(m, torch.tensor(1 - 0.75**2), atol=1e-5) for m in moved)
    method(two_views())["loss"].backward()
    assert all(p.grad is None for p in method.key_encoder.parameters())


def test_the_key_encoder_has_statistics_of_its_own():
    method = built("mocov2")
    method([torch.randn(8, 3, 20, 20), torch.randn(8, 3, 20, 20) * 5 + 3])
    mine, slow = (encoder.conv1[1].running_var for encoder in (method.backbone, method.key_encoder[0]))
    assert (slow > 1.3 * mine).all(), "its images have 25 times the variance, of which a tenth is taken in"


# ---------------------------------------------------------------- recipes


ZOO = [("mocov1", "r50_4xb64_step_ep200"), ("mocov2", "r50_4xb64_cos"), ("mocov2", "r50_4xb64_cos_fp16_ep200")]


@pytest.mark.parametrize("name, row", ZOO)
def test_the_zoos_rows_are_the_official_recipe(name, row):
    assert [n for n in methods.recipes(name) if n != "demo"] == [r for m, r in ZOO if m == name]
    r = methods.recipes(name)[row]
    assert (r.total_batch, r.lr, r.weight_decay, r.sgd_momentum, r.optimizer) == (256, 0.03, 1e-4, 0.9, "sgd")
    assert (r.epochs, r.warmup_epochs, r.clip, r.accum) == (200, 0, 0, 1)
    assert r.precision == ("fp16" if "fp16" in row else "fp32")
    if name == "mocov1":
        assert [r.lr_at(e * 5004, 5004) for e in (0, 119, 120, 160)] == pytest.approx([0.03, 0.03, 0.003, 0.0003])
    else:  # half way through epoch 100 it is still that of the epoch's start
        assert r.lr_at(100 * 5004 + 2500, 5004) == pytest.approx(0.015)
        assert r.lr_at(199 * 5004, 5004) == pytest.approx(0.015 * (1 + math.cos(math.pi * 199 / 200)))


@pytest.mark.parametrize("name, row, projector, temperature", [(*ZOO[0], 262_272, 0.07), (*ZOO[1], 4_458_624, 0.2)])
def test_the_zoos_rows_build_the_published_models(name, row, projector, temperature):
    with torch.device("meta"):
        method = methods.recipes(name)[row].build()
    counts = {k: sum(p.numel() for p in m.parameters()) for k, m in method.named_children()}
    assert counts == {"backbone": 23_508_032, "projector": projector, "key_encoder": 23_508_032 + projector, "queue": 0}
    assert method.queue.keys.shape == (65_536, 128) and 65_536 % 256 == 0
    assert (method.temperature, method.momentum, method.shuffle) == (temperature, 0.999, True)
    norms = [m for m in method.modules() if isinstance(m, SplitBatchNorm)]
    assert len(norms) == 2 * 53 and {m.images for m in norms} == {64}
    if name == "mocov2":
        assert sum(counts.values()) == pytest.approx(55.93e6, rel=1e-4)
        assert not [m for m in method.projector if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_the_official_code_does_not_silence_residual_branches_at_the_start():
    method = methods.recipes("mocov2")["r50_4xb64_cos"].build()
    assert method.backbone.layer1[0].bn3.weight.eq(1).all()


def test_the_views_are_those_of_each_paper():
    crop = RandomResizedCrop(224, (0.2, 1.0))
    for name, expected in (("mocov1", [Greyscale(0.2), ColorJitter(0.4, 0.4, 0.4, 0.4, p=1.0)]),
                           ("mocov2", [ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), Greyscale(0.2), Blur(0.5)])):
        with torch.device("meta"):
            views = list(methods.recipes(name).values())[1].build().views(224).views
        assert len(views) == 2 and views[0] is views[1] and crop in views[0].image_ops
        assert list(views[0].batch_ops[:-1]) == expected


# ---------------------------------------------------------------- processes


def process(rank, world, store, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.manual_seed(rank)  # as in a run, where masks and orders are drawn differently in every process
    x = torch.arange(4.0)[:, None] + 10 * rank
    dealt, order = shuffle(x)
    queue = Queue(1, 12)
    queue.enqueue(x)
    torch.save((dealt, order, unshuffle(-dealt, order), queue()), f"{out}{rank}")
    leave()


@pytest.mark.distributed
def test_processes_agree_on_the_order_and_get_their_own_rows_back(tmp_path):
    mp.spawn(process, (3, tmp_path / "store", tmp_path / "out"), nprocs=3)
    dealt, order, back, queue = zip(*(torch.load(tmp_path / f"out{rank}") for rank in range(3)), strict=True)
    everyone = torch.cat([torch.arange(4.0) + 10 * rank for rank in range(3)])
    assert all(torch.equal(o, torch.randperm(12, generator=torch.Generator().manual_seed(0))) for o in order)
    assert torch.equal(torch.cat(dealt)[:, 0], everyone[order[0]]), "every row once, among all processes"
    assert torch.equal(torch.cat(back)[:, 0], -everyone)
    assert all(torch.equal(keys[:, 0], everyone) for keys in queue), "the same queue everywhere, in the order of ranks"


# ---------------------------------------------------------------- at full size


MEASURE = """
import time, torch
from sslnb.losses import info_nce, look_up
from sslnb.parts import Queue, normalized

draw = lambda: normalized(torch.randn(256, 128))
info_nce(look_up(draw().requires_grad_(), draw(), draw(), 0.07)).backward()  # what torch itself needs
start = peak()
queue = Queue(128, 65_536)
for _ in range(255):
    queue.enqueue(draw())
for _ in range(2):  # once around, and one batch more
    q, k, began = draw().requires_grad_(), draw(), time.time()
    info_nce(look_up(q, k, queue(), 0.07)).backward()
    queue.enqueue(k)
    ms = 1000 * (time.time() - began)
assert queue.place == 256 and queue.keys[:256].equal(k)
print(peak() - start, ms)
"""


@pytest.mark.slow
def test_the_memory_of_a_queue_at_full_size():
    """65,536 keys are 34 MB and the logits of 256 queries 67 MB; twice the queue and some copies of the logits fit."""
    peak, ms = measured(MEASURE)
    print(f"DEMO queue of 65,536 keys, 256 queries on a CPU: {ms:.0f} ms per look-up and step, {1000 * peak:.0f} MB")
    assert 0.1 < peak < 0.45


@pytest.mark.parametrize("name", ["regnety_002", "efficientnet_b0"])
@pytest.mark.parametrize("change", [lambda net: split_batchnorm(net, 2), lambda net: sync_batchnorm(net, cuda=False),
                                    lambda net: sync_batchnorm(net, cuda=True)])
def test_norms_with_an_activation_keep_it(name, change):
    """timm has ReLU or SiLU within its batch norms there."""
    plain = backbones.build(name, 32).eval()
    x, state = torch.randn(4, 3, 32, 32), {k: v.clone() for k, v in plain.state_dict().items()}
    before = plain(x)
    changed = change(plain)
    assert not any(type(m) in (nn.BatchNorm2d, BatchNormAct2d) for m in changed.modules())
    assert changed.state_dict().keys() == state.keys() and torch.allclose(changed(x), before, atol=1e-5)
    copied = copy.deepcopy(changed)
    assert torch.allclose(copied(x), before, atol=1e-5)
    if change.__code__.co_names[0] == "split_batchnorm":
        assert torch.isfinite(changed.train()(x)).all()


def test_a_norm_over_processes_has_the_numbers_of_the_one_it_stands_for():
    plain = nn.BatchNorm1d(3, eps=0.25, momentum=0.5).requires_grad_(False)
    with torch.no_grad():
        plain.weight.uniform_(), plain.bias.uniform_()
    x, ours = torch.randn(8, 3), sync_batchnorm(nn.Sequential(copy.deepcopy(plain)), cuda=False)
    assert torch.allclose(ours(x), plain(x)) and torch.allclose(ours.eval()(x), plain.eval()(x))
    assert not any(p.requires_grad for p in ours.parameters()), "a frozen target stays frozen"


def test_a_norm_over_processes_learns_the_statistics_of_all_their_images(monkeypatch):
    """Two processes with the same images are one with each of them twice."""
    whole, ours = nn.BatchNorm2d(3, momentum=0.5), sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3, momentum=0.5)), False)
    monkeypatch.setattr(batchnorm, "world", lambda: (0, 2))
    monkeypatch.setattr(batchnorm, "sum_over_processes", lambda x: 2 * x)
    x = 3 * torch.randn(2, 3, 1, 2) + 1
    assert torch.allclose(ours(x), whole(torch.cat([x, x]))[:2], atol=1e-6)
    for name, statistic in whole.named_buffers():
        assert torch.allclose(ours[0].get_buffer(name), statistic), name


def test_statistics_of_all_processes_are_averaged(monkeypatch):
    mine, other = (nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(3)) for _ in range(2))
    for i, (a, b) in enumerate(zip(mine, other, strict=True)):
        a.running_mean.fill_(i), a.running_var.fill_(i + 1.0), b.running_mean.fill_(i + 4.0), b.running_var.fill_(3.0)
    there = torch.cat([s for norm in other for s in (norm.running_mean, norm.running_var)])
    monkeypatch.setattr(batchnorm, "world", lambda: (0, 2))
    monkeypatch.setattr(batchnorm, "sum_over_processes", lambda x: x + there)
    batchnorm.average_statistics(mine)
    assert [s.unique().tolist() for norm in mine for s in (norm.running_mean, norm.running_var)] == [
        [2.0], [2.0], [3.0], [2.5]]


@pytest.mark.parametrize("name", ["mocov1", "mocov2", "densecl", "npid"])
def test_weight_decay_reaches_every_tensor(name):
    from sslnb import optim

    recipe = methods.recipes(name)["demo"]
    method = recipe.build()
    groups = optim.build(method.param_groups(recipe), recipe).param_groups
    assert all(g["weight_decay"] == recipe.weight_decay > 0 for g in groups)
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in method.parameters())
