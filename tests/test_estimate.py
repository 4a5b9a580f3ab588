"""The pre-flight: what twenty steps say about a long run, and that they leave nothing behind."""

import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sslnb import estimate, methods, preflight, pretrain, resolve, train
from sslnb.data import Images
from sslnb.errors import InputError
from sslnb.estimate import FIRST, Preflight
from sslnb.methods import deepcluster
from sslnb.reading import next_batch

GIB = 2**30


def made(**values):
    return Preflight(**{**dict(step=0.5, steps_per_epoch=100, total_steps=20_000, images_per_s=512.0, data_wait=0.05,
                               memory=40 * GIB, available=80 * GIB, processes=8, epochs=200.0, measured=24,
                               wanted=24), **values})


def test_times_follow_from_the_step():
    p = made()
    assert (p.epoch, p.total) == (50.0, 10_000.0)
    assert "500 ms per step on each of 8 processes like this one, 512 images/s here, in 24 steps\n" in str(p)
    assert "without what the others read meanwhile" in str(p) and "others" not in str(made(processes=1))
    assert "50.0 s per epoch of 100 steps, 2.8 h for 200 epochs" in str(p)
    assert "40.00 GiB of 80 GiB on the GPU, 5% of the time waiting" in str(p)


def test_what_happens_outside_of_steps_counts():
    p = made(once=60.0, again=90.0, rounds=100, how=", timed with 10 of 20")
    assert p.epoch == 50.0 and p.total == 10_000 + 60 + 9000
    assert ("of that 60.0 s before the first step and 100 x 90.0 s before epochs, in which the method works on the "
            "images, timed with 10 of 20\n") in str(p)
    assert "of that" not in str(made()) and "before the first step" not in str(made(again=1.0, rounds=1))


def test_a_measurement_that_was_cut_short_says_so():
    assert "in 20 steps instead of 24, for the time was up\n" in str(made(measured=20))


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
    assert 0.5 < found.data_wait < 1 and "waits for images" in found.suggestion


@pytest.fixture
def slow_loader(monkeypatch):
    """400 ms for a batch of 4; a stand-in for a device that needs 50 ms for a step, and a second more for the first."""
    read = Images.__getitem__

    def step(trainer, batches, meter):
        with meter.waiting():
            next_batch(batches)
        time.sleep(0.05 if trainer.step else 1.05)
        trainer.step += 1

    monkeypatch.setattr(Images, "__getitem__", lambda self, i: (time.sleep(0.1), read(self, i))[1])
    monkeypatch.setattr(train.Trainer, "_step", step)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_what_workers_read_ahead_does_not_hide_a_slow_disk(tiny, slow_loader):
    found = preflight(tiny(batch=4), steps=3, workers=4)  # 100 ms per step: 8 batches are there after the first step
    assert found.measured == found.wanted == 8, "as many as the workers hold"
    assert found.step > 0.08 and found.data_wait > 0.3 and "waits for images" in found.suggestion


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_it_ends_where_that_takes_too_long(tiny, slow_loader, monkeypatch):
    monkeypatch.setattr(estimate, "LIMIT", 0)
    found = preflight(tiny(batch=4, epochs=9, accum=2, force_accum=True), steps=3, workers=4)
    assert (found.measured, found.wanted) == (3, 4), "never less than asked for; 8 batches are 4 steps"


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        Image.fromarray(np.full((20, 20, 3), i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return str(tmp_path)


def test_one_of_many_processes_has_its_share_of_the_cores(tiny, folder, monkeypatch):
    workers, threads, before = [], [], torch.get_num_threads()

    def noted(real):
        return lambda *args: (workers.append(real(*args)), 0)[1]

    for module in (train, deepcluster):
        monkeypatch.setattr(module, "loader_workers", noted(module.loader_workers))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    step = train.Trainer._step
    monkeypatch.setattr(train.Trainer, "_step", lambda *a: (threads.append(torch.get_num_threads()), step(*a))[1])
    preflight(tiny("deepcluster", data=folder, gpus=8, batch=4, clusters=4), steps=1)
    assert set(workers) == {1} and len(workers) >= 2, "the loader's and the method's own: 2 cores each"
    assert set(threads) == {1} and torch.get_num_threads() == before and "LOCAL_WORLD_SIZE" not in os.environ


@pytest.fixture
def clustering(monkeypatch):
    """DeepCluster that needs 2 ms for an image; what it `saw` each time, and how long it `took`."""
    found = SimpleNamespace(saw=[], took=[])

    def cluster(self, recipe, seed):
        start = time.perf_counter()
        found.saw.append((len(recipe.load()), len(self.labels)))
        time.sleep(0.002 * found.saw[-1][0])
        found.took.append(time.perf_counter() - start)
        return torch.arange(len(self.labels)) % self.clusters

    monkeypatch.setattr(methods.get("deepcluster"), "cluster", cluster)
    return found


def test_clustering_before_epochs_counts(tiny, clustering, capsys):
    found = preflight(tiny("deepcluster", epochs=10, every=4), steps=2)
    assert clustering.saw == [(130, 130)] * 2 and found.rounds == 3, "before epochs 0, 4 and 8"
    assert 0.26 < clustering.took[1] <= found.again < 1.3 * clustering.took[1] and found.once == 0
    assert found.total == pytest.approx(found.step * 40 + 3 * found.again)
    assert f"3 x {found.again:.1f} s before epochs, in which the method works on the images\n" in str(found)
    assert capsys.readouterr().out == ""


def test_of_many_images_a_few_are_clustered(tiny, clustering, capsys, monkeypatch):
    monkeypatch.setattr(estimate, "FEW", 20)
    found = preflight(tiny("deepcluster", clusters=20, every=1, gpus=2, batch=16), steps=2)
    assert clustering.saw == [(40, 40)] * 2 and found.rounds == 2, "twice the clusters"
    share = clustering.took[1] * 130 / 40 / 2  # of one process in all 130
    assert 0.08 * 130 / 40 / 2 < share <= found.again < 1.3 * share
    assert "as if 2 processes shared it, timed with 40 of 130 and without the memory for the others\n" in str(found)
    assert "timed with 40" in capsys.readouterr().out


def test_odc_clusters_once(tiny, monkeypatch):
    monkeypatch.setattr(estimate, "FEW", 50)
    monkeypatch.setattr(estimate, "NOTICED", 1e-3)
    found = preflight(tiny("odc", min_cluster=5), steps=2)  # 5 x 25 images at least, and there are 50
    assert found.once > 0 and found.rounds == 0 and "s before the first step, in which" in str(found)
    assert found.total == pytest.approx(found.step * 8 + found.once)


def test_memory_is_this_recipes(tiny, monkeypatch):
    cuda, weights = [], []

    class OnGPU(train.Trainer):
        def __init__(self, run):
            assert cuda.pop() == "its peak begins here"
            super().__init__(run)
            self.cuda = True
            weights.append(sum(4 * p.numel() for p in self.method.parameters() if p.requires_grad))

    def prepared(*args, real=estimate.prepare, **how):
        run = real(*args, **how)
        cuda.append("a GPU from here to the Trainer")
        return run

    monkeypatch.setattr(estimate, "prepare", prepared)
    monkeypatch.setattr(estimate, "Trainer", OnGPU)
    for name, value in {"is_available": lambda: bool(cuda), "memory_allocated": lambda: GIB,
                        "reset_peak_memory_stats": lambda: cuda.append("its peak begins here") or cuda.pop(0),
                        "max_memory_allocated": lambda: 3 * GIB,
                        "get_device_properties": lambda i: SimpleNamespace(total_memory=80 * GIB)}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    assert preflight(tiny(), steps=1).memory == 2 * GIB, "without what was there before"
    assert preflight(tiny(gpus=2), steps=1).memory == 2 * GIB + weights[-1], "and with the gradients to be sent"


def test_nothing_is_left_behind(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    preflight(tiny(), steps=2)
    assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_what_cannot_run_is_told_as_by_pretrain_before_any_step(tiny, monkeypatch):
    with pytest.raises(InputError, match="The batch is larger than the data"):
        preflight(methods.recipes("simclr")["demo"].with_(batch=5000))
    with monkeypatch.context() as patch:
        patch.setattr(estimate, "Trainer", None)
        with pytest.raises(InputError, match="8 x 32 x 1 = 256 images per step, but there are only 130"):
            preflight(tiny(gpus=8))
    assert preflight("simclr", steps=1).steps_per_epoch == resolve("simclr").steps_per_epoch(1300)


def test_every_epoch_has_an_order_of_its_own():
    asked, trainer = [], SimpleNamespace(per_epoch=3, loader=[0, 1, 2])
    trainer._seek = asked.append
    batches = estimate._batches(trainer, hooks=False)
    assert [next(batches) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0] and asked == [0, 3, 6]
