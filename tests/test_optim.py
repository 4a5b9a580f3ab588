"""LARS by hand, all weights at once, groups, and the learning rate as a function of the step."""

import math

import pytest
import torch
from torch import nn

from sslnb import methods, optim
from sslnb.optim import LARS, build, decay_groups, lr_at, set_lr


@pytest.mark.parametrize("vectors", [False, True], ids=["vectors left alone", "vectors adapted, as in apex"])
def test_lars_takes_the_steps_of_its_formula(vectors):
    w, b = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([2.0]))
    optimizer = LARS([{"params": [w, b], "adapt_vectors": vectors}], lr=0.5, weight_decay=0.1)
    hand, speed = {w: [3.0, 4.0], b: [2.0]}, {w: [0.0, 0.0], b: [0.0]}
    for gradients in ({w: [1.0, 0.0], b: [1.0]}, {w: [0.0, -2.0], b: [3.0]}):
        for p, gradient in gradients.items():
            p.grad = torch.tensor(gradient).view_as(p)
            adapted = p is w or vectors
            g = [d + 0.1 * x if adapted else d for d, x in zip(gradient, hand[p], strict=True)]
            rho = 1e-3 * math.hypot(*hand[p]) / math.hypot(*g) if adapted else 1.0
            speed[p] = [0.9 * v + rho * x for v, x in zip(speed[p], g, strict=True)]
            hand[p] = [x - 0.5 * v for x, v in zip(hand[p], speed[p], strict=True)]
        optimizer.step()
    for p in (w, b):
        assert p.detach().flatten().tolist() == pytest.approx(hand[p], rel=1e-5)


def test_lars_with_a_zero_gradient_or_weight_is_a_plain_step():
    zero = nn.Parameter(torch.zeros(2, 2))
    zero.grad = torch.ones(2, 2)
    LARS([zero], lr=0.5).step()
    assert torch.allclose(zero, torch.full((2, 2), -0.5))


def test_norms_and_biases_are_not_decayed():
    layers = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    matrices, vectors = decay_groups(layers.named_parameters(), 0.1)
    assert [p.ndim for p in matrices["params"]] == [2] and matrices["weight_decay"] == 0.1
    assert [p.ndim for p in vectors["params"]] == [1, 1, 1] and vectors["weight_decay"] == 0.0


@pytest.mark.parametrize("settings, values", [
    ({"warmup": 4}, {0: 0.0, 2: 0.5, 4: 1.0, 7: 0.5, 9: 0.5 * (1 + math.cos(math.pi * 5 / 6))}),
    ({"warmup": 4, "warmup_from": 0.1}, {0: 0.1, 2: 0.55, 4: 1.0}),
    ({"warmup": 0, "min_lr": 0.2}, {0: 1.0, 5: 0.6}),
    ({"warmup": 2, "cosine_from_start": True}, {1: 0.5, 2: 0.5 * (1 + math.cos(math.pi * 2 / 10)), 5: 0.5}),
    ({"warmup": 0, "schedule": "step", "milestones": (3, 6)}, {2: 1.0, 3: 0.1, 6: 0.01}),
    ({"warmup": 0, "schedule": "step", "milestones": (3,), "gamma": 0.4}, {2: 1.0, 3: 0.4}),
    ({"warmup": 2, "schedule": "constant"}, {1: 0.5, 9: 1.0}),
])
def test_the_learning_rate_is_a_function_of_the_step(settings, values):
    for step, value in values.items():
        assert lr_at(step, lr=1.0, total=10, **settings) == pytest.approx(value)


def test_a_recipe_counts_in_epochs_and_may_hold_the_rate_within_one():
    recipe = methods.recipes("byol")["demo"].with_(lr=1.0, epochs=4, warmup_epochs=0)
    assert recipe.lr_at(8, 4) == pytest.approx(0.5) and recipe.lr_at(10, 4) < recipe.lr_at(8, 4)
    held = recipe.with_(lr_by_epoch=True)
    assert [held.lr_at(s, 4) for s in (8, 9, 11)] == [recipe.lr_at(8, 4)] * 3
    assert held.lr_at(12, 4) == recipe.lr_at(12, 4)
    assert recipe.with_(warmup_epochs=0.9).lr_at(2, 4) == pytest.approx(0.5), "3.6 steps are 4"
    steps = recipe.with_(schedule="step", milestones=(2,), gamma=0.4)
    assert steps.lr_at(7, 4) == 1.0 and steps.lr_at(8, 4) == pytest.approx(0.4)


def test_groups_may_scale_or_fix_their_rate():
    recipe = methods.recipes("byol")["demo"].with_(optimizer="sgd")
    tensors = [nn.Parameter(torch.zeros(2, 2)) for _ in range(3)]
    optimizer = build([{"params": [tensors[0]]}, {"params": [tensors[1]], "lr_scale": 10.0},
                       {"params": [tensors[2]], "fixed_lr": 0.3}], recipe)
    set_lr(optimizer, 0.01)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.01, 0.1, 0.3])


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 2, 3)).to(memory_format=torch.channels_last)


def take_steps(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    for step in steps:
        torch.manual_seed(step)
        net(torch.randn(2, 3, 8, 8)).square().mean().backward()
        set_lr(optimizer, 0.01 * (step + 1))
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("optimizer, numbers", [("sgd", {"nesterov": True}), ("sgd", {}), ("adamw", {})],
                         ids=["sgd, nesterov", "sgd", "adamw"])
def test_all_weights_at_once_take_the_same_steps(optimizer, numbers, monkeypatch):
    """What large networks get on a CPU; saved and loaded in between it goes on as before."""
    recipe = methods.recipes("byol")["demo"].with_(optimizer=optimizer, weight_decay=0.1, **numbers)

    def built(net):
        return build(decay_groups(net.named_parameters(), 0.1), recipe)

    net = convolutions()
    assert not built(net).defaults["fused"]
    expected = take_steps(net, built(net), range(4))
    monkeypatch.setattr(optim, "LARGE", 1)
    net = convolutions()
    first = built(net)
    assert first.defaults["fused"]
    take_steps(net, first, range(2))
    second = built(net)
    second.load_state_dict(first.state_dict())
    resumed = take_steps(net, second, range(2, 4))
    assert all(torch.allclose(ours, theirs, atol=1e-6) for ours, theirs in zip(resumed, expected, strict=True))
    net = convolutions()
    assert all(a.equal(b) for a, b in zip(resumed, take_steps(net, built(net), range(4)), strict=True))


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw", "lamb"])
def test_an_optimizer_has_all_numbers_of_its_recipe(tiny, name):
    from sslnb import optim

    recipe = tiny(optimizer=name, lr=0.1, weight_decay=0.03, sgd_momentum=0.8, betas=(0.8, 0.95),
                  nesterov=name == "sgd")
    (group,) = optim.build([{"params": [torch.nn.Parameter(torch.ones(3, 3))]}], recipe).param_groups
    assert (group["lr"], group["weight_decay"]) == (0.1, 0.03) and group.get("nesterov", False) == recipe.nesterov
    if name in ("adamw", "lamb"):
        assert tuple(group["betas"]) == (0.8, 0.95) and group.get("max_grad_norm") is None
    else:
        assert group.get("sgd_momentum", group.get("momentum")) == 0.8
