"""What makes a step slow on a GPU and changes no number: waiting for the device, and launching tensor by tensor."""

import collections
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sslnb import methods, nodes, optim, prepare
from sslnb.bench_steps import random_views
from sslnb.monitor import Meter
from sslnb.recipes import method_numbers
from sslnb.train import Trainer

LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "equal.default")
ON_THE_CPU = "masking.py"  # masks are drawn and sorted there, where looking at a number waits for nothing
ALLOWED = {"odc": 1}  # whether a cluster has become too small: what happens then depends on it


class Looks(TorchDispatchMode):
    """Where Python has to know a result, or its shape: on a GPU each such place waits for all that was asked before."""

    def __init__(self):
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        by_mask = name.startswith(("aten.index.Tensor", "aten.index_put")) and any(
            index is not None and index.dtype == torch.bool for index in args[1])
        if by_mask or any(look in name for look in LOOKS):
            frame = sys._getframe()
            while frame and ("/sslnb/" not in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
                frame = frame.f_back
            if not frame or not frame.f_code.co_filename.endswith(ON_THE_CPU):
                self.found[f"{name} at {frame and (frame.f_code.co_filename, frame.f_lineno)}"] += 1
        return function(*args, **(kwargs or {}))


def small(name):
    recipe = methods.recipes(name)["demo"].with_(batch=16, optimizer="lars")  # AdamW counts its steps on the CPU
    return recipe.with_(images=100) if "images" in method_numbers(name) else recipe


@pytest.mark.parametrize("name", list(methods.METHODS))
def test_no_step_of_a_method_looks_at_the_device(name, monkeypatch):
    recipe = small(name)
    views = random_views(recipe)
    method = recipe.build().to(views[0].device).train()
    optimizer = optim.build(method.param_groups(recipe), recipe)
    index = torch.arange(16, device=views[0].device)

    def step():
        method(views, index)["loss"].backward()
        method.before_step(0.5)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(0.5)

    step()  # the first one may look at what it then remembers
    sent, to = [], torch.Tensor.to

    def noted(tensor, *args, **kwargs):
        if isinstance(args[0], torch.device | torch.Tensor) and not kwargs.get("non_blocking"):
            sent.append(sys._getframe(1).f_code)
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    with Looks() as looks:
        step()
    assert sum(looks.found.values()) == ALLOWED.get(name, 0), looks.found
    assert not sent, f"what goes to the device without non_blocking waits until it is idle: {sent}"


def test_the_trainer_looks_once_per_interval_and_never_between(tmp_path):
    recipe = small("byol").with_(clip=1.0)
    trainer = Trainer(prepare(recipe, out=tmp_path / "run"))
    trainer.log_every = trainer.check_every = 100  # as on a GPU, where this is 20 or so
    views = random_views(recipe)
    trainer.views = SimpleNamespace(photometric=lambda crops, seeds: crops)
    batches = iter([(views, torch.arange(16), torch.arange(16), torch.full((16,), -1))] * 3)
    meter = Meter(trainer)
    trainer._step(batches, meter)
    with Looks() as looks:
        trainer._step(batches, meter)
    trainer.close()
    assert not {k: v for k, v in looks.found.items() if "reading" not in k and "train.py" not in k}, looks.found
    assert sum(looks.found.values()) <= 1, "the numbers of broken images, which are on the CPU"


def test_a_process_that_is_alone_reads_no_image_and_no_code_to_compare_them(monkeypatch):
    monkeypatch.setattr(nodes, "_code", lambda: 1 / 0)
    assert len(nodes.load(small("simclr"))) == 1300


def test_lars_launches_as_much_for_many_tensors_as_for_few():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Count.calls += str(function).startswith("aten.") and "view" not in str(function)
            return function(*args, **(kwargs or {}))

    def launches(tensors):
        weights = [torch.nn.Parameter(torch.randn(3, 3)) for _ in range(tensors)]
        for w in weights:
            w.grad = torch.ones_like(w)
        optimizer = optim.LARS(weights, lr=0.1)
        optimizer.step()
        Count.calls = 0
        with Count():
            optimizer.step()
        return Count.calls

    assert launches(40) == launches(4)
