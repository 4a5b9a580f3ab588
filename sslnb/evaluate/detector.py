"""Faster and Mask R-CNN (arXiv 1506.01497, 1703.06870) on a plain timm ResNet, as MoCo's detection runs have them.

    image ─ stem, stages ─▶ maps ─ region proposals ─▶ boxes ─ RoIAlign ─▶ regions ─▶ class, better box, mask

`C4`: one map of stride 16 and the last stage of the ResNet run on every region; nothing but it lies between features
and answer. `FPN`: maps of strides 4 to 64 and light heads. Torchvision gives the parts that agree with detectron2
(matching, sampling, box codes, NMS); what differs is written here, each with its reason. Two differences stay: images
are enlarged as tensors, not as PIL images, and rounded down to whole pixels. The modules hold no backbone: `forward`
is handed it, so its weights have one name only.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, roi_align
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ..errors import InputError
from ..views import IMAGENET_MEAN, IMAGENET_STD

# ---------------------------------------------------------------- the backbone's parts


def stages(backbone: nn.Module) -> list[str]:
    """The residual stages that a timm ResNet has, by name. Errors: InputError if it is no such network."""
    names = [f"layer{i}" for i in (1, 2, 3, 4) if len(getattr(backbone, f"layer{i}", ()))]
    if len(names) < 2 or not hasattr(backbone, "bn1"):
        raise InputError(f"These detectors are built on the stages of a ResNet, and {type(backbone).__name__} has "
                         f"{len(names)}; use resnet50, or resnet_mini for small images.")
    return names


def trunk(backbone: nn.Module, x: Tensor, names: Sequence[str]) -> list[Tensor]:
    """(B, 3, H, W) -> the maps (B, C, h, w) after each of these stages."""
    x = backbone.maxpool(backbone.act1(backbone.bn1(backbone.conv1(x))))
    maps = []
    for name in names:
        x = getattr(backbone, name)(x)
        maps.append(x)
    return maps


@torch.no_grad()
def shapes(backbone: nn.Module) -> list[tuple[int, int]]:
    """Channels and stride in px of each stage's map."""
    training, x = backbone.training, torch.zeros(1, 3, 64, 64, device=next(backbone.parameters()).device)
    found = [(m.shape[1], 64 // m.shape[-1]) for m in trunk(backbone.eval(), x, stages(backbone))]
    backbone.train(training)
    return found


# ---------------------------------------------------------------- proposals


class Anchors(AnchorGenerator):
    """A box of every size and ratio around every cell, cells being `strides` px apart.

    Torchvision rounds the boxes, and takes image // map for the stride: of an image of 800 px, p6 has 13 cells, and
    its anchors would be 61 px apart instead of 64.
    """

    def __init__(self, sizes: Sequence[Sequence[int]], strides: Sequence[int]):
        super().__init__(tuple(map(tuple, sizes)), ((0.5, 1.0, 2.0),) * len(sizes))
        self.strides = strides

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device="cpu") -> Tensor:
        corner = [(s / r**0.5 / 2, s * r**0.5 / 2) for r in aspect_ratios for s in scales]  # a ratio is height / width
        return torch.tensor([(-x, -y, x, y) for x, y in corner], dtype=dtype, device="cpu")

    def forward(self, images, maps: list[Tensor]) -> list[Tensor]:
        self.set_cell_anchors(torch.float32, maps[0].device)
        anchors = self.grid_anchors([m.shape[-2:] for m in maps], [(s, s) for s in self.strides])
        return [torch.cat(anchors)] * len(images.image_sizes)


class FloatRPNHead(RPNHead):
    def forward(self, maps):
        """In float32: 16 bits cannot tell neighbouring pixels of a wide image apart."""
        return tuple([x.float() for x in found] for found in super().forward(maps))


class Proposals(RegionProposalNetwork):
    def compute_loss(self, objectness: Tensor, deltas: Tensor, labels, goals) -> tuple[Tensor, Tensor]:
        """Both sums over what was drawn, divided by what should be drawn, 256 anchors an image; boxes by L1."""
        drawn = self.fg_bg_sampler.batch_size_per_image * len(labels)
        positive, negative = (torch.cat(found).bool() for found in self.fg_bg_sampler(labels))
        labels, goals, both = torch.cat(labels), torch.cat(goals), positive | negative
        score = F.binary_cross_entropy_with_logits(objectness.flatten()[both], labels[both], reduction="sum")
        return score / drawn, F.l1_loss(deltas[positive], goals[positive], reduction="sum") / drawn


# ---------------------------------------------------------------- regions


def pool(maps: Sequence[Tensor], strides: Sequence[int], boxes: Sequence[Tensor], side: int) -> Tensor:
    """What lies in each box: maps (B, C, h, w), one tensor (n, 4) of boxes in px per image -> (N, C, side, side).

    RoIAlign with half-pixel shift and as many samples as there are cells. Of several maps a box of 224 px takes that
    of stride 16, of half the size that of stride 8, and so on.
    """
    rois = torch.cat([torch.cat([torch.full_like(b[:, :1], i), b], 1) for i, b in enumerate(boxes)])
    if len(maps) == 1:
        return roi_align(maps[0], rois, side, 1 / strides[0], 0, aligned=True)
    size = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
    level = (4 + torch.log2(size / 224 + 1e-8)).floor() - math.log2(strides[0])
    level = level.clamp(0, len(maps) - 1)
    found = maps[0].new_zeros(len(rois), maps[0].shape[1], side, side)
    for k, (m, stride) in enumerate(zip(maps, strides, strict=True)):
        here = (level == k).nonzero()[:, 0]
        found = found.index_copy(0, here, roi_align(m, rois[here], side, 1 / stride, 0, aligned=True))
    return found


def box_losses(scores: Tensor, deltas: Tensor, labels: list[Tensor], goals: list[Tensor]) -> dict[str, Tensor]:
    """scores (N, K + 1), deltas (N, 4 (K + 1)). L1 over regions of objects, divided by the number of ALL regions."""
    labels, goals = torch.cat(labels), torch.cat(goals)
    at = (labels > 0).nonzero()[:, 0]
    own = deltas.view(len(labels), -1, 4)[at, labels[at]]
    return {"loss_classifier": F.cross_entropy(scores, labels),
            "loss_box_reg": F.l1_loss(own, goals[at], reduction="sum") / len(labels)}


def mask_loss(logits: Tensor, boxes: list[Tensor], owners: list[Tensor], labels: list[Tensor],
              masks: list[Tensor]) -> Tensor:
    """Cross-entropy per pixel of the own class's mask (n, K + 1, m, m). The truth (objects, H, W) is cut out of the
    image with the same RoIAlign and is yes or no again, where torchvision's stays blurred."""
    if len(logits) == 0:  # no region holds an object
        return logits.sum() * 0
    side, label = logits.shape[-1], torch.cat(labels)
    truth = torch.cat([roi_align(m[:, None].float(), torch.cat([o[:, None].to(b), b], 1), side, 1.0, 0, aligned=True)
                       for m, b, o in zip(masks, boxes, owners, strict=True)])[:, 0] >= 0.5
    return F.binary_cross_entropy_with_logits(logits[torch.arange(len(label), device=label.device), label],
                                              truth.to(logits.dtype))


class Heads(RoIHeads):
    """Class, box and mask of every region; the subclasses say what is computed of a region."""

    def __init__(self, width: int, classes: int, *, regions: int, above: float, most: int):
        super().__init__(None, None, FastRCNNPredictor(width, classes + 1), 0.5, 0.5, regions, 0.25,
                         (10.0, 10.0, 5.0, 5.0), above, 0.5, most)
        for layer, std in ((self.box_predictor.cls_score, 0.01), (self.box_predictor.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def add_masks(self, width: int, classes: int) -> None:
        self.mask_predictor = MaskRCNNPredictor(width, 256, classes + 1)
        nn.init.normal_(self.mask_predictor.mask_fcn_logits.weight, std=0.001)
        for layer in (self.mask_predictor.mask_fcn_logits, self.mask_predictor.conv5_mask):
            nn.init.zeros_(layer.bias)

    def forward(self, maps: list[Tensor], proposals: list[Tensor], sizes, targets, last: Callable[[Tensor], Tensor]):
        """maps and proposals -> (detections, losses): one of the two is empty. `last`: the ResNet's last stage."""
        if self.training:
            proposals, owners, labels, goals = self.select_training_samples(proposals, targets)
        x = self.regions(maps, proposals, last)
        scores, deltas = (y.float() for y in self.box_predictor(self.vectors(x)))
        if self.training:
            losses = box_losses(scores, deltas, labels, goals)
            if self.mask_predictor is not None:
                shown = [k > 0 for k in labels]
                boxes, owners, labels = ([v[on] for v, on in zip(values, shown, strict=True)]
                                         for values in (proposals, owners, labels))
                logits = self.mask_predictor(self.mask_regions(maps, boxes, last, x[torch.cat(shown)])).float()
                losses["loss_mask"] = mask_loss(logits, boxes, owners, labels, [t["masks"] for t in targets])
            return [], losses
        boxes, scores, labels = self.postprocess_detections(scores, deltas, proposals, sizes)
        found = [{"boxes": b, "scores": s, "labels": k} for b, s, k in zip(boxes, scores, labels, strict=True)]
        if self.mask_predictor is not None:
            label = torch.cat(labels)
            logits = self.mask_predictor(self.mask_regions(maps, boxes, last)).float()
            chosen = logits[torch.arange(len(label), device=label.device), label].sigmoid()
            for one, masks in zip(found, chosen.split([len(b) for b in boxes]), strict=True):
                one["masks"] = masks  # (n, m, m), of the box alone: `paste` puts them into the image
        return found, {}


class C4Heads(Heads):
    """RoIAlign 14 x 14, the last stage, one more batch norm (MoCo's extra norm), the mean."""

    def __init__(self, width: int, stride: int, classes: int, masks: bool, **numbers):
        super().__init__(width, classes, **numbers)
        self.stride, self.norm = stride, nn.BatchNorm2d(width)
        if masks:
            self.add_masks(width, classes)

    def regions(self, maps, boxes, last) -> Tensor:
        return self.norm(last(pool(maps, [self.stride], boxes, 14)))

    def vectors(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))

    def mask_regions(self, maps, boxes, last, rows: Tensor | None = None) -> Tensor:
        """In training the very features that were classified: the last stage and its batch norms run once a step."""
        return self.regions(maps, boxes, last) if rows is None else rows


class FPNHeads(Heads):
    """RoIAlign 7 x 7 and two layers of 1024 for boxes; 14 x 14 and four convolutions for masks."""

    def __init__(self, width: int, strides: Sequence[int], classes: int, masks: bool, **numbers):
        super().__init__(1024, classes, **numbers)
        self.strides, self.fc = strides, TwoMLPHead(width * 7 * 7, 1024)
        for layer in (self.fc.fc6, self.fc.fc7):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            nn.init.zeros_(layer.bias)
        if masks:
            self.mask_head = MaskRCNNHeads(width, (256,) * 4, 1)
            self.add_masks(256, classes)

    def regions(self, maps, boxes, last) -> Tensor:
        return pool(maps[:len(self.strides)], self.strides, boxes, 7)

    def vectors(self, x: Tensor) -> Tensor:
        return self.fc(x)

    def mask_regions(self, maps, boxes, last, rows: Tensor | None = None) -> Tensor:
        return self.mask_head(pool(maps[:len(self.strides)], self.strides, boxes, 14))


# ---------------------------------------------------------------- the whole


class RCNN(nn.Module):
    """`model(backbone, images, targets)`: images a list of (3, h, w) in [0, 1], targets a list of {"boxes" (n, 4) in
    px, "labels" (n,) from 1, "masks" (n, h, w) uint8}.

    In training the losses by name; else a detection per image: boxes in px of the image given, scores, labels, masks.
    """

    def __init__(self, neck: nn.Module | None, rpn: Proposals, heads: Heads, short_sides: Sequence[int],
                 long_side: int):
        super().__init__()
        self.neck, self.rpn, self.heads = neck, rpn, heads
        # At test torchvision takes the last of the short sides. 32: see Anchors, and a ResNet halves five times.
        self.transform = GeneralizedRCNNTransform(tuple(short_sides), long_side, list(IMAGENET_MEAN),
                                                  list(IMAGENET_STD), size_divisible=32)

    def forward(self, backbone: nn.Module, images: list[Tensor], targets: list[dict] | None = None):
        given, names = [x.shape[-2:] for x in images], stages(backbone)
        batch, targets = self.transform(images, targets)
        maps = trunk(backbone, batch.tensors, names[:-1] if self.neck is None else names)
        maps = maps[-1:] if self.neck is None else [*self.neck(OrderedDict(zip(names, maps, strict=True))).values()]
        proposals, losses = self.rpn(batch, OrderedDict(enumerate(maps)), targets)
        found, more = self.heads(maps, proposals, batch.image_sizes, targets, getattr(backbone, names[-1]))
        if self.training:
            return losses | more
        for one, (h, w), (height, width) in zip(found, batch.image_sizes, given, strict=True):
            one["boxes"] = one["boxes"] * one["boxes"].new_tensor([width / w, height / h] * 2)
        return found


def c4(backbone: nn.Module, classes: int, masks: bool, *, short_sides, long_side, anchors, proposals, rpn_batch,
       **numbers) -> RCNN:
    """Everything before the last stage is the body. `proposals`: train before and after NMS, test before and after."""
    *_, (body, stride), (width, _) = shapes(backbone)
    rpn = _rpn(Anchors((anchors,), (stride,)), body, proposals, rpn_batch)
    return RCNN(None, rpn, C4Heads(width, stride, classes, masks, **numbers), short_sides, long_side)


def fpn(backbone: nn.Module, classes: int, masks: bool, *, short_sides, long_side, proposals, rpn_batch, anchors=(),
        **numbers) -> RCNN:
    """Every stage gives a map, and the coarsest one once more at half its size; an anchor has 8 times the stride."""
    widths, strides = zip(*shapes(backbone), strict=True)
    neck = FeaturePyramidNetwork(list(widths), 256, LastLevelMaxPool(), norm_layer=nn.BatchNorm2d)
    every = (*strides, 2 * strides[-1])
    rpn = _rpn(Anchors([(8 * s,) for s in every], every), 256, proposals, rpn_batch)
    return RCNN(neck, rpn, FPNHeads(256, strides, classes, masks, **numbers), short_sides, long_side)


def _rpn(anchors: Anchors, width: int, proposals: Sequence[int], batch: int) -> Proposals:
    before, after = ({"training": proposals[i], "testing": proposals[i + 2]} for i in (0, 1))
    return Proposals(anchors, FloatRPNHead(width, anchors.num_anchors_per_location()[0]), 0.7, 0.3, batch, 0.5,
                     before, after, 0.7)


def paste(mask: Tensor, box: Tensor, width: int, height: int) -> Tensor:
    """A mask (m, m) of probabilities, that of a box (4,), in an image: (height, width) bool."""
    x, y = (torch.arange(n, device=box.device) + 0.5 for n in (width, height))
    x, y = ((v - box[i]) / (box[i + 2] - box[i]) * 2 - 1 for v, i in ((x, 0), (y, 1)))
    grid = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], 2)
    return F.grid_sample(mask[None, None].float(), grid[None], align_corners=False)[0, 0] >= 0.5
