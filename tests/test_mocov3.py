"""MoCo v3: queries, keys and loss by hand, the ViT's initial weights, what stays frozen, the zoo's rows."""

import math

import pytest
import torch
from torch import nn

from sslnb import optim
from sslnb.errors import InputError
from sslnb.methods.mocov3 import RECIPES, MoCoV3
from sslnb.tokens import class_attention
from sslnb.views import Blur, ColorJitter, Greyscale, HorizontalFlip, RandomResizedCrop, Solarize

VIT, RESNET = "vit_small_8xb64_accu8_cos_fp16_ep300", "r50_16xb256_cos_lr9_6_fp16_ep100"


@pytest.fixture
def method():
    return RECIPES["demo"].build()


@pytest.fixture
def images():
    return [torch.randn(6, 3, RECIPES["demo"].size, RECIPES["demo"].size) for _ in range(2)]


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


# The loss

def by_hand(q, k, temperature):
    """2τ times the mean cross-entropy of every query against all keys."""
    q, k, total = q.tolist(), k.tolist(), 0.0
    for i in range(len(q)):
        every = sum(math.exp(cosine(q[i], key) / temperature) for key in k)
        total -= math.log(math.exp(cosine(q[i], k[i]) / temperature) / every)
    return 2 * temperature * total / len(q)


@pytest.mark.parametrize("n, d, temperature", [(5, 3, 0.2), (3, 8, 1.0), (2, 4, 0.07)])
def test_one_direction_is_the_papers_sum(method, n, d, temperature):
    method.temperature = temperature
    q, k = torch.randn(n, d), torch.randn(n, d)
    assert method.contrast(q, k).item() == pytest.approx(by_hand(q, k, temperature), rel=1e-4)


def test_queries_of_each_view_look_for_keys_of_the_other(method, images):
    method.temperature = 0.3
    with torch.no_grad():
        for p in method.key.parameters():
            p.add_(0.02 * torch.randn_like(p))  # keys that are not the queries' own outputs
    out = method(images)
    q = [method.predictor(method.projector(method.backbone(x))) for x in images]
    k = [method.key(x) for x in images]
    assert out["loss"].item() == pytest.approx(by_hand(q[0], k[1], 0.3) + by_hand(q[1], k[0], 0.3), rel=1e-4)
    assert torch.equal(out["q1"], q[0]) and torch.equal(out["q2"], q[1])


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_the_loss_at_known_points(method, temperature):
    method.temperature = temperature
    same = torch.ones(7, 5)
    assert method.contrast(same, same).item() == pytest.approx(2 * temperature * math.log(7), rel=1e-5)
    e = torch.eye(4)
    expected = 2 * temperature * math.log(1 + 3 * math.exp(-1 / temperature))
    assert method.contrast(e, 9 * e).item() == pytest.approx(expected, rel=1e-4)  # lengths do not matter
    wrong = method.contrast(e, e.roll(1, 0)).item()
    assert wrong == pytest.approx(expected + 2, rel=1e-4)  # 2τ · 1/τ more: one cosine lost


def test_the_loss_stays_in_full_precision_under_autocast(method):
    q, k = torch.randn(64, 32), torch.randn(64, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = method.contrast(q, k)
    assert inside.dtype == torch.float32 and inside.item() == method.contrast(q, k).item()


# The key encoder

def test_no_gradient_reaches_the_keys_and_the_optimizer_does_not_hold_them(method, images):
    method(images)["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in method.key.parameters())
    held = {id(p) for group in method.param_groups(RECIPES["demo"]) for p in group["params"]}
    assert not held & {id(p) for p in method.key.parameters()}


def test_keys_are_constants_for_the_gradient(method, images):
    method(images)["loss"].backward()
    grad = method.projector[0].weight.grad.clone()
    with torch.no_grad():
        k1, k2 = method.key(images[0]), method.key(images[1])
    method.zero_grad()
    q1, q2 = (method.predictor(method.projector(method.backbone(x))) for x in images)
    (method.contrast(q1, k2) + method.contrast(q2, k1)).backward()
    assert torch.allclose(grad, method.projector[0].weight.grad, rtol=1e-4, atol=1e-7)


def test_the_key_encoder_follows_by_the_schedule():
    method = RECIPES["demo"].with_(momentum=0.9).build()
    start = [p.clone() for p in method.key.parameters()]
    assert all(torch.equal(k, p) for k, p in zip(start, [*method.backbone.parameters(), *method.projector.parameters()],
                                                 strict=True)), "it starts as a copy"
    with torch.no_grad():
        for p in (*method.backbone.parameters(), *method.projector.parameters()):
            p.add_(1.0)
    method.after_step(0.5)  # m = 1 - 0.1 * (1 + cos(pi/2)) / 2 = 0.95
    for old, new in zip(start, method.key.parameters(), strict=True):
        assert torch.allclose(new, old + 0.05, atol=1e-5)
    method.after_step(1.0)  # m = 1: it stands still
    for old, new in zip(start, method.key.parameters(), strict=True):
        assert torch.allclose(new, old + 0.05, atol=1e-5)


def test_without_momentum_the_key_encoder_is_the_query_encoder_of_the_step_before():
    method = RECIPES["demo"].with_(momentum=0.0).build()
    with torch.no_grad():
        for p in method.projector.parameters():
            p.add_(1.0)
    method.after_step(0.0)
    for k, p in zip(method.key[1].parameters(), method.projector.parameters(), strict=True):
        assert torch.allclose(k, p, atol=1e-6)


def test_without_predictor_the_query_is_the_projection(images):
    method = RECIPES["demo"].with_(predict=False).build()
    assert torch.equal(method(images)["q1"], method.projector(method.backbone(images[0])))


# What stays frozen

def after_one_step(method, images):
    """One step of AdamW at a high rate and decay, on weights that already moved from their copy."""
    recipe = RECIPES["demo"].with_(lr=0.1, weight_decay=0.5)
    optimizer = optim.build(method.param_groups(recipe), recipe)
    method(images)["loss"].backward()
    optimizer.step()
    method.after_step(0.5)


def test_patch_projection_and_positions_do_not_move(method, images):
    vit = method.backbone
    frozen = {name: p.clone() for name, p in vit.named_parameters() if name.startswith(("patch_embed", "pos_embed"))}
    assert sorted(frozen) == ["patch_embed.proj.bias", "patch_embed.proj.weight", "pos_embed"]
    others = {name: p.clone() for name, p in vit.named_parameters() if name not in frozen}
    after_one_step(method, images)
    for name, p in vit.named_parameters():
        assert torch.equal(p, frozen[name]) if name in frozen else not torch.equal(p, others[name]), name
    for name, p in method.key[0].named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name]), name


def test_the_switch_lets_the_patch_projection_learn_but_not_the_positions(images):
    method = RECIPES["demo"].with_(freeze_patch=False).build()
    weight, position = method.backbone.patch_embed.proj.weight.clone(), method.backbone.pos_embed.clone()
    after_one_step(method, images)
    assert not torch.equal(weight, method.backbone.patch_embed.proj.weight)
    assert torch.equal(position, method.backbone.pos_embed)


# Initial weights

def test_positions_are_sines_and_cosines_of_the_row_first(method):
    vit, dim = method.backbone, method.backbone.embed_dim
    side, quarter = vit.patch_embed.grid_size[0], dim // 4
    assert vit.pos_embed[0, 0].abs().max() == 0
    for row, column in ((0, 0), (1, 0), (0, 1), (2, 3), (side - 1, side - 2)):
        expected = [wave(place * 10000 ** (-k / quarter)) for place in (row, column) for wave in (math.sin, math.cos)
                    for k in range(quarter)]
        assert vit.pos_embed[0, 1 + row * side + column].tolist() == pytest.approx(expected, abs=1e-5)


def test_vit_small_starts_as_the_official_one():
    vit = RECIPES[VIT].with_(hidden_dim=8, dim=8).build().backbone
    assert [block.attn.num_heads for block in vit.blocks] == [12] * 12 and vit.blocks[0].attn.head_dim == 32
    assert vit.blocks[0].norm1.eps == 1e-6
    for layer, bound in ((vit.blocks[0].attn.qkv, 6 / 768), (vit.blocks[3].attn.proj, 6 / 768),
                         (vit.blocks[5].mlp.fc1, 6 / 1920), (vit.blocks[11].mlp.fc2, 6 / 1920),
                         (vit.patch_embed.proj, 6 / (3 * 16**2 + 384))):
        assert layer.weight.abs().max().item() == pytest.approx(bound**0.5, rel=1e-3)
        assert layer.weight.std().item() == pytest.approx((bound / 3) ** 0.5, rel=0.02)  # uniform
        assert layer.bias.abs().max() == 0
    assert vit.cls_token.abs().max() < 1e-5 and vit.cls_token.abs().max() > 0


def test_a_resnet_keeps_its_own_weights_and_all_of_them_learn():
    torch.manual_seed(0)
    plain = RECIPES["demo"].with_(method="byol", backbone="resnet_mini", size=20, numbers={"hidden_dim": 8, "dim": 8})
    ours = RECIPES["demo"].with_(backbone="resnet_mini", size=20, hidden_dim=8, dim=8)
    torch.manual_seed(0)
    a = plain.build().backbone.state_dict()
    torch.manual_seed(0)
    method = ours.build()
    assert all(torch.equal(a[k], v) for k, v in method.backbone.state_dict().items())
    assert all(p.requires_grad for p in method.backbone.parameters())


# The real models

COUNTS = {"vit": {"backbone": 21_665_664, "projector": 19_415_040, "predictor": 2_105_344,
                  "key": 21_665_664 + 19_415_040},
          "r50": {"backbone": 23_508_032, "projector": 9_445_376, "predictor": 2_105_344,
                  "key": 23_508_032 + 9_445_376}}


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "demo"])
def test_the_imagenet_rows_build_the_real_models(name):
    kind, layers = ("vit", 3) if name.startswith("vit") else ("r50", 2)
    with torch.device("meta"):
        method = RECIPES[name].build()
        z = method.projector(method.backbone(torch.zeros(2, 3, 224, 224)))
        q = method.predictor(z)
    assert {k: sum(p.numel() for p in m.parameters()) for k, m in method.named_children()} == COUNTS[kind]
    assert z.shape == q.shape == (2, 256)
    three = ["Linear", "BatchNorm1d", "ReLU"]
    assert [type(x).__name__ for x in method.projector] == [*three * (layers - 1), "Linear", "BatchNorm1d"]
    assert [type(x).__name__ for x in method.predictor] == [*three, "Linear", *["BatchNorm1d"] * (kind == "vit")]
    norms = [x for x in (*method.projector, *method.predictor) if isinstance(x, nn.BatchNorm1d)]
    assert [x.affine for x in norms] == {"vit": [True, True, False, True, False], "r50": [True, False, True]}[kind]
    assert all(x.bias is None for x in (*method.projector, *method.predictor) if isinstance(x, nn.Linear))


def test_the_feature_is_the_class_token_after_the_last_norm(method, images):
    vit = method.backbone.eval()
    assert torch.equal(vit(images[0]), vit.forward_features(images[0])[:, 0])


@pytest.mark.parametrize("name, smallest", [(VIT, 0.08), (RESNET, 0.2)])
def test_views_are_those_of_the_paper(name, smallest):
    recipe = RECIPES[name].with_(hidden_dim=8, dim=8, backbone="resnet18", backbone_numbers={})
    for view, blur, solarize in zip(recipe.build().views(224).views, (1.0, 0.1), (0.0, 0.2), strict=True):
        ops = {type(op): op for op in (*view.image_ops, *view.batch_ops)}
        assert ops[RandomResizedCrop] == RandomResizedCrop(224, (smallest, 1.0), interpolation="bilinear")
        assert ops[HorizontalFlip].p == 0.5 and ops[Greyscale].p == 0.2
        assert ops[ColorJitter] == ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8)
        assert (ops[Blur].p, ops[Solarize].p, ops[Blur].sigma) == (blur, solarize, (0.1, 2.0))


# Optimisation

@pytest.mark.parametrize("name, gpus, batch, accum, epochs, optimizer, lr, decay, momentum, temperature", [
    (VIT, 8, 64, 8, 300, "adamw", 2.4e-3, 0.1, 0.99, 0.2),
    ("vit_small_32xb128_cos_fp16_ep300", 32, 128, 1, 300, "adamw", 2.4e-3, 0.1, 0.99, 0.2),
    ("r50_4xb256_accu4_cos_fp16", 4, 256, 4, 200, "lars", 9.6, 1e-6, 0.99, 1.0),
    (RESNET, 16, 256, 1, 100, "lars", 9.6, 1e-6, 0.99, 1.0),
    ("r50_16xb256_cos_lr4_8_fp16_ep300", 16, 256, 1, 300, "lars", 4.8, 1e-6, 0.99, 1.0),
    ("r50_16xb256_cos_lr4_8_fp16_ep1000", 16, 256, 1, 1000, "lars", 4.8, 1.5e-6, 0.996, 1.0)])
def test_the_rows_of_the_zoo(name, gpus, batch, accum, epochs, optimizer, lr, decay, momentum, temperature):
    r = RECIPES[name]
    assert (r.gpus, r.batch, r.accum, r.epochs, r.total_batch) == (gpus, batch, accum, epochs, 4096)
    assert (r.optimizer, r.lr, r.weight_decay, r.precision, r.min_lr) == (optimizer, lr, decay, "fp16", 0)
    assert r.warmup_epochs == (40 if optimizer == "adamw" else 10) and r.betas == (0.9, 0.999)
    assert (r.numbers["momentum"], r.numbers["temperature"]) == (momentum, temperature)
    assert r.force_accum == (accum > 1), "keys are the batch: accumulating must be asked for"


def test_rows_that_do_not_accumulate_refuse_to():
    with pytest.raises(InputError, match="mocov3 must not accumulate"):
        RECIPES[RESNET].on(8, 256)
    assert RECIPES[RESNET].on(8).batch == 512


def test_weight_decay_is_on_every_trained_tensor(method):
    (group,) = method.param_groups(RECIPES["demo"])
    wanted = [name for name, p in method.named_parameters() if p.requires_grad]
    held = {id(p) for p in group["params"]}
    assert group["weight_decay"] == RECIPES["demo"].weight_decay and len(held) == len(wanted)
    assert "backbone.cls_token" in wanted and "backbone.blocks.0.norm1.bias" in wanted


def test_lars_still_leaves_out_the_vectors():
    recipe = RECIPES["demo"].with_(optimizer="lars", lr=1.0, weight_decay=0.5)
    method = MoCoV3(RECIPES["demo"].build().backbone, hidden_dim=8, dim=8)
    optimizer = optim.build(method.param_groups(recipe), recipe)
    vector = method.projector[1].weight
    before = vector.detach().clone()
    method([torch.randn(6, 3, recipe.size, recipe.size) for _ in range(2)])["loss"].backward()
    optimizer.step()
    assert torch.allclose(vector, before - vector.grad, atol=1e-6)


# What the figures ask of the backbone

def test_the_class_token_looks_where_its_query_meets_the_keys(method, images):
    vit = method.backbone.eval()
    before = vit(images[0])
    x = vit.pos_drop(vit._pos_embed(vit.patch_embed(images[0])))
    for block, layer in enumerate(vit.blocks):
        q, k, _ = layer.attn.qkv(layer.norm1(x)).unflatten(2, (3, layer.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        shares = (q[:, :, :1] @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(3)[:, :, 0]  # B x heads x (1 + L)
        assert torch.allclose(class_attention(vit, images[0], block), shares[:, :, 1:], atol=1e-6)
        x = layer(x)
    assert torch.equal(vit(images[0]), before) and all(layer.attn.fused_attn for layer in vit.blocks), "as it was"
