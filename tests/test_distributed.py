"""Several processes on CPU (gloo): the gradient, the run and its recovery must be those of one process."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import apart
from torch import nn

from sslnb import Run, launch, losses, methods, parts, pretrain
from sslnb.batchnorm import sync_batchnorm
from sslnb.losses import nt_xent
from sslnb.methods import npid
from sslnb.methods.base import Masked

pytestmark = pytest.mark.distributed
METHODS = list(methods.METHODS)
N = 32  # images in the global batch: 4 processes have 8 each, one batch-norm group of the MoCo demos


def connect(rank, world, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)


def leave():
    """The end of a worker. One that leaves early takes the connections of the others with it, and one that leaves as
    Python does is now and then ended by a thread of gloo that is still there ("terminate called …", 1 in about 60)."""
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def built(name):
    """A method with weights and views that depend on nothing but its name."""
    torch.manual_seed(0)
    recipe = methods.recipes(name)["demo"]
    method = smooth(recipe.build().train())
    torch.manual_seed(1)
    views = [torch.randn(N, 3, recipe.size, recipe.size) for _ in method.views(recipe.size).views]
    draws = {"numbers": torch.randint(100, (N, 256))}
    if isinstance(method, Masked):
        draws["mask"] = method.draw_mask(N)
    return method, views, draws


def smooth(module):
    """GELU for ReLU: where an activation is 0 but for rounding, a ReLU's gradient jumps, which we do not test."""
    for name, child in module.named_children():
        setattr(module, name, nn.GELU()) if isinstance(child, nn.ReLU) else smooth(child)
    return module


def fix_draws(method, draws, rows):
    """What a method draws inside its forward, the same for an image whichever process it is on."""
    if "mask" in draws:
        method.draw_mask = lambda *_: draws["mask"][rows]
    npid.random_images = lambda *_: draws["numbers"][rows]


def gradients(module):
    return {k.removeprefix("module."): p.grad for k, p in module.named_parameters() if p.grad is not None}


def methods_worker(rank, world, folder):
    """Every method, one after the other: starting processes takes far longer than a backward pass."""
    connect(rank, world, folder / "store")
    mine = slice(rank * N // world, (rank + 1) * N // world)
    for name in METHODS:
        print(f"{name} on {world} processes")  # pytest shows it if this ends in an error
        method, views, draws = built(name)
        fix_draws(method, draws, mine)
        if method.sync_bn:
            sync_batchnorm(method, cuda=False)
        model = nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)
        model([v[mine] for v in views], torch.arange(N)[mine])["loss"].backward()
        if rank == 0:
            torch.save({"grad": gradients(model), "buffers": dict(method.named_buffers())}, folder / f"{name}.pt")
    leave()


@pytest.fixture(scope="module", params=[2, 4], ids=lambda world: f"{world} processes")
def together(request, tmp_path_factory):
    """A folder with the gradient and buffers of every method, as several processes have them."""
    folder = tmp_path_factory.mktemp("together")
    mp.spawn(methods_worker, (request.param, folder), nprocs=request.param)
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_of_several_processes_is_that_of_one(together, monkeypatch, name):
    method, views, draws = built(name)
    monkeypatch.setattr(npid, "random_images", npid.random_images)  # puts back afterwards what is replaced now
    fix_draws(method, draws, slice(None))
    method(views, torch.arange(N))["loss"].backward()
    there = torch.load(together / f"{name}.pt", weights_only=True)
    for key, grad in gradients(method).items():
        worst = (grad - there["grad"][key]).abs().max()
        assert worst < 2e-4 * grad.abs().max() + 2e-6, f"{key}: off by {worst:.2g} of {grad.abs().max():.2g}"
    for key, value in method.named_buffers():  # running statistics too
        assert torch.allclose(value.float(), there["buffers"][key].float(), rtol=1e-4, atol=1e-5), key


class SliceOnly(parts._Gather):
    """The gather of several public code bases: forward right, backward only the own slice of the own gradient."""

    @staticmethod
    def backward(ctx, grad):
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def wrong_worker(rank, world, store, x, weight, out):
    connect(rank, world, store)
    # The loss of ALL anchors on every process, as those codes have it.
    losses.gather, losses.world = (lambda z: z), (lambda: (0, 1))
    layer = nn.Linear(6, 5, bias=False)
    layer.weight.data.copy_(weight)
    model = nn.parallel.DistributedDataParallel(layer)
    z1, z2 = (model(v.chunk(world)[rank]) for v in x)
    everyone = [SliceOnly.apply(z) for z in (z1, z2)]
    nt_xent(*everyone, 0.2).backward()
    if rank == 0:
        torch.save(layer.weight.grad, out)
    leave()


@pytest.mark.parametrize("world", [2, 4])
def test_a_gather_that_returns_its_own_slice_gives_one_wth_of_the_gradient(tmp_path, world):
    """The defect that the test above must see: right direction, 1/W of the length, and no error anywhere."""
    x, layer = [torch.randn(8, 6), torch.randn(8, 6)], nn.Linear(6, 5, bias=False)
    mp.spawn(wrong_worker, (world, tmp_path / "store", x, layer.weight.data, tmp_path / "out.pt"), nprocs=world)
    nt_xent(layer(x[0]), layer(x[1]), 0.2).backward()
    wrong = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.allclose(wrong * world, layer.weight.grad, rtol=1e-4, atol=1e-6)


def norm_worker(rank, world, store, x, out):
    connect(rank, world, store)
    norm = sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)), cuda=False)
    y = norm(x.chunk(world)[rank].requires_grad_())
    if rank == 0:
        torch.save(y.detach(), out)
    leave()


def test_batch_norm_over_processes_is_batch_norm_of_the_whole(tmp_path):
    x = torch.randn(8, 3, 4, 4) * 5 + 2
    mp.spawn(norm_worker, (2, tmp_path / "store", x, tmp_path / "out.pt"), nprocs=2)
    assert torch.allclose(torch.load(tmp_path / "out.pt"), nn.BatchNorm2d(3)(x)[:4], atol=1e-5)


# ---------------------------------------------------------------- runs


@pytest.fixture
def recipe():
    """Small steps of SGD: AdamW divides by gradients of nearly zero, big steps are chaotic; both blow rounding up."""
    return methods.recipes("simclr")["demo"].with_(epochs=2, batch=320, optimizer="sgd", lr=1e-5, warmup_epochs=0)


def test_two_processes_train_the_run_of_one(recipe, tmp_path, capfd):
    alone = pretrain(recipe, out=tmp_path / "alone")
    pair = pretrain(recipe, out=tmp_path / "pair", processes=2)
    assert pair.recipe.gpus == 2 and pair.recipe.total_batch == 320 and pair.status()["state"] == "done"
    curves = [[row["loss"] for row in run.history()] for run in (alone, pair)]
    assert curves[0] == pytest.approx(curves[1], rel=3e-3)
    assert apart(pair, alone) < 0.1
    assert "step 8/8" in capfd.readouterr().out, "the caller sees the progress of the processes"


def test_two_processes_that_accumulate_train_the_run_of_one(tmp_path):
    """Each adds up the gradients of its parts before they are averaged: all of them, else the processes part."""
    recipe = methods.recipes("byol")["demo"].with_(steps=2, batch=160, accum=2, optimizer="sgd", lr=1e-2,
                                                   warmup_epochs=0)
    alone = pretrain(recipe, out=tmp_path / "alone")
    pair = pretrain(recipe.with_(gpus=2, batch=80), out=tmp_path / "pair", processes=2)
    assert (pair.recipe.batch, pair.recipe.accum) == (80, 2)
    curves = [[row["loss"] for row in run.history()] for run in (alone, pair)]
    assert curves[0] == pytest.approx(curves[1], rel=3e-3) and apart(pair, alone) < 0.1


def start(out, epochs=4, processes=2):
    """pretrain in a process of its own, small batches, a checkpoint about every 100 steps."""
    script = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below `pytest &`\n"
              "from sslnb import pretrain, methods\n"
              f"r = methods.recipes('simclr')['demo'].with_(epochs={epochs}, batch=32)\n"
              f"pretrain(r, out={str(out)!r}, processes={processes})")
    started.append(subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                    text=True))
    return started[-1]


started: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def _end_what_a_failed_test_left():
    yield
    for child in started:
        child.kill()
    started.clear()


def wait_for(condition, seconds=120):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "waited too long"
        time.sleep(0.05)


def pids(command):
    return subprocess.run(["pgrep", "-f", command], capture_output=True, text=True).stdout.split()


def worker_pids(out):
    found = pids(f"sslnb.train {out}")
    return [int(p) for p in found if b"torch.distributed.run" not in open(f"/proc/{p}/cmdline", "rb").read()]


@pytest.mark.faults
def test_stopping_the_caller_saves_and_the_same_command_continues(tmp_path):
    out = tmp_path / "run"
    child = start(out, epochs=6)  # longer than it takes to stop it
    wait_for(lambda: out.exists() and len(Run(out).history()) > 3)
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    assert child.returncode != 0 and Run(out).status()["state"] == "interrupted"
    stopped = Run(out).latest()["step"]
    assert 0 < stopped < Run(out).status()["total"]
    again = start(out, epochs=6)
    assert f"at step {stopped} of" in again.communicate(timeout=200)[0] and Run(out).status()["state"] == "done"


def test_of_two_commands_started_together_one_trains_and_sigterm_waits_until_it_has_saved(tmp_path):
    out = tmp_path / "run"
    pair = [start(out, epochs=60) for _ in range(2)]
    wait_for(lambda: any(child.poll() is not None for child in pair))
    loser, winner = sorted(pair, key=lambda child: child.poll() is None)
    assert f"is being trained by another process (pid {winner.pid} on" in loser.communicate()[0]
    wait_for(lambda: len(Run(out).history()) > 3)
    status = Run(out).status()
    assert (status["state"], status["pid"]) == ("running", winner.pid) and not Run(out).history("error")
    winner.terminate()
    said = winner.communicate(timeout=60)[0]
    assert winner.returncode == 143 and not worker_pids(out), "it waits for its processes"
    status = Run(out).status()
    assert (status["state"], status["reason"]) == ("interrupted", "SIGTERM") and not Run(out).history("error")
    assert Run(out).latest()["step"] == status["step"] > 0 and f"Stopped at step {status['step']} of" in said


@pytest.mark.faults
def test_after_a_kill_of_the_caller_its_processes_save_and_the_same_command_at_once_continues(tmp_path):
    out = tmp_path / "run"
    child = start(out, epochs=60)
    wait_for(lambda: out.exists() and len(Run(out).history()) > 3)
    left = worker_pids(out)
    child.kill()
    again = start(out, epochs=60)
    wait_for(lambda: again.poll() is not None or Run(out).history("event"))
    assert again.poll() is None, again.communicate()[0]
    assert Run(out).history("event")[0]["step"] == Run(out).latest()["step"] > 0
    assert len(left) == 2 and not set(left) & set(worker_pids(out))
    again.kill()
    wait_for(lambda: not pids(f"sslnb.train {out}"), 60)  # torchrun too
    assert Run(out).status()["state"] == "interrupted"
    # Nothing of ours makes torchrun start them again; a thread of gloo may, which then ends with -6: see `leave`.
    assert "(exitcode: 1)" not in (out / "launch.log").read_text()


def test_an_error_in_the_processes_ends_the_run_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "RESTARTS", 1)
    (tmp_path / "bad.py").write_text('''
from sslnb.methods import recipes
from sslnb.methods.simclr import SimCLR


class Bad(SimCLR):
    def after_step(self, progress):
        raise RuntimeError("the idea in this cell does not work")


RECIPES = {"demo": recipes("simclr")["demo"].with_(method="%s:Bad", epochs=1)}
''' % (tmp_path / "bad.py"))
    recipe = methods.recipes(f"{tmp_path / 'bad.py'}:Bad")["demo"]
    with pytest.raises(RuntimeError, match="the idea in this cell does not work"):
        pretrain(recipe, out=tmp_path / "run", processes=2)
    assert Run(tmp_path / "run").status()["state"] == "failed"
