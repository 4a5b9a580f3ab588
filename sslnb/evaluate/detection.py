"""Detection and instance segmentation as transfer: everything is trained from a source's backbone, on boxes.

    row = train_protocol("runs/mocov2", "detect_voc_c4", data="VOCdevkit", processes=8)

The protocols of MoCo (arXiv 1911.05722, section 4.2, and its detection/ folder): Faster R-CNN C4 on VOC 07+12 for
24,000 steps, Mask R-CNN C4 or FPN on COCO for 90,000 or 180,000. An image lies at the top left of a square canvas, so
that a batch is one tensor like any other; `forward` cuts it out, flips it and gives it to the detector with its boxes,
which it looks up by the image's number. The detector is in detector.py, what is counted in voc_ap.py.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..boxes import Boxes
from ..decoding import BrokenImage
from ..errors import InputError, unknown
from ..files import write_atomic
from ..geometry import ImageOp
from ..parts import world
from ..reading import EpochSampler, ViewSet, draw_seed, image_loader, in_order, loader_workers
from ..recipes import Recipe, method_numbers
from ..run import Run
from ..segments import coco_masks, decoded
from ..views import View, Views
from .protocol import Protocol
from .sources import Source
from .voc_ap import coco_ap, voc_ap

HEADS = ("c4", "fpn")
RECIPES: dict[str, Recipe] = {}  # a method's file has recipes by that name; these are in DETECTION below


@dataclass(frozen=True)
class Canvas(ImageOp):
    """The image at the top left of a black square of `size` px, shrunk if it is larger."""

    size: int

    def __call__(self, image: Image.Image, rng=None) -> Image.Image:
        canvas = Image.new("RGB", (self.size, self.size))
        shape = shrunk(image.size, self.size)
        canvas.paste(image if image.size == shape else image.resize(shape, Image.Resampling.BILINEAR))
        return canvas


def shrunk(shape, size: int) -> tuple[int, int]:
    """Width and height of an image once it fits on the canvas."""
    scale = min(1.0, size / max(shape))
    return tuple(max(1, round(float(side) * scale)) for side in shape)


def noted(recipe: Recipe, sizes: np.ndarray) -> str:
    """The recipe's note, and what the canvas costs images of these sizes (N, 2), if it costs them anything: not where
    they lie on it as large as the detector looks at them."""
    numbers, long = {**method_numbers(_voc.method), **recipe.numbers}, sizes.max(1)
    seen = np.minimum(max(numbers["short_sides"]) * long / sizes.min(1), numbers["long_side"])
    needed = np.ceil(np.minimum(long, seen)).astype(int)
    if not (lost := np.count_nonzero(needed > recipe.size)):
        return recipe.note
    said = (f"{lost} of {len(sizes)} images are shrunk to the canvas of {recipe.size} px and then enlarged again; "
            f"size={needed.max()} keeps all that the detector sees of them.")
    return recipe.note if said in recipe.note else f"{recipe.note} {said}".strip()


class Detector(Protocol):
    accumulable = False  # batch norm learns, and 2 images of 8 processes are another batch than 8 times 2 of one
    sync_bn = True

    def __init__(self, backbone: nn.Module, *, classes: int = 20, start: str = "", head: str = "c4",
                 masks: bool = False, short_sides: tuple[int, ...] = tuple(range(480, 801, 32)), long_side: int = 1333,
                 flip: float = 0.5, anchors: tuple[int, ...] = (32, 64, 128, 256, 512),
                 proposals: tuple[int, int, int, int] = (12000, 2000, 6000, 1000), rpn_batch: int = 256,
                 regions: int = 512, above: float = 0.05, most: int = 100, precise_batches: int = 200,
                 test_on: str = "test", test_every: int = 0):
        """`short_sides`: one is drawn per image, the last is that of tests; `proposals`: kept before and after NMS, in
        training and in tests; `rpn_batch`, `regions`: anchors and regions per image that are learned from; `above`,
        `most`: score and number of detections that are kept; `anchors` in px, of C4 (FPN has 8 times its strides);
        `test_on`: "test", or "held out" to choose something."""
        super().__init__(backbone, start, test_every)
        if head not in HEADS:
            unknown("head", head, HEADS)
        from . import detector  # here, for torchvision takes seconds, and this file is read for its recipes too

        self.model = getattr(detector, head)(
            backbone, classes, masks, short_sides=short_sides, long_side=long_side, anchors=anchors,
            proposals=proposals, rpn_batch=rpn_batch, regions=regions, above=above, most=most)
        self.masks, self.flip, self.precise_batches, self.test_on = masks, flip, precise_batches, test_on
        self.batch = 1

    # ------------------------------------------------------------ a step

    def views(self, size: int) -> Views:
        return Views(View(Canvas(size)))

    def forward(self, views: list[Tensor], index: Tensor) -> dict[str, Tensor]:
        (canvas,) = views
        cut = [self.cut_out(x, i) for x, i in zip(canvas, index.tolist(), strict=True)]
        turned = [self.flipped(*one) if torch.rand(()) < self.flip else one for one in cut]
        losses = self.model(self.backbone, *map(list, zip(*turned, strict=True)))
        return {"loss": sum(losses.values()), **losses}

    def cut_out(self, canvas: Tensor, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Image i (3, h, w) out of its canvas (3, S, S), and its targets, shrunk with it."""
        (width, height), found = shrunk(self.images.sizes[i], canvas.shape[-1]), self.images.targets(i)
        scale = np.tile(np.array([width, height]) / self.images.sizes[i], 2)
        target = {"boxes": torch.from_numpy(found.boxes * scale).float(), "labels": torch.from_numpy(found.classes) + 1}
        if self.masks:
            masks = np.stack([decoded(text, *self.images.sizes[i]) for text in found.masks])
            rows, columns = ((np.arange(n) + 0.5) * m // n for n, m in
                             ((height, self.images.sizes[i][1]), (width, self.images.sizes[i][0])))
            target["masks"] = torch.from_numpy(masks[:, rows.astype(int)[:, None], columns.astype(int)]).byte()
        return canvas[:, :height, :width], {k: v.to(canvas.device) for k, v in target.items()}

    @staticmethod
    def flipped(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mirrored left and right: x of a box becomes width - x."""
        x1, y1, x2, y2 = target["boxes"].unbind(1)
        boxes = torch.stack([image.shape[2] - x2, y1, image.shape[2] - x1, y2], 1)
        masks = {"masks": target["masks"].flip(2)} if "masks" in target else {}
        return image.flip(2), {**target, "boxes": boxes, **masks}

    def param_groups(self, recipe) -> list[dict]:
        """No weight decay on norm layers; biases have it, as in detectron2."""
        norms = {id(p) for m in self.modules() if isinstance(m, _BatchNorm) for p in m.parameters()}
        return [{"params": [p for p in self.parameters() if (id(p) in norms) == norm],
                 "weight_decay": 0.0 if norm else recipe.weight_decay} for norm in (False, True)]

    def order(self, seed: int, epoch: int) -> list[int]:
        """Shuffled in whole batches of wide or of tall images, as in detectron2: their padding stays small."""
        rng = np.random.default_rng(draw_seed(seed, epoch, -1))
        order = rng.permutation(len(self.images))
        tall = self.images.sizes[order, 0] < self.images.sizes[order, 1]
        groups = [g for g in (order[tall], order[~tall]) if len(g)]
        if min(map(len, groups)) < self.batch:  # a small group would always be the rest, which is dropped
            return order.tolist()
        whole = [len(g) // self.batch * self.batch for g in groups]
        batches = np.concatenate([g[:n].reshape(-1, self.batch) for g, n in zip(groups, whole, strict=True)])
        rest = np.concatenate([g[n:] for g, n in zip(groups, whole, strict=True)])
        return [*batches[rng.permutation(len(batches))].ravel().tolist(), *rng.permutation(rest).tolist()]

    # ------------------------------------------------------------ a run

    @classmethod
    def on_source(cls, recipe: Recipe, source: Source, size: int | None) -> Recipe:
        """At the recipe's own size: the canvas must hold the images, whatever the source was trained on."""
        return super().on_source(recipe, source, size or recipe.size)

    @classmethod
    def fitted(cls, recipe: Recipe) -> Recipe:
        """With as many classes as the data have."""
        train, test = (recipe.load(split) for split in ("train", "test"))
        for images in (train, test):
            if not isinstance(images, Boxes):
                raise InputError(f"{images.name} has no boxes, and a detector learns from them; give a folder in the "
                                 "layout of VOC or COCO, or clothes_in_photos.")
            for i in range(min(len(images), 8)):  # those that come later say by themselves if their size is another
                with suppress(BrokenImage):
                    images[i]
            if recipe.numbers.get("masks", False) and images.everything.masks is None:
                raise InputError(f"{images.name} ({images.split}) has boxes but no masks, at least not of each: take a "
                                 "protocol without them, or masks=False.")
        if train.classes != test.classes:
            raise InputError(f"{train.name} has {len(train.classes)} classes in training and {len(test.classes)} in "
                             "the test, or other ones; both must have the same.")
        recipe = recipe.with_(numbers={**recipe.numbers, "classes": len(train.classes)})
        if recipe.numbers.get("masks", False) or test.rule == "coco":
            coco_masks()
        return recipe.with_(note=noted(recipe, np.concatenate([train.sizes, test.sizes])))

    def before_train(self, run: Run) -> None:
        super().before_train(run)
        self.batch = run.recipe.batch

    @torch.no_grad()
    def test(self, run: Run) -> dict:
        """Every process looks at its share of the images; detections.json in the run directory has what all found."""
        from accelerate.utils import gather_object

        training = self.training
        if self.precise_batches:
            self.precise_norms(run)
        images, (rank, size) = run.recipe.load(self.test_on), world()
        views = self.views(run.recipe.size)
        loader = in_order(images, views, run.recipe.batch, run.settings["workers"], rank, size)
        self.eval()
        found, unread = [], []
        for (crops,), index, _, broken in loader:
            crops = crops.to(next(self.parameters()).device)
            for x, i, bad in zip(crops, index.tolist(), broken.tolist(), strict=True):
                if bad >= 0:
                    unread.append(bad)  # nobody could find anything in it
                else:
                    found += self.detect(images, i, x.float() / 255)
        self.train(training)
        found, unread = gather_object(found), gather_object(unread)
        images = images.subset(np.setdiff1d(np.arange(len(images)), unread)) if unread else images
        if rank == 0:
            write_atomic(run.path / "detections.json", json.dumps(found))
        told = coco_ap(images, found) if images.rule == "coco" else voc_ap(images, found)
        if images.rule != "coco" and find_spec("faster_coco_eval"):
            told["coco_ap"] = coco_ap(images, found)["ap"]  # another number than VOC's, for comparisons with others
        masks = coco_ap(images, found, masks=True) if self.masks else {}
        about = {"n": len(images), **({"broken": len(unread)} if unread else {})}
        return {**told, **{f"{name}_mask": value for name, value in masks.items()}, **about}

    @torch.no_grad()
    def detect(self, images: Boxes, i: int, canvas: Tensor) -> list[dict]:
        """What is found in image i, of which `canvas` (3, S, S) in [0, 1] is a view: rows as COCO's results have them,
        in px of the image as it is on the disk."""
        from .detector import paste

        (w, h), (width, height) = images.sizes[i].tolist(), shrunk(images.sizes[i], canvas.shape[-1])
        (one,) = self.model(self.backbone, [canvas[:, :height, :width]])
        boxes = (one["boxes"] * one["boxes"].new_tensor([w / width, h / height] * 2)).cpu()
        rows = [{"image_id": int(images.ids[i]), "category_id": int(images.category_ids[k - 1]), "score": s,
                 "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]]}
                for b, k, s in zip(boxes.tolist(), one["labels"].tolist(), one["scores"].tolist(), strict=True)]
        for row, box, mask in zip(rows, boxes, one["masks"].cpu() if self.masks else (), strict=False):
            form = coco_masks().encode(np.asfortranarray(paste(mask, box, w, h).numpy().astype(np.uint8)))
            row["segmentation"] = {"size": [h, w], "counts": form["counts"].decode()}
        return rows

    @torch.no_grad()
    def precise_norms(self, run: Run) -> None:
        """Running statistics of every batch norm: the plain mean over 200 training batches, with the weights as they
        are now. What training left is a moving mean over weights that are gone."""
        norms = [m for m in self.modules() if isinstance(m, _BatchNorm)]
        (rank, size), momenta, device = world(), [m.momentum for m in norms], next(self.parameters()).device
        sampler = EpochSampler(len(self.images), run.recipe.batch, rank=rank, world=size, seed=run.seed)
        sampler.set_position(-2)  # an epoch that training never has
        views = self.views(run.recipe.size)
        self.train()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(run.seed * 1009 + rank)
            workers = loader_workers(run.settings["workers"], self.images, size)
            loader = image_loader(ViewSet(self.images, views), workers, batch_sampler=sampler)
            for n, (crops, index, seeds, _) in enumerate(loader):
                if n == self.precise_batches:
                    break
                for m in norms:
                    m.momentum = 1 / (n + 1)
                self(views.photometric([x.to(device) for x in crops], seeds), index)
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum

    @staticmethod
    def results(tests: list[dict]) -> dict:
        """In %; the end of training counts."""
        return {k: v for k, v in tests[-1].items() if k not in ("kind", "step", "epoch")}


def detections(run: Run) -> list[dict]:
    """What a finished run found in the test images, as COCO's results have it."""
    return json.loads((run.path / "detections.json").read_text())


# ---------------------------------------------------------------- the protocols

_voc = Recipe(
    method="sslnb.evaluate.detection:Detector", backbone="resnet50", size=500, data="VOCdevkit", gpus=8, batch=2,
    epochs=1, steps=24_000, optimizer="sgd", lr=0.02, weight_decay=1e-4, schedule="step", milestones=(18_000, 22_000),
    warmup_steps=100, warmup_from=0.001, source="official code",
    note="size is that of the canvas: no image of VOC is larger. MoCo's numbers are means of 5 runs.",
)
_coco = _voc.with_(
    size=640, data="coco", steps=90_000, milestones=(60_000, 80_000), warmup_steps=1000,
    numbers={"classes": 80, "masks": True, "short_sides": tuple(range(640, 801, 32))},
    note="size is that of the canvas: no image of COCO is larger.")
_fpn = {"head": "fpn", "proposals": (2000, 1000, 1000, 1000)}

DETECTION = {
    "detect_voc_c4": _voc,
    "detect_coco_c4_1x": _coco,
    "detect_coco_c4_2x": _coco.with_(steps=180_000, milestones=(120_000, 160_000)),
    "detect_coco_fpn_1x": _coco.with_(**_fpn),
    "detect_coco_fpn_2x": _coco.with_(**_fpn, steps=180_000, milestones=(120_000, 160_000)),
    "detect_demo": _voc.with_(
        backbone="resnet_mini", size=128, data="clothes_in_photos", gpus=1, batch=4, steps=300, milestones=(220, 280),
        lr=0.04, warmup_steps=30, source="ours", note="for two CPU cores; its numbers cannot be compared with VOC's.",
        numbers={"classes": 4, "short_sides": (112, 128), "long_side": 160, "anchors": (16, 32, 64),
                 "proposals": (600, 200, 300, 100), "rpn_batch": 64, "regions": 32, "precise_batches": 40}),
}
