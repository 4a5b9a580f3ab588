"""The multi-head linear protocol: maps and their pooling, heads, norms, what moves, recipes, rows, other data sets."""

import copy
import json

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from sslnb import Run, backbones, data, methods, pretrain
from sslnb.data import load
from sslnb.draws import Draws
from sslnb.errors import InputError
from sslnb.evaluate.multihead import (
    MULTIHEAD,
    Lighting,
    MultiHead,
    RandomCrop,
    inat18_lists,
    maps,
    places205_lists,
    pooling,
    pools,
)
from sslnb.evaluate.protocol import train_protocol

PUBLISHED = MULTIHEAD["multihead_imagenet"]


@pytest.fixture(scope="module")
def headed(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("multihead") / "run"
    row = train_protocol(source, "multihead_demo", out=out, epochs=3, milestones=(2,))
    return row, Run.open(out)


def small(**numbers):
    torch.manual_seed(0)
    return MultiHead(backbones.build("resnet_mini", 20), classes=10, **numbers)


# ---------------------------------------------------------------- maps and pooling


@pytest.fixture(scope="module")
def resnet50():
    torch.manual_seed(0)
    return backbones.build("resnet50", 224)


@torch.no_grad()
def test_five_maps_of_a_real_resnet50_and_their_published_pooling(resnet50):
    x = torch.randn(1, 3, 224, 224)
    found = maps(resnet50.eval(), x)
    assert [tuple(m.shape[1:]) for m in found] == [(64, 112, 112), (256, 56, 56), (512, 28, 28), (1024, 14, 14),
                                                   (2048, 7, 7)]
    _, theirs = resnet50.forward_intermediates(x)
    assert all(torch.equal(a, b) for a, b in zip(found, theirs, strict=True)), "timm's own maps"
    assert torch.equal(found[0], F.relu(resnet50.bn1(resnet50.conv1(x)))), "before max-pooling"
    made, shapes = pools(resnet50)
    wanted = [F.avg_pool2d(m, kernel, stride, padding) for m, (kernel, stride, padding) in zip(
        found, [(10, 10, 4), (16, 8, 0), (13, 5, 0), (8, 3, 0), (6, 1, 0)], strict=True)]
    assert all(torch.equal(pool(m), w) for pool, m, w in zip(made, found, wanted, strict=True))
    assert shapes == [(64, 12, 12), (256, 6, 6), (512, 4, 4), (1024, 3, 3), (2048, 2, 2)]
    assert [int(np.prod(s)) for s in shapes] == [9216, 9216, 8192, 9216, 8192]


def test_adaptive_pooling_goes_to_the_same_sides_and_leaves_small_maps_alone():
    x = torch.randn(2, 3, 28, 28)
    assert torch.equal(pooling(2, 28, "adaptive")(x), F.adaptive_avg_pool2d(x, 4))
    assert not torch.allclose(pooling(2, 28, "adaptive")(x), pooling(2, 28, "auto")(x)), "windows of 7 and of 13"
    assert torch.equal(pooling(0, 10)(x[..., :10, :10]), x[..., :10, :10])


def test_auto_takes_the_published_pooling_only_where_it_gives_the_published_side():
    assert isinstance(pooling(4, 7), nn.AvgPool2d) and isinstance(pooling(4, 8), nn.AdaptiveAvgPool2d)
    for level in range(5):
        assert isinstance(pooling(level, 112 // 2**level), nn.AvgPool2d)
        assert isinstance(pooling(level, 3), nn.AdaptiveAvgPool2d)


def test_a_pooling_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="does not take the 5 x 5 map of feat5 to 2 x 2; use pooling='auto'"):
        pooling(4, 5, "specified")
    with pytest.raises(InputError, match="pooling 'adaptiv' is unknown"):
        pooling(4, 7, "adaptiv")


@torch.no_grad()
def test_a_small_resnet_has_as_many_levels_as_stages_with_blocks():
    method = small().eval()
    x = torch.randn(2, 3, 20, 20)
    found = maps(method.backbone, x)
    assert [tuple(m.shape[1:]) for m in found] == [(32, 10, 10), (32, 10, 10), (64, 5, 5)]
    assert torch.equal(found[-1], method.backbone.forward_features(x))
    assert method.head.shapes == [(32, 10, 10), (32, 6, 6), (64, 4, 4)]
    assert method.head.adaptive == ["feat1", "feat2", "feat3"]
    assert method.logits(x).shape == (2, 10, 3)


# ---------------------------------------------------------------- the heads


def test_the_real_protocol_trains_ten_tensors_44_million_numbers_and_keeps_the_backbone_still():
    with torch.device("meta"):
        method = PUBLISHED.build().train()
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    assert [tuple(p.shape) for p in trained.values()] == [s for d in (9216, 9216, 8192, 9216, 8192)
                                                          for s in ((1000, d), (1000,))]
    assert sum(p.numel() for p in trained.values()) == 1000 * (3 * 9216 + 2 * 8192 + 5)
    norms = [m for m in method.head.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [n.num_features for n in norms] == [64, 256, 512, 1024, 2048]
    assert all(not n.affine and n.momentum == 0.1 and n.training for n in norms)
    assert not any(m.training for m in method.backbone.modules())
    assert method.sync_bn and not method.accumulable and not method.head.adaptive
    with torch.device("meta"):
        inat = MULTIHEAD["multihead_inat18"].build()
    assert sum(p.numel() for p in inat.head.parameters()) == pytest.approx(359e6, rel=0.01)


def test_heads_begin_as_published():
    for level in small().head:
        assert level[3].weight.std().item() == pytest.approx(0.01, rel=0.05) and not level[3].bias.any()


def test_logits_and_loss_by_hand():
    method = small().train()
    x, labels = torch.randn(16, 3, 20, 20), torch.arange(16) % 10
    method.labels = labels.flip(0)
    total, right = 0.0, []
    with torch.no_grad():
        for level, m, side in zip(method.head, maps(method.backbone, x), (10, 6, 4), strict=True):
            pooled = F.adaptive_avg_pool2d(m, side)
            mean, var = pooled.mean((0, 2, 3), keepdim=True), pooled.var((0, 2, 3), correction=0, keepdim=True)
            flat = ((pooled - mean) / (var + 1e-5).sqrt()).flatten(1)  # of the batch, per channel, before flattening
            logits = flat @ level[3].weight.T + level[3].bias
            total += F.cross_entropy(logits, labels)
            right.append((logits.argmax(1) == labels).float().mean().item())
    out = method([x], torch.arange(15, -1, -1))
    assert out["loss"].item() == pytest.approx(total.item(), rel=1e-5)
    assert [out[f"feat{i}"].item() for i in (1, 2, 3)] == pytest.approx(right)


def test_norms_learn_statistics_in_training_and_use_them_in_the_test():
    method = small().train()
    x = torch.randn(64, 3, 20, 20)
    before = copy.deepcopy(method.backbone.state_dict())
    method([x])
    norm = method.head[2][1]
    pooled = F.adaptive_avg_pool2d(maps(method.backbone, x)[2], 4)
    assert torch.allclose(norm.running_mean, 0.1 * pooled.mean((0, 2, 3)), atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in method.backbone.state_dict().items())
    method.eval()
    assert torch.allclose(method.logits(x)[:1], method.logits(x[:1]), atol=1e-5), "no batch statistics in the test"


def test_five_heads_at_once_are_five_alone():
    """Two steps with momentum and decay: every head ends where it ends without the others."""
    x, labels = torch.randn(2, 20, 3, 20, 20), torch.arange(20) % 10
    together = small().train()
    alone = copy.deepcopy(together)
    optimizer = torch.optim.SGD(together.head.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)
    for images in x:
        optimizer.zero_grad()
        together([images], torch.arange(20))["loss"].backward()
        optimizer.step()
    for i, level in enumerate(alone.head):
        optimizer = torch.optim.SGD(level.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-2)
        for images in x:
            optimizer.zero_grad()
            F.cross_entropy(level(maps(alone.backbone, images)[i].detach()), labels).backward()
            optimizer.step()
        assert torch.allclose(level[3].weight, together.head[i][3].weight, atol=1e-6)
        assert not torch.equal(level[3].weight, small().head[i][3].weight)


def test_decay_is_for_weights_and_biases_of_the_heads():
    with torch.device("meta"):
        method = PUBLISHED.build()
    (group,) = method.param_groups(PUBLISHED)
    assert len(group["params"]) == 10 and group["weight_decay"] == 1e-4


# ---------------------------------------------------------------- Sobel


def test_a_sobel_run_is_evaluated_on_sobel_maps(tmp_path):
    recipe = methods.recipes("deepcluster")["demo"].with_(epochs=1, batch=130, clusters=10)
    run = pretrain(recipe.with_(data="few_digits"), out=tmp_path / "deepcluster")
    row = train_protocol(run, "multihead_demo", out=tmp_path / "run", epochs=1)
    method = Run.open(tmp_path / "run").method()
    x = torch.randn(2, 3, 20, 20)
    stem = method.backbone
    grey = x.mean(1, keepdim=True)
    kernel = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    filtered = F.conv2d(grey, torch.stack([kernel, kernel.T])[:, None], padding=1)
    with torch.no_grad():
        wanted = filtered
        for layer in stem.conv1:
            wanted = layer(wanted)
        assert torch.allclose(maps(stem, x)[0], F.relu(stem.bn1(wanted)), atol=1e-5)
    assert next(stem.parameters()).shape[1] == 2 and row["feat1"]["n"] == 130


@pytest.mark.parametrize("wrong, sentence", [
    ({"backbone_numbers": {"in_chans": 2}}, "in_chans 2 of resnet_mini is impossible: .* or sobel=True"),
    ({"backbone": "vit_mini"}, "needs a ResNet with its stem and stages, and VisionTransformer has other parts"),
    ({"numbers": {"pooling": "specified"}}, "does not take the 10 x 10 map of feat1 to 12 x 12"),
])
def test_a_backbone_that_cannot_be_read_is_refused_before_any_work(wrong, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=sentence):
        MultiHead.fitted(MULTIHEAD["multihead_demo"].with_(**wrong))
    assert not list(tmp_path.iterdir())


def test_a_network_for_sobel_maps_without_the_filter_is_told():
    with pytest.raises(InputError, match="takes 2 channels instead of 3: .* build it with sobel=True"):
        pools(timm.create_model("resnet18", num_classes=0, in_chans=2), size=32)


# ---------------------------------------------------------------- images


def test_lighting_adds_the_components_of_imagenets_colours():
    light, x = Lighting(0.1), torch.rand(2, 3, 4, 5)
    alpha = torch.tensor([[0.1, 0, 0], [0.05, -0.1, 0.2]])
    y = light.apply(x, alpha)
    vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    for b in range(2):
        for channel in range(3):
            shift = sum(vectors[channel, k] * float(alpha[b, k]) * (0.2175, 0.0188, 0.0045)[k] for k in range(3))
            assert torch.allclose(y[b, channel], x[b, channel] + shift, atol=1e-6)


def test_lighting_is_normal_with_its_std_and_depends_on_the_image_alone():
    (alpha,) = Lighting(0.1).sample(Draws(torch.arange(20_000)))
    assert alpha.shape == (20_000, 3) and alpha.std(0).tolist() == pytest.approx([0.1] * 3, rel=0.02)
    assert alpha.mean(0).abs().max() < 0.003 and np.corrcoef(alpha.T.numpy())[np.triu_indices(3, 1)].max() < 0.03
    assert (alpha.abs() > 0.2).float().mean().item() == pytest.approx(0.0455, abs=0.005), "as many beyond two std"
    assert torch.equal(Lighting(0.1).sample(Draws(torch.tensor([7])))[0][0], alpha[7])


def test_a_random_crop_is_anywhere_and_whole():
    import random

    image = Image.fromarray(np.arange(36, dtype=np.uint8).reshape(6, 6)).convert("RGB")
    corners = {np.asarray(RandomCrop(5)(image, random.Random(s)))[0, 0, 0] for s in range(40)}
    assert corners == {0, 1, 6, 7}


def ops(method, size=224):
    (view,) = method.views(size).views
    return [type(op).__name__ for op in (*view.image_ops, *view.batch_ops)], view


def test_every_recipes_images_go_through_what_was_published():
    built = {}
    for name, recipe in MULTIHEAD.items():
        with torch.device("meta"):
            built[name] = recipe.build()
    names, view = ops(built["multihead_imagenet"])
    assert names == ["RandomResizedCrop", "HorizontalFlip", "ColorJitter", "Lighting", "Normalize"]
    jitter, light = view.batch_ops[:2]
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue, jitter.p) == (0.4, 0.4, 0.4, 0, 1)
    assert light.std == 0.1 and view.image_ops[0].scale == (0.08, 1.0) and view.image_ops[1].p == 0.5
    names, view = ops(built["multihead_places205"])
    assert names == ["Resize", "CenterCrop", "RandomCrop", "HorizontalFlip", "Normalize"]
    assert [op.size for op in view.image_ops[:3]] == [256, 256, 224]
    assert ops(built["multihead_inat18"])[0] == ["RandomResizedCrop", "HorizontalFlip", "Normalize"]
    for method in built.values():
        assert [op.size for op in method.test_view(224).views[0].image_ops] == [256, 224]


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("name, classes, epochs, milestones", [
    ("multihead_imagenet", 1000, 90, (30, 60)),
    ("multihead_places205", 205, 28, (7, 14, 21)),
    ("multihead_inat18", 8142, 84, (24, 48, 72))])
def test_recipes_are_those_of_the_spec(name, classes, epochs, milestones):
    r = MULTIHEAD[name]
    assert (r.total_batch, r.lr, r.weight_decay, r.optimizer, r.nesterov, r.sgd_momentum) == (256, 0.01, 1e-4, "sgd",
                                                                                            True, 0.9)
    assert (r.backbone, r.size, r.numbers["classes"], r.epochs, r.milestones) == ("resnet50", 224, classes, epochs,
                                                                                   milestones)
    rates = [r.lr_at(e * 100 + 99, 100) for e in range(epochs)]
    assert rates == pytest.approx([0.01 * 0.1 ** sum(e >= m for m in milestones) for e in range(epochs)])
    assert r.warmup_epochs == 0


def test_one_process_holds_the_whole_batch_since_its_norm_sees_it():
    assert PUBLISHED.on(1).batch == 256 and PUBLISHED.on(1).accum == 1


# ---------------------------------------------------------------- a run


def test_nothing_of_the_backbone_moves_and_every_head_does(source, headed):
    before, method = source.backbone().state_dict(), headed[1].method()
    assert all(torch.equal(v, before[k]) for k, v in method.backbone.state_dict().items())
    assert all(level[3].weight.std() > 0.012 and level[1].running_mean.abs().max() > 0.1 for level in method.head)


def test_the_row_is_what_the_heads_say_of_every_test_image_after_the_last_epoch(source, headed):
    row, run = headed
    method, images = run.method(), data.load("digits_scattered", "test")
    (x,) = method.test_view(20)([images[i] for i in range(len(images))])
    with torch.no_grad():
        right = (method.logits(x).argmax(1) == images.labels[:, None]).float().mean(0)
    for i, share in enumerate(right.tolist(), 1):
        found = row[f"feat{i}"]
        assert found["top1"] == pytest.approx(100 * share, abs=1e-3) and found["n"] == len(images)
        assert found["interval"][0] < found["top1"] < found["interval"][1]
        assert found["top1"] == pytest.approx(run.history("test")[-1][f"feat{i}"])
    best = max((f"feat{i}" for i in (1, 2, 3)), key=lambda name: row[name]["top1"])
    assert row["best_level"] == best and row["top1"] == row[best]["top1"] and row["interval"] == row[best]["interval"]
    assert row["adaptive"] == ["feat1", "feat2", "feat3"] and [r["epoch"] for r in run.history("test")] == [1, 2, 3]
    assert {"feat1", "feat2", "feat3", "loss"} <= set(run.history()[-1])


def test_the_last_epoch_counts_not_the_best():
    tests = [{"n": 10, "correct": {"feat1": c, "feat2": 5}, "adaptive": []} for c in (9, 4)]
    row = MultiHead.results(tests)
    assert row["feat1"]["top1"] == 40 and row["best_level"] == "feat2" and row["top1"] == 50


def test_it_says_what_makes_it_another_protocol(capsys):
    MultiHead.fitted(MULTIHEAD["multihead_demo"])
    said = capsys.readouterr().out
    assert "does not fit feat1, feat2, feat3 of resnet_mini at 20 px: adaptive pooling to 10 x 10, 6 x 6, 4 x 4" in said
    assert "classes" not in said
    MultiHead.fitted(PUBLISHED.with_(data="digits"))
    assert capsys.readouterr().out == "The protocol was published for 1000 classes, and digits has 10: this is " \
                                      "another one.\n"


def test_the_real_places_recipe_takes_a_step(tmp_path):
    """ResNet-18 for ResNet-50, so that it fits into a test; everything else is the recipe's."""
    recipe = MULTIHEAD["multihead_places205"].with_(backbone="resnet18", data="few_digits", gpus=1, batch=8, size=96)
    recipe = MultiHead.fitted(recipe.with_(steps=2))
    run = pretrain(recipe.with_(steps=2), out=tmp_path / "run", workers=0)
    test = run.history("test")[-1]
    assert set(test["correct"]) == {"feat1", "feat2", "feat3", "feat4", "feat5"} and test["n"] == 130


@pytest.mark.distributed
def test_two_processes_train_the_heads_of_one(source, tmp_path):
    """The norm of the heads sees the batch of both."""
    heads = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        train_protocol(source, "multihead_demo", "digits_scattered", out, epochs=1, processes=processes)
        heads.append(Run.open(out).method().head.state_dict())
    assert all(torch.allclose(v, heads[1][k], atol=1e-5) for k, v in heads[0].items() if v.is_floating_point())


# ---------------------------------------------------------------- lists


def picture(file, shade):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, shade, shade)).save(file)


@pytest.fixture
def places(tmp_path):
    root = tmp_path / "Places205"
    lines = {"train": ["a/abbey/gsun_1.jpg 0", "b/bar/gsun_2.jpg 1", "a/abbey/gsun_3.jpg 0"], "val": ["b/bar/4.jpg 1"]}
    (root / "trainvalsplit_places205").mkdir(parents=True)
    for split, rows in lines.items():
        (root / "trainvalsplit_places205" / f"{split}_places205.csv").write_text("\n".join(rows) + "\n")
        for row in rows:
            path, label = row.split()
            picture(root / "data/vision/torralba/deeplearning/images256" / path, 100 + int(label))
    return root


@pytest.mark.parametrize("elsewhere", [False, True])
def test_places_official_lists_are_read_with_their_images(places, tmp_path, elsewhere):
    folder = places205_lists(places, tmp_path / "lists" if elsewhere else None)
    train, test = load(folder), load(folder, "test")
    assert train.labels.tolist() == [0, 1, 0] and test.labels.tolist() == [1] and len(train.classes) == 2
    for images in (train, test):
        assert [images[i].getpixel((0, 0))[0] - 100 for i in range(len(images))] == images.labels.tolist()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_inaturalists_annotations_are_joined_by_the_ids_of_images(tmp_path, elsewhere):
    root = tmp_path / "inat"
    root.mkdir()
    for split, offset in (("train", 0), ("val", 50)):
        images = [{"id": offset + i, "file_name": f"train_val2018/Aves/{i % 2}/{offset + i}.jpg"} for i in range(4)]
        labels = [{"id": 9 - i, "image_id": offset + i, "category_id": (i * i) % 3} for i in (2, 0, 3, 1)]
        (root / f"{split}2018.json").write_text(json.dumps({"images": images, "annotations": labels}))
        for i, image in enumerate(images):
            picture(root / image["file_name"], 100 + (i * i) % 3)
    folder = inat18_lists(root, tmp_path / "lists" if elsewhere else None)
    for split in ("train", "test"):
        images = load(folder, split)
        assert images.labels.tolist() == [0, 1, 1, 0]
        assert [images[i].getpixel((0, 0))[0] - 100 for i in range(4)] == [0, 1, 1, 0]


def test_a_protocol_runs_on_a_pair_of_lists(places, tmp_path, source):
    folder = places205_lists(places)
    row = train_protocol(source, "multihead_demo", folder, tmp_path / "run", epochs=1, batch=2, workers=0)
    assert row["n"] == 1 and row["data"] == str(folder)


def test_what_is_missing_is_named(places, tmp_path):
    with pytest.raises(InputError, match="has neither images256/ nor data/vision"):
        places205_lists(tmp_path)
    (places / "trainvalsplit_places205/val_places205.csv").unlink()
    with pytest.raises(InputError, match="There is no file .*val_places205.csv"):
        places205_lists(places)
    with pytest.raises(InputError, match="There is no file .*train2018.json"):
        inat18_lists(tmp_path)
    with pytest.raises(InputError, match="Unknown protocol 'multihead_imagnet': did you mean 'multihead_imagenet'"):
        train_protocol("resnet_mini", "multihead_imagnet")


def test_class_folders_come_before_lists_and_one_list_alone_is_no_pair(tmp_path):
    for split in ("train", "val"):
        picture(tmp_path / split / "dog" / "1.png", 1)
        (tmp_path / f"{split}.txt").write_text(f"{split}/dog/1.png 7\n")
    assert load(tmp_path).classes == ["dog"]
    for folder in ("one", "two"):
        picture(tmp_path / "x" / folder / "1.png", 1)
        picture(tmp_path / "x" / folder / "2.png", 1)
    (tmp_path / "x" / "train.txt").write_text("one/1.png 3\n")
    assert load(tmp_path / "x").classes == ["one", "two"]
