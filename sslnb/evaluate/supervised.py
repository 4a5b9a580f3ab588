"""A backbone and a linear classifier, trained on labels by the loop of train.py: what probes and fine-tuning share.

    row = train_protocol("runs/simclr", LINEAR["linear, MoCo protocol"], data="imagenet", processes=8)

It is a Method like any other, so a protocol runs on many GPUs, in 16 bits, resumes exactly and writes a run directory.
Labels are looked up by the number of the image; the contract hands over nothing else.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones import features
from ..errors import InputError
from ..methods.base import Method
from ..parts import full_precision, sum_over_processes, world
from ..reading import ViewSet, loader_workers
from ..recipes import Recipe
from ..run import Run, append_jsonl, checksum
from ..train import pretrain
from ..views import CenterCrop, HorizontalFlip, Normalize, RandomResizedCrop, Resize, View, Views
from .pixels import MARGIN, MARGIN_FROM

RECIPES: dict[str, Recipe] = {}  # its recipes are the protocols', in the files beside this one


class Supervised(Method):
    accumulable = True  # the loss of an image does not depend on its batch; batch norm, where it learns, does

    def __init__(self, backbone: nn.Module, *, classes: int = 1000, start: str = "", pool: str = "model",
                 frozen: bool = True, head_std: float = 0.01, head_lr: float = 1.0, adapt_vectors: bool = False,
                 resize: float = MARGIN, interpolation: str = "bilinear", crop: tuple[float, float] = (0.08, 1.0),
                 flip: float = 0.5, test_every: int = 1):
        """`start`: safetensors of the backbone to begin with; `head_lr` times the learning rate is that of the head;
        `adapt_vectors`: LARS adapts biases too; `resize`: short side of test images, in crops."""
        super().__init__()
        self.backbone, self.frozen, self.pool, self.start = backbone, frozen, pool, start
        self.head = nn.Linear(backbone.num_features, classes)
        nn.init.normal_(self.head.weight, std=head_std)
        nn.init.zeros_(self.head.bias)
        backbone.requires_grad_(not frozen)
        self.head_lr, self.adapt_vectors = head_lr, adapt_vectors
        self.resize, self.interpolation, self.crop, self.flip = resize, interpolation, crop, flip
        self.test_every = test_every
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))  # a resumed run must not begin again
        self.labels: Tensor | None = None

    def train(self, mode: bool = True) -> "Supervised":
        """A frozen backbone stays in eval mode: its batch-norm statistics must not move."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def views(self, size: int) -> Views:
        return Views(View(RandomResizedCrop(size, self.crop, interpolation=self.interpolation),
                          HorizontalFlip(self.flip), Normalize()))

    def test_view(self, size: int) -> Views:
        short = round(size * self.resize) if size >= MARGIN_FROM else size  # small images have no margin to lose
        return Views(View(Resize(short, self.interpolation), CenterCrop(size), Normalize()))

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> dict[str, Tensor]:
        (x,) = views
        index = torch.arange(len(x)) if index is None else index.cpu()
        labels = (self.labels[index] if self.labels is not None else index % self.head.out_features).to(x.device)
        logits = self.logits(x)
        return {"loss": self.loss(logits, labels), "accuracy": (logits.argmax(1) == labels).float().mean()}

    def logits(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            h = features(self.backbone, x, self.pool)
        return self.classify(h)

    @full_precision
    def classify(self, h: Tensor) -> Tensor:
        """In float32: a learning rate of 30 leaves no room for 16 bits."""
        return self.head(h)

    @full_precision
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    def param_groups(self, recipe) -> list[dict]:
        head = {"params": list(self.head.parameters()), "weight_decay": recipe.weight_decay, "lr_scale": self.head_lr}
        if self.adapt_vectors:
            head["adapt_vectors"] = True
        if self.frozen:
            return [head]
        return [{"params": list(self.backbone.parameters()), "weight_decay": recipe.weight_decay}, head]

    # ------------------------------------------------------------ hooks

    def before_train(self, run: Run) -> None:
        self.labels = labels_of(run.recipe.load(), self.head.out_features)
        if self.started:
            return
        if self.start:
            from safetensors.torch import load_file

            self.backbone.load_state_dict(load_file(self.start))
        self.started.fill_(True)

    def after_epoch(self, run: Run, epoch: int) -> None:
        """Every process tests its share of the test images; the log gets the sum."""
        if (epoch + 1) % self.test_every and epoch + 1 < run.recipe.epochs:
            return
        correct, correct5, n = self.test(run).tolist()
        if world()[0] == 0:
            run.append("test", step=run.status().get("step", 0), epoch=epoch + 1, top1=100 * correct / n,
                       top5=100 * correct5 / n, correct=int(correct), n=int(n))

    @torch.no_grad()
    def test(self, run: Run) -> Tensor:
        """-> images right at once, right among five, and all, over all processes (3,). Broken images do not count."""
        images, (rank, size) = run.recipe.load("test"), world()
        labels, view = labels_of(images, self.head.out_features), self.test_view(run.recipe.size)
        mine = [(i, 0) for i in range(rank, len(images), size)]
        loader = torch.utils.data.DataLoader(
            ViewSet(images, view.crop), batch_size=run.recipe.batch, sampler=mine, generator=torch.Generator(),
            num_workers=loader_workers(run.settings["workers"], images, size))
        device, training = next(self.parameters()).device, self.training
        self.eval()
        found = torch.zeros(3, dtype=torch.float64)
        for (crops,), index, seeds, broken in loader:
            (x,) = view.photometric([crops.to(device)], seeds)
            with torch.autocast(device.type, torch.bfloat16 if run.recipe.precision == "bf16" else torch.float16,
                                enabled=run.recipe.precision != "fp32"):
                best = self.logits(x).topk(min(5, self.head.out_features), 1).indices.cpu()
            right = (best == labels[index][:, None])[broken < 0]
            found += torch.tensor([right[:, 0].sum(), right.any(1).sum(), len(right)])
        self.train(training)
        return sum_over_processes(found.to(device if device.type != "mps" else "cpu"))


def labels_of(images, classes: int) -> Tensor:
    """(N,) labels from 0. Errors: InputError if there are none, or more classes than the head has."""
    if images.labels is None or (torch.as_tensor(images.labels) < 0).any():
        raise InputError(f"{images.name} has no labels for every image, and this protocol trains on labels; give a "
                         "folder of class folders or a list file with labels.")
    labels = torch.as_tensor(images.labels)
    if int(labels.max()) >= classes:
        raise InputError(f"{images.name} ({images.split}) has a class {int(labels.max())}, but the classifier has "
                         f"{classes} classes from 0: train and test must have the same classes.")
    return labels


def train_protocol(source, protocol: str, recipe: Recipe, data: str | Path | None = None, out: str | Path = "auto", *,
                   size: int | None = None, processes: int = 1, precision: str = "auto", seed: int = 0,
                   workers: int | str = "auto", resume: bool = True, **changes: Any) -> dict:
    """Train `recipe`, a protocol's, from the backbone of `source` and return its row, which is written down too.

    `source`: a Run, the path of a run directory, or a timm name (weights drawn from `seed`). `size`: of the crops, if
    not the protocol's, or the run's where that was trained at another size. `changes` (epochs, batch, lr …) make
    another protocol of it, and the row says so. The row goes to results.jsonl of the source and of the protocol's run.
    Errors: InputError before any work.
    """
    from . import Outcome, _row
    from .sources import Subject, open_source

    source = open_source(source, seed)
    size = size or (source.size if source.folder else recipe.size) or recipe.size
    recipe = recipe.with_(backbone=source.architecture, backbone_numbers=dict(source.numbers), size=size,
                          data=str(data or source.data or recipe.data), pool=source.pool)
    classes = len(recipe.load().classes)
    for split in ("train", "test"):
        labels_of(recipe.load(split), classes)
    # The recipe's own `pool` is for the monitor, the one among the numbers for the classifier.
    recipe = recipe.with_(numbers={**recipe.numbers, "classes": classes, "pool": source.pool}, **changes)
    backbone = source.backbone(size)
    start = _save_start(backbone, source.folder or Path("runs"))
    print(f"{len(backbone.state_dict())} tensors of {recipe.backbone} come from {source.name}; the classifier is new.")
    run = pretrain(recipe.with_(start=str(start)), out=out, processes=processes, precision=precision, seed=seed,
                   workers=workers, resume=resume)
    last = run.history("test")[-1]
    name = protocol if not changes else f"{protocol}, with {_said(changes)}"
    outcome = Outcome(name, last["correct"], last["n"], {
        "top5": last["top5"], "best": max(row["top1"] for row in run.history("test")), "run": str(run.path)})
    row = _row(Subject(source.name, None, size), recipe.data, outcome, seed)
    for folder in {run.path, *([source.folder] if source.folder else [])}:
        append_jsonl(folder / "results.jsonl", row)
    return row


def _save_start(backbone: nn.Module, folder: Path) -> Path:
    """Its weights in a file whose name carries their checksum: the same backbone again is the same file."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / ".start.draft"
    save_file({k: v.detach().cpu().contiguous() for k, v in backbone.state_dict().items()}, draft)
    start = folder / f"start-{checksum(draft)}.safetensors"
    draft.replace(start)
    return start.resolve()


def _said(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in changes.items())
