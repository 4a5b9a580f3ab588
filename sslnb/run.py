"""A run directory: the only meeting place between training, watching, evaluating and comparing.

    recipe.json          what runs: recipe, seed, precision …; the same command finds it and continues
    provenance.json      versions, git state, hardware, images, command of every start
    log.jsonl            one row per logged step, monitor or event
    status.json          running · interrupted · failed · done, with step, speed and reason
    checkpoints/         step_00000120-1f3c9a2b.pt: the name carries the checksum
    snapshots/           figures' tensors on fixed images as training went on
    backbone.safetensors the result, with timm's names
    results.jsonl        evaluations
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from . import methods
from .errors import InputError
from .files import (
    FULL,
    append_jsonl,
    checksum,
    expanded,
    os_error,
    read_jsonl,
    save_tensors,
    sync_folder,
    write_atomic,
)
from .recipes import Recipe

KEEP = 3  # newest checkpoints kept, besides the best


class Run:
    """A run directory that exists. `Run.open(path)` for reading; `pretrain` returns one."""

    def __init__(self, path: str | Path):
        self.path = expanded(path)

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        run = cls(path)
        if not (run.path / "recipe.json").is_file():
            raise InputError(f"{path} is not a run directory: it has no recipe.json. "
                             "Give the `out` of a pretrain call.")
        return run

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.status().get('state', 'new')})"

    # ------------------------------------------------------------ what was asked

    @property
    def settings(self) -> dict[str, Any]:
        """recipe.json: recipe, seed, workers, compile, trackers, and where the user's own files lie that it names."""
        return json.loads((self.path / "recipe.json").read_text())

    @property
    def recipe(self) -> Recipe:
        settings = self.settings
        said, found = settings["recipe"], {}
        for name, place in settings.get("files", {}).items():  # a run is opened from other folders too
            if methods.located(said[name]) != place and os.path.isfile(place.rpartition(":")[0]):
                found[name] = place
        return Recipe.from_json({**said, **found})

    @property
    def seed(self) -> int:
        return self.settings["seed"]

    # ------------------------------------------------------------ what happened

    def history(self, kind: str = "step") -> list[dict[str, Any]]:
        """Rows of log.jsonl of one kind ("step", "monitor", "event"), oldest first. A torn last line is left out."""
        return [row for row in read_jsonl(self.path / "log.jsonl") if row["kind"] == kind]

    def status(self) -> dict[str, Any]:
        """status.json, {} if it cannot be read. A run whose process died before it could say so is "interrupted"."""
        try:
            status = json.loads((self.path / "status.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}
        if status.get("state") == "running" and status.get("host") == platform.node() and not alive(status["pid"]):
            status |= {"state": "interrupted", "reason": f"process {status['pid']} is gone without a word (kill -9, "
                       "no memory, no power?); the same command continues"}
        silent = (time.time() - status.get("updated", time.time())) / 3600
        if status.get("state") == "running" and status.get("host") != platform.node() and silent > 1:
            status["reason"] = f"nothing was heard from {status.get('host')} for {silent:.0f} hours"
        return status

    def results(self) -> list[dict[str, Any]]:
        return read_jsonl(self.path / "results.jsonl")

    def provenance(self) -> list[dict[str, Any]]:
        path = self.path / "provenance.json"
        return json.loads(path.read_text()) if path.exists() else []

    def snapshots(self) -> list[tuple[int, dict[str, torch.Tensor]]]:
        """(step, tensors) in the order of training; [] for methods with nothing to look at."""
        files = sorted((self.path / "snapshots").glob("step_*.pt"))
        return [(int(f.stem.split("_")[1]), torch.load(f, weights_only=True)) for f in files]

    def summary(self) -> str:
        """A few lines for the end of a notebook: status, duration, versions, git state, hardware."""
        status, starts = self.status(), self.provenance()
        last = starts[-1] if starts else {}
        why = f" ({status['reason']})" if status.get("reason") else ""
        return "\n".join([
            f"run        {self.path}", f"status     {status.get('state')}{why} at step {status.get('step')} of "
            f"{status.get('total')}, {status.get('seconds', 0):.0f} s of training in {len(starts)} start(s)",
            f"recipe     {self.recipe.method}: {self.recipe.name} on {self.recipe.data}, seed {self.seed}",
            f"versions   {', '.join(f'{k} {v}' for k, v in last.get('versions', {}).items())}",
            f"git        {last.get('git')}", f"hardware   {last.get('hardware')}"])

    # ------------------------------------------------------------ what was learned

    def method(self) -> nn.Module:
        """The whole method as of the newest checkpoint (heads, decoder, target), in eval mode on the CPU."""
        newest = self.latest()
        if newest is None:
            done = self.status().get("state") == "done"
            raise InputError(f"{self.path} holds no readable checkpoint " + (
                "any more, only its backbone; with resume=False it is trained anew." if done else
                "yet; train it first."))
        method = self.recipe.build()
        method.load_state_dict(newest["method"])
        return method.eval()

    def backbone(self) -> nn.Module:
        """The trained backbone, in eval mode on the CPU: backbone.safetensors, or the newest checkpoint before that."""
        from safetensors.torch import load_file

        from .backbones import build

        if not (self.path / "backbone.safetensors").exists():
            return self.method().backbone
        backbone = build(self.recipe.backbone, self.recipe.size, **self.recipe.backbone_numbers)
        backbone.load_state_dict(load_file(self.path / "backbone.safetensors"))
        return backbone.eval()

    # ------------------------------------------------------------ checkpoints

    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted((self.path / "checkpoints").glob("step_*.pt"))

    def latest(self, say=print) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, or None. Damaged ones are passed over, saying so."""
        for path in reversed(self.checkpoints()):
            if checksum(path) == path.stem.split("-")[1]:
                return torch.load(path, map_location="cpu", weights_only=True)
            say(f"{path.name} is damaged (its checksum does not match); falling back to the one before.")
        return None

    def progress(self) -> dict[str, int]:
        """Of a run that is not done: the `step` of its newest checkpoint, whose weights `backbone` has, of `total`."""
        status, checkpoints = self.status(), self.checkpoints()
        if status.get("state") == "done" or not checkpoints:
            return {}
        return {"step": int(checkpoints[-1].stem.split("-")[0].split("_")[1]), "total": status.get("total", 0)}

    def save_checkpoint(self, state: dict[str, Any]) -> Path:
        """Write one checkpoint atomically, then drop old ones: a full disk costs the new one only.

        Errors: RuntimeError if it cannot be written; every earlier checkpoint is still there.
        """
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        for left in folder.glob(".step_*.draft"):  # of a process that was killed while it wrote
            left.unlink()
        draft = folder / f".step_{state['step']:08d}.draft"
        try:
            with draft.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            final = folder / f"step_{state['step']:08d}-{checksum(draft)}.pt"
            draft.replace(final)
        except (OSError, RuntimeError) as error:
            system = os_error(error)
            if not system and str(error).startswith("DataLoader worker"):  # torch says so wherever we are just then
                raise
            remedy = "Free some space; the" if system and system.errno in FULL else "The"
            raise RuntimeError(f"The checkpoint of step {state['step']} cannot be written to {self.path} "
                               f"({system or error}); earlier ones are untouched. {remedy} same command continues."
                               ) from error
        finally:
            draft.unlink(missing_ok=True)
        sync_folder(folder)
        best = self.status().get("best", {}).get("checkpoint")
        for old in self.checkpoints():  # one that claims to be of this step or a later one was damaged and passed over
            if old != final and old.name[:13] >= final.name[:13]:
                old.unlink()
        for old in self.checkpoints()[:-KEEP]:
            if old.name != best:
                old.unlink()
        return final

    # ------------------------------------------------------------ writing

    def save_backbone(self, backbone: nn.Module) -> None:
        save_tensors(self.path / "backbone.safetensors", backbone.state_dict())

    def export(self, folder: str | Path | None = None, **settings: Any) -> Path:
        """The finished backbone as a folder for timm, the hub and OpenMMLab, with a model card; see zoo.export."""
        from .zoo.export import export

        return export(self, folder, **settings)

    def write_broken(self, names: list[str]) -> None:
        """Broken images, by name: a list in a file, and a line that counts them."""
        write_atomic(self.path / "broken.txt", "\n".join(names) + "\n")
        said = f"{len(names)} broken image(s) were skipped, listed in broken.txt: {', '.join(names[:5])}"
        code = getattr(sys.stdout, "encoding", None) or "utf-8"  # a name may have what nobody can print
        print(said.encode(code, "backslashreplace").decode(code))

    def write_running(self) -> None:
        """Under the process that started it all: while that is there, dead workers come back."""
        self.write_status(state="running", pid=int(os.environ.get("SSLNB_PARENT", os.getpid())), host=platform.node(),
                          reason="", final=False)

    def write_status(self, **values: Any) -> None:
        write_atomic(self.path / "status.json", json.dumps({**self.status(), **values, "updated": time.time()}))

    def append(self, kind: str, **values: Any) -> None:
        append_jsonl(self.path / "log.jsonl", {"kind": kind, **values})

    def rewind_log(self, step: int) -> None:
        """Forget rows after `step`: a resumed run writes them again."""
        rows = [row for row in read_jsonl(self.path / "log.jsonl") if row.get("step", 0) <= step]
        write_atomic(self.path / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def keep_log(self) -> Path:
        """Put the log aside under another name, where it stays."""
        aside = self.path / f"log-until-{time.strftime('%Y%m%d-%H%M%S')}.jsonl"
        return (self.path / "log.jsonl").rename(aside)

    def add_provenance(self, **values: Any) -> None:
        write_atomic(self.path / "provenance.json", json.dumps([*self.provenance(), {**environment(), **values}]))

    @contextlib.contextmanager
    def lock(self, name: str = "lock") -> Iterator[None]:
        """One trainer at a time. The lock is the kernel's: it ends with the process, however that dies."""
        import fcntl

        with (self.path / name).open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise InputError(f"{self.path} is being trained by another process ({file.read().strip()}); wait for "
                                 "it, watch it with Run.open, or choose another `out`.") from None
            except OSError as error:  # Lustre and others, as a cluster may have mounted them
                print(f"The disk of {self.path} has no locks ({error.strerror}): do not train it twice at a time.")
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {platform.node()}")
            file.flush()
            os.register_at_fork(after_in_child=file.close)  # else loader processes hold it after a killed trainer
            yield


def alive(pid: int) -> bool:
    """False also for a zombie: dead, but nobody has asked for its exit code."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def versions() -> dict[str, str]:
    """Of Python, this package and those that can change a result."""
    from importlib.metadata import version

    packages = ("sslnb", "torch", "torchvision", "timm", "accelerate", "numpy", "pillow")
    return {"python": platform.python_version(), **{p: version(p) for p in packages}}


def environment() -> dict[str, Any]:
    """Versions, git state and hardware of this process."""
    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True)
        except OSError:  # it is not installed here
            return ""
        return done.stdout.strip()

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    commit, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain")
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S"), "command": sys.argv,
        "versions": versions(),
        "git": (commit + " with local changes" * bool(changed)) if commit else "not a checkout",
        "hardware": f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads" + (f", {gpus}" if gpus else ""),
    }


def code_changed(run: Run) -> bool:
    """Whether the file of the run's method is another than when it was started last; False where nothing says so."""
    starts = run.provenance()
    return bool(starts) and starts[-1].get("code") not in (None, code_of(run.recipe.method))


def code_of(method: str) -> str:
    """A checksum of the file that a method stands in: what was measured with another one is stale."""
    return checksum(Path(sys.modules[methods.get(method).__module__].__file__))
