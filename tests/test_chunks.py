"""A batch that goes through the backbone in chunks has the loss, the gradient and the statistics of the whole batch."""

import copy

import pytest
import torch
from conftest import HALVES, apart, measured, ten_steps
from torch import nn

from sslnb import methods, prepare, pretrain
from sslnb.batchnorm import split_batchnorm
from sslnb.chunks import in_chunks
from sslnb.errors import InputError

CHUNKED = [name for name in methods.METHODS if methods.get(name).chunks]
BATCH, CHUNK = 24, 8


def built(name, backbone="vit_mini"):
    torch.manual_seed(0)
    sizes = {"backbone_numbers": {"dynamic_img_size": True}} if (name, backbone) == ("swav", "vit_mini") else {}
    method = methods.recipes(name)["demo"].with_(backbone=backbone, size=28, **sizes).build().train()
    return method, [torch.randn(BATCH, 3, 28, 28) for _ in method.views(28).views]


def backward(method, views):
    loss = method(views, torch.arange(BATCH))["loss"]
    loss.backward()
    return loss.detach(), {k: p.grad for k, p in method.named_parameters() if p.grad is not None}


def same(ours, whole):
    assert torch.allclose(ours[0], whole[0], rtol=1e-5)
    assert ours[1].keys() == whole[1].keys()
    largest = max(g.abs().max() for g in whole[1].values())  # where a gradient is 0 but for rounding, this is its scale
    for name, gradient in whole[1].items():
        worst = (ours[1][name] - gradient).abs().max()
        assert worst < 1e-5 * gradient.abs().max() + 1e-6 * largest, f"{name}: off by {worst:.2g} of {largest:.2g}"


def test_the_methods_that_compare_the_images_of_a_batch_are_among_them():
    assert {"simclr", "mocov3", "barlowtwins", "swav"} <= set(CHUNKED)


@pytest.mark.parametrize("name", CHUNKED)
def test_loss_and_gradient_are_those_of_the_whole_batch(name):
    """A transformer: whatever compares images, batch norms in the heads among it, sees them all."""
    method, views = built(name)
    chunked = copy.deepcopy(method)
    in_chunks(chunked, CHUNK)
    same(backward(chunked, views), backward(method, views))
    for (key, whole), (_, ours) in zip(method.named_buffers(), chunked.named_buffers(), strict=True):
        assert torch.allclose(whole.float(), ours.float(), atol=1e-6), key


@pytest.mark.parametrize("name", CHUNKED)
def test_batch_norms_in_the_backbone_work_in_groups_as_long_as_a_chunk(name):
    method, views = built(name, "resnet_mini")
    chunked = copy.deepcopy(method)
    in_chunks(chunked, CHUNK)
    ours = backward(chunked, views)
    for module in list(method.modules()):
        if type(module) is type(method.backbone):
            split_batchnorm(module, CHUNK)
    same(ours, backward(method, views))


def test_running_statistics_move_as_far_as_one_batch_moves_them_and_once():
    method, _ = built("simsiam", "resnet_mini")
    norm = next(m for m in method.backbone.modules() if isinstance(m, nn.BatchNorm2d))
    norm.running_mean.fill_(1000.0)  # what is left of it says how far they moved
    in_chunks(method, CHUNK)
    method.backbone(torch.randn(BATCH, 3, 28, 28)).sum().backward()
    assert torch.allclose(norm.running_mean, torch.tensor(900.0), atol=1.0)
    assert norm.momentum == 0.1


def test_what_is_dropped_at_random_is_dropped_again_in_the_second_pass():
    """A linear network, whose gradient shows which inputs its output was made of."""
    method = nn.Module()
    method.backbone = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 1))
    in_chunks(method, 2)
    x = torch.randn(4, 6, requires_grad=True)
    y = method.backbone(x)
    torch.rand(7)  # other numbers are drawn before the way back
    y.sum().backward()
    weight, bias = method.backbone[1].weight, method.backbone[1].bias
    assert torch.allclose((x * x.grad).sum(1) + bias, y[:, 0], atol=1e-6) and (x.grad == 0).any() and weight.grad.any()


def test_a_copy_has_weights_of_its_own():
    method, views = built("simsiam")
    in_chunks(method, CHUNK)
    other = copy.deepcopy(method.backbone)
    nn.init.zeros_(other.norm.weight)
    assert not torch.allclose(other(views[0]), method.backbone(views[0]))


@HALVES
@pytest.mark.parametrize("name", ["simclr", "mocov3"])
def test_ten_steps_in_half_precision(name, half):
    method, views = built(name, "resnet_mini")
    in_chunks(method, 2)
    ten_steps(method, [x[:4] for x in views], half)  # few: CPUs are slow in float16


@pytest.mark.slow
def test_memory_is_that_of_a_chunk():
    code = """
import torch
from sslnb import methods
from sslnb.chunks import in_chunks
method = methods.recipes("byol")["demo"].with_(backbone="resnet_mini", size=64).build().train()
if {chunk}:
    in_chunks(method, {chunk})
views = [torch.randn(256, 3, 64, 64) for _ in range(2)]
before = peak()
method(views)["loss"].backward()
print(peak() - before)
"""
    (whole,), (ours,) = (measured(code.format(chunk=chunk)) for chunk in (0, 16))
    assert ours < 0.4 * whole, f"{ours:.2f} GB in chunks, {whole:.2f} GB whole"


def test_a_run_in_chunks_trains_stops_and_goes_on(tiny, tmp_path):
    recipe = tiny(chunk=8)
    assert "8 at a time through the backbone" in recipe.describe()
    whole = pretrain(recipe, out=tmp_path / "whole")
    assert whole.status()["state"] == "done"
    assert whole.backbone()(torch.randn(2, 3, 20, 20)).shape == (2, 64)
    other = pretrain(tiny(), out=tmp_path / "other")
    assert whole.history()[0]["loss"] != other.history()[0]["loss"], "batch norm of 8 images is not that of 32"


@pytest.mark.parametrize("method, changes, call, words", [
    ("mae", {"chunk": 8}, {}, "mae does not take chunk=8"),
    ("simclr", {"chunk": -1}, {}, "chunk -1 is impossible"),
    ("simclr", {"chunk": 8}, {"compile": True}, "chunk=8 and compile=True exclude each other"),
    ("simclr", {"accum": 2}, {}, "batch=64, with chunk=64 or so if its memory is too small"),
])
def test_bad_chunks_fail_before_any_work(tiny, tmp_path, method, changes, call, words):
    with pytest.raises(InputError, match=words):
        prepare(tiny(method, **changes), out=tmp_path / "run", **call)
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_two_processes_in_chunks_train_the_run_of_one_without(tmp_path):
    """Keys from both processes, gradients averaged over them, and on each 10 chunks for the backbone."""
    recipe = methods.recipes("mocov3")["demo"].with_(steps=3, batch=640, optimizer="sgd", lr=1e-3, warmup_epochs=0)
    whole = pretrain(recipe, out=tmp_path / "whole")
    ours = pretrain(recipe.with_(chunk=32), out=tmp_path / "ours", processes=2)
    assert ours.recipe.gpus == 2 and ours.recipe.batch == 320
    losses = [[row["loss"] for row in run.history()] for run in (ours, whole)]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert apart(ours, whole) < 0.02
