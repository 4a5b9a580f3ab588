"""Fine-tuning: every number of the published recipes, their augmentations and losses by hand, and how a run begins."""

import json
import math
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.interpolate import CubicSpline
from test_train import train_until
from torch import nn

from sslnb import Run, backbones, data, methods, optim, pretrain
from sslnb.checks import prepare
from sslnb.draws import Draws
from sslnb.errors import InputError
from sslnb.evaluate.augment import RandAugment, RandomErasing, mixed
from sslnb.evaluate.finetune import FINETUNE, FineTune, repeated_order
from sslnb.evaluate.protocol import train_protocol
from sslnb.evaluate.start import carried_over, layer_ids, resampled_table
from sslnb.reading import EpochSampler

DEMO = FINETUNE["finetune_demo"]


def mini(**numbers):
    return FineTune(backbones.build("resnet_mini", 20), classes=10, **numbers)


def globals_of_random():
    return random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


# ---------------------------------------------------------------- the published recipes

TABLE = {  # epochs, warm-up, total batch, lr, min lr, start of the warm-up, layer decay, drop path, clip, size
    "rsb_a3": (100, 5, 2048, 8e-3, 1e-6, 8e-8, 1.0, 0.0, 1.0, 160),
    "rsb_a2": (300, 5, 2048, 5e-3, 1e-6, 5e-8, 1.0, 0.05, 1.0, 224),
    "mae": (100, 5, 1024, 4e-3, 1e-6, 4e-7, 0.65, 0.1, 5.0, 224),
    "mae_official": (100, 5, 1024, 2e-3, 1e-6, 0.0, 0.65, 0.1, 0.0, 224),
    "simmim_vit": (100, 20, 1024, 1e-2, 1e-6, 1e-8, 0.65, 0.1, 5.0, 224),
    "simmim_vit_official": (100, 20, 2048, 5e-3, 1e-6, 1e-6, 0.65, 0.1, 5.0, 224),
    "cae": (100, 5, 1024, 8e-3, 1e-6, 8e-7, 0.65, 0.1, 5.0, 224),
    "cae_official": (100, 5, 4096, 8e-3, 1e-6, 0.0, 0.65, 0.1, 0.0, 224),
    "maskfeat": (100, 20, 2048, 8e-3, 1e-6, 8e-11, 0.65, 0.1, 0.0, 224),
    "simmim_swin_192": (100, 20, 2048, 5e-3, 1e-6, 1e-6, 0.9, 0.1, 5.0, 192),
    "simmim_swin_224": (100, 20, 2048, 5e-3, 1e-6, 1e-6, 0.9, 0.1, 5.0, 224)}


@pytest.mark.parametrize("name", TABLE)
def test_the_recipes_are_those_of_the_table(name):
    r = FINETUNE[f"finetune_{name}"]
    numbers, drop = r.numbers, r.backbone_numbers.get("drop_path_rate", 0.0)
    assert (r.epochs, r.warmup_epochs, r.total_batch, r.lr, r.min_lr, pytest.approx(r.lr * r.warmup_from),
            numbers.get("layer_decay", 1.0), drop, r.clip, r.size) == TABLE[name]
    assert (r.optimizer, r.weight_decay, r.betas) == (
        ("lamb", 0.02, (0.9, 0.999)) if name.startswith("rsb") else ("adamw", 0.05, (0.9, 0.999)))
    with torch.device("meta"):
        method = r.build()
    want = {"mixup": 0.1, "smoothing": 0.0} if name.startswith("rsb") else {"mixup": 0.8, "smoothing": 0.1}
    assert method.mixing == {"cutmix": 1.0, "switch_prob": 0.5, **want}
    assert method.strengths == (2, {"rsb_a3": 6, "rsb_a2": 7}.get(name, 9), 0.5)
    assert (method.kind, method.sum_classes, method.bce_threshold) == (
        "bce" if name.startswith("rsb") else "soft", True, 0.0)
    assert method.erase == (0.0 if name.startswith("rsb") else 0.25)
    assert method.repeats == (3 if name == "rsb_a2" else 1)
    assert (method.ema, method.ema_ramp) == {"rsb_a2": (0.9999, 20), "simmim_vit": (0.99996, 20)}.get(name, (0.0, 0))
    assert method.interpolation == "bicubic" and method.crop == (0.08, 1.0) and method.flip == 0.5
    assert method.decay_positions == (name == "maskfeat")
    assert method.decay_tables == (name in ("simmim_vit_official", "cae_official"))
    assert method.keep_norm == (name == "cae_official") and r.lr_by_epoch == (name[:3] in ("rsb", "mas"))
    assert numbers.get("head_std", 2e-5) == {"rsb_a3": 0.01, "rsb_a2": 0.01, "simmim_vit": 0.01, "maskfeat": 0.02,
                                             "simmim_swin_192": 0.02, "simmim_swin_224": 0.02}.get(name, 2e-5)


@pytest.mark.parametrize("name, sizes", [("rsb_a3", (236, 224)), ("rsb_a2", (236, 224)), ("mae", (256, 224)),
                                         ("simmim_swin_192", (219, 192)), ("simmim_swin_224", (256, 224))])
def test_test_images_have_the_sizes_of_the_table(name, sizes):
    r = FINETUNE[f"finetune_{name}"]
    with torch.device("meta"):
        resize, crop = r.build().test_view(r.size).views[0].image_ops
    assert (resize.size, crop.size) == sizes and resize.interpolation == "bicubic"


def test_views_hold_what_the_recipe_asks_for_in_the_order_of_timm():
    with torch.device("meta"):
        mae, a3 = (FINETUNE[f"finetune_{n}"].build().views(224).views[0] for n in ("mae", "rsb_a3"))
    def names(view):
        return [type(op).__name__ for op in (*view.image_ops, *view.batch_ops)]
    assert names(mae) == ["RandomResizedCrop", "HorizontalFlip", "RandAugment", "Normalize", "RandomErasing"]
    assert names(a3) == ["RandomResizedCrop", "HorizontalFlip", "RandAugment", "Normalize"]


@pytest.mark.parametrize("name, features", [("rsb_a3", 2048), ("mae", 768), ("simmim_vit", 768),
                                            ("simmim_swin_192", 1024)])
def test_the_real_network_is_trained_as_a_whole_and_pools_its_patches(name, features):
    r = FINETUNE[f"finetune_{name}"]
    with torch.device("meta"):
        method = r.build().train()
        h = method.backbone(torch.zeros(2, 3, r.size, r.size))
        assert h.shape == (2, features) and method.head(h).shape == (2, 1000)
    trained = {id(p) for g in method.param_groups(r) for p in g["params"]}
    parameters = [p for part in (method.backbone, method.head) for p in part.parameters()]
    assert trained == {id(p) for p in parameters} and all(p.requires_grad for p in parameters)
    norms = [m for m in method.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == (53 if name == "rsb_a3" else 0) and all(m.training for m in norms)
    if name in ("mae", "simmim_vit"):
        assert isinstance(method.backbone.norm, nn.Identity) and method.backbone.fc_norm.weight.shape == (768,)


# ---------------------------------------------------------------- layer decay and the learning rate


def factors(name):
    r = FINETUNE[f"finetune_{name}"]
    with torch.device("meta"):
        method = r.build()
    names = {id(p): n for n, p in method.named_parameters()}
    return {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in method.param_groups(r) for p in g["params"]}


def test_the_fourteen_factors_of_a_vit_are_those_of_the_spec():
    found = factors("mae")
    assert sorted({s for s, _ in found.values()}) == pytest.approx([0.65**k for k in range(13, -1, -1)])
    for name, layer in (("cls_token", 0), ("pos_embed", 0), ("patch_embed.proj.weight", 0), ("blocks.0.norm1.bias", 1),
                        ("blocks.11.mlp.fc2.weight", 12), ("fc_norm.weight", 13)):
        assert found[f"backbone.{name}"][0] == pytest.approx(0.65 ** (13 - layer)), name
    assert found["head.weight"] == (1.0, 0.05) and found["head.bias"] == (1.0, 0.0)


def test_tables_of_relative_positions_decay_as_in_the_official_codes():
    for name, decay in (("simmim_vit_official", 0.05), ("cae_official", 0.05), ("simmim_vit", 0.0), ("cae", 0.0)):
        found = factors(name)
        tables = [f"backbone.blocks.{i}.attn.relative_position_bias_table" for i in range(12)]
        assert [found[table][1] for table in tables] == [decay] * 12 and found["backbone.cls_token"][1] == 0


def test_caes_official_fine_tuning_keeps_the_norm_and_the_positions():
    recipe = FINETUNE["finetune_cae_official"].with_(
        backbone="beit_mini", size=28, backbone_numbers={**FINETUNE["finetune_cae"].backbone_numbers,
                                                         "use_abs_pos_emb": True})
    source = backbones.build("beit_mini", 28, use_abs_pos_emb=True, use_rel_pos_bias=False)
    nn.init.constant_(source.norm.weight, 2.5), nn.init.constant_(source.norm.bias, 0.5)
    carried, said = FineTune.starting_point(recipe, source)
    assert (carried["fc_norm.weight"] == 2.5).all() and (carried["fc_norm.bias"] == 0.5).all() and "left" not in said
    method = recipe.build()
    stays = [name for name, p in method.named_parameters() if not p.requires_grad]
    assert stays == ["backbone.pos_embed"]
    trained = [p for group in method.param_groups(recipe) for p in group["params"]]
    assert len(trained) == len(list(method.parameters())) - 1 and all(p.requires_grad for p in trained)


def test_a_vit_is_grouped_as_timm_groups_it():
    import timm
    from timm.optim import param_groups_layer_decay

    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", global_pool="avg")
    groups = param_groups_layer_decay(vit, 0.05, vit.no_weight_decay(), layer_decay=0.65)
    names = {id(p): n for n, p in vit.named_parameters()}
    theirs = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    ours = {n.removeprefix("backbone."): v for n, v in factors("mae").items()}
    assert ours.keys() == theirs.keys() and all(ours[n] == pytest.approx(theirs[n]) for n in ours)


def test_a_swin_is_grouped_as_in_simmims_code():
    depths = (2, 2, 18, 2)

    def official(name):  # 0 the patch embedding, blocks one by one, a stage's end with its last block, then the rest
        parts = name.split(".")
        if parts[0] == "patch_embed":
            return 0
        if parts[0] != "layers":
            return sum(depths) + 1
        stage = int(parts[1])
        if parts[2] == "downsample":  # timm has it at the start of the next stage
            return sum(depths[:stage])
        return sum(depths[:stage]) + int(parts[3]) + 1

    found = factors("simmim_swin_192")
    assert len({s for s, _ in found.values()}) == 26 and min(s for s, _ in found.values()) == pytest.approx(0.9**25)
    for name, (scale, decay) in found.items():
        assert scale == pytest.approx(0.9 ** (25 - official(name.removeprefix("backbone.")))), name
        assert (decay == 0) == (name.endswith(("bias", "_table")) or "norm" in name), name


def test_positions_are_decayed_only_by_maskfeats_protocol():
    assert factors("mae")["backbone.pos_embed"][1] == factors("mae")["backbone.cls_token"][1] == 0.0
    assert factors("maskfeat")["backbone.pos_embed"][1] == factors("maskfeat")["backbone.cls_token"][1] == 0.05
    table = factors("simmim_vit")["backbone.blocks.3.attn.relative_position_bias_table"]
    assert table == (pytest.approx(0.65**9), 0.0)


def test_depth_counts_once_in_the_rate_and_for_the_lowest_rate_too():
    method, recipe = mini(layer_decay=0.5), DEMO
    optimizer = optim.build(method.param_groups(recipe), recipe)
    assert all("lr_scale" in g for g in optimizer.param_groups)
    for lr in (0.01, 1e-6, 0.01):
        optim.set_lr(optimizer, lr)
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([lr * g["lr_scale"]
                                                                           for g in optimizer.param_groups])


def test_without_layer_decay_there_are_two_groups():
    assert [(g["lr_scale"], g["weight_decay"]) for g in mini().param_groups(DEMO.with_(weight_decay=0.1))] == [
        (1.0, 0.1), (1.0, 0.0)]


def test_the_cosine_begins_after_the_warm_up_or_with_the_run():
    steps = 1251
    mae = FINETUNE["finetune_mae_official"]
    assert mae.lr_at(0, steps) == 0 and mae.lr_at(5 * steps // 2, steps) == pytest.approx(1e-3, rel=1e-3)
    assert mae.lr_at(5 * steps, steps) == 2e-3
    for epoch in (20, 60, 99):
        wanted = 1e-6 + (2e-3 - 1e-6) * 0.5 * (1 + math.cos(math.pi * (epoch - 5) / 95))
        assert mae.lr_at(epoch * steps, steps) == pytest.approx(wanted)
    for name, peak in (("simmim_swin_192", 5e-3), ("maskfeat", 8e-3), ("simmim_vit_official", 5e-3)):
        r = FINETUNE[f"finetune_{name}"]
        assert r.lr_at(0, 625) == pytest.approx(peak * r.warmup_from)
        assert r.lr_at(20 * 625 - 1, 625) > 0.99 * peak, "the warm-up reaches the peak"
        for epoch in (20, 50, 99):
            wanted = 1e-6 + (peak - 1e-6) * 0.5 * (1 + math.cos(math.pi * epoch / 100))
            assert r.lr_at(epoch * 625, 625) == pytest.approx(wanted), (name, epoch)


@pytest.mark.parametrize("name, peak, epochs", [("rsb_a3", 8e-3, 100), ("rsb_a2", 5e-3, 300)])
def test_rsb_warms_up_by_steps_and_cools_down_by_epochs(name, peak, epochs):
    r, steps = FINETUNE[f"finetune_{name}"], 625
    assert r.lr_at(0, steps) == pytest.approx(1e-5 * peak)
    assert r.lr_at(1000, steps) < r.lr_at(1001, steps) < r.lr_at(5 * steps - 1, steps) < peak
    for epoch in (5, 50, epochs - 1):
        wanted = 1e-6 + (peak - 1e-6) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        assert r.lr_at(epoch * steps, steps) == r.lr_at(epoch * steps + 624, steps) == pytest.approx(wanted)


def test_lamb_with_the_loops_clip_steps_as_timms_with_its_own():
    from timm.optim import Lamb

    torch.manual_seed(1)
    recipe, model = FINETUNE["finetune_rsb_a3"], mini()
    twin = mini()
    twin.load_state_dict(model.state_dict())
    ours = optim.build(model.param_groups(recipe), recipe)
    theirs = Lamb(twin.param_groups(recipe), lr=8e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.02,
                  max_grad_norm=1.0)
    for g in ours.param_groups:
        g["lr"] = 8e-3
    for scale in (10.0, 0.01):  # the first is clipped, the second is not
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = scale * torch.randn_like(p)
            q.grad = p.grad.clone()
        nn.utils.clip_grad_norm_(optim.trainable(model), recipe.clip)
        ours.step(), theirs.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


# ---------------------------------------------------------------- losses and mixing


def test_losses_are_those_of_hand_and_timm():
    from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy

    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
    targets = torch.tensor([[0.7, 0.3, 0.0], [0.15, 0.0, 0.85]])
    def bce(x, t):
        return -(t * math.log(1 / (1 + math.exp(-x))) + (1 - t) * math.log(1 - 1 / (1 + math.exp(-x))))
    each = [[bce(x, t) for x, t in zip(*rows, strict=True)] for rows in zip(logits.tolist(), targets.tolist(),
                                                                            strict=True)]
    summed, mean = mini(loss="bce").loss(logits, targets), mini(loss="bce", sum_classes=False).loss(logits, targets)
    assert summed.item() == pytest.approx(sum(map(sum, each)) / 2) and mean.item() == pytest.approx(summed.item() / 3)
    hard = mini(loss="bce", bce_threshold=0.2).loss(logits, targets)
    assert hard.item() == pytest.approx(sum(bce(x, float(t > 0.2)) for x, t in
                                            zip(logits.flatten().tolist(), targets.flatten().tolist(),
                                                strict=True)) / 2)
    soft = mini().loss(logits, targets)
    by_hand = sum(t * (math.log(sum(map(math.exp, row))) - x) for row, ts in
                  zip(logits.tolist(), targets.tolist(), strict=True) for x, t in zip(row, ts, strict=True)) / 2
    assert soft.item() == pytest.approx(by_hand)
    assert summed == BinaryCrossEntropy(0.0, sum_classes=True)(logits, targets)
    assert mean == BinaryCrossEntropy(0.0)(logits, targets)
    assert hard == BinaryCrossEntropy(0.0, target_threshold=0.2, sum_classes=True)(logits, targets)
    assert torch.allclose(soft, SoftTargetCrossEntropy()(logits, targets))


def test_mixup_adds_two_images_and_two_labels_with_the_same_weights():
    x, labels = torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 2, 2])
    before = x.clone()
    y, targets = mixed(x, labels, 3, mixup=0.8, cutmix=0.0, smoothing=0.3)
    lam = (targets[0, 0] - 0.1).item() / 0.7  # the smoothed label has 0.8 for its class and 0.1 for each other
    assert 0 < lam < 1 and torch.equal(x, before), "the batch itself is left alone"
    assert torch.allclose(y, lam * x + (1 - lam) * x.flip(0), atol=1e-6)
    hot = torch.full((4, 3), 0.1).scatter_(1, labels[:, None], 0.8)
    assert torch.allclose(targets, lam * hot + (1 - lam) * hot.flip(0), atol=1e-6)


def test_cutmix_weighs_labels_by_the_pixels_that_are_left():
    torch.manual_seed(3)
    x, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    for _ in range(20):
        y, targets = mixed(x, labels, 4, mixup=0.0, cutmix=1.0)
        own, other = (y == x).all(1), (y == x.flip(0)).all(1)
        assert (own | other).all() and targets[0, 0].item() == pytest.approx(own[0].float().mean().item())
        rows, columns = other[0].any(1), other[0].any(0)
        assert other[0].sum() == rows.sum() * columns.sum(), "one box"


def test_half_of_the_batches_are_cut_and_half_are_mixed():
    torch.manual_seed(0)
    x, labels = torch.rand(2, 3, 8, 8), torch.tensor([0, 1])
    cut = [bool(((y == x) | (y == x.flip(0))).all()) for y, _ in
           (mixed(x, labels, 2, mixup=0.8, cutmix=1.0) for _ in range(400))]
    assert 0.42 < np.mean(cut) < 0.58
    never = [bool(((y == x) | (y == x.flip(0))).all()) for y, _ in
             (mixed(x, labels, 2, mixup=0.8, cutmix=1.0, switch_prob=0.0) for _ in range(20))]
    assert not any(never)


def test_mixing_draws_from_torch_alone():
    x, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    state = globals_of_random()
    torch.manual_seed(7)
    first, again = mixed(x, labels, 4, mixup=0.8, cutmix=1.0), mixed(x, labels, 4, mixup=0.8, cutmix=1.0)
    assert globals_of_random() == state
    random.seed(5), np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(7)
    repeat = mixed(x, labels, 4, mixup=0.8, cutmix=1.0)
    assert torch.equal(first[0], repeat[0]) and torch.equal(first[1], repeat[1]) and not torch.equal(first[0], again[0])


def test_without_mixing_labels_are_smoothed_and_odd_batches_are_fine():
    x = torch.rand(3, 3, 8, 8)
    y, targets = mixed(x, torch.tensor([0, 1, 3]), 4, mixup=0.0, cutmix=0.0, smoothing=0.1)
    assert y is x and torch.allclose(targets[2], torch.tensor([0.025, 0.025, 0.025, 0.925]))
    with pytest.raises(InputError, match="A batch of 3 cannot be mixed in pairs"):
        mixed(x, torch.tensor([0, 1, 3]), 4, mixup=0.1, cutmix=0.0)


# ---------------------------------------------------------------- RandAugment, erasing, repeated views


@pytest.fixture(scope="module")
def photo():
    return data.load("photos")[0].crop((0, 0, 96, 96))


def test_randaugment_is_timms_and_leaves_other_random_numbers_alone(photo):
    from PIL import Image
    from timm.data.auto_augment import rand_augment_transform

    grey, ours = (124, 116, 104), RandAugment(2, 9, 0.5)
    theirs = rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": grey, "interpolation": Image.BICUBIC})
    changed = 0
    for seed in range(40):
        state = globals_of_random()
        got = ours(photo, random.Random(seed))
        assert globals_of_random() == state
        drawn = random.Random(seed).getrandbits(32)
        random.seed(drawn), np.random.seed(drawn)  # noqa: NPY002
        want = theirs(photo)
        assert np.array_equal(got, want) and np.array_equal(got, ours(photo, random.Random(seed)))
        changed += not np.array_equal(got, photo)
    assert 22 < changed < 38, "each of two operations is left out half of the time"
    assert len({np.asarray(ours(photo, random.Random(s))).tobytes() for s in range(20)}) > 10


def test_randaugment_takes_its_three_numbers_and_travels_to_workers(photo):
    op = RandAugment(3, 6, 0.25, "bilinear").of_timm
    assert op.num_layers == 3 and len(op.ops) == 15
    assert {(o.magnitude, o.magnitude_std, o.prob) for o in op.ops} == {(6, 0.25, 0.5)}
    copy = pickle.loads(pickle.dumps(RandAugment(2, 7)))
    assert np.array_equal(copy(photo, random.Random(1)), RandAugment(2, 7)(photo, random.Random(1)))


def test_randaugment_at_full_strength_may_turn_an_image_black(photo):
    """With timm's own operation and today's Pillow it ends the run, about once in a thousand images."""
    from PIL import ImageOps

    ops = {op.name: op for op in RandAugment(2, 10, 0.0).of_timm.ops}
    random.seed(1)
    turned = [ops["PosterizeIncreasing"](photo) for _ in range(20)]
    assert {np.asarray(t).max() for t in turned} == {0, np.asarray(photo).max()}
    milder = next(op for op in RandAugment(2, 6, 0.0).of_timm.ops if op.name == "PosterizeIncreasing")
    turned = {np.asarray(milder(photo)).tobytes() for _ in range(20)}
    assert turned == {np.asarray(photo).tobytes(), np.asarray(ImageOps.posterize(photo, 2)).tobytes()}


def test_erasing_puts_noise_into_one_rectangle_of_a_quarter_of_the_images():
    n, op = 4000, RandomErasing(0.25)
    seeds = torch.arange(n) * 7919
    x = torch.full((n, 3, 24, 24), 5.0)
    y = op.apply(x, *op.sample(Draws(seeds)))
    assert (x == 5.0).all()
    hole = (y != 5.0).all(1)
    assert torch.equal(hole, (y != 5.0).any(1)), "all three channels"
    hit = hole.flatten(1).any(1)
    assert hit.float().mean().item() == pytest.approx(0.25, abs=0.02)
    rows, columns = hole[hit].any(2).sum(1), hole[hit].any(1).sum(1)
    area = hole[hit].flatten(1).sum(1)
    assert torch.equal(area, rows * columns), "rectangles"
    share = area / 24**2
    assert share.min() > 0.01 and share.max() < 0.36 and share.mean().item() == pytest.approx(0.17, abs=0.012)
    assert (rows / columns).min() > 0.24 and (rows / columns).max() < 4.1, "aspects from 0.3 to 1 / 0.3, rounded"
    assert abs((rows / columns).log().mean()) < 0.06, "wide as often as tall"
    assert abs(hole[hit].float().mean(0) - hole[hit].float().mean(0).flip(0, 1)).max() < 0.07, "anywhere"
    noise = y[hit].permute(0, 2, 3, 1)[hole[hit]]
    assert abs(noise.mean()) < 0.01 and noise.std().item() == pytest.approx(1.0, abs=0.01)


def test_a_rectangle_as_high_as_the_image_is_drawn_again():
    tries = torch.zeros(1, 10, 4)
    tries[0, :, :2] = torch.tensor([[1 / 3, math.log(3)], *[[1 / 36, 0.0]] * 9])  # 24 x 8, and then 4 x 4
    x = torch.zeros(1, 3, 24, 24)
    assert (RandomErasing().apply(x, torch.tensor([True]), tries, torch.tensor([7])) != 0).sum() == 3 * 4 * 4


def test_erasing_an_image_does_not_depend_on_its_batch():
    op, x = RandomErasing(0.5), torch.rand(16, 3, 24, 24)
    seeds = torch.arange(16) * 31
    whole = op.apply(x, *op.sample(Draws(seeds)))
    alone = torch.cat([op.apply(x[i:i + 1], *op.sample(Draws(seeds[i:i + 1]))) for i in range(16)])
    assert torch.equal(whole, alone) and not torch.equal(whole, x)
    assert torch.equal(RandomErasing(0.0).apply(x, *RandomErasing(0.0).sample(Draws(seeds))), x)


@pytest.mark.parametrize("world, batch", [(1, 8), (3, 4), (4, 6)])
def test_repeated_views_come_as_from_timms_sampler(world, batch):
    """It does not shuffle here, so its numbers are places in our shuffle."""
    from timm.data.distributed_sampler import RepeatAugSampler

    n, repeats = 103, 3
    order = repeated_order(n, repeats, batch, world, seed=5, epoch=2)
    loaders = [EpochSampler(n, batch, rank=r, world=world, seed=5) for r in range(world)]
    for loader in loaders:
        loader.set_position(2, 0, order)
    mine = [[pair for step in loader for pair in step] for loader in loaders]
    place = {image: k for k, image in enumerate(_shuffle(order, batch, world))}
    for rank in range(world):
        theirs = list(RepeatAugSampler(range(n), world, rank, shuffle=False, num_repeats=repeats, selected_round=0))
        assert [place[i] for i, _ in mine[rank]] == theirs[:len(mine[rank])]
        assert len(mine[rank]) == n // (batch * world) * batch
    assert len(order) == n and len(place) == math.ceil(n / repeats) and max(np.bincount(order)) == repeats
    seeds = [seed for pairs in mine for _, seed in pairs]
    assert len(set(seeds)) == len(seeds), "every copy has a crop of its own"
    if world >= repeats:
        for image in set(order[:world * batch].tolist()):
            assert max(sum(i == image for i, _ in pairs) for pairs in mine) == 1, "copies lie in different processes"


def _shuffle(order, batch, world):
    """The images in the order of the shuffle, read back from the order in which loaders take them."""
    whole = len(order) // (batch * world) * batch * world
    dealt = np.asarray(order[:whole]).reshape(-1, world, batch).transpose(0, 2, 1).ravel().tolist()
    return list(dict.fromkeys(dealt + np.asarray(order[whole:]).tolist()))


def test_repeated_views_are_dealt_to_as_many_processes_as_there_are(monkeypatch):
    method, asked = mini(repeats=3), []
    method.labels, method.batch = torch.zeros(60), 4
    monkeypatch.setattr("sslnb.evaluate.finetune.world", lambda: (1, 5))
    monkeypatch.setattr("sslnb.evaluate.finetune.repeated_order", lambda *args: asked.append(args))
    method.order(7, 2)
    assert asked == [(60, 3, 4, 5, 7, 2)]


def test_repeated_views_differ_between_epochs_and_seeds_and_continue_within_an_epoch():
    orders = [repeated_order(60, 3, 4, 2, seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert orders[0] == orders[3] and orders[0] != orders[1] and orders[0] != orders[2]
    whole, late = EpochSampler(60, 4, world=2), EpochSampler(60, 4, world=2)
    whole.set_position(0, 0, orders[0]), late.set_position(0, 3, orders[0])
    assert list(whole)[3:] == list(late)


# ---------------------------------------------------------------- the averaged network


def test_the_averages_momentum_rises_as_openmixups():
    method = mini(ema=0.9999, ema_ramp=20)
    method.per_epoch = 626
    assert method.momentum(0) == pytest.approx(0.9 * 0.9999) and method.momentum(20 * 626) == 0.9999
    assert method.momentum(10 * 626) == pytest.approx(0.95 * 0.9999) and method.momentum(10**6) == 0.9999
    assert mini(ema=0.99).momentum(0) == 0.99


def test_the_average_follows_the_weights_by_its_formula():
    method = mini(ema=0.5)
    method.total, w = 10, method.backbone.conv1[0].weight
    start = w.detach().clone()
    with torch.no_grad():
        w.add_(1.0)
        method.after_step(0.1)
        w.add_(1.0)
        method.after_step(0.2)
    assert torch.allclose(method.average[0].conv1[0].weight, start + 0.5 * (0.5 * 1.0) + 0.5 * 2.0)
    assert not any(p.requires_grad for p in method.average.parameters())
    assert mini().average is None


def test_the_average_counts_the_steps_that_were_taken_before_its_own(monkeypatch):
    method, asked = mini(ema=0.9), []
    monkeypatch.setattr(method, "momentum", lambda step: asked.append(step) or 0.9)
    method.total = 7
    for step in range(7):
        method.after_step((step + 1) / 7)  # as the loop tells it
    assert asked == list(range(7))


# ---------------------------------------------------------------- how it begins


def test_a_larger_window_gets_its_table_by_cubic_splines_on_a_growing_grid():
    torch.manual_seed(0)
    table = torch.randn(11 * 11, 4, dtype=torch.float64)
    got = resampled_table(table, 13)
    low, high = 1.0, 2.0  # the q for which 1 + q + q² + q³ + q⁴ is 6
    while high - low > 1e-9:
        q = (low + high) / 2
        low, high = (low, q) if sum(q**k for k in range(5)) > 6 else (q, high)
    reach = np.cumsum([q**k for k in range(5)])
    old = np.concatenate([-reach[::-1], [0], reach])
    rows = CubicSpline(old, table.view(11, 11, 4).numpy(), axis=0)(np.arange(-6, 7))
    want = CubicSpline(old, rows, axis=1)(np.arange(-6, 7)).reshape(169, 4)
    assert torch.allclose(got, torch.from_numpy(want), atol=2e-4)
    assert got.shape == (169, 4) and torch.allclose(got[84], table[60], atol=1e-5), "no offset, no change"
    corners = torch.tensor([0, 12, 156, 168]), torch.tensor([0, 10, 110, 120])
    assert torch.allclose(got[corners[0]], table[corners[1]], atol=1e-4), "far corners stay far corners"


def test_rows_of_the_class_token_stay_and_a_smaller_window_works():
    table = torch.randn(27 * 27 + 3, 2)
    got = resampled_table(table, 19, extra=3)
    assert got.shape == (19 * 19 + 3, 2) and torch.equal(got[-3:], table[-3:]) and got.isfinite().all()
    assert torch.allclose(got[180], table[364], atol=1e-4)


def test_a_swin_of_window_6_begins_with_window_7():
    small = backbones.build("swin_mini", 24, window_size=6)
    for name, x in small.state_dict().items():
        if name.endswith("_table"):
            x.normal_()
    large = backbones.build("swin_mini", 28, window_size=7)
    state, said = carried_over(small.state_dict(), large, "swin_mini")
    large.load_state_dict(state)
    name = "layers.1.blocks.0.attn.relative_position_bias_table"
    assert torch.equal(state[name], resampled_table(small.state_dict()[name], 13))
    assert torch.equal(state["layers.1.blocks.1.mlp.fc1.weight"], small.layers[1].blocks[1].mlp.fc1.weight)
    assert "resampled: layers.0.blocks.0.attn.relative_position_bias_table" in said and "new" not in said


def test_a_vit_begins_with_all_but_its_last_norm_and_says_so():
    source, target = backbones.build("vit_mini", 16), backbones.build("vit_mini", 24, global_pool="avg")
    source.pos_embed.data.normal_(), source.norm.weight.data.fill_(3.0)
    state, said = carried_over(source.state_dict(), target, "vit_mini")
    target.load_state_dict(state)
    assert said == (f"{len(state) - 2} of the {len(state)} tensors of vit_mini come from the source; resampled: "
                    "pos_embed; new: fc_norm.bias, fc_norm.weight; left over: norm.bias, norm.weight.")
    assert (target.fc_norm.weight == 1).all() and torch.equal(target.pos_embed[:, 0], source.pos_embed[:, 0])
    grid = source.pos_embed[:, 1:].reshape(1, 4, 4, 64).permute(0, 3, 1, 2)
    grown = F.interpolate(grid, (6, 6), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, 36, 64)
    assert torch.allclose(target.pos_embed[:, 1:], grown, atol=1e-5)


def test_a_table_for_all_blocks_becomes_one_for_each():
    source = backbones.build("beit_mini", 16, use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
    source.rel_pos_bias.relative_position_bias_table.data.normal_()
    target = backbones.build("beit_mini", 16, **FINETUNE["finetune_simmim_vit"].backbone_numbers)
    state, _ = carried_over(source.state_dict(), target, "beit_mini")
    for block in range(4):
        assert torch.equal(state[f"blocks.{block}.attn.relative_position_bias_table"],
                           source.rel_pos_bias.relative_position_bias_table)
    target.load_state_dict(state)


def test_positions_that_pretraining_lacked_are_new_and_zero():
    source = backbones.build("beit_mini", 16, use_abs_pos_emb=True, use_rel_pos_bias=False)
    target = backbones.build("beit_mini", 16, use_abs_pos_emb=True, use_rel_pos_bias=True, global_pool="avg")
    state, said = carried_over(source.state_dict(), target, "beit_mini")
    assert not state["blocks.0.attn.relative_position_bias_table"].any()
    assert "new: blocks.0.attn.relative_position_bias_table" in said and "and 2 more" in said


@pytest.mark.parametrize("source, target, message", [
    (("resnet_mini", {}), ("vit_mini", {}), "does not fit vit_mini: blocks.*and others are in one of them only"),
    (("vit_mini", {"depth": 5}), ("vit_mini", {}), "does not fit vit_mini: blocks.4"),
    (("vit_mini", {"embed_dim": 32}), ("vit_mini", {}), r"cls_token of the source has the shape \(1, 1, 32\)")])
def test_what_does_not_fit_is_named(source, target, message):
    state = backbones.build(source[0], 16, **source[1]).state_dict()
    with pytest.raises(InputError, match=message):
        carried_over(state, backbones.build(target[0], 16, **target[1]), target[0])


@pytest.mark.parametrize("method, row, protocol, new", [
    ("mae", "vit_base_dec8_dim512_8xb128_accu4_cos_fp16_ep400", "mae", 2),
    ("maskfeat", "vit_base_hog_108_sz224_8xb128_accu2_cos_fp16_ep300", "maskfeat", 2),
    ("simmim", "vit_base_rgb_m_sz224_8xb128_accu2_step_fp16_ep800", "simmim_vit", 2),
    ("simmim", "swin_base_sz192_8xb128_accu2_cos_ep100", "simmim_swin_192", 0),
    ("cae", "vit_base_sz224_8xb64_accu4_cos_fp16_ep300", "cae", 14),
    ("cae", "vit_base_sz224_8xb64_accu4_cos_fp16_ep300", "cae_official", 14),
    ("a2mim", "vit_base_l0_sz224_8xb128_accu2_step_ep800", "simmim_vit", 2),
    ("a2mim", "r50_l3_sz224_init_8xb256_cos_ep300", "rsb_a3", 0)])
def test_every_published_pretraining_fits_the_protocol_of_its_row(method, row, protocol, new):
    """A2MIM's and SimMIM's transformers share one; CAE's 12 tables of relative positions are new, the rest fc_norm."""
    pretraining = methods.recipes(method)[row]
    source = SimpleNamespace(folder="runs/x", size=pretraining.size, architecture=pretraining.backbone,
                             numbers=pretraining.backbone_numbers)
    recipe = FineTune.on_source(FINETUNE[f"finetune_{protocol}"], source, None)
    with torch.device("meta"):
        state = backbones.build(pretraining.backbone, pretraining.size, **pretraining.backbone_numbers).state_dict()
        target = backbones.build(recipe.backbone, recipe.size, **recipe.backbone_numbers)
    carried, said = carried_over(state, target, recipe.backbone)
    assert said.startswith(f"{len(carried) - new} of the {len(carried)} tensors") and "resampled" not in said
    assert {k: v.shape for k, v in carried.items()} == {k: v.shape for k, v in target.state_dict().items()}
    assert (getattr(target, "pos_embed", None) is not None) == ("pos_embed" in state)


def test_layers_of_a_resnet_end_with_the_head():
    ids, last = layer_ids(backbones.build("resnet_mini", 20))
    assert ids["conv1.0.weight"] == 0 and max(ids.values()) == last - 1 == ids["layer2.0.conv1.weight"]


# ---------------------------------------------------------------- a run


def test_the_source_gives_its_network_and_the_protocol_its_own_numbers():
    big = SimpleNamespace(folder="runs/x", size=224, architecture="vit_base_patch16_224", numbers={"depth": 12})
    r = FineTune.on_source(FINETUNE["finetune_mae"], big, None)
    assert r.backbone_numbers == {"depth": 12, "drop_path_rate": 0.1, "global_pool": "avg"} and r.pool == "model"
    r50 = SimpleNamespace(folder="runs/x", size=224, architecture="resnet50", numbers={})
    assert FineTune.on_source(FINETUNE["finetune_rsb_a3"], r50, None).size == 160, "not that of the pretraining"
    assert FineTune.on_source(FINETUNE["finetune_rsb_a3"], r50, 128).size == 128
    small = SimpleNamespace(folder="runs/x", size=20, architecture="resnet_mini", numbers={})
    assert FineTune.on_source(FINETUNE["finetune_rsb_a3"], small, None).size == 20
    swin = SimpleNamespace(folder="runs/x", size=192, architecture="swin", numbers={"window_size": 6})
    r = FineTune.on_source(FINETUNE["finetune_simmim_swin_224"], swin, None)
    assert r.backbone_numbers["window_size"] == 7 and r.size == 224
    assert not FineTune.frozen_in(DEMO), "fresh weights are trained from as they are drawn"


def test_a_transformer_begins_with_the_mean_of_its_patches(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    row = train_protocol("vit_mini", "finetune_demo_vit", "digits_scattered", tmp_path / "run", steps=3)
    run = Run.open(tmp_path / "run")
    assert "new: fc_norm.bias, fc_norm.weight; left over: norm.bias, norm.weight." in capsys.readouterr().out
    vit, x = run.method().backbone, torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        assert torch.allclose(run.method().logits(x),
                              run.method().head(vit.fc_norm(vit.forward_features(x)[:, 1:].mean(1))), atol=1e-5)
    assert row["source"] == "vit_mini (untrained)" and run.recipe.pool == "model" and row["n"] == 497


def test_everything_moves_from_where_the_source_left_it(source, tmp_path, capsys):
    row = train_protocol(source, "finetune_demo", out=tmp_path / "run", steps=20, mixup=0.8, cutmix=1.0,
                         ema=0.9, rand_ops=2, erase=0.25, repeats=3)
    said, run = capsys.readouterr().out, Run.open(tmp_path / "run")
    assert "48 of the 48 tensors of resnet_mini come from the source." in said
    before, after = source.backbone().state_dict(), run.method().backbone.state_dict()
    assert all(not torch.equal(v, after[k]) for k, v in before.items())
    (tested,) = run.history("test")
    assert row["top1"] == tested["top1"] and row["ema"]["top1"] == tested["top1_ema"] != row["top1"]
    assert row["n"] == tested["n"] and json.loads((tmp_path / "run" / "results.jsonl").read_text()) == row
    method = run.method()
    images = data.load("digits_scattered", "test")
    (x,) = method.test_view(20)([images[i] for i in range(len(images))])
    trained = method.backbone, method.head
    method.average[0].load_state_dict({**method.average[0].state_dict(), **{
        k: v for k, v in method.backbone.state_dict().items() if "running" in k}})
    for (backbone, head), top1 in ((trained, row["top1"]), (method.average, row["ema"]["top1"])):
        with torch.no_grad():
            right = head(backbone.eval()(x)).argmax(1) == torch.as_tensor(images.labels)
        assert 100 * right.float().mean().item() == pytest.approx(top1, abs=1e-3)
    assert (row["top1"], row["best"]) == (tested["top1"], tested["top1"])


def test_an_average_starts_from_the_sources_weights(source, tmp_path):
    recipe = DEMO.with_(data="few_digits", ema=0.9, start=str(start_of(source, tmp_path)))
    method = prepare(recipe, out=tmp_path / "run").recipe.build()
    run = Run.open(tmp_path / "run")
    method.before_train(run)
    assert torch.equal(method.average[0].conv1[0].weight, source.backbone().conv1[0].weight)
    with torch.no_grad():
        method.average[0].conv1[0].weight.zero_()
    method.before_train(run)
    assert not method.average[0].conv1[0].weight.any(), "and a resumed run keeps it"


def start_of(source, folder):
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in source.backbone().state_dict().items()}, folder / "start.safetensors")
    return folder / "start.safetensors"


def test_an_interrupted_run_equals_an_uninterrupted_one_bit_for_bit(source, tmp_path):
    """With all that draws or remembers: mixing, RandAugment, erasing, repeated views and the average."""
    recipe = DEMO.with_(data="few_digits", steps=8, batch=32, mixup=0.8, cutmix=1.0, ema=0.9, ema_ramp=1, rand_ops=2,
                        erase=0.25, repeats=3, test_every=0, start=str(start_of(source, tmp_path)))
    whole = pretrain(recipe, out=tmp_path / "whole")
    run = prepare(recipe, out=tmp_path / "broken")
    train_until(run, 3)
    broken = pretrain(recipe, out=tmp_path / "broken")
    a, b = (r.method().state_dict() for r in (whole, broken))
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert any(not torch.equal(v, a[k.replace("average.0", "backbone")]) for k, v in a.items() if "average.0" in k)


@pytest.mark.distributed
def test_two_processes_train_as_one_with_the_whole_batch(source, tmp_path):
    """Batch norm sees both halves, and the averaged network follows in each process."""
    changes = dict(steps=3, optimizer="sgd", lr=0.05, warmup_steps=0, ema=0.5)
    rows = [train_protocol(source, "finetune_demo", out=tmp_path / str(n), processes=n, **changes) for n in (1, 2)]
    one, two = (Run.open(tmp_path / str(n)) for n in (1, 2))
    assert (two.recipe.gpus, two.recipe.batch) == (2, 16) and rows[0]["n"] == rows[1]["n"] == 497
    theirs = two.method().state_dict()
    assert all(torch.allclose(v.float(), theirs[k].float(), atol=1e-4) for k, v in one.method().state_dict().items())
    assert rows[0]["top1"] == pytest.approx(rows[1]["top1"], abs=0.5)


def test_the_epoch_of_a_run_holds_every_third_image_three_times(source, tmp_path):
    recipe = DEMO.with_(data="few_digits", batch=32, repeats=3, start=str(start_of(source, tmp_path)))
    method = prepare(recipe, out=tmp_path / "run").recipe.build()
    method.before_train(Run.open(tmp_path / "run"))
    order = method.order(0, 0)
    assert len(order) == 130 and set(np.bincount(order)) == {0, 1, 3} and mini().order(0, 0) is None


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("changes, message", [
    ({"loss": "hinge"}, "hinge"),
    ({"batch": 33, "mixup": 0.8}, "batch 33 is odd, and images are mixed in pairs"),
    ({"backbone_numbers": {"use_rel_pos_bias": True}}, "resnet_mini cannot be built as this protocol wants it")])
def test_bad_input_is_refused_before_any_work(source, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train_protocol(source, "finetune_demo", out=tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backbone", ["vit_mini", "swin_mini"])
def test_a_transformer_that_cannot_be_tested_at_another_size_is_told_before_any_work(tmp_path, backbone):
    with pytest.raises(InputError, match=f"{backbone} for images of 28 px cannot be tested on 39 px .*test_scale=1"):
        train_protocol(backbone, "finetune_rsb_a3", "few_digits", tmp_path / "run", size=28, batch=26)
    assert not (tmp_path / "run").exists()
    FineTune.fitted(FINETUNE["finetune_rsb_a3"].with_(data="few_digits", backbone="resnet_mini", size=28, batch=26))


@pytest.mark.parametrize("test_on, words", [("held out", "needs images that are held out: give hold_out=0.2"),
                                            ("val", "Unknown images for test_on 'val'.*Known: held out, test")])
def test_what_to_test_on_is_looked_at_before_any_work(source, tmp_path, test_on, words):
    with pytest.raises(InputError, match=words):
        train_protocol(source, "finetune_demo", out=tmp_path / "run", test_on=test_on)
    assert not (tmp_path / "run").exists()


def test_a_transformers_protocol_refuses_a_network_without_relative_positions(source, tmp_path):
    with pytest.raises(InputError, match="resnet_mini cannot be built as this protocol wants it .*use_rel_pos_bias"):
        train_protocol(source, "finetune_cae", out=tmp_path / "run")


def test_repeated_images_are_dealt_by_the_runs_batch(tiny, tmp_path):
    from sslnb.evaluate.finetune import FINETUNE

    recipe = FINETUNE["finetune_demo"].with_(data="few_digits", batch=26, repeats=3, classes=10)
    method = recipe.build()
    method.before_train(SimpleNamespace(recipe=recipe))
    assert method.batch == 26
