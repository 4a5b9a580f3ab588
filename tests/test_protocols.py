"""Protocols that train on labels: what moves, what must not, what is tested and what is written down."""

import json
import math
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from sslnb import Run, data, methods, pretrain
from sslnb.errors import InputError
from sslnb.evaluate import RECIPES
from sslnb.evaluate.features import extract
from sslnb.evaluate.linear import LINEAR
from sslnb.evaluate.protocol import find, fitted_to, named, train_protocol
from sslnb.evaluate.sources import open_source
from sslnb.evaluate.supervised import Supervised, labels_of
from sslnb.views import CenterCrop, HorizontalFlip, RandomResizedCrop, Resize

PROBE = LINEAR["linear_barlowtwins"]


@pytest.fixture(scope="module")
def probed(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("probe") / "run"
    row = train_protocol(source, "linear_barlowtwins", out=out, epochs=3, batch=8)
    return row, Run.open(out)


# ---------------------------------------------------------------- the published protocols


@pytest.mark.parametrize("name, total, lr, decay, optimizer, epochs", [
    ("linear_moco", 256, 30.0, 0.0, "sgd", 100),
    ("linear_simsiam", 4096, 1.6, 0.0, "lars", 90),
    ("linear_barlowtwins", 256, 0.3, 1e-6, "sgd", 100),
    ("linear_mocov3", 1024, 12.0, 0.0, "sgd", 90)])
def test_the_linear_protocols_are_those_of_the_spec(name, total, lr, decay, optimizer, epochs):
    r = LINEAR[name]
    assert (r.total_batch, r.lr, r.weight_decay, r.optimizer, r.epochs) == (total, lr, decay, optimizer, epochs)
    assert r.size == 224 and r.sgd_momentum == 0.9 and r.warmup_epochs == 0
    with torch.device("meta"):
        method = r.build()
    (view,) = method.views(224).views
    assert view.image_ops == (RandomResizedCrop(224, (0.08, 1.0), interpolation="bilinear"), HorizontalFlip(0.5))
    (view,) = method.test_view(224).views
    assert view.image_ops == (Resize(256, "bilinear"), CenterCrop(224))


def test_a_classifier_starts_small():
    head = Supervised(methods.recipes("simclr")["demo"].build().backbone, classes=100).head
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.1) and head.bias.abs().max() == 0


def test_a_batch_of_ones_own_keeps_the_total_of_a_protocol_unless_accum_says_more(source):
    def sizes(**changes):
        r = fitted_to(open_source(source, 0), LINEAR["linear_simsiam"], "digits_scattered", None, **changes)
        return r.gpus, r.batch, r.accum

    assert LINEAR["linear_simsiam"].total_batch == 4096
    assert sizes(processes=4, batch=256) == (4, 256, 4) and sizes(processes=1, batch=1024) == (1, 1024, 4)
    assert sizes(processes=1, batch=96) == (1, 96, 1), "which does not divide it"
    assert sizes(processes=8, batch=64, accum=1) == (8, 64, 1)


def test_a_row_says_how_many_images_batch_norm_saw_where_that_is_not_the_protocols(source):
    """On fewer GPUs the total is accumulated; a probe's frozen backbone does not mind."""
    def name(protocol, **sizes):
        recipe = RECIPES[protocol].with_(backbone="resnet_mini", **sizes)
        return named(protocol, {"batch": 64}, SimpleNamespace(recipe=recipe, backbone=source.backbone))

    fewer = {"gpus": 1, "batch": 64, "accum": 4}
    assert name("semi_1", **fewer) == "semi_1, with batch norm over 64"
    assert name("semi_1") == "semi_1" and name("linear_moco", **fewer) == "linear_moco"
    vit = SimpleNamespace(recipe=RECIPES["finetune_mae"].with_(gpus=1, accum=8), backbone=lambda: nn.LayerNorm(4))
    assert named("finetune_mae", {}, vit) == "finetune_mae"


@pytest.mark.parametrize("known, wrong, near", [(LINEAR, "linear_mocco", "linear_moco"), (LINEAR, "semi_1", None),
                                                (None, "detect_dem", "detect_demo")])
def test_a_protocol_that_is_unknown_or_of_another_kind_is_told_the_nearest(known, wrong, near):
    hint = f"did you mean '{near}'" if near else "Known: "
    with pytest.raises(InputError, match=f"Unknown protocol '{wrong}': {hint}"):
        find(wrong, known)
    assert find("linear_moco", known) == RECIPES["linear_moco"]


def test_rates_change_once_per_epoch():
    steps = 5004
    moco, cosine = LINEAR["linear_moco"], LINEAR["linear_mocov3"]
    assert [moco.lr_at(e * steps + steps - 1, steps) for e in (0, 59, 60, 80)] == pytest.approx([30, 30, 3, 0.3])
    assert cosine.lr_at(0, 1251) == cosine.lr_at(1250, 1251) == 12.0
    assert cosine.lr_at(45 * 1251, 1251) == pytest.approx(6.0)
    assert cosine.lr_at(90 * 1251 - 1, 1251) == pytest.approx(6 * (1 + math.cos(math.pi * 89 / 90)))


def test_the_real_probe_trains_two_tensors_and_keeps_the_backbone_in_eval_mode():
    with torch.device("meta"):
        method = LINEAR["linear_moco"].build().train()
    assert [p.shape for p in method.parameters() if p.requires_grad] == [(1000, 2048), (1000,)]
    assert method.training and not any(m.training for m in method.backbone.modules())
    with torch.device("meta"):
        vit = LINEAR["linear_mocov3"].build()
    assert vit.backbone.blocks[0].attn.num_heads == 12 and vit.head.in_features == 384


def test_lars_adapts_the_bias_only_in_simsiams_protocol():
    for name, wanted in (("linear_simsiam", True), ("linear_moco", False)):
        with torch.device("meta"):
            (group,) = LINEAR[name].build().param_groups(LINEAR[name])
        assert bool(group.get("adapt_vectors")) == wanted and len(group["params"]) == 2


# ---------------------------------------------------------------- a run


def test_nothing_of_a_frozen_backbone_moves(source, probed):
    before, after = source.backbone().state_dict(), probed[1].method().backbone.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())
    assert probed[1].method().head.weight.abs().max() > 0.05, "and the head did"


def test_the_row_is_what_the_head_says_of_every_test_image(source, probed):
    row, run = probed
    method, images = run.method(), data.load("digits_scattered", "test")
    (x,) = method.test_view(20)([images[i] for i in range(len(images))])
    with torch.no_grad():
        logits = method.head(method.backbone(x))
    labels = torch.as_tensor(images.labels)
    assert row["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item(), abs=1e-3)
    right5 = (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item()
    assert row["top5"] == pytest.approx(100 * right5, abs=1e-3) and row["n"] == len(images)
    assert row["best"] >= row["top1"] and row["interval"][0] < row["top1"] < row["interval"][1]


def test_the_row_says_what_was_changed_and_is_written_beside_both_runs(source, probed):
    row, run = probed
    assert run.recipe.total_batch == PROBE.total_batch == 256 == 8 * run.recipe.accum
    assert row["protocol"] == "linear_barlowtwins, with epochs 3", "the total batch is the protocol's"
    other = SimpleNamespace(recipe=run.recipe.with_(accum=1))
    assert named("linear_barlowtwins", {"epochs": 3, "batch": 8}, other) == f"{row['protocol']}, batch 8"
    assert named("linear_barlowtwins", {"weight_decay": 0.0}) == "linear_barlowtwins, with weight_decay 0.0"
    for folder in (run.path, source.path):
        assert json.loads((folder / "results.jsonl").read_text().splitlines()[-1]) == row
    assert [r["epoch"] for r in run.history("test")] == [1, 2, 3]


def test_a_finished_protocol_is_not_trained_again(source, probed, capsys):
    row, run = probed
    again = train_protocol(source, "linear_barlowtwins", out=run.path, epochs=3, batch=8)
    assert again["top1"] == row["top1"] and "is finished already" in capsys.readouterr().out


def test_a_resumed_run_does_not_begin_with_the_first_weights_again(probed):
    run = probed[1]
    method = run.method()
    with torch.no_grad():
        method.backbone.conv1[0].weight.zero_()
    method.before_train(run)
    assert method.started and (method.backbone.conv1[0].weight == 0).all()
    fresh = run.recipe.build()
    fresh.before_train(run)
    assert torch.equal(fresh.backbone.conv1[0].weight, run.method().backbone.conv1[0].weight)


def test_a_trainable_backbone_is_trained_with_its_own_rate(tmp_path, source):
    recipe = PROBE.with_(frozen=False, head_lr=10.0, weight_decay=1e-4)
    train_protocol(source, "all of it", recipe=recipe, out=tmp_path / "run", epochs=1, batch=8)
    method = Run.open(tmp_path / "run").method()
    before = source.backbone().state_dict()
    moved = [k for k, v in method.backbone.state_dict().items() if not torch.equal(v, before[k])]
    assert len(moved) == len(before)
    groups = method.param_groups(recipe)
    assert [g.get("lr_scale", 1.0) for g in groups] == [1.0, 10.0]
    assert any(m.training for m in method.train().backbone.modules() if isinstance(m, nn.BatchNorm2d))


def test_a_timm_name_is_a_source_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = train_protocol("resnet_mini", "untrained", "digits_scattered", tmp_path / "run", recipe=PROBE, size=20,
                         epochs=1, batch=16)
    assert row["source"] == "resnet_mini (untrained)" and 0 < row["top1"] < 60


def test_a_transformer_is_probed_on_the_features_that_its_run_is_evaluated_on(tmp_path):
    """MAE's are the mean of the patch tokens, not the class token."""
    recipe = methods.recipes("mae")["demo"].with_(epochs=1, batch=650, data="digits_scattered", size=28)
    run = pretrain(recipe, out=tmp_path / "mae")
    row = train_protocol(run, "probe", recipe=PROBE, out=tmp_path / "probe", epochs=1, batch=8)
    method, images = Run.open(tmp_path / "probe").method(), data.load("digits_scattered", "test")
    assert method.pool == "mean" and row["n"] == len(images)
    (x,) = method.test_view(28)([images[i] for i in range(20)])
    with torch.no_grad():
        mean = run.backbone().forward_features(x)[:, 1:].mean(1)
        assert torch.allclose(method.logits(x), method.head(mean), atol=1e-5)


def test_test_images_lose_a_margin_only_where_they_have_one():
    probe = PROBE.with_(backbone="resnet_mini").build()
    assert [op.size for op in probe.test_view(224).views[0].image_ops] == [256, 224]
    assert [op.size for op in probe.test_view(28).views[0].image_ops] == [28, 28]


# ---------------------------------------------------------------- what is refused


class Images:
    name, split = "some images", "train"

    def __init__(self, labels):
        self.labels = labels


@pytest.mark.parametrize("labels", [None, [0, 1, -1]])
def test_images_without_labels_are_named(labels):
    with pytest.raises(InputError, match="some images has no labels for every image"):
        labels_of(Images(labels), 10)


def test_classes_that_do_not_match_are_named():
    with pytest.raises(InputError, match=r"some images \(train\) has a class 7, but the classifier has 5 classes"):
        labels_of(Images([0, 7]), 5)
    assert labels_of(Images([0, 4]), 5).tolist() == [0, 4]


def test_without_labels_nothing_is_written(source, tmp_path):
    with pytest.raises(InputError, match="photos has no labels"):
        train_protocol(source, "probe", "photos", tmp_path / "run", recipe=PROBE)
    assert not (tmp_path / "run").exists()


def test_accuracy_is_counted_without_touching_the_mode():
    method = Supervised(methods.recipes("simclr")["demo"].build().backbone, classes=10)
    assert method.train().training and not method.backbone.training


# ---------------------------------------------------------------- the baseline, and sources that are files


def test_fresh_weights_go_through_the_same_protocol_with_statistics_of_the_data(source, tmp_path):
    """Mean 0 and variance 1, which a fresh batch norm believes in, would make any trained network look good."""
    row = train_protocol(source, "linear_demo", out=tmp_path / "run", fresh=True, epochs=1)
    start = Run.open(tmp_path / "run").method().backbone
    assert row["source"] == "random initialisation" and row["protocol"] == "linear_demo, with epochs 1"
    assert not torch.equal(start.bn1.running_mean, torch.zeros_like(start.bn1.running_mean))
    assert not torch.equal(start.conv1[0].weight, source.backbone().conv1[0].weight)
    scratch = train_protocol(source, "linear_demo", out=tmp_path / "all", fresh=True, epochs=1, frozen=False)
    begun = load_file(Run.open(scratch["run"]).recipe.numbers["start"])
    assert torch.equal(begun["bn1.running_mean"], torch.zeros(32)), "what learns estimates its own"


def test_a_baseline_begins_again_with_the_very_same_start(source, tmp_path, monkeypatch):
    """Its statistics differ in the last digit when other threads estimate them."""
    train_protocol(source, "linear_demo", out=tmp_path / "run", fresh=True, epochs=1)
    starts = set(source.path.glob("start-*"))
    monkeypatch.setattr("sslnb.evaluate.sources.calibrated", lambda *_, **__: pytest.fail("it is there"))
    train_protocol(source, "linear_demo", out=tmp_path / "run", fresh=True, epochs=1)
    assert set(source.path.glob("start-*")) == starts
    with pytest.raises(pytest.fail.Exception):
        train_protocol(source, "linear_demo", out=tmp_path / "other", fresh=True, epochs=1, seed=1)


def test_another_size_is_another_protocol_and_stands_in_the_row(source, tmp_path):
    row = train_protocol(source, "linear_demo", out=tmp_path / "run", epochs=1, size=12)
    assert row["protocol"] == "linear_demo, with epochs 1, size 12" and row["size"] == 12


def test_a_file_of_weights_is_a_source_and_says_what_it_fills(source, tmp_path, capsys):
    state = {f"module.encoder_q.{k}": v for k, v in source.backbone().state_dict().items()}
    state |= {"module.encoder_q.fc.0.weight": torch.ones(3, 3), "module.queue": torch.ones(2)}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "official.pth.tar")
    row = train_protocol(tmp_path / "official.pth.tar", "linear_demo", "digits_scattered", tmp_path / "run",
                         backbone="resnet_mini", epochs=1)
    printed = capsys.readouterr().out
    assert "48 tensors of the backbone come from the file, whose names begin with 'module.encoder_q.'" in printed
    assert "2 not used of the file: module.encoder_q.fc.0.weight, module.queue" in printed
    again = train_protocol(source, "linear_demo", out=tmp_path / "same", epochs=1)
    assert row["top1"] == again["top1"] and row["source"] == "official.pth.tar"


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("conv1.0.weight"), r"does not fill resnet_mini: 1 of 48 tensors are missing, such as conv1.0"),
    (lambda s: s.update({"conv1.0.weight": torch.ones(16, 2, 3, 3)}), r"conv1.0.weight is \(16, 2, 3, 3\) in the file"),
])
def test_a_file_that_is_not_the_whole_network_is_refused(source, tmp_path, change, words):
    state = dict(source.backbone().state_dict())
    change(state)
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(InputError, match=words):
        train_protocol(tmp_path / "part.pth", "linear_demo", backbone="resnet_mini", size=20, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_without_the_name_of_its_network_is_refused(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "file.pth")
    with pytest.raises(InputError, match="of which network"):
        train_protocol(tmp_path / "file.pth", "linear_demo")


# ---------------------------------------------------------------- as elsewhere, and on more processes


def test_features_are_those_that_timm_computes_by_itself(tmp_path):
    """timm's model, weights and test transform, without a line of ours."""
    images = data.load("photos")
    torch.manual_seed(1)
    plain = timm.create_model("resnet18", num_classes=0).eval()
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    judged = open_source(tmp_path / "plain.pth", 0, "resnet18")
    cfg = {"input_size": (3, 96, 96), "crop_pct": 96 / round(96 * 256 / 224), "interpolation": "bicubic",
           "mean": timm.data.IMAGENET_DEFAULT_MEAN, "std": timm.data.IMAGENET_DEFAULT_STD}
    transform = timm.data.create_transform(**cfg)
    with torch.no_grad():
        theirs = plain(torch.stack([transform(images[i]) for i in range(len(images))]))
    ours = extract(judged.backbone(96), images, size=96)
    assert torch.allclose(ours.x, theirs, atol=1e-5) and ours.x.std() > 0.01


@pytest.mark.distributed
def test_two_processes_train_the_same_classifier_and_count_every_test_image_once(source, tmp_path):
    rows = [train_protocol(source, "linear_demo", out=tmp_path / str(n), processes=n, epochs=2) for n in (1, 2)]
    heads = [Run.open(row["run"]).method().head.weight for row in rows]
    assert torch.allclose(*heads, rtol=1e-3, atol=1e-4) and heads[0].std() > 0.1
    assert rows[0]["n"] == rows[1]["n"] == 497 and abs(rows[0]["top1"] - rows[1]["top1"]) < 0.5
    tests = [Run.open(row["run"]).history("test") for row in rows]
    assert [len(t) for t in tests] == [2, 2]
