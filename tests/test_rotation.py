"""Rotation: four turns of every image in one batch, their numbers, and the loss against nested loops."""

import math

import pytest
import torch

from sslnb import methods

ZOO = methods.recipes("rotation")["r50_8xb64_step_ep70"]


@pytest.fixture
def method():
    return methods.recipes("rotation")["demo"].build()


def test_turn_k_is_k_quarter_turns_against_the_clock(method):
    x = torch.tensor([[1.0, 2], [3, 4]]).expand(1, 3, 2, 2)
    expected = [[[1, 2], [3, 4]], [[2, 4], [1, 3]], [[4, 3], [2, 1]], [[3, 1], [4, 2]]]
    for channel in range(3):
        assert method.turns(x)[:, channel].tolist() == expected


def test_the_four_turns_of_an_image_stand_together_in_one_batch(method):
    seen = []
    method.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(5, 3, 20, 20)
    method([x])
    (batch,) = seen
    assert batch.shape == (20, 3, 20, 20)
    assert torch.equal(batch[::4], x) and torch.equal(batch[14], x[3].flip(1, 2))


def test_the_mark_is_at_the_top_of_the_image_before_it_is_turned(method):
    x = torch.ones(1, 3, 4, 4)
    method.mark = 1
    marked = method.turns(x)
    sides = [marked[0, 0, 0], marked[1, 0, :, 0], marked[2, 0, -1], marked[3, 0, :, -1]]  # top, left, bottom, right
    assert all((side == 0).all() for side in sides) and marked.sum() == 4 * 3 * 12 and (x == 1).all()


def test_the_loss_is_the_papers_sum_over_images_and_turns(method):
    method.eval()  # so that each picture can be computed alone
    x = torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        method.head.weight.normal_()
        out = method([x])
        total = right = 0
        for image in x:
            for k in range(4):
                h = method.head(method.backbone(image.rot90(k, (1, 2))[None]))[0].tolist()
                total -= h[k] - math.log(sum(math.exp(v) for v in h))
                right += h.index(max(h)) == k
    assert out["loss"].item() == pytest.approx(total / 12, rel=1e-4)
    assert out["accuracy"].item() == pytest.approx(right / 12)


def test_all_tensors_decay(method):
    (group,) = method.param_groups(ZOO)
    assert group["weight_decay"] == 1e-4 and len(group["params"]) == len(list(method.parameters()))


def test_the_zoos_row_has_the_papers_shapes_and_numbers():
    with torch.device("meta"):
        built = ZOO.build()
        shapes = []
        built.backbone.layer4.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
        built.head.register_forward_hook(lambda module, args, out: shapes.extend(tuple(x.shape) for x in (*args, out)))
        built.loss = torch.nn.functional.cross_entropy  # autocast, which ours switches off, knows no meta device
        built([torch.empty(2, 3, 224, 224)])
    assert shapes == [(8, 2048, 7, 7), (8, 2048), (8, 4)]
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in built.named_children()}
    assert counts == {"backbone": 23_508_032, "head": 8_196}
    assert (ZOO.gpus, ZOO.batch, ZOO.total_batch) == (8, 16, 128)  # the 64 of its name are the turned copies per GPU
    assert ZOO.published == {"linear, MoCo protocol": 47.01}


def test_the_head_starts_as_in_the_zoo():
    head = ZOO.with_(backbone="resnet_mini", size=28).build().head
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.15) and (head.bias == 0).all()


def test_the_zoos_learning_rate_warms_up_and_falls_twice():
    rates = {epoch: ZOO.lr_at(round(epoch * 100), 100) for epoch in (0, 2.5, 5, 29.99, 30, 49.99, 50, 69.99)}
    expected = {0: 0.02, 2.5: 0.11, 5: 0.2, 29.99: 0.2, 30: 0.02, 49.99: 0.02, 50: 0.002, 69.99: 0.002}
    assert rates == pytest.approx(expected)
