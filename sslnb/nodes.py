"""Several processes on one machine or many: they meet anew after every restart, and train only what is the same."""

import contextlib
import hashlib
import os
import platform
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist

from .data import Images
from .errors import InputError
from .launch import any_process
from .parts import world
from .recipes import Recipe
from .run import Run, alive, code_of, versions


def join() -> None:
    """Meet the other processes that torchrun started, before Accelerate does.

    On one machine torchrun's store outlives the processes: after a restart it still holds the addresses of the dead,
    and who reads them first fails again and again. Each attempt therefore gets keys of its own. On several machines
    each torchrun counts its own restarts, so there the store must be a new one each time.
    """
    env = os.environ
    if (caller := int(env.get("SSLNB_PARENT", 0))) and not alive(caller):
        print("The process that started the run is gone.", flush=True)
        sys.exit(0)  # torchrun, which starts its processes again after an error, ends too, and the lock is free
    if "TORCHELASTIC_RUN_ID" not in env:
        return
    env.setdefault("SSLNB_PARENT", str(os.getppid()))  # without torchrun nobody would end this process or restart it
    if env["WORLD_SIZE"] == "1":
        return
    attempt = env["TORCHELASTIC_RESTART_COUNT"]
    if env["GROUP_WORLD_SIZE"] != "1":
        if env["TORCHELASTIC_USE_AGENT_STORE"] == "True" and env["TORCHELASTIC_MAX_RESTARTS"] != "0":
            raise InputError("--max_restarts on several machines needs the variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE="
                             "1: set it on each of them, or leave --max_restarts out.")
        attempt = "of this store"
        with contextlib.suppress(OSError):
            env.setdefault("GLOO_SOCKET_IFNAME", _interface_to(env["MASTER_ADDR"]))
    store, rank, size = next(dist.rendezvous("env://"))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(env["LOCAL_RANK"]))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore(f"attempt {attempt}", store), rank=rank, world_size=size)


def exit_if_hopeless(run: Run) -> None:
    """torchrun starts processes again after any error: end them if this run's was one that would only come again.

    A new torchrun, which a user started, tries. The counts of several torchruns differ, hence process 0 decides.
    """
    status, device = run.status(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mine = (status.get("host"), status.get("pid")) == (platform.node(), int(os.environ.get("SSLNB_PARENT", 0)))
    if any_process(bool(status.get("final") and mine and world()[0] == 0), device):
        sys.exit(1)


def _interface_to(host: str) -> str:
    """The network interface that leads to `host`. gloo takes that of the machine's name, often the loopback."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)  # sends nothing
        mine = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if mine in [a.address for a in addresses]:
            return name
    raise OSError(f"no interface has the address {mine}")


def load(recipe: Recipe) -> Images:
    """The recipe's images, if all processes have the same and run the same code; else InputError in all of them."""
    if world()[1] == 1:
        return recipe.load()
    images = None
    try:
        images = recipe.load()
        have = {**versions(), "the code of sslnb": _code(), recipe.method: code_of(recipe.method),
                recipe.data: "{images} images, {digest}".format(**contents(images))}
    except InputError as error:
        have = {"error": str(error)}
    everyone = _everyone(have)
    for rank, node, other in everyone:
        if "error" in other:
            raise InputError(other["error"] if images is None else f"Process {rank} on {node}: {other['error']}")
    if different := _difference(everyone):
        raise InputError(f"{different}. All machines need the same packages, code and images.")
    return images


def contents(images: Images) -> dict[str, object]:
    """What a run remembers of its images: how many, and a checksum of pixels or file names, and of the classes."""
    return {"images": len(images), "digest": _digest(images)}


def began_with(run: Run) -> dict[str, object] | None:
    """The `contents` of the images that a run was last trained on, if that was written down."""
    starts = run.provenance()
    return starts[-1].get("data") if starts else None


def same_images(run: Run, images: Images) -> None:
    """InputError if the run has a checkpoint that was trained on other images: an epoch, the schedule and the number
    of each image would now be others, and nobody would notice. A run of before this was written down goes on."""
    began = began_with(run) if run.checkpoints() else None
    if not began or began == (now := contents(images)):
        return
    less = f"had {began['images']:,} images when {run.path} began, and has {now['images']:,} now"
    other = f"has as many images as when {run.path} began, but other ones"
    raise InputError(f"{run.recipe.data} {other if began['images'] == now['images'] else less}: put back what was "
                     "there, or begin anew with resume=False or another `out`.")


def images_changed(run: Run) -> bool:
    """Whether the images of a finished run are others than they were; False where they are gone, or nothing tells."""
    began = began_with(run)
    try:
        return bool(began) and began != contents(run.recipe.load())
    except InputError:
        return False


def check_step(run: Run, step: int) -> None:
    """RuntimeError in all processes if they found different checkpoints; a network's disk may be right a bit later."""
    if different := _difference(_everyone({"the step of its newest checkpoint": step})):
        raise RuntimeError(f"{different}. {run.path} must be the same folder on one disk for all machines.")


Facts = list[tuple[int, str, Mapping[str, object]]]  # rank, machine and what it has, of every process


def _everyone(mine: Mapping[str, object]) -> Facts:
    from accelerate.utils import gather_object

    return [(rank, *pair) for rank, pair in enumerate(gather_object([(platform.node(), dict(mine))]))]


def _difference(everyone: Facts) -> str:
    """The first value that a process does not share with process 0, in words; "" if there is none."""
    _, first, right = everyone[0]
    for rank, node, values in everyone:
        for key, value in values.items():
            if value != right[key]:
                return f"{key} is {value} for process {rank} on {node}, but {right[key]} for process 0 on {first}"
    return ""


def _code() -> str:
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def _digest(images: Images) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(images.items))
    if images.labels is not None:
        digest.update(images.labels.numpy())
    return digest.hexdigest()[:8]
