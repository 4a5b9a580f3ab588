"""Whose a run directory is: one call trains it, another changes nothing, and nothing of the user's is touched."""

import contextlib
import io
import os
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from test_train import equal, train_until, weights

from sslnb import InputError, Run, launch, nodes, prepare, pretrain
from sslnb.reading import loader_workers
from sslnb.stop import Stop
from sslnb.train import train

NOBODY = 2**22 - 3  # no process has this id


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and "lock" not in p.name}


# ---------------------------------------------------------------- of two calls one trains


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_is_its_callers_from_the_check_to_the_end(tiny, tmp_path, monkeypatch, processes):
    """Also before its processes come up and while torchrun starts them again, when none of them has its lock."""
    seen = []

    def stand_in(run, *_):
        run.write_running()
        before = files(tmp_path)
        for resume in (True, False):
            with pytest.raises(InputError, match=rf"is being trained by another process \(pid {os.getpid()} on"):
                prepare(tiny(), out=tmp_path / "run", processes=processes, workers=1, resume=resume)
        seen.append(files(tmp_path) == before)

    monkeypatch.setattr("sslnb.train.train", stand_in)
    monkeypatch.setattr("sslnb.launch.torchrun", stand_in)
    run = pretrain(tiny(), out=tmp_path / "run", processes=processes)
    assert seen == [True]
    with run.lock("launch.lock"), run.lock():
        pass  # both are free again


def test_processes_that_still_save_are_waited_for(tiny, tmp_path, monkeypatch, capsys):
    run = prepare(tiny(), out=tmp_path / "run")
    run.write_running()
    run.write_status(pid=NOBODY)  # as after `kill -9` of the caller
    with contextlib.ExitStack() as theirs:
        theirs.enter_context(run.lock())
        monkeypatch.setattr("sslnb.checks.time.sleep", lambda seconds: theirs.close())
        prepare(tiny(), out=tmp_path / "run")
    assert capsys.readouterr().out.count("Another process is just leaving") == 1


def test_whoever_trains_has_the_lock(tiny, tmp_path):
    run = prepare(tiny(), out=tmp_path / "run")
    with run.lock(), pytest.raises(InputError, match="is being trained by another process"):
        train(run)
    assert not run.history()


def test_a_run_that_has_no_state_yet_is_just_beginning_and_not_waited_for(tiny, tmp_path, monkeypatch):
    run = prepare(tiny(), out=tmp_path / "run")
    assert "state" not in run.status()
    monkeypatch.setattr("sslnb.checks.time.sleep", lambda seconds: pytest.fail("it waited"))
    with run.lock(), pytest.raises(InputError, match="is being trained by another process"):
        prepare(tiny(), out=tmp_path / "run")


def test_they_are_not_waited_for_for_ever(tiny, tmp_path, monkeypatch):
    run = prepare(tiny(), out=tmp_path / "run")
    run.write_status(state="interrupted")
    monkeypatch.setattr("sslnb.checks.LEAVING", 0.3)
    with run.lock(), pytest.raises(InputError, match="is being trained by another process"):
        prepare(tiny(), out=tmp_path / "run")


# ---------------------------------------------------------------- callers that end


class Child:
    """torchrun, which says a line, is interrupted with its caller, and says what the processes say at their end."""
    ended = False

    def __init__(self, *_, **__):
        self.stdout = self.lines()

    def lines(self):
        yield "step 1\n"
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    def terminate(self):
        os.kill(os.getpid(), signal.SIGTERM)  # again, as some schedulers do

    def communicate(self):
        Child.ended = True
        return "Stopped at step 1\n", None


def test_sigterm_waits_for_the_processes_and_the_run_is_marked_interrupted(tiny, tmp_path, monkeypatch, capsys):
    run = prepare(tiny(), out=tmp_path / "run")
    monkeypatch.setattr(subprocess, "Popen", Child)
    handler = signal.signal(signal.SIGTERM, lambda *_: None)  # instead of ending pytest
    try:
        mine = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit, match="143"):
            launch.torchrun(run, 2)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert Child.ended and run.status()["state"] == "interrupted" and run.status()["reason"] == "SystemExit: 143"
    assert capsys.readouterr().out.endswith("step 1\nStopped at step 1\n")


def test_processes_that_lost_their_caller_do_not_come_back(monkeypatch, capsys):
    monkeypatch.setenv("SSLNB_PARENT", str(NOBODY))
    with pytest.raises(SystemExit) as ended:
        nodes.join()
    assert ended.value.code == 0 and "The process that started the run is gone." in capsys.readouterr().out
    stop = Stop()
    assert stop.asked and stop.exception().code == 0, "for torchrun an error would be a reason to start them again"


def test_a_new_torchrun_tries_what_failed_for_good(tmp_path, monkeypatch):
    """That which is there would only start it again and again."""
    run = Run(tmp_path)
    monkeypatch.setenv("SSLNB_PARENT", str(os.getpid()))
    run.write_running()
    launch.failed(run, RuntimeError("a card fell off"), 0)
    nodes.exit_if_hopeless(run)
    launch.failed(run, InputError("no such images"), 0)
    with pytest.raises(SystemExit):
        nodes.exit_if_hopeless(run)
    monkeypatch.setenv("SSLNB_PARENT", str(NOBODY))
    nodes.exit_if_hopeless(run)


# ---------------------------------------------------------------- what a later call may change


def test_workers_compile_and_trackers_are_those_of_the_latest_call(tiny, tmp_path):
    whole = pretrain(tiny("mae"), out=tmp_path / "whole", workers=0)
    run = prepare(tiny("mae"), out=tmp_path / "run", workers=2, compile=True)
    assert run.settings["workers"] == 2 and run.settings["compile"]
    prepare(tiny("mae"), out=tmp_path / "run", workers=0)
    train_until(run, 3)
    before = run.settings
    run = pretrain(tiny("mae"), out=tmp_path / "run", workers=1, trackers=("tensorboard",))
    assert run.settings == {**before, "workers": 1, "compile": False, "trackers": ["tensorboard"]}
    assert list(run.path.rglob("events.out.tfevents*")) and equal(weights(run), weights(whole))
    pretrain(tiny("mae"), out=tmp_path / "run")
    assert run.settings["workers"] == 1, "a finished run says how it was trained"


def test_they_lead_to_the_same_directory(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, other = prepare(tiny()), prepare(tiny(), workers=0, compile=True, trackers=("tensorboard",))
    assert first.path == other.path != prepare(tiny(), seed=1).path
    assert prepare(tiny()).settings["workers"] == "auto"
    assert prepare(tiny().with_(note="said better", source="paper")).path == first.path


def test_a_value_that_failed_at_once_can_be_corrected(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as wrong:
        wrong.setattr("sslnb.methods.simclr.SimCLR.before_train", lambda self, run: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pretrain(tiny(), out=tmp_path / "run")
    assert Run(tmp_path / "run").history("error")
    run = pretrain(tiny(epochs=1, lr=1e-3), out=tmp_path / "run", seed=1)
    assert run.status()["state"] == "done" and run.recipe.lr == 1e-3 and run.seed == 1
    assert not run.history("error")
    with pytest.raises(InputError, match="holds another run"):
        prepare(tiny(epochs=1), out=tmp_path / "run", seed=1)


# ---------------------------------------------------------------- out


def test_only_a_run_is_moved_aside(tiny, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="mine is not a run, so resume=False does not move it aside"):
        prepare(tiny(), out=mine, resume=False)
    assert [p.name for p in tmp_path.rglob("*")] == ["mine", "thesis.tex"]
    (tmp_path / "empty").mkdir()
    prepare(tiny(), out=tmp_path / "empty", resume=False)


@pytest.mark.parametrize("resume", [True, False])
def test_an_out_that_cannot_be_is_named(tiny, tmp_path, monkeypatch, resume):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match=f"{out.name}' cannot be written"):
            prepare(tiny(), out=out, resume=resume)
    for out in (None, 3, ""):
        with pytest.raises(InputError, match=f"out {out!r} is impossible"):
            prepare(tiny(), out=out, resume=resume)


def test_the_folder_that_one_is_in_is_not_moved(tiny, tmp_path, monkeypatch):
    run = prepare(tiny(), out=tmp_path / "run")
    (run.path / "inner").mkdir()
    for here, out in (("", "."), ("inner", ".."), ("inner", run.path)):
        monkeypatch.chdir(run.path / here)
        with pytest.raises(InputError, match="the folder that this process is in"):
            prepare(tiny(), out=out, resume=False)


def test_the_home_folder_may_be_written_as_in_a_shell(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert prepare(tiny(), out="~/run").path == tmp_path / "home" / "run"
    assert Run.open("~/run").seed == 0 and not (tmp_path / "~").exists()


@pytest.mark.parametrize("code", [1, 0])
def test_the_start_of_several_processes_and_which_error_ended_them(tmp_path, monkeypatch, tiny, code):
    """torchrun starts a run again: the reason is the first error of its last start, not one that was survived."""
    run, given = prepare(tiny("simsiam"), out=tmp_path / "run"), {}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    launch.failed(run, RuntimeError("of an earlier call"), 0)

    class Child:
        stdout = ()

        def __init__(self, command, env, **_):
            given.update(command=command, env=env)
            for attempt, text in ((0, "MONDAY"), (1, "FRIDAY"), (1, "connection lost")):
                monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
                launch.failed(run, RuntimeError(text), 0)

        def wait(self):
            return code
    monkeypatch.setattr(launch.subprocess, "Popen", Child)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with pytest.raises(RuntimeError, match="FRIDAY"):
        launch.torchrun(run, 2)
    assert {"--nnodes=1", "--node_rank=0", "--nproc_per_node=2", "--max_restarts=3"} <= set(given["command"])
    assert given["env"]["SSLNB_PARENT"] == str(os.getpid())
    assert given["env"].get("ACCELERATE_USE_CPU") == (None if torch.cuda.is_available() else "1")
    assert given["env"]["OMP_NUM_THREADS"] == "3" and given["env"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "600"


def test_more_processes_than_gpus_are_refused_before_they_start(tmp_path, monkeypatch, tiny):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(launch, "torchrun", None)
    with pytest.raises(InputError, match=r"processes 2 are more than the 1 GPU\(s\) here"):
        pretrain(tiny("simsiam"), out=tmp_path / "run", processes=2)


def test_what_accelerate_reads_from_the_environment_does_not_change_the_training(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert launch.accelerator("fp32", (), tmp_path).gradient_accumulation_steps == 1
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="ACCELERATE_USE_FSDP is set"):
        launch.accelerator("fp32", (), tmp_path)


def test_only_the_cores_count_that_a_job_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 4, 5, 6}, raising=False)
    assert launch.cores() == 4 and loader_workers("auto", SimpleNamespace(root="x"), 2) == 1
    set_to = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    launch.limit_threads(1)
    assert set_to == [2]


def test_a_notebook_shows_a_recipe_in_full_once_and_then_what_differs(tiny, tmp_path, monkeypatch, capsys):
    from sslnb import checks

    def told(**changes):
        prepare(tiny(**changes), out=tmp_path / str(len(list(tmp_path.iterdir()))))
        return capsys.readouterr().out.splitlines()

    monkeypatch.setattr(checks, "_shown", {})
    assert len(told()) > 12 and len(told()) > 12, "anywhere else it is told in full each time"
    monkeypatch.setattr(checks, "in_notebook", lambda: True)
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(tiny(), out=tmp_path / "hidden")
    assert len(told()) > 12, "what nobody saw was not shown"
    for changes, said in (({}, "as shown above"), ({"temperature": 0.5}, "as shown above, but temperature 0.5"),
                          ({"lr": 1.0}, "as shown above, but lr 1.0")):
        first, run = told(**changes)
        assert first == f"      simclr  {said}" and "seed 0, 1 process" in run
    assert len(told(method="byol")) > 12 and len(told()) == 2
    many = told(lr=1.0, temperature=1.0, epochs=3, size=24, batch=26, jitter=0.3)
    assert len(many) > 12 and len(told(lr=1.0, temperature=1.0, epochs=3, size=24, batch=26)) == 2
