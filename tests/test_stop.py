"""How a run ends before its time, and what it finds when it goes on: nothing lost, and what has changed is told."""

import gc
import json
import os
import re
import signal
import sys
import threading
import time
import types
import weakref

import pytest
import torch
from test_train import train_until

from sslnb import Run, data, figures, launch, prepare, pretrain, resolve
from sslnb.errors import InputError, NonFinite
from sslnb.run import environment
from sslnb.stop import Stop
from sslnb.train import Trainer, train


def test_a_second_interrupt_ends_the_step_but_never_the_checkpoint(capsys):
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked and capsys.readouterr().out == (
            "SIGINT: finishing this step, then saving; a second interrupt ends it at once, without.\n")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        stop.saving = True
        os.kill(os.getpid(), signal.SIGINT)


def test_a_run_saves_undisturbed(tiny, tmp_path, monkeypatch):
    save, stop = Run.save_checkpoint, Stop()
    monkeypatch.setattr(Run, "save_checkpoint", lambda *a: (signal.raise_signal(signal.SIGINT), save(*a))[1])
    trainer = Trainer(prepare(tiny(), out=tmp_path / "run"))
    with stop, pytest.raises(KeyboardInterrupt):
        stop.reason = "SIGINT"  # and again while it saves
        trainer.fit(stop)
    trainer.close()
    assert trainer.run.latest()["step"] == 1 and trainer.run.status()["state"] == "interrupted"


def test_a_hangup_that_nohup_ignores_stays_ignored():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_kernel_whose_papermill_is_gone_waits_until_the_run_is_saved(monkeypatch):
    """ipykernel's thread calls os._exit when its parent is another one; the trainer notices that too."""
    poller, ended = types.SimpleNamespace(os=os), []
    monkeypatch.setitem(sys.modules, "ipykernel.parentpoller", poller)
    monkeypatch.setattr(os, "_exit", ended.append)
    with Stop() as stop:
        assert not stop.asked and poller.os.getppid() == os.getppid()
        monkeypatch.setattr(os, "getppid", lambda: 1)
        assert stop.asked and "is gone" in stop.reason and stop.exception().code == 0
        thread = threading.Thread(target=poller.os._exit, args=(1,))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive() and not ended
    thread.join(5)
    assert ended == [1] and poller.os is os


@pytest.mark.parametrize("error, freed", [(KeyboardInterrupt(), True), (torch.OutOfMemoryError("CUDA"), True),
                                          (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
                                          (RuntimeError("mine"), False)])
def test_what_a_notebook_keeps_of_an_interrupted_run_is_not_its_network(tiny, tmp_path, monkeypatch, error, freed):
    """A kernel keeps the last traceback. Of errors in one's own code it keeps everything, for the debugger."""
    def broken(self, views, index=None):
        raise error

    run, trainers = prepare(tiny(), out=tmp_path / "run"), []
    monkeypatch.setattr("sslnb.methods.simclr.SimCLR.forward", broken)
    monkeypatch.setattr("sslnb.train.Trainer.close", lambda self: trainers.append(weakref.ref(self)))
    with pytest.raises(type(error)) as kept:
        train(run)
    gc.collect()
    assert (trainers[0]() is None) == freed and kept.value.__traceback__


def test_without_git_a_run_is_no_checkout(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment()["git"] == "not a checkout"


def test_below_torchrun_only_what_would_come_again_is_a_failure(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.write_running()
    launch.failed(run, InputError("lost"), 1)
    assert run.status()["state"] == "running", "process 0 says how a run is"
    monkeypatch.setenv("SSLNB_PARENT", str(os.getpid()))
    for error, state in ((RuntimeError("a card fell off"), "running"), (InputError("no such images"), "failed"),
                         (NonFinite("the loss"), "failed")):
        launch.failed(run, error, 0)
        assert (run.status()["state"], run.status()["final"]) == (state, state == "failed")
    assert [row["process"] for row in run.history("error")] == [1, 0, 0, 0]


def test_one_process_that_says_so_is_enough(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    for others in (0, 1):
        monkeypatch.setattr(launch, "sum_over_processes", lambda flag, others=others: flag + others)
        assert [launch.any_process(flag, torch.device("cpu")) for flag in (False, True)] == [others > 0, True]


def test_a_full_disk_is_told_wherever_it_is_noticed(tmp_path):
    told = launch.failed(Run(tmp_path), OSError(28, "No space left on device"), 1)
    assert "cannot be written" in str(told) and "Free some space; the same command continues." in str(told)


def test_a_full_shared_memory_is_told_with_the_remedy(tmp_path):
    for said in ("Caught RuntimeError in DataLoader worker process 0.\nunable to allocate shared memory(shm) for file",
                 "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that"):
        told = launch.failed(Run(tmp_path), RuntimeError(said), 1)
        assert "--shm-size 8g, or use workers=0" in str(told)


def test_a_machine_that_is_silent_for_hours_is_told(tmp_path):
    for seconds, said in ((3 * 3600, "nothing was heard from elsewhere for 3 hours"), (60, "")):
        (tmp_path / "status.json").write_text(json.dumps({
            "state": "running", "host": "elsewhere", "pid": 1, "reason": "", "updated": time.time() - seconds}))
        assert Run(tmp_path).status()["state"] == "running" and Run(tmp_path).status()["reason"] == said


@pytest.mark.parametrize("call", [lambda data, out: prepare("simclr", data, out), lambda data, out: prepare(
    resolve("simclr", data=data), out=out)])
def test_a_methods_name_with_data_is_what_resolve_gives_for_them(tmp_path, call):
    pictures(tmp_path / "pics", 80)
    recipe = call(tmp_path / "pics", tmp_path / "run").recipe
    assert recipe.numbers.keys().isdisjoint({"jitter", "flip", "hue"}) and recipe.note.startswith("Your images get")


# ---------------------------------------------------------------- what changed since


def test_a_run_without_its_checkpoints_says_that_it_begins_anew_and_keeps_the_log(tiny, tmp_path, capsys):
    recipe = tiny(epochs=30, batch=16)  # 8 steps each, saved every 12 epochs
    run = prepare(recipe, out=tmp_path / "run")
    train_until(run, 3)
    run.checkpoints()[0].unlink()
    train_until(run, 98)
    assert f"{run.path} came to step 2, but has no checkpoint: it begins anew.\n" in capsys.readouterr().out
    rows = run.history()
    for checkpoint in run.checkpoints():
        checkpoint.unlink()
    train_until(run, 1)
    said = re.search(r"came to step 98, but has no checkpoint: it begins anew. Its log is kept in (\S+)\.\n",
                     capsys.readouterr().out)
    kept = [json.loads(line) for line in (run.path / said[1]).read_text().splitlines()]
    assert [row for row in kept if row["kind"] == "step"] == rows and len(rows) > len(run.history())


def test_a_finished_run_without_checkpoints_says_so(tiny, tmp_path):
    run = pretrain(tiny(epochs=1), out=tmp_path / "run")
    for checkpoint in run.checkpoints():
        checkpoint.unlink()
    assert run.backbone()
    with pytest.raises(InputError, match="holds no readable checkpoint any more, only its backbone; with resume=False"):
        run.method()


def pictures(folder, n=40):
    for i, image in enumerate(data.load("digits_scattered").first(n)):
        (folder / str(i % 2)).mkdir(parents=True, exist_ok=True)
        image.save(folder / str(i % 2) / f"{i}.png")


def test_a_finished_run_says_that_its_images_have_changed_since(tiny, tmp_path, capsys):
    pictures(tmp_path / "pics")
    how = dict(data=tmp_path / "pics", out=tmp_path / "run")
    pretrain(tiny(epochs=1, batch=8), **how)
    pretrain(tiny(epochs=1, batch=8), **how)
    assert "changed" not in capsys.readouterr().out
    (tmp_path / "pics" / "0" / "0.png").rename(tmp_path / "pics" / "0" / "new.png")
    pretrain(tiny(epochs=1, batch=8), **how)
    assert f"But since then the images of {tmp_path}/pics changed: resume=False" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["simclr", "npid"])
def test_a_run_is_found_again_from_another_folder_and_when_its_images_are_gone(tiny, tmp_path, monkeypatch, method):
    pictures(tmp_path / "pics")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path)
    run = pretrain(tiny(method, epochs=1, batch=8), "pics")
    assert run.recipe.data == str(tmp_path / "pics")
    monkeypatch.chdir(tmp_path / "notebooks")
    assert len(Run.open(tmp_path / run.path).recipe.load()) == 36
    (tmp_path / "notebooks" / "runs").symlink_to(tmp_path / "runs")
    assert pretrain(tiny(method, epochs=1, batch=8), "../notebooks/../pics").status()["state"] == "done"
    (tmp_path / "pics").rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert len(pretrain(tiny(method, epochs=1, batch=8), "pics").provenance()) == 1, "it is done, and found"


def test_a_run_goes_on_where_its_images_lie_now_and_with_no_others(tiny, tmp_path):
    pictures(tmp_path / "pics")
    recipe, out = tiny(epochs=4, batch=8), tmp_path / "run"
    train_until(prepare(recipe, tmp_path / "pics", out), 2)
    (tmp_path / "pics").rename(tmp_path / "elsewhere")
    moved = prepare(recipe, tmp_path / "elsewhere", out)
    assert moved.recipe.data == str(tmp_path / "elsewhere")
    pictures(tmp_path / "others", 30)
    with pytest.raises(InputError, match="holds another run .data: .*elsewhere there, .*others now"):
        prepare(recipe, tmp_path / "others", out)
    assert pretrain(recipe, tmp_path / "elsewhere", out).status()["state"] == "done"
    (tmp_path / "elsewhere").rename(tmp_path / "again elsewhere")
    done = pretrain(recipe, tmp_path / "again elsewhere", out, workers=1)
    assert done.settings["workers"] == "auto", "a finished run says how it was trained"
    assert len(done.provenance()) == 2 and done.recipe.data == str(tmp_path / "again elsewhere")
    with pytest.raises(InputError, match="holds another run .data: .*again elsewhere there, .*others now"):
        prepare(recipe, tmp_path / "others", out)


EDITED = """
from sslnb import resolve
from sslnb.methods.simclr import SimCLR


class Mine(SimCLR):
    def __init__(self, backbone, *, temperature: float = 0.2):
        super().__init__(backbone, temperature=temperature, hidden_dim=%d, dim=16)


RECIPES = {"demo": resolve("simclr", epochs=2, batch=32).with_(method="mine.py:Mine", numbers={})}
"""


def test_a_file_that_no_longer_fits_the_checkpoint_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(EDITED % 32)
    run = prepare(resolve("mine.py:Mine"), "few_digits", "run")
    train_until(run, 3)
    (tmp_path / "mine.py").write_text(EDITED % 48 + "\n")
    with pytest.raises(InputError, match="mine.py:Mine has changed since, and its network is another one now .size "
                                         "mismatch.*put the old one back, or begin anew with resume=False"):
        pretrain(resolve("mine.py:Mine"), "few_digits", "run")
    (tmp_path / "mine.py").write_text(EDITED % 32)
    assert pretrain(resolve("mine.py:Mine"), "few_digits", "run").status()["state"] == "done"


def test_curves_of_one_run(tiny, tmp_path):
    run = pretrain(tiny(epochs=1), out=tmp_path / "run")
    one, several = figures.curves(run), figures.curves({"a": run, "b": run})
    assert len(one.axes[0].lines) == 1 and not one.axes[0].get_legend() and several.axes[0].get_legend()
