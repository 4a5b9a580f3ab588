"""The clocks of the throughput notebook."""

import pytest
import torch
from PIL import Image
from torch import nn

from sslnb import bench


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


def test_rates_are_those_of_a_machine():
    assert 1e8 < bench.matmul_rate(n=256) < 1e15 and 1e8 < bench.copy_rate(megabytes=4) < 1e13


def test_operations_of_a_convolution_by_hand():
    conv = nn.Conv2d(3, 8, 5, padding=2, bias=False)
    assert bench.forward_flops(conv, torch.zeros(2, 3, 10, 10)) == 2 * 2 * 10 * 10 * 8 * 3 * 5 * 5


def test_photo_files_are_jpegs_of_the_wanted_size(tmp_path):
    files = bench.photo_files(tmp_path / "photos", 3, (50, 37))
    with Image.open(files[2]) as image:
        assert image.format == "JPEG" and image.size == (50, 37)
    assert len({file.read_bytes() for file in files}) == 3


@pytest.mark.parametrize("method", ["simclr", "byol", "npid", "swav", "mae"])
def test_a_step_trains_the_method_and_the_bare_one_only_runs_its_backbone(tiny, method, monkeypatch):
    recipe, made = tiny(method), []
    build = type(recipe).build
    monkeypatch.setattr(type(recipe), "build", lambda self: made.append(build(self)) or made[-1])
    step, bare = bench.training_step(recipe, images=130), bench.bare_step(recipe)
    trained, floor = ([p.detach().clone() for p in m.backbone.parameters()] for m in made)
    step(), bare()
    assert any(not torch.equal(a, b) for a, b in zip(trained, made[0].backbone.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(floor, made[1].backbone.parameters()))
