"""VOC07 by linear SVMs: labels, features, classifier, average precision, and how few labels are drawn and counted."""

import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from sslnb import backbones
from sslnb.decoding import BrokenImage
from sslnb.errors import InputError
from sslnb.evaluate import lowshot, voc07
from sslnb.evaluate.lowshot import COSTS, average_precision, draw, low_shot, svm
from sslnb.evaluate.sources import open_source
from sslnb.evaluate.voc07 import VocFeatures, digits_in_photos, voc_classes, voc_features, write_voc_labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two hundred scenes of digits in VOC's layout."""
    root = tmp_path_factory.mktemp("voc")
    for split, n in (("train", 120), ("test", 80)):
        scenes, targets, classes = digits_in_photos(split, n, digits=3)
        write_voc_labels(root, split, scenes, targets, classes)
    return root / "VOCdevkit"


@pytest.fixture(scope="module")
def voc(folder):
    return voc_features("resnet_mini", folder, size=40, workers=0)


def pieces(n=60, classes=3, seed=0):
    """Features and targets that have something to do with each other; a tenth is difficult."""
    rng = np.random.RandomState(seed)
    targets = {}
    for split in ("train", "test"):
        t = (rng.rand(n, classes) < 0.4).astype(np.int8)
        t[rng.rand(n, classes) < 0.1] = -1
        targets[split] = t
    x = {split: (t[:, :, None] * [1.0, 0.5] + 0.8 * rng.randn(n, classes, 2)).reshape(n, -1).astype(np.float32)
         for split, t in targets.items()}
    return VocFeatures("made up", "nowhere", [f"c{c}" for c in range(classes)], targets, {"feat1": x})


# ---------------------------------------------------------------- labels


def write_lists(root, **lists):
    folder = root / "VOC2007" / "ImageSets" / "Main"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in lists.items():
        (folder / f"{name}.txt").write_text(text)
    return root


def test_targets_are_those_of_the_lists_with_difficult_ones_apart_in_the_order_of_the_ids(tmp_path):
    write_lists(tmp_path, trainval="000007\n000005\n", dog_trainval="000007  1\n000005 -1\n000009  0\n",
                cat_trainval="000009  1\n000005  0\n000007 -1\n", dog_test="000001 -1\n", cat_test="000001  1\n")
    for given in (tmp_path, tmp_path / "VOC2007"):
        images, targets, classes = voc_classes(given, "train")
        assert classes == ["cat", "dog"] and targets.tolist() == [[-1, 0], [0, 1], [1, -1]]
        assert images.where(1) == str(tmp_path / "VOC2007/JPEGImages/000007.jpg")
    assert voc_classes(tmp_path, "test", ["dog"])[1:] == (np.array([[0]]), ["dog"])


def test_what_is_written_is_read_back(folder):
    scenes, targets, classes = digits_in_photos("test", 80, digits=3)
    images, read, names = voc_classes(folder, "test")
    assert names == classes and (read == targets).all() and {-1, 0, 1} == set(read.ravel().tolist())
    assert np.abs(np.asarray(images[7]).astype(int) - scenes[7]).mean() < 6, "JPEG"


@pytest.mark.parametrize("lists, split, classes, sentence", [
    ({}, "train", None, "has no list of a class, such as dog_trainval.txt; give the folder VOCdevkit"),
    ({"dog_trainval": "1 1\n"}, "test", None, "There is no list dog_test.txt in .*Main: .* two archives, unpack"),
    ({"dog_trainval": "1 1\n"}, "train", ["dgo"], "Unknown class of .* 'dgo': did you mean 'dog'"),
    ({"dog_trainval": "1 1\n", "cat_trainval": "2 1\n"}, "train", None, "name different images"),
    ({"dog_trainval": "1 2\n"}, "train", None, "every line should be an image's id and 1, 0 or -1"),
    ({"dog_trainval": "1 1\n"}, "val", None, "Unknown split of VOC 'val'"),
])
def test_lists_that_are_not_whole_are_named(tmp_path, lists, split, classes, sentence):
    write_lists(tmp_path, **lists)
    with pytest.raises(InputError, match=sentence):
        voc_classes(tmp_path, split, classes)


# ---------------------------------------------------------------- features


def test_features_are_the_pooled_maps_of_squashed_images(folder, voc):
    torch.manual_seed(0)
    assert {k: v["train"].shape for k, v in voc.levels.items()} == {
        "feat1": (120, 32 * 12 * 12), "feat2": (120, 32 * 6 * 6), "feat3": (120, 64 * 4 * 4)}
    from sslnb.evaluate.sources import open_source

    net = open_source("resnet_mini", 0).backbone(40).eval()
    x = torch.from_numpy(np.asarray(voc.images["test"][5]).copy()).permute(2, 0, 1)[None] / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        wanted = F.adaptive_avg_pool2d(net.forward_features(x), 4).flatten()
    assert np.allclose(voc.levels["feat3"]["test"][5], wanted, atol=1e-4)


def test_images_go_to_256_and_then_to_a_square_of_224_whatever_their_aspect(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(voc07, "maps", lambda net, x: seen.append(x) or [x[:, :, :4, :4]])
    monkeypatch.setattr(voc07, "pools", lambda net, size: ([torch.nn.Identity()], [(3, 4, 4)]))
    picture = Image.fromarray(digits_in_photos("test", 1)[0][0]).resize((500, 333))
    root = tmp_path / "VOC2007"
    write_lists(tmp_path, dog_trainval="1 1\n")
    (root / "JPEGImages").mkdir()
    picture.save(root / "JPEGImages" / "1.jpg")
    images, *_ = voc_classes(tmp_path, "train")
    voc07._maps_of(backbones.build("resnet_mini", 20), images, 224, 8, 0)
    wanted = images[0].resize((384, 256), Image.Resampling.BILINEAR).resize((224, 224), Image.Resampling.BILINEAR)
    undone = seen[0][0].permute(1, 2, 0) * torch.tensor([0.229, 0.224, 0.225]) + torch.tensor([0.485, 0.456, 0.406])
    assert (255 * undone - torch.from_numpy(np.asarray(wanted).copy())).abs().max() < 1e-3


def test_a_row_of_features_has_length_one(voc):
    x = voc.unit("feat2", "train")
    assert x.dtype == np.float64 and np.allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    made = VocFeatures("", "", [], {}, {"feat1": {"train": np.array([[3e-5, 4e-5]], np.float32)}})
    assert np.allclose(made.unit("feat1", "train"), [[3 / 6, 4 / 6]]), "f / (|f| + 1e-5)"


def test_baselines_have_names_of_their_own_and_raw_pixels_one_level(folder):
    fresh = voc_features("resnet_mini", folder, kind="random initialisation", size=40, workers=0)
    pixels = voc_features("resnet_mini", folder, kind="raw pixels", size=40, workers=0)
    assert fresh.source == "random initialisation" and pixels.source == "raw pixels"
    assert list(pixels.levels) == ["pixels"] and pixels.levels["pixels"]["test"].shape == (80, 32 * 32 * 3)
    images = voc_classes(folder, "train")[0]
    rival = open_source("resnet_mini", 0).rival(images, 40, 0)  # with batch-norm statistics of these images
    for level, mine in enumerate(voc07._maps_of(rival, images, 40, 64, 0), 1):
        assert np.allclose(fresh.levels[f"feat{level}"]["train"], mine, atol=1e-5)


@pytest.mark.parametrize("wrong, sentence", [({"kind": "trianed"}, "did you mean 'trained'"),
                                             ({"classes": ["7"]}, "Unknown class of")])
def test_unknown_features_are_named(folder, wrong, sentence):
    with pytest.raises(InputError, match=sentence):
        voc_features("resnet_mini", folder, size=40, **wrong)


def test_no_image_may_be_missing_or_broken(tmp_path):
    for split in ("train", "test"):
        write_voc_labels(tmp_path, split, *digits_in_photos(split, 3))
    file = tmp_path / "VOCdevkit/VOC2007/JPEGImages/500002.jpg"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(BrokenImage, match="Cannot read image .*500002.jpg"):
        voc_features("resnet_mini", tmp_path / "VOCdevkit", size=40, workers=0)
    file.unlink()
    with pytest.raises(InputError, match="1 images of the lists are not in .*JPEGImages, first 500002.jpg"):
        voc_features("resnet_mini", tmp_path / "VOCdevkit", size=40, workers=0)


def test_a_transformer_is_refused(folder):
    with pytest.raises(InputError, match="needs a ResNet with its stem and stages, and VisionTransformer has other"):
        voc_features("vit_mini", folder, size=40, workers=0)


# ---------------------------------------------------------------- average precision


def test_average_precision_by_hand():
    # Ranked: hit, miss, hit, hit, miss. Precision at the hits 1, 2/3, 3/4; at recall 2/3 the better one is 3/4.
    targets, scores = np.array([1, 0, 1, 1, 0]), np.array([5.0, 4, 3, 2, 1])
    assert average_precision(targets, scores) == pytest.approx((1 + 3 / 4 + 3 / 4) / 3)
    assert average_precision(np.array([0, 1]), np.array([2.0, 1])) == pytest.approx(1 / 2)
    assert average_precision(np.array([1, 0]), np.array([2.0, 1])) == 1


def test_difficult_images_count_neither_for_nor_against():
    targets, scores = np.array([-1, 1, -1, 0, 1]), np.array([9.0, 5, 4, 3, 2])
    assert average_precision(targets, scores) == average_precision(targets[[1, 3, 4]], scores[[1, 3, 4]])
    assert average_precision(targets, scores) == pytest.approx((1 + 2 / 3) / 2)
    assert np.isnan(average_precision(np.array([0, -1]), np.array([1.0, 2])))


def test_equal_scores_are_one_threshold():
    """Whatever the order of the images."""
    assert average_precision(np.array([1, 0, 0, 0]), np.zeros(4)) == average_precision(np.array([0, 0, 0, 1]),
                                                                                       np.zeros(4)) == 0.25


def test_it_is_scikit_learns_area_under_the_best_precision_from_each_recall_on():
    """Of any ranking: scikit-learn's own points, with the best precision to their right, in brute force."""
    from sklearn.metrics import precision_recall_curve

    rng = np.random.RandomState(0)
    for _ in range(20):
        targets, scores = (rng.rand(50) < 0.3).astype(int), rng.randn(50).round(1)
        precision, recall, _ = precision_recall_curve(targets, scores)
        area = sum((recall[i] - recall[i + 1]) * precision[:i + 1].max() for i in range(len(recall) - 1))
        assert average_precision(targets, scores) == pytest.approx(area)
        assert average_precision(targets, scores) >= average_precision_score(targets, scores) - 1e-12


# ---------------------------------------------------------------- all labels


def test_the_costs_are_the_published_nineteen():
    assert len(COSTS) == 19 and COSTS[:4] == (1, 10, 100, 0.0625) and COSTS[-1] == 0.5**19


def by_hand(cost, seed):
    return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, intercept_scaling=1.0, penalty="l2", loss="squared_hinge",
                     tol=0.0001, dual=True, max_iter=2000, random_state=seed)


def test_the_classifier_is_scikit_learns_with_the_published_settings():
    ours, wanted = lowshot.classifier(0.25, 7).get_params(), by_hand(0.25, 7).get_params()
    assert ours == wanted


def test_cost_and_precision_of_every_class_are_those_of_cross_validation_by_hand():
    made, costs = pieces(), (10.0, 0.1, 0.001)
    row = svm(made, costs=costs, seed=3)
    x, test = (made.levels["feat1"][s].astype(float) for s in ("train", "test"))
    x, test = (a / (np.linalg.norm(a, axis=1)[:, None] + 1e-5) for a in (x, test))
    ap, chosen = {}, {}
    for c, name in enumerate(made.classes):
        y = np.array([1 if t == 1 else -1 for t in made.targets["train"][:, c]])  # difficult ones are negatives
        mean = []
        for cost in costs:
            scores = [average_precision_score(y[held], by_hand(cost, 3).fit(x[fit], y[fit]).decision_function(x[held]))
                      for fit, held in StratifiedKFold(3).split(x, y)]
            mean.append(np.mean(scores))
        chosen[name] = costs[int(np.argmax(mean))]
        counted = made.targets["test"][:, c] != -1
        scores = by_hand(chosen[name], 3).fit(x, y).decision_function(test[counted])
        ap[name] = 100 * average_precision(made.targets["test"][counted, c], scores)
    assert row["feat1"]["costs"] == chosen and row["feat1"]["classes"] == pytest.approx(ap)
    assert row["mAP"] == pytest.approx(np.mean(list(ap.values()))) and row["n"] == 60


def test_rows_say_which_level_was_best_and_which_one_validation_prefers(voc, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what does not converge is counted, not warned of
        row = svm(voc, costs=(1.0, 0.0625), levels=("feat2", "feat3"), out=tmp_path)
    assert row["protocol"] == "voc07_svm, with costs 2" and row["source"] == "resnet_mini (untrained)"
    assert row["mAP"] == max(row["feat2"]["mAP"], row["feat3"]["mAP"]) == row[row["best_level"]]["mAP"]
    assert row["feat2" if row["chosen"] == "feat3" else "feat3"]["validated"] <= row[row["chosen"]]["validated"]
    targets = voc.targets["test"]
    shuffled = [average_precision(t, torch.rand(80).numpy()) for t in targets.T for _ in range(300)]
    assert row["chance"] == pytest.approx(100 * np.mean(shuffled), abs=2) and row["mAP"] > row["chance"]
    assert json.loads((tmp_path / "results.jsonl").read_text()) == row


def test_fits_that_did_not_converge_are_counted(monkeypatch):
    monkeypatch.setattr(lowshot, "MOST_STEPS", 2)
    assert svm(pieces(), costs=(100.0,))["feat1"]["unconverged"] == 3


def test_several_processes_find_the_same():
    one, two = (svm(pieces(), costs=(1.0, 0.01), jobs=jobs)["feat1"] for jobs in (1, 2))
    assert one == two


# ---------------------------------------------------------------- a few labels


def test_a_draw_has_k_of_each_class_and_c_minus_1_times_as_many_others():
    targets = pieces(200, classes=4).targets["train"]
    drawn = draw(targets, 8, np.random.RandomState(0))
    assert ((drawn == 1).sum(0) == 8).all() and ((drawn == 0).sum(0) == 24).all()
    assert (targets[drawn == 1] == 1).all() and (targets[drawn == 0] == 0).all(), "never a difficult one"
    assert len({tuple(np.flatnonzero(column == 1)) for column in drawn.T}) == 4, "every class by itself"
    again, other = (draw(targets, 8, np.random.RandomState(seed)) for seed in (0, 1))
    assert (drawn == again).all() and (drawn != other).any()


def test_vocs_own_draw_has_19_negatives_for_a_positive():
    targets = np.zeros((3000, 20), np.int8)
    for c in range(20):
        targets[c * 100:c * 100 + 100, c] = 1
    drawn = draw(targets, 96, np.random.RandomState(0))
    assert ((drawn == 1).sum(0) == 96).all() and ((drawn == 0).sum(0) == 19 * 96).all()


def test_few_labels_by_hand():
    """Each draw again, each cost; the best cost once by the test images and once by what the draws left."""
    made, costs, shots = pieces(200, seed=1), (1.0, 0.001), (2, 8)
    row = low_shot(made, shots=shots, samples=3, costs=costs, seed=5)
    x, test = made.unit("feat1", "train"), made.unit("feat1", "test")
    targets, rng = made.targets["train"], np.random.RandomState(5)
    ap = np.zeros((2, 3, 2, 2))
    for s in range(3):
        for k, shot in enumerate(shots):
            sample = draw(targets, shot, rng)
            for i, cost in enumerate(costs):
                found = []
                for c in range(3):
                    rows = sample[:, c] >= 0
                    fit = by_hand(cost, 5).fit(x[rows], 2 * sample[rows, c] - 1)
                    left = (sample[:, c] < 0) & (targets[:, c] >= 0)
                    found.append((average_precision(made.targets["test"][:, c], fit.decision_function(test)),
                                  average_precision(targets[left, c], fit.decision_function(x[left]))))
                ap[k, s, i] = 100 * np.mean(found, 0)
    for k, shot in enumerate(shots):
        mine = row["feat1"][str(shot)]
        for said, which in ((mine, 0), (mine["held_out"], 1)):
            best = ap[k, :, :, which].mean(0).argmax()
            values = ap[k, :, best, 0]
            assert said["cost"] == costs[best] and said["mean"] == pytest.approx(values.mean())
            assert [said["min"], said["max"], said["std"]] == pytest.approx([values.min(), values.max(), values.std()])
    assert row["mAP"] == {k: row["feat1"][k]["mean"] for k in ("2", "8")} and row["best_level"] == "feat1"
    assert row["protocol"] == "voc07_low_shot, with costs 2, samples 3"
    assert row["cost_chosen_on"].startswith("test images")
    assert low_shot(made, shots=shots, samples=3, costs=costs, seed=5)["feat1"] == row["feat1"]


def test_the_cost_is_chosen_once_by_the_test_and_once_by_held_out_images():
    test = np.array([[50.0, 40, 10], [60, 80, 20]])  # of two samples, by cost: the second is best
    held_out = np.array([[30.0, 5, 10], [30, 5, 10]])  # the first is best
    found = lowshot._summary(np.stack([test, held_out], 2), (1.0, 10.0, 100.0))
    assert found == {"mean": 60, "min": 40, "max": 80, "std": 20, "cost": 10.0,
                     "held_out": {"mean": 55, "min": 50, "max": 60, "std": 5, "cost": 1.0}}


def test_where_a_draw_leaves_nothing_there_is_no_number_of_held_out_images():
    made = pieces(60, classes=2)
    made.targets["train"][:] = 0
    made.targets["train"][:5] = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert low_shot(made, shots=(5,), samples=1, costs=(1.0,))["feat1"]["5"]["held_out"] is None


@pytest.mark.parametrize("change, run, sentence", [
    (lambda t: None, lambda v: low_shot(v, shots=(1, 64)), "shots 64 cannot be had of nowhere: 'c0' is shown by"),
    (lambda t: t["train"].__setitem__((slice(None), 1), 0), svm, "Cross-validation in 3 parts .* 'c1' is shown by 0"),
    (lambda t: t["test"].__setitem__((slice(None), 2), 0), svm, "'c2' .* by 0 of test"),
    (lambda t: None, lambda v: svm(v, levels=("feat7",)), "Unknown level 'feat7'"),
])
def test_what_cannot_be_done_is_said_in_one_sentence(change, run, sentence):
    made = pieces()
    change(made.targets)
    with pytest.raises(InputError, match=sentence):
        run(made)
