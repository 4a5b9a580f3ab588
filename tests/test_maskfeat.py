"""MaskFeat: HOG by hand and by others' code, glyphs along the edges, the loss by loops, what the network may see."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.ndimage
import skimage.feature
import torch
from conftest import HALVES, ten_steps

from sslnb import backbones, load, methods, pretrain
from sslnb.backbones import cells
from sslnb.errors import InputError
from sslnb.evaluate.reconstruction import masked_error, masked_psnr
from sslnb.hog import BINS, from_patches, gaussian, glyphs, gradients, hog, strokes, to_patches
from sslnb.masking import upsample_mask
from sslnb.methods.maskfeat import RECIPES, MaskFeat
from sslnb.views import HorizontalFlip, Normalize, RandomResizedCrop

ZOO = RECIPES["vit_base_hog_108_sz224_8xb128_accu2_cos_fp16_ep300"]
BACKBONES = ["vit_mini", "beit_mini"]


@pytest.fixture
def method():
    return RECIPES["demo"].build()


@pytest.fixture
def images():
    return torch.randn(6, 3, 28, 28)


# HOG


def edge(degrees, size=24):
    """A picture, dark on one side, whose edges run at this angle: 0 is horizontal, 90 vertical, anticlockwise."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    a = math.radians(degrees)
    across = x * math.sin(a) + y * math.cos(a)  # 0 along (cos a, -sin a); y grows downwards
    return across[None, None].float().expand(1, 3, -1, -1)


def loops(images, cell, window=0):
    """The definition, pixel by pixel, on SciPy's derivatives."""
    b, c, height, width = images.shape
    out = np.zeros((b, c, BINS, height // cell, width // cell))
    for i in range(b):
        for channel in range(c):
            x = images[i, channel].double().numpy()
            gx, gy = (-scipy.ndimage.sobel(x, axis, mode="mirror") for axis in (1, 0))
            for row in range(height):
                for column in range(width):
                    value = math.hypot(gx[row, column], gy[row, column])
                    if window:
                        value *= weight(row % window, window) * weight(column % window, window)
                    k = math.floor(9 * math.atan2(gx[row, column], gy[row, column]) / math.pi) % 9
                    out[i, channel, k, row // cell, column // cell] += value
    return out / np.maximum(np.sqrt((out**2).sum(2, keepdims=True)), 1e-12)


def weight(place, window):
    line = [math.exp(-0.5 * ((n - (window - 1) / 2) / (window / 2)) ** 2) for n in range(window)]
    return line[place] / sum(line)


@pytest.mark.parametrize("window", [0, 16, 4])
def test_hog_is_its_definition_pixel_by_pixel(window):
    images = torch.rand(2, 3, 16, 32)
    assert hog(images, 4, window).numpy() == pytest.approx(loops(images, 4, window), abs=1e-5)


def test_hog_is_that_of_scikit_image_where_the_settings_can_be_made_equal():
    """Theirs has plain differences, which Sobel's are (times four) for a sum of a row and a column; bins of the
    direction from dark to bright, which is that of the edge in the transposed picture; and no border."""
    rows, columns = torch.rand(40, 1) * 100, torch.rand(1, 56) * 100
    image = rows + columns
    theirs = skimage.feature.hog(image.T.numpy(), orientations=9, pixels_per_cell=(8, 8), cells_per_block=(1, 1),
                                 block_norm="L2", feature_vector=False)[:, :, 0, 0]  # 7 x 5 x 9
    ours = hog(image[None, None], 8)[0, 0]
    inside = slice(1, -1)
    expected = torch.from_numpy(theirs).permute(2, 1, 0)[:, inside, inside].float()
    assert torch.allclose(ours[:, inside, inside], expected, atol=1e-5) and expected.std() > 0.1


@pytest.mark.parametrize("degrees, k", [(90, 4), (1, 0), (10, 0), (30, 1), (50, 2), (70, 3), (110, 5), (130, 6),
                                        (150, 7), (170, 8), (179, 8)])
def test_an_edge_falls_in_the_bin_of_its_angle(degrees, k):
    inner = hog(edge(degrees), 8)[0, :, :, 1, 1]
    assert inner.argmax(1).tolist() == [k] * 3 and inner[:, k] == pytest.approx(1)
    assert hog(-edge(degrees), 8)[0, 0, :, 1, 1].argmax() == k, "a line has no sense"


def test_one_dot_by_hand():
    """The eight neighbours of a dot of 1: 2 at the sides, √2 at the corners, whose edges run at 45 and 135 degrees."""
    image = torch.zeros(1, 1, 8, 8)
    image[..., 3, 4] = 1
    found = hog(image, 8, local_norm=False)[0, 0, :, 0, 0]
    assert found.tolist() == pytest.approx([4, 0, 2 * 2**0.5, 0, 4, 0, 2 * 2**0.5, 0, 0], abs=1e-5)
    assert hog(image, 8)[0, 0, :, 0, 0].norm().item() == pytest.approx(1)


def test_brightness_and_contrast_of_a_colour_change_nothing():
    images = torch.rand(4, 3, 224, 224)
    assert torch.allclose(hog(Normalize().apply(images)), hog(images), atol=3e-7)
    assert (hog(0.1 * images + 5) - hog(images)).abs().mean() < 1e-4  # rounded, a pixel may change its bin
    assert hog(images).std() > 0.1
    for window in (0, 16):  # whose weights sum to 1, so that faint edges become fainter yet
        assert (hog(1e-5 * images, 8, window) - hog(images, 8, window)).abs().mean() < 1e-4
    assert not torch.allclose(hog(0.5 * images, local_norm=False), hog(images, local_norm=False), rtol=0.1)


def test_a_cell_has_length_one_or_nothing_in_it():
    images = torch.zeros(1, 3, 16, 16)
    images[..., :8] = torch.rand(1, 3, 16, 8)
    length = hog(images, 4).norm(dim=2)
    assert length[..., :2] == pytest.approx(1) and (length[..., 3:] == 0).all()


def test_the_window_weighs_like_the_official_one():
    tile = gaussian(16)
    assert tile.sum().item() == pytest.approx(1) and (tile[0] - tile[15]).abs().max() < 1e-7
    assert (tile[0, 0] / tile[7, 7]).item() == pytest.approx(math.exp(-0.5 * (7.5**2 - 0.5**2) * 2 / 64), rel=1e-5)
    images = torch.rand(1, 3, 32, 32)
    assert not torch.allclose(hog(images, 8, 16), hog(images, 8), atol=0.01)


def test_hog_is_in_full_precision_under_autocast_and_has_no_gradient():
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = hog(images)
        assert inside.dtype == torch.float32 and torch.equal(inside, hog(images.detach()))
        half = images.detach().bfloat16()
        assert torch.equal(hog(half), hog(half.float())), "never computed in what autocast left"
    assert not inside.requires_grad
    gx, gy = gradients(images)
    assert gx.shape == gy.shape == images.shape


@pytest.mark.parametrize("wrong", [{"cell": 5}, {"gaussian_window": 10}])
def test_what_does_not_tile_the_image_is_refused(wrong):
    with pytest.raises(InputError, match="does not tile an image of 28 x 28"):
        hog(torch.rand(1, 3, 28, 28), **{"cell": 2, **wrong})


@pytest.mark.gpu
def test_hog_is_the_same_on_a_gpu():
    images = torch.rand(8, 3, 224, 224)
    with torch.autocast("cuda", dtype=torch.float16):
        there = hog(images.cuda(), 8, 16).cpu()
    assert torch.allclose(there, hog(images, 8, 16), atol=1e-5)


def test_the_order_in_a_patch_is_colour_bin_row_column():
    h = hog(torch.rand(2, 3, 56, 56), 4)  # 14 x 14 cells, so 7 x 7 patches
    patches = to_patches(h)
    for colour, k, row, column in ((0, 0, 0, 1), (1, 4, 1, 0), (2, 8, 1, 1)):
        place = ((colour * 9 + k) * 2 + row) * 2 + column
        assert patches[1, 7 * 3 + 5, place] == h[1, colour, k, 2 * 3 + row, 2 * 5 + column]
    assert patches.shape == (2, 49, 108) and torch.equal(from_patches(patches), h)


# Glyphs


def ink(degrees, size=15):
    """Where the middle cell of a picture with edges at this angle is drawn, as (x, y) from its centre, and how much."""
    drawn = 1 - glyphs(hog(edge(degrees), 8), size)[0, 0, size:2 * size, size:2 * size]
    y, x = torch.meshgrid(*(torch.arange(size) - size // 2,) * 2, indexing="ij")
    return x.float(), y.float(), drawn


def test_a_vertical_edge_is_drawn_vertical():
    x, _, drawn = ink(90)
    assert drawn[:, 7].min() > 0.4 and drawn[1:-1, 7].min() == pytest.approx(1) and drawn[x.abs() > 1].max() == 0


@pytest.mark.parametrize("degrees", range(10, 180, 20))
def test_every_edge_is_drawn_along_itself(degrees):
    """The main axis of the ink is the direction of the edge: y downwards, so (cos, -sin)."""
    x, y, drawn = ink(degrees)
    angle = 0.5 * torch.atan2(-2 * (drawn * x * y).sum(), (drawn * (x**2 - y**2)).sum())
    off = (math.degrees(angle) - degrees + 90) % 180 - 90
    assert abs(off) < 4


def test_the_nine_strokes_are_20_degrees_apart_and_equally_long():
    mass = strokes(16).sum((1, 2))
    assert mass.shape == (9,) and mass.max() / mass.min() < 1.35
    assert torch.allclose(strokes(16).flip(0).flip(2), strokes(16), atol=1e-5), "170 mirrors 10, and so on"


def test_nothing_is_white_and_colours_are_averaged():
    h = torch.zeros(1, 3, 9, 2, 2)
    assert (glyphs(h, 8) == 1).all() and glyphs(h, 8).shape == (1, 3, 16, 16)
    h[0, 0, 4, 0, 0] = 0.9
    assert glyphs(h, 15).min().item() == pytest.approx(0.7) and (glyphs(-h, 8) == 1).all()


# The loss


def test_the_loss_is_the_mean_over_all_hidden_patches_of_the_batch(method, images):
    torch.manual_seed(3)
    out = method(images[None])
    target = to_patches(torch.from_numpy(loops(images, 2)).float())
    total = count = 0.0
    for b in range(6):
        for i in range(49):
            if out["mask"][b, i]:
                squares = [(p - t) ** 2 for p, t in zip(out["prediction"][b, i].tolist(), target[b, i].tolist())]
                total, count = total + sum(squares) / 108, count + 1
    assert out["loss"].item() == pytest.approx(total / count, rel=1e-4)


def test_images_with_more_holes_weigh_more(method):
    """Not the mean of the images' means."""
    mask = torch.zeros(2, 49)
    mask[0, :3] = mask[1, :1] = 1
    prediction, target = torch.zeros(2, 49, 108), torch.zeros(2, 49, 108)
    prediction[0] = 2.0
    assert method.loss(prediction, target, mask).item() == pytest.approx(4 * 3 / 4)
    prediction[:, 5:] = 100.0  # visible
    assert method.loss(prediction, target, mask).item() == pytest.approx(4 * 3 / 4)


# The masks


def test_blocks_take_40_percent_and_may_give_up():
    with torch.device("meta"):
        method = ZOO.build()
    mask = method.draw_mask(500, torch.Generator().manual_seed(0))
    counts = mask.sum(1)
    assert mask.shape == (500, 196) and counts.max() == 78 and 68 <= counts.min() < 78
    assert counts.mean().item() == pytest.approx(77.5, abs=0.4)
    sides = mask.view(-1, 14, 14)
    assert (sides[:, 1:] * sides[:, :-1]).sum() / mask.sum() > 0.65, "neighbours are hidden together"
    assert torch.equal(mask, method.draw_mask(500, torch.Generator().manual_seed(0)))


def test_small_grids_take_20_of_49(method):
    counts = method.draw_mask(500).sum(1)
    assert counts.max() == 20 and counts.mean() > 18.5


@pytest.mark.parametrize("row, grid, count, least", [(ZOO, 14, 78, 15), (RECIPES["demo"], 7, 20, 4)])
def test_a_block_hides_a_fifth_of_what_is_to_be_hidden_at_least(row, grid, count, least, monkeypatch):
    asked = []
    monkeypatch.setattr("sslnb.methods.maskfeat.block_mask", lambda *args, **_: asked.append(args))
    with torch.device("meta"):
        row.build().draw_mask(3)
    assert asked == [(3, grid, count, least)]


# What the network sees


@pytest.mark.parametrize("backbone", BACKBONES)
def test_hidden_pixels_do_not_reach_the_network_and_visible_ones_do(backbone, images):
    method = RECIPES["demo"].with_(backbone=backbone).build().eval()
    mask = method.draw_mask(6)
    other, hole = torch.randn_like(images), upsample_mask(mask, 4)
    torch.manual_seed(0)
    before = method.reconstruct(images, mask)
    assert torch.equal(before, method.reconstruct(images * (1 - hole) + other * hole, mask))
    assert (before - method.reconstruct(images * hole + other * (1 - hole), mask)).abs().amax((1, 2)).min() > 1e-4
    assert before.shape == (6, 49, 108)


def test_the_token_comes_before_class_token_and_positions(method, images):
    """By hand: patches embedded, hidden ones replaced, class token, positions, blocks, norm, head."""
    vit, mask = method.eval().backbone, method.draw_mask(6)
    torch.nn.init.normal_(method.mask_token)
    x = torch.where(mask[:, :, None] > 0, method.mask_token, vit.patch_embed(images))
    x = torch.cat([vit.cls_token.expand(6, -1, -1), x], 1) + vit.pos_embed
    for block in vit.blocks:
        x = block(x)
    assert torch.allclose(method.reconstruct(images, mask), method.head(vit.norm(x)[:, 1:]), atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_weights_go_to_and_from_plain_timm(backbone, images):
    recipe = RECIPES["demo"].with_(backbone=backbone)
    method, plain = recipe.build().eval(), backbones.build(backbone, 28).eval()
    plain.load_state_dict(method.backbone.state_dict())
    assert torch.equal(cells(plain, images), cells(method.backbone, images))
    fresh = backbones.build(backbone, 28).eval()
    method.backbone.load_state_dict(fresh.state_dict())
    assert torch.equal(fresh(images), method.backbone(images))
    assert torch.allclose(method.reconstruct(images, torch.zeros(6, 49)), method.head(cells(fresh, images)), atol=1e-6)


@HALVES
@pytest.mark.parametrize("backbone", BACKBONES)
def test_ten_steps_in_sixteen_bits_are_finite(backbone, images, half):
    recipe = RECIPES["demo"].with_(backbone=backbone)
    ten_steps(recipe.build(), [images], half, recipe)


def test_a_backbone_without_patches_is_refused():
    for name in ("resnet_mini", "swin_mini"):
        with pytest.raises(InputError, match="maskfeat needs a vision transformer"):
            RECIPES["demo"].with_(backbone=name).build()


def test_a_patch_that_has_no_cells_is_refused():
    with pytest.raises(InputError, match="divides a patch into 2 x 2 cells, and 7 px cannot"):
        RECIPES["demo"].with_(backbone_numbers={"patch_size": 7}).build()


def test_the_window_must_fit_the_image():
    with pytest.raises(InputError, match="gaussian_window 16 does not tile"):
        RECIPES["demo"].with_(gaussian_window=16).build()([torch.randn(2, 3, 28, 28)])


# At full size


def test_the_zoos_row_is_the_real_model():
    with torch.device("meta"):
        method = ZOO.build()
    assert {k: sum(p.numel() for p in m.parameters()) for k, m in method.named_children()} == {
        "backbone": 85_798_656, "head": 83_052}
    assert method.mask_token.shape == (1, 1, 768)
    assert method.backbone.blocks[0].attn.qkv.bias is not None and method.backbone.pos_embed.requires_grad
    assert (method.gaussian_window, method.local_norm, method.mask_ratio, method.patch) == (16, True, 0.4, 16)


@pytest.mark.slow
def test_the_shapes_at_full_size():
    method, images = ZOO.build(), torch.rand(1, 3, 224, 224)
    out = method([images])
    out["loss"].backward()
    assert out["prediction"].shape == method.target(images).shape == (1, 196, 108) and out["loss"].isfinite()
    assert method.to_image(method.target(images), images).shape == (1, 3, 336, 336)


def test_the_row_is_the_official_recipe_at_2048_images():
    r = ZOO
    assert (r.total_batch, r.epochs, r.optimizer, r.betas, r.weight_decay) == (2048, 300, "adamw", (0.9, 0.999), 0.05)
    assert r.clip == 0.02 and r.published == {"fine-tune, BEiT (MaskFeat)": 83.5}
    steps = r.steps_per_epoch(1_281_167)
    assert r.lr == pytest.approx(2e-4 * 2048 / 256) and steps == 625
    assert r.lr_at(0, steps) == pytest.approx(8e-6) and r.lr_at(30 * steps, steps) == pytest.approx(1.6e-3)
    assert r.lr_at(300 * steps - 1, steps) == pytest.approx(8e-6, rel=0.01)


def test_views_and_weights_are_the_official_ones(method):
    (view,) = RECIPES["demo"].with_(crop=(0.5, 1.0)).build().views(224).views
    assert view.image_ops == (RandomResizedCrop(224, (0.5, 1.0), interpolation="bicubic"), HorizontalFlip(0.5))
    assert [type(op) for op in view.batch_ops] == [Normalize]
    for w in (method.backbone.patch_embed.proj.weight, method.backbone.cls_token, method.backbone.pos_embed,
              method.mask_token, method.head.weight, method.backbone.blocks[0].mlp.fc1.weight):
        assert w.std().item() == pytest.approx(0.02, rel=0.35) and w.abs().max() < 0.12
    assert (method.head.bias == 0).all() and (method.backbone.patch_embed.proj.bias == 0).all()


def test_vectors_do_not_decay(method):
    decayed, free = method.param_groups(ZOO)
    assert decayed["weight_decay"] == 0.05 and free["weight_decay"] == 0
    kept = {id(p) for p in free["params"]}
    assert {n for n, p in method.named_parameters() if id(p) in kept} == {
        n for n, _ in method.named_parameters() if "norm" in n or n.endswith("bias")}


# Measured and drawn


def untrained(name):
    """Something to measure, without training it."""
    torch.manual_seed(0)
    recipe = methods.recipes(name)["demo"]
    method = recipe.build().eval()
    return SimpleNamespace(recipe=recipe, method=lambda: method)


def test_the_error_in_hog_space_is_beside_the_mean_of_the_visible_targets():
    run, images = untrained("maskfeat"), load("fashion_small")
    found = masked_error(run, images, limit=7, batch=4, seed=5)
    method, generator = run.method(), torch.Generator().manual_seed(5)
    sums, count = [0.0, 0.0], 0
    evenly = [i * len(images) // 7 for i in range(7)]  # a folder is sorted by class
    for rows in (evenly[:4], evenly[4:]):
        x = Normalize().apply(torch.stack([torch.from_numpy(np.array(images[i])).permute(2, 0, 1) / 255 for i in rows]))
        mask = method.draw_mask(len(x), generator)
        target, prediction = method.target(x), method.reconstruct(x, mask).detach()
        for b in range(len(x)):
            visible = [target[b, i] for i in range(49) if not mask[b, i]]
            mean = sum(visible) / len(visible)
            for i in range(49):
                if mask[b, i]:
                    sums[0] += ((prediction[b, i] - target[b, i]) ** 2).mean().item()
                    sums[1] += ((mean - target[b, i]) ** 2).mean().item()
                    count += 1
    assert (found.model, found.baseline, found.n) == (pytest.approx(sums[0] / count, rel=1e-4),
                                                      pytest.approx(sums[1] / count, rel=1e-4), 7)
    assert found.explained == pytest.approx(1 - sums[0] / sums[1], abs=1e-4)


def test_decibels_are_refused_where_nothing_is_painted():
    with pytest.raises(InputError, match="maskfeat paints no pixels; use masked_error, which"):
        masked_psnr(untrained("maskfeat"), load("fashion_small"))


def test_errors_in_the_space_of_pixels_are_those_of_pixels():
    """SimMIM predicts whole pictures: hidden pixels count, and the rival is a patch, the mean of the visible ones."""
    run, images = untrained("simmim"), load("fashion_small")
    found = masked_error(run, images, limit=3, seed=2)
    method = run.method()
    rows = (0, len(images) // 3, 2 * len(images) // 3)
    x = Normalize().apply(torch.stack([torch.from_numpy(np.array(images[i])).permute(2, 0, 1) / 255 for i in rows]))
    mask = method.draw_mask(3, torch.Generator().manual_seed(2))
    hole = upsample_mask(mask, method.patch)
    squares = (method.reconstruct(x, mask).detach() - x) ** 2 * hole
    assert found.model == pytest.approx((squares.sum() / hole.sum() / 3).item(), rel=1e-4) and found.baseline > 0


def test_the_snapshot_is_drawn_as_glyphs(method, images):
    found = method.snapshot([images])
    assert found["reconstruction"].shape == (6, 3, 14 * 12, 14 * 12) and found["images"].shape == (6, 3, 28, 28)
    drawn = Normalize().undo(found["target"])
    assert drawn.shape == found["reconstruction"].shape and drawn.min() < 1 and drawn.max() == 1


def test_without_local_norm_pictures_are_scaled_down_to_black(images):
    method = RECIPES["demo"].with_(local_norm=False).build()
    target = method.target(images)
    assert target.max() > 3
    drawn = Normalize().undo(method.to_image(target, images))
    assert (drawn.amin((1, 2, 3)) < 0.8).all()


def test_pixels_as_targets_are_the_patches_and_can_be_painted(images):
    from sslnb.masking import patchify

    method = RECIPES["demo"].with_(predict="pixels").build()
    assert method.paints and method.head.out_features == 48
    assert torch.equal(method.target(images), patchify(images, 4))
    assert torch.equal(method.to_image(method.target(images), images), images)
    assert method([images])["loss"].isfinite()
    with pytest.raises(InputError, match="predict"):
        RECIPES["demo"].with_(predict="edges").build()


def test_the_method_is_found_by_its_name():
    assert methods.get("maskfeat") is MaskFeat and methods.recipes("maskfeat") is RECIPES


# Figures


def test_reconstructions_have_a_row_for_the_target_and_paste_visible_edges(method, images):
    from sslnb import figures

    mask = method.draw_mask(6)
    fig = figures.reconstructions(method, images, mask, Normalize())
    rows = [ax for ax in fig.axes if ax.get_ylabel()]
    assert [ax.get_ylabel() for ax in rows] == ["image", "encoder sees", "target", "prediction", "pasted"]
    assert "patches removed" in fig.get_suptitle() and "dB" not in fig.get_suptitle()
    target, prediction, pasted = (ax.images[0].get_array() for ax in rows[2:])
    hole = upsample_mask(mask, 24)[0, 0].numpy() > 0
    assert (pasted == np.where(hole[..., None], prediction, target)).all() and target.shape == (168, 168, 3)


def test_a_film_of_drawings_has_the_target_and_every_second_step(tiny, tmp_path):
    from PIL import Image

    from sslnb import figures

    run = pretrain(tiny("maskfeat", epochs=4), out=tmp_path / "run")
    steps = [step for step, _ in run.snapshots()]
    fig = figures.film(run, count=2)
    names = [ax.get_ylabel() for ax in fig.axes if ax.get_ylabel()]
    assert names == ["image", "encoder sees", "target", *(f"step {s}" for s in steps[::2])] and len(steps) == 5
    with Image.open(run.path / "film.gif") as gif:  # two columns and four rows of 10 x 10 glyphs
        assert gif.n_frames == 5 and gif.width * 2 == gif.height
