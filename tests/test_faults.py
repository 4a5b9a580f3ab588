"""What breaks, with real processes, signals and files: the same command continues, the weights are those of the
undisturbed run bit for bit, and nothing that was written is lost. The README's table is what passed here:

    pytest -n 2 -rP -m faults | grep '^| '
"""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from sslnb import Run, data
from sslnb.files import append_jsonl, checksum, read_jsonl

pytestmark = pytest.mark.faults

# MAE, because its masks are drawn from the random state; 12 steps an epoch, a checkpoint every 96 steps.
COMMAND = """
import sys
from sslnb import pretrain, resolve

method, data, out, epochs, processes, workers = sys.argv[1:]
recipe = resolve(method, data=data, epochs=int(epochs), batch=8)
pretrain(recipe, out=out, processes=int(processes), workers=int(workers))
"""
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "00_start.ipynb"
EPOCHS, TOTAL, BETWEEN = 24, 288, 96
started: list[subprocess.Popen] = []


def row(fault: str, then: str, times: int = 1) -> None:
    """A line of the README's table, printed by a test that has seen all it says."""
    print(f"| {fault} | {then} | {times} |")


# ---------------------------------------------------------------- the command, given again and again


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of 110 images in two classes, of which 11 are held out for testing."""
    folder, images = tmp_path_factory.mktemp("data") / "pictures", data.load("digits_scattered")
    for i in range(110):
        of_class = folder / f"{images.labels[i] % 2}"
        of_class.mkdir(parents=True, exist_ok=True)
        images[i].save(of_class / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory) -> Run:
    """The undisturbed run."""
    return trained(pictures, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def out(tmp_path) -> Iterator[Path]:
    """Where a run goes. What a test that fails has started is ended."""
    yield tmp_path / "run"
    for child in started:
        child.kill()
        child.wait()
    started.clear()


def start(pictures, out, method="mae", epochs=EPOCHS, processes=1, workers=2, **how) -> subprocess.Popen:
    """The command, in a process of its own."""
    words = method, pictures, out, epochs, processes, workers
    return launched([sys.executable, "-c", COMMAND, *map(str, words)], out.parent, **how)


def launched(words, folder, **how) -> subprocess.Popen:
    """It prints into a file without a name: nobody has to read that for it to go on."""
    prints = tempfile.TemporaryFile()  # noqa: SIM115
    started.append(subprocess.Popen(words, stdout=prints, stderr=subprocess.STDOUT, cwd=folder, **how))
    started[-1].prints = prints
    return started[-1]


def printed(child) -> str:
    return os.pread(child.prints.fileno(), 10**7, 0).decode()  # reading elsewhere would move the place to write at


def trained(pictures, out, **how) -> Run:
    """The run as the command leaves it, if it can."""
    child = start(pictures, out, **how)
    assert child.wait(200) == 0, printed(child)
    return Run.open(out)


def last_words(child) -> str:
    """What a command that fails by itself says at the end."""
    assert child.wait(200) not in (0, -signal.SIGKILL), printed(child)
    return printed(child).strip().splitlines()[-1]


def wait_for(condition, seconds=120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def at_step(child, out, step) -> None:
    """Wait until this process, not one before it, has `step` in the log."""
    def there():
        assert child.poll() is None, printed(child)
        return "\nstep " in printed(child) and any(row["step"] >= step for row in Run(out).history())

    wait_for(there)


def kill(child) -> None:
    child.kill()
    assert child.wait() == -signal.SIGKILL


# ---------------------------------------------------------------- what must hold


def log(run) -> list[dict]:
    return read_jsonl(run.path / "log.jsonl")


def written(run) -> tuple[int, list, list]:
    """What no fault may cost: the step of the newest whole checkpoint, the log up to there, and the results."""
    newest = run.latest(say=lambda text: None)
    saved = newest["step"] if newest else -1
    return saved, [row for row in log(run) if row["step"] <= saved], run.results()


def kept(before, run) -> None:
    """These rows are there as they were, in front of the new ones, and every checkpoint and snapshot is whole."""
    saved, rows, results = before
    assert [row for row in log(run) if row["step"] <= saved][: len(rows)] == rows
    assert run.results()[: len(results)] == results
    assert not [path for path in run.checkpoints() if checksum(path) != path.stem.split("-")[1]]
    assert all(tensors["images"].ndim == 4 for _, tensors in run.snapshots())


def same_run(a, b) -> None:
    """Two finished runs are the same one, bit for bit, and no draft was left behind."""
    for run in (a, b):
        assert run.status()["state"] == "done" and run.status()["step"] == run.status()["total"]
    same(a.latest(), b.latest())
    same((a.path / "backbone.safetensors").read_bytes(), (b.path / "backbone.safetensors").read_bytes())
    for kind, names in (("step", ("loss", "lr", "grad_norm")), ("monitor", ("knn", "effective_rank", "alignment"))):
        same(*([(row["step"], *(row[name] for name in names)) for row in run.history(kind)] for run in (a, b)))
    same(a.snapshots(), b.snapshots())
    same(*({**run.status()["best"], "checkpoint": ""} for run in (a, b)))  # the same tensors, but not the same bytes
    assert not list(b.path.rglob(".*"))


def same(a, b) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            same(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ---------------------------------------------------------------- processes that die


def test_the_trainer_is_killed_at_random_steps(pictures, whole, out):
    steps, run, before, came_back = sorted(random.Random(0).sample(range(TOTAL), 20)), Run(out), (-1, [], []), set()
    for step in steps:
        child = start(pictures, out)
        at_step(child, out, step)
        kill(child)
        kept(before, run)
        status = run.status()
        assert status["state"] == "interrupted" and f"process {child.pid} is gone" in status["reason"]
        run.append("event", step=0, text="a reader's own row")
        with (out / "results.jsonl").open("a") as results:
            results.write(json.dumps({"protocol": "knn", "killed": step}) + "\n")
        before = written(run)
        came_back.add(max(0, before[0]))
    trained(pictures, out)
    kept(before, run)
    same_run(whole, run)
    assert [found["killed"] for found in run.results()] == steps and len(run.provenance()) == len(steps) + 1
    row(f"`kill -9` of the trainer at random steps, {steps[0]} to {steps[-1]} of {TOTAL}",
        f"the same command goes on from the newest checkpoint, here {sorted(came_back)}; until then the status is "
        "`interrupted` and names the process that is gone", len(steps))


def rank(child, number) -> psutil.Process:
    """The process of a rank among those that torchrun started."""
    (found,) = (p for p in psutil.Process(child.pid).children(recursive=True)
                if "sslnb.train" in p.cmdline() and p.environ().get("RANK") == str(number)
                and p.parent().cmdline()[1:3] == ["-m", "torch.distributed.run"])
    return found


def test_one_of_four_workers_is_killed(pictures, out):
    how = {"epochs": 12, "processes": 4, "workers": 1}
    whole = trained(pictures, out.with_name("whole"), **how)
    child, run = start(pictures, out, **how), Run(out)
    for number, step in ((3, BETWEEN + 5), (0, BETWEEN + 20)):
        at_step(child, out, step)
        before, starts = written(run), len(run.provenance())
        victim = rank(child, number)
        victim.kill()
        victim.wait()
        while len(run.provenance()) == starts:
            assert run.status()["state"] == "running" and child.poll() is None, printed(child)
            time.sleep(0.1)
        kept(before, run)
    assert child.wait(200) == 0, printed(child)
    same_run(whole, run)
    row("`kill -9` of one of four workers, the last and the first",
        "torchrun starts all four again, and they go on from the newest checkpoint; the command does not end", 2)


def test_a_loader_process_is_killed(pictures, whole, out):
    for step in (BETWEEN + 20, 2 * BETWEEN + 20):
        child, run = start(pictures, out), Run(out)
        at_step(child, out, step)
        before, loaders = written(run), psutil.Process(child.pid).children()
        assert len(loaders) == 2
        loaders[-1].kill()
        said = last_words(child)
        assert "A process that loads images died" in said and f"{loaders[-1].pid}" in said and "`workers`" in said
        assert run.status()["state"] == "failed" and run.status()["reason"] == said
        kept(before, run)
    trained(pictures, out)
    kept(before, run)
    same_run(whole, run)
    row("`kill -9` of a process that loads images",
        "the run fails and says why; the same command goes on from the newest checkpoint", 2)


def under_papermill(pictures, out) -> tuple[list[str], subprocess.Popen, psutil.Process]:
    """The command, its process and the kernel, some steps after the first checkpoint."""
    values = {"method": "mae", "data": pictures, "epochs": EPOCHS, "batch": 8, "workers": 2, "out": out}
    words = [sys.executable, "-m", "papermill", NOTEBOOK, "out.ipynb",
             *(word for name, value in values.items() for word in ("-p", name, str(value)))]
    child = launched(words, out.parent)
    wait_for(lambda: any(row["step"] >= BETWEEN + 20 for row in Run(out).history()))
    (kernel,) = (p for p in psutil.Process(child.pid).children() if "ipykernel_launcher" in p.cmdline())
    return words, child, kernel


def test_papermill_is_told_to_stop(pictures, whole, out):
    """Its kernel would end itself within a second, in the middle of a step."""
    words, child, kernel = under_papermill(pictures, out)
    run, before = Run(out), written(Run(out))
    child.terminate()
    assert child.wait(20) == -signal.SIGTERM
    kernel.wait(60)
    status = run.status()
    assert status["state"] == "interrupted" and "is gone" in status["reason"], status
    assert status["step"] == run.latest()["step"] > BETWEEN and status["step"] % BETWEEN, "in the middle of an epoch"
    kept(before, run)
    again = launched(words, out.parent)
    assert again.wait(200) == 0, printed(again)
    same_run(whole, run)
    assert len(run.provenance()) == 2 and run.results()
    row("SIGTERM to papermill, whose kernel would end itself within a second",
        "the kernel saves first, and marks the run `interrupted`; the same command goes on from this step")


def test_the_kernel_is_killed_under_papermill(pictures, whole, out):
    words, child, kernel = under_papermill(pictures, out)
    run, before = Run(out), written(Run(out))
    kernel.kill()
    last_words(child)
    assert "DeadKernelError" in printed(child)
    assert run.status()["state"] == "interrupted", run.status()
    kept(before, run)
    again = launched(words, out.parent)
    assert again.wait(200) == 0, printed(again)
    kept(before, run)
    same_run(whole, run)
    assert len(run.provenance()) == 2 and run.results()
    row("`kill -9` of the kernel under papermill",
        f"papermill ends with an error; the same command goes on from step {before[0]} to the end of the notebook")


# ---------------------------------------------------------------- checkpoints and disks


def stop_while_writing(child, out) -> list[Path]:
    """Stop the process, which goes on with SIGCONT, in the middle of its next checkpoint: its draft, [] if missed."""
    def drafts():
        return list((out / "checkpoints").glob(".step_*.draft"))

    deadline = time.monotonic() + 60
    while not drafts() and child.poll() is None and time.monotonic() < deadline:
        pass  # it takes milliseconds to write one
    child.send_signal(signal.SIGSTOP)
    wait_for(lambda: child.poll() is not None or psutil.Process(child.pid).status() == psutil.STATUS_STOPPED)
    return drafts()


def test_sigterm_while_a_checkpoint_is_written(pictures, whole, out):
    child, run = start(pictures, out), Run(out)
    for step in (BETWEEN, 2 * BETWEEN):
        at_step(child, out, step - 3)
        if drafts := stop_while_writing(child, out):
            break
        child.send_signal(signal.SIGCONT)
    assert drafts, "never in the middle of a checkpoint"
    child.send_signal(signal.SIGTERM)
    child.send_signal(signal.SIGCONT)
    assert child.wait(60) == 128 + signal.SIGTERM and f"Stopped at step {step} of {TOTAL}" in printed(child)
    assert run.latest()["step"] == step and not drafts[0].exists()
    assert run.status()["state"] == "interrupted" and run.status()["reason"] == "SIGTERM"
    child = start(pictures, out)
    at_step(child, out, step + 15)
    child.terminate()
    assert child.wait(60) == 128 + signal.SIGTERM
    before = written(run)
    assert before[0] % 12, "not in the middle of an epoch"
    trained(pictures, out)
    kept(before, run)
    same_run(whole, run)
    row("SIGTERM while a checkpoint is written, and in the middle of an epoch", "the checkpoint is written to its end, "
        "then the run stops as `interrupted`; the same command goes on from this step", 2)


def test_a_kill_while_a_checkpoint_is_written(pictures, whole, out):
    """As schedulers do it: SIGTERM, and SIGKILL when saving takes too long."""
    run = Run(out)
    for step in range(BETWEEN + 20, TOTAL, 50):
        child = start(pictures, out)
        at_step(child, out, step)
        before = written(run)
        child.terminate()
        if drafts := stop_while_writing(child, out):
            break
        child.send_signal(signal.SIGCONT)
        child.wait(60)
    assert drafts, "never in the middle of a checkpoint"
    kill(child)
    assert drafts[0].exists() and run.status()["state"] == "interrupted"
    kept(before, run)
    trained(pictures, out)
    kept(before, run)
    same_run(whole, run)
    row("`kill -9` while a checkpoint is written", "the checkpoint before it counts; what was left half written is "
        "removed with the next one")


@pytest.fixture
def disk(out) -> Iterator:
    """A folder, and `fill(child, free)`, which leaves `free` bytes in it; `fill(child, None)` makes room again.

    It is a file system of its own where that can be mounted. Elsewhere no file of the child may grow beyond `free`, or
    beyond the log as it is: there must be room for what it prints.
    """
    folder = out.with_name("disk")
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], capture_output=True)
    filler = folder / "filler"

    def fill(child, free):
        if not fill.mounted:
            if free is not None:
                limit = max(free, (folder / "run" / "log.jsonl").stat().st_size)
                resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        elif free is None:
            filler.unlink()
        else:
            with filler.open("wb") as file:
                space = os.statvfs(folder)
                os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize - free)

    fill.mounted = mounted.returncode == 0
    fill.how = "a tmpfs of 32 MB" if fill.mounted else "a limit for files"
    yield folder, fill
    if fill.mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_the_disk_is_full(pictures, whole, disk):
    folder, fill = disk
    out, run = folder / "run", Run(folder / "run")
    for free in (10**5, 2**20, 0):  # too little for a snapshot, for a checkpoint, for a line of the log
        child = start(pictures, out)
        at_step(child, out, BETWEEN + 20)
        fill(child, free)
        said, before = last_words(child), written(run)
        assert re.search("cannot be written .*(No space left|File too large).*Free some space; the same command", said)
        assert before[0] == BETWEEN and run.status()["state"] == ("failed" if free else "interrupted")
        kept(before, run)
        fill(child, None)
    trained(pictures, out)
    kept(before, run)
    same_run(whole, run)
    row(f"the disk is full ({fill.how}): a snapshot, a checkpoint or a line of the log does not fit",
        "the run stops and says so; all that was there stays; the same command continues when there is space", 3)


def test_checkpoints_are_damaged(pictures, whole, out):
    child, run, random_numbers = start(pictures, out), Run(out), random.Random(0)
    at_step(child, out, 2 * BETWEEN + 20)
    kill(child)
    first, newest = run.checkpoints()
    good, cut, flips = newest.read_bytes(), [0, 1, 10**6], random_numbers.sample(range(newest.stat().st_size), 20)
    for damaged in (*(good[:n] for n in cut), good[:-1], *(flipped(good, n, random_numbers) for n in flips)):
        newest.write_bytes(damaged)
        assert run.latest(say=lambda text: None)["step"] == BETWEEN
    copy = Run(shutil.copytree(out, out.with_name("copy")))
    copy.checkpoints()[0].write_bytes(first.read_bytes()[:-1000])
    for hurt, left, passed_over in ((run, BETWEEN, 1), (copy, -1, 2)):
        before = written(hurt)
        assert before[0] == left
        child = start(pictures, hurt.path)
        assert child.wait(200) == 0 and printed(child).count("is damaged") == passed_over
        kept(before, hurt)
        same_run(whole, hurt)
    row(f"truncated and bit-flipped checkpoints, {len(cut) + 1 + len(flips)} damages which are all noticed", "the "
        "newest whole one counts, and the run says which ones it passes over; if there is none it begins anew", 2)


def flipped(content, at, numbers) -> bytes:
    return content[:at] + bytes([content[at] ^ 1 << numbers.randrange(8)]) + content[at + 1:]


# ---------------------------------------------------------------- images, numbers, logs, clocks


def test_images_break_while_the_run_goes_on(pictures, whole, out):
    pictures = shutil.copytree(pictures, out.with_name("pictures"))
    child, run = start(pictures, out), Run(out)
    at_step(child, out, BETWEEN + 20)
    before, curve = written(run), run.history()
    images = data.load(pictures)
    broken = [images.where(i) for i in (10, 11, 30)]
    for path in broken:
        os.truncate(path, 60)
    at_step(child, out, 2 * BETWEEN + 20)
    kill(child)
    kept(before, run)
    same(*([(row["step"], row["loss"]) for row in rows] for rows in (curve, whole.history()[: len(curve)])))
    trained(pictures, out)
    kept(before, run)
    assert run.status()["state"] == "done" and run.status()["broken"] == len(broken)
    assert (out / "broken.txt").read_text().splitlines() == broken
    row("images that break in the middle of an epoch, and a `kill -9` later",
        "the next readable image takes their place, the run goes on, and `broken.txt` names them all", len(broken))


def test_the_folder_of_images_is_gone_for_a_while(pictures, whole, out):
    pictures = shutil.copytree(pictures, out.with_name("pictures"))
    child, run = start(pictures, out), Run(out)
    at_step(child, out, BETWEEN + 20)
    away = pictures.rename(out.with_name("away"))
    before = written(run)
    assert re.match(r".*InputError: No image can be decoded from \S+\.png", last_words(child))
    assert run.status()["state"] == "failed" and "Traceback" not in run.status()["reason"]
    assert f"{str(pictures)!r}" in last_words(start(pictures, out)), "still gone"
    away.rename(pictures)
    kept(before, run)
    trained(pictures, out)
    kept(before, run)
    same_run(whole, run)
    row("the folder of images is gone, as with a network disk, and comes back",
        "the run fails and names an image; the same command continues")


HURT = """
import time
from pathlib import Path

import torch

from sslnb import resolve
from sslnb.methods.mae import MAE

here, now = Path(__file__).parent, time.time


def clock():
    return now() - 86400 * (here / "clock").exists()


class Spoilt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


class Hurt(MAE):
    # MAE whose loss is NaN after 60 % of the steps while a file "nan" is there, whose gradient is NaN in step 191 of
    # 288, the last one before a checkpoint, while a file "gradient" is there, and whose clock is a day behind, from
    # that moment on, while a file "clock" is there.
    progress = 0.0

    def before_step(self, progress):
        super().before_step(progress)
        self.progress = progress

    def forward(self, views, index=None):
        out = super().forward(views, index)
        if round(288 * self.progress) == 191 and (here / "gradient").exists():
            out["loss"] = Spoilt.apply(out["loss"])
        poison = self.progress > 0.6 and (here / "nan").exists()
        return {**out, "loss": out["loss"] * float("nan")} if poison else out


time.time = clock
RECIPES = {"demo": resolve("mae", data="./pictures").with_(method=__file__ + ":Hurt")}  # with the views of these
"""


@pytest.fixture
def hurt(out) -> str:
    """The name of a method that is MAE with faults."""
    out.with_name("hurt.py").write_text(HURT)
    return f"{out.with_name('hurt.py')}:Hurt"


@pytest.mark.parametrize("cause, term, bad, what", [
    ("nan", "loss", 1 + int(0.6 * TOTAL), "a loss that is NaN"),
    ("gradient", "grad_norm", 2 * BETWEEN - 1,
     "a gradient that is NaN while the loss is finite, in the last step before a checkpoint"),
], ids=["loss", "gradient"])
def test_something_is_nan(pictures, whole, out, hurt, cause, term, bad, what):
    cause, run = out.with_name(cause), Run(out)
    cause.touch()
    for _ in range(2):
        said = last_words(start(pictures, out, hurt))
        assert f"{term} is not finite at step {bad}; the batch is in nonfinite_step_{bad:08d}" in said
        assert run.status()["state"] == "failed" and run.latest()["step"] == bad // BETWEEN * BETWEEN
        assert all(value.isfinite().all() for value in run.latest()["method"].values())
    assert torch.load(next(out.glob("nonfinite*")), weights_only=True)["step"] == bad
    before = written(run)
    cause.unlink()
    trained(pictures, out, method=hurt)
    kept(before, run)
    same_run(whole, run)
    row(f"{what} (step {bad})", "the run fails and names step and term; the batch is kept, bad weights are not; "
        "without the cause the same command continues from the checkpoint before", 2)


def test_the_clock_goes_back(pictures, whole, out, hurt):
    began, run = time.time(), Run(out)
    child = start(pictures, out, hurt)
    at_step(child, out, BETWEEN + 20)
    out.with_name("clock").touch()
    at_step(child, out, 2 * BETWEEN + 20)
    kill(child)
    before = written(run)
    trained(pictures, out, method=hurt)
    kept(before, run)
    same_run(whole, run)
    assert run.status()["updated"] < began - 80000, "the clock did not go back"
    seconds = [row["seconds"] for row in run.history()]
    assert seconds == sorted(seconds) and seconds[0] > 0 and seconds[-1] <= run.status()["seconds"]
    assert run.status()["seconds"] < time.time() - began
    assert all(0 < row["images_per_s"] < 1e5 and 0 <= row["data_wait"] <= 1 for row in run.history())
    row("the clock goes back by a day (`time.time()` of the process), during the run and before the next start",
        "nothing depends on it: times are measured with one that only goes forward, checkpoints are ordered by step")


def test_the_log_ends_in_a_torn_line(pictures, whole, out):
    child, run = start(pictures, out), Run(out)
    at_step(child, out, BETWEEN + 20)
    kill(child)
    (out / "results.jsonl").write_text('{"protocol": "knn"}\n{"protocol": "lin')
    with (out / "log.jsonl").open("ab") as file:
        file.write(b'{"kind": "step", "step": 12\xff\x00\x00')
    before = written(run)
    assert before[1] and before[2] == [{"protocol": "knn"}]
    trained(pictures, out)
    append_jsonl(out / "results.jsonl", {"protocol": "linear"})
    kept(before, run)
    same_run(whole, run)
    assert [found["protocol"] for found in run.results()] == ["knn", "linear"]
    row("a torn last line, with bytes that are no text, in the log and in the results",
        "the line is left out, all others stay; the next row gets a line of its own")


def test_the_status_is_torn(pictures, whole, out):
    child, run = start(pictures, out), Run(out)
    at_step(child, out, BETWEEN + 20)
    kill(child)
    before = written(run)
    for state in ("killed", "done"):
        os.truncate(out / "status.json", (out / "status.json").stat().st_size // 2)
        assert run.status() == {}, state
        trained(pictures, out)
        kept(before, run)
        assert run.status()["state"] == "done" and run.status()["step"] == TOTAL
        same(whole.latest(), run.latest())
    row("a torn `status.json`, of a run that was killed and of one that was done",
        "checkpoints and log say where it was; forgotten is only which checkpoint was the best so far", 2)


def test_two_runs_on_one_directory(pictures, whole, out):
    run, rounds, refused = Run(out), 3, "is being trained by another process"
    for _ in range(rounds):
        pair = [start(pictures, out) for _ in range(2)]
        wait_for(lambda pair=pair: any("\nstep " in printed(child) for child in pair))
        loser, winner = sorted(pair, key=lambda child: "\nstep " in printed(child))
        winner.send_signal(signal.SIGSTOP)  # else it might be done before the other one asks
        assert refused in last_words(loser)
        kill(winner)
    winner = start(pictures, out)
    at_step(winner, out, 20)
    winner.send_signal(signal.SIGSTOP)
    before = written(run)
    assert f"{refused} (pid {winner.pid} on" in last_words(start(pictures, out))
    winner.send_signal(signal.SIGCONT)
    assert winner.wait(200) == 0
    kept(before, run)
    same_run(whole, run)
    row("two runs on one directory, started together, and a second one later",
        "one trains; the other is told at once which process does, and changes nothing", rounds + 1)


# ---------------------------------------------------------------- all at once, other images


def family(child) -> list[psutil.Process]:
    """It and every process that came of it."""
    return [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]


def stopped_at_its_step(child, out) -> int:
    """The step at which a command that was told to stop did so: it is saved, and no process is left."""
    assert child.wait(60) == 128 + signal.SIGTERM, printed(child)
    status = Run(out).status()
    assert status["state"] == "interrupted" and status["reason"] == "SIGTERM"
    assert Run(out).latest()["step"] == status["step"] and "and saved; the same command" in printed(child)
    return status["step"]


def test_sigterm_to_the_whole_group(pictures, whole, out):
    """As systemd, Slurm and `kill -TERM -PGID` do it: the processes that load images get it too."""
    run, before = Run(out), (-1, [], [])
    for step in (BETWEEN + 20, 2 * BETWEEN + 20):
        child = start(pictures, out, start_new_session=True)
        at_step(child, out, step)
        processes = family(child)
        assert len(processes) == 3
        os.killpg(child.pid, signal.SIGTERM)
        assert stopped_at_its_step(child, out) >= step
        assert not psutil.wait_procs(processes[1:], timeout=10)[1]
        kept(before, run)
        before = written(run)
    trained(pictures, out)
    kept(before, run)
    same_run(whole, run)
    row("SIGTERM to the whole group of processes, as from systemd or Slurm",
        "the trainer saves and stops as `interrupted`, then its loaders end; the same command goes on from this step",
        2)


def test_sigterm_to_every_process_of_several(pictures, out):
    how = {"epochs": 12, "processes": 2, "workers": 1}
    child, run = start(pictures, out, **how), Run(out)
    at_step(child, out, BETWEEN + 3)
    processes = family(child)
    for process in processes:
        process.terminate()
    assert stopped_at_its_step(child, out) > BETWEEN
    assert not psutil.wait_procs(processes[1:], timeout=10)[1]
    before = written(run)
    trained(pictures, out, **how)
    kept(before, run)
    assert run.status()["state"] == "done" and len(run.provenance()) == 2


def test_no_loader_outlives_a_killed_trainer(pictures, out):
    child = start(pictures, out)
    at_step(child, out, 5)
    _, *loaders = family(child)
    assert len(loaders) == 2
    kill(child)
    assert not psutil.wait_procs(loaders, timeout=30)[1]


def test_images_vanish_between_two_starts(pictures, whole, out):
    pictures, away = shutil.copytree(pictures, out.with_name("pictures")), out.with_name("away")
    child, run = start(pictures, out), Run(out)
    at_step(child, out, BETWEEN + 20)
    kill(child)
    before, total = written(run), run.status()["total"]
    away.mkdir()
    gone = sorted(pictures.rglob("*.png"))[::2]
    homes = [(path, path.rename(away / path.name)) for path in gone]
    for _ in range(2):
        said = last_words(start(pictures, out))
        assert re.search(r"InputError: .* had 99 images when .* began, and has 49 now: put back what was there", said)
        assert written(run) == before and run.status()["total"] == total
    for path, at in homes:
        at.rename(path)
    trained(pictures, out)
    kept(before, run)
    same_run(whole, run)
    row("half of the images vanish between two starts",
        "the command is refused and says how many there were; when they are back it continues", 2)
