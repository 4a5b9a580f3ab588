"""Watching a run while it trains: speed and progress, the collapse panel, snapshots."""

import contextlib
import math
import random
import time
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from .errors import NonFinite
from .files import drafted
from .launch import any_process, uncompiled
from .notebook import Progress, clock
from .reading import next_batch
from .recipes import Recipe
from .run import Run
from .views import Views

if TYPE_CHECKING:
    from .train import Trainer

NORMS = ("grad_norm", "weight_norm")
LEAST_SCALE = 1e-4
LOOKS = 12  # about this many measurements per run
BANK, PAIRS, SHOWN = 1000, 256, 8  # images for kNN and rank, for alignment, for snapshots


class Monitor:
    """Measures the backbone on TRAINING images as training goes on: std, rank, alignment, uniformity, kNN.

    It uses no random state and changes no statistic, so a run with it is the run without it. The kNN is
    leave-one-out among training images: the test split is not looked at while training.
    """

    def __init__(self, run: Run, images, views: Views, recipe: Recipe, on: bool = True):
        """`on`: False for a method that nobody wants measured, `Method.monitored`."""
        self.run, self.recipe, self.views, self.images, self.on = run, recipe, views, images, on
        self.per_epoch = recipe.steps_per_epoch(len(images))
        self.epochs = math.ceil(recipe.total_steps(self.per_epoch) / self.per_epoch)  # a run may be counted in steps
        self.every = max(1, math.ceil(self.epochs / LOOKS))
        self.last: dict[str, Any] = {}
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        self.bank = images.subset(order[:BANK].sort().values)

    def due(self, epoch: int) -> bool:
        """After this epoch, -1 being before the first."""
        return self.on and ((epoch + 1) % self.every == 0 or epoch + 1 == self.epochs)

    @uncompiled()
    @torch.no_grad()
    def look(self, method, step: int) -> dict[str, Any]:
        """Measure, write a "monitor" row and a snapshot, and return the row."""
        from .backbones import features
        from .evaluate.collapse import panel
        from .evaluate.features import calibrated, extract
        from .evaluate.knn import weighted_knn

        r, device = self.recipe, next(method.parameters()).device
        backbone = method.backbone if step else calibrated(self._plain(method.backbone), self.bank, size=r.size)
        bank = extract(backbone, self.bank, size=r.size, pool=r.pool, device=device)
        training, random_state = method.training, torch.get_rng_state()
        method.eval(), backbone.eval()
        z1, z2 = (features(backbone, x.to(device), r.pool).float().cpu() for x in self._pair())
        row = {}
        if all(x.isfinite().all() for x in (bank.x, z1, z2)):
            row = {"step": step, "epoch": step / self.per_epoch, **panel(bank.x, z1, z2)}
            if bank.labels is not None and len(bank.x) > 40:
                row["knn"] = weighted_knn(bank.x, bank.labels, bank.x, bank.labels, k=20, exclude_self=True).top1
            self.run.append("monitor", **row)
        else:  # of weights that are finite: training goes on
            self.run.append("event", step=step, text="features are not finite, so nothing was measured")
        self._snapshot(method, device, step)
        method.train(training)
        torch.set_rng_state(random_state)
        self.last = row
        return row

    def _plain(self, backbone):
        """A copy for the look before the first step, when batch-norm statistics mean nothing yet and are estimated on
        the data. It has plain norms: those over all processes would wait for processes that are not looking."""
        from .backbones import build

        with torch.random.fork_rng(devices=[]):
            plain = build(self.recipe.backbone, self.recipe.size, **self.recipe.backbone_numbers)
        plain.load_state_dict(backbone.state_dict())
        return plain.to(next(backbone.parameters()).device)

    def best(self, checkpoint, step: int) -> dict[str, Any]:
        """For the status file: this checkpoint of `step`, if the look at that step was the best so far by kNN."""
        knn, old = self.last.get("knn"), self.run.status().get("best", {})
        gone = bool(old) and not (checkpoint.parent / old["checkpoint"]).exists()  # it was damaged
        if self.last.get("step") == step and knn is not None and (gone or knn > old.get("knn", -1)):
            return {"best": {"checkpoint": checkpoint.name, "knn": knn, "step": step}}
        return {"best": {}} if gone else {}

    def _pair(self) -> tuple[Tensor, Tensor]:
        """Two draws of the method's first view, the same images and draws every time."""
        first = Views(self.views.views[0])
        shown = self.bank.first(PAIRS)
        return first(shown, seed=1)[0], first(shown, seed=2)[0]

    def _snapshot(self, method, device, step: int) -> None:
        shown = self.bank.first(SHOWN)
        rng = random.Random(0)
        crops = [torch.stack(v) for v in zip(*(self.views.crop(image, rng) for image in shown), strict=True)]
        views = self.views.photometric(crops, torch.arange(len(shown)))
        tensors = method.snapshot([v.to(device) for v in views])
        if tensors:
            folder = self.run.path / "snapshots"
            folder.mkdir(exist_ok=True)
            with drafted(folder / f"step_{step:08d}.pt") as draft, draft.open("wb") as file:
                torch.save({k: v.cpu() for k, v in tensors.items()}, file)


class FiniteWatch:
    """Remembers the first step at which a term of the loss, the gradients or the weights were not finite, without
    waiting for the device."""

    def __init__(self, trainer: "Trainer"):
        self.t = trainer
        self.steps: dict[tuple[str, ...], Tensor] = {}  # terms -> first bad steps, or inf, on the device

    def note(self, terms: dict[str, Tensor], step: int) -> None:
        """All together, and by arithmetic: eight operations for each are more than many a layer has."""
        names, device = tuple(terms), terms.get("loss", next(iter(terms.values()))).device
        values = torch.stack([value.to(device, torch.float32) for value in terms.values()])
        bad = values.mul_(0).add_(torch.inf).nan_to_num_(nan=float(step), posinf=torch.inf)  # inf x 0 is NaN too
        self.steps[names] = torch.minimum(self.steps[names], bad) if names in self.steps else bad

    def first_bad(self) -> tuple[int, list[str]]:
        """(step, the terms that were bad at it), (-1, []) while all is well. This waits for the device."""
        steps = {name: step for names, found in self.steps.items()
                 for name, step in zip(names, found.tolist(), strict=True)}
        first = min(steps.values(), default=math.inf)
        if first == math.inf:
            return -1, []
        bad = [name for name, s in steps.items() if s == first]
        # A bad loss makes gradients bad, and they the weights: what came first is the cause.
        return int(first), [name for name in bad if name not in NORMS] or bad[:1]

    def stop_if_bad(self, weights: bool = False) -> None:
        """End the run at the first bad step, before an update (CPU) or a checkpoint (any device) can keep its harm.

        `weights`: look at them too, for finite gradients can make weights that are not. In a checkpoint those would
        end the run whenever it is continued.
        """
        t = self.t
        if weights:
            self.note({"weight_norm": torch.nn.utils.get_total_norm(list(t.method.parameters()))}, t.step - 1)
        step, bad = self.first_bad()
        if not any_process(bool(bad), t.device):
            return
        if not bad:
            raise NonFinite("The loss of another process is not finite; its file in the run directory says where.")
        self._end(step, bad, f"{', '.join(bad)} is not finite at step {step}")

    def stop_if_hopeless(self) -> None:
        """fp16 halves the factor of the loss in every step that it skips. Gradients that are not finite with a tiny one
        (the bound is fairseq's) are not too large for fp16: something else is wrong, and it would skip for ever."""
        t = self.t
        if (scale := t.accelerator.scaler.get_scale()) < LEAST_SCALE:
            step = t.step - 1
            self._end(step, ["grad_norm"], f"grad_norm is not finite at step {step}, though fp16 multiplies the loss "
                      f"by only {scale:.1g} after {t.skipped} skipped steps")

    def _end(self, step: int, bad: list[str], said: str) -> NoReturn:
        """Keep the batch of this step, and raise."""
        t = self.t
        path = t.run.path / f"nonfinite_step_{step:08d}_rank{t.accelerator.process_index}.pt"
        # The batch is gone by now, but it depends on seed, epoch and step alone: make it again.
        t._seek(step)
        batches = iter(t.loader)
        micro = [next_batch(batches) for _ in range(t.recipe.accum)]
        torch.save({"step": step, "terms": bad, "index": [index for _, index, _, _ in micro],
                    "views": [t.views.photometric(crops, seeds) for crops, _, seeds, _ in micro]}, path)
        raise NonFinite(f"{said}; the batch is in {path.name}. Try a lower lr, a longer warm-up, or bf16 instead of "
                        "fp16.")


class Meter:
    """Throughput, share of waiting for data, time left: one row in the log per interval, and progress lines."""

    def __init__(self, trainer: "Trainer"):
        self.t, self.progress = trainer, Progress()
        self.began, self.first, self.rows = time.monotonic(), trainer.step, 0
        self.waited = 0.0
        self.mark, self.mark_step, self.mark_waited = self.began, trainer.step, 0.0

    @contextlib.contextmanager
    def waiting(self):
        since = time.monotonic()
        yield
        self.waited += time.monotonic() - since

    def log(self, terms: dict[str, Tensor], start: float) -> None:
        t, now = self.t, time.monotonic()
        seconds, steps = max(1e-9, now - self.mark), t.step - self.mark_step
        values = {name: float(t.accelerator.reduce(v.to(t.device), reduction="mean")) for name, v in terms.items()}
        share = (self.waited - self.mark_waited) / seconds
        left = (now - self.began) / (t.step - self.first) * (t.total - t.step)
        self.mark, self.mark_step, self.mark_waited = now, t.step, self.waited
        self.rows += 1
        if self.rows == 1:  # compiling, and loaders that start, happen once
            self.began, self.first = now, t.step
        if not t.main:
            return
        speed, epoch = steps * t.recipe.total_batch / seconds, t.step / t.per_epoch
        t.run.append("step", step=t.step, epoch=epoch, **values, images_per_s=speed, data_wait=share,
                     seconds=now - start)
        t.accelerator.log(values, step=t.step)
        skipped = f", {t.skipped} steps skipped by fp16" if t.skipped else ""
        if self.progress(t.step / t.total, f"step {t.step}/{t.total}  epoch {epoch:.1f}  loss {values['loss']:.4f}  "
                         f"lr {values['lr']:.2g}  {speed:,.0f} images/s  waiting for data {share:.0%}  "
                         f"{clock(left)} left{skipped}"):
            t.run.write_status(step=t.step, seconds=now - start)
