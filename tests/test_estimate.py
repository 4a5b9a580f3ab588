"""The pre-flight: what twenty steps say about a long run, and that they leave nothing behind."""

import time

import pytest
import torch

from sslnb import methods, preflight, pretrain, resolve
from sslnb.data import Images
from sslnb.errors import InputError
from sslnb.estimate import FIRST, Preflight

GIB = 2**30


def made(**values):
    return Preflight(**{**dict(step=0.5, steps_per_epoch=100, total_steps=20_000, images_per_s=512.0, data_wait=0.05,
                               memory=40 * GIB, available=80 * GIB, processes=8, epochs=200.0), **values})


def test_times_follow_from_the_step():
    p = made()
    assert (p.epoch, p.total) == (50.0, 10_000.0)
    assert "500 ms per step on each of 8 processes like this one, 512 images/s here" in str(p)
    assert "50.0 s per epoch of 100 steps, 2.8 h for 200 epochs" in str(p)
    assert "40.00 GiB of 80 GiB on the GPU, 5% of the time waiting" in str(p)


@pytest.mark.parametrize("values, words", [
    ({"data_wait": 0.6}, "It waits for images 60% of the time"),
    ({"memory": 79 * GIB}, "nearly full"), ({"memory": 10 * GIB}, "Most of the memory is free"),
    ({}, "Nothing stands out"), ({"available": 0, "memory": 79 * GIB}, "Nothing stands out")])
def test_the_suggestion(values, words):
    assert words in made(**values).suggestion and words in str(made(**values))


def test_it_says_what_a_run_then_takes(tiny, tmp_path):
    recipe = tiny(epochs=4)
    found = preflight(recipe, steps=10)
    assert (found.steps_per_epoch, found.total_steps, found.epochs) == (4, 16, 4)
    start = time.perf_counter()
    pretrain(recipe, out=tmp_path / "run")
    took = time.perf_counter() - start
    assert found.total < took and found.step * 10 * found.images_per_s == pytest.approx(320)
    assert 0 <= found.data_wait < 1 and 0.1 * GIB < found.memory < 8 * GIB and found.available == 0


@pytest.mark.parametrize("method", ["byol", "mae", "npid", "deepcluster", "odc", "cae"])
def test_methods_with_memories_and_hooks_can_be_measured(tiny, method, monkeypatch):
    kind, hooks, called = methods.get(method), ("before_train", "before_epoch", "before_step", "after_step"), []

    def noting(name, real):
        return lambda *args: (called.append(name), real(*args))[1]

    for name in hooks:
        monkeypatch.setattr(kind, name, noting(name, getattr(kind, name)))
    assert preflight(tiny(method), steps=3).step > 0
    assert tuple(dict.fromkeys(called)) == hooks, "each of them, and in this order"


def test_a_recipe_for_many_processes_is_measured_as_one_of_them(tiny, monkeypatch):
    recipe, read, get = tiny("byol", gpus=2, batch=16, accum=2), [], Images.__getitem__
    monkeypatch.setattr(Images, "__getitem__", lambda self, i: (read.append(i), get(self, i))[1])
    found = preflight(recipe, steps=2)
    assert len(read) >= (FIRST + 2) * 2 * 16, "both parts of every step are trained"
    assert found.processes == 2 and found.steps_per_epoch == 2  # 130 images, 64 a step
    assert found.images_per_s * found.step == pytest.approx(32), "its own 2 x 16"


def test_slow_files_show(tiny, monkeypatch):
    read = Images.__getitem__
    monkeypatch.setattr(Images, "__getitem__", lambda self, i: (time.sleep(0.01), read(self, i))[1])
    found = preflight(tiny(), steps=3)
    assert found.data_wait > 0.5 and "waits for images" in found.suggestion


def test_nothing_is_left_behind(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    preflight(tiny(), steps=2)
    assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_what_cannot_run_is_told_as_by_pretrain():
    with pytest.raises(InputError, match="The batch is larger than the data"):
        preflight(methods.recipes("simclr")["demo"].with_(batch=5000))
    assert preflight("simclr", steps=1).steps_per_epoch == resolve("simclr").steps_per_epoch(1300)
