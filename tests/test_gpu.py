"""What only a GPU shows: published recipes in their own precision, fp16's scaler, NCCL, compiling, waits for the card.

`pytest -n 0 -m gpu` where there is one.
"""

import subprocess
import sys
import warnings

import pytest
import torch
from conftest import apart

from sslnb import methods, prepare, pretrain, resolve
from sslnb.bench_steps import photometry, random_views, training_step
from sslnb.evaluate import evaluate
from sslnb.evaluate.features import extract
from sslnb.monitor import Meter
from sslnb.recipes import method_numbers
from sslnb.train import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
WAITS = {"odc": 1}  # times that a step of a method has to wait for the card: ODC's rule for clusters too small
FAR = 0.2  # of the way that training went: a card adds in another order each time, and two runs drift apart (0.06)
HUGE = 2.0**40  # a scale of the loss at which every gradient of a network in fp16 is infinite


def published(name, **changes):
    """The first published recipe for 16 of the 1300 embedded digits at a time, with as few clusters as they allow."""
    fewer = {"clusters": 50} if "clusters" in method_numbers(name) else {}
    return resolve(name, data="imagenet", batch=16, **fewer, **changes)


@pytest.mark.parametrize("name", list(methods.METHODS))
def test_published_recipes_train_in_their_own_precision(name):
    step = training_step(published(name))
    assert all(torch.isfinite(step()["loss"]) for _ in range(3))


@pytest.mark.parametrize("name", list(methods.METHODS))
def test_no_step_waits_for_the_card(name):
    """bf16, for fp16's scaler has to know whether a step counts."""
    recipe = published(name, precision="bf16")
    step = training_step(recipe, random_views(recipe))
    step()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno} {w.message}" for w in told if "called a synchronizing" in str(w.message)]
    assert len(waits) <= WAITS.get(name, 0), waits


@pytest.mark.parametrize("name", ["simclr", "byol", "swav"])
def test_photometry_does_not_wait_for_the_card(name):
    views = photometry(published(name))
    views()
    torch.cuda.set_sync_debug_mode("error")
    try:
        views()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["simclr", "byol"])
def test_steps_that_overflow_in_fp16_are_skipped_counted_and_change_nothing(tiny, tmp_path, name):
    trainer = Trainer(prepare(tiny(name, epochs=20), out=tmp_path / "run", precision="fp16"))
    trainer.log_every = 1
    scaler = trainer.accelerator.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": HUGE})
    batch = next(iter(trainer.loader))
    before = {k: p.clone() for k, p in trainer.method.named_parameters()}
    meter, moved = Meter(trainer), []
    for _ in range(40):
        skipped = trainer.skipped
        trainer._step(iter([batch]), meter)
        now = {k: p.clone() for k, p in trainer.method.named_parameters()}
        moved.append(any(not torch.equal(before[k], now[k]) for k in now))
        assert moved[-1] != (trainer.skipped > skipped), "weights and EMA move exactly in the steps that count"
        before = now
    trainer.close()
    assert not moved[0] and moved[-1] and scaler.get_scale() == HUGE / 2**trainer.skipped


def test_a_run_in_fp16_says_what_it_skipped_and_resumes_with_its_scale(tiny, tmp_path):
    recipe = tiny("byol", epochs=8)
    whole = pretrain(recipe, out=tmp_path / "whole", precision="fp16")
    broken = prepare(recipe, out=tmp_path / "broken", precision="fp16")
    trainer = Trainer(broken)
    trainer.accelerator.scaler.load_state_dict({**trainer.accelerator.scaler.state_dict(), "scale": HUGE})
    trainer.save(0.0)
    trainer.close()
    again = Trainer(broken)
    assert again.accelerator.scaler.get_scale() == HUGE
    again.close()
    broken = pretrain(recipe, out=tmp_path / "broken", precision="fp16")
    for run in (whole, broken):
        assert run.status()["state"] == "done" and all(row["loss"] == row["loss"] for row in run.history())
    assert whole.status()["skipped_steps"] < 3 < 20 < broken.status()["skipped_steps"]


@pytest.mark.parametrize("name", ["simclr", "byol", "swav", "mae"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_what_single_precision_does(tiny, tmp_path, name, precision, monkeypatch):
    """Means of the last eight losses, for single ones jump (SimCLR's last: 2.5, 2.5 and 3.2). The scale begins where
    fp16 skips no step: without the first ones it would learn something else."""
    begin = Trainer.__init__

    def with_small_scale(self, run):
        begin(self, run)
        if scaler := self.accelerator.scaler:
            scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**10})

    monkeypatch.setattr(Trainer, "__init__", with_small_scale)
    losses = [[row["loss"] for row in pretrain(tiny(name, epochs=6), out=tmp_path / p, precision=p).history()]
              for p in ("fp32", precision)]
    assert len(losses[0]) == len(losses[1]) == 24
    single, half = (sum(some[-8:]) / 8 for some in losses)
    assert abs(single - half) < 0.05 * abs(losses[0][0]) and losses[1][-1] < losses[1][0]


SAYS_WHAT_IT_RUNS_ON = """
import torch, torch.distributed as dist
from sslnb import parts, train

fit = train.Trainer.fit
def told(self, stop):
    x = torch.randn(4, 3, device="cuda", requires_grad=True)
    for collective in (parts._Gather.apply, parts._Sum.apply):
        y = collective(x)
        y.pow(2).sum().backward()
        print("same", torch.equal(x, y) and torch.allclose(x.grad, 2 * x))
        x.grad = None
    # Accelerate leaves a model alone that one process trains.
    self.model = torch.nn.parallel.DistributedDataParallel(self.model, **self.accelerator.ddp_handler.to_kwargs())
    print("on", dist.get_backend(), type(self.model).__name__)
    fit(self, stop)
train.Trainer.fit = told
train.main()
"""


@pytest.mark.parametrize("name", ["simclr", "mocov2", "densecl", "barlowtwins", "mae"])
def test_one_process_on_nccl_trains_as_the_kernel_does(tiny, tmp_path, name):
    recipe = tiny(name, data="digits_scattered", batch=320)  # a fresh process knows nothing of few_digits
    alone = pretrain(recipe, out=tmp_path / "alone")
    run = prepare(recipe, out=tmp_path / "nccl")
    (tmp_path / "told.py").write_text(SAYS_WHAT_IT_RUNS_ON)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1",
                           str(tmp_path / "told.py"), str(run.path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[:2000]
    assert "on nccl DistributedDataParallel" in done.stdout and done.stdout.count("same True") == 2, done.stdout
    assert run.status()["state"] == "done" and apart(alone, run) < FAR


@pytest.mark.parametrize("name", ["simclr", "byol", "mae"])
def test_a_compiled_method_has_the_same_losses(tiny, tmp_path, name):
    recipe = tiny(name, optimizer="sgd", lr=5e-4)  # larger steps, or AdamW's, blow rounding up
    whole, fast = (pretrain(recipe, out=tmp_path / str(on), compile=on) for on in (False, True))
    pairs = [(a["loss"], b["loss"]) for a, b in zip(whole.history(), fast.history(), strict=True)]
    assert all(abs(a - b) < 0.02 * abs(a) for a, b in pairs), pairs
    assert fast.latest()["method"].keys() == whole.latest()["method"].keys(), "no prefix of the compiler's"


def test_features_and_probes_do_not_depend_on_the_device(source, tmp_path):
    from sslnb import load

    images = load("digits_scattered", "test")
    on = {device: extract(source.backbone(), images, size=20, device=device).x for device in ("cpu", "cuda")}
    assert torch.allclose(on["cpu"], on["cuda"], atol=2e-3 * float(on["cpu"].abs().max()))
    rows = {device: evaluate(source, device=device, out=tmp_path / device) for device in ("cpu", "cuda")}
    for a, b in zip(rows["cpu"], rows["cuda"], strict=True):
        assert a["protocol"] == b["protocol"] and abs(a["top1"] - b["top1"]) < 3


def test_an_interrupted_run_goes_on_close_to_the_uninterrupted_one(tiny, tmp_path):
    from test_train import train_until

    whole = pretrain(tiny("byol"), out=tmp_path / "whole")
    broken = prepare(tiny("byol"), out=tmp_path / "broken")
    train_until(broken, 3)
    broken = pretrain(tiny("byol"), out=tmp_path / "broken")
    assert broken.status()["state"] == "done" and apart(whole, broken) < FAR
    for a, b in zip(whole.history(), broken.history(), strict=True):
        assert a["step"] == b["step"] and abs(a["loss"] - b["loss"]) < 0.02 * abs(a["loss"])
