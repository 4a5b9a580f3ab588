"""SwAV: the loss and Sinkhorn against nested loops, crops, prototypes, queue, and codes balanced over all processes."""

import math

import pytest
import torch
import torch.multiprocessing as mp
from test_distributed import connect, leave
from test_train import equal, train_until, weights
from torch import nn

from sslnb import methods, optim, prepare, pretrain
from sslnb.errors import InputError
from sslnb.methods.swav import RECIPES, SwAV, sinkhorn
from sslnb.views import Blur

ZOO = methods.recipes("swav")["r50_8xb64_accu8_cos_lr9_6-mcrop-224_2-96_6_fp16_ep200"]


class Flat(nn.Module):
    """A backbone of one matrix, so that a whole method fits into a hand-worked case."""

    num_features = 12

    def __init__(self):
        super().__init__()
        self.calls, self.layer = [], nn.Linear(3, 12)

    def forward(self, x):
        self.calls.append(tuple(x.shape))
        return self.layer(x.mean((2, 3)))


def small(**numbers):
    torch.manual_seed(0)
    return SwAV(Flat(), **{"prototypes": 5, "hidden_dim": 8, "dim": 4, "small_views": 2, "small_size": 0.75, **numbers})


def crops(n=4, large=8, small=6):
    return [torch.randn(n, 3, s, s) for s in (large, large, small, small)]


def unit(*shape):
    return nn.functional.normalize(torch.randn(*shape), dim=-1)


# ---------------------------------------------------------------- Sinkhorn


def official(scores, epsilon, iterations):
    """The form of the official code: everything divided by its sum, prototypes first, then images."""
    q = [[math.exp(s / epsilon) for s in row] for row in scores]
    B, K = len(q), len(q[0])
    total = sum(map(sum, q))
    q = [[v / total for v in row] for row in q]
    for _ in range(iterations):
        sums = [sum(row[k] for row in q) for k in range(K)]
        q = [[row[k] / sums[k] / K for k in range(K)] for row in q]
        q = [[v / sum(row) / B for v in row] for row in q]
    return [[v * B for v in row] for row in q]


@pytest.mark.parametrize("B, K, epsilon, iterations", [(4, 3, 0.05, 3), (6, 9, 0.1, 1), (7, 5, 0.03, 30)])
def test_sinkhorn_is_the_official_codes(B, K, epsilon, iterations):
    scores = 2 * torch.rand(B, K, dtype=torch.float64) - 1
    expected = torch.tensor(official(scores.tolist(), epsilon, iterations))
    assert torch.allclose(sinkhorn(scores.float(), epsilon, iterations), expected, atol=2e-5)


def test_sinkhorn_gives_every_image_one_and_every_prototype_its_share():
    scores = unit(60, 8) @ unit(12, 8).T
    for iterations, off in ((3, 0.5), (200, 1e-3)):
        q = sinkhorn(scores, 0.1, iterations)
        assert (q > 0).all() and torch.allclose(q.sum(1), torch.ones(60), atol=1e-5)
        assert (q.sum(0) * 12 / 60 - 1).abs().max() < off
    assert (scores.div(0.1).softmax(1).sum(0) * 12 / 60 - 1).abs().max() > 0.5, "without it there is no balance"


def test_without_iterations_every_image_takes_its_softmax():
    scores = torch.randn(6, 4)
    assert torch.allclose(sinkhorn(scores, 0.5, 0), (scores / 0.5).softmax(1), atol=1e-6)


def test_sinkhorn_stands_an_epsilon_whose_exponential_overflows():
    scores = unit(20, 4) @ unit(6, 4).T
    assert not (scores / 1e-3).exp().isfinite().all()
    q = sinkhorn(scores, 1e-3, 3)
    assert q.isfinite().all() and torch.allclose(q.sum(1), torch.ones(20), atol=1e-4)


def test_the_two_crops_are_balanced_each_on_its_own():
    scores = torch.randn(6, 2, 4)
    each = torch.stack([sinkhorn(scores[:, i], 0.2, 3) for i in range(2)], 1)
    assert torch.allclose(sinkhorn(scores, 0.2, 3), each, atol=1e-6)


def test_codes_stay_in_full_precision_under_autocast():
    method, z = small(), unit(6, 2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = method.codes(z)
    assert inside.dtype == torch.float32 and torch.equal(inside, method.codes(z))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        length = method.embed(crops()).norm(dim=-1)
    assert torch.allclose(length, torch.ones(4, 4), atol=1e-5)


# ---------------------------------------------------------------- the loss


def test_the_loss_is_the_papers_sum():
    method = small()
    scores, codes = torch.randn(4, 5, 3), torch.rand(4, 2, 3).softmax(-1)  # four images, five crops, three prototypes
    total = 0.0
    for i in range(2):
        for v in range(5):
            if v == i:
                continue
            for b in range(4):
                x = [s / 0.1 for s in scores[b, v].tolist()]
                log_sum = math.log(sum(map(math.exp, x)))
                total -= sum(q * (s - log_sum) for q, s in zip(codes[b, i].tolist(), x)) / 4
    assert method.loss(scores, codes).item() == pytest.approx(total / 2 / 4, rel=1e-5)


def test_a_loss_of_log_k_says_that_all_scores_are_alike():
    method = small(prototypes=3000)
    codes = torch.rand(4, 2, 3000)
    alike = method.loss(torch.full((4, 8, 3000), 0.3), codes / codes.sum(-1, keepdim=True))
    assert alike.item() == pytest.approx(math.log(3000), rel=1e-4)


def test_no_gradient_flows_through_the_codes():
    method, views = small(), crops()
    out = method(views)
    assert not out["codes"].requires_grad
    out["loss"].backward()
    grad = method.backbone.layer.weight.grad.clone()
    method.zero_grad()
    method.loss(method.scores(method.embed(views)), out["codes"].clone()).backward()
    assert torch.allclose(grad, method.backbone.layer.weight.grad, atol=1e-7) and grad.abs().max() > 0


# ---------------------------------------------------------------- crops


def test_codes_are_those_of_the_two_large_crops():
    method, views = small().eval(), crops()
    large = method.embed(views)[:, :2]
    assert torch.equal(method(views)["codes"], sinkhorn(method.scores(large), 0.05, 3))


def test_crops_of_one_size_share_a_forward_and_keep_their_order():
    method, views = small(), crops()
    z = method.embed(views)
    assert method.backbone.calls == [(8, 3, 8, 8), (8, 3, 6, 6)] and z.shape == (4, 4, 4)
    assert torch.allclose(z.norm(dim=-1), torch.ones(4, 4), atol=1e-6)
    alone = method.eval().embed(views)
    for v, x in enumerate(views):  # in eval mode a crop does not depend on the others
        one = nn.functional.normalize(method.projector(method.backbone(x)), dim=1)
        assert torch.allclose(alone[:, v], one, atol=1e-6)


def test_the_zoos_views_are_two_large_and_six_small_crops():
    with torch.device("meta"):
        views = ZOO.build().views(224).views
    assert [v.image_ops[0].size for v in views] == [224] * 2 + [96] * 6
    assert [v.image_ops[0].scale for v in views] == [(0.14, 1.0)] * 2 + [(0.05, 0.14)] * 6
    jitter = views[7].batch_ops[0]
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue, jitter.p) == (0.8, 0.8, 0.8, 0.2, 0.8)


# ---------------------------------------------------------------- prototypes


def test_prototypes_are_unit_vectors_from_the_start_and_after_every_step():
    method = small()
    assert torch.allclose(method.prototypes.weight.norm(dim=1), torch.ones(5), atol=1e-6)
    before = method.prototypes.weight.detach().clone()
    with torch.no_grad():
        method.prototypes.weight.mul_(3)
    method.after_step(0.5)
    assert torch.allclose(method.prototypes.weight, before, atol=1e-6) and method.prototypes.weight.requires_grad


def test_frozen_prototypes_do_not_move_at_all_and_then_do():
    method = small(freeze_prototypes=1)
    optimizer = torch.optim.SGD(method.param_groups(ZOO.with_(weight_decay=0.1)), lr=0.1, momentum=0.9)
    moved = []
    for epoch in range(3):
        method.before_epoch(None, epoch)
        before = method.prototypes.weight.detach().clone()
        optimizer.zero_grad()
        method(crops())["loss"].backward()
        assert method.prototypes.weight.grad.abs().max() > 0
        method.before_step(0.5)
        optimizer.step()
        moved.append(not torch.equal(before, method.prototypes.weight))
        method.after_step(0.5)
    assert moved == [False, True, True]


# ---------------------------------------------------------------- queue


def test_the_queue_is_filled_from_its_epoch_on_newest_first_and_used_when_full():
    method = small(queue=6, queue_from=2)
    first, second, third = unit(4, 2, 4), unit(4, 2, 4), unit(4, 2, 4)
    method.before_epoch(None, 1)
    method.codes(first)
    assert method.queue.abs().max() == 0, "too early"
    method.before_epoch(None, 2)
    alone = sinkhorn(method.scores(first), 0.05, 3)
    assert torch.equal(method.codes(first), alone), "nothing is queued yet"
    assert torch.equal(method.queue[:4], first) and method.queue[4:].abs().max() == 0
    assert torch.equal(method.codes(second), sinkhorn(method.scores(second), 0.05, 3)), "not full yet"
    queue = torch.cat([second, first[:2]])
    assert torch.equal(method.queue, queue)
    with torch.no_grad():  # queued features meet the prototypes of today
        method.prototypes.weight.copy_(unit(5, 4))
    expected = sinkhorn(method.scores(torch.cat([queue, third])), 0.05, 3)[6:]
    assert torch.equal(method.codes(third), expected)
    assert not torch.allclose(expected, sinkhorn(method.scores(third), 0.05, 3), atol=1e-3)
    assert torch.equal(method.queue, torch.cat([third, second[:2]])), "read first, then pushed"
    method.eval().codes(first)
    assert torch.equal(method.queue[:4], third), "looking fills no queue"


def test_a_run_with_queue_and_frozen_prototypes_resumes_bit_for_bit(tiny, tmp_path):
    recipe = tiny("swav", queue=70, queue_from=0, small_views=0)  # two epochs of four steps; full after three
    whole = pretrain(recipe, out=tmp_path / "whole")
    assert whole.latest()["method"]["queue"][-1].abs().max() > 0
    broken = prepare(recipe, out=tmp_path / "broken")
    for step in (2, 5):
        train_until(broken, step)
        torch.manual_seed(12345)
    broken = pretrain(recipe, out=tmp_path / "broken")
    assert equal(weights(whole), weights(broken))
    assert [row["loss"] for row in whole.history()] == [row["loss"] for row in broken.history()]


# ---------------------------------------------------------------- the real model


def test_the_zoos_row_is_the_real_model():
    with torch.device("meta"):
        method = ZOO.build()
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in method.named_children()}
    assert counts == {"backbone": 23_508_032, "projector": 4_462_720, "prototypes": 384_000}
    assert method.queue.shape == (3840, 2, 128)
    assert (method.temperature, method.epsilon, method.iterations) == (0.1, 0.05, 3)
    assert (method.freeze_prototypes, method.queue_from) == (1, 15)
    steps = 1_281_167 // 512 // 8
    assert ZOO.total_batch == 4096 and ZOO.steps_per_epoch(1_281_167) == steps == 312
    assert ZOO.lr_at(0, steps) == pytest.approx(9.6 * 0.3 / 4.8) and ZOO.lr_at(10 * steps, steps) == 9.6
    assert ZOO.lr_at(200 * steps, steps) == pytest.approx(6e-4)
    assert ZOO.on(16).accum == 8, "the zoo accumulates; that it is forced is in the row's note"


@pytest.mark.slow
def test_the_memory_of_eight_crops_at_full_size():
    """What backward keeps of one image: SwAV's notebook says 255 MiB for eight crops, 164 for the two large ones."""
    def kept(sizes):
        parameters = {p.untyped_storage().data_ptr() for p in method.parameters()}
        storages = {}

        def note(x):
            if x.untyped_storage().data_ptr() not in parameters:
                storages[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, so that no address comes twice
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            loss = method([torch.randn(2, 3, s, s) for s in sizes])["loss"]
        loss.backward()
        assert loss.isfinite() and method.prototypes.weight.grad.isfinite().all()
        return sum(s.nbytes() for s in storages.values()) / 2 / 2**20

    method = ZOO.build()
    both, large = kept([224] * 2 + [96] * 6), kept([224] * 2)
    print(f"DEMO SwAV at full size keeps {both:.0f} MiB per image for eight crops, {large:.0f} for two")
    assert both == pytest.approx(255, rel=0.05) and large == pytest.approx(164, rel=0.05)


def test_the_real_backbone_starts_with_its_residual_branches_on():
    """LARS does not adapt a tensor that is zero, and this recipe excludes none: it would get the bare lr of 9.6."""
    recipe = methods.recipes("swav")["demo"].with_(backbone="resnet18", backbone_numbers=ZOO.backbone_numbers)
    assert all((m.weight == 1).all() for m in recipe.build().backbone.modules() if isinstance(m, nn.BatchNorm2d))


def test_lars_adapts_and_decays_everything():
    method = small()
    (group,) = groups = method.param_groups(ZOO)
    assert group["adapt_vectors"] and group["weight_decay"] == 1e-6
    assert {id(p) for p in group["params"]} == {id(p) for p in method.parameters()}
    optimizer = optim.build(groups, ZOO.with_(lr=1.0))
    norm = method.projector[1].weight
    method(crops())["loss"].backward()
    g, before = norm.grad + 1e-6 * norm.detach(), norm.detach().clone()
    optimizer.step()
    assert torch.allclose(norm, before - 1e-3 * before.norm() / g.norm() * g, atol=1e-6)


# ---------------------------------------------------------------- several processes


def three_steps(rank, world):
    """Three batches with a queue that is full for the third: the last loss's gradients, the codes and the queue."""
    method = small(queue=10, queue_from=0, freeze_prototypes=0, iterations=3)
    if world > 1:
        from sslnb.batchnorm import sync_batchnorm

        sync_batchnorm(method, cuda=False)
    model = nn.parallel.DistributedDataParallel(method, broadcast_buffers=False) if world > 1 else method
    method.before_epoch(None, 0)
    torch.manual_seed(7)
    for _ in range(3):
        views = [x.tensor_split(world)[rank] for x in crops(n=8)]
        method.zero_grad()
        out = model(views)
        out["loss"].backward()
    return {"codes": out["codes"], "queue": method.queue, "loss": out["loss"].detach(),
            **{name: p.grad for name, p in method.named_parameters()}}


def worker(rank, world, folder):
    connect(rank, world, folder / "store")
    torch.save(three_steps(rank, world), folder / f"{rank}.pt")
    leave()


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_codes_gradients_and_queue_of_several_processes_are_those_of_one(tmp_path, world):
    mp.spawn(worker, (world, tmp_path), nprocs=world)
    one, parts = three_steps(0, 1), [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(world)]
    assert torch.allclose(torch.cat([p["codes"] for p in parts]), one["codes"], atol=1e-4)
    assert sum(p["loss"].item() for p in parts) / world == pytest.approx(one["loss"].item(), rel=1e-4)
    for name in one.keys() - {"codes", "loss"}:
        for p in parts:
            assert torch.allclose(p[name], one[name], rtol=1e-3, atol=1e-5), name


def test_backbones_of_one_size_are_refused_and_blur_is_the_same_for_all_crops():
    demo = RECIPES["demo"]
    with pytest.raises(InputError, match="crops of two sizes, and a VisionTransformer takes one only"):
        demo.with_(backbone="vit_mini").build()
    demo.with_(backbone="vit_mini", backbone_numbers={"dynamic_img_size": True}).build()
    blurs = {op.kernel for view in demo.build().views(20).views for op in view.batch_ops if isinstance(op, Blur)}
    assert blurs == {23}
