"""Before any work: everything about a run is checked, and its directory is written."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from . import methods
from .errors import InputError, unknown
from .files import write_atomic
from .recipes import Recipe, method_numbers, resolve
from .run import Run


def prepare(recipe: Recipe | str, data: str | Path | None = None, out: str | Path = "auto", *, processes: int = 1,
            precision: str = "auto", resume: bool = True, seed: int = 0, trackers: Sequence[str] = (),
            workers: int | str = "auto", compile: bool = False) -> Run:
    """Check everything and write the run directory, without training: for launching `sslnb.train` yourself."""
    if isinstance(recipe, str):
        recipe = resolve(recipe)
    if data is not None:
        recipe = recipe.with_(data=str(data))
    if not isinstance(processes, int) or processes < 1:
        raise InputError(f"processes {processes!r} is impossible: use a whole number of at least 1.")
    if processes != recipe.gpus:
        recipe = recipe.on(processes)
    recipe = recipe.with_(precision=_precision(recipe, precision))
    _check_trackers(trackers)
    if recipe.chunk:
        _check_chunk(recipe, compile)
    images = recipe.load()
    if "images" in method_numbers(recipe.method):  # a method with a memory of every image
        recipe = recipe.with_(images=len(images))
    steps = recipe.steps_per_epoch(len(images))
    with torch.device("meta"):  # shapes and numbers are checked without memory or time
        recipe.build()
    recipe.on(recipe.gpus, recipe.batch)  # refuses accumulation where it would change the method
    settings = {"recipe": recipe.to_json(), "seed": seed, "workers": workers, "compile": compile,
                "trackers": list(trackers)}
    run = Run(out if out != "auto" else _default_out(settings))
    _claim(run, settings, recipe.total_steps(steps), resume)
    print(recipe.describe(len(images)) + f"\n{'run':>12}  {run.path}, seed {seed}, "
          f"{processes} process(es) on {_device_name()}")
    return run


def _precision(recipe: Recipe, precision: str) -> str:
    if precision == "auto":
        if torch.cuda.is_available() or recipe.precision != "fp16":
            return recipe.precision
        # Where a CPU computes in bf16, a ResNet-50's or ViT-S's step took 0.4 of the time; elsewhere it takes longer.
        cpu = getattr(torch.cpu, "get_capabilities", dict)()
        return "bf16" if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else "fp32"
    if precision == "fp16" and not torch.cuda.is_available():
        raise InputError("precision 'fp16' needs a GPU and there is none here; use 'bf16' or 'fp32'.")
    return precision


def _check_chunk(recipe: Recipe, compile: bool) -> None:
    if not methods.get(recipe.method).chunks:
        raise InputError(f"{recipe.method} does not take chunk={recipe.chunk}; use a smaller batch, with accum where "
                         "the method allows it.")
    if compile:
        raise InputError(f"chunk={recipe.chunk} and compile=True exclude each other; leave one of them out.")


def _check_trackers(trackers: Sequence[str]) -> None:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    for name in trackers:
        if name not in LOGGER_TYPE_TO_CLASS:
            unknown("tracker", name, LOGGER_TYPE_TO_CLASS)
        if name not in [str(t.value) for t in get_available_trackers()]:
            raise InputError(f"tracker {name!r} is not installed; pip install {name}.")


def _default_out(settings: dict) -> Path:
    """runs/byol-digits_scattered-… with a hash of all settings: the same command finds the same directory."""
    r = settings["recipe"]
    tag = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
    name = f"{r['method'].rpartition(':')[2]}-{Path(r['data']).stem}-ep{r['epochs']}-seed{settings['seed']}-{tag}"
    return Path("runs") / name


def _claim(run: Run, settings: dict, total: int, resume: bool) -> None:
    """Make the run directory ours: new, the same run again, or the old one moved aside."""
    if run.path.exists() and not resume:
        with run.lock():
            aside = run.path.with_name(f"{run.path.name}-until-{time.strftime('%Y%m%d-%H%M%S')}")
        while aside.exists():  # twice in a second, or the clock was put back
            aside = aside.with_name(f"{aside.name}-again")
        run.path.rename(aside)
        print(f"The run that was in {run.path} is kept in {aside}.")
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        with run.lock():  # of two that start together one writes
            if not (run.path / "recipe.json").exists():
                write_atomic(run.path / "recipe.json", json.dumps(settings, indent=1))
            _same(run, settings)
            run.write_status(total=total)
    except OSError as error:
        raise InputError(f"out {str(run.path)!r} cannot be written ({error.strerror}); choose another folder."
                         ) from None


def _same(run: Run, settings: dict) -> None:
    """Refuse to continue another run than the one that is there."""
    old = run.settings
    there = run.recipe.to_json()  # with the values of today for what a recipe of then did not have yet
    changed = [f"{k}: {there[k]} there, {v} now" for k, v in settings["recipe"].items()
               if there[k] != v and k not in ("note", "published", "source", "sources")]
    changed += [f"seed: {old['seed']} there, {settings['seed']} now"] * (old["seed"] != settings["seed"])
    if changed:
        raise InputError(f"{run.path} holds another run ({'; '.join(changed[:3])}); choose another `out`, or "
                         "resume=False to move it aside.")


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
