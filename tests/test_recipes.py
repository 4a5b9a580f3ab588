"""Recipes: the zoo's rows with their real shapes, names that cannot lie, and changes that keep what must be kept."""

import re
import subprocess
import sys
from math import inf, nan
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslnb import evaluate, limits, methods, pretrain
from sslnb.checks import prepare
from sslnb.choice import OF_VIEWS, _nearest, is_imagenet, resolve
from sslnb.errors import InputError
from sslnb.evaluate.sources import open_source
from sslnb.recipes import Recipe, method_numbers
from sslnb.run import Run
from sslnb.trial import try_out

ALL = [(m, name) for m in methods.METHODS for name in methods.recipes(m)]
ZOO = [(m, name) for m, name in ALL if name != "demo"]


def test_the_zoo_rows_of_these_methods_are_there():
    assert {name for _, name in ZOO} >= {
        "r50_8xb64_cos_lr0_6_fp16_ep200", "r50_16xb256_cos_lr4_8_fp16_ep200", "r50_8xb64_accu8_cos_lr4_8_fp16_ep200",
        "r50_8xb64_accu8_cos_lr4_8_fp16_ep300", "vit_base_dec8_dim512_8xb128_accu4_cos_fp16_ep400"}


# The zoo counts pictures here: its loader takes 16 images, each of which is shown in four rotations.
BATCH_OF_A_LYING_NAME = {("rotation", "r50_8xb64_step_ep70"): 16}


@pytest.mark.parametrize("method, name", ZOO)
def test_a_recipe_is_what_its_zoo_name_says(method, name):
    r = methods.recipes(method)[name]
    gpus, batch = map(int, re.search(r"(\d+)xb(\d+)", name).groups())
    batch = BATCH_OF_A_LYING_NAME.get((method, name), batch)
    assert (r.gpus, r.batch) == (gpus, batch)
    assert r.accum == int((re.search(r"accu(\d+)", name) or [0, 1])[1])
    if epochs := re.search(r"ep(\d+)", name):
        assert r.epochs == int(epochs[1])
    if lr := re.search(r"lr(\d+(?:_\d+)?)", name):
        assert r.lr == float(lr[1].replace("_", "."))
    if "fp16" in name:
        assert r.precision == "fp16"
    assert {"cos": "cosine", "step": "step"}[re.search(r"_(cos|step)", name)[1]] == r.schedule


@pytest.mark.parametrize("method, name, total", [
    ("simclr", "r50_8xb64_cos_lr0_6_fp16_ep200", 512), ("simclr", "r50_16xb256_cos_lr4_8_fp16_ep200", 4096),
    ("byol", "r50_8xb64_accu8_cos_lr4_8_fp16_ep300", 4096),
    ("mae", "vit_base_dec8_dim512_8xb128_accu4_cos_fp16_ep400", 4096)])
def test_total_batches(method, name, total):
    assert methods.recipes(method)[name].total_batch == total


@pytest.mark.parametrize("method, name, counts", [
    ("simclr", "r50_8xb64_cos_lr0_6_fp16_ep200", {"backbone": 23_508_032, "projector": 4_460_800}),
    ("byol", "r50_8xb64_accu8_cos_lr4_8_fp16_ep200",
     {"backbone": 23_508_032, "projector": 9_449_472, "predictor": 2_109_440, "target": 32_957_504}),
    ("mae", "vit_base_dec8_dim512_8xb128_accu4_cos_fp16_ep400", {"backbone": 85_798_656, "decoder": 26_109_184})])
def test_imagenet_recipes_build_the_real_models(method, name, counts):
    with torch.device("meta"):
        built = methods.recipes(method)[name].build()
    assert {k: sum(p.numel() for p in m.parameters()) for k, m in built.named_children()} == counts


def test_the_imagenet_backbone_is_the_published_architecture():
    r50 = methods.recipes("simclr")["r50_8xb64_cos_lr0_6_fp16_ep200"].build().backbone
    assert r50.conv1.kernel_size == (7, 7) and r50.conv1.stride == (2, 2)
    assert r50.layer4(torch.zeros(1, 1024, 14, 14)).shape == (1, 2048, 7, 7)


def test_mae_at_full_size_has_the_papers_shapes():
    method = methods.recipes("mae")["vit_base_dec8_dim512_8xb128_accu4_cos_fp16_ep400"].build()
    latents = []
    method.decoder.register_forward_pre_hook(lambda module, args: latents.append(args[0].shape))
    out = method([torch.randn(1, 3, 224, 224)])
    assert latents == [(1, 50, 768)] and out["prediction"].shape == (1, 196, 768) and out["mask"].sum() == 147


@pytest.mark.parametrize("method, name", ALL)
def test_recipes_survive_json(method, name):
    r = methods.recipes(method)[name]
    assert Recipe.from_json(r.to_json()) == r
    assert "total batch" in r.describe() and r.name


def test_the_recipe_is_told_in_full_with_the_source_of_each_number():
    lines = resolve("maskfeat", data="imagenet", clip=0.5).describe().split("\n")
    said = {line[:12].strip(): line[14:] for line in lines}
    assert said["optimizer"] == "adamw, betas (0.9, 0.999)   [official code]"
    assert said["weight decay"] == "0.05   [official code]" and said["clip"] == "gradients longer than 0.5   [you]"
    assert said["lr"].endswith("at least 8e-06   [official code]")
    assert said["as usual"].startswith("mask_ratio 0.4, gaussian_window 16")
    assert "[paper]" in next(line for line in resolve("mae").describe().split("\n") if "weight decay" in line)
    step = resolve("mocov1", data="imagenet").describe()
    assert "sgd, momentum 0.9   [" in step and "0.03, step (x 0.1 after (120, 160)), warm-up 0 epochs   [" in step


def test_a_recipe_beside_another_one_is_what_differs():
    demo = resolve("simclr")
    assert demo.beside(demo) == demo.with_(note="x").beside(demo) == []
    assert demo.with_(temperature=5.0, epochs=8).beside(demo) == ["epochs 8", "temperature 5.0"]
    other = resolve("mocov1", shuffle=False)
    assert other.beside(resolve("mocov1")) == ["shuffle False"] and resolve("mocov1").beside(other) == ["shuffle True"]


def test_on_keeps_the_total_batch():
    byol = methods.recipes("byol")["r50_8xb64_accu8_cos_lr4_8_fp16_ep200"]
    for gpus, batch, expected in ((1, None, (64, 64)), (16, None, (64, 4)), (64, None, (64, 1)), (8, 256, (256, 2))):
        r = byol.on(gpus, batch)
        assert (r.batch, r.accum) == expected and r.total_batch == 4096
    with pytest.raises(InputError, match="4096 cannot be split over 7"):
        byol.on(7)


def test_a_method_whose_batch_is_its_negatives_is_not_accumulated():
    simclr = methods.recipes("simclr")["r50_8xb64_cos_lr0_6_fp16_ep200"]
    assert (simclr.on(2).batch, simclr.on(2).accum) == (256, 1)
    with pytest.raises(InputError, match="must not accumulate"):
        simclr.on(1, 64)
    assert simclr.with_(force_accum=True).on(1, 64).accum == 8


@pytest.mark.parametrize("method", ["mocov3", "barlowtwins", "swav"])
def test_a_row_that_accumulates_such_a_method_compares_as_many_images_on_any_hardware(method):
    row = resolve(method, data="imagenet")
    assert row.accum > 1 and row.force_accum
    for gpus in (1, 4, 16):
        other = resolve(method, data="imagenet", processes=gpus)
        assert (other.gpus, other.gpus * other.batch, other.accum) == (gpus, row.gpus * row.batch, row.accum)
    with pytest.raises(InputError, match=f"{2 * row.accum} batches of 256 are another method than {row.accum} of 512. "
                                         "Use batch=128, with chunk=64 or so"):
        row.on(4, 64)
    with pytest.raises(InputError, match=f"{row.total_batch}, {row.accum} x 512, cannot be split over 3 processes"):
        row.on(3)
    with pytest.raises(InputError, match="must not accumulate: .* are another method than 1 of"):
        other.with_(force_accum=False).on(gpus, other.batch)


@pytest.mark.parametrize("method, changes, expected", [
    ("byol", {"batch": 32, "processes": 8}, (8, 32, 16)), ("mae", {"batch": 512, "processes": 8}, (8, 512, 1)),
    ("mocov2", {"batch": 32, "processes": 8}, (8, 32, 1)), ("mocov2", {"batch": 128}, (4, 128, 1)),
    ("simclr", {"batch": 64, "processes": 1}, (1, 64, 1)), ("mae", {"batch": 96, "processes": 8}, (8, 96, 1)),
    ("simclr", {"batch": 64, "processes": 1, "force_accum": True}, (1, 64, 8)),
    ("mocov3", {"batch": 64, "processes": 4}, (4, 64, 1)), ("mae", {"batch": 64, "accum": 2}, (8, 64, 2))])
def test_a_batch_of_ones_own_keeps_the_total_of_a_row_where_the_method_may_accumulate(method, changes, expected):
    row, recipe = (resolve(method, data="imagenet", **of) for of in ({}, changes))
    assert (recipe.gpus, recipe.batch, recipe.accum) == expected and recipe.source_of("batch") == "you"
    same = recipe.total_batch == row.total_batch
    assert bool(recipe.published) == same and (recipe.note == row.note) == (same or "accum" in changes)
    if recipe.note != row.note:
        lr = row.lr * recipe.total_batch / row.total_batch
        assert recipe.note.startswith(f"Your batch makes it {recipe.total_batch} images per step, and lr {row.lr:g} "
                                      f"was chosen for {row.total_batch}: in proportion it would be {lr:.3g}.")
        assert resolve(method, data="imagenet", lr=0.5, **changes).note == row.note, "their own lr is theirs to choose"


def test_a_batch_of_ones_own_is_that_of_each_process_in_a_demo():
    demo = resolve("mae")
    for processes in (1, 2):
        recipe = resolve("mae", batch=25, processes=processes)
        assert (recipe.gpus, recipe.batch, recipe.accum) == (processes, 25, 1), "a small folder needs a small total"
        assert recipe.note.startswith(f"Your batch makes it {25 * processes} images per step, and lr {demo.lr:g} was")


@pytest.mark.parametrize("method, backbone, epochs, row", [
    ("mocov3", "resnet50", 100, "r50_16xb256_cos_lr9_6_fp16_ep100"),
    ("mocov3", "resnet101", 7, "r50_4xb256_accu4_cos_fp16"),
    ("mocov3", "vit_small_patch16_224", 100, "vit_small_8xb64_accu8_cos_fp16_ep300"),
    ("mocov3", "vit_base_patch16_224", 300, "vit_small_8xb64_accu8_cos_fp16_ep300"),
    ("simmim", "beit_base_patch16_224", 800, "vit_base_rgb_m_sz224_8xb128_accu2_step_fp16_ep800"),
    ("a2mim", "beit_base_patch16_224", 100, "vit_base_l0_sz224_8xb128_accu2_step_ep800"),
    ("byol", "vit_small_patch16_224", 300, "r50_8xb64_accu8_cos_lr4_8_fp16_ep300")])
def test_of_several_rows_that_for_the_backbone_is_taken(method, backbone, epochs, row):
    found = resolve(method, data="imagenet", backbone=backbone, epochs=epochs)
    assert found == methods.recipes(method)[row].with_(backbone=backbone, epochs=epochs, sources=found.sources,
                                                       data="imagenet")


def test_of_several_rows_of_one_kind_that_for_the_very_backbone_is_taken():
    fifty = resolve("byol", data="imagenet")
    rows = [fifty, fifty.with_(backbone="resnet18"), fifty.with_(backbone="resnet18", epochs=5)]
    assert _nearest(rows, "resnet18") == rows[1] and _nearest(rows, "resnet18", 5) == rows[2]
    assert _nearest(rows, "resnet34") == _nearest(rows) == fifty and _nearest(rows, epochs=5) == rows[2]


def test_another_backbone_takes_over_what_holds_for_it_too():
    def numbers(method, backbone, **of):
        return dict(resolve(method, backbone=backbone, **of).backbone_numbers)

    assert numbers("deepcluster", "resnet18") == {"sobel": True}, "the filter is the method's"
    assert numbers("deepcluster", "resnet101", data="imagenet") == {"sobel": True, "zero_init_last": False}
    assert numbers("deepcluster", "vgg11", data="imagenet") == {"sobel": True}
    assert numbers("mocov3", "vit_base_patch16_224", data="imagenet") == {}, "12 heads are ViT-S's"
    assert numbers("rotation", "resnet18") == {}, "layers and channels are the mini's"
    assert numbers("cae", "beit_large_patch16_224", data="imagenet") == {
        "use_abs_pos_emb": True, "use_rel_pos_bias": False, "init_values": 0.1}
    said = resolve("deepcluster", backbone="resnet18").describe()
    assert "resnet18 at 20 px, sobel True" in said


def test_what_was_published_for_a_recipe_is_not_for_another():
    r = resolve("byol", data="imagenet", epochs=300)
    for changes in ({"epochs": 10}, {"lr": 1.0}, {"backbone": "resnet18"}, {"momentum": 0.5}, {"size": 160},
                    {"batch": 32}, {"accum": 4}):
        assert not r.with_(**changes).published, changes
    same = r.with_(data="/data/imagenet", gpus=4, batch=64, accum=16, precision="bf16", lr=r.lr)
    assert r.published and r.on(2).published == r.published == same.published
    assert r.with_(lr=1.0, published={"mine": 1.0}).published == {"mine": 1.0}


def test_a_recipe_that_is_counted_in_steps_from_now_on_keeps_its_shape():
    r = resolve("mocov1", data="imagenet", steps=5000)
    assert r.milestones == (3000, 4000) and r.lr_at(4999, 5004) == pytest.approx(r.lr / 100)
    r = resolve("byol", data="imagenet", epochs=300, steps=1000)
    assert r.warmup_steps == round(1000 * 10 / 300) and max(r.lr_at(s, 312) for s in range(1000)) == pytest.approx(r.lr)
    assert resolve("mocov1", data="imagenet", steps=100, milestones=(7,)).milestones == (7,)


def test_a_path_stays_a_path_though_a_set_of_ours_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve("byol", data=Path("photos")).data == str(tmp_path / "photos")
    assert resolve("byol", data="photos").data == "photos" and resolve("byol", data=Path("mine")).data == "mine"


def test_a_rate_that_is_held_within_an_epoch_never_goes_back_into_the_warm_up():
    for warmup in (0.5, 1.5):
        r = resolve("simsiam", data="imagenet").with_(warmup_epochs=warmup, lr_by_epoch=True)
        rates = [r.lr_at(step, 10) for step in range(30)]
        begun = round(10 * warmup)
        assert rates[begun] == pytest.approx(r.lr, rel=0.01) and rates[begun:-(-begun // 10) * 10] == \
            [rates[begun]] * (-(-begun // 10) * 10 - begun)
        assert len(set(rates[20:])) == 1 and max(rates[begun:]) == rates[begun]


def test_resolve_takes_what_the_data_and_the_epochs_ask_for(tmp_path):
    assert resolve("byol").data == "digits_scattered"
    assert resolve("byol", epochs=300).epochs == 300 and resolve("byol", epochs="auto") == resolve("byol")
    r = resolve("byol", data="imagenet", epochs=300)
    assert r.published == {"linear, SimSiam protocol": 72.93} and r.source_of("epochs") == "you"
    for i in range(1000):
        (tmp_path / "train" / f"n{i:08d}").mkdir(parents=True)
    for i in range(100):
        (tmp_path / "hundred" / f"n{i:08d}").mkdir(parents=True)
    assert is_imagenet(tmp_path) and not is_imagenet(tmp_path / "elsewhere") and not is_imagenet(tmp_path / "hundred")
    assert resolve("byol", data=str(tmp_path), epochs=7).backbone == "resnet50"
    assert resolve("mae", mask_ratio=0.5).numbers["mask_ratio"] == 0.5
    assert resolve("byol", processes=2).batch * 2 == resolve("byol").batch


@pytest.mark.parametrize("method, backbone, size, words", [
    ("swav", "convnext_atto", 64, "cannot take the views of 27 and 64 px that swav shows it .*; use another size"),
    ("relative_loc", "convnext_atto", 64, "cannot take the views of 54 px"),
    ("densecl", "maxvit_pico_rw_256", 80, "cannot take the views of 80 px that densecl")])
def test_views_that_a_backbone_cannot_take_are_told_before_any_work(method, backbone, size, words, tmp_path):
    with pytest.raises(InputError, match=words):
        pretrain(resolve(method, backbone=backbone, size=size, data="photos", batch=4), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_transformer_for_views_of_several_sizes_is_told_how_it_can_take_them(tmp_path):
    own(tmp_path)
    file = tmp_path / "mine.py"
    file.write_text(file.read_text().replace("count=2))", "count=2), View(RandomResizedCrop(12), Normalize()))")
                    .replace("(views[0])", "(views[2])"))
    recipe = resolve(f"{file}:Mine", backbone="vit_mini")
    with pytest.raises(InputError, match="of 12 and 20 px .* or backbone_numbers={'dynamic_img_size': True}"):
        prepare(recipe, out=tmp_path / "run")
    prepare(recipe.with_(backbone_numbers={"dynamic_img_size": True}), out=tmp_path / "run")


@pytest.mark.parametrize("method", methods.METHODS)
def test_demos_show_photographs_as_the_method_does_and_digits_as_we_chose(method):
    demo, defaults = methods.recipes(method)["demo"], method_numbers(method)
    mine = resolve(method, data="cifar10", size=64)
    assert {**defaults, **mine.numbers} == {**defaults, **demo.numbers} | {
        name: defaults[name] for name in OF_VIEWS & {*defaults}}
    assert mine.note.startswith(f"Your images get the method's own views, not those that we chose for {demo.data}.")
    with torch.device("meta"):
        views = mine.build().views(64)
    assert all(view.isfinite().all() for view in views([Image.fromarray(np.zeros((70, 90, 3), np.uint8))] * 2))
    assert resolve(method, data="digits").numbers == demo.numbers and resolve(method, data="digits").note == demo.note
    if "flip" in defaults:
        assert resolve(method, data="cifar10", flip=0.3).numbers["flip"] == 0.3


def test_numbers_of_views_are_those_of_some_method_and_your_own_demo_stays_as_it_is(tmp_path, monkeypatch):
    assert {name for method in methods.METHODS for name in method_numbers(method)} >= OF_VIEWS
    monkeypatch.chdir(tmp_path)
    Path("own_views.py").write_text(
        "from sslnb.methods.simclr import RECIPES, SimCLR\nMine = SimCLR\n"
        "RECIPES = {'demo': RECIPES['demo'].with_(method='own_views.py:Mine', flip=0.1)}\n")
    assert resolve("own_views.py:Mine", data="cifar10").numbers["flip"] == 0.1
    assert "flip" not in resolve("sslnb.methods.simclr:SimCLR", data="cifar10").numbers, "ours by another name"


def test_the_shape_of_a_schedule_survives_a_short_trial():
    assert resolve("mae", "vit_base_dec8_dim512_8xb128_accu4_cos_fp16_ep400", epochs=10).warmup_epochs == 1


@pytest.mark.parametrize("call, words", [
    (lambda: resolve("simlcr"), "Unknown method 'simlcr': did you mean 'simclr'"),
    (lambda: resolve("byol", "dmeo"), "did you mean 'demo'"),
    (lambda: resolve("byol", temprature=1), "Unknown recipe value for byol 'temprature'"),
    (lambda: resolve("simclr", temprature=1), "did you mean 'temperature'"),
    (lambda: resolve("byol", epochs=0), "epochs 0 is impossible"),
    (lambda: resolve("byol", size=100_000), "size 100000 is impossible: use a whole number of pixels from 1 to 4096"),
    (lambda: resolve("byol", batch=-3), "batch -3 is impossible"),
    (lambda: resolve("byol", lr=-1.0), "lr -1.0 is impossible"),
    (lambda: resolve("byol", lr=float("nan")), "lr nan is impossible"),
    (lambda: resolve("byol", precision="fp8"), "Unknown precision 'fp8'"),
    (lambda: resolve("byol", optimizer="adam"), "did you mean 'adamw'"),
    (lambda: resolve("byol", backbone="resnet5O").build(), "Unknown backbone 'resnet5O': did you mean 'resnet50'"),
    (lambda: resolve("mae", size=30).build(), "size 30 cannot be cut into patches of 4"),
    (lambda: resolve("mae", backbone="resnet18").build(), "mae needs a vision transformer"),
    (lambda: resolve("byol").steps_per_epoch(50), "batch is larger than the data.* only 50"),
    (lambda: resolve("mae", backbone="vit_tinny_patch16_224").build(), "did you mean 'vit_tiny_patch16_224'"),
    (lambda: open_source("resnet5O", 0), "did you mean 'resnet50'"),
    (lambda: resolve("byol", backbone_numbers={"in_chans": 4}).build(), "in_chans 4 of resnet_mini .* images are RGB"),
    (lambda: resolve("byol", backbone_numbers={"pretrained": True}).build(), "begin with `weights` in the recipe"),
    (lambda: methods.get("nowhere.py:Thing"), "no file nowhere.py"),
    (lambda: methods.get("../nowhere.py:Thing"), "no file ../nowhere.py"),
])
def test_bad_input_is_one_sentence_with_a_remedy(call, words):
    with pytest.raises(InputError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_method_of_the_users_own_is_a_method(tmp_path):
    (tmp_path / "mine.py").write_text('''
from sslnb.methods.byol import BYOL
from sslnb.methods import recipes


class Mine(BYOL):
    def __init__(self, backbone, *, momentum: float = 0.5, **numbers):
        super().__init__(backbone, momentum=momentum, hidden_dim=32, dim=16)


RECIPES = {"demo": recipes("byol")["demo"].with_(method="%s:Mine", numbers={})}
''' % (tmp_path / "mine.py"))
    r = resolve(f"{tmp_path / 'mine.py'}:Mine", momentum=0.7)
    assert r.build().momentum == 0.7 and method_numbers(r.method) == {"momentum": 0.5}
    with pytest.raises(InputError, match="defines no Other"):
        methods.get(f"{tmp_path / 'mine.py'}:Other")


def test_another_backbone_drops_the_numbers_of_the_old_one():
    demo = methods.recipes("mocov3")["demo"]
    assert demo.backbone_numbers and demo.with_(lr=1.0).backbone_numbers == demo.backbone_numbers
    assert demo.with_(backbone="resnet_mini").backbone_numbers == {}
    assert demo.with_(backbone="vit_mini", backbone_numbers={"depth": 3}).backbone_numbers == {"depth": 3}


# ---------------------------------------------------------------- lengths in steps, and a part that is held out


def test_a_recipe_in_steps_is_that_long_and_its_milestones_are_steps():
    r = Recipe(method="simclr", backbone="resnet50", size=224, data="imagenet", epochs=1, batch=16, lr=0.02,
               schedule="step", steps=24_000, milestones=(18_000, 22_000), warmup_steps=100, warmup_from=0.001)
    assert r.total_steps(1034) == 24_000 and r.with_(steps=0).total_steps(1034) == 1034
    at = [r.lr_at(s, 1034) for s in (0, 50, 100, 17_999, 18_000, 22_000)]
    assert at == pytest.approx([2e-5, 0.02 * (0.001 + 0.999 / 2), 0.02, 0.02, 0.002, 0.0002])
    assert r.with_(steps=50).warmup_steps == 5, "a short trial trains after the warm-up too"
    assert r.name.endswith("st24000") and "24,000 steps = 23.2 epochs" in r.describe(1034 * 16)
    with pytest.raises(InputError, match="epochs 3 does not shorten this recipe, which is 24,000 optimizer steps long"):
        r.with_(epochs=3)
    with pytest.raises(InputError, match="epochs 3 does not shorten this recipe"):
        r.with_(epochs=3, steps=50)


def test_what_is_held_out_is_not_trained_on():
    recipe = methods.recipes("simclr")["demo"].with_(hold_out=0.2)
    rest, held, test = (recipe.load(split) for split in ("train", "held out", "test"))
    assert len(rest) + len(held) == 1300 and len(held) == pytest.approx(260, abs=5) and len(test) == 497
    assert torch.bincount(held.labels).min() >= 24, "of every class"
    everything = np.concatenate([rest.items, held.items])
    assert len(np.unique(everything.reshape(1300, -1), axis=0)) == len(np.unique(
        recipe.with_(hold_out=0.0).load().items.reshape(1300, -1), axis=0)) > 1290
    tenth = recipe.with_(fraction=0.1)
    assert len(tenth.load()) + len(tenth.load("held out")) == pytest.approx(130, abs=3)
    assert len(tenth.load("test")) == 497, "one tests on everything"
    with pytest.raises(InputError, match="hold_out 1.5 is impossible"):
        recipe.with_(hold_out=1.5)


def test_another_length_keeps_the_shape_of_the_steps():
    r = Recipe(method="simclr", backbone="resnet50", size=224, data="imagenet", epochs=200, batch=32, schedule="step",
               milestones=(120, 160))
    assert r.with_(epochs=300).milestones == (180, 240) and r.with_(epochs=300, milestones=(5,)).milestones == (5,)
    assert r.with_(lr=1.0).milestones == (120, 160)
    counted = r.with_(steps=1000, milestones=(600, 800))
    assert counted.with_(steps=10).milestones == (6, 8)


# ---------------------------------------------------------------- wrong values


PAIR = "use two numbers, one per view, such as"
WRONG = [  # method, what is changed, what the sentence says beside "NAME VALUE is impossible"
    ("byol", "lr", inf, "at least 0"), ("byol", "lr", "0.1", "at least 0"), ("byol", "lr", None, "at least 0"),
    ("byol", "lr", 10**400 * -1, "at least 0"), ("byol", "weight_decay", inf, "at least 0"),
    ("byol", "weight_decay", "x", "at least 0"), ("byol", "betas", (2, 2), "below 1"), ("byol", "betas", 0.9, "two"),
    ("simclr", "sgd_momentum", -1.0, "below 1"), ("simclr", "sgd_momentum", nan, "below 1"),
    ("byol", "warmup_epochs", inf, "at least 0"), ("byol", "warmup_epochs", 61, "longer than the run, which has 60"),
    ("byol", "warmup_from", -3.0, "from 0 to 1"), ("byol", "steps", 1.5, "whole"), ("byol", "steps", inf, "whole"),
    ("byol", "min_lr", 1.0, "at most lr"), ("byol", "milestones", 5, "(60, 80)"),
    ("byol", "milestones", (8, 6), "rise"), ("byol", "gamma", nan, "from 0 to 1"), ("byol", "clip", True, "at least 0"),
    ("byol", "chunk", 1.5, "whole"), ("byol", "pool", "avg", "Known: cls, mean, model"),
    ("byol", "fraction", 2, "None for all"), ("byol", "hold_out", nan, "below 1"), ("byol", "epochs", "60", "whole"),
    ("byol", "batch", True, "whole"), ("byol", "backbone", 3, "name"), ("byol", "data", 5, "name"),
    ("byol", "force_accum", "no", "True or False"), ("byol", "numbers", 5, "dictionary"),
    ("byol", "numbers", {"typo": 1}, "Unknown number of byol 'typo'"),
    ("byol", "numbers", {"momentun": 1}, "did you mean 'momentum'"), ("byol", "precision", None, "Known: bf16"),
    ("byol", "momentum", 1.5, "from 0 to 1"), ("byol", "momentum", nan, "from 0 to 1"),
    ("npid", "momentum", "0.9", "from 0 to 1"), ("byol", "crop", 0.5, "smaller first"),
    ("mae", "crop", (0.5, 0.2), "smaller first"), ("byol", "crop", (0, 0), "smaller first"),
    ("byol", "crop", (2, 3), "smaller first"), ("swav", "small_crop", (nan, 1.0), "smaller first"),
    ("byol", "flip", 7, "from 0 to 1"), ("byol", "jitter", -1, "at least 0"), ("odc", "jitter", nan, "at least 0"),
    ("byol", "hue", 0.9, "from 0 to 0.5"), ("byol", "blur", 0.5, PAIR), ("mocov3", "solarize", 0.1, PAIR),
    ("simclr", "blur", (1.0, 0.1), "use one number, such as 0.5"), ("byol", "blur", (1.0, 0.1, 0.3), "two of them"),
    ("byol", "pad", -3, "at least 0"), ("byol", "hidden_dim", -1, "at least 1"), ("byol", "dim", 2.5, "at least 1"),
    ("simclr", "temperature", 0.0, "above 0"), ("simclr", "temperature", -1, "above 0"),
    ("mocov2", "queue", 0, "at least 1"), ("mocov2", "bn_images", 0, "at least 1"), ("swav", "queue", -1, "at least 0"),
    ("swav", "prototypes", 0, "at least 1"), ("npid", "negatives", 0, "at least 1"), ("odc", "every", 0, "at least 1"),
    ("barlowtwins", "lambd", nan, "at least 0"), ("relative_loc", "dropout", 2.0, "from 0 to 1"),
    ("simmim", "mask_ratio", nan, "between 0 and 1"), ("byol", "predict", 1, "True or False"),
    ("maskfeat", "predict", True, "a text"), ("byol", "processes", 0, "at least 1"),
    ("byol", "processes", "two", "at least 1"), ("byol", "processes", 2.5, "at least 1")]


@pytest.mark.parametrize("method, name, value, words", WRONG)
def test_a_wrong_value_is_refused_by_name_when_it_is_given(method, name, value, words):
    with pytest.raises(InputError) as caught:
        resolve(method, **{name: value})
    said = str(caught.value)
    assert words in said and "\n" not in said
    assert f"{name} {value!r} is " in said or said.startswith("Unknown")


@pytest.mark.parametrize("protocol, name, value, words", [
    ("linear_demo", "pool", "avg", "Known: cls, mean, model"), ("linear_demo", "resize", 0, "above 0"),
    ("finetune_demo", "smoothing", 1.0, "below 1"), ("finetune_demo", "layer_decay", nan, "from 0 to 1"),
    ("multihead_demo", "lighting", -0.1, "at least 0"), ("detect_demo", "anchors", 32, "(64, 128)"),
    ("detect_demo", "proposals", (1, 2), "four")])
def test_so_are_those_of_protocols(protocol, name, value, words):
    with pytest.raises(InputError, match=re.escape(words)):
        evaluate.RECIPES[protocol].with_(**{name: value})


@pytest.mark.parametrize("method, changes, words", [
    ("mocov2", {"queue": 1000}, "no multiple of the total batch of 64; use queue=1024"),
    ("maskfeat", {"mask_ratio": 0.005}, "0 of 49 cells cannot be masked"),
    ("mae", {"decoder_heads": 5}, "mae on vit_mini at 28 px cannot be built with decoder_heads 5 (AssertionError: dim"),
    ("byol", {"backbone_numbers": {"typo": 1}}, "cannot be built with typo 1 (TypeError"),
    ("byol", {"batch": 1}, "batch 1 is too small for byol"), ("byol", {"pool": "cls"}, "resnet_mini, which has no tok"),
    ("simclr", {"optimizer": "sgd", "sgd_momentum": 0.0, "nesterov": True}, "Nesterov momentum requires a momentum"),
    ("byol", {"warmup_steps": 10**6}, "warmup_steps 1,000,000 is longer than the run, which has 1,200 steps")])
def test_what_only_building_tells_is_told_before_there_is_a_run(tmp_path, method, changes, words):
    before = torch.get_rng_state()
    with pytest.raises(InputError) as caught:
        prepare(resolve(method, **changes), out=tmp_path / "run")
    assert words in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "run").exists()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("setting", [{"workers": -1}, {"workers": "many"}, {"workers": 1.5}, {"seed": "x"},
                                     {"seed": 1.5}, {"seed": 2**70}, {"processes": 0}, {"processes": True},
                                     {"compile": "no"}, {"resume": 0}, {"data": 3}])
def test_how_a_run_is_trained_is_checked_before_there_is_one(tmp_path, setting):
    ((name, value),) = setting.items()
    with pytest.raises(InputError, match=f"^{name} {value!r} is impossible: use a |^{name} {value!r} .* True or False"):
        prepare("byol", out=tmp_path / "run", **setting)
    assert not (tmp_path / "run").exists()


def test_every_recipe_keeps_the_limits_and_every_number_has_one():
    rows = [r for m in methods.METHODS for r in methods.recipes(m).values()] + list(evaluate.RECIPES.values())
    for r in rows:
        limits.check_fit(r.method, methods.get(r.method), r.numbers)
        assert Recipe.from_json(r.to_json()) == r
        defaults = method_numbers(r.method)
        limits.check_ours(r.method, defaults)
        assert all(name in limits.NUMBERS or f"{r.method}.{name}" in limits.NUMBERS for name in defaults)


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_demo_passes_the_trial(method):
    try_out(methods.recipes(method)["demo"], 100)


def test_what_is_not_wrong_stays_allowed():
    assert resolve("byol", lr=0.0).lr == 0 and resolve("byol", momentum=1).numbers["momentum"] == 1
    assert resolve("byol", crop=[0.5, 1.0]).numbers["crop"] == [0.5, 1.0], "papermill's tuples are lists"
    assert resolve("mocov2", hidden_dim=0).build() and resolve("swav", iterations=0, small_views=0)
    short = evaluate.RECIPES["detect_demo"].with_(steps=10)
    assert (short.warmup_steps, short.milestones) == (1, (7, 9))
    try_out(methods.recipes("simclr")["demo"].with_(batch=1, gpus=2), 100)  # batch norm spans the processes


OWN = """
from sslnb.methods.byol import BYOL
from sslnb import resolve
from sslnb.recipes import Recipe


class Mine(BYOL):
    def __init__(self, backbone, *, momentum: float = 0.5, queue: str = "long", **numbers):
        super().__init__(backbone, momentum=momentum, hidden_dim=32, dim=16)


RECIPES = {"demo": resolve("byol").with_(method=%r, numbers={"momentum": 0.7})}
"""


def test_a_copied_file_that_still_names_our_method_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for named in ("byol", "nowhere.py:Mine"):
        (tmp_path / "copied.py").write_text(OWN % named + " " * len(named))
        with pytest.raises(InputError, match=f"Recipe 'demo' of copied.py:Mine names another method, '{named}'; write "
                                             "method='copied.py:Mine' in it."):
            methods.recipes("copied.py:Mine")
    (tmp_path / "own.py").write_text(OWN % "own.py:Mine")
    for name in ("own.py:Mine", f"{tmp_path}/own.py:Mine"):  # one file by two names
        assert resolve(name).numbers["momentum"] == 0.7
    assert resolve("own.py:Mine", queue="short").build(), "another number by a name of ours"
    with pytest.raises(InputError, match="momentum 1.5 is impossible"):
        resolve("own.py:Mine", momentum=1.5)


def test_imagenet_below_the_home_folder_is_imagenet(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for i in range(1000):
        (tmp_path / "imagenet" / "train" / f"n{i:08d}").mkdir(parents=True)
    assert is_imagenet("~/imagenet") and resolve("byol", data="~/imagenet").backbone == "resnet50"
    whole, part = resolve("byol", data="~/imagenet"), resolve("byol", data="~/imagenet/train")
    assert whole.published and not part.published and part.backbone == "resnet50"
    assert part.note == ("A tenth of every class is held out for testing; give the folder above train/ to train on "
                         f"all. {whole.note}")


THEIRS = """
import torch
from torch import nn
from sslnb.methods.base import Method
from sslnb.recipes import Recipe
from sslnb.views import Normalize, RandomResizedCrop, View, Views

class Mine(Method):
    def __init__(self, backbone, *, alpha: float = 1.0):
        super().__init__()
        self.{kept} = backbone
    def views(self, size):
        return Views(View(RandomResizedCrop(size), {normal}, count=2))
    def forward(self, views, index=None):
        z = self.{kept}(views[0])
        loss = z.square().mean()
        return {out}
{hook}

RECIPES = {{"demo": Recipe(method="{name}:Mine", backbone="resnet_mini", size=20, data="digits", batch=8, epochs=1)}}
"""


def own(folder, out="{'loss': loss, 'z': z}", normal="Normalize()", hook="", name=None, kept="backbone"):
    file = folder / "mine.py"
    file.write_text(THEIRS.format(out=out, normal=normal, hook=hook, name=name or file, kept=kept))
    return resolve(f"{file}:Mine")


@pytest.mark.parametrize("changes, words", [
    ({"out": "loss"}, "forward gives a Tensor; it must return a dict of tensors with a scalar 'loss'"),
    ({"out": "None"}, "forward gives a NoneType"), ({"out": "{'lass': loss}"}, "forward gives no 'loss', only lass"),
    ({"out": "{'loss': z.square()}"}, r"a loss of shape \(4, 64\)"),
    ({"out": "{'loss': loss, 'step': 3.0}"}, "forward gives step, which is no tensor"),
    ({"out": "{'loss': loss.item()}"}, "forward gives loss, which is no tensor"),
    ({"out": "{'loss': loss.detach()}"}, "a loss without a gradient"),
    ({"out": "{'loss': troch.zeros(())}"}, "failed in .*mine.py, line 17 .NameError: name 'troch'"),
    ({"out": "{'loss': nn.Linear(7, 1)(z).mean()}"}, "shapes cannot be multiplied"),
    ({"hook": "    def after_step(self): pass"}, "after_step too many positional arguments; see the hooks"),
    ({"kept": "network"}, "has no self.backbone, which is what evaluation keeps of it; set it in __init__"),
    ({"normal": "Normalize((0, 0, 0), (1, 1, 1))"}, "its first view is normalised by .*end the view with that")])
def test_a_method_of_ones_own_is_tried_before_its_run_has_a_directory(tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        prepare(own(tmp_path, **changes))
    assert not (tmp_path / "runs").exists()
    prepare(own(tmp_path))
    prepare(own(tmp_path, "{'loss': self.ready(z)}", hook="    def before_train(self, run): self.ready = torch.sum"),
            out="with a hook")


def test_a_file_is_the_same_from_another_folder_and_a_changed_one_is_told(tmp_path, monkeypatch, capsys):
    own(tmp_path, name="mine.py")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    recipe = resolve("../mine.py:Mine")
    assert recipe.method == "../mine.py:Mine" and recipe.build()
    run = pretrain(recipe, out="run")
    own(tmp_path, "{'loss': 2 * loss}", name="mine.py")
    assert "has changed since" not in capsys.readouterr().out
    assert pretrain(resolve("../mine.py:Mine"), out="run").path == run.path
    assert "But since then the file of ../mine.py:Mine changed: resume=False trains anew" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert pretrain(resolve("mine.py:Mine"), out="notebooks/run").status() == Run(tmp_path / "notebooks/run").status()
    monkeypatch.chdir(tmp_path / "notebooks")
    for text, words in (("RECIPES = 3\nclass Mine: pass", "RECIPES of .* is a int; write RECIPES = {"),
                        ("from .base import Method", "import from the package, as in")):
        (tmp_path / "mine.py").write_text(text)
        with pytest.raises(InputError, match=words):
            resolve("../mine.py:Mine")
    with pytest.raises(InputError, match="say which class of the file, as in '../mine.py:MyMethod'"):
        resolve("../mine.py")


def test_a_run_of_ones_own_method_opens_from_any_folder_and_follows_its_file_where_both_are_moved(tmp_path,
                                                                                                   monkeypatch):
    (tmp_path / "project").mkdir()
    own(tmp_path / "project", name="mine.py")
    monkeypatch.chdir(tmp_path / "project")
    run = prepare(resolve("mine.py:Mine"), out="run")
    assert run.recipe.method == "mine.py:Mine"
    (tmp_path / "mine.py").write_text("RECIPES = {}")  # another file of that name
    monkeypatch.chdir(tmp_path)
    run = Run.open("project/run")
    assert run.recipe.build() and run.recipe.method == f"{tmp_path}/project/mine.py:Mine"
    (tmp_path / "project").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert Run.open("run").recipe.method == "mine.py:Mine" and Run.open("run").recipe.build()


NETS = """
from torch import nn


class Net(nn.Module):
    num_features = 12

    def __init__(self, size, width=12):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 4, 4), nn.BatchNorm2d(width)

    def forward(self, x):
        return self.norm(self.stem(x)).mean((2, 3))


def bare(size):
    return nn.Flatten()
"""


def test_a_network_of_ones_own_is_a_backbone_for_training_evaluation_and_export(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    run = pretrain(tiny("byol", backbone="nets.py:Net", epochs=1), out="run")
    x = torch.randn(2, 3, 20, 20)
    wanted = run.backbone()(x)
    torch.save(run.backbone().state_dict(), "net.pth")
    folder = run.export()
    assert "sslnb.backbones.build('nets.py:Net', 20)" in (folder / "README.md").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for source, name in (("../run", None), ("../run/export", None), ("../net.pth", "../nets.py:Net")):
        opened = open_source(source, 0, name)
        assert torch.equal(opened.backbone(20).eval()(x), wanted) and opened.fresh(20)(x).shape == (2, 12)
    assert open_source("../nets.py:Net", 0).fresh_weights


@pytest.mark.parametrize("method, name, numbers, words", [
    ("simclr", "nets.py:bare", {}, "gives a Flatten whose num_features is None; it must be an nn.Module that says"),
    ("simclr", "nets.py:Net", {"width": 7}, r"gives the shape \(2, 7\); its num_features is 12, so it must give a"),
    ("simclr", "nets.py:Net", {"depth": 7}, "called with the size of the images, 20, and .'depth': 7.: got an unexp"),
    ("simclr", "nets.py:Nut", {}, "Backbone 'nets.py:Nut': nets.py defines no Nut"),
    ("simclr", "nuts.py:Net", {}, "Backbone 'nuts.py:Net': there is no file nuts.py here"),
    ("simclr", "nets.py:Net", {"sobel": True}, "let nets.py:Net filter its images itself"),
    ("densecl", "nets.py:Net", {}, "Net has no forward_features, which gives the map"),
    ("mae", "nets.py:Net", {}, "mae needs a vision transformer"),
    ("mine.py:Mine", "resnet_mini", {}, "another self.backbone than the resnet_mini .* backbone='my_file.py:my_net'")])
def test_a_network_of_ones_own_that_does_not_fit_is_told_before_any_work(tmp_path, monkeypatch, method, name, numbers,
                                                                         words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    own(tmp_path, name="mine.py")
    mine = tmp_path / "mine.py"
    mine.write_text(mine.read_text().replace("self.backbone = backbone", "self.backbone = nn.Sequential(backbone)"))
    with pytest.raises(InputError, match=words):
        prepare(resolve(method, backbone=name, backbone_numbers=numbers, data="digits", batch=64))
    assert not (tmp_path / "runs").exists()


def test_the_rows_of_byol_and_cae_are_the_codes():
    byol = [r for k, r in methods.recipes("byol").items() if k != "demo"]
    assert {(r.total_batch, r.lr, r.weight_decay, r.warmup_epochs, r.numbers["momentum"]) for r in byol} == {
        (4096, 4.8, 1e-6, 10, 0.99)}
    cae = methods.recipes("cae")["vit_base_sz224_8xb64_accu4_cos_fp16_ep300"]
    assert (cae.numbers["mask_ratio"], cae.numbers["neck_drop_path"]) == (0.383, 0.0)


VIEWS_OF_ONES_OWN = """
from sslnb import resolve
from sslnb.methods.simclr import SimCLR
from sslnb.views import CenterCrop, ImageOp, Normalize, View, Views


class Upside(ImageOp):
    def __call__(self, image, rng):
        return image.rotate(180)


class Mine(SimCLR):
    def __init__(self, backbone, *, temperature: float = 0.2):
        super().__init__(backbone, temperature=temperature, hidden_dim=32, dim=16)

    def views(self, size):
        return Views(View(Upside(), CenterCrop(size), Normalize()), View(CenterCrop(size), Normalize()))


RECIPES = {"demo": resolve("simclr", epochs=1).with_(method="mine.py:Mine", numbers={})}
"""


def test_views_of_ones_own_are_found_in_processes_that_are_no_forks(tmp_path):
    """As on a Mac, and from Python 3.14 on everywhere."""
    (tmp_path / "mine.py").write_text(VIEWS_OF_ONES_OWN)
    code = ("import torch, multiprocessing\n"
            "from sslnb import load, resolve\n"
            "from sslnb.reading import ViewSet, image_loader\n"
            "if __name__ == '__main__':\n"
            "    multiprocessing.set_start_method('spawn')\n"
            "    images, views = load('digits'), resolve('mine.py:Mine').build().views(8)\n"
            "    loader = image_loader(ViewSet(images, views), 1, sampler=[(0, 0), (1, 0)], batch_size=2)\n"
            "    (upside, plain), *_ = next(iter(loader))\n"
            "    print(torch.equal(upside, plain.flip((2, 3))))\n")
    (tmp_path / "main.py").write_text(code)
    done = subprocess.run([sys.executable, "main.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_the_note_of_a_demo_is_not_that_of_ones_own_images(tmp_path):
    assert "no flip" in resolve("simclr").note
    assert resolve("simclr", data=str(tmp_path)).note == (
        "Your images get the method's own views, not those that we chose for digits_scattered.")
