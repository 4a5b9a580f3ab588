"""Recipe: every number of a run in one frozen object beside its method. Name and total batch are derived."""

import contextlib
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from . import limits
from .errors import InputError, unknown

PRECISIONS = ("fp32", "bf16", "fp16")
SAME_RESULT = {"data", "gpus", "batch", "accum", "chunk", "precision", "pool", "force_accum", "source", "sources",
               "published", "note"}  # what of a recipe may change without its published numbers becoming another's
NOT_TRAINED = {"numbers", "source", "sources", "published", "note"}  # changes nothing, or is told by itself
SHORT = {"resnet50": "r50", "vit_base_patch16_224": "vit_base", "vit_small_patch16_224": "vit_small"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run does. Lengths are in epochs; `batch` is per process; `lr` is the real learning rate, not a base.

    `chunk`: so many images of the batch go through the backbone at a time, twice, so that a big batch fits a small
    memory; its gradient stays what it is, but for batch norm in the backbone, which sees a chunk (sslnb/chunks.py); 0:
    all at once.

    The learning rate rises linearly from `warmup_from` (a share of lr); `milestones` are the epochs at which schedule
    "step" multiplies it by `gamma`; `lr_by_epoch` holds it still within an epoch after that; with `cosine_from_start`
    the cosine runs over all epochs, those of the warm-up included. With `steps` the run is that many optimizer steps
    long, whatever its epochs, and `milestones` and `warmup_steps` are steps, as papers on detection count.
    `fraction` keeps a part of every class of the training images (or those named in a file), see sslnb.load; of that
    `hold_out` takes a part away, which `load("held out")` gives: to choose something by instead of the test split.
    `weights` is what the backbone begins with instead of random numbers, to train it further or on images of another
    kind: a finished run's directory, a file of weights or a name of the zoo.
    `numbers` are keyword arguments of the method's constructor (its own numbers and those of its views).
    `source` says where the numbers come from (paper, official code, zoo, ours), `sources` names the exceptions.
    """

    method: str
    backbone: str
    size: int
    data: str
    epochs: int
    batch: int
    gpus: int = 1
    accum: int = 1
    chunk: int = 0
    optimizer: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 0.0
    sgd_momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: str = "cosine"
    steps: int = 0
    warmup_epochs: float = 0.0
    warmup_steps: int = 0
    warmup_from: float = 0.0
    min_lr: float = 0.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    lr_by_epoch: bool = False
    cosine_from_start: bool = False
    clip: float = 0.0
    precision: str = "fp32"
    pool: str = "model"
    fraction: float | str | None = None
    hold_out: float = 0.0
    weights: str = ""
    force_accum: bool = False
    numbers: Mapping[str, Any] = field(default_factory=dict)
    backbone_numbers: Mapping[str, Any] = field(default_factory=dict)
    source: str = "ours"
    sources: Mapping[str, str] = field(default_factory=dict)
    published: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self):
        for f in dataclasses.fields(self):
            limits.check(f.name, getattr(self, f.name))
        limits.check_ours(self.method, self.numbers)
        for name in ("numbers", "backbone_numbers", "sources", "published"):  # a frozen object must not change inside
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        if self.warmup_epochs >= self.epochs:
            # A short trial of a long recipe: keep the shape instead of training inside the warm-up only.
            object.__setattr__(self, "warmup_epochs", self.epochs / 10)
        if self.min_lr > self.lr > 0:
            raise InputError(f"min_lr {self.min_lr!r} is impossible: use a number of at most lr, {self.lr!r}.")
        from .backbones import POOLS
        from .optim import OPTIMIZERS, SCHEDULES

        for kind, value, known in (("precision", self.precision, PRECISIONS), ("optimizer", self.optimizer, OPTIMIZERS),
                                   ("schedule", self.schedule, SCHEDULES), ("pool", self.pool, POOLS)):
            if value not in known:
                unknown(kind, value, known)

    def load(self, split: str = "train"):
        """The images of a split; of "train" the recipe's fraction, without what "held out" has of it."""
        from . import data

        if split == "test" or split == "train" and not self.hold_out:
            return data.load(self.data, split, fraction=self.fraction if split == "train" else None)
        rest, held = data.parted(data.load(self.data, "train", fraction=self.fraction), self.hold_out)
        return rest if split == "train" else held

    # ------------------------------------------------------------ derived

    @property
    def total_batch(self) -> int:
        """Images per optimizer step: gpus x batch x accum."""
        return self.gpus * self.batch * self.accum

    @property
    def name(self) -> str:
        """In the zoo's grammar, e.g. r50_8xb64_accu8_cos_lr4_8_fp16_ep200."""
        accum = f"_accu{self.accum}" if self.accum > 1 else ""
        precision = "" if self.precision == "fp32" else f"_{self.precision}"
        schedule = {"cosine": "cos", "step": "step", "constant": "const"}[self.schedule]
        lr = f"{self.lr:g}".replace(".", "_")
        return (f"{SHORT.get(self.backbone, self.backbone)}_{self.gpus}xb{self.batch}{accum}_{schedule}_lr{lr}"
                f"{precision}_{f'st{self.steps}' if self.steps else f'ep{self.epochs}'}")

    def steps_per_epoch(self, images: int) -> int:
        """Optimizer steps; the last, incomplete batch of an epoch is dropped."""
        steps = images // (self.gpus * self.batch) // self.accum
        if steps < 1:
            raise InputError(f"The batch is larger than the data: {self.gpus} x {self.batch} x {self.accum} = "
                             f"{self.total_batch} images per step, but there are only {images}; choose a smaller one.")
        return steps

    def total_steps(self, per_epoch: int) -> int:
        """The length of the run in optimizer steps."""
        return self.steps or self.epochs * per_epoch

    def lr_at(self, step: int, per_epoch: int) -> float:
        """The learning rate of an optimizer step, with `per_epoch` steps per epoch."""
        from . import optim

        warmup = self.warmup_steps or round(self.warmup_epochs * per_epoch)
        if self.lr_by_epoch and step >= warmup:  # the official codes of MoCo and SimSiam set it once per epoch
            step = max(warmup, step - step % per_epoch)
        unit = 1 if self.steps else per_epoch
        return optim.lr_at(step, lr=self.lr, total=self.total_steps(per_epoch), min_lr=self.min_lr,
                           schedule=self.schedule, warmup=warmup,
                           warmup_from=self.warmup_from, milestones=tuple(m * unit for m in self.milestones),
                           gamma=self.gamma,
                           cosine_from_start=self.cosine_from_start)

    def source_of(self, name: str) -> str:
        return self.sources.get(name, self.source)

    # ------------------------------------------------------------ changed

    def with_(self, **changes: Any) -> "Recipe":
        """A copy with some values changed: fields by name, and numbers of the method by name.

        Milestones move with another length. Another `backbone` takes over those `backbone_numbers` that hold for it
        too. What was `published` for the recipe is not for one that learns otherwise.
        """
        fields = {f.name for f in dataclasses.fields(self)}
        own = {k: v for k, v in changes.items() if k in fields}
        numbers = {k: v for k, v in changes.items() if k not in fields}
        known = method_numbers(self.method) if numbers else {}
        for name, value in own.items():
            limits.check(name, value)
        for name in numbers:
            if name not in known:
                unknown(f"recipe value for {self.method}", name, [*fields, *known])
        if numbers:
            own["numbers"] = {**self.numbers, **own.get("numbers", {}), **numbers}
        if self.steps and "epochs" in own and own.get("steps", self.steps):
            raise InputError(f"epochs {own['epochs']!r} does not shorten this recipe, which is {self.steps:,} "
                             "optimizer steps long; give steps instead.")
        length = "steps" if self.steps else "epochs"
        if own.get("steps") and not self.steps:  # counted in steps from here on, in the same shape
            scale = own["steps"] / self.epochs
            own.setdefault("lr_by_epoch", False)  # of which there may be none
            if self.milestones:
                own.setdefault("milestones", tuple(round(m * scale) for m in self.milestones))
            if self.warmup_epochs and "warmup_epochs" not in own:
                own.setdefault("warmup_steps", round(self.warmup_epochs * scale))
        elif self.milestones and length in own:  # a longer or shorter schedule keeps its shape
            scale = own[length] / getattr(self, length)
            own.setdefault("milestones", tuple(round(m * scale) for m in self.milestones))
        if 0 < own.get("steps", 0) < self.warmup_steps:  # a short trial, as with epochs
            own.setdefault("warmup_steps", own["steps"] // 10)
        if own.get("warmup_epochs", 0) > own.get("epochs", self.epochs):
            raise InputError(f"warmup_epochs {own['warmup_epochs']!r} is longer than the run, which has "
                             f"{own.get('epochs', self.epochs)} epochs; use fewer, or train for longer.")
        if own.get("backbone", self.backbone) != self.backbone:
            from .backbones import carried_over

            own.setdefault("backbone_numbers", carried_over(self.backbone_numbers, self.backbone, own["backbone"]))
        other = dataclasses.replace(self, **own)
        if "published" not in own and (other.total_batch != self.total_batch or any(
                getattr(self, k) != v for k, v in own.items() if k not in SAME_RESULT)):
            other = dataclasses.replace(other, published={})
        return other

    def on(self, gpus: int, batch: int | None = None) -> "Recipe":
        """The same total batch on other hardware: accumulates where the method allows it, else grows `batch`.

        A row that accumulates although its method compares the images of a batch keeps how many those are.
        """
        from . import methods

        limits.check("gpus", gpus)
        if batch is not None:
            limits.check("batch", batch)
        method, total = methods.get(self.method), self.total_batch
        parts = self.accum if self.force_accum else 1  # batches whose images are compared
        free = method.accumulable or self.force_accum and parts == 1
        if batch is None:
            batch = min(self.batch, total // gpus) if free else total // parts // gpus
        accum = total / max(1, gpus * batch)
        if batch < 1 or accum != int(accum) or accum < 1:
            in_parts = f", {parts} x {total // parts}," * (parts > 1)
            raise InputError(f"A total batch of {total}{in_parts} cannot be split over {gpus} processes x {batch} "
                             "images; choose numbers that divide it.")
        if not free and accum != parts:
            chunk = ", with chunk=64 or so if its memory is too small," * method.chunks
            raise InputError(f"{self.method} must not accumulate: it looks at all images of one batch together, so "
                             f"{int(accum)} batches of {gpus * batch} are another method than {parts} of "
                             f"{total // parts}. Use batch={total // parts // gpus}{chunk} or more processes, or "
                             "force_accum=True if you mean it.")
        return self.with_(gpus=gpus, batch=batch, accum=int(accum))

    def in_batches(self, batch: int, gpus: int) -> "Recipe":
        """With `batch` images per process. A recipe for several GPUs, or that accumulates, keeps its total batch where
        the method may accumulate. Else the total is another one, and the note says what that means for lr.
        """
        if self.gpus * self.accum > 1:
            with contextlib.suppress(InputError):
                return self.on(gpus, batch)
        other = self.with_(gpus=gpus, batch=batch, accum=1)
        here, there = other.total_batch, self.total_batch
        if here == there or self.source_of("lr") == "you":
            return other
        note = (f"Your batch makes it {here} images per step, and lr {self.lr:g} was chosen for {there}: in proportion "
                f"it would be {self.lr * here / there:.3g}.")
        return other.with_(note=f"{note} {other.note}".strip())

    def build(self):
        """The method with a freshly initialised backbone, from torch's current random state."""
        from . import backbones, methods

        method = methods.get(self.method)
        limits.check_fit(self.method, method, self.numbers)
        return method(backbones.build(self.backbone, self.size, **self.backbone_numbers), **self.numbers)

    def begin(self, method) -> str:
        """Load `weights` into the backbone of a freshly built method, and into its copies, such as a slow one that
        follows it. Returns where every tensor went. Errors: InputError if they do not fill it exactly."""
        from . import zoo

        backbone, match = zoo.load(self.weights, self.backbone, self.size, **self.backbone_numbers)
        state = backbone.state_dict()
        for module in method.modules():
            if type(module) is type(method.backbone) and module.state_dict().keys() == state.keys():
                module.load_state_dict(state)
        return f"{self.weights}: {match}"

    # ------------------------------------------------------------ shown and stored

    def describe(self, images: int | None = None) -> str:
        """The resolved recipe as text: what will run, and where each number comes from."""
        warm = f"{self.warmup_steps} steps" if self.warmup_steps else f"{self.warmup_epochs:g} epochs"
        steps_down = f" (x {self.gamma:g} after {self.milestones})" * (self.schedule == "step")
        memory = f"betas {self.betas}" if self.optimizer in ("adamw", "lamb") else f"momentum {self.sgd_momentum:g}"
        rows = [("method", "method", self.method),
                ("backbone", "backbone", f"{self.backbone} at {self.size} px"
                 + "".join(f", {k} {v}" for k, v in self.backbone_numbers.items())), ("data", "data", self.data),
                *[("begins with", "weights", self.weights)] * bool(self.weights),
                ("total batch", "batch",
                 f"{self.gpus} x {self.batch} x {self.accum} = {self.total_batch} images per step"
                 + f", {self.chunk} at a time through the backbone, twice" * bool(self.chunk)),
                ("optimizer", "optimizer", f"{self.optimizer}, {memory}" + ", Nesterov" * self.nesterov),
                ("weight decay", "weight_decay", f"{self.weight_decay:g}"),
                ("lr", "lr", f"{self.lr:g}, {self.schedule}{steps_down}, warm-up {warm}"
                 + f", at least {self.min_lr:g}" * bool(self.min_lr)),
                *[("clip", "clip", f"gradients longer than {self.clip:g}")] * bool(self.clip)]
        length = f"{self.steps:,} steps" if self.steps else f"{self.epochs} epochs"
        if images:
            steps = self.steps_per_epoch(images)
            length += (f" = {self.steps / steps:.1f} epochs of {images:,} images" if self.steps else
                       f" x {steps} steps = {self.epochs * steps:,} steps on {images:,} images")
        rows += [("length", "epochs", length), ("precision", "precision", self.precision)]
        rows += [(k, k, v) for k, v in sorted(self.numbers.items())]
        lines = [f"{name:>12}  {value}   [{self.source_of(key)}]" for name, key, value in rows]
        usual = {k: v for k, v in method_numbers(self.method).items() if k not in self.numbers and v != ""}
        usual = textwrap.wrap(", ".join(f"{k}\0{v}" for k, v in usual.items()), 102)
        lines += [f"{'' if i else 'as usual':>12}  {line}".replace("\0", " ") for i, line in enumerate(usual)]
        lines += [f"{'published':>12}  {v} % ({k})" for k, v in self.published.items()]
        return "\n".join(lines + ([f"{'note':>12}  {self.note}"] if self.note else []))

    def beside(self, other: "Recipe") -> list[str]:
        """What of this recipe is not as in another one of its method, such as ["epochs 8", "temperature 5.0"]."""
        mine, theirs = ({**r.to_json(), **r.to_json()["numbers"]} for r in (self, other))
        usual = method_numbers(self.method)
        return [f"{name} {mine.get(name, usual.get(name))}" for name in {**mine, **theirs} if name not in NOT_TRAINED
                and mine.get(name, usual.get(name)) != theirs.get(name, usual.get(name))]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, read back by `from_json`."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.loads(json.dumps({k: dict(v) if isinstance(v, Mapping) else v for k, v in plain.items()}))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Recipe":
        def tupled(v):
            if isinstance(v, list):
                return tuple(map(tupled, v))
            return {k: tupled(x) for k, x in v.items()} if isinstance(v, dict) else v
        return cls(**{k: tupled(v) for k, v in values.items()})


def method_numbers(method: str) -> dict[str, Any]:
    """Keyword arguments of a method's constructor with their defaults."""
    from . import methods

    parameters = inspect.signature(methods.get(method).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
