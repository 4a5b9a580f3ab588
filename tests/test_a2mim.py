"""A2MIM: both losses by hand, what is painted and where the token enters, what the network may see, the zoo's rows."""

import cmath
import math

import pytest
import torch
from conftest import HALVES, ten_steps
from torch import nn

from sslnb import backbones, figures, methods, optim
from sslnb.errors import InputError
from sslnb.losses import focal_frequency
from sslnb.masking import upsample_mask
from sslnb.methods.a2mim import A2MIM, RECIPES
from sslnb.views import Normalize

R50, R50_LONG = RECIPES["r50_l3_sz224_init_8xb256_cos_ep100"], RECIPES["r50_l3_sz224_init_8xb256_cos_ep300"]
VIT = RECIPES["vit_base_l0_sz224_8xb128_accu2_step_ep800"]
DEMO = RECIPES["demo"]
SMALL_VIT = DEMO.with_(backbone="beit_mini", focal=False, fft_weight=0.1, fft_visible=0.0, token_lr=1.0,
                       backbone_numbers={"use_abs_pos_emb": True, "use_rel_pos_bias": True, "drop_path_rate": 0.1})


@pytest.fixture
def method():
    return DEMO.build()


@pytest.fixture(params=[DEMO, SMALL_VIT], ids=["resnet_mini", "beit_mini"])
def both(request):
    return request.param.build()


@pytest.fixture
def images():
    return torch.randn(5, 3, 28, 28) + torch.arange(5.0).view(-1, 1, 1, 1)  # every image a mean of its own


# The frequency loss

def fourier(image):
    """The orthonormal transform by its definition: image [H][W] -> [H][W] of complex numbers."""
    H, W = len(image), len(image[0])
    return [[sum(image[h][w] * cmath.exp(-2j * math.pi * (u * h / H + v * w / W)) for h in range(H) for w in range(W))
             / math.sqrt(H * W) for v in range(W)] for u in range(H)]


def frequency_by_hand(prediction, target):
    """The spectra first and their means afterwards, as the official code has it."""
    B, C, H, W = prediction.shape
    D = []
    for c in range(C):
        one, other = ([fourier(x[b][c]) for b in range(B)] for x in (prediction.tolist(), target.tolist()))
        D += [abs(sum(f[u][v] for f in one) / B - sum(f[u][v] for f in other) / B) for u in range(H) for v in range(W)]
    most = max(math.log(1 + d) for d in D)
    return sum(math.log(1 + d) / most * d**2 for d in D) / len(D)


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (3, 2, 5, 3), (4, 1, 2, 6)])
def test_the_frequency_loss_is_that_of_the_mean_spectra(shape):
    prediction, target = torch.randn(shape), 2 * torch.randn(shape) + 1
    assert focal_frequency(prediction, target, 100).item() == pytest.approx(frequency_by_hand(prediction, target),
                                                                            rel=1e-4)


def test_groups_of_images_have_spectra_of_their_own():
    prediction, target = torch.randn(8, 3, 4, 4), torch.randn(8, 3, 4, 4)
    groups = [frequency_by_hand(prediction[i:i + 4], target[i:i + 4]) for i in (0, 4)]
    assert focal_frequency(prediction, target, 4).item() == pytest.approx(sum(groups) / 2, rel=1e-4)
    single = [frequency_by_hand(prediction[i:i + 1], target[i:i + 1]) for i in range(8)]
    assert focal_frequency(prediction, target, 1).item() == pytest.approx(sum(single) / 8, rel=1e-4)
    assert focal_frequency(prediction, target, 3).isfinite()  # 3 + 3 + 2


def test_errors_that_cancel_within_a_group_are_not_seen():
    target, error = torch.randn(2, 3, 4, 4), torch.randn(1, 3, 4, 4)
    prediction = target + torch.cat([error, -error])
    assert focal_frequency(prediction, target, 2) < 1e-10 and focal_frequency(prediction, target, 1) > 0.1


def test_the_frequency_loss_of_equal_images_is_zero_with_a_finite_gradient():
    x = torch.randn(4, 3, 6, 6)
    for prediction in (x.clone().requires_grad_(), torch.zeros(4, 3, 6, 6, requires_grad=True)):
        loss = focal_frequency(prediction, prediction.detach(), 2)
        loss.backward()
        assert loss == 0 and prediction.grad.abs().max() == 0


def test_the_weight_is_a_constant_for_the_gradient_and_one_frequency_has_weight_one():
    """A single wave on one channel: D is the same at its two places and 0 elsewhere, so both weigh 1."""
    wave = torch.cos(2 * math.pi * torch.arange(8) / 8).view(1, 1, 1, 8).expand(1, 1, 8, 8)
    a = torch.tensor(3.0, requires_grad=True)
    loss = focal_frequency(a * wave, torch.zeros(1, 1, 8, 8), 1)
    loss.backward()
    assert loss.item() == pytest.approx(9 * 32 / 64, rel=1e-4)  # Parseval: the mean of its squares
    assert a.grad.item() == pytest.approx(2 * 3 * 32 / 64, rel=1e-4)


def test_the_frequency_loss_stays_in_full_precision_under_autocast():
    a, b = torch.randn(4, 3, 7, 7).bfloat16(), torch.randn(4, 3, 7, 7).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = focal_frequency(a, b, 2)
    assert inside.dtype == torch.float32 and inside == focal_frequency(a.float(), b.float(), 2)


# The spatial loss, and both together

@pytest.mark.parametrize("focal", [True, False])
def test_the_spatial_loss_is_a_mean_over_hidden_pixels(focal, images):
    method = DEMO.with_(focal=focal).build()
    out = method([images])
    hole = upsample_mask(out["mask"], method.patch)[:, 0].tolist()
    prediction, x = out["prediction"].tolist(), images.tolist()
    total = count = 0
    for b in range(5):
        for h in range(28):
            for w in range(28):
                if hole[b][h][w]:
                    for c in range(3):
                        d = abs(prediction[b][c][h][w] - x[b][c][h][w])
                        total += d * (2 / (1 + math.exp(-0.2 * d)) - 1) if focal else d
                        count += 1
    assert count == 5 * 30 * 16 * 3
    assert out["spatial"].item() == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("visible", [0.0, 1e-3, 0.3])
def test_the_frequency_term_mixes_truth_and_prediction_where_the_image_was_visible(visible, images):
    method = DEMO.with_(fft_visible=visible, fft_images=5).build()
    prediction, mask = torch.randn(5, 3, 28, 28), method.draw_mask(5)
    mixed = prediction.clone()
    for b in range(5):
        for i in range(28):
            for j in range(28):
                weight = 1.0 if mask[b, i // 2 * 14 + j // 2] else visible
                p, x = prediction[b, :, i, j], images[b, :, i, j]
                mixed[b, :, i, j] = weight * p + (1 - weight) * (p + x) / 2
    _, found = method.losses(prediction, images, mask)
    assert found.item() == pytest.approx(focal_frequency(mixed, images, 5).item(), rel=1e-4)


def test_the_loss_is_their_sum(images):
    torch.manual_seed(3)
    with_it = DEMO.with_(fft_weight=0.7).build()([images])
    torch.manual_seed(3)
    without = DEMO.with_(fft_weight=0.0).build()([images])
    assert with_it["loss"].item() == pytest.approx((with_it["spatial"] + 0.7 * with_it["frequency"]).item(), rel=1e-6)
    assert without["loss"] == with_it["spatial"]


def test_only_hidden_pixels_are_asked_for_and_visible_ones_hardly(images):
    def gradient(**numbers):
        method = DEMO.with_(**numbers).build()
        prediction, mask = torch.randn(5, 3, 28, 28, requires_grad=True), method.draw_mask(5)
        spatial, frequency = method.losses(prediction, images, mask)
        (spatial + frequency).backward()
        hole = upsample_mask(mask, method.patch).expand_as(prediction) > 0
        return prediction.grad[hole].abs(), prediction.grad[~hole].abs()
    hidden, visible = gradient(fft_visible=0.0)
    assert (hidden > 0).all() and visible.max() == 0
    hidden, visible = gradient(fft_visible=1e-3)
    assert 0 < visible.mean() < 1e-2 * hidden.mean()


# Masks and paint

def test_thirty_of_forty_nine_units_go_as_one(both):
    mask = both.draw_mask(6)
    cells = both.unit // both.patch
    blocks = mask.view(6, 7, cells, 7, cells).mean((2, 4))
    assert ((blocks == 0) | (blocks == 1)).all() and blocks.sum((1, 2)).tolist() == [30] * 6
    again = [both.draw_mask(4, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*again)


def test_holes_have_the_mean_colour_or_nothing(both, images):
    mask = both.draw_mask(5)
    hole = upsample_mask(mask, both.patch).expand_as(images) > 0
    seen = both.seen(images, mask)
    assert torch.equal(seen[~hole], images[~hole])
    assert torch.allclose(seen[hole], images.mean((2, 3), keepdim=True).expand_as(images)[hole])
    both.fill = "zero"
    assert (both.seen(images, mask)[hole] == 0).all() and torch.equal(both.seen(images, mask)[~hole], images[~hole])


def test_the_network_gets_the_painted_image(both, images):
    got = []
    both.backbone.register_forward_pre_hook(lambda module, inputs: got.append(inputs[0]))
    first = both.backbone.patch_embed if hasattr(both.backbone, "patch_embed") else both.backbone.conv1
    first.register_forward_pre_hook(lambda module, inputs: got.append(inputs[0]))
    mask = both.draw_mask(5)
    both.reconstruct(images, mask)
    assert torch.equal(got[0], both.seen(images, mask))


@pytest.mark.parametrize("training", [True, False])
def test_hidden_pixels_tell_their_mean_and_nothing_else(both, images, training):
    for drop in both.modules():  # random numbers aside
        if hasattr(drop, "drop_prob"):
            drop.drop_prob = 0.0
    both.train(training)
    mask = both.draw_mask(5)
    hole = upsample_mask(mask, both.patch)
    noise = torch.randn_like(images) * hole
    noise = (noise - noise.sum((2, 3), keepdim=True) / hole.sum((2, 3), keepdim=True)) * hole
    before = both.reconstruct(images, mask)
    assert torch.allclose(both.reconstruct(images + noise, mask), before, atol=1e-4)
    assert not torch.allclose(both.reconstruct(images + hole, mask), before, atol=1e-2), "another mean is seen"
    assert not torch.allclose(both.reconstruct(images + (1 - hole) * torch.randn_like(images), mask), before, atol=1e-2)
    both.fill = "zero"
    assert torch.allclose(both.reconstruct(images + hole, mask), both.reconstruct(images, mask), atol=1e-4)


# The token

def test_the_token_joins_what_was_hidden_and_nothing_else(both):
    side = 28 // both.patch
    mask = both.draw_mask(2)
    f = torch.randn(2, 32, side, side) if both.before else torch.randn(2, side**2, 64)
    with torch.no_grad():
        both.mask_token.normal_()
        if both.mask_gamma is not None:
            both.mask_gamma.normal_()
    out = both.add_token(f, mask)
    for b in range(2):
        for i in range(side**2):
            at = (b, slice(None), i // side, i % side) if both.before else (b, i)
            expected = f[at]
            if mask[b, i]:
                gamma = 1.0 if both.mask_gamma is None else both.mask_gamma.flatten()
                expected = gamma * f[at] + both.mask_token.flatten()
            assert torch.allclose(out[at], expected, atol=1e-6)


@pytest.mark.parametrize("recipe, part, shape", [
    (DEMO, "layer2", (1, 32, 14, 14)), (DEMO.with_(mask_layer=0), "layer1", (1, 32, 14, 14)),
    (DEMO.with_(backbone="resnet18", size=32), "layer4", (1, 256, 8, 8)), (SMALL_VIT, "patch_embed", (1, 49, 64)),
    (DEMO.with_(backbone="vit_mini"), "patch_embed", (1, 49, 64))], ids=str)
def test_where_the_token_enters(recipe, part, shape):
    method = recipe.build().eval()
    entered = []
    method.add_token = lambda f, mask: entered.append((f, mask.shape)) or f
    images = torch.randn(1, 3, recipe.size, recipe.size)
    out = method.reconstruct(images, method.draw_mask(1))
    assert method.part == part and entered[0][0].shape == shape and out.shape == images.shape
    assert entered[0][1] == (1, (recipe.size // method.patch) ** 2)
    given, module = [], getattr(method.backbone, part)
    module.register_forward_hook(lambda module, inputs, output: given.append(inputs[0] if method.before else output))
    method.reconstruct(images, torch.zeros(1, entered[0][1][1]))
    assert given[0].shape == shape


def test_gamma_starts_almost_at_zero_for_a_resnet_and_is_one_otherwise():
    assert (DEMO.build().mask_gamma == 1e-6).all() and DEMO.with_(gamma_init=0.0).build().mask_gamma is None
    assert SMALL_VIT.build().mask_gamma is None
    tokens = torch.cat([R50.build().mask_token.flatten() for _ in range(3)])
    assert tokens.std().item() == pytest.approx(0.02, rel=0.1)


def test_without_a_mask_the_backbone_is_left_alone(both, images):
    plain = backbones.last_map(both.backbone.eval(), images)
    both.reconstruct(images, both.draw_mask(5))
    assert torch.equal(backbones.last_map(both.backbone, images), plain)


# Shapes, pixels and weights

def test_the_head_writes_every_cell_into_its_place(both):
    """PixelShuffle: value c·s² + i·s + j of a cell is channel c of its pixel (i, j)."""
    s, D = 4, both.backbone.num_features
    maps = torch.zeros(1, D, 7, 7)
    maps[0, 0, 2, 5] = 1.0  # one cell has one feature
    with torch.no_grad():
        both.head[0].weight.copy_(torch.arange(3.0 * s * s).view(-1, 1, 1, 1).expand(-1, D, 1, 1))
    out = both.head(maps)
    for c in range(3):
        for i in range(s):
            for j in range(s):
                assert out[0, c, 2 * s + i, 5 * s + j].item() == pytest.approx(c * s * s + i * s + j, rel=1e-5)
    assert (out != 0).sum() == 3 * s * s - 1


@pytest.mark.parametrize("recipe, counts, token, side", [
    (R50, {"backbone": 23_508_032, "head": 2048 * 3072 + 3072}, (1, 1024, 1, 1), 14),
    (R50_LONG, {"backbone": 23_508_032, "head": 2048 * 3072 + 3072}, (1, 1024, 1, 1), 14),
    (VIT, {"backbone": 85_913_280, "head": 590_592}, (1, 1, 768), 14)], ids=lambda x: getattr(x, "name", ""))
def test_the_imagenet_rows_are_the_real_models(recipe, counts, token, side):
    method = recipe.build()
    assert {k: sum(p.numel() for p in m.parameters()) for k, m in method.named_children()} == counts
    mask = method.draw_mask(3)
    assert method.patch == 16 and mask.shape == (3, side**2) and mask.sum(1).tolist() == [30 * 4] * 3
    assert method.mask_token.shape == token
    entered = []
    method.add_token = lambda f, mask: entered.append(f.shape) or f
    with torch.no_grad():
        assert method.eval().reconstruct(torch.randn(1, 3, 224, 224), mask[:1]).shape == (1, 3, 224, 224)
    assert entered == [(1, 1024, 14, 14) if method.before else (1, 196, 768)]


def test_the_zoos_variant_with_a_token_at_the_first_stage_has_cells_of_four_pixels():
    method = R50.with_(mask_layer=0, gamma_init=0.0).build()
    assert method.patch == 4 and method.mask_token.shape == (1, 64, 1, 1) and method.draw_mask(1).sum() == 30 * 64


def test_the_vit_has_positions_of_both_kinds_and_small_layers():
    vit = VIT.build().backbone
    assert vit.pos_embed.shape == (1, 197, 768) and len(vit.blocks) == 12
    assert all(block.attn.relative_position_bias_table.shape == (732, 12) for block in vit.blocks)
    assert (vit.blocks[0].gamma_1 == 0.1).all() and vit.blocks[11].drop_path1.drop_prob == pytest.approx(0.1)
    assert not hasattr(vit, "fc_norm") or isinstance(vit.fc_norm, nn.Identity)


@pytest.mark.parametrize("recipe", [DEMO, SMALL_VIT], ids=["resnet_mini", "beit_mini"])
def test_weights_go_to_plain_timm_and_back(recipe):
    import timm

    method = recipe.build().eval()
    base, arguments = backbones.MINI[recipe.backbone]
    size = {"img_size": 28, "global_pool": "token"} if recipe is SMALL_VIT else {}
    plain = timm.create_model(base, num_classes=0, **arguments, **size, **recipe.backbone_numbers)
    if recipe is DEMO:
        plain.maxpool = nn.Identity()
    plain.load_state_dict(method.backbone.state_dict())
    images = torch.randn(2, 3, 28, 28)
    assert torch.equal(plain.eval()(images), method.backbone(images))
    other = recipe.build().eval()
    other.backbone.load_state_dict(plain.state_dict())
    assert torch.equal(other.backbone(images), plain(images))
    assert not [key for key in method.state_dict() if key.startswith("backbone") and "mask" in key]


# Optimisation

@pytest.mark.parametrize("recipe, slow", [(DEMO, 0.1), (SMALL_VIT, 1.0)], ids=["resnet_mini", "beit_mini"])
def test_what_is_decayed_and_what_is_slow(recipe, slow):
    method = recipe.with_(weight_decay=0.05).build()
    names = {id(p): name for name, p in method.named_parameters()}
    groups = method.param_groups(recipe.with_(weight_decay=0.05))
    held = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(held) == sorted(names.values())
    decayed = {names[id(p)] for p in groups[0]["params"]}
    assert [g["weight_decay"] for g in groups] == [0.05, 0.0, 0.0]
    assert all(dict(method.named_parameters())[name].ndim > 1 for name in decayed)
    assert not [n for n in decayed if any(part in n for part in ("mask_", "pos_embed", "cls_token", "bias", "norm"))]
    assert "head.0.weight" in decayed
    optimizer = optim.build(groups, recipe)
    optim.set_lr(optimizer, 0.5)
    tokens = {names[id(p)] for p in groups[2]["params"]}
    assert tokens == ({"mask_token", "mask_gamma"} if recipe is DEMO else {"mask_token"})
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.5, pytest.approx(0.5 * slow)]


def test_every_part_learns(both, images):
    both([images])["loss"].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in both.named_parameters()
               if not n.endswith(("relative_position_bias_table", "k_bias"))), "the tables start at a plateau"


@HALVES
@pytest.mark.parametrize("recipe", [DEMO, SMALL_VIT], ids=["resnet_mini", "beit_mini"])
def test_ten_steps_in_sixteen_bits_are_finite(recipe, images, half):
    ten_steps(recipe.build(), [images], half, recipe)


@pytest.mark.parametrize("recipe", [DEMO, SMALL_VIT], ids=["resnet_mini", "beit_mini"])
def test_the_loss_falls_on_eight_images(recipe):
    method, x = recipe.build(), torch.rand(8, 3, 28, 28).mean((2, 3), keepdim=True) + 0.1 * torch.randn(8, 3, 28, 28)
    optimizer = torch.optim.AdamW(method.parameters(), 2e-3)
    losses = []
    for _ in range(30):
        torch.manual_seed(0)
        loss = method([x])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# Recipes

def test_the_rows_have_the_numbers_of_the_official_files():
    for row, epochs in ((R50, 100), (R50_LONG, 300)):
        method = row.build()
        assert (row.total_batch, row.epochs, row.lr, row.min_lr, row.warmup_epochs) == (2048, epochs, 1.2e-3, 1e-5, 10)
        assert (row.schedule, row.weight_decay, row.clip, row.betas) == ("cosine", 0.05, 0, (0.9, 0.999))
        assert method.sync_bn and method.focal and method.token_lr == 0.1 and method.crop == (0.8, 1.0)
        assert (method.fft_weight, method.fft_visible, method.fft_images) == (0.5, 1e-3, 256)
    assert R50.published == {"fine-tune, RSB A3": 78.8}
    assert R50_LONG.published == {"fine-tune, RSB A3": 78.9, "fine-tune, RSB A2": 80.4}
    method = VIT.build()
    assert (VIT.total_batch, VIT.epochs, VIT.lr, VIT.warmup_epochs, VIT.clip) == (2048, 800, 4e-4, 10, 5.0)
    assert not method.focal and (method.fft_weight, method.fft_visible, method.fft_images) == (0.1, 0.0, 128)
    assert method.crop == (0.67, 1.0) and VIT.published == {"fine-tune, BEiT (SimMIM)": 84.3}
    assert [VIT.lr_at(e * 625, 625) for e in (0, 10, 699, 700)] == pytest.approx([2e-6, 4e-4, 4e-4, 4e-5])
    assert R50.lr_at(99 * 625, 625) == pytest.approx(1e-5, rel=0.1)


def test_another_number_of_gpus_has_the_same_groups():
    assert R50.on(4).build().fft_images == 256 and VIT.on(2).accum == 8
    assert A2MIM.accumulable


@pytest.mark.parametrize("changes, words", [
    ({"unit": 3}, r"unit 3 does not fit: .* use one of \[2, 4, 14\]"),
    ({"unit": 28}, "unit 28 does not fit"),
    ({"fill": "men"}, "Unknown fill 'men': did you mean 'mean'"),
    ({"mask_layer": 2}, "mask_layer 2 is impossible: .*from 0 to 1"),
    ({"backbone": "vit_mini", "mask_layer": 1}, "mask_layer 1 is impossible"),
    ({"backbone": "swin_mini"}, "a2mim needs a ResNet or a vision transformer"),
    ({"mask_ratio": 1.0}, "mask_ratio 1.0 is impossible"),
])
def test_what_cannot_be_is_one_sentence_with_a_remedy(changes, words):
    with pytest.raises(InputError, match=words) as caught:
        DEMO.with_(**changes).build()
    assert "\n" not in str(caught.value)


def test_it_is_in_the_table_of_methods():
    assert methods.get("a2mim") is A2MIM


# Figures

def test_the_figure_of_spectra_shows_what_is_there():
    """A wave of seven turns, and the same wave twice as high: the curve says 2 in its ring."""
    wave = torch.cos(2 * math.pi * 7 * torch.arange(28) / 28).expand(2, 3, 28, 28)
    torch.manual_seed(0)
    noise = 1e-3 * torch.randn(2, 3, 28, 28)
    fig = figures.spectra({"wave": wave + noise, "twice": 2 * wave + noise}, Normalize())
    curve = fig.axes[-1]
    assert [line.get_label() for line in curve.lines] == ["wave", "twice"]
    one, two = (torch.as_tensor(line.get_ydata()) for line in curve.lines)
    assert one.tolist() == [1] * 13 and two[6].item() == pytest.approx(2, rel=1e-2)  # 7 of 28 px: 0.25 waves per pixel
    assert (two[[0, 1, 3, 9, 12]] - 1).abs().max() < 1e-3
    shown = fig.axes[2].images[0].get_array()  # below the first picture
    assert {(14, 7), (14, 21)} == {divmod(int(i), 28) for i in shown.reshape(-1).argsort()[-2:]}


def test_the_film_shows_the_holes_as_they_are_painted(tmp_path, tiny):
    from sslnb import figures, pretrain

    run = pretrain(tiny("a2mim", data="few_digits", size=28, epochs=1), out=tmp_path / "run")
    snap = run.snapshots()[0][1]
    method = run.method()
    assert torch.equal(snap["seen"], method.seen(snap["images"], snap["mask"]))
    fig = figures.film(run, count=2)
    row = next(ax for ax in fig.axes if ax.get_ylabel() == "encoder sees")
    shown = torch.tensor(row.images[0].get_array()).permute(2, 0, 1).float()
    wanted = method.views(28).normalize.undo(snap["seen"][:1])[0]
    assert torch.allclose(shown, wanted, atol=1e-5)
