"""Average precision of a detector as Pascal VOC counts it, and as COCO does.

VOC, in the form of detectron2's evaluator, with which MoCo's numbers were made: detections of a class over all images,
the surest first; each claims the object it overlaps most, if by more than the threshold, and an object can be claimed
once. Precision is the share of claims that are right so far, recall the share of objects found so far.
    11 points (VOC 2007): mean over recall r = 0, 0.1, …, 1 of the best precision at a recall of at least r
    area (later years):   the area under that same falling envelope
AP50 and AP75 need an overlap (intersection over union) of 0.5 and 0.75, AP is the mean over 0.5, 0.55, …, 0.95.

Detections are rows in the form of COCO's results: image_id, category_id, bbox (x, y, width, height) in px, score.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..boxes import Boxes
from ..errors import InputError
from ..segments import coco_masks

THRESHOLDS = np.arange(50, 100, 5) / 100
DRAWS = 200  # resampled test sets for an interval


@dataclass
class Claims:
    """The detections of one class, the surest first, and the object that each overlaps most."""

    score: np.ndarray  # (D,)
    image: np.ndarray  # (D,) place of the image in the set
    overlap: np.ndarray  # (D,) with that object, 0 if the image has none
    object: np.ndarray  # (D,) its place among all objects, -1 if the image has none
    difficult: np.ndarray  # (D,) whether that object is difficult, so that the detection does not count
    wanted: np.ndarray  # (N,) objects of each image that count

    def right(self, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """(D,) bool, twice: which are right, and which are wrong, the second claim of an object among them."""
        close = self.overlap > threshold
        valid = close & ~self.difficult
        right = np.zeros(len(close), bool)
        _, first = np.unique(self.object[valid], return_index=True)
        right[np.flatnonzero(valid)[first]] = True
        return right, ~right & ~(close & self.difficult)

    def curve(self, threshold: float, times: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Precision and recall (D,) after each detection; one nan where there is nothing to find, whatever was
        detected. `times` (N,): how often each image counts."""
        right, wrong = self.right(threshold)
        weight = 1.0 if times is None else times[self.image]
        hits, misses = np.cumsum(right * weight), np.cumsum(wrong * weight)
        wanted = self.wanted.sum() if times is None else (self.wanted * times).sum()
        if not wanted:
            return np.full(1, np.nan), np.full(1, np.nan)
        return hits / np.maximum(hits + misses, np.finfo(float).eps), hits / wanted


def overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of (4,) with (M, 4), in VOC's pixels: the last one belongs to the box, hence + 1."""
    corner, end = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    common = np.prod((end - corner + 1).clip(0), 1)
    return common / (np.prod(box[2:] - box[:2] + 1) + np.prod(boxes[:, 2:] - boxes[:, :2] + 1, 1) - common)


def average_precision(precision: np.ndarray, recall: np.ndarray, eleven_points: bool) -> float:
    """In [0, 1]; nan where there is nothing to find."""
    if np.isnan(recall).any():
        return float("nan")
    if eleven_points:  # these floats are not quite 0.3, 0.6, 0.7; detectron2 has the same ones
        return float(sum(precision[recall >= r].max(initial=0.0) for r in np.arange(0.0, 1.1, 0.1)) / 11)
    recall, precision = np.concatenate([[0], recall, [1]]), np.concatenate([[0], precision, [0]])
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall) * best[1:]).sum())


def claims(images: Boxes, detections: Sequence[dict]) -> list[Claims]:
    """One entry per class. Errors: InputError for a detection in an image that is not in the set."""
    place, number = {int(k): i for i, k in enumerate(images.ids)}, {k: c for c, k in enumerate(images.category_ids)}
    strange = next((d for d in detections if d["image_id"] not in place or d["category_id"] not in number), None)
    if strange:
        raise InputError(f"A detection is in image {strange['image_id']} and of category {strange['category_id']}, but "
                         f"{images.name} ({images.split}) has no such image or category.")
    where = np.array([place[d["image_id"]] for d in detections], np.int64)
    kinds = np.array([number[d["category_id"]] for d in detections], np.int64)
    boxes = np.array([d["bbox"] for d in detections], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    # As the text files that VOC's tool reads: pixels from 1, one decimal; scores with three.
    boxes, scores = (boxes + [1, 1, 0, 0]).round(1), np.array([d["score"] for d in detections], np.float64).round(3)
    everything, truth = images.everything, images.everything.boxes + [1, 1, 0, 0]
    owner = np.repeat(np.arange(len(images)), np.diff(images.starts))
    found = []
    for c in range(len(images.classes)):
        mine = np.flatnonzero(kinds == c)
        mine = mine[np.argsort(-scores[mine], kind="stable")]  # after rounding many are equal: then in their order
        rows = np.flatnonzero(everything.classes == c)
        edges = np.searchsorted(owner[rows], np.arange(len(images) + 1))
        overlap, best = np.zeros(len(mine)), np.full(len(mine), -1)
        for d, m in enumerate(mine):
            of_image = rows[edges[where[m]]:edges[where[m] + 1]]
            if len(of_image):
                shares = overlaps(boxes[m], truth[of_image])
                overlap[d], best[d] = shares.max(), of_image[shares.argmax()]
        difficult = (best >= 0) & everything.special[best] if len(everything) else best >= 0
        found.append(Claims(scores[mine], where[mine], overlap, best, difficult,
                            np.bincount(owner[rows[~everything.special[rows]]], minlength=len(images))))
    return found


def voc_ap(images: Boxes, detections: Sequence[dict], seed: int = 0) -> dict:
    """ap50, ap, ap75 in %, those of `classes` at 0.5, and a 95 % interval of ap50: over draws of the test images, for
    the test set is finite; it knows nothing of training seeds. A class without objects does not count.
    Errors: InputError if there is nothing to find."""
    if images.everything.special.all():
        raise InputError(f"{images.name} ({images.split}) has no object that a detector should find.")
    eleven, every = images.rule == "voc 11 points", claims(images, detections)

    def mean(threshold: float, times: np.ndarray | None = None) -> list[float]:
        return [100 * average_precision(*c.curve(threshold, times), eleven) for c in every]

    table = np.array([mean(t) for t in THRESHOLDS])  # thresholds x classes
    over, rng = np.nanmean(table, 1), np.random.default_rng(seed)
    draws = [np.nanmean(mean(0.5, rng.multinomial(len(images), np.full(len(images), 1 / len(images)))))
             for _ in range(DRAWS)]
    return {"ap50": over[0].item(), "ap": over.mean().item(), "ap75": over[5].item(),
            "interval": np.quantile(draws, [0.025, 0.975]).tolist(),
            "classes": dict(zip(images.classes, table[0].tolist(), strict=True))}


def coco_ap(images: Boxes, detections: Sequence[dict], masks: bool = False) -> dict:
    """ap50, ap, ap75 in % by COCO's own rules, of boxes or of masks. Crowds are kept: what lies in one is not wrong."""
    coco_masks()
    from faster_coco_eval import COCO, COCOeval_faster

    if not detections:
        return {"ap50": 0.0, "ap": 0.0, "ap75": 0.0}
    truth, hidden = COCO(images.as_coco()), "bbox" if masks else "segmentation"  # the tool would take areas from boxes
    copies = [{k: v for k, v in d.items() if k != hidden} for d in detections]  # and write into what it gets
    told = COCOeval_faster(truth, truth.loadRes(copies), "segm" if masks else "bbox")
    told.evaluate()
    told.accumulate()
    told.summarize()
    ap, ap50, ap75 = (100 * float(told.stats[k]) for k in range(3))
    return {"ap50": ap50, "ap": ap, "ap75": ap75}


def guesses(images: Boxes, train: Boxes, each: int = 20, seed: int = 0) -> list[dict]:
    """What nobody looked for: in every image `each` boxes as large as things of `train`, of their classes, anywhere."""
    rng, found = np.random.default_rng(seed), []
    for i, (width, height) in enumerate(images.sizes):
        for m in rng.integers(len(train.everything), size=each):
            w, h = np.minimum(train.everything.boxes[m, 2:] - train.everything.boxes[m, :2], (width, height))
            found.append({"image_id": int(images.ids[i]), "score": rng.random(),
                          "category_id": images.category_ids[train.everything.classes[m]],
                          "bbox": [rng.uniform(0, width - w), rng.uniform(0, height - h), float(w), float(h)]})
    return found
