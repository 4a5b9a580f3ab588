"""Starting several processes, and stopping them well."""

import contextlib
import functools
import os
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import InputError, NonFinite
from .files import FULL, os_error
from .parts import sum_over_processes
from .run import Run
from .stop import sigterm_raises

RESTARTS = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def frees_memory(function: Callable) -> Callable:
    """An interrupted training, or one without enough memory, lets go of its network and images. A notebook keeps the
    last traceback, and with it all that its frames held: the next run of the cell would begin with that much less."""
    @functools.wraps(function)
    def freeing(*args, **settings):
        try:
            return function(*args, **settings)
        except BaseException as error:
            memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
            if memory or isinstance(error, KeyboardInterrupt | SystemExit):
                cause = error
                while cause:
                    traceback.clear_frames(cause.__traceback__)
                    cause = cause.__context__
            raise
    return freeing


def compiled(method: nn.Module) -> nn.Module:
    """The method through torch.compile. Of transformers only the blocks, one by one: they are alike, and what is
    compiled for the first serves all (MAE with a ViT-B: a quarter of the time, and steps as fast)."""
    can_compile()  # a run may have been prepared elsewhere
    torch._dynamo.config.cache_size_limit = 64  # graphs for one block, not 8: width, windows and drop path differ
    blocks = [module for module in method.modules() if hasattr(module, "attn") or hasattr(module, "attend")]
    for block in blocks:
        block.compile()
    return method if blocks else torch.compile(method)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """For a look at a method in training: its blocks would be compiled anew, for other images and without gradients."""
    with torch.compiler.set_stance("force_eager"):
        yield


def any_process(flag: bool, device: torch.device) -> bool:
    """True where any process says True, so that all of them stop at the same step."""
    if not dist.is_initialized():
        return flag
    return bool(sum_over_processes(torch.tensor(float(flag), device=device)) > 0)


def cores() -> int:
    """Cores that this process may use: of those of a machine a batch job has often only some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_threads(processes: int) -> None:
    """Half of the CPU's cores for all processes here together, unless OMP_NUM_THREADS says otherwise.

    As many threads as cores wait for each other by spinning, and on a busy machine a step of 35 ms was measured to take
    7 s (2 cores, 2 threads), while one thread takes 50 ms come what may.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))  # other machines have cores of their own
        torch.set_num_threads(max(1, cores() // 2 // here))


def failed(run: Run, error: Exception, rank: int) -> Exception:
    """Write down what ended a run, and return it for raising, in words that name the remedy."""
    error = _explained(error, run)
    reason = f"{type(error).__name__}: {error}"
    with contextlib.suppress(OSError):  # a full disk does not take these words either
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        run.append("error", step=run.status().get("step", 0), process=rank, attempt=attempt, time=time.time(),
                   text=reason)
        if rank == 0:
            final = isinstance(error, NonFinite | InputError)
            again = "SSLNB_PARENT" in os.environ and not final  # torchrun below: it starts it anew or has the last word
            run.write_status(state="running" if again else "failed", reason=reason, final=final)
    return error


def _explained(error: Exception, run: Run) -> Exception:
    said = str(error)
    if "cannot be written" in said:  # a checkpoint, with the remedy
        return error
    if (system := os_error(error)) and system.errno in FULL:
        return RuntimeError(f"{run.path} cannot be written ({system}); what was saved is untouched. Free some space; "
                            "the same command continues.")
    if isinstance(error, dist.DistError) or "/gloo/" in said:
        return RuntimeError(f"Another process of this run is gone: it failed, as log.jsonl then says, or its machine "
                            f"did. The same command continues from the last checkpoint. ({said})")
    if "unable to allocate shared memory" in said or "Bus error" in said:
        return RuntimeError("Processes that load images hand them over in /dev/shm, which has no space left: give the "
                            "container more, as with docker run --shm-size 8g, or use workers=0. The same command "
                            "continues from the last checkpoint.")
    if said.startswith("DataLoader worker"):
        return RuntimeError(f"A process that loads images died ({said.strip(' .')}), often for want of memory: "
                            "fewer `workers` need less. The same command continues from the last checkpoint.")
    if said.startswith("Caught InputError"):  # in a process that loads images: its traceback comes first
        return InputError(said.strip().splitlines()[-1].removeprefix("sslnb.errors.InputError: "))
    return error


class Unbreakable:
    """Standard output that nobody may be reading any more: a caller that died must not take the checkpoint with it."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._stream.flush()


def torchrun(run: Run, processes: int) -> None:
    """Train in `processes` fresh processes through torchrun and follow them. Raises RuntimeError if the run fails.

    Fresh ones, because a kernel that has used CUDA or threads cannot be forked safely. Nothing here waits for a
    process that is gone: their output ends, and the status file says how far they came.
    """
    # All said, for torchrun reads PET_NNODES and the like, which a cluster may have set for something else.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--node_rank=0",
               f"--nproc_per_node={processes}", f"--max_restarts={RESTARTS}", "-m", "sslnb.train", str(run.path)]
    env = {**os.environ, "SSLNB_PARENT": str(os.getpid()), "MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1"}
    env.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # s to finish a step and save, where 30 are usual
    if not torch.cuda.is_available():
        env["ACCELERATE_USE_CPU"] = "1"  # without it each process believes that it is alone
        # More threads than cores would spin against each other.
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    run.write_running()
    old = run.history("error")
    with (run.path / "launch.log").open("a") as log, sigterm_raises():
        child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True,
                                 start_new_session=True)
        try:
            for line in child.stdout:
                print(line, end="", flush=True)
            code = child.wait()
        except BaseException as error:
            child.terminate()  # torchrun passes it on; the workers save and mark the run interrupted
            try:
                _print_rest(child)
            finally:
                if run.status().get("state") == "running":  # they died first, or had not begun
                    run.write_status(state="interrupted", reason=f"{type(error).__name__}: {error}".strip(": "))
            raise
    status = run.status()
    if code == 0 and status.get("state") == "done":
        return
    # When one process fails the others fail too, with a lost connection: the last start's first error is the cause.
    errors = [row for row in run.history("error") if row not in old]
    errors = [row for row in errors if row["attempt"] == max(r["attempt"] for r in errors)]
    reason = errors[0]["text"] if errors else status.get("reason") or f"the processes ended with code {code}"
    state = "interrupted" if status.get("state") == "interrupted" else "failed"
    run.write_status(state=state, reason=reason)
    raise RuntimeError(f"{run.path} ended at step {status.get('step', 0)} of {status.get('total')}: {reason}. Details "
                       f"are in {run.path / 'launch.log'}; the same command continues from the last checkpoint.")


def _print_rest(child: subprocess.Popen) -> None:
    """Wait for the child, and print what it still says: at which step it saved."""
    said = child.communicate()[0]
    with contextlib.suppress(OSError):  # of our own output that nobody reads any more
        print(said, end="", flush=True)


def can_compute_in(precision: str) -> None:
    """Raise InputError where this machine cannot train in a precision."""
    if precision == "fp16" and not torch.cuda.is_available():
        raise InputError("precision 'fp16' needs a GPU and there is none here; use 'bf16' or 'fp32', or a machine with "
                         "one.")


def can_compile() -> None:
    """Raise InputError where torch.compile has no compiler: it makes C++ for a CPU, and C that starts Triton's kernels
    for a GPU."""
    gpu = torch.cuda.is_available()
    variable = "CC" if gpu else "CXX"
    names = shlex.split(os.environ.get(variable, ""))[:1] or (
        ["gcc", "clang"] if gpu else [{"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")])
    if not any(map(shutil.which, names)):
        raise InputError(f"compile=True needs a compiler, and {' or '.join(names)} is not here; install it (Debian and "
                         f"Ubuntu: apt install g++), name another one in {variable}, or leave compile out.")


def accelerator(precision: str, trackers: Sequence[str], path: Path):
    """Accelerate for this process: precision, trackers, and DDP that leaves buffers alone."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    can_compute_in(precision)  # a run may have been prepared elsewhere
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true", "yes"):
            raise InputError(f"ACCELERATE_USE_{name} is set, and sslnb trains with DistributedDataParallel alone; "
                             "unset it, and start the run with `processes` or torchrun.")
    if AcceleratorState._shared_state and not dist.is_initialized():
        # A kernel trains several runs, and Accelerate would hold it to the precision of the first.
        AcceleratorState._reset_state()
    # DDP rearranges gradients after its first step, and a sum of four depends on their order: a resumed run would
    # differ in the last bit. Told that parameters may go unused it does not; on a CPU that is worth its small price.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=not torch.cuda.is_available())
    return Accelerator(mixed_precision={"fp32": "no"}.get(precision, precision), cpu=not torch.cuda.is_available(),
                       log_with=list(trackers) or None, project_dir=str(path), kwargs_handlers=[ddp],
                       gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1))  # the loop accumulates


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """What `accelerator` puts around the training step, for what runs beside it."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def random_state(cuda: bool) -> dict[str, Tensor]:
    """torch's generators: the only ones used after the start (views carry their own seeds)."""
    return {"cpu": torch.get_rng_state(), **({"cuda": torch.cuda.get_rng_state()} if cuda else {})}


def set_random_state(state: dict[str, Tensor]) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
