"""A backbone and a linear classifier, trained on labels: what probes and fine-tuning share."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones import features
from ..errors import InputError, unknown
from ..launch import autocast
from ..parts import full_precision, sum_over_processes, world
from ..reading import in_order
from ..recipes import Recipe
from ..run import Run
from ..views import CenterCrop, HorizontalFlip, Normalize, RandomResizedCrop, Resize, View, Views
from .features import the_device
from .pixels import MARGIN, MARGIN_FROM
from .protocol import Protocol
from .results import accuracy

RECIPES: dict[str, Recipe] = {}  # its recipes are the protocols', in the files beside this one


class Supervised(Protocol):
    accumulable = True  # the loss of an image does not depend on its batch; batch norm, where it learns, does

    def __init__(self, backbone: nn.Module, *, classes: int = 1000, start: str = "", pool: str = "model",
                 frozen: bool = True, head_std: float = 0.01, head_lr: float = 1.0, adapt_vectors: bool = False,
                 resize: float = MARGIN, interpolation: str = "bilinear", crop: tuple[float, float] = (0.08, 1.0),
                 flip: float = 0.5, test_on: str = "test", test_every: int = 1, deterministic: bool = False):
        """`head_lr` times the learning rate is that of the head; `adapt_vectors`: LARS adapts biases too; `resize`:
        short side of test images, in crops; `test_on`: "test", or "held out" to choose something; `deterministic`:
        cuDNN's algorithms that repeat themselves."""
        super().__init__(backbone, start, test_every)
        self.frozen, self.pool, self.test_on = frozen, pool, test_on
        self.head = nn.Linear(backbone.num_features, classes)
        nn.init.normal_(self.head.weight, std=head_std)
        nn.init.zeros_(self.head.bias)
        backbone.requires_grad_(not frozen)
        self.sync_bn, self.deterministic = not frozen, deterministic
        self.head_lr, self.adapt_vectors = head_lr, adapt_vectors
        self.resize, self.interpolation, self.crop, self.flip = resize, interpolation, crop, flip
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
        labels, logits = self.labels_for(x, index), self.logits(x)
        return {"loss": self.loss(logits, labels), "accuracy": (logits.argmax(1) == labels).float().mean()}

    def labels_for(self, x: Tensor, index: Tensor | None) -> Tensor:
        """(B,) labels of the images in a batch; without a run, made-up ones."""
        index = torch.arange(len(x)) if index is None else index.cpu()
        return (self.labels[index] if self.labels is not None else index % self.head.out_features).to(x.device)

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

    # ------------------------------------------------------------ what a protocol adds

    @classmethod
    def frozen_in(cls, recipe: Recipe) -> bool:
        return recipe.numbers.get("frozen", True)

    @classmethod
    def fitted(cls, recipe: Recipe) -> Recipe:
        """With as many classes as the data have, and the pool of the source's features."""
        test_on = recipe.numbers.get("test_on", "test")
        if test_on not in ("test", "held out"):
            unknown("images for test_on", test_on, ("test", "held out"))
        if test_on == "held out" and not recipe.hold_out:
            raise InputError('test_on="held out" needs images that are held out: give hold_out=0.2 too, for example.')
        train, test = recipe.load(), recipe.load("test")
        classes = len(train.classes)
        labels_of(train, classes), labels_of(test, classes)
        # The recipe's own `pool` is for the monitor, the one among the numbers for the classifier.
        return recipe.with_(numbers={**recipe.numbers, "classes": classes, "pool": recipe.pool})

    def before_train(self, run: Run) -> None:
        super().before_train(run)
        torch.backends.cudnn.deterministic = self.deterministic
        self.labels = labels_of(self.images, self.head.out_features)

    def test(self, run: Run) -> dict[str, float]:
        found = torch.zeros(3, dtype=torch.float64)  # right at once, right among five, all
        for logits, labels in self.tested(run):
            right = logits.topk(min(5, self.head.out_features), 1).indices == labels[:, None]
            found += torch.tensor([right[:, 0].sum(), right.any(1).sum(), len(right)])
        correct, correct5, n = self.summed(found)
        return {"top1": 100 * correct / n, "top5": 100 * correct5 / n, "correct": int(correct), "n": int(n)}

    @torch.no_grad()
    def tested(self, run: Run) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits and labels of the test images in batches, on the device: of this process's share. Broken images do
        not count."""
        images, (rank, size) = run.recipe.load(self.test_on), world()
        labels, view = labels_of(images, self.head.out_features), self.test_view(run.recipe.size)
        loader = in_order(images, view, run.recipe.batch, run.settings["workers"], rank, size)
        device, training = next(self.parameters()).device, self.training
        self.eval()
        for (crops,), index, seeds, broken in loader:
            (x,) = view.photometric([crops.to(device)], seeds)
            with autocast(run.recipe.precision, device):
                logits = self.logits(x)
            yield logits[(broken < 0).to(device)], labels[index][broken < 0].to(device)
        self.train(training)

    def summed(self, counts: Tensor) -> list[float]:
        """Counts (n,) of all processes together."""
        device = next(self.parameters()).device
        return sum_over_processes(counts.to(device if device.type != "mps" else "cpu")).tolist()

    @staticmethod
    def results(tests: list[dict]) -> dict:
        """The last epoch counts; the best is written down beside it."""
        last = tests[-1]
        return {**accuracy(last["correct"], last["n"]), "top5": last["top5"], "best": max(t["top1"] for t in tests)}


@torch.no_grad()
def answers(run: Run) -> tuple[Tensor, Tensor]:
    """True and predicted classes of the test images of a finished run, both (N,) on the CPU, without broken images."""
    found = [(labels.cpu(), logits.argmax(1).cpu())
             for logits, labels in run.method().to(the_device("auto")).tested(run)]
    return tuple(torch.cat(part) for part in zip(*found, strict=True))


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
