"""pretrain(): the one loop, on Accelerate. In the kernel for one process, through torchrun for more, else the same.

    python -m torch.distributed.run --nproc_per_node 8 -m sslnb.train RUN_DIR      what pretrain(processes=8) starts
"""

import contextlib
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from . import launch, nodes, optim
from .batchnorm import sync_batchnorm
from .checks import prepare
from .chunks import in_chunks
from .errors import InputError
from .evaluate.collapse import output_std
from .monitor import FiniteWatch, Meter, Monitor
from .notebook import interactive
from .parts import sum_over_processes
from .reading import EpochSampler, ViewSet, image_loader, loader_workers, next_batch
from .recipes import Recipe
from .run import Run, code_changed, code_of
from .stop import Stop

LOOK = 5  # s between looks, on GPUs, at whether the run is to stop


def pretrain(recipe: Recipe | str, data: str | Path | None = None, out: str | Path = "auto", *, processes: int = 1,
             precision: str = "auto", resume: bool = True, seed: int = 0, trackers: Sequence[str] = (),
             workers: int | str = "auto", compile: bool = False) -> Run:
    """Train a recipe (or, by a method's name, that which `resolve` gives for `data`) into the run directory `out`.

    The same call again continues an interrupted run exactly, and returns a finished one without training;
    `resume=False` moves what is there aside and starts anew. `processes` keeps the recipe's total batch and goes
    through torchrun; 1 trains in this process. `precision` "auto" is the recipe's; on a CPU bf16 stands
    in for fp16 if it is fast there, else fp32. `trackers` are Accelerate's names. Errors: InputError before any work.
    """
    with contextlib.ExitStack() as held:
        run = prepare(recipe, data, out, processes=processes, precision=precision, resume=resume, seed=seed,
                      trackers=trackers, workers=workers, compile=compile, held=held)
        if run.status().get("state") == "done":
            print(f"{run.path} is finished already ({run.status()['total']} steps); its results are used.")
            if changed := [f"the file of {run.recipe.method}"] * code_changed(run) + [
                    f"the images of {run.recipe.data}"] * nodes.images_changed(run):
                print(f"But since then {' and '.join(changed)} changed: resume=False trains anew, another `out` keeps "
                      "both.")
        elif processes > 1:
            if 0 < torch.cuda.device_count() < processes:
                raise InputError(f"processes {processes} are more than the {torch.cuda.device_count()} GPU(s) here; "
                                 "use as many, or start the run on several machines with torchrun.")
            launch.torchrun(run, processes)
        else:
            train(run)
    return run


@launch.frees_memory
def train(run: Run) -> None:
    """Train the run directory to its end in this process (one of several under torchrun)."""
    rank = int(os.environ.get("RANK", 0))
    with contextlib.ExitStack() as stack:
        if rank == 0:
            stack.enter_context(run.lock())
            run.write_running()
        stop = stack.enter_context(Stop())
        try:
            trainer = Trainer(run)
            stack.callback(trainer.close)
            trainer.fit(stop)
        except (KeyboardInterrupt, SystemExit) as error:
            if rank == 0 and run.status().get("state") == "running":
                run.write_status(state="interrupted", reason=f"{type(error).__name__}: {error}")
            raise
        except Exception as error:
            error = launch.failed(run, error, rank)
            raise error


class Trainer:
    """One process of a run: model, optimizer, data and position. `fit` is the loop."""

    def __init__(self, run: Run):
        self.run, self.recipe, self.seed = run, run.recipe, run.seed
        settings, recipe = run.settings, run.recipe
        self.accelerator = launch.accelerator(recipe.precision, settings["trackers"], run.path)
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if world != recipe.gpus:
            raise InputError(f"{run.path} was prepared for {recipe.gpus} processes, but {world} were started; "
                             f"start {recipe.gpus}, or prepare it again with processes={world}.")
        self.images = nodes.load(recipe)
        nodes.same_images(run, self.images)
        self.cuda = self.device.type == "cuda"
        self.deterministic = torch.backends.cudnn.deterministic  # which a protocol may want
        self.threads = torch.get_num_threads()
        if not self.cuda:
            launch.limit_threads(world)

        torch.manual_seed(self.seed)  # before anything is built, and the same everywhere
        method = recipe.build()
        if recipe.weights and not run.checkpoints():
            said = recipe.begin(method)
            if self.main:
                print(said, flush=True)
        if method.sync_bn and world > 1:
            sync_batchnorm(method, self.cuda)
        if recipe.chunk:
            in_chunks(method, recipe.chunk)
        method.to(self.device, memory_format=torch.channels_last)
        self.method, self.parameters = method, list(method.parameters())
        self.optimizer = optim.build(method.param_groups(recipe), recipe)
        model = launch.compiled(method) if settings["compile"] else method
        if self.main and settings["compile"]:
            print("compiled in the first step, which may take minutes", flush=True)
        self.model, self.optimizer = self.accelerator.prepare(model, self.optimizer)
        self.model.train()
        torch.manual_seed(self.seed * 1009 + rank + 1)  # from here on (masks, dropout) processes must differ

        self.views = method.views(recipe.size)
        self.sampler = EpochSampler(len(self.images), recipe.batch, rank=rank, world=world, seed=self.seed)
        workers = loader_workers(settings["workers"], self.images, world)
        self.loader = image_loader(ViewSet(self.images, self.views), workers, batch_sampler=self.sampler,
                                   persistent_workers=workers > 0, pin_memory=self.cuda)
        self.per_epoch = recipe.steps_per_epoch(len(self.images))
        self.total, self.step = recipe.total_steps(self.per_epoch), 0
        # On a GPU looking at a value waits for the device, so losses are looked at once per interval.
        self.log_every = max(1, min(self.per_epoch, self.total // 100, 20))
        self.check_every = self.log_every if self.cuda else 1
        self.broken: set[int] = set()
        self.skipped = 0
        self.finite = FiniteWatch(self)
        self.monitor = Monitor(run, self.images, self.views, recipe, on=method.monitored)
        self._resume()
        nodes.check_step(run, self.step)

    # ------------------------------------------------------------ the loop

    def fit(self, stop: Stop) -> None:
        run, method = self.run, self.method
        start = time.monotonic() - run.status().get("seconds", 0.0)  # time.time() may go back
        if self.main:
            run.add_provenance(step=self.step, processes=self.accelerator.num_processes,
                               code=code_of(self.recipe.method), data=nodes.contents(self.images))
            run.write_status(step=self.step)
        if run.settings["trackers"]:
            self.accelerator.init_trackers("sslnb", config={
                name: value if isinstance(value, str | int | float) else str(value)
                for name, value in {"run": run.path.name, "seed": self.seed, **run.settings["recipe"]}.items()})
        method.before_train(run)
        if self.main and self.step == 0 and self.monitor.due(-1):
            self.monitor.look(method, 0)
        meter = Meter(self)
        self.look_at, self.looked = self.step + 1, (self.step, time.monotonic())
        for epoch in range(self.step // self.per_epoch, math.ceil(self.total / self.per_epoch)):
            method.before_epoch(run, epoch)
            self._seek(self.step)
            batches = iter(self.loader)
            for _ in range(self.step, min(self.total, (epoch + 1) * self.per_epoch)):
                terms = self._step(batches, meter)
                if self._logged(self.step):
                    meter.log(terms, start)
                if self.step % self.per_epoch == 0 or self.step == self.total:
                    self._end_of_epoch(epoch, start)
                # Last, so that a run that stops here has nothing left to do for this step when it comes back.
                if self.step >= self.look_at and self._told(stop):
                    self._leave(start, stop)
        self._finish(start)

    def _told(self, stop: Stop) -> bool:
        """Whether any process was told to stop. When several ask next they agree on too: on GPUs after some seconds,
        for asking waits for the device, but whoever stops us does not wait for long."""
        processes = self.accelerator.num_processes
        if processes == 1:
            return stop.asked
        (step, moment), self.looked = self.looked, (self.step, time.monotonic())
        ours = torch.tensor([float(stop.asked), self.looked[1] - moment], device=self.device)
        told, seconds = sum_over_processes(ours).tolist()
        soon = int(LOOK * processes * (self.step - step) / max(seconds, 1e-3))  # so many steps take so long
        self.look_at = self.step + (max(1, min(self.log_every, soon)) if self.cuda else 1)
        return told > 0

    def _logged(self, step: int) -> bool:
        """Whether the log has a row of this step: what only the log wants is computed for it alone."""
        return step % self.log_every == 0 or step == self.total

    def _seek(self, step: int) -> None:
        """The loader next starts at this optimizer step."""
        epoch, step = divmod(step, self.per_epoch)
        self.sampler.set_position(epoch, step * self.recipe.accum, self.method.order(self.seed, epoch))

    def _step(self, batches, meter: Meter) -> dict[str, Tensor]:
        """One optimizer step: `accum` micro-batches, then the update. Returns the step's scalars, on the device."""
        recipe, accum = self.recipe, self.recipe.accum
        lr = recipe.lr_at(self.step, self.per_epoch)
        optim.set_lr(self.optimizer, lr)
        sums: dict[str, Tensor] = {}
        for micro in range(accum):
            with meter.waiting():
                crops, index, seeds, broken = next_batch(batches)
                self.broken.update(broken[broken >= 0].tolist())
            crops = [x.to(self.device, non_blocking=True) for x in crops]
            views = [x.contiguous(memory_format=torch.channels_last) for x in self.views.photometric(crops, seeds)]
            together = contextlib.nullcontext() if micro == accum - 1 else self.accelerator.no_sync(self.model)
            with together:
                out = self.model(views, index.to(self.device, non_blocking=True))
                self.accelerator.backward(_part(out["loss"], accum))
            for name, value in out.items():
                if value.ndim == 0:
                    part = _part(value.detach(), accum)
                    sums[name] = sums[name] + part if name in sums else part
        progress = (self.step + 1) / self.total
        self.method.before_step(progress)
        self.accelerator.unscale_gradients()
        trained = [w for w in self.parameters if w.grad is not None]
        norm = get_total_norm([w.grad for w in trained])
        # fp16 skips a step whose gradients are not finite, which is no fault.
        self.finite.note(sums if self.accelerator.scaler else {**sums, "grad_norm": norm}, self.step)
        if (self.step + 1) % self.check_every == 0:
            self.finite.stop_if_bad()
        if recipe.clip:
            clip_grads_with_norm_(trained, recipe.clip, norm)
        sums["grad_norm"] = norm  # that before clipping
        if self._logged(self.step + 1):
            sums |= output_std(out)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if self.accelerator.optimizer_step_was_skipped:  # fp16 overflow: no update, so no EMA either
            self.skipped += 1
            self.finite.stop_if_hopeless()
        else:
            self.method.after_step(progress)
        return {**sums, "lr": torch.tensor(lr)}

    def _end_of_epoch(self, epoch: int, start: float) -> None:
        last = self.step == self.total
        self.finite.stop_if_bad(weights=True)  # before anything looks at the network or keeps it
        self.method.after_epoch(self.run, epoch)
        if self.main and self.monitor.due(epoch):
            row = self.monitor.look(self.method, self.step)
            self.accelerator.log({k: v for k, v in row.items() if isinstance(v, float)}, step=self.step)
        if last or (epoch + 1) % self._epochs_between_checkpoints() == 0:
            self.save(start)

    def _finish(self, start: float) -> None:
        from accelerate.utils import gather_object

        broken = sorted(set().union(*gather_object([self.broken])))
        if self.main:
            self.run.save_backbone(self.method.backbone)
            if broken:
                self.run.write_broken([self.images.where(i) for i in broken])
            self.run.write_status(state="done", step=self.step, seconds=time.monotonic() - start, broken=len(broken),
                                  skipped_steps=self.skipped)
        self.accelerator.wait_for_everyone()

    def _leave(self, start: float, stop: Stop) -> None:
        stop.saving = True
        self.save(start)
        stop.reason = stop.reason or "another process was told to stop"
        if self.main:
            self.run.write_status(state="interrupted", reason=stop.reason)
            again = "run this cell again to go on from" if interactive() else "the same command continues"
            print(f"Stopped at step {self.step} of {self.total} ({stop.reason}) and saved; {again} here.", flush=True)
        raise stop.exception()

    # ------------------------------------------------------------ save and resume

    def save(self, start: float) -> None:
        """A checkpoint at this step. A disk that is full stops the run and costs no earlier checkpoint."""
        from accelerate.utils import gather_object

        self.finite.stop_if_bad(weights=True)
        random_states, broken = zip(*gather_object([(launch.random_state(self.cuda), self.broken)]), strict=True)
        if not self.main:
            return
        scaler = self.accelerator.scaler
        state = {"step": self.step, "method": self.method.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "scaler": scaler.state_dict() if scaler else None, "random": list(random_states),
                 "skipped": self.skipped, "broken": sorted(set().union(*broken))}
        path = self.run.save_checkpoint(state)
        self.run.write_status(step=self.step, seconds=time.monotonic() - start, **self.monitor.best(path, self.step))

    def _resume(self) -> None:
        state = self.run.latest(say=print if self.main else lambda text: None)
        if state is None:
            if self.main:
                self._begin_anew()
            return
        self.step, self.skipped, self.broken = state["step"], state["skipped"], set(state["broken"])
        try:
            self.method.load_state_dict(state["method"])
        except RuntimeError as error:
            if not code_changed(self.run):
                raise
            raise InputError(f"The file of {self.recipe.method} has changed since, and its network is another one now "
                             f"({str(error).splitlines()[-1].strip()}): put the old one back, or begin anew with "
                             "resume=False or another `out`.") from None
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        launch.set_random_state(state["random"][self.accelerator.process_index])
        if self.main:
            self.run.rewind_log(self.step)
            self.run.append("event", step=self.step, text="resumed")
            print(f"Resuming {self.run.path} at step {self.step} of {self.total}.", flush=True)
            if code_changed(self.run):
                print(f"The file of {self.recipe.method} has changed since: it goes on with the new code.", flush=True)

    def _begin_anew(self) -> None:
        """There is no checkpoint. Where there must have been one, its log is kept under another name."""
        steps = [row["step"] for row in self.run.history()]
        if steps:
            said = f"{self.run.path} came to step {max(steps)}, but has no checkpoint: it begins anew."
            if max(steps) > self.per_epoch * self._epochs_between_checkpoints():
                said += f" Its log is kept in {self.run.keep_log().name}."
            print(said, flush=True)
        self.run.rewind_log(-1)

    def _epochs_between_checkpoints(self) -> int:
        return max(1, 100 // self.per_epoch)

    def close(self) -> None:
        self.accelerator.end_training()
        self.loader = None  # ends persistent workers
        torch.backends.cudnn.deterministic = self.deterministic
        torch.set_num_threads(self.threads)


def _part(value: Tensor, accum: int) -> Tensor:
    """What one of so many micro-batches adds to the step's mean."""
    return value / accum if accum > 1 else value


def main() -> None:
    """What torchrun starts in every process."""
    sys.stdout = launch.Unbreakable(sys.stdout)
    try:
        nodes.join()
        run = Run.open(sys.argv[1])
        nodes.exit_if_hopeless(run)
        train(run)
    except InputError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
