"""Before any work: everything about a run is checked, and its directory is written."""

import contextlib
import hashlib
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import limits, methods
from .choice import resolve
from .data import Images, located, said
from .errors import InputError, unknown
from .files import expanded, read_jsonl, write_atomic
from .launch import can_compile, can_compute_in
from .nodes import began_with, contents, same_images
from .notebook import in_notebook
from .recipes import Recipe, method_numbers
from .run import Run
from .trial import try_out

TOLD = ("note", "published", "source", "sources")  # what a recipe only says: a better word makes no other run of it
# How a run is trained and where the user's own code lies, not which one it is: the latest call says it.
FREE = ("workers", "compile", "trackers", "files")
FEW = 5  # values of a recipe that make no other one of it, to a reader
_shown: dict[str, Recipe] = {}  # the last recipe of each method that this notebook has shown in full
LEAVING = 60  # seconds that processes which have been stopped get for their last step and checkpoint


def prepare(recipe: Recipe | str, data: str | Path | None = None, out: str | Path = "auto", *, processes: int = 1,
            precision: str = "auto", resume: bool = True, seed: int = 0, trackers: Sequence[str] = (),
            workers: int | str = "auto", compile: bool = False, held: contextlib.ExitStack | None = None) -> Run:
    """Check everything and write the run directory, without training: for launching `sslnb.train` yourself.

    Where there is no GPU, name `precision` "fp16" if there will be one: "auto" is what this machine can do.
    `held`: what keeps the run ours beyond this call, for a caller that goes on to train it.
    """
    if not (isinstance(out, os.PathLike) or isinstance(out, str) and out):
        raise InputError(f"out {out!r} is impossible: give the path of a folder, or leave it out.")
    if isinstance(recipe, str):
        recipe = resolve(recipe, data="auto" if data is None else data)
    elif data is not None:
        recipe = recipe.with_(data=said(data))
    for name, value in (("processes", processes), ("seed", seed), ("workers", workers), ("compile", compile),
                        ("resume", resume)):
        limits.check(name, value)
    if processes != recipe.gpus:
        recipe = recipe.on(processes)
    recipe = recipe.with_(precision=_precision(recipe, precision, trained_here=held is not None))
    _check_trackers(trackers)
    if recipe.chunk:
        _check_chunk(recipe, compile)
    if resume and (finished := _finished(recipe, out, seed)):
        return finished
    if compile and held is not None:  # trained here
        can_compile()
    images = recipe.load()
    asked = recipe  # in the caller's words; a run is opened from other folders too
    recipe = recipe.with_(data=located(recipe.data), weights=_weights(recipe.weights))
    if "images" in method_numbers(recipe.method):  # a method with a memory of every image
        recipe = recipe.with_(images=len(images), published=recipe.published)
    steps = recipe.steps_per_epoch(len(images))
    try_out(recipe, recipe.total_steps(steps))
    recipe.on(recipe.gpus, recipe.batch)  # refuses accumulation where it would change the method
    settings = {"recipe": recipe.to_json(), "seed": seed, "workers": workers, "compile": compile,
                "trackers": list(trackers),
                "files": {name: methods.located(said) for name, said in _in_files(recipe.to_json()).items()}}
    run = Run(out if out != "auto" else _default_out(settings))
    if recipe.weights and not (resume and run.checkpoints()):
        with torch.random.fork_rng(devices=[]):
            asked.begin(recipe.build())
    with contextlib.ExitStack() as ours:
        _claim(run, settings, images, recipe.total_steps(steps), resume, ours if held is None else held)
    print(_said(recipe, images))
    print(f"{'run':>12}  {run.path}, seed {seed}, {processes} process(es) on {_device_name()}")
    return run


def _said(recipe: Recipe, images: Images) -> str:
    """The recipe; in a notebook that has shown one of the same method only what is not as there: a cell that trains
    several runs would be pages of the same lines."""
    if isinstance(sys.stdout, io.StringIO) or not in_notebook():  # or nobody sees it
        return recipe.describe(len(images))
    if recipe.method in _shown and len(changed := recipe.beside(_shown[recipe.method])) <= FEW:
        return f"{recipe.method:>12}  as shown above" + f", but {', '.join(changed)}" * bool(changed)
    _shown[recipe.method] = recipe
    return recipe.describe(len(images))


def _precision(recipe: Recipe, precision: str, trained_here: bool) -> str:
    if precision == "auto":
        if torch.cuda.is_available() or recipe.precision != "fp16":
            return recipe.precision
        # Where a CPU computes in bf16, a ResNet-50's or ViT-S's step took 0.4 of the time; elsewhere it takes longer.
        cpu = getattr(torch.cpu, "get_capabilities", dict)()
        return "bf16" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else "fp32"
    if trained_here:
        can_compute_in(precision)
    return precision


def _check_chunk(recipe: Recipe, compile: bool) -> None:
    if not methods.get(recipe.method).chunks:
        raise InputError(f"{recipe.method} does not take chunk={recipe.chunk}; use a smaller batch, with accum where "
                         "the method allows it.")
    if compile:
        raise InputError(f"chunk={recipe.chunk} and compile=True exclude each other; leave one of them out.")


def _check_trackers(trackers: Sequence[str]) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if isinstance(trackers, str):
        raise InputError(f"trackers {trackers!r} is one name and must be a list: use [{trackers!r}].")
    for name in trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            unknown("tracker", name, LOGGER_TYPE_TO_CLASS)
        if name not in [str(t.value) for t in get_available_trackers()]:
            raise InputError(f"tracker {name!r} is not installed; pip install {name}.")


def _default_out(settings: dict) -> Path:
    """runs/byol-digits_scattered-… with a hash of recipe and seed: the same command finds the same directory."""
    r = {name: value for name, value in settings["recipe"].items() if name not in TOLD}
    r |= {"data": located(r["data"]), "weights": _weights(r["weights"])}
    r["numbers"] = {name: value for name, value in r["numbers"].items() if name != "images"}  # which the data decide
    defining = {**{name: value for name, value in settings.items() if name not in FREE}, "recipe": r}
    tag = hashlib.sha256(json.dumps(defining, sort_keys=True).encode()).hexdigest()[:6]
    name = f"{r['method'].rpartition(':')[2]}-{Path(r['data']).stem}-ep{r['epochs']}-seed{settings['seed']}-{tag}"
    return Path("runs") / name


def _finished(recipe: Recipe, out: str | Path, seed: int) -> Run | None:
    """The run that this call asks for, if it is done: nobody needs its images any more, which may be gone."""
    run = Run(out if out != "auto" else _default_out({"recipe": recipe.to_json(), "seed": seed}))
    if not os.path.isfile(run.path / "recipe.json") or run.status().get("state") != "done":
        return None  # isfile is False also for what cannot be a path; `_claim` says so
    if located(recipe.data) != located(run.recipe.data):
        return None  # `_claim` looks whether these are its images, which have moved
    if "images" in method_numbers(recipe.method):  # as many as there were
        recipe = recipe.with_(images=run.recipe.numbers.get("images"))
    _same(run, {"recipe": recipe.to_json(), "seed": seed})
    return run


def _claim(run: Run, settings: dict, images: Images, total: int, resume: bool, held: contextlib.ExitStack) -> None:
    """Make the run directory ours: new, the same run again, or the old one moved aside.

    `lock` is that of the process which trains. Several processes come up long after the call that starts them, and
    after a restart they come up again: of two such calls the one that has `launch.lock`, kept in `held`, trains.
    """
    try:
        if not resume:
            _move_aside(run)
        run.path.mkdir(parents=True, exist_ok=True)
        _take(held, run, "launch.lock")
        with contextlib.ExitStack() as ours:
            _take(ours, run, "lock")
            _write_settings(run, settings, images)
            same_images(run, images)
            run.write_status(total=total)
    except OSError as error:
        raise InputError(f"out {str(run.path)!r} cannot be written ({error.strerror}); choose another folder."
                         ) from None


def _move_aside(run: Run) -> None:
    """Make room for a new run; what is there is kept under another name. Only runs are moved, nothing else."""
    path = run.path
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not (path / "recipe.json").exists():
        raise InputError(f"{path} is not a run, so resume=False does not move it aside; choose another `out`.")
    if Path.cwd().is_relative_to(path.resolve()):
        raise InputError(f"resume=False cannot move {str(path)!r} aside, the folder that this process is in; choose "
                         "another `out`.")
    with contextlib.ExitStack() as ours:
        _take(ours, run, "launch.lock", "lock")
        aside = path.with_name(f"{path.name}-until-{time.strftime('%Y%m%d-%H%M%S')}")
        while aside.exists():  # twice in a second, or the clock was put back
            aside = aside.with_name(f"{aside.name}-again")
        path.rename(aside)
    print(f"The run that was in {path} is kept in {aside}.")


def _take(held: contextlib.ExitStack, run: Run, *names: str) -> None:
    """Take these locks. Who has one and trains is not waited for; who has stopped may still have to save."""
    deadline, told = time.monotonic() + LEAVING, False
    for name in names:
        while True:
            try:
                held.enter_context(run.lock(name))
                break
            except InputError:
                # "interrupted" is also what a run is whose caller was killed, while its processes are still there.
                if run.status().get("state") in (None, "running") or time.monotonic() > deadline:
                    raise
            if not told:
                print(f"Another process is just leaving {run.path}; waiting for it.", flush=True)
                told = True
            time.sleep(0.2)


def _write_settings(run: Run, settings: dict, images: Images) -> None:
    """recipe.json. Where a run has begun, only what does not define it is written anew, and where its images lie now;
    another run is refused."""
    if _begun(run):
        _same(run, settings, moved=began_with(run) == contents(images))
        recipe = {**run.settings["recipe"], "data": settings["recipe"]["data"]}
        free = () if run.status().get("state") == "done" else FREE  # a finished run says how it was trained
        settings = {**run.settings, **{name: settings[name] for name in free}, "recipe": recipe}
    write_atomic(run.path / "recipe.json", json.dumps(settings, indent=1))


def _weights(said: str) -> str:
    """The weights that a recipe begins with: a name of the zoo, else the whole path."""
    from .zoo import MODELS

    return said if not said or said in MODELS else os.path.abspath(expanded(said))


def _in_files(recipe: dict) -> dict[str, str]:
    """What of a recipe is a user's own, as `my_file.py:MyMethod`."""
    return {name: recipe[name] for name in ("method", "backbone") if ":" in recipe[name]}


def _begun(run: Run) -> bool:
    """Whether there is anything of a run to continue: not if its first call ended with an error, and before a step."""
    rows = read_jsonl(run.path / "log.jsonl")
    trained = run.checkpoints() or any(row["kind"] != "error" for row in rows) or run.status().get("state") == "done"
    return bool(trained) and (run.path / "recipe.json").exists()


def _same(run: Run, settings: dict, moved: bool = False) -> None:
    """Refuse to continue another run than the one that is there. `moved`: its images are here, wherever they lay."""
    old, now = run.settings, {**settings["recipe"], "data": located(settings["recipe"]["data"])}
    there = run.recipe.to_json()  # with the values of today for what a recipe of then did not have yet
    there["data"] = now["data"] if moved else located(there["data"])
    for recipe in (there, now):
        recipe["weights"] = _weights(recipe["weights"])
        recipe |= {name: methods.located(said) for name, said in _in_files(recipe).items()}
    changed = [f"{k}: {there[k]} there, {v} now" for k, v in now.items()
               if there[k] != v and k not in TOLD]
    changed += [f"seed: {old['seed']} there, {settings['seed']} now"] * (old["seed"] != settings["seed"])
    if changed:
        raise InputError(f"{run.path} holds another run ({'; '.join(changed[:3])}); choose another `out`, or "
                         "resume=False to move it aside.")


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
