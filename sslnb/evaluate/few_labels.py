"""Fine-tuning the whole network on a few labels, beside training from scratch with the same labels and budget.

Small and quick, for images that fit into memory: AdamW, cosine, no augmentation. Not a published protocol. The random
initialisation of the same network goes through the same function, and that is training from scratch.
"""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbones import features
from ..errors import InputError
from ..notebook import TimeLeft
from ..views import IMAGENET_MEAN, IMAGENET_STD
from .features import _eval_mode
from .pixels import normalise, read

LABELS = 10  # per class; half of those of the smallest class if it has not twice as many
STEPS = 200  # of the optimizer
LRS = (3e-4, 1e-3, 3e-3)
BATCH, WEIGHT_DECAY = 50, 0.05


def few_labels(subject, train, test, seed: int, steps: int) -> tuple[Tensor, Tensor, dict]:
    """Fine-tune on LABELS training images per class; the rate is chosen on as many others of TRAIN, never on test.

    -> predictions and labels of the test images, both (M,), and {"lr": the chosen rate, "labels": how many there were,
    "per_class": how many of each class, "steps"}. Errors: InputError for less than one step, for weights that are not
    finite, or if a class has a single training image.
    """
    if not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps={steps!r} of fine-tuning are impossible: use a whole number of at least 1.")
    wrong = [name for name, value in subject.backbone.state_dict().items() if not value.isfinite().all()]
    if wrong:  # it would learn nothing, and guess
        raise InputError(f"{subject.name} has numbers in {wrong[0]} that are not finite; take another file or an "
                         "earlier checkpoint.")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.as_tensor(train.labels)
    classes, counts = labels.unique(return_counts=True)
    each = min(LABELS, int(counts.min()) // 2)
    if not each:
        lonely = int(classes[counts.argmin()])
        raise InputError(f"Class {lonely} of {train.name} has one training image, and fine-tuning on few labels needs "
                         "two at least: one of them chooses the learning rate.")
    fit, held = [], []
    for c in classes:
        rows = (labels == c).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        fit.append(rows[:each])
        held.append(rows[each:2 * each])
    (x, y), (x_held, y_held) = (_pixels(subject, train, torch.cat(r).tolist()) for r in (fit, held))
    told = TimeLeft(f"{subject.name}, fine-tuned on {len(y)} labels at {len(LRS)} rates: steps", len(LRS) * steps)
    tuned = [_fit(subject, x, y, lr, seed, steps, lambda step, n=n: told(n * steps + step)) for n, lr in enumerate(LRS)]
    right = [int((_predict(model, subject, x_held) == y_held).sum()) for model in tuned]
    best = right.index(max(right))
    x_test, y_test = _pixels(subject, test, list(range(len(test))))
    more = {"lr": LRS[best], "labels": len(y), "per_class": each, "steps": steps}
    return _predict(tuned[best], subject, x_test), y_test, more


class _Classifier(nn.Module):
    def __init__(self, backbone: nn.Module, pool: str, classes: int):
        super().__init__()
        self.backbone, self.pool = backbone, pool
        self.head = nn.Linear(backbone.num_features, classes)
        nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(features(self.backbone, normalise(x, IMAGENET_MEAN, IMAGENET_STD), self.pool))


def _fit(subject, x: Tensor, y: Tensor, lr: float, seed: int, steps: int, tell: Callable[[int], None]) -> nn.Module:
    """x: uint8 (N, 3, h, w), y (N,); `tell` hears of every step. The random state of the caller stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _Classifier(copy.deepcopy(subject.backbone), subject.pool, 1 + int(y.max())).to(subject.device)
        model.requires_grad_(True).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=WEIGHT_DECAY)
        batch = min(BATCH, len(y))
        rows = torch.cat([torch.randperm(len(y)) for _ in range(math.ceil(steps * batch / len(y)))])
        for step, chosen in enumerate(rows[:steps * batch].split(batch)):
            warm = min(1.0, (step + 1) / (0.1 * steps))
            optimizer.param_groups[0]["lr"] = lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss = F.cross_entropy(model(x[chosen].to(subject.device)), y[chosen].to(subject.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            tell(step + 1)
    return model


def _predict(model: nn.Module, subject, x: Tensor) -> Tensor:
    with torch.no_grad(), _eval_mode(model):
        return torch.cat([model(part.to(subject.device)).argmax(1).cpu() for part in x.split(500)])


def _pixels(subject, images, rows: list[int]) -> tuple[Tensor, Tensor]:
    """uint8 (n, 3, size, size) and labels (n,) of the images that can be read."""
    pixels, kept, _ = read(images, rows, subject.size)
    return pixels, torch.as_tensor(images.labels)[kept]
