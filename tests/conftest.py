import functools
import os
import shutil
import subprocess
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two spinning threads per process are slower than one on a busy machine

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--seeds", type=int, default=3, help="runs per demo recipe in the slow tests")


@functools.cache
def few_digits(split):
    """130 scattered digits: enough for four steps of 32 and for every mechanism, few enough for many runs."""
    from sslnb.embedded import digits_scattered

    images, labels, classes = digits_scattered(split)
    return images[:130], labels[:130], classes


PEAK = """
def peak():
    # Of this process alone: getrusage's peak begins with that of the process which started it.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e6
"""


def measured(code: str) -> list[float]:
    """The numbers that `code` prints in a fresh process, where peak() is the most memory it ever held, in GB."""
    printed = subprocess.run([sys.executable, "-c", PEAK + code], capture_output=True, text=True, check=True).stdout
    return [float(number) for number in printed.split()]


def apart(one, other) -> float:
    """How far the backbones of two runs with seed 0 are from each other, as a share of the way that training went."""
    torch.manual_seed(0)
    start = torch.nn.utils.parameters_to_vector(other.recipe.build().backbone.parameters()).detach()
    a, b = (torch.nn.utils.parameters_to_vector(run.backbone().parameters()).detach() for run in (one, other))
    return float((a - b).norm() / (b - start).norm())


HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def ten_steps(method, views, half: torch.dtype, recipe=None) -> None:
    """Ten steps under autocast, with a gradient scaler for float16, as Accelerate has it: nothing may become infinite,
    and the loss is float32. A step that the scaler skips does not count."""
    from sslnb import optim

    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = optim.build(method.param_groups(recipe), recipe) if recipe else torch.optim.AdamW(trained, 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=half == torch.float16)
    taken = 0
    for _ in range(14):
        with torch.autocast("cpu", dtype=half):
            loss = method(views)["loss"]
        assert loss.dtype == torch.float32 and loss.isfinite()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        finite = all(p.grad.isfinite().all() for p in trained if p.grad is not None)
        method.before_step(0.5)
        scaler.step(optimizer)
        scaler.update()
        taken += finite
        if taken == 10:
            break
    assert taken == 10, f"{14 - taken} of 14 steps had gradients that are not finite"
    assert all(p.isfinite().all() for p in method.parameters())


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    from sslnb.embedded import EMBEDDED

    torch.manual_seed(0)
    monkeypatch.setitem(EMBEDDED, "few_digits", few_digits)


@pytest.fixture
def tiny():
    """A recipe of a method that trains in seconds: the demo on few images, two epochs of four steps."""
    from sslnb import methods

    def make(method: str = "simclr", **changes):
        small = {"epochs": 2, "batch": 32, "data": "few_digits", "size": 20}
        return methods.recipes(method)["demo"].with_(**{**small, **changes})

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A short SimCLR run, for `source`."""
    from sslnb import methods, pretrain

    recipe = methods.recipes("simclr")["demo"].with_(epochs=1, batch=160)
    return pretrain(recipe, out=tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="module")
def source(trained, tmp_path_factory):
    """A short SimCLR run to evaluate, and a directory of it for this module alone."""
    from sslnb.run import Run

    return Run.open(shutil.copytree(trained.path, tmp_path_factory.mktemp("source") / "run"))
