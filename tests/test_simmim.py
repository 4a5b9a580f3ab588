"""SimMIM: the loss by hand, squares with exact counts, what they must not tell, the real models, the zoo's rows."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from conftest import HALVES, ten_steps
from torch import nn

from sslnb import load, methods, optim
from sslnb.backbones import MINI, last_map
from sslnb.errors import InputError
from sslnb.masking import unit_mask, upsample_mask
from sslnb.methods.simmim import RECIPES, SHARED, SimMIM
from sslnb.views import HorizontalFlip, Normalize, RandomResizedCrop

SWIN = RECIPES["swin_base_sz192_8xb128_accu2_cos_ep100"]
VIT = RECIPES["vit_base_rgb_m_sz224_8xb128_accu2_step_fp16_ep800"]
MINIS = {"swin_mini": {"drop_path_rate": 0.0}, "beit_mini": SHARED, "vit_mini": {}}

every_backbone = pytest.mark.parametrize("name", MINIS)


def build(name, **numbers):
    return RECIPES["demo"].with_(backbone=name, backbone_numbers=MINIS[name], **numbers).build()


@pytest.fixture
def images():
    return torch.randn(4, 3, 28, 28)


@pytest.fixture(scope="module")
def real():
    """The two models of the zoo, without numbers in them."""
    with torch.device("meta"):
        return {"swin": SWIN.build(), "vit": VIT.build()}


# The loss

def by_hand(prediction, images, mask, patch):
    """Mean over hidden pixels of the mean over colours of |x̂ − x|."""
    total, hidden, side = 0.0, 0, images.shape[-1] // patch
    for b in range(len(images)):
        for y in range(images.shape[-1]):
            for x in range(images.shape[-1]):
                if mask[b, y // patch * side + x // patch]:
                    hidden += 1
                    for c in range(3):
                        total += abs(prediction[b, c, y, x].item() - images[b, c, y, x].item())
    return total / 3 / hidden


@every_backbone
def test_the_loss_is_the_mean_error_of_hidden_pixels(name, images):
    method = build(name)
    out = method([images])
    expected = by_hand(out["prediction"], images, out["mask"], method.patch)
    assert out["loss"].item() == pytest.approx(expected, rel=1e-5)
    unequal = (torch.rand_like(out["mask"]) < torch.tensor([[0.1], [0.3], [0.5], [0.9]])).float()
    expected = by_hand(out["prediction"], images, unequal, method.patch)
    assert method.loss(out["prediction"], images, unequal).item() == pytest.approx(expected, rel=1e-5)


def test_what_is_predicted_for_visible_pixels_does_not_count_unless_asked_for(images):
    method = build("swin_mini")
    mask, prediction = method.draw_mask(4), torch.randn(4, 3, 28, 28)
    visible = 1 - upsample_mask(mask, method.patch)
    loss = method.loss(prediction, images, mask)
    assert torch.equal(method.loss(prediction + 100 * visible, images, mask), loss)
    assert method.loss(prediction + 100 * (1 - visible), images, mask) > loss + 50
    method.hidden_only = False
    assert method.loss(prediction, images, mask).item() == pytest.approx((prediction - images).abs().mean().item())


def test_the_loss_stays_in_full_precision_under_autocast(images):
    method = build("swin_mini")
    mask, prediction, target = method.draw_mask(4), torch.randn(4, 3, 28, 28).bfloat16(), images.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = method.loss(prediction, target, mask)
    assert inside.dtype == torch.float32
    assert inside.item() == method.loss(prediction.float(), target.float(), mask).item()


def test_the_target_is_the_image_and_nothing_is_borrowed_from_it(images):
    method = build("swin_mini")
    assert torch.equal(method.target(images), images) and method.borrows == ""
    assert torch.equal(method.to_image(images, torch.zeros(1)), images)
    assert method.seen(images, method.draw_mask(4)) is None


# Masks

@pytest.mark.parametrize("kind, units, cells, hidden", [("swin", 6, 8, 22), ("vit", 7, 2, 30)])
def test_squares_of_32_pixels_go_as_one_and_their_number_is_rounded_up(real, kind, units, cells, hidden):
    """61.1 % of 192 px and 61.2 % of 224 px; the mask has one number for every cell of the patch embedding."""
    mask = real[kind].draw_mask(5)
    assert mask.shape == (5, (units * cells) ** 2) and mask.sum(1).tolist() == [hidden * cells**2] * 5
    squares = mask.view(5, units, cells, units, cells).mean((2, 4))
    assert ((squares == 0) | (squares == 1)).all() and squares.unique(dim=0).shape[0] == 5


@pytest.mark.parametrize("unit, hidden", [(2, 118), (4, 30), (14, 3)])
def test_the_unit_changes_the_squares_and_hardly_the_share(unit, hidden):
    method = build("swin_mini", unit=unit)
    assert method.units == 28 // unit
    assert method.draw_mask(3).sum(1).tolist() == [hidden * (unit // 2) ** 2] * 3
    a, b = (method.draw_mask(3, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize("unit", [3, 8, 28, 56])
def test_a_unit_that_does_not_fit_names_those_that_do(unit):
    with pytest.raises(InputError, match=rf"unit {unit} does not fit: .* use one of \[2, 4, 14\]\."):
        build("swin_mini", unit=unit)


def test_a_backbone_without_patches_is_refused_in_one_sentence():
    with pytest.raises(InputError, match="ResNet has none; use swin_mini"):
        RECIPES["demo"].with_(backbone="resnet_mini").build()


# What the network sees

@every_backbone
def test_hidden_pixels_tell_nothing_and_visible_ones_do(name, images):
    method = build(name).eval()
    mask = method.draw_mask(4)
    hole = upsample_mask(mask, method.patch)
    before = method.reconstruct(images, mask)
    assert torch.equal(method.reconstruct(images + 100 * hole, mask), before)
    assert torch.equal(method.reconstruct(torch.where(hole > 0, torch.nan, images), mask), before)
    changed = (method.reconstruct(images + 3 * (1 - hole), mask) - before).abs() * hole
    assert (changed.amax((1, 2, 3)) > 0).all()


@every_backbone
def test_the_token_stands_in_every_hidden_cell_and_nowhere_else(name, images):
    method, seen = build(name).eval(), []
    first = method.backbone.layers if name == "swin_mini" else method.backbone.pos_drop
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    mask = method.draw_mask(4)
    method.reconstruct(images, mask), method.reconstruct(images, torch.zeros_like(mask))
    cells, plain = (x.flatten(1, -2) for x in seen)  # B x L x D
    offset = 0.0
    if name != "swin_mini":  # the class token came in; a plain ViT has also added positions
        cells, plain = cells[:, 1:], plain[:, 1:]
        offset = 0.0 if method.backbone.pos_embed is None else method.backbone.pos_embed[:, 1:]
    assert torch.equal(cells[mask == 0], plain[mask == 0])
    assert torch.allclose((cells - offset)[mask == 1], method.mask_token[0], atol=1e-6)


def test_without_a_mask_the_backbone_is_its_plain_self(images):
    method = build("swin_mini").eval()
    plain = method.backbone(images)
    method.reconstruct(images, method.draw_mask(4))
    assert torch.equal(method.backbone(images), plain)


def test_the_head_is_linear_and_its_outputs_are_ordered_channel_row_column():
    method, stride = build("swin_mini"), 4
    conv, shuffle = method.head
    assert conv.kernel_size == (1, 1) and sum(p.numel() for p in method.head.parameters()) == (64 + 1) * 3 * 16
    for c, row, column in ((0, 0, 1), (1, 3, 0), (2, 1, 2)):
        one = torch.zeros(1, 48, 7, 7)
        one[0, c * stride**2 + row * stride + column, 5, 6] = 1
        assert shuffle(one).nonzero().tolist() == [[0, c, 5 * stride + row, 6 * stride + column]]


# The real models

def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_the_real_models_have_the_published_sizes_and_shapes(real):
    swin, vit = real["swin"], real["vit"]
    assert parameters(swin.head) == 1024 * 3072 + 3072 and parameters(vit.head) == 768 * 768 + 768
    assert f"{parameters(swin.backbone) / 1e6:.2f} {parameters(swin) / 1e6:.2f}" == "86.73 89.87"
    # patch embedding, class token, twelve blocks (two norms, q and v biases, four layers, two scales), table, norm
    block = 4 * 768 + 2 * 768 + 3 * 768**2 + 768**2 + 768 + 2 * 768 * 3072 + 3072 + 768 + 2 * 768
    assert parameters(vit.backbone) == 768 * 768 + 768 + 768 + 12 * block + 732 * 12 + 2 * 768
    assert swin.mask_token.shape == (1, 1, 128) and vit.mask_token.shape == (1, 1, 768)
    for method, size, last in ((swin, 192, (1, 1024, 6, 6)), (vit, 224, (1, 768, 14, 14))):
        images = torch.zeros(1, 3, size, size, device="meta")
        assert last_map(method.backbone, images).shape == last
        assert method.reconstruct(images, method.draw_mask(1)).shape == images.shape


def test_swin_b_has_windows_of_six_that_divide_its_grids(real):
    swin = real["swin"].backbone
    blocks = [block for stage in swin.layers for block in stage.blocks]
    assert [len(stage.blocks) for stage in swin.layers] == [2, 2, 18, 2]
    assert {tuple(b.window_size) for b in blocks} == {(6, 6)}
    assert [b.input_resolution[0] for b in (s.blocks[0] for s in swin.layers)] == [48, 24, 12, 6]
    assert {b.attn.relative_position_bias_table.shape[0] for b in blocks} == {11**2}
    assert all(b.attn.qkv.bias is not None and isinstance(b.drop_path1, nn.Identity) for b in blocks)
    assert not hasattr(swin, "pos_embed") and isinstance(swin.patch_embed.norm, nn.LayerNorm)


def test_the_vit_is_the_official_one(real):
    vit = real["vit"].backbone
    assert vit.pos_embed is None and vit.rel_pos_bias.relative_position_bias_table.shape == (27**2 + 3, 12)
    assert all(b.attn.relative_position_bias_table is None for b in vit.blocks), "one table for all blocks"
    assert "k_bias" not in dict(vit.blocks[0].attn.named_parameters()) and vit.blocks[0].attn.q_bias.shape == (768,)
    assert vit.blocks[0].attn.qkv.bias is None and vit.blocks[0].init_values == 0.1 and vit.norm.eps == 1e-6
    drop = [getattr(b.drop_path2, "drop_prob", 0.0) for b in vit.blocks]
    assert drop == pytest.approx([0.1 * i / 11 for i in range(12)])


def test_the_vit_starts_with_beits_weights():
    method = RECIPES["demo"].with_(backbone="beit_mini", backbone_numbers={**SHARED, "embed_dim": 256}).build()
    vit, small = method.backbone, 0.02 * 0.5396  # a normal cut off at one deviation
    layers = [(vit.patch_embed.proj, 1), (vit.blocks[2].attn.qkv, 1), (vit.blocks[2].mlp.fc1, 1)]
    layers += [(layer, math.sqrt(2 * (i + 1))) for i, b in enumerate(vit.blocks) for layer in (b.attn.proj, b.mlp.fc2)]
    for layer, scale in layers:
        assert layer.weight.abs().max() * scale <= 0.02 + 1e-6
        assert layer.weight.std().item() * scale == pytest.approx(small, rel=0.02)
        assert layer.bias is None or layer.bias.abs().max() == 0
    for token in (vit.cls_token, method.mask_token):
        assert 0 < token.abs().max() <= 0.02
    assert vit.rel_pos_bias.relative_position_bias_table.abs().max() == 0
    assert all((b.gamma_1 == 0.1).all() and (b.gamma_2 == 0.1).all() for b in vit.blocks)


def test_the_token_of_a_swin_is_a_whole_normal():
    tokens = torch.cat([build("swin_mini").mask_token.flatten() for _ in range(40)])
    assert tokens.std().item() == pytest.approx(0.02, rel=0.1) and tokens.abs().max() > 0.03


# Weights to and from timm

@every_backbone
def test_trained_weights_are_plain_timms_and_come_back(name, images):
    method = build(name)
    optimizer = torch.optim.AdamW(method.parameters(), 1e-2)
    method([images])["loss"].backward()
    optimizer.step()
    base, numbers = MINI[name]
    token = {} if name == "swin_mini" else {"global_pool": "token"}
    plain = timm.create_model(base, img_size=28, num_classes=0, **{**numbers, **MINIS[name], **token}).eval()
    plain.load_state_dict(method.backbone.state_dict(), strict=True)
    assert torch.equal(plain(images), method.backbone.eval()(images))
    fresh = build(name).backbone.eval()
    fresh.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(fresh.forward_features(images), plain.forward_features(images))


def test_the_shared_table_copied_to_every_block_is_the_same_network(images):
    """Fine-tuning takes timm's own Beit, which has a table in each block."""
    shared = build("beit_mini").backbone.eval()
    nn.init.normal_(shared.rel_pos_bias.relative_position_bias_table)
    weights = shared.state_dict()
    table = weights.pop("rel_pos_bias.relative_position_bias_table")
    weights |= {f"blocks.{i}.attn.relative_position_bias_table": table for i in range(len(shared.blocks))}
    own = RECIPES["demo"].with_(backbone="beit_mini").build().backbone.eval()
    own.load_state_dict(weights, strict=True)
    assert torch.allclose(own(images), shared(images), atol=1e-5)


# Optimisation

def test_what_decays_is_what_decays_in_the_official_code():
    spared = {}
    for name in MINIS:
        method = build(name)
        decayed, free = method.param_groups(RECIPES["demo"])
        assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
        held = [id(p) for group in (decayed, free) for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in method.parameters())
        names = {id(p): n for n, p in method.named_parameters()}
        spared[name] = {names[id(p)] for p in free["params"] if p.ndim > 1}
        assert all(p.ndim > 1 for p in decayed["params"])
    assert spared == {"swin_mini": {"mask_token"}, "beit_mini": {"backbone.cls_token"},
                      "vit_mini": {"backbone.cls_token", "backbone.pos_embed"}}


@every_backbone
def test_bf16_autocast_is_finite_and_learns_for_every_backbone(name, images):
    method = build(name).train()
    optimizer = torch.optim.AdamW(method.parameters(), 5e-3)
    losses = []
    for _ in range(10):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = method([images * 0.3 + 1])["loss"]
        assert loss.dtype == torch.float32 and loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert all(p.grad.isfinite().all() for p in method.parameters())
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_the_rows_of_the_zoo():
    for r, epochs, lr, published in ((SWIN, 100, 8e-4, 82.9), (VIT, 800, 4e-4, 83.9)):
        assert (r.gpus, r.batch, r.accum, r.total_batch, r.epochs) == (8, 128, 2, 2048, epochs)
        assert (r.optimizer, r.lr, r.weight_decay, r.betas, r.clip) == ("adamw", lr, 0.05, (0.9, 0.999), 5.0)
        assert not r.numbers and list(r.published.values()) == [published], "the paper's numbers are the defaults"
        assert methods.get("simmim").accumulable, "every image hides equally much, so the mean of means is the mean"
    assert (SWIN.size, SWIN.precision, VIT.size, VIT.precision) == (192, "fp32", 224, "fp16")


def test_the_learning_rate_of_the_rows():
    rate = {epoch: SWIN.lr_at(epoch * 625, 625) for epoch in (0, 5, 10, 50)}
    cosine = {epoch: 4e-5 + (8e-4 - 4e-5) * (1 + math.cos(math.pi * epoch / 100)) / 2 for epoch in (10, 50)}
    assert rate == pytest.approx({0: 4e-6, 5: (4e-6 + 8e-4) / 2, **cosine}), "timm's cosine runs under the warm-up"
    assert SWIN.lr_at(100 * 625 - 1, 625) == pytest.approx(4e-5, rel=1e-3)
    steps = [VIT.lr_at(int(epoch * 625), 625) for epoch in (0, 10, 699.9, 700, 799)]
    assert steps == pytest.approx([2e-6, 4e-4, 4e-4, 4e-5, 4e-5])


def test_the_optimizer_of_a_row_takes_the_real_model(real):
    optimizer = optim.build(real["swin"].param_groups(SWIN), SWIN)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.05, 0.0]


def test_views_are_a_large_crop_and_a_flip(real):
    (view,) = real["swin"].views(192).views
    assert view.image_ops == (RandomResizedCrop(192, (0.67, 1.0), interpolation="bilinear"), HorizontalFlip(0.5))
    assert view.batch_ops == (Normalize(),)


def test_the_method_is_found_by_its_name():
    assert methods.get("simmim") is SimMIM and methods.recipes("simmim") is RECIPES
    assert unit_mask(torch.rand(1, 4), 0.6, 1).sum() == 3


@HALVES
@every_backbone
def test_ten_steps_in_sixteen_bits_are_finite(name, images, half):
    ten_steps(build(name), [images], half)


def untrained(name, **changes):
    torch.manual_seed(0)
    recipe = methods.recipes(name)["demo"].with_(**changes)
    method = recipe.build().eval()
    return SimpleNamespace(recipe=recipe, method=lambda: method)


def test_decibels_are_of_all_removed_numbers():
    from sslnb.evaluate.reconstruction import masked_psnr
    from sslnb.masking import upsample_mask
    from sslnb.views import Normalize

    run, images = untrained("simmim"), load("fashion_small")
    found, method = masked_psnr(run, images, limit=3, seed=2), run.method()
    rows = (0, len(images) // 3, 2 * len(images) // 3)
    truth = torch.stack([torch.from_numpy(np.array(images[i])).permute(2, 0, 1) / 255 for i in rows])
    x = Normalize().apply(truth)
    hole = upsample_mask(method.draw_mask(3, torch.Generator().manual_seed(2)), method.patch).bool().expand_as(x)
    mask = method.draw_mask(3, torch.Generator().manual_seed(2))
    painted = Normalize().undo(method.reconstruct(x, mask).detach())
    mean = torch.stack([t[:, ~h[0]].mean(1) for t, h in zip(truth, hole)])[:, :, None, None].expand_as(x)
    db = [-10 * torch.log10(((y - truth)[hole] ** 2).mean()).item() for y in (painted, mean)]
    assert (found.model, found.baseline, found.n) == (pytest.approx(db[0], abs=1e-3), pytest.approx(db[1], abs=1e-3), 3)


def test_what_is_borrowed_from_the_truth_has_no_decibels():
    from sslnb.evaluate.reconstruction import masked_psnr

    with pytest.raises(InputError, match="brightness and contrast of each patch are taken from the hidden truth"):
        masked_psnr(untrained("mae", norm_pix=True), load("fashion_small"), limit=2)
