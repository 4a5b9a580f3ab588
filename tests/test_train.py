"""The loop and the run directory: exact resume, honest steps, and nothing lost when something breaks."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch.utils.data import default_collate

from sslnb import Run, launch, methods, nodes, optim, prepare, pretrain
from sslnb import train as train_module
from sslnb.errors import InputError, NonFinite
from sslnb.monitor import FiniteWatch, Meter, Monitor
from sslnb.reading import EpochSampler, ViewSet, image_loader
from sslnb.stop import Stop
from sslnb.train import Trainer, train
from sslnb.views import CenterCrop, View, Views

METHODS = list(methods.METHODS)


def weights(run):
    return run.latest()["method"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class StopAt(Stop):
    """Asks to stop at one step, as SIGTERM at that moment would."""

    def __init__(self, trainer, step):
        super().__init__()
        self.trainer, self.step = trainer, step

    @property
    def asked(self):
        self.reason = "SIGTERM" if self.trainer.step == self.step else ""
        return bool(self.reason)


def train_until(run, step):
    trainer = Trainer(run)
    try:
        with pytest.raises(SystemExit):
            trainer.fit(StopAt(trainer, step))
    finally:
        trainer.close()


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("method, workers", [*((m, 0) for m in METHODS), ("simclr", 2), ("byol", 2), ("mae", 2)])
def test_an_interrupted_run_equals_an_uninterrupted_one_bit_for_bit(tiny, tmp_path, method, workers):
    recipe = tiny(method)
    whole = pretrain(recipe, out=tmp_path / "whole", workers=workers)
    total = whole.status()["total"]
    broken = prepare(recipe, out=tmp_path / "broken", workers=workers)
    for step in (1, total // 2, total // 2 + 1, total - 1):  # first, end of an epoch, inside one, last but one
        train_until(broken, step)
        assert broken.status()["state"] == "interrupted" and broken.status()["step"] == step
        assert broken.progress() == {"step": step, "total": total}
        torch.manual_seed(12345)  # another process would not have our random state
    broken = pretrain(recipe, out=tmp_path / "broken", workers=workers)
    assert broken.status()["state"] == "done" and broken.progress() == {} and equal(weights(whole), weights(broken))
    a, b = whole.latest()["optimizer"]["state"], broken.latest()["optimizer"]["state"]
    assert all(torch.equal(a[i][k], b[i][k]) for i in a for k in a[i])
    steps = [(row["step"], row["loss"]) for row in whole.history()]
    assert steps == [(row["step"], row["loss"]) for row in broken.history()]
    knn = [(row["step"], row.get("knn"), row["effective_rank"]) for row in whole.history("monitor")]
    assert knn == [(row["step"], row.get("knn"), row["effective_rank"]) for row in broken.history("monitor")]


def test_a_finished_run_is_not_repeated(tiny, tmp_path, capsys):
    first = pretrain(tiny(epochs=1), out=tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in first.path.rglob("*.pt")}
    again = pretrain(tiny(epochs=1, note="Said otherwise."), out=tmp_path / "run")
    assert "finished already" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in again.path.rglob("*.pt")} and len(again.provenance()) == 1


@pytest.mark.parametrize("method", ["byol", "mocov3", "mae", "cae"])
def test_a_backbone_and_its_slow_copy_begin_with_given_weights_also_where_a_method_draws_its_own(tiny, tmp_path,
                                                                                              monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    pretrain(tiny(method, epochs=1), out="first")
    further = tiny(method, epochs=1, weights="first", lr=0.0)
    run = prepare(further, out=tmp_path / "further")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    wanted = Run("../first").backbone().state_dict()
    begun = Trainer(Run("../further")).method
    copies = [m.state_dict() for m in begun.modules() if type(m) is type(begun.backbone)]
    assert len(copies) == (1 if method == "mae" else 2)
    for state in copies:
        assert state.keys() <= wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in state)
    assert f"begins with  {tmp_path / 'first'}   [ours]" in run.recipe.describe()


def test_a_run_that_began_with_weights_goes_on_without_them_and_says_what_does_not_fit(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = pretrain(tiny("simclr", epochs=1), out="first")
    assert prepare(tiny("simclr"), out="auto").path != prepare(tiny("simclr", weights="first"), out="auto").path
    run = prepare(tiny("simclr", weights="first"), out="further")
    train_until(run, 5)
    shutil.rmtree(first.path)
    assert pretrain(tiny("simclr", weights="first"), out="further").status()["state"] == "done"
    for weights, words in (("first", "'first' is neither a file nor the name of a published one"),
                           ("further", "further/backbone.safetensors does not f")):
        with pytest.raises(InputError, match=words):
            prepare(tiny("simclr", weights=weights, backbone="resnet18"), out="other")
    assert not (tmp_path / "other").exists()


def test_another_recipe_in_the_same_place_is_refused_or_moved_aside(tiny, tmp_path):
    pretrain(tiny(epochs=1), out=tmp_path / "run")
    with pytest.raises(InputError, match="holds another run .*lr: .* there, 0.5 now"):
        pretrain(tiny(epochs=1, lr=0.5), out=tmp_path / "run")
    with pytest.raises(InputError, match="seed: 0 there, 1 now"):
        pretrain(tiny(epochs=1), out=tmp_path / "run", seed=1)
    pretrain(tiny(epochs=1, lr=1e-3), out=tmp_path / "run", resume=False)
    assert len(list(tmp_path.iterdir())) == 2, "what was there is kept"


def test_a_full_disk_loses_no_earlier_checkpoint(tiny, tmp_path, monkeypatch):
    run = prepare(tiny(), out=tmp_path / "run")
    train_until(run, 3)
    save = torch.save

    def full(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    trainer = Trainer(run)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RuntimeError, match="checkpoint of step .*No space left.*earlier ones are untouched"):
        trainer.fit(StopAt(trainer, 5))
    trainer.close()
    monkeypatch.setattr(torch, "save", save)
    assert [p.name[:13] for p in (run.path / "checkpoints").iterdir()] == ["step_00000003"]
    assert pretrain(tiny(), out=tmp_path / "run").status()["state"] == "done"


def test_whoever_begins_anew_keeps_what_was_there_however_quickly(tiny, tmp_path):
    for _ in range(4):
        run = prepare(tiny(), out=tmp_path / "run", resume=False)
        run.append("event", step=0, text="there")
    assert len(list(tmp_path.glob("*/log.jsonl"))) == 4


def test_only_the_newest_checkpoints_and_the_best_are_kept(tiny, tmp_path):
    run = prepare(tiny(), out=tmp_path / "run")
    run.save_checkpoint({"step": 1})
    run.write_status(best={"checkpoint": run.checkpoints()[0].name, "knn": 99.0})
    (run.path / "checkpoints" / ".step_00000099.draft").write_bytes(b"half of it")  # as kill -9 leaves it
    for step in range(2, 9):
        run.save_checkpoint({"step": step})
    assert [int(p.name[5:13]) for p in run.checkpoints()] == [1, 6, 7, 8]
    assert not list(run.path.rglob("*.draft"))


def test_a_checkpoint_that_is_damaged_is_passed_over_and_told(tmp_path):
    run, said = Run(tmp_path), []
    for step in (1, 2):
        newest = run.save_checkpoint({"step": step})
    content = newest.read_bytes()
    for damaged in (content[:-1], content[:40] + bytes([content[40] ^ 1]) + content[41:]):
        newest.write_bytes(damaged)
        assert run.latest(say=said.append)["step"] == 1 and said.pop().startswith(f"{newest.name} is damaged")
    newest.write_bytes(content)
    assert run.latest(say=said.append)["step"] == 2 and not said


# ---------------------------------------------------------------- steps


class Counting(methods.get("byol")):
    accumulable = True

    def before_step(self, progress):
        self.asked = [*getattr(self, "asked", []), progress]

    def after_step(self, progress):
        self.seen = [*getattr(self, "seen", []), progress]


def test_hooks_count_optimizer_steps_not_micro_batches(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("sslnb.methods.byol.BYOL", Counting)
    run = prepare(tiny("byol", batch=8, accum=4), out=tmp_path / "run")
    trainer = Trainer(run)
    trainer.fit(Stop())
    trainer.close()
    assert trainer.method.seen == trainer.method.asked == pytest.approx([(i + 1) / 8 for i in range(8)])


def test_accumulated_gradients_equal_the_big_batch(tmp_path):
    """MAE has no batch norm, so 4 x 80 images must be 1 x 320; the masks are drawn from the same numbers."""
    def one_step(batch, accum, name):
        recipe = methods.recipes("mae")["demo"].with_(epochs=1, batch=batch, accum=accum, warmup_epochs=0,
                                                      optimizer="sgd", lr=0.1, sgd_momentum=0.0)
        trainer = Trainer(prepare(recipe, out=tmp_path / name))
        torch.manual_seed(0)
        with pytest.raises(SystemExit):
            trainer.fit(StopAt(trainer, 1))
        trainer.close()
        return trainer.method.state_dict()

    big, small = one_step(320, 1, "big"), one_step(80, 4, "small")
    start = methods.recipes("mae")["demo"]
    torch.manual_seed(0)
    start = start.build().state_dict()
    moved = max((big[k] - start[k]).abs().max() for k in big)
    assert moved > 1e-3 and all(torch.allclose(big[k], small[k], atol=1e-5 + 1e-3 * moved) for k in big)


@pytest.mark.parametrize("method", ["byol", "mae", "deepcluster"])  # a target, masks, an order and clusters of its own
def test_the_loop_is_this_one(tiny, tmp_path, method):
    """In plain torch: rate, micro-batches, clipping, hooks and seeds. The run is stopped in the middle of an epoch."""
    more = {"every": 1} if method == "deepcluster" else {"accum": 2}
    recipe, seed = tiny(method, batch=16, optimizer="sgd", lr=0.3, warmup_epochs=1.0, clip=0.05, **more), 3
    run = prepare(recipe, out=tmp_path / "run", seed=seed)
    recipe = run.recipe
    torch.manual_seed(seed)
    ours = recipe.build().to(memory_format=torch.channels_last).train()
    start = [p.detach().clone() for p in ours.parameters()]
    optimizer, trained = optim.build(ours.param_groups(recipe), recipe), optim.trainable(ours)
    torch.manual_seed(seed * 1009 + 1)
    images, views, losses, step = recipe.load(), ours.views(recipe.size), [], 0
    per_epoch = len(images) // recipe.total_batch
    sampler, pictures = EpochSampler(len(images), recipe.batch, seed=seed), ViewSet(images, views)
    ours.before_train(run)
    for epoch in range(recipe.epochs):
        ours.before_epoch(run, epoch)
        sampler.set_position(epoch, 0, ours.order(seed, epoch))
        batches = iter(sampler)
        for _ in range(per_epoch):
            optim.set_lr(optimizer, recipe.lr_at(step, per_epoch))
            losses.append(0.0)
            for _ in range(recipe.accum):
                crops, index, seeds, _ = default_collate([pictures[key] for key in next(batches)])
                shown = [x.contiguous(memory_format=torch.channels_last) for x in views.photometric(crops, seeds)]
                loss = ours(shown, index)["loss"] / recipe.accum
                loss.backward()
                losses[-1] += float(loss.detach())
            step += 1
            ours.before_step(step / (recipe.epochs * per_epoch))
            torch.nn.utils.clip_grad_norm_(trained, recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            ours.after_step(step / (recipe.epochs * per_epoch))
    train_until(run, 3)
    trainer = Trainer(run)
    trainer.fit(Stop())
    trainer.close()
    assert [row["loss"] for row in run.history()] == pytest.approx(losses, rel=1e-4)
    moved = torch.nn.utils.get_total_norm([a - b.detach() for a, b in zip(start, ours.parameters(), strict=True)])
    off = torch.nn.utils.get_total_norm([
        (a - b).detach() for a, b in zip(trainer.method.parameters(), ours.parameters(), strict=True)])
    assert off < 1e-3 * moved


def test_processes_begin_alike_and_then_draw_their_own(tiny, tmp_path, monkeypatch):
    def begun(rank, seed):
        run = prepare(tiny("mae"), out=tmp_path / f"{rank}{seed}", processes=2, seed=seed)
        monkeypatch.setattr("accelerate.Accelerator.num_processes", 2)
        monkeypatch.setattr("accelerate.Accelerator.process_index", rank)
        trainer = Trainer(run)
        trainer.close()
        return next(trainer.method.backbone.parameters()).detach(), torch.rand(9), next(iter(trainer.sampler))

    (w, draws, batch), (w1, draws1, batch1), (w2, draws2, _) = begun(0, 0), begun(1, 0), begun(0, 1)
    assert w.equal(w1) and not w.equal(w2), "the same weights in all processes, others of another seed"
    assert not draws.equal(draws1) and not draws.equal(draws2)
    assert [*batch, *batch1] == next(iter(EpochSampler(130, 32)))


def test_a_run_is_trained_by_as_many_processes_as_it_was_prepared_for(tiny, tmp_path):
    with pytest.raises(InputError, match="was prepared for 2 processes, but 1 were started; start 2, or prepare it"):
        Trainer(prepare(tiny(), out=tmp_path / "run", processes=2))


def test_a_run_leaves_the_settings_of_torch_as_they_were(tiny, tmp_path, monkeypatch):
    def before_train(self, run):
        torch.backends.cudnn.deterministic = True
        assert torch.get_num_threads() == 1 and run.status()["state"] == "running"

    monkeypatch.setattr("sslnb.methods.simclr.SimCLR.before_train", before_train)
    monkeypatch.setattr("sslnb.launch.cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(2)
    try:
        pretrain(tiny(epochs=1), out=tmp_path / "run")
        assert torch.get_num_threads() == 2 and not torch.backends.cudnn.deterministic
    finally:
        torch.set_num_threads(1)
        torch.backends.cudnn.deterministic = False


def test_a_run_leaves_what_evaluation_needs(tiny, tmp_path):
    run = pretrain(tiny(), out=tmp_path / "run")
    assert Run.open(tmp_path / "run").status()["state"] == "done"
    trained, plain = run.method().backbone.state_dict(), run.backbone().state_dict()
    assert equal(dict(trained), dict(plain)) and not run.method().training and not run.backbone().training
    assert [row["step"] for row in run.history()][-1] == run.status()["total"]
    assert {"loss", "lr", "images_per_s", "data_wait", "seconds"} <= run.history()[-1].keys()
    assert {"feature_std", "effective_rank", "alignment", "uniformity", "knn"} <= run.history("monitor")[-1].keys()
    start = run.provenance()[0]
    assert start["versions"]["torch"] and start["git"] and start["hardware"]
    assert "done" in run.summary() and "versions" in run.summary()


def test_what_a_run_leaves_can_be_read_by_whom_the_user_lets(tiny, tmp_path):
    """By all, with the usual mask: safetensors' own files are their owner's alone."""
    mask = os.umask(0o022)
    try:
        run = pretrain(tiny(epochs=1), out=tmp_path / "run")
    finally:
        os.umask(mask)
    assert {oct(p.stat().st_mode & 0o777) for p in run.path.rglob("*") if p.is_file()} == {"0o644"}


def test_the_monitor_changes_nothing(tiny, tmp_path, monkeypatch):
    watched = pretrain(tiny("mae", epochs=1), out=tmp_path / "watched")
    monkeypatch.setattr("sslnb.monitor.Monitor.look", lambda *args: {})
    unwatched = pretrain(tiny("mae", epochs=1), out=tmp_path / "unwatched")
    assert equal(weights(watched), weights(unwatched))


def test_snapshots_show_the_same_images_and_masks(tiny, tmp_path):
    run = pretrain(tiny("mae"), out=tmp_path / "run")
    (first, a), *_, (last, b) = run.snapshots()
    assert first == 0 and last == run.status()["total"]
    assert torch.equal(a["images"], b["images"]) and torch.equal(a["mask"], b["mask"])
    assert not torch.equal(a["reconstruction"], b["reconstruction"])


@pytest.mark.parametrize("precision", ["bf16"])
def test_bf16_trains(tiny, tmp_path, monkeypatch, precision):
    forward, half = methods.get("simclr").forward, []
    monkeypatch.setattr("sslnb.methods.simclr.SimCLR.forward", lambda *args: (
        half.append(torch.is_autocast_enabled("cpu")), forward(*args))[1])
    run = pretrain(tiny(epochs=1), out=tmp_path / "run", precision=precision)
    assert run.recipe.precision == "bf16" and run.status()["state"] == "done" and half[-4:] == [True] * 4


@pytest.mark.parametrize("cpu, precision", [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"),
                                            ({"avx512_bf16": False}, "fp32"), ({}, "fp32")])
def test_a_recipe_in_fp16_takes_what_the_cpu_is_fast_in(tiny, tmp_path, monkeypatch, cpu, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    assert prepare(tiny(precision="fp16"), out=tmp_path / "half").recipe.precision == precision
    assert prepare(tiny(), out=tmp_path / "full").recipe.precision == "fp32"


@pytest.mark.parametrize(("method", "graphs"), [("mae", 2), ("cae", 5), ("simclr", 1)])
def test_of_transformers_one_block_is_compiled_for_all(tiny, tmp_path, monkeypatch, capsys, method, graphs):
    """A graph for each kind of block, not for each block, none for the monitor's looks, and no gap in any; a ResNet is
    one graph. Compiled for Python's interpreter, which must not change a bit."""
    from torch._dynamo import utils

    torch._dynamo.reset()
    utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setenv("CXX", sys.executable)  # there, and not asked
    fast = pretrain(tiny(method), out=tmp_path / "fast", compile=True)
    assert utils.counters["stats"]["unique_graphs"] == graphs and not utils.counters["graph_break"]
    assert "compiled in the first step, which may take minutes" in capsys.readouterr().out
    whole = pretrain(tiny(method), out=tmp_path / "whole")
    assert [row["loss"] for row in fast.history()] == [row["loss"] for row in whole.history()]
    assert fast.latest()["method"].keys() == whole.latest()["method"].keys()


def test_without_a_compiler_compile_is_refused_before_any_work(tiny, tmp_path, monkeypatch):
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = r"compile=True needs a compiler, and (g\+\+|clang\+\+|gcc or clang) is not here; install it"
    with pytest.raises(InputError, match=words):
        pretrain(tiny(), out=tmp_path / "run", compile=True)
    assert not (tmp_path / "run").exists()
    run = prepare(tiny(), out=tmp_path / "run", compile=True)  # there may be one where it is trained
    with pytest.raises(InputError, match=words):
        train(run)
    done = pretrain(tiny(epochs=1), out=tmp_path / "done")
    again = pretrain(tiny(epochs=1), out=tmp_path / "done", compile=True)
    assert again.path == done.path, "there is nothing to compile"
    monkeypatch.setenv("CXX", f"{sys.executable} -O")
    monkeypatch.setenv("CC", sys.executable)
    launch.can_compile()


def test_what_begins_to_learn_later_counts_in_the_norm_from_then_on(tiny, tmp_path, monkeypatch):
    """A hook of one's own may freeze a layer for a while; its gradient must not go unwatched and unclipped."""
    trainer = Trainer(prepare(tiny(), out=tmp_path / "run"))
    layer, seen = trainer.method.projector[0].weight, []
    norm = train_module.get_total_norm
    monkeypatch.setattr(train_module, "get_total_norm", lambda grads: seen.append(len(grads)) or norm(grads))
    for learns in (True, False, True):
        layer.requires_grad_(learns)
        trainer._step(iter(trainer.loader), Meter(trainer))
    trainer.close()
    assert seen == [len(list(trainer.method.parameters())) - n for n in (0, 1, 0)]


def test_a_tracker_by_name(tiny, tmp_path):
    run = pretrain(tiny(epochs=1), out=tmp_path / "run", trackers=("tensorboard",))
    assert list(run.path.rglob("events.out.tfevents*"))


# ---------------------------------------------------------------- when something breaks


def ends(run, every, words):
    """It trains until something is not finite; what is looked at every so many steps."""
    trainer = Trainer(run)
    trainer.check_every = every
    with pytest.raises(NonFinite, match=words):
        trainer.fit(Stop())
    trainer.close()


@pytest.mark.parametrize("every", [1, 3], ids=["looked at each step", "looked at now and then, as on a GPU"])
def test_a_loss_that_is_not_finite_stops_with_step_term_and_batch(tiny, tmp_path, monkeypatch, every):
    forward, seen = methods.get("simclr").forward, []

    def poisoned(self, views, index=None):
        out = forward(self, views, index)
        seen.append(views)
        return {**out, "loss": out["loss"] * float("nan")} if len(seen) == 3 else out

    monkeypatch.setattr("sslnb.methods.simclr.SimCLR.forward", poisoned)
    run = prepare(tiny(), out=tmp_path / "run")
    ends(run, every, "loss is not finite at step 2; the batch is in nonfinite_step_00000002")
    saved = torch.load(next(run.path.glob("nonfinite*")), weights_only=True)
    assert saved["step"] == 2 and saved["terms"] == ["loss"] and len(saved["index"][0]) == 32
    assert all(torch.equal(a, b) for a, b in zip(saved["views"][0], seen[2], strict=True))
    assert not run.checkpoints(), "bad weights are not kept"


def test_of_several_bad_steps_the_first_is_told():
    watch = FiniteWatch(None)
    for step, loss, norm in ((3, 1.0, 1.0), (4, float("nan"), float("nan")), (5, float("inf"), 1.0), (6, 1.0, 1.0)):
        watch.note({"loss": torch.tensor(loss), "grad_norm": torch.tensor(norm)}, step)
        assert watch.first_bad() == ((4, ["loss"]) if step > 3 else (-1, []))


def test_bad_weights_are_never_saved_however_seldom_one_looks(tiny, tmp_path, monkeypatch):
    forward = methods.get("simclr").forward
    monkeypatch.setattr("sslnb.methods.simclr.SimCLR.forward", lambda self, views, index=None: {
        **(out := forward(self, views, index)), "loss": out["loss"] * float("nan")})
    run = prepare(tiny(), out=tmp_path / "run")
    ends(run, 10**6, "step 0")
    assert not run.checkpoints()


class Spoilt(torch.autograd.Function):
    """The loss as it is, with a gradient of this value."""

    @staticmethod
    def forward(ctx, loss, gradient):
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    def backward(ctx, _):
        return torch.tensor(ctx.gradient), None


def spoil(monkeypatch, at, gradient):
    """SimCLR's gradient is that in the forward passes with these numbers, the loss stays finite."""
    forward, calls = methods.get("simclr").forward, []

    def spoilt(self, views, index=None):
        out = forward(self, views, index)
        calls.append(1)
        return {**out, "loss": Spoilt.apply(out["loss"], gradient)} if len(calls) in at else out

    monkeypatch.setattr("sslnb.methods.simclr.SimCLR.forward", spoilt)


@pytest.mark.parametrize("every", [1, 4], ids=["looked at each step", "looked at now and then, as on a GPU"])
def test_a_gradient_that_is_not_finite_stops_at_its_own_step(tiny, tmp_path, monkeypatch, every):
    """At the last step before the monitor looks and a checkpoint is written, when nothing but the gradient is bad."""
    spoil(monkeypatch, [8], float("nan"))
    run = prepare(tiny(), out=tmp_path / "run")
    ends(run, every, "^grad_norm is not finite at step 7; the batch is in nonfinite_step_00000007")
    assert torch.load(next(run.path.glob("nonfinite*")), weights_only=True)["terms"] == ["grad_norm"]
    assert not run.checkpoints(), "bad weights are not kept"
    assert pretrain(tiny(), out=tmp_path / "run").status()["state"] == "done"


def in_fp16(run, monkeypatch, scale):
    """A trainer with the scaler that fp16 has on a GPU."""
    from accelerate.optimizer import AcceleratedOptimizer

    trainer = Trainer(run)
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)
    trainer.accelerator._optimizers = [trainer.optimizer]
    monkeypatch.setattr(trainer.accelerator, "unscale_gradients", lambda: scaler.unscale_(trainer.optimizer.optimizer))
    return trainer


def test_a_step_that_fp16_skips_is_no_fault(tiny, tmp_path, monkeypatch):
    spoil(monkeypatch, [3], float("inf"))
    updates = []
    monkeypatch.setattr("sslnb.methods.simclr.SimCLR.after_step", lambda self, progress: updates.append(8 * progress))
    trainer = in_fp16(prepare(tiny(), out=tmp_path / "run"), monkeypatch, scale=2.0)
    trainer.fit(Stop())
    assert trainer.run.status()["state"] == "done" and trainer.run.status()["skipped_steps"] == 1
    assert updates == [1, 2, 4, 5, 6, 7, 8], "no moving average of weights that have not moved"
    trainer.accelerator.scaler, trainer.skipped = torch.amp.GradScaler("cpu"), 0
    trainer._resume()
    trainer.close()
    assert trainer.accelerator.scaler.get_scale() == 1.0 and trainer.skipped == 1


def test_a_run_that_fp16_would_skip_for_ever_ends(tiny, tmp_path, monkeypatch):
    """The factor of the loss is 4e-4, 2e-4 and 1e-4 after the first three of these steps, and too small after four."""
    spoil(monkeypatch, [2, 3, 4, 6], float("nan"))
    trainer = in_fp16(prepare(tiny(), out=tmp_path / "run"), monkeypatch, scale=8.1e-4)
    with pytest.raises(NonFinite, match="^grad_norm is not finite at step 5, though fp16 multiplies the loss by only "
                                        "5e-05 after 4 skipped steps; the batch is in nonfinite_step_00000005"):
        trainer.fit(Stop())
    trainer.close()
    saved = torch.load(next(trainer.run.path.glob("nonfinite*")), weights_only=True)
    assert saved["step"] == 5 and saved["terms"] == ["grad_norm"] and saved["views"]


def test_weights_that_are_not_finite_are_neither_looked_at_nor_saved(tiny, tmp_path, monkeypatch):
    def after_step(self, progress):
        if progress == 1:
            next(self.parameters()).data[0] = float("inf")

    monkeypatch.setattr("sslnb.methods.simclr.SimCLR.after_step", after_step)
    run = prepare(tiny(), out=tmp_path / "run")
    with pytest.raises(NonFinite, match="^weight_norm is not finite at step 7"):
        train(run)
    assert not run.checkpoints() and run.status()["state"] == "failed"


def test_features_that_are_not_finite_are_not_measured_and_end_nothing(tiny, tmp_path):
    trainer = Trainer(prepare(tiny(), out=tmp_path / "run"))
    for name, statistic in trainer.method.backbone.named_buffers():
        if name.endswith("running_mean"):
            statistic.fill_(float("nan"))
    assert trainer.monitor.look(trainer.method, 1) == {} and not trainer.run.history("monitor")
    trainer.close()
    assert trainer.run.history("event")[-1]["text"].startswith("features are not finite")


def test_the_best_checkpoint_is_one_that_is_there(tiny, tmp_path):
    trainer = Trainer(prepare(tiny(), out=tmp_path / "run"))
    trainer.close()
    run, monitor = trainer.run, trainer.monitor
    path = run.save_checkpoint({"step": 3})
    run.write_status(best={"checkpoint": "step_00000002-00000000.pt", "knn": 99.0, "step": 2})  # damaged, gone since
    assert monitor.best(path, 3) == {"best": {}}, "no look at this step"
    monitor.last = {"step": 3, "knn": 50.0}
    run.write_status(**monitor.best(path, 3))
    assert run.status()["best"] == {"checkpoint": path.name, "knn": 50.0, "step": 3}
    path = run.save_checkpoint({"step": 4})
    for knn, best in ((40.0, {}), (50.0, {}), (60.0, {"best": {"checkpoint": path.name, "knn": 60.0, "step": 4}})):
        monitor.last = {"step": 4, "knn": knn}
        assert monitor.best(path, 4) == best


def test_a_checkpoint_has_the_broken_images_and_the_random_states_of_all_processes(tiny, tmp_path, monkeypatch):
    trainer = Trainer(prepare(tiny(), out=tmp_path / "run"))
    trainer.broken = {5}
    torch.manual_seed(7)
    theirs = launch.random_state(False)
    torch.manual_seed(6)
    with monkeypatch.context() as patch:
        patch.setattr("accelerate.utils.gather_object", lambda mine: [*mine, (theirs, {7, 2})])
        trainer.step = 1
        trainer.save(time.monotonic())
    for process in range(2):
        monkeypatch.setattr("accelerate.Accelerator.process_index", process)
        trainer._resume()
        assert torch.rand(3).equal(torch.rand(3, generator=torch.Generator().manual_seed(6 + process)))
    trainer.close()
    assert trainer.run.latest()["broken"] == [2, 5, 7]


def test_what_a_checkpoint_that_cannot_be_written_says(tiny, tmp_path, monkeypatch):
    run = prepare(tiny(), out=tmp_path / "run")

    def said(error):
        def save(state, file):
            raise error

        monkeypatch.setattr(torch, "save", save)
        with pytest.raises(RuntimeError) as told:
            run.save_checkpoint({"step": 1})
        return str(told.value)

    assert "No space left" in (words := said(OSError(28, "No space left"))) and "Free some space" in words
    assert "Input/output error" in (words := said(OSError(5, "Input/output error"))) and "space" not in words
    gone = "DataLoader worker (pid 7) is killed by signal: Killed."
    assert said(RuntimeError(gone)) == gone, "torch says so in the midst of anything"


def test_loader_processes_live_on_when_all_are_told_to_stop_and_end_with_their_trainer():
    from sslnb import data

    images = data.load("digits_scattered").subset(range(64))
    before = set(psutil.Process().children())  # of other tests: what compiles for torch, say
    batches = iter(image_loader(ViewSet(images, Views(View(CenterCrop(1)))), 2, batch_sampler=EpochSampler(
        64, 4), prefetch_factor=1))
    next(batches), next(batches)  # one of each: both have begun
    workers = [process for process in psutil.Process().children() if process not in before]
    assert len(workers) == 2
    for name in ("TERM", "INT") * 2:  # from another process than the trainer, which this one is
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    assert len(list(batches)) == 14
    del batches
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_a_process_ends_with_loaders_that_nobody_told_to():
    """As after an error whose traceback is kept: Python's end signals them, and waits for them."""
    script = ("from sslnb import data\nfrom sslnb.reading import EpochSampler, ViewSet, image_loader\n"
              "from sslnb.views import CenterCrop, View, Views\n"
              "images = data.load('digits_scattered').subset(range(64))\n"
              "views = ViewSet(images, Views(View(CenterCrop(1))))\n"
              "loader = image_loader(views, 2, persistent_workers=True, batch_sampler=EpochSampler(64, 4))\n"
              "next(iter(loader))")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)



# ---------------------------------------------------------------- images that are others than before


def folder_of(count, folder):
    from sslnb import data

    images = data.load("digits_scattered")
    folder.mkdir()
    for i in range(count):
        images[i].save(folder / f"{i:02d}.png")
    return folder


def test_other_images_than_a_run_began_with_are_refused(tmp_path):
    pictures = folder_of(40, tmp_path / "pictures")
    recipe = methods.recipes("simclr")["demo"].with_(epochs=2, batch=8, data=str(pictures), size=20)
    run = prepare(recipe, out=tmp_path / "run")
    train_until(run, 3)
    status, away = run.status(), tmp_path / "away.png"
    (pictures / "07.png").rename(away)
    with pytest.raises(InputError, match=r"pictures had 40 images when \S+ began, and has 39 now: put back"):
        pretrain(recipe, out=tmp_path / "run")
    with pytest.raises(InputError, match="had 40 images"):  # as torchrun starts it
        train(run)
    assert run.status()["total"] == status["total"] and run.latest()["step"] == 3
    away.rename(pictures / "77.png")
    with pytest.raises(InputError, match="as many images as when .* but other ones"):
        pretrain(recipe, out=tmp_path / "run")
    (pictures / "77.png").rename(pictures / "07.png")
    assert pretrain(recipe, out=tmp_path / "run").status()["state"] == "done"
    shutil.rmtree(pictures)
    assert len(pretrain(recipe, out=tmp_path / "run").provenance()) == 2, "a finished run needs no images"
    with pytest.raises(InputError, match="holds another run"):
        pretrain(recipe, out=tmp_path / "run", seed=1)


def test_images_with_other_labels_are_other_images():
    from sslnb import data

    images, named = data.load("few_digits"), data.load("few_digits")
    assert nodes.contents(images) == nodes.contents(named)
    named.labels[7] = 9 - named.labels[7]
    assert nodes.contents(images) != nodes.contents(named)


def test_a_run_that_does_not_know_its_images_continues(tmp_path):
    """It was begun before that was written down."""
    pictures = folder_of(40, tmp_path / "pictures")
    recipe = methods.recipes("simclr")["demo"].with_(epochs=2, batch=8, data=str(pictures), size=20)
    run = prepare(recipe, out=tmp_path / "run")
    train_until(run, 3)
    starts = run.provenance()
    assert starts[0].pop("data")["images"] == 40
    (run.path / "provenance.json").write_text(json.dumps(starts))
    shutil.copy(pictures / "07.png", pictures / "08a.png")
    assert pretrain(recipe, out=tmp_path / "run").status()["state"] == "done"
    assert run.provenance()[-1]["data"]["images"] == 41 and not nodes.images_changed(run)
    shutil.copy(pictures / "07.png", pictures / "08b.png")
    assert nodes.images_changed(run)


def test_a_broken_image_whose_name_is_no_text_is_named_with_its_bytes(tmp_path, capsys):
    pictures = folder_of(20, tmp_path / "pictures")
    name = os.fsencode(pictures / "caf") + b"\xe9.png"
    os.rename(pictures / "07.png", name)
    os.truncate(name, 60)
    run = pretrain(methods.recipes("simclr")["demo"].with_(epochs=1, batch=8), data=pictures, out=tmp_path / "run",
                   workers=0)
    assert run.status()["broken"] == 1 and (run.path / "broken.txt").read_bytes() == name + b"\n"
    assert "caf\\udce9.png" in capsys.readouterr().out


def test_a_failed_run_says_why(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("sslnb.methods.simclr.SimCLR.before_train", lambda self, run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrain(tiny(), out=tmp_path / "run")
    status = Run.open(tmp_path / "run").status()
    assert status["state"] == "failed" and "ZeroDivisionError" in status["reason"]
    assert "ZeroDivisionError" in Run.open(tmp_path / "run").history("error")[0]["text"]


def test_broken_images_are_skipped_counted_and_named(tmp_path, capsys):
    from sslnb import data

    images = data.load("digits_scattered")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(40):
        images[i].save(folder / f"{i:02d}.png")
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:60])
    run = pretrain(methods.recipes("simclr")["demo"].with_(epochs=1, batch=8), data=folder, out=tmp_path / "run",
                   workers=0)
    assert run.status()["broken"] == 1 and (run.path / "broken.txt").read_text() == f"{folder / '07.png'}\n"
    assert "1 broken image(s) were skipped" in capsys.readouterr().out
    assert "knn" not in run.history("monitor")[-1], "no labels, no kNN"


def test_a_torn_log_line_is_left_out_and_the_next_row_stands_alone(tiny, tmp_path):
    run = prepare(tiny(), out=tmp_path / "run")
    run.append("step", step=1, loss=2.0)
    with (run.path / "log.jsonl").open("a") as log:
        log.write('{"kind": "step", "step": 2, "lo')
    run.append("step", step=3, loss=1.0)
    assert [row["step"] for row in run.history()] == [1, 3]


THREE_RUNS = """
import sys
from sslnb import methods, pretrain
recipe = methods.recipes("simclr")["demo"].with_(epochs=200, batch=320)
for out in sys.argv[1:-1]:
    try:
        pretrain(recipe, out=out)
    except BaseException as error:
        print(type(error).__name__, error, flush=True)
pretrain(recipe, out=sys.argv[-1])
"""


def test_a_signal_saves_and_marks_the_run_interrupted(tmp_path):
    numbers = [signal.SIGHUP, signal.SIGTERM, signal.SIGINT]
    runs = [Run(tmp_path / number.name) for number in numbers]
    child = subprocess.Popen([sys.executable, "-c", THREE_RUNS, *(str(run.path) for run in runs)],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for number, run in zip(numbers, runs, strict=True):
        deadline = time.time() + 60
        while time.time() < deadline and len(run.history() if run.path.exists() else []) < 2:
            time.sleep(0.1)
        child.send_signal(number)
        while time.time() < deadline and run.status().get("state") == "running":
            time.sleep(0.1)
        status = run.status()
        assert status["state"] == "interrupted" and status["reason"] == number.name
        assert run.latest()["step"] == status["step"] > 0
    printed = child.communicate(timeout=60)[0]
    assert printed.count("the same command") == 3 and printed.count("SystemExit 143") == 2
    assert child.returncode in (1, -signal.SIGINT, 130)


# ---------------------------------------------------------------- bad input


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_login_node_without_a_gpu_prepares_a_run_in_fp16_that_does_not_start_there(tiny, tmp_path):
    run = prepare(tiny(), out=tmp_path / "run", precision="fp16")
    assert run.recipe.precision == "fp16"
    with pytest.raises(InputError, match="'fp16' needs a GPU and there is none here"):
        train(run)
    assert run.status()["state"] == "failed" and not run.history()


@pytest.mark.parametrize("changes, call, words", [
    ({}, {"processes": 0}, "processes 0 is impossible"),
    ({}, {"data": "digits_scatered"}, "did you mean 'digits_scattered'"),
    ({}, {"data": "/nowhere/at/all"}, "a path to a folder or list file that exists"),
    ({"batch": 5000}, {}, "batch is larger than the data"),
    ({}, {"precision": "fp16"}, "needs a GPU"),
    ({}, {"precision": "half"}, "Unknown precision 'half'"),
    ({}, {"trackers": ("tensorbord",)}, "did you mean 'tensorboard'"),
    ({"accum": 2, "batch": 32}, {}, "must not accumulate"),
    ({"crop": (0.3, 1.0), "backbone": "resnet19"}, {}, "Unknown backbone"),
])
def test_bad_calls_fail_before_any_work(tiny, tmp_path, changes, call, words):
    if torch.cuda.is_available() and call.get("precision") == "fp16":
        pytest.skip("a GPU is here")
    with pytest.raises(InputError, match=words):
        pretrain(tiny(**changes), out=tmp_path / "run", **call)
    assert not (tmp_path / "run").exists()


def test_an_unwritable_out_is_named(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/run' cannot be written"):
        pretrain(tiny(), out=tmp_path / "file" / "run")


def test_a_run_directory_that_is_none(tmp_path):
    with pytest.raises(InputError, match="is not a run directory"):
        Run.open(tmp_path)


def test_importing_is_quick_and_touches_no_gpu():
    code = ("import time, torch; start = time.perf_counter(); import sslnb, sslnb.train; "
            "print(time.perf_counter() - start, torch.cuda.is_initialized(), "
            "[m for m in ('timm', 'sklearn', 'accelerate', 'matplotlib') if m in __import__('sys').modules])")
    seconds, initialised, heavy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                                 check=True).stdout.split(" ", 2)
    assert float(seconds) < 2 and initialised == "False" and heavy.strip() == "[]"


def test_settings_are_plain_json(tiny, tmp_path):
    run = prepare(tiny(), out=tmp_path / "run")
    assert json.loads((run.path / "recipe.json").read_text())["recipe"]["method"] == "simclr"
    assert run.recipe == tiny()
    memory = prepare(tiny("npid", images=7, published={"linear": 56.6}), out=tmp_path / "memory").recipe
    assert memory.numbers["images"] == 130, "a memory of every image has as many places as there are images"
    assert memory.published == {"linear": 56.6}, "which is what the recipe means"


def test_a_run_counted_in_steps_ends_within_an_epoch_and_resumes_exactly(tiny, tmp_path):
    """Four steps are an epoch: 6 end in the middle of the second one."""
    recipe = tiny(steps=6, schedule="step", milestones=(5,), warmup_epochs=0.0)
    whole = pretrain(recipe, out=tmp_path / "whole")
    rates = [row["lr"] for row in whole.history()]
    assert len(rates) == 6 and rates[5] == pytest.approx(0.1 * rates[0]) and rates[4] == rates[0]
    assert whole.status()["step"] == whole.status()["total"] == 6
    parts = prepare(recipe, out=tmp_path / "parts")
    train_until(parts, 5)
    parts.append("step", step=6, loss=0.0)  # after its checkpoint, as kill -9 leaves it
    pretrain(recipe, out=tmp_path / "parts")
    assert equal(weights(whole), weights(parts))
    assert [row["loss"] for row in parts.history()] == [row["loss"] for row in whole.history()]


@pytest.mark.parametrize("seconds, steps", [(1.0, 20), (8.0, 2), (400.0, 1)])
def test_on_gpus_all_ask_together_and_soon_whether_to_stop(monkeypatch, seconds, steps):
    """Four steps took so many seconds; there are at most 20 until the next look, and at most about five seconds."""
    trainer = SimpleNamespace(looked=(0, 0.0), step=4, device=None, cuda=True, log_every=20,
                              accelerator=SimpleNamespace(num_processes=2))
    monkeypatch.setattr(time, "monotonic", lambda: seconds)
    monkeypatch.setattr("sslnb.train.sum_over_processes", lambda ours: ours * torch.tensor([1, 2]))
    assert not Trainer._told(trainer, SimpleNamespace(asked=False)) and trainer.look_at == 4 + steps
    trainer.step += 1
    assert Trainer._told(trainer, SimpleNamespace(asked=True))


def test_the_monitor_measures_with_the_recipes_pool_and_leaves_each_image_out(tiny, tmp_path):
    from sslnb.evaluate.collapse import panel
    from sslnb.evaluate.features import extract
    from sslnb.evaluate.knn import weighted_knn

    run = pretrain(tiny("mae", epochs=1), out=tmp_path / "run")
    assert run.recipe.pool == "mean"
    f, row = extract(run.backbone(), run.recipe.load(), size=20, pool="mean"), run.history("monitor")[-1]
    assert row["knn"] == weighted_knn(f.x, f.labels, f.x, f.labels, k=20, exclude_self=True).top1
    assert row["effective_rank"] == pytest.approx(panel(f.x)["effective_rank"], rel=1e-4)
    assert row["alignment"] > 0, "of two views, not of one with itself"


def test_the_monitor_looks_about_a_dozen_times_and_after_the_last_epoch_at_all_classes(tiny):
    recipe = tiny(epochs=40, data="digits_scattered")
    images = recipe.load()
    monitor = Monitor(None, images.subset(images.labels.argsort()), None, recipe)  # as a folder of classes is sorted
    assert [e for e in range(-1, 40) if monitor.due(e)] == [-1, 3, 7, 11, 15, 19, 23, 27, 31, 35, 39]
    assert len(monitor.bank) == 1000 and monitor.bank.labels.unique().tolist() == list(range(10))
    assert Monitor(None, images, None, recipe.with_(epochs=41)).due(40)


def test_the_log_counts_images_waiting_and_time_from_one_row_to_the_next(monkeypatch, capsys):
    now, rows = [100.0], []
    monkeypatch.setattr("sslnb.monitor.time.monotonic", lambda: now[0])
    run = SimpleNamespace(append=lambda kind, **row: rows.append(row), write_status=lambda **values: None)
    accelerator = SimpleNamespace(reduce=lambda value, reduction: value, log=lambda values, step: None)
    trainer = SimpleNamespace(run=run, accelerator=accelerator, recipe=SimpleNamespace(batch=32, total_batch=64),
                              main=True, device="cpu", step=50, total=90, per_epoch=10, skipped=0)
    meter = Meter(trainer)
    for seconds, waiting in ((20, 4), (10, 5), (7, 0)):
        with meter.waiting():
            now[0] += waiting
        now[0] += seconds - waiting
        trainer.step += 10
        meter.log({"loss": torch.tensor(1.0), "lr": torch.tensor(0.1)}, start=90.0)
    assert [(r["images_per_s"], r["data_wait"], r["seconds"], r["epoch"]) for r in rows] == [
        (32.0, 0.2, 30.0, 6.0), (64.0, 0.5, 40.0, 7.0), (640 / 7, 0.0, 47.0, 8.0)]
    said = capsys.readouterr().out
    assert "waiting for data 20%  1:00 left" in said and "waiting for data 50%  0:20 left" in said
    assert "waiting for data 0%  0:08 left" in said, "20 steps took 17 s without the first ten, which begin slowly"


def test_the_first_look_is_at_statistics_of_the_data(tiny, tmp_path):
    from sslnb.evaluate.collapse import panel
    from sslnb.evaluate.features import calibrated, extract

    run = pretrain(tiny(epochs=1), out=tmp_path / "run")
    torch.manual_seed(0)
    images, fresh = run.recipe.load(), run.recipe.build().backbone
    f = extract(calibrated(fresh, images, size=20), images, size=20)
    assert run.history("monitor")[0]["effective_rank"] == pytest.approx(panel(f.x)["effective_rank"], rel=1e-4)


def test_what_was_counted_before_a_stop_counts_at_the_end(tiny, tmp_path):
    from sslnb.train import Trainer

    run = prepare(tiny(), out=tmp_path / "run")
    train_until(run, 2)
    state = run.latest()
    run.save_checkpoint({**state, "broken": [3], "skipped": 5})
    run.write_status(seconds=1000.0)
    trainer = Trainer(run)
    trainer.close()
    assert trainer.broken == {3} and trainer.skipped == 5
    assert pretrain(tiny(), out=tmp_path / "run").status()["seconds"] > 1000


def test_the_log_has_each_steps_rate_and_the_norm_before_clipping(tiny, tmp_path):
    run = pretrain(tiny(clip=1e-3), out=tmp_path / "run")
    per_epoch = run.status()["total"] // 2
    for row in run.history():
        assert row["lr"] == pytest.approx(run.recipe.lr_at(row["step"] - 1, per_epoch)) and row["grad_norm"] > 2e-3


def test_the_seed_is_that_of_the_views_and_of_the_row(tiny, tmp_path):
    from sslnb.evaluate.results import result_row
    from sslnb.train import Trainer

    trainer = Trainer(prepare(tiny(), out=tmp_path / "run", seed=3))
    trainer.close()
    assert trainer.sampler.seed == 3 and result_row("a", "b", "c", {}, 3)["seed"] == 3


def test_all_micro_batches_of_a_bad_step_are_kept(tiny, tmp_path, monkeypatch):
    from sslnb.errors import NonFinite

    forward = methods.get("byol").forward
    monkeypatch.setattr("sslnb.methods.byol.BYOL.forward", lambda self, views, index=None: {
        **(out := forward(self, views, index)), "loss": out["loss"] * float("nan")})
    with pytest.raises(NonFinite, match="step 0"):
        pretrain(tiny("byol", batch=16, accum=2), out=tmp_path / "run")
    saved = torch.load(next((tmp_path / "run").glob("nonfinite*")), weights_only=True)
    assert [len(index) for index in saved["index"]] == [16, 16] and len(saved["views"]) == 2
