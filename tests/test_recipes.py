"""Recipes: the zoo's rows with their real shapes, names that cannot lie, and changes that keep what must be kept."""

import re

import numpy as np
import pytest
import torch

from sslnb import methods
from sslnb.errors import InputError
from sslnb.recipes import Recipe, is_imagenet, method_numbers, resolve

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


def test_resolve_takes_what_the_data_and_the_epochs_ask_for(tmp_path):
    assert resolve("byol").data == "digits_scattered"
    assert resolve("byol", epochs=300).epochs == 300 and resolve("byol", epochs="auto") == resolve("byol")
    r = resolve("byol", data="imagenet", epochs=300)
    assert r.published == {"linear, SimSiam protocol": 72.93} and r.source_of("epochs") == "you"
    for i in range(1000):
        (tmp_path / "train" / f"n{i:08d}").mkdir(parents=True)
    assert is_imagenet(tmp_path) and not is_imagenet(tmp_path / "elsewhere")
    assert resolve("byol", data=str(tmp_path), epochs=7).backbone == "resnet50"
    assert resolve("mae", mask_ratio=0.5).numbers["mask_ratio"] == 0.5
    assert resolve("byol", processes=2).batch * 2 == resolve("byol").batch


def test_the_shape_of_a_schedule_survives_a_short_trial():
    assert resolve("mae", "vit_base_dec8_dim512_8xb128_accu4_cos_fp16_ep400", epochs=10).warmup_epochs == 1


@pytest.mark.parametrize("call, words", [
    (lambda: resolve("simlcr"), "Unknown method 'simlcr': did you mean 'simclr'"),
    (lambda: resolve("byol", "dmeo"), "did you mean 'demo'"),
    (lambda: resolve("byol", temprature=1), "Unknown recipe value for byol 'temprature'"),
    (lambda: resolve("simclr", temprature=1), "did you mean 'temperature'"),
    (lambda: resolve("byol", epochs=0), "epochs 0 is impossible"),
    (lambda: resolve("byol", batch=-3), "batch -3 is impossible"),
    (lambda: resolve("byol", lr=-1.0), "lr -1.0 is impossible"),
    (lambda: resolve("byol", lr=float("nan")), "lr nan is impossible"),
    (lambda: resolve("byol", precision="fp8"), "Unknown precision 'fp8'"),
    (lambda: resolve("byol", optimizer="adam"), "did you mean 'adamw'"),
    (lambda: resolve("byol", backbone="resnet5O").build(), "Unknown backbone 'resnet5O': did you mean 'resnet50'"),
    (lambda: resolve("mae", size=30).build(), "size 30 cannot be cut into patches of 4"),
    (lambda: resolve("mae", backbone="resnet18").build(), "mae needs a vision transformer"),
    (lambda: resolve("byol").steps_per_epoch(50), "batch is larger than the data.* only 50"),
    (lambda: methods.get("nowhere.py:Thing"), "no file nowhere.py"),
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
    assert r.name.endswith("st24000") and "24,000 steps = 23.2 epochs" in r.describe(1034 * 16)
    with pytest.raises(InputError, match="epochs 3 does not shorten this recipe, which is 24,000 optimizer steps long"):
        r.with_(epochs=3)


def test_what_is_held_out_is_not_trained_on():
    recipe = methods.recipes("simclr")["demo"].with_(hold_out=0.2)
    rest, held, test = (recipe.load(split) for split in ("train", "held out", "test"))
    assert len(rest) + len(held) == 1300 and len(test) == 497
    assert torch.bincount(held.labels).min() >= 24, "of every class"
    everything = np.concatenate([rest.items, held.items])
    assert len(np.unique(everything.reshape(1300, -1), axis=0)) == len(np.unique(
        recipe.with_(hold_out=0.0).load().items.reshape(1300, -1), axis=0)) > 1290
    tenth = recipe.with_(fraction=0.1)
    assert len(tenth.load()) + len(tenth.load("held out")) == pytest.approx(130, abs=3)
    with pytest.raises(InputError, match="A part of 1.5 cannot be held out"):
        recipe.with_(hold_out=1.5).load()


def test_another_length_keeps_the_shape_of_the_steps():
    r = Recipe(method="simclr", backbone="resnet50", size=224, data="imagenet", epochs=200, batch=32, schedule="step",
               milestones=(120, 160))
    assert r.with_(epochs=300).milestones == (180, 240) and r.with_(epochs=300, milestones=(5,)).milestones == (5,)
    assert r.with_(lr=1.0).milestones == (120, 160)
    counted = r.with_(steps=1000, milestones=(600, 800))
    assert counted.with_(steps=10).milestones == (6, 8)
