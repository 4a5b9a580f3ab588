"""The clocks of the throughput notebook."""

import json
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from sslnb import backbones, bench, methods
from sslnb.bench_lightly import lightly_step
from sslnb.bench_steps import bare_step, passes, random_views, startup, training_step
from sslnb.errors import InputError


def test_cases_take_turns_and_the_first_round_does_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    order, lengths = [], {"a": iter([100, 3, 1, 2]), "b": iter([50, 10, 30, 20])}

    def call(name):
        order.append(name)
        now[0] += next(lengths[name])

    found = bench.in_turns({name: lambda name=name: call(name) for name in "ab"}, 3)
    assert order == ["a", "b"] * 4
    assert found == {"a": bench.Timing(2, 1, 3), "b": bench.Timing(20, 10, 30)}
    order.clear()
    lengths["a"] = iter([100, 100, 3, 5])
    assert bench.in_turns({"a": lambda: call("a")}, 1, row=2) == {"a": bench.Timing(4, 4, 4)} and len(order) == 4


def test_a_device_is_chosen_for_all_that_follows(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: os.environ["CUDA_VISIBLE_DEVICES"] == "0")
    assert [bench.choose_device(device) for device in ("auto", "cuda")] == ["cuda", "cuda"]
    assert bench.choose_device("cpu") == "cpu" and os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert bench.choose_device("auto") == "cpu"
    with pytest.raises(InputError, match="'cuda' cannot be had here, only 'cpu'; use 'auto' or 'cpu'"):
        bench.choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a GPU that is in use stays visible
    with pytest.raises(InputError, match="'cpu' cannot be had here, only 'cuda'; restart the kernel"):
        bench.choose_device("cpu")
    with pytest.raises(InputError, match="Unknown device 'gpu': .*cpu"):
        bench.choose_device("gpu")


def test_rates_are_those_of_a_machine():
    assert 1e8 < bench.matmul_rate(n=256) < 1e15 and 1e8 < bench.copy_rate(megabytes=4) < 1e13


def test_operations_of_a_convolution_by_hand():
    conv = nn.Conv2d(3, 8, 5, padding=2, bias=False)
    forward = 2 * 2 * 10 * 10 * 8 * 3 * 5 * 5
    assert bench.count_flops(lambda: conv(torch.zeros(2, 3, 10, 10))) == forward
    assert bench.count_flops(lambda: conv(torch.zeros(2, 3, 10, 10)).sum().backward()) == 2 * forward
    x = torch.zeros(2, 3, 10, 10, requires_grad=True)
    assert bench.count_flops(lambda: conv(x).sum().backward()) == 3 * forward


def test_photo_files_are_jpegs_of_the_wanted_size(tmp_path):
    files = bench.photo_files(tmp_path / "photos", 3, (50, 37))
    with Image.open(files[2]) as image:
        assert image.format == "JPEG" and image.size == (50, 37)
    assert len({file.read_bytes() for file in files}) == 3


@pytest.mark.parametrize("method", ["simclr", "byol", "npid", "swav", "mae"])
def test_a_step_trains_the_method_and_the_bare_one_only_runs_its_backbone(tiny, method, monkeypatch):
    recipe, made = tiny(method), []
    build = backbones.build
    monkeypatch.setattr(backbones, "build", lambda *a, **k: made.append(build(*a, **k)) or made[-1])
    views = random_views(recipe)
    step, trained = training_step(recipe, views), made[-1]
    bare, backbone = bare_step(recipe, views), made[-2]  # the last one only told what is sent
    before = [[p.detach().clone() for p in net.parameters()] for net in (trained, backbone)]
    step(), step(), bare()  # the first step of a warm-up has a rate of 0
    assert any(not torch.equal(a, b) for a, b in zip(before[0], trained.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(before[1], backbone.parameters()))


@pytest.mark.parametrize("method, sent", [
    ("simclr", {((64, 3, 20, 20), True): 1}), ("byol", {((32, 3, 20, 20), True): 2, ((32, 3, 20, 20), False): 2}),
    ("mocov2", {((32, 3, 20, 20), True): 1, ((32, 3, 20, 20), False): 1}), ("densecl", {((32, 3, 20, 20), True): 1,
                                                                                         ((32, 3, 20, 20), False): 1}),
    ("swav", {((64, 3, 20, 20), True): 1, ((128, 3, 12, 12), True): 1}), ("mae", {((32, 3, 28, 28), True): 1})])
def test_the_bare_backbone_gets_what_the_method_sends(tiny, method, sent):
    recipe = tiny(method, **({"size": 28} if method == "mae" else {}))
    found = Counter((tuple(shape), learns) for shape, learns in passes(recipe, random_views(recipe)))
    assert found == sent


def test_the_bare_backbone_keeps_all_views_until_backward(tiny, monkeypatch):
    """As a method must whose loss compares them: view by view it takes less time, but no method can."""
    events, build, backward = [], backbones.build, torch.Tensor.backward

    def noted(*args, **kwargs):
        net = build(*args, **kwargs)
        net.register_forward_hook(lambda *_: events.append("forward"))
        return net

    monkeypatch.setattr(backbones, "build", noted)
    monkeypatch.setattr(torch.Tensor, "backward", lambda x: events.append("backward") or backward(x))
    recipe = tiny("byol")
    bare = bare_step(recipe, random_views(recipe))
    events.clear()
    bare()
    assert events == ["forward"] * 4 + ["backward"]


def test_the_bare_backbone_has_the_precision_of_the_step(tiny, monkeypatch):
    seen, build = [], backbones.build

    def noted(*args, **kwargs):
        net = build(*args, **kwargs)
        net.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
        return net

    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        recipe = tiny("simsiam", precision=precision)
        views = random_views(recipe)
        monkeypatch.setattr(backbones, "build", noted)
        step, bare = training_step(recipe, views), bare_step(recipe, views)
        seen.clear()
        step(), bare()
        assert len(seen) == 4 and set(seen) == {dtype}


def test_a_method_that_lightly_has_no_blocks_for_has_no_step_of_it(tiny):
    assert lightly_step(tiny("npid"), []) is None


@pytest.mark.slow
def test_what_happens_once_is_timed(tiny, tmp_path):
    taken = startup(tiny(epochs=1, data="digits_scattered"), tmp_path)
    assert len(taken) == 5 and all(seconds >= 0 for seconds in taken.values())
    assert taken["the training itself, in a script"] < taken["a run of one step, from its command to its end"] + 60
    assert {p.name for p in tmp_path.iterdir()} == {"one step", "script", "kernel"}


def test_a_step_that_does_not_fit_into_a_gpu_weighs_nothing_and_the_next_one_is_weighed():
    code = """
import torch
from sslnb import bench, bench_steps

step = bench_steps.training_step
def small(recipe):
    if recipe.batch > 8:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return step(recipe)
bench_steps.training_step = small
bench._weigh()
"""
    asked = "\n".join(json.dumps(methods.recipes("mae")["demo"].with_(batch=n).to_json()) for n in (16, 8))
    said = subprocess.run([sys.executable, "-c", code], input=asked, text=True, check=True, stdout=subprocess.PIPE)
    none, some = map(int, said.stdout.split())
    assert none == 0 < some


def test_what_does_not_fit_into_a_gpu_is_named(monkeypatch):
    """The processes that weigh print 0 for it."""
    recipes = {"mae": methods.recipes("mae")["demo"]}
    said, asked = SimpleNamespace(stdout="1000\n3000\n"), []
    monkeypatch.setattr(bench.subprocess, "run", lambda *args, **how: asked.append(how["input"]) or said)
    assert bench.memory(recipes, (2, 4))["mae"].peaks == {2: 1000, 4: 3000}
    bench.memory({"mae": recipes["mae"].with_(precision="bf16")}, (2, 4))
    assert [text.count('"precision": "bf16"') for text in asked] == [0, 2], "in the recipe's precision"
    said.stdout = "1000\n0\n"
    with pytest.raises(InputError, match="mae: a step in fp32 with 4 images of 28 px does not fit"):
        bench.memory(recipes, (2, 4))
