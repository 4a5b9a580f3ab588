"""Detection: boxes and their files, every number of the detectors, average precision, and runs on small sets."""

import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslnb import Run, data, prepare, pretrain
from sslnb.boxes import VOC_CLASSES, Boxes, Objects, write_coco, write_voc
from sslnb.errors import InputError
from sslnb.evaluate import detector as rcnn
from sslnb.evaluate import train_protocol
from sslnb.evaluate.detection import DETECTION, Canvas, Detector, shrunk
from sslnb.evaluate.sources import Source
from sslnb.evaluate.voc_ap import THRESHOLDS, average_precision, claims, coco_ap, guesses, overlaps, voc_ap
from sslnb.segments import decoded, runs

SMALL = {"steps": 4, "milestones": (3,), "batch": 4, "regions": 16, "precise_batches": 2, "above": 0.0, "most": 10}
XML = """<annotation><size><width>{w}</width><height>{h}</height><depth>3</depth></size><object><name>{name}</name>
<difficult>{hard}</difficult><bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}
</ymax></bndbox></object></annotation>"""


def few(split, n):
    return data.load("clothes_in_photos", split).subset(range(n))


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """24 training and 10 test images in both layouts."""
    folder = tmp_path_factory.mktemp("sets")
    for images in (few("train", 24), few("test", 10)):
        write_voc(images, folder / "voc")
        write_coco(images, folder / "coco")
    return folder


def boxes_of(truth, special=(), rule="voc area", sizes=(200, 200)):
    """A set of images with one class and these boxes, one list per image."""
    flat = np.array([b for image in truth for b in image], float).reshape(-1, 4)
    hard = np.isin(np.arange(len(flat)), special)
    return Boxes("made", "test", np.zeros((len(truth), 8, 8), np.uint8), sizes=np.array([sizes] * len(truth)),
                 counts=[len(i) for i in truth], objects=Objects(flat, np.zeros(len(flat), int), hard,
                 np.prod(flat[:, 2:] - flat[:, :2], 1)), classes=["thing"], rule=rule,
                 ids=range(10, 10 + len(truth)), category_ids=[7])


def rows(*found):
    """(image, x1, y1, x2, y2, score) -> detections."""
    return [{"image_id": i, "category_id": 7, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": s}
            for i, x1, y1, x2, y2, s in found]


# ---------------------------------------------------------------- average precision


def test_a_class_without_objects_does_not_count_whatever_was_detected():
    images = boxes_of([[(0, 0, 10, 10)]])
    images.classes, images.category_ids = ["thing", "absent"], [7, 8]
    found = rows((10, 0, 0, 10, 10, 0.9))
    wrong = [{**found[0], "category_id": 8}]
    for detections in (found, found + wrong):
        row = voc_ap(images, detections)
        assert row["ap50"] == 100 and row["interval"] == [100, 100] and math.isnan(row["classes"]["absent"])


def test_average_precision_by_hand():
    images = boxes_of([[(0, 0, 10, 10)], [(50, 50, 90, 90)]])
    found = rows((10, 0, 0, 10, 10, 0.9), (10, 100, 100, 120, 120, 0.8), (11, 50, 50, 90, 90, 0.7))
    (c,) = claims(images, found)
    precision, recall = c.curve(0.5)
    assert precision == pytest.approx([1, 1 / 2, 2 / 3]) and recall == pytest.approx([0.5, 0.5, 1.0])
    assert average_precision(precision, recall, False) == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert average_precision(precision, recall, True) == pytest.approx((6 + 5 * 2 / 3) / 11)  # r = 0 … 0.5, 0.6 … 1
    assert voc_ap(images, found)["ap50"] == pytest.approx(100 * (0.5 + 0.5 * 2 / 3))
    images.rule = "voc 11 points"
    assert voc_ap(images, found)["ap50"] == pytest.approx(100 * (6 + 5 * 2 / 3) / 11)


def test_a_difficult_object_is_neither_wanted_nor_wrong_and_a_second_claim_is_wrong():
    images = boxes_of([[(0, 0, 10, 10), (50, 50, 90, 90)]], special=[1])
    hard, right = (10, 50, 50, 90, 90, 0.9), (10, 0, 0, 10, 10, 0.8)
    assert voc_ap(images, rows(hard, right))["ap"] == 100.0
    (c,) = claims(images, rows(right, (10, 0, 0, 10, 10, 0.7), hard, hard))
    assert c.wanted.tolist() == [1] and [x.tolist() for x in c.right(0.5)] == [
        [False, False, True, False], [False, False, False, True]]
    with pytest.raises(InputError, match=r"made \(test\) has no object that a detector should find"):
        voc_ap(boxes_of([[], []]), rows(hard))


def test_overlap_is_that_of_sets_of_pixels():
    """In VOC's files the last pixel belongs to the box."""
    def pixels(x1, y1, x2, y2):
        return {(x, y) for x in range(x1, x2 + 1) for y in range(y1, y2 + 1)}

    rng = np.random.default_rng(0)
    corners = rng.integers(1, 12, (30, 2))
    drawn = np.concatenate([corners, corners + rng.integers(0, 9, (30, 2))], 1)
    for box in drawn[:10]:
        counted = [len(pixels(*box) & pixels(*b)) / len(pixels(*box) | pixels(*b)) for b in drawn]
        assert overlaps(box.astype(float), drawn.astype(float)) == pytest.approx(counted)


def test_an_overlap_must_be_more_than_the_threshold_and_numbers_are_those_of_a_text_file():
    images = boxes_of([[(0, 0, 4, 4)]])
    assert voc_ap(images, rows((10, 0, 0, 4, 2, 0.9)))["ap50"] == 0.0  # half of it exactly
    assert voc_ap(images, rows((10, 0, 0, 4, 3, 0.9)))["ap50"] == 100.0
    assert voc_ap(images, rows((10, 0, 0, 4, 2.04, 0.9)))["ap50"] == 0.0  # the file says 2.0
    tied = rows((10, 20, 20, 30, 30, 0.90012), (10, 0, 0, 4, 4, 0.9004))  # the file says 0.900 twice
    assert claims(images, tied)[0].score.tolist() == [0.9, 0.9]
    assert voc_ap(images, tied)["ap50"] == 50.0


def noisy(images, seed=0, shift=4.0):
    """Detections as a fair detector makes them: most objects with shifted boxes, some twice, and some of nothing."""
    rng, found = np.random.default_rng(seed), []
    for i in range(len(images)):
        here = images.objects(i)
        for box, k in zip(here.boxes, here.classes):
            for _ in range(rng.choice([0, 1, 1, 1, 2])):
                b = box + rng.normal(0, shift, 4)
                found.append((i, k if rng.random() < 0.9 else rng.integers(4), b, rng.random() ** 0.5))
        for _ in range(rng.poisson(1.0)):
            x, y = rng.uniform(0, 80, 2)
            found.append((i, rng.integers(4), np.array([x, y, x + 30, y + 30]), rng.random()))
    return [{"image_id": int(images.ids[i]), "category_id": images.category_ids[k], "score": float(s),
             "bbox": [*b[:2].tolist(), *(b[2:] - b[:2]).clip(1).tolist()]} for i, k, b, s in found]


def plain_ap(images, detections, c, threshold, eleven):
    """Written once more, image by image and with loops only."""
    truth = {int(k): [[b + [1, 1, 0, 0], hard, False] for b, kind, hard in
                      zip(o.boxes, o.classes, o.special) if kind == c]
             for k, o in ((k, images.objects(i)) for i, k in enumerate(images.ids))}
    wanted = sum(not hard for objects in truth.values() for _, hard, _ in objects)
    mine = sorted((d for d in detections if d["category_id"] == images.category_ids[c]),
                  key=lambda d: -round(d["score"], 3))
    hits, points = 0, []
    counted = 0
    for d in mine:
        x, y, w, h = d["bbox"]
        box = [round(v, 1) for v in (x + 1, y + 1, x + w, y + h)]
        best, which = 0.0, None
        for one in truth[d["image_id"]]:
            sides = [min(box[k + 2], one[0][k + 2]) - max(box[k], one[0][k]) + 1 for k in (0, 1)]
            common = max(0, sides[0]) * max(0, sides[1])
            area = sum((b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (box, one[0])) - common
            if common / area > best:
                best, which = common / area, one
        if best > threshold and which[1]:
            points.append(points[-1] if points else (0.0, 0.0))
            continue
        counted += 1
        if best > threshold and not which[2]:
            which[2], hits = True, hits + 1
        points.append((hits / wanted, hits / counted))
    if eleven:
        return sum(max((p for r, p in points if r >= k), default=0) for k in np.arange(0.0, 1.1, 0.1)) / 11
    levels = sorted({r for r, _ in points})
    return sum((r - before) * max(p for q, p in points if q >= r) for before, r in zip([0.0, *levels], levels))


@pytest.mark.parametrize("rule", ["voc area", "voc 11 points"])
def test_voc_is_the_same_as_a_second_evaluation_with_loops(rule):
    images = few("test", 60)
    images.rule, rng = rule, np.random.default_rng(3)
    images.everything.special[:] = rng.random(len(images.everything)) < 0.15
    found = noisy(images)
    table = np.array([[100 * plain_ap(images, found, c, t, rule != "voc area") for c in range(4)] for t in THRESHOLDS])
    told = voc_ap(images, found)
    assert told["ap50"] == pytest.approx(table[0].mean()) and told["ap75"] == pytest.approx(table[5].mean())
    assert told["ap"] == pytest.approx(table.mean()) and list(told["classes"].values()) == pytest.approx(table[0])
    assert 10 < told["ap"] < told["ap50"] < 95 and told["interval"][0] < told["ap50"] < told["interval"][1]


def test_the_area_under_the_curve_is_nearly_what_coco_counts_at_one_overlap():
    images = few("test", 150)
    images.everything.special[:] = False
    found = noisy(images, seed=1)
    voc, coco = voc_ap(images, found), coco_ap(images, found)
    for name in ("ap50", "ap75", "ap"):  # 101 points instead of every one, and an object may be second choice
        assert voc[name] == pytest.approx(coco[name], abs=1.0)


def test_an_image_that_is_drawn_never_is_an_image_that_is_not_there():
    images = few("test", 30)
    found, times = noisy(images), np.arange(30) % 3  # some never, some twice
    for c, twice in zip(claims(images, found), claims(images.subset(np.flatnonzero(times == 1)), [
            d for d in found if times[list(images.ids).index(d["image_id"])] == 1])):
        counted = average_precision(*c.curve(0.5, (times == 1).astype(int)), False)
        assert counted == pytest.approx(average_precision(*twice.curve(0.5), False))
    assert average_precision(*c.curve(0.5, np.ones(30)), True) == average_precision(*c.curve(0.5), True)


def test_coco_numbers_are_those_of_the_evaluator_on_the_files(layouts, tmp_path):
    from faster_coco_eval import COCO, COCOeval_faster

    images = data.load(layouts / "coco", "test")
    found = noisy(images, seed=2, shift=2.0)
    (tmp_path / "found.json").write_text(json.dumps(found))
    truth = COCO(str(layouts / "coco" / "annotations" / "instances_val2017.json"))
    told = COCOeval_faster(truth, truth.loadRes(str(tmp_path / "found.json")), "bbox")
    told.evaluate(), told.accumulate(), told.summarize()
    before = json.dumps(found)
    assert list(coco_ap(images, found).values()) == pytest.approx([100 * told.stats[k] for k in (1, 0, 2)])
    assert 10 < coco_ap(images, found)["ap"] < 90 and json.dumps(found) == before


def test_the_truth_itself_scores_100_in_boxes_and_masks():
    images = few("test", 20)
    whole = images.as_coco()["annotations"]
    from faster_coco_eval.core import mask as tool

    for row in whole:
        form = tool.encode(np.asfortranarray(decoded(json.dumps(row["segmentation"]), 1, 1).astype(np.uint8)))
        row |= {"score": 0.9, "segmentation": {**form, "counts": form["counts"].decode()}}
    assert voc_ap(images, whole)["ap"] == pytest.approx(100.0)
    for masks in (False, True):
        assert coco_ap(images, whole, masks) == pytest.approx({"ap50": 100, "ap": 100, "ap75": 100})
    assert coco_ap(images, [])["ap"] == voc_ap(images, [])["ap"] == 0.0


# ---------------------------------------------------------------- the data


def test_masks_survive_as_runs():
    rng = np.random.default_rng(0)
    for mask in (rng.random((5, 7)) < 0.5, np.ones((3, 2), bool), np.zeros((3, 2), bool)):
        assert np.array_equal(decoded(json.dumps(runs(mask)), 1, 1), mask)
        assert sum(runs(mask)["counts"]) == mask.size and runs(mask)["size"] == list(mask.shape)


def test_polygons_and_packed_runs_are_read_too():
    square = decoded(json.dumps([[2, 3, 6, 3, 6, 8, 2, 8], [8, 0, 9, 0, 9, 1, 8, 1]]), 10, 12)  # two parts
    assert square.shape == (12, 10) and square[3:8, 2:6].all() and square[0, 8] and square.sum() == 21
    assert decoded(json.dumps([[2, 3, 6, 3, 6, 8, 2, 8], [8, 0, 9, 5]]), 10, 12).sum() == 20  # two corners: no area
    assert decoded(json.dumps([[8, 0, 9, 5]]), 10, 12).shape == (12, 10)
    assert not decoded(json.dumps([[8, 0, 9, 5]]), 10, 12).any()
    from faster_coco_eval.core import mask as tool

    packed = tool.encode(np.asfortranarray(square.astype(np.uint8)))
    text = json.dumps({"size": [12, 10], "counts": packed["counts"].decode()})
    assert np.array_equal(decoded(text, 10, 12), square)


def test_both_layouts_give_back_what_was_written(layouts):
    for split, n in (("train", 24), ("test", 10)):
        images = few(split, n)
        voc, coco = (data.load(layouts / name, split) for name in ("voc", "coco"))
        for read in (voc, coco):
            assert np.array_equal(read.everything.boxes, images.everything.boxes)
            assert [read.classes[k] for k in read.everything.classes] == [
                images.classes[k] for k in images.everything.classes]
            assert np.array_equal(read.sizes, images.sizes) and np.array_equal(read.starts, images.starts)
            assert all(read[i].size == tuple(read.sizes[i]) for i in range(n))
        assert voc.rule == "voc 11 points" and coco.rule == "coco" and coco.category_ids == [1, 2, 8, 9]
        assert all(np.array_equal(coco.mask(i, j), images.mask(i, j))
                   for i in range(n) for j in range(len(images.targets(i))))
        assert coco.as_coco()["annotations"] == images.as_coco()["annotations"]


def test_a_box_of_the_embedded_set_is_that_of_its_mask():
    for split in ("train", "test"):
        images = data.load("clothes_in_photos", split)
        assert len(images) == {"train": 600, "test": 150}[split] and images.labels is None
        for i in range(0, len(images), 10):
            masks = [images.mask(i, j).astype(int) for j in range(len(images.objects(i)))]
            assert sum(masks).max() == 1, "of two things over each other only the upper one is seen"
            for j, box in enumerate(images.objects(i).boxes.astype(int)):
                y, x = np.nonzero(images.mask(i, j))
                assert [x.min(), y.min(), x.max() + 1, y.max() + 1] == box.tolist()
                assert images.objects(i).areas[j] == len(x)


def dev_kit(folder, years, name="dog", box=(1, 1, 40, 30), hard=0, w=40, h=30, lists=("trainval", "test")):
    for year in years:
        root = folder / f"VOC{year}"
        for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (root / part).mkdir(parents=True)
        for split in lists if year == 2007 or len(years) == 1 else lists[:1]:
            (root / "ImageSets" / "Main" / f"{split}.txt").write_text(f"{year}_{split}\n")
            text = XML.format(w=w, h=h, name=name, box=box, hard=hard)
            (root / "Annotations" / f"{year}_{split}.xml").write_text(text)
            (root / "JPEGImages" / f"{year}_{split}.jpg").write_bytes(b"")
    return folder


def test_voc_is_trained_on_both_years_and_tested_on_2007(tmp_path):
    kit = dev_kit(tmp_path / "VOCdevkit", (2007, 2012), hard=1)
    train, test = (data.load(kit, split) for split in ("train", "test"))
    assert [train.where(i).split("/")[-3:] for i in (0, 1)] == [
        [f"VOC{year}", "JPEGImages", f"{year}_trainval.jpg"] for year in (2007, 2012)]
    assert len(test) == 1 and test.rule == "voc 11 points" and train.classes == VOC_CLASSES
    assert train.everything.boxes.tolist() == [[0, 0, 40, 30]] * 2  # VOC counts pixels from 1
    assert test.everything.special.all() and len(train.targets(0)) == 1, "difficult ones are trained on"
    assert data.load(tmp_path, "train").name == str(tmp_path)  # the folder above is understood as well
    assert data.load(dev_kit(tmp_path / "other", (2012,)), "test").rule == "voc area"


def test_classes_of_ones_own_need_no_lists_and_are_numbered_alike_in_both_splits(tmp_path):
    kit, names = dev_kit(tmp_path, (2007,)), {"trainval": "trouser", "test": "dog"}
    for split, name in names.items():
        file = kit / "VOC2007" / "Annotations" / f"2007_{split}.xml"
        file.write_text(XML.format(w=40, h=30, name=f" {name}\n", box=(1, 1, 40, 30), hard=0))
    both = train, test = data.load(kit, "train"), data.load(kit, "test")
    assert train.classes == test.classes == ["dog", "trouser"]
    assert [images.classes[images.everything.classes[0]] for images in both] == ["trouser", "dog"]


def test_crowds_and_boxes_without_an_area_are_not_trained_on_but_evaluated(tmp_path, layouts):
    file = tmp_path / "annotations" / "instances_train2017.json"
    write_coco(few("train", 6), tmp_path)
    whole = json.loads(file.read_text())
    first = whole["images"][0]["id"]
    for row in whole["annotations"]:
        row["iscrowd"] = int(row["image_id"] == first)
    other = next(r for r in whole["annotations"] if r["image_id"] != first)
    whole["annotations"].append({**other, "id": 999, "bbox": [5, 5, 0, 9]})
    other["bbox"][0] -= 200  # it is 200 px too far left …
    other["bbox"][2] += 200.5  # … and ends half a pixel further right
    file.write_text(json.dumps(whole))
    images = data.load(tmp_path, "train")
    assert len(images) == 5 and first not in images.ids
    i = list(images.ids).index(other["image_id"])
    assert len(images.targets(i)) == len(images.objects(i)) - 1
    at = [r["id"] for r in whole["annotations"] if r["image_id"] == other["image_id"]].index(other["id"])
    cut = images.targets(i).boxes[at]
    assert cut[0] == 0 and cut[2] <= images.sizes[i][0] and images.objects(i).boxes[at][0] < 0
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(whole))
    for k in whole["images"]:
        (tmp_path / "val2017" / k["file_name"]).write_bytes((tmp_path / "train2017" / k["file_name"]).read_bytes())
    test = data.load(tmp_path, "test")
    crowds = [a["iscrowd"] for a in test.as_coco()["annotations"] if a["image_id"] == first]
    assert len(test) == 6 and crowds and all(crowds)


def test_broken_files_are_named_in_a_sentence(tmp_path):
    def refused(sentence, split="train", **what):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(InputError, match=sentence):
            data.load(dev_kit(folder, (2007,), **what), split)

    refused("2007_trainval.jpg is 40 x 30 px, and a box of it, .*, lies outside", box=(60, 1, 90, 20))
    refused("is no annotation of VOC .*; it needs size/width", w="wide")
    refused("is no annotation of VOC", name="<", h="30")
    refused(r"has no list VOC\*/ImageSets/Main/test.txt for the split 'test'", "test", lists=("trainval",))
    refused("No image of .* has a box to learn from", box=(5, 5, 4, 9))  # of no width
    refused("No image of .* has a box to learn from", box=(41.5, 5, 45, 9))  # half a pixel outside
    kit = dev_kit(tmp_path / "dgo", (2007,), name="dgo")
    for part in ("trainval", "test"):
        (kit / "VOC2007" / "ImageSets" / "Main" / f"dog_{part}.txt").touch()
        with pytest.raises(InputError, match=f"Unknown class in .*2007_{part}.xml, of which ImageSets/Main has no list,"
                           " 'dgo': did you mean 'dog'"):
            data.load(kit, {"trainval": "train"}.get(part, part))
    kit = dev_kit(tmp_path / "kit", (2007,))
    (kit / "VOC2007" / "JPEGImages" / "2007_test.jpg").unlink()
    with pytest.raises(InputError, match="The image .*2007_test.jpg, which the annotations .* name, is not there"):
        data.load(kit, "test")
    (kit / "VOC2007" / "Annotations" / "2007_trainval.xml").unlink()
    with pytest.raises(InputError, match="There is no annotation .*2007_trainval.xml, which the list of images asks"):
        data.load(kit, "train")


def test_broken_coco_files_are_named_in_a_sentence(tmp_path):
    write_coco(few("train", 2), tmp_path)
    file = tmp_path / "annotations" / "instances_train2017.json"
    whole = json.loads(file.read_text())
    with pytest.raises(InputError, match="There is no .*instances_val2017.json for the split 'test'"):
        data.load(tmp_path, "test")
    for change, sentence in (({"categories": whole["categories"][:1]}, "Unknown category_id in .*, "),
                             ({"images": whole["images"][:1]}, "none with the id 2 that an annotation is for"),
                             ({"annotations": None}, "is no annotation file of COCO .*; it needs images"),
                             ({"images": []}, "has 0 images")):
        file.write_text(json.dumps(whole | change))
        with pytest.raises(InputError, match=sentence):
            data.load(tmp_path, "train")


# ---------------------------------------------------------------- geometry


@pytest.fixture
def method():
    torch.manual_seed(0)
    made = DETECTION["detect_demo"].with_(masks=True, **SMALL).build().train()
    made.images = data.load("clothes_in_photos")
    return made


@pytest.mark.parametrize("size", [128, 96])
@pytest.mark.parametrize("flip", [False, True])
def test_a_thing_stays_in_its_box(method, size, flip):
    for i in range(12):
        (canvas,) = method.views(size)([method.images[i]])
        image, target = method.cut_out(canvas[0], i)
        assert image.shape[1:] == shrunk(method.images.sizes[i], size)[::-1]
        assert not canvas[0, :, image.shape[1]:].any() and not canvas[0, :, :, image.shape[2]:].any()
        before = image
        if flip:
            image, target = method.flipped(image, target)
            assert torch.equal(image.flip(2), before)
        for box, mask in zip(target["boxes"], target["masks"]):
            y, x = mask.nonzero().unbind(1)
            tight = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1])
            assert (tight - box).abs().max() <= (0 if size == 128 else 1)
        assert target["labels"].tolist() == (method.images.targets(i).classes + 1).tolist()
        assert size < 128 or torch.equal((before * 255).byte().permute(1, 2, 0),
                                         torch.from_numpy(np.array(method.images[i])))


def test_a_large_image_is_shrunk_and_a_small_one_is_not():
    from PIL import Image

    assert shrunk((500, 375), 500) == (500, 375) and shrunk((1000, 375), 500) == (500, 188)
    assert shrunk((3000, 2), 100) == (100, 1)
    tall = Canvas(50)(Image.new("RGB", (40, 100), "white"))
    assert tall.size == (50, 50) and np.array(tall)[:, :20].min() == 255 and np.array(tall)[:, 20:].max() == 0


def test_detections_come_back_in_pixels_of_the_image(method):
    """A detector that always answers the same place of what it is shown."""
    def fixed(backbone, images):
        h, w = images[0].shape[1:]
        return [{"boxes": torch.tensor([[0.25 * w, 0.5 * h, 0.75 * w, h]]), "labels": torch.tensor([3]),
                 "scores": torch.tensor([0.5]), "masks": torch.ones(1, 14, 14)}]

    images = method.images
    del method.model
    method.model = fixed
    for size in (128, 64):
        (row,) = method.detect(images, 1, torch.zeros(3, size, size))
        w, h = images.sizes[1]
        assert row["bbox"] == pytest.approx([0.25 * w, 0.5 * h, 0.5 * w, 0.5 * h], abs=0.51)
        assert row["category_id"] == images.category_ids[2] and row["image_id"] == images.ids[1]
        mask = decoded(json.dumps(row["segmentation"]), w, h)
        assert mask.shape == (h, w) and mask[h // 2 + 1:, w // 4 + 1:3 * w // 4 - 1].all()
        assert abs(mask.sum() - w * h / 4) < 0.04 * w * h


def test_the_detector_answers_in_pixels_of_what_it_was_given(method):
    class Half(nn.Module):  # always the left half of the enlarged image
        def forward(self, maps, proposals, sizes, targets, last):
            return [{"boxes": torch.tensor([[0.0, 0, w / 2, h]])} for h, w in sizes], {}

    method.eval().model.heads = Half()
    found = method.model(method.backbone, [torch.rand(3, 40, 60), torch.rand(3, 90, 30)])
    assert found[0]["boxes"][0].tolist() == pytest.approx([0, 0, 30, 40], abs=1e-4)
    assert found[1]["boxes"][0].tolist() == pytest.approx([0, 0, 15, 90], abs=1e-4)


def test_guessed_boxes_are_inside_and_as_large_as_real_ones():
    images, train = few("test", 5), few("train", 50)
    found = guesses(images, train, each=7)
    assert len(found) == 35 and voc_ap(images, found)["ap50"] < 5
    sides = {tuple(b) for b in train.everything.boxes[:, 2:] - train.everything.boxes[:, :2]}
    for d in found:
        x, y, w, h = d["bbox"]
        width, height = images.sizes[list(images.ids).index(d["image_id"])]
        assert (w, h) in sides and x >= 0 and y >= 0 and x + w <= width and y + h <= height


def test_of_a_small_set_as_many_things_are_shown_as_there_are():
    from sslnb import figures

    assert len(figures.things(few("test", 3), range(8)).axes) == 3


def test_a_mask_is_pasted_where_its_box_is():
    whole = rcnn.paste(torch.ones(14, 14), torch.tensor([2.0, 3.0, 6.0, 8.0]), 10, 12)
    wanted = torch.zeros(12, 10, dtype=torch.bool)
    wanted[3:8, 2:6] = True
    assert torch.equal(whole, wanted)
    half = torch.zeros(14, 14)
    half[:, 7:] = 1
    assert torch.equal(rcnn.paste(half, torch.tensor([0.0, 0.0, 10.0, 4.0]), 10, 4).float().mean(0),
                       torch.tensor([0.0] * 5 + [1.0] * 5))


# ---------------------------------------------------------------- the detector


@pytest.fixture(scope="module")
def real():
    """The detectors of VOC and COCO, without memory."""
    with torch.device("meta"):
        return {name: recipe.build().train() for name, recipe in DETECTION.items()}


def test_the_protocols_are_those_of_the_spec():
    voc, once, twice = (DETECTION[f"detect_{name}"] for name in ("voc_c4", "coco_c4_1x", "coco_c4_2x"))
    for r in (voc, once, twice, DETECTION["detect_coco_fpn_1x"], DETECTION["detect_coco_fpn_2x"]):
        assert (r.total_batch, r.lr, r.weight_decay, r.sgd_momentum, r.optimizer) == (16, 0.02, 1e-4, 0.9, "sgd")
        assert r.warmup_from == 0.001 and r.gamma == 0.1 and r.backbone == "resnet50"
    assert (voc.steps, voc.milestones, voc.warmup_steps) == (24_000, (18_000, 22_000), 100)
    assert (once.steps, once.milestones, once.warmup_steps) == (90_000, (60_000, 80_000), 1000)
    assert (twice.steps, twice.milestones, twice.warmup_steps) == (180_000, (120_000, 160_000), 1000)
    for c4, fpn in ((once, "detect_coco_fpn_1x"), (twice, "detect_coco_fpn_2x")):
        r = DETECTION[fpn]
        assert (r.steps, r.milestones, r.warmup_steps) == (c4.steps, c4.milestones, c4.warmup_steps)
    rate = [voc.lr_at(s, 1034) for s in (0, 50, 100, 17_999, 18_000, 21_999, 22_000, 23_999)]
    assert rate == pytest.approx([0.02 * 0.001, 0.02 * (0.001 + 0.999 / 2), 0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002])
    assert voc.total_steps(1034) == 24_000
    with pytest.raises(InputError, match="must not accumulate"):
        voc.on(4, 2)
    assert voc.on(4).total_batch == 16


def test_every_number_of_the_c4_detector(real):
    method = real["detect_voc_c4"]
    model, heads, rpn = method.model, method.model.heads, method.model.rpn
    assert sum(p.numel() for p in method.parameters()) == 33_242_356  # 33.2 M in the spec
    assert all(p.requires_grad for p in method.parameters()) and method.sync_bn and not method.accumulable
    assert all(m.training for m in method.modules() if isinstance(m, _BatchNorm)), "nothing is frozen"
    assert sum(isinstance(m, _BatchNorm) for m in method.modules()) == 53 + 1
    assert heads.norm.num_features == 2048 and rpn.anchor_generator.num_anchors_per_location() == [15]
    assert rpn.anchor_generator.sizes == ((32, 64, 128, 256, 512),) and rpn.anchor_generator.strides == (16,)
    for training, top in ((True, (12000, 2000)), (False, (6000, 1000))):
        rpn.train(training)
        assert (rpn.pre_nms_top_n(), rpn.post_nms_top_n()) == top
    rpn.train()
    assert (rpn.nms_thresh, rpn.proposal_matcher.high_threshold, rpn.proposal_matcher.low_threshold) == (0.7, 0.7, 0.3)
    for sampler, numbers in ((rpn.fg_bg_sampler, (256, 0.5)), (heads.fg_bg_sampler, (512, 0.25))):
        assert (sampler.batch_size_per_image, sampler.positive_fraction) == numbers
    assert (heads.proposal_matcher.high_threshold, heads.proposal_matcher.low_threshold) == (0.5, 0.5)
    assert heads.box_coder.weights == (10, 10, 5, 5) and rpn.box_coder.weights == (1, 1, 1, 1)
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.05, 0.5, 100)
    assert heads.box_predictor.cls_score.weight.shape == (21, 2048)
    assert heads.box_predictor.bbox_pred.weight.shape == (84, 2048)
    assert model.transform.min_size == tuple(range(480, 801, 32)) and len(model.transform.min_size) == 11
    assert (model.transform.max_size, model.transform.size_divisible) == (1333, 32) and method.flip == 0.5
    assert np.allclose(np.array(model.transform.image_mean) * 255, (123.675, 116.28, 103.53))
    assert np.allclose(np.array(model.transform.image_std) * 255, (58.395, 57.12, 57.375))
    assert method.backbone.layer2[0].conv2.stride == (2, 2) and method.backbone.layer2[0].conv1.stride == (1, 1)
    assert method.precise_batches == 200 and method.images is None


def test_every_number_of_the_mask_detectors(real):
    c4, fpn = real["detect_coco_c4_2x"].model, real["detect_coco_fpn_1x"].model
    assert c4.transform.min_size == fpn.transform.min_size == (640, 672, 704, 736, 768, 800)
    up = c4.heads.mask_predictor
    assert up.conv5_mask.weight.shape == (2048, 256, 2, 2) and up.mask_fcn_logits.weight.shape == (81, 256, 1, 1)
    assert fpn.rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert fpn.rpn.anchor_generator.strides == (4, 8, 16, 32, 64) and fpn.heads.strides == (4, 8, 16, 32)
    assert (fpn.rpn.pre_nms_top_n(), fpn.rpn.post_nms_top_n()) == (2000, 1000)
    assert (fpn.rpn.eval().pre_nms_top_n(), fpn.rpn.post_nms_top_n()) == (1000, 1000)
    assert len(fpn.heads.mask_head) == 4 and fpn.heads.fc.fc6.weight.shape == (1024, 256 * 49)
    norms = [m for m in fpn.neck.modules() if isinstance(m, _BatchNorm)]
    assert len(norms) == 8 and not any(isinstance(m, _BatchNorm) for m in fpn.heads.modules())


def test_heads_begin_as_in_detectron2():
    torch.manual_seed(0)
    model = DETECTION["detect_demo"].with_(masks=True, classes=200).build().model
    predictor, up = model.heads.box_predictor, model.heads.mask_predictor
    for weight, std in ((predictor.cls_score.weight, 0.01), (predictor.bbox_pred.weight, 0.001),
                        (up.mask_fcn_logits.weight, 0.001), (model.rpn.head.bbox_pred.weight, 0.01),
                        (model.rpn.head.cls_logits.weight, 0.01), (model.rpn.head.conv[0][0].weight, 0.01)):
        assert weight.std().item() == pytest.approx(std, rel=0.1)
    assert not any(layer.bias.any() for layer in (predictor.cls_score, predictor.bbox_pred, up.mask_fcn_logits,
                                                  up.conv5_mask, model.rpn.head.bbox_pred))


def test_anchors_lie_around_their_cells_and_are_not_rounded():
    anchors = rcnn.Anchors(((32, 64),), (16,))
    images = type("Batch", (), {"image_sizes": [(480, 800)]})
    (found,) = anchors(images, [torch.zeros(1, 1, 30, 50)])
    found = found.view(30, 50, 6, 4)
    sides = found[..., 2:] - found[..., :2]
    centres = (found[..., 2:] + found[..., :2]) / 2
    assert torch.allclose(centres[7, 9], torch.tensor([9 * 16.0, 7 * 16.0]), atol=1e-4)
    assert torch.allclose(sides.prod(-1)[0, 0].sqrt(), torch.tensor([32.0, 64.0] * 3), rtol=1e-5)
    ratios = (sides[0, 0, :, 1] / sides[0, 0, :, 0]).tolist()
    assert ratios == pytest.approx([0.5, 0.5, 1, 1, 2, 2]) and sides[0, 0, 0, 0] == pytest.approx(32 * math.sqrt(2))


def test_anchors_of_the_coarsest_map_are_64_apart():
    """Of 800 px the map has 13 cells, and 800 // 13 is 61."""
    pyramid = rcnn.Anchors([(8 * s,) for s in (4, 8, 16, 32, 64)], (4, 8, 16, 32, 64))
    maps = [torch.zeros(1, 1, math.ceil(800 / s), math.ceil(800 / s)) for s in (4, 8, 16, 32, 64)]
    (found,) = pyramid(type("Batch", (), {"image_sizes": [(800, 800)]}), maps)
    coarse = found[-13 * 13 * 3:].view(13, 13, 3, 4)
    assert (coarse[0, 1, 1, 0] - coarse[0, 0, 1, 0]).item() == 64


def test_regions_are_read_where_their_boxes_are():
    """On a map that says where it is, a region says where its bins are: shifted by half a cell it would not."""
    x = (torch.arange(20) + 0.5) * 16
    ramp = torch.stack([x.expand(20, 20), x[:, None].expand(20, 20)])[None]
    box = torch.tensor([[40.0, 72.0, 152.0, 240.0]])
    found = rcnn.pool([ramp], [16], [box], 14)[0]
    bins = (torch.arange(14) + 0.5) / 14
    assert torch.allclose(found[0], (40 + 112 * bins).expand(14, 14), atol=1e-3)
    assert torch.allclose(found[1], (72 + 168 * bins)[:, None].expand(14, 14), atol=1e-3)


def test_large_boxes_are_read_from_coarse_maps():
    maps = [torch.full((2, 1, 800 // s, 800 // s), float(s)) for s in (4, 8, 16, 32)]
    sides = torch.tensor([20.0, 111, 113, 223, 224, 447, 449, 799])
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), sides, sides], 1)
    found = rcnn.pool(maps, (4, 8, 16, 32), [boxes[:3], boxes[3:]], 7)
    assert found[:, 0, 3, 3].tolist() == [4, 4, 8, 8, 16, 16, 32, 32]


def test_losses_by_hand():
    scores, deltas = torch.randn(6, 4), torch.randn(6, 16)
    labels, goals = [torch.tensor([0, 2, 0]), torch.tensor([3, 0, 0])], [torch.randn(3, 4), torch.randn(3, 4)]
    found = rcnn.box_losses(scores, deltas, labels, goals)
    own = (deltas[1, 8:12] - goals[0][1]).abs().sum() + (deltas[3, 12:16] - goals[1][0]).abs().sum()
    assert found["loss_box_reg"].item() == pytest.approx(own.item() / 6)
    wanted = -scores.log_softmax(1)[range(6), [0, 2, 0, 3, 0, 0]].mean()
    assert found["loss_classifier"].item() == pytest.approx(wanted.item())


def test_the_loss_of_proposals_by_hand(method):
    rpn = method.model.rpn  # wants 64 anchors per image, and there are 5
    score, deltas = torch.randn(10, 1), torch.randn(10, 4)
    labels, goals = [torch.tensor([1.0, 0, -1, 0, 0]), torch.tensor([0.0, 1, 0, -1, 0])], [torch.randn(5, 4)] * 2
    found, moved = rpn.compute_loss(score, deltas, labels, goals)
    both = torch.cat(labels)
    p = score[:, 0].sigmoid()
    assert found.item() == pytest.approx(-(p[both == 1].log().sum() + (1 - p[both == 0]).log().sum()).item() / 128)
    assert moved.item() == pytest.approx((deltas - torch.cat(goals))[both == 1].abs().sum().item() / 128)


def test_the_loss_of_masks_by_hand():
    truth = torch.zeros(2, 20, 20)
    truth[1, :, 10:] = 1  # the right half
    logits, box = torch.randn(1, 3, 14, 14), torch.tensor([[3.25, 4.0, 17.25, 18.0]])  # at its edge bins are mixed
    found = rcnn.mask_loss(logits, [box], [torch.tensor([1])], [torch.tensor([2])], [truth])
    wanted = torch.zeros(14, 14)
    wanted[:, 7:] = 1
    assert found.item() == pytest.approx(F.binary_cross_entropy_with_logits(logits[0, 2], wanted).item())
    none = rcnn.mask_loss(logits[:0].requires_grad_(), [box[:0]], [torch.zeros(0)], [torch.zeros(0)], [truth])
    assert none.item() == 0.0 and none.requires_grad


def step(method, images=(0, 1, 2)):
    (views,) = method.views(128)([method.images[i] for i in images])
    return method([views], torch.tensor(images))


def test_masks_use_the_features_that_were_classified(method):
    calls = []
    method.backbone.layer2.register_forward_hook(lambda *args: calls.append(args[2].shape))
    losses = step(method)
    assert set(losses) == {"loss", "loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg",
                           "loss_mask"}
    assert losses["loss"].item() == pytest.approx(sum(v.item() for k, v in losses.items() if k != "loss"))
    assert len(calls) == 1 and calls[0][1:] == (64, 7, 7) and method.model.heads.norm.num_batches_tracked == 1
    losses["loss"].backward()
    assert all(p.grad is not None for p in method.parameters())


def test_a_quarter_of_the_regions_at_most_are_objects(method, monkeypatch):
    seen = []
    monkeypatch.setattr(rcnn, "box_losses", lambda scores, deltas, labels, goals: seen.append(labels) or
                        {"x": scores.sum()})
    step(method)
    assert [len(k) for k in seen[0]] == [16] * 3 and all(0 < (k > 0).sum() <= 4 for k in seen[0])


def test_the_pyramid_trains_too(monkeypatch):
    torch.manual_seed(0)
    method = DETECTION["detect_demo"].with_(head="fpn", masks=True, **SMALL).build().train()
    method.images = data.load("clothes_in_photos")
    step(method)["loss"].backward()
    assert all(p.grad is not None for p in method.parameters())
    with torch.no_grad():
        found = method.eval().detect(method.images, 0, torch.rand(3, 128, 128))
    assert len(found) == 10 and found[0]["segmentation"]["size"] == method.images.sizes[0].tolist()[::-1]


def test_the_real_c4_detector_takes_a_step():
    """ResNet-50, 20 classes and masks, on small images: shapes, and that nothing is left without a gradient."""
    torch.manual_seed(0)
    recipe = DETECTION["detect_coco_c4_1x"].with_(short_sides=(64, 96), long_side=128, regions=8, classes=20)
    method = recipe.build().train()
    method.images = data.load("clothes_in_photos")
    step(method, (0, 1))["loss"].backward()
    assert all(p.grad is not None for p in method.parameters())
    assert [rcnn.shapes(method.backbone)[k] for k in (2, 3)] == [(1024, 16), (2048, 32)]


def test_norms_have_no_weight_decay_and_biases_have(method):
    decayed, norms = method.param_groups(DETECTION["detect_demo"])
    assert decayed["weight_decay"] == 1e-4 and norms["weight_decay"] == 0.0
    ids = {id(p): name for name, p in method.named_parameters()}
    assert len(decayed["params"]) + len(norms["params"]) == len(ids)
    names = [ids[id(p)] for p in norms["params"]]
    assert "model.heads.norm.weight" in names and "backbone.bn1.bias" in names
    assert "model.rpn.head.bbox_pred.bias" in [ids[id(p)] for p in decayed["params"]]
    assert len(names) == 2 * sum(isinstance(m, nn.BatchNorm2d) for m in method.modules())


def test_a_batch_is_wide_or_tall(method):
    method.batch = 8
    order = method.order(seed=0, epoch=3)
    assert sorted(order) == list(range(600)) and order == method.order(0, 3) != method.order(0, 4)
    sizes = method.images.sizes[order[:-14]]
    tall = (sizes[:, 0] < sizes[:, 1])[:len(sizes) // 8 * 8].reshape(-1, 8)
    assert (tall.all(1) | ~tall.any(1)).all() and 0.2 < tall.mean() < 0.5
    method.images, method.batch = few("train", 24), 16  # of a few tall ones none may always be left over
    first = {i for epoch in range(20) for i in method.order(0, epoch)[:16]}
    assert first == set(range(24))


@pytest.mark.parametrize("head", ["c4", "fpn"])
def test_sixteen_bits_leave_boxes_and_losses_in_full_precision(method, head):
    torch.manual_seed(0)
    method = DETECTION["detect_demo"].with_(head=head, masks=True, **SMALL).build().train()
    method.images, seen = data.load("clothes_in_photos"), []
    method.model.rpn.register_forward_hook(lambda _, inputs, out: seen.extend(out[0]))
    full = step(method)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(0)
        half = step(method)
        half["loss"].backward()
    assert all(v.dtype == torch.float32 for v in half.values()) and all(b.dtype == torch.float32 for b in seen)
    assert half["loss"].item() == pytest.approx(full["loss"].item(), rel=0.2)
    assert not torch.equal(seen[-1], seen[-1].bfloat16().float())


# ---------------------------------------------------------------- a run


def demo(folder, **changes):
    return DETECTION["detect_demo"].with_(**{"data": str(folder), **SMALL, **changes})


def test_an_interrupted_run_equals_an_uninterrupted_one(layouts, tmp_path):
    from test_train import train_until

    recipe = Detector.fitted(demo(layouts / "coco", masks=True, test_every=1, steps=9))
    whole = pretrain(recipe, out=tmp_path / "whole")
    broken = prepare(recipe, out=tmp_path / "broken")
    for at in (2, 6):  # within an epoch, and at the end of one, after a test
        train_until(broken, at)
        torch.manual_seed(12345)
    broken = pretrain(recipe, out=tmp_path / "broken")
    a, b = (run.latest()["method"] for run in (whole, broken))
    assert all(torch.equal(a[k], b[k]) for k in a) and len(whole.history("test")) == 2
    assert whole.history("test") == broken.history("test")
    assert [r["loss"] for r in whole.history()] == [r["loss"] for r in broken.history()]


@pytest.mark.parametrize("layout", ["voc", "coco"])
def test_a_row_says_what_the_written_detections_are_worth(layouts, tmp_path, layout, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = train_protocol("resnet_mini", "small", layouts / layout, tmp_path / "run",
                         recipe=demo("clothes_in_photos", masks=layout == "coco"))
    run, images = Run.open(tmp_path / "run"), data.load(layouts / layout, "test")
    found = json.loads((run.path / "detections.json").read_text())
    told = (coco_ap if layout == "coco" else voc_ap)(images, found)
    assert {k: row[k] for k in told} == told and row["n"] == 10 and row["source"] == "resnet_mini (untrained)"
    assert layout == "coco" or row["coco_ap"] == coco_ap(images, found)["ap"]
    assert ("ap50_mask" in row) == (layout == "coco") == ("segmentation" in found[0])
    assert {d["category_id"] for d in found} <= set(images.category_ids) and run.recipe.numbers["classes"] == 4
    assert run.recipe.size == 128 and (run.path / "backbone.safetensors").exists()
    # The last weights give these detections again.
    method = run.method()
    (canvas,) = method.views(128)([images[3]])
    again = method.detect(images, 3, canvas[0])
    mine = [d for d in found if d["image_id"] == images.ids[3]]
    assert [d["score"] for d in again] == pytest.approx([d["score"] for d in mine], abs=1e-4)


def test_statistics_are_the_mean_over_batches_and_nothing_else_changes(method, tmp_path):
    run = prepare(demo("clothes_in_photos"), out=tmp_path / "run")
    method.batch, norm, means = 4, method.backbone.bn1, []
    norm.register_forward_pre_hook(lambda _, inputs: means.append(inputs[0].mean((0, 2, 3))))
    weights, state = [p.clone() for p in method.parameters()], torch.get_rng_state()
    method.precise_batches = 3
    method.precise_norms(run)
    assert len(means) == 3 and torch.allclose(norm.running_mean, torch.stack(means).mean(0), atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(weights, method.parameters()))
    assert torch.equal(state, torch.get_rng_state()) and norm.momentum == 0.1


def test_what_does_not_fit_is_refused_before_any_work(layouts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="digits has no boxes, and a detector learns from them"):
        train_protocol("resnet_mini", "detect_demo", "digits")
    with pytest.raises(InputError, match="has boxes but no masks"):
        train_protocol("resnet_mini", "detect_demo", layouts / "voc", masks=True)
    with pytest.raises(InputError, match="built on the stages of a ResNet, and VisionTransformer has 0"):
        train_protocol("vit_mini", "detect_demo", "clothes_in_photos")
    with pytest.raises(InputError, match="Unknown head 'c5': did you mean 'c4'"):
        DETECTION["detect_demo"].with_(head="c5").build()
    assert not list(tmp_path.glob("runs/sslnb*"))


def test_the_canvas_does_not_shrink_to_the_images_that_a_source_was_trained_on():
    small = Source("simclr", None, None, size=20, folder=Path("runs/simclr"), architecture="resnet_mini")
    assert Detector.on_source(DETECTION["detect_demo"], small, None).size == 128
    assert Detector.on_source(DETECTION["detect_demo"], small, 96).size == 96


@pytest.mark.parametrize("protocol, shape, size", [
    ("detect_demo", (1344, 1536), 147), ("detect_voc_c4", (1344, 1536), 915), ("detect_coco_fpn_1x", (3000, 900), 1333),
    ("detect_voc_c4", (600, 501), 600), ("detect_voc_c4", (500, 375), None), ("detect_demo", (128, 40), None)])
def test_what_the_canvas_costs_is_said_with_the_size_that_costs_nothing(tmp_path, protocol, shape, size):
    kit = dev_kit(tmp_path, (2007,), w=shape[0], h=shape[1])
    recipe = DETECTION[protocol].with_(data=str(kit), masks=False)
    fitted = Detector.fitted(recipe)
    if size is None:
        assert fitted.note == recipe.note
        return
    assert (f"2 of 2 images are shrunk to the canvas of {recipe.size} px and then enlarged again; size={size} keeps all"
            ) in fitted.describe() and recipe.note in fitted.note
    assert Detector.fitted(fitted) == fitted, "said once"
    assert Detector.fitted(recipe.with_(size=size)).note == recipe.note
    assert "2 of 2" in Detector.fitted(recipe.with_(size=size - 1)).note
    # At that size the detector gets the pixels that it would get of the image itself, or a fraction of one less.
    short, long = recipe.numbers.get("short_sides", (800,))[-1], recipe.numbers.get("long_side", 1333)
    assert min(short / min(shape), long / max(shape), 1) <= (max(shrunk(shape, size)) + 0.5) / max(shape)


def test_a_source_for_small_images_is_refused_where_its_first_layer_differs():
    from sslnb.backbones import build

    recipe = DETECTION["detect_demo"].with_(backbone="resnet18")
    with pytest.raises(InputError, match="does not fit resnet18 at 128 px, where conv1.weight has the shape"):
        Detector.starting_point(recipe, build("resnet18", 32))
    assert "120 tensors of resnet18" in Detector.starting_point(recipe, build("resnet18", 128))[1]


def test_weights_for_detectron2_have_its_names(tmp_path):
    from sslnb.backbones import build
    from sslnb.evaluate.detectron2 import export

    network = build("resnet50", 224)
    file = pickle.loads(export(network, tmp_path / "weights.pkl").read_bytes())
    state, model = network.state_dict(), file["model"]
    assert file["matching_heuristics"] is True and len(model) == len(state) == 318
    for ours, theirs in (("conv1.weight", "stem.conv1.weight"), ("bn1.running_var", "stem.conv1.norm.running_var"),
                         ("layer1.0.downsample.0.weight", "res2.0.shortcut.weight"),
                         ("layer4.0.downsample.1.bias", "res5.0.shortcut.norm.bias"),
                         ("layer3.5.conv2.weight", "res4.5.conv2.weight"),
                         ("layer3.5.bn3.weight", "res4.5.conv3.norm.weight")):
        assert np.array_equal(model[theirs], state[ours].numpy())
    assert {name.split(".")[0] for name in model} == {"stem", "res2", "res3", "res4", "res5"}
    with pytest.raises(InputError, match="detectron2's ResNets begin with a 7x7 convolution on three colours"):
        export(build("resnet50", 32), tmp_path / "small.pkl")


@pytest.mark.parametrize("n", [0, 10])
def test_sizes_that_the_annotation_gets_wrong_are_named(tmp_path, n):
    for split in ("train", "test"):
        write_voc(few(split, 12), tmp_path)
    wrong = sorted(tmp_path.rglob("*.xml"))[n]
    wrong.write_text(re.sub(r"<width>(\d+)", lambda m: f"<width>{int(m[1]) + 2}", wrong.read_text()))
    recipe = demo(tmp_path)
    with pytest.raises(InputError, match=f"{wrong.stem}.jpg is .* px, but its annotation says .* correct one of them"):
        Detector.fitted(recipe)  # looks at the first eight
        [recipe.load(split)[i] for split in ("train", "test") for i in range(12)]


def test_test_images_that_cannot_be_read_are_left_out_and_counted(tmp_path):
    for split in ("train", "test"):
        write_voc(few(split, 12), tmp_path)
    recipe = demo(tmp_path)
    before = Detector.fitted(recipe)
    images = recipe.load("test")
    Path(images.where(1)).write_bytes(b"no image"), Path(images.where(7)).unlink()
    assert Detector.fitted(recipe) == before
    run = prepare(before, out=tmp_path / "run")
    detector = before.build()
    detector.before_train(run)
    detector.precise_batches = 0
    detector.detect = lambda images, i, canvas: [
        {"image_id": int(images.ids[i]), "category_id": int(images.category_ids[k]), "score": 1.0,
         "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]]}
        for b, k in zip(images.targets(i).boxes.tolist(), images.targets(i).classes.tolist(), strict=True)]
    found = detector.test(run)
    assert (found["n"], found["broken"]) == (10, 2) and found["ap50"] == pytest.approx(100)


@pytest.mark.slow
def test_the_demo_finds_what_neither_guessing_nor_the_untrained_detector_finds(tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    images, test = data.load("clothes_in_photos"), data.load("clothes_in_photos", "test")
    trained = [train_protocol("resnet_mini", "detect_demo", images.name, tmp_path / str(seed), seed=seed)["ap50"]
               for seed in range(request.config.getoption("--seeds"))]
    blank = DETECTION["detect_demo"].build().eval()
    found = [d for i in range(len(test)) for d in blank.detect(test, i, blank.views(128)([test[i]])[0][0])]
    chance, untrained = (voc_ap(test, d)["ap50"] for d in (guesses(test, images), found))
    print(f"\nDEMO detection AP50 trained from fresh weights {[round(a, 1) for a in trained]}, "
          f"untrained {untrained:.1f}, guessed {chance:.1f}")
    assert min(trained) > 12 > 10 * max(chance, untrained, 0.1)


@pytest.mark.distributed
def test_two_processes_find_the_images_of_both(layouts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = train_protocol("resnet_mini", "small", layouts / "voc", tmp_path / "run", processes=2,
                         recipe=demo("clothes_in_photos", batch=8))
    run, images = Run.open(tmp_path / "run"), data.load(layouts / "voc", "test")
    found = json.loads((run.path / "detections.json").read_text())
    assert {d["image_id"] for d in found} == set(images.ids.tolist()) and run.recipe.gpus == 2 and run.recipe.batch == 4
    assert row["ap50"] == voc_ap(images, found)["ap50"]
    # Each process alone, with the weights that both have: the union of their shares is what one would find.
    method = run.method()
    alone = [d for i in range(len(images)) for d in method.detect(images, i, method.views(128)([images[i]])[0][0])]
    assert sorted(d["score"] for d in alone) == pytest.approx(sorted(d["score"] for d in found), abs=1e-3)


def test_classes_of_the_same_number_but_other_names_are_refused(monkeypatch):
    from sslnb.evaluate.detection import DETECTION
    from sslnb.methods import get

    recipe = DETECTION["detect_demo"]
    load_ = type(recipe).load
    def loaded(self, split="train"):
        images = load_(self, split)
        images.classes = images.classes if split == "train" else images.classes[::-1]
        return images
    monkeypatch.setattr(type(recipe), "load", loaded)
    with pytest.raises(InputError, match="both must have the same"):
        get(recipe.method).fitted(recipe)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_detectors_flips_are_as_likely_as_the_recipe_says(flip, monkeypatch):
    from sslnb.evaluate.detection import DETECTION, Detector

    recipe, turned = DETECTION["detect_demo"].with_(flip=flip), []
    method, flipped = recipe.build(), Detector.flipped
    monkeypatch.setattr(Detector, "flipped", staticmethod(lambda *one: turned.append(1) or flipped(*one)))
    method.images = recipe.load()
    method(method.views(128)([method.images[i] for i in range(3)]), torch.arange(3))
    assert len(turned) == 3 * flip
