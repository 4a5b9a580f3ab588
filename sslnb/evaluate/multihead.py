"""Multi-head linear evaluation: which layer of a ResNet holds what. A linear classifier on every feature map, at once.

    row = train_protocol("runs/rotation", "multihead_imagenet", data="imagenet", processes=8)

Each map is average-pooled to about 9,000 numbers, standardised per channel, and read by a classifier of its own:

    logits_l = W_l BN(pool_l(map_l(x))) + b_l,    loss = Σ_l cross-entropy(logits_l, y)

The maps are that of the stem before its max-pooling ("feat1") and those of the stages ("feat2" …). Nothing that is
trained is shared, so the sum trains every classifier as if it were alone. Numbers: MMSelfSup 0.x,
configs/benchmarks/classification and models/heads/multi_cls_head.py, after arXiv 1905.01235.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backbones
from ..draws import Draws
from ..errors import InputError
from ..files import expanded
from ..geometry import CenterCrop, HorizontalFlip, ImageOp, RandomResizedCrop, Resize
from ..parts import full_precision
from ..recipes import Recipe
from ..run import Run
from ..views import BatchOp, ColorJitter, Normalize, View, Views
from .pixels import MARGIN
from .results import accuracy
from .supervised import Supervised

POOLS = ((10, 10, 4), (16, 8, 0), (13, 5, 0), (8, 3, 0), (6, 1, 0))  # kernel, stride, padding, for a ResNet at 224 px
SIDES = (12, 6, 4, 3, 2)  # of the pooled maps
STAGES = ("layer1", "layer2", "layer3", "layer4")
POOLINGS = ("auto", "specified", "adaptive")


# ---------------------------------------------------------------- maps and their pooling


def maps(resnet: nn.Module, x: Tensor) -> list[Tensor]:
    """(B, 3, H, W) -> the maps (B, C, h, w) of the stem, before max-pooling, and of every stage that has blocks."""
    x = resnet.act1(resnet.bn1(resnet.conv1(x)))
    found = [x]
    x = resnet.maxpool(x)
    for stage in (getattr(resnet, name) for name in STAGES):
        if len(stage):
            x = stage(x)
            found.append(x)
    return found


def pooling(level: int, side: int, mode: str = "auto") -> nn.Module:
    """What takes the map of a level, `side` pixels wide, to SIDES[level].

    "specified" is the published average pooling, "adaptive" torch's for any side, which leaves a smaller map as it is;
    "auto" the first where it gives SIDES[level], as it does for a ResNet-50 at 224 px, and else the second.
    """
    kernel, stride, padding = POOLS[level]
    fits = side + 2 * padding >= kernel and (side + 2 * padding - kernel) // stride + 1 == SIDES[level]
    if mode not in POOLINGS:
        raise InputError(f"pooling {mode!r} is unknown: use auto, specified or adaptive.")
    if mode == "specified" and not fits:
        raise InputError(f"pooling 'specified' is made for ResNets at 224 px: it does not take the {side} x {side} map "
                         f"of feat{level + 1} to {SIDES[level]} x {SIDES[level]}; use pooling='auto'.")
    if fits and mode != "adaptive":
        return nn.AvgPool2d(kernel, stride, padding)
    return nn.AdaptiveAvgPool2d(min(side, SIDES[level]))


@torch.no_grad()
def pools(resnet: nn.Module, mode: str = "auto", size: int = 0) -> tuple[list[nn.Module], list[tuple[int, int, int]]]:
    """The poolings of all maps of a backbone and the shapes (C, h, w) that they give, for images of `size` pixels (0:
    those it was built for).

    Errors: InputError for a backbone without stages, and for one that takes two channels without a Sobel filter.
    """
    if not all(hasattr(resnet, name) for name in ("conv1", "bn1", "act1", "maxpool", *STAGES)):
        raise InputError(f"A classifier per layer needs a ResNet with its stem and stages, and "
                         f"{type(resnet).__name__} has other parts; use a ResNet, or a linear protocol for this one.")
    first = next(m for m in resnet.conv1.modules() if isinstance(m, nn.Conv2d))
    if first.in_channels != 3 and not resnet.conv1._forward_pre_hooks:
        raise InputError(f"The first convolution of this backbone takes {first.in_channels} channels instead of 3: its "
                         "weights come from a run on Sobel-filtered images; build it with sobel=True.")
    size, training, weight = size or backbones.image_size(resnet), resnet.training, first.weight
    found = maps(resnet.eval(), torch.zeros(1, 3, size, size, device=weight.device, dtype=weight.dtype))
    resnet.train(training)
    made = [pooling(level, x.shape[-1], mode) for level, x in enumerate(found)]
    return made, [tuple(pool(x).shape[1:]) for pool, x in zip(made, found, strict=True)]


class Levels(nn.ModuleList):
    """pool, batch norm, flatten, classify: one of these for every map of a backbone."""

    def __init__(self, backbone: nn.Module, classes: int, mode: str):
        made, shapes = pools(backbone, mode)
        # The norm is that of a channel, before flattening, and has no weights of its own.
        super().__init__(nn.Sequential(pool, nn.BatchNorm2d(shape[0], affine=False, momentum=0.1), nn.Flatten(),
                                       nn.Linear(math.prod(shape), classes))
                         for pool, shape in zip(made, shapes, strict=True))
        for level in self:
            nn.init.normal_(level[3].weight, std=0.01)
            nn.init.zeros_(level[3].bias)
        self.out_features, self.shapes = classes, shapes

    @property
    def adaptive(self) -> list[str]:
        """The levels whose pooling is not the published one."""
        return [f"feat{i}" for i, level in enumerate(self, 1) if isinstance(level[0], nn.AdaptiveAvgPool2d)]


# ---------------------------------------------------------------- what the recipes' images go through


@dataclass(frozen=True)
class Lighting(BatchOp):
    """Light of another colour: x + V (α ∘ λ), α ~ N(0, std) per image and component (AlexNet's PCA of ImageNet)."""

    std: float = 0.1
    values = (0.2175, 0.0188, 0.0045)  # λ
    vectors = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))  # V, a row per RGB

    def sample(self, draws: Draws) -> tuple[Tensor, ...]:
        """Box and Muller's way from two uniform numbers to a normal one, three times: α (B, 3)."""
        radius = [(-2 * (1 - draws()).clamp(min=1e-7).log()).sqrt() for _ in range(3)]
        return (self.std * torch.stack([r * (2 * math.pi * draws()).cos() for r in radius], 1),)

    def apply(self, x: Tensor, alpha: Tensor) -> Tensor:
        shift = (alpha * torch.tensor(self.values)) @ torch.tensor(self.vectors).T
        return x + shift[:, :, None, None].to(x.device, non_blocking=True)


@dataclass(frozen=True)
class RandomCrop(ImageOp):
    """A `size` x `size` square at a random place of an image that is at least as large."""

    size: int

    def __call__(self, image, rng):
        left, top = rng.randint(0, image.width - self.size), rng.randint(0, image.height - self.size)
        return image.crop((left, top, left + self.size, top + self.size))


# ---------------------------------------------------------------- the protocol


class MultiHead(Supervised):
    accumulable = False  # the batch norm of the classifiers sees the batch, that of all processes

    def __init__(self, backbone: nn.Module, *, classes: int = 1000, start: str = "", pooling: str = "auto",
                 square: bool = False, crop: tuple[float, float] = (0.08, 1.0), flip: float = 0.5, jitter: float = 0.0,
                 lighting: float = 0.0, test_on: str = "test", test_every: int = 1):
        """`pooling`: see the function; `square`: train on crops of the central square of the image instead of random
        shares `crop` of it; `jitter`: of brightness, contrast and saturation; `lighting`: the std of Lighting."""
        super().__init__(backbone, classes=classes, start=start, crop=crop, flip=flip, test_on=test_on,
                         test_every=test_every)
        self.sync_bn, self.head = True, Levels(backbone, classes, pooling)
        self.square, self.jitter, self.lighting = square, jitter, lighting

    def views(self, size: int) -> Views:
        crop = [RandomResizedCrop(size, self.crop)]
        if self.square:
            short = round(size * MARGIN)
            crop = [Resize(short, "bilinear"), CenterCrop(short), RandomCrop(size)]
        light = [ColorJitter(self.jitter, self.jitter, self.jitter, 0.0, p=1.0)] if self.jitter else []
        light += [Lighting(self.lighting)] if self.lighting else []
        return Views(View(*crop, HorizontalFlip(self.flip), *light, Normalize()))

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> dict[str, Tensor]:
        (x,) = views
        labels, logits = self.labels_for(x, index), self.logits(x)
        right = (logits.argmax(1) == labels[:, None]).float().mean(0)
        return {"loss": self.loss(logits, labels), **{f"feat{i}": share for i, share in enumerate(right, 1)}}

    def logits(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, classes, levels)."""
        with torch.no_grad():
            found = maps(self.backbone, x)
        return self.classify(*found)

    @full_precision
    def classify(self, *found: Tensor) -> Tensor:
        return torch.stack([level(x) for level, x in zip(self.head, found, strict=True)], 2)

    @full_precision
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum over levels of the mean over images."""
        return F.cross_entropy(logits, labels[:, None].expand(-1, logits.shape[2]), reduction="sum") / len(labels)

    @classmethod
    def fitted(cls, recipe: Recipe) -> Recipe:
        """With as many classes as the data have. Says what makes it another protocol than the published one."""
        published, fitted = recipe.numbers.get("classes"), super().fitted(recipe)
        recipe = fitted.with_(numbers={k: v for k, v in fitted.numbers.items() if k != "pool"})  # maps are not pooled
        with backbones.shapes_only():
            levels = recipe.build().head
        if levels.adaptive:
            print(f"The published pooling does not fit {', '.join(levels.adaptive)} of {recipe.backbone} at "
                  f"{recipe.size} px: adaptive pooling to {', '.join(f'{h} x {w}' for _, h, w in levels.shapes)}.")
        if published and published != recipe.numbers["classes"]:
            print(f"The protocol was published for {published} classes, and {recipe.data} has "
                  f"{recipe.numbers['classes']}: this is another one.")
        return recipe

    def test(self, run: Run) -> dict:
        found = torch.zeros(len(self.head) + 1, dtype=torch.float64)
        for logits, labels in self.tested(run):
            found[:-1] += (logits.argmax(1) == labels[:, None]).sum(0).cpu()
            found[-1] += len(labels)
        *correct, n = self.summed(found)
        names = [f"feat{i}" for i in range(1, len(self.head) + 1)]
        return {"n": int(n), "correct": {name: int(c) for name, c in zip(names, correct, strict=True)},
                **{name: 100 * c / n for name, c in zip(names, correct, strict=True)}, "adaptive": self.head.adaptive}

    @staticmethod
    def results(tests: list[dict]) -> dict:
        """Every level after the last epoch, and as `top1` the best of them: chosen on the test images, as one reads
        the published tables."""
        last = tests[-1]
        levels = {name: accuracy(correct, last["n"]) for name, correct in last["correct"].items()}
        best = max(levels, key=lambda name: levels[name]["top1"])
        return {**levels[best], "best_level": best, **levels, "adaptive": last["adaptive"]}


# ---------------------------------------------------------------- lists of the other data sets


def places205_lists(root: str | Path, out: str | Path | None = None) -> Path:
    """Places205 as it is published, made into train.txt and val.txt for `data`; returns the folder that holds them.

    `root` has trainvalsplit_places205/{train,val}_places205.csv, whose lines are `path label` in spite of their name,
    and the images in images256/ or data/vision/torralba/deeplearning/images256/. The lists go to `root`, or to `out`.
    """
    root = expanded(root)
    places = [root / "data/vision/torralba/deeplearning/images256", root / "images256"]
    images = next((folder for folder in places if folder.is_dir()), None)
    if images is None:
        raise InputError(f"{root} has neither images256/ nor {places[0].relative_to(root)}/: unpack "
                         "imagesPlaces205_resize.tar.gz there.")
    splits = {split: [tuple(line.rsplit(maxsplit=1)) for line in
                      _text(root / f"trainvalsplit_places205/{split}_places205.csv").splitlines() if line.strip()]
              for split in ("train", "val")}
    return _write_lists(splits, images, root, out)


def inat18_lists(root: str | Path, out: str | Path | None = None) -> Path:
    """iNaturalist 2018 as it is published: train2018.json, val2018.json and train_val2018/ in `root`. As above."""
    root = expanded(root)
    splits = {}
    for split in ("train", "val"):
        found = json.loads(_text(root / f"{split}2018.json"))
        label = {a["image_id"]: a["category_id"] for a in found["annotations"]}
        splits[split] = [(image["file_name"], label[image["id"]]) for image in found["images"]]
    return _write_lists(splits, root, root, out)


def _text(file: Path) -> str:
    if not file.is_file():
        raise InputError(f"There is no file {file}: put the published annotations there.")
    return file.read_text()


def _write_lists(splits: dict[str, list[tuple]], images: Path, root: Path, out: str | Path | None) -> Path:
    """Paths count from the folder of the lists if that is `root`, else they are absolute."""
    folder = root if out is None else expanded(out)
    start = images.relative_to(root).as_posix() if out is None else images.resolve().as_posix()
    folder.mkdir(parents=True, exist_ok=True)
    for split, pairs in splits.items():
        (folder / f"{split}.txt").write_text("".join(f"{start}/{path} {label}\n" for path, label in pairs))
    return folder


# ---------------------------------------------------------------- recipes

_published = Recipe(
    method="sslnb.evaluate.multihead:MultiHead", backbone="resnet50", size=224, data="imagenet", gpus=8, batch=32,
    epochs=90, optimizer="sgd", lr=0.01, weight_decay=1e-4, nesterov=True, schedule="step", milestones=(30, 60),
    lr_by_epoch=True, source="zoo", note="The last epoch counts.")

MULTIHEAD = {
    "multihead_demo": _published.with_(
        backbone="resnet_mini", size=20, data="digits_scattered", gpus=1, batch=50, epochs=10, milestones=(5, 8),
        numbers={"crop": (0.5, 1.0), "flip": 0.0}, source="ours", note="For small images."),
    "multihead_imagenet": _published.with_(numbers={"classes": 1000, "jitter": 0.4, "lighting": 0.1}),
    "multihead_places205": _published.with_(
        data="places205", epochs=28, milestones=(7, 14, 21), numbers={"classes": 205, "square": True},
        note="data is the folder of places205_lists. The last epoch counts."),
    "multihead_inat18": _published.with_(
        data="inat18", epochs=84, milestones=(24, 48, 72), numbers={"classes": 8142},
        note="data is the folder of inat18_lists. The last epoch counts."),
}
RECIPES = MULTIHEAD  # as the file of every method says
