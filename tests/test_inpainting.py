"""Inpainting: three kinds of hole, what may be seen of them, the loss by hand, the decoder, our row for the zoo's."""

import math
import random

import pytest
import timm
import torch
from conftest import HALVES, ten_steps
from torch import nn

from sslnb import backbones, methods
from sslnb.errors import InputError
from sslnb.masking import centre_mask, region_mask, upsample_mask
from sslnb.methods.inpainting import RECIPES, ChannelWise, Inpainting
from sslnb.views import HorizontalFlip, RandomResizedCrop

ROW = RECIPES["r50_8xb64_step_ep70"]


def small(**numbers):
    return RECIPES["demo"].with_(**numbers).build()


@pytest.fixture
def images():
    return torch.randn(3, 3, 28, 28)


# The holes

def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("size, unit, cell", [(224, 32, 8), (28, 4, 1)])
def test_units_are_13_of_49_squares_at_either_size(size, unit, cell):
    method = RECIPES["demo"].with_(size=size, unit=unit, hole="units").build()
    mask = method.draw_mask(5)
    assert method.patch == cell and mask.shape == (5, 28 * 28) and mask.sum(1).tolist() == [13 * 16] * 5
    pixels = upsample_mask(mask, method.patch)
    units = pixels.view(5, 7, unit, 7, unit).mean((2, 4))
    assert pixels.shape[-1] == size and ((units == 0) | (units == 1)).all() and not torch.equal(mask[0], mask[1])


def box(mask):
    """The rows and columns that hold something: (first, last + 1) of either."""
    return [(int(found.nonzero().min()), int(found.nonzero().max()) + 1) for found in (mask.any(1), mask.any(0))]


def test_a_region_is_one_rectangle_of_20_to_30_percent_anywhere():
    masks = small(hole="region").draw_mask(2000, seeded()).view(-1, 28, 28)
    boxes = [box(mask > 0) for mask in masks]
    sides = [(bottom - top, right - left) for (top, bottom), (left, right) in boxes]
    assert masks.sum((1, 2)).tolist() == [h * w for h, w in sides], "a rectangle fills its box"
    shares = [h * w / 784 for h, w in sides]
    assert 0.2 <= min(shares) < 0.21 and 0.29 < max(shares) <= 0.3
    assert max(max(h, w) / min(h, w) for h, w in sides) <= 2
    assert {top for (top, _), _ in boxes} >= set(range(17)) and {left for _, (left, _) in boxes} >= set(range(17))
    assert max(bottom for (_, bottom), _ in boxes) == max(right for _, (_, right) in boxes) == 28


def loop_region(rng, side, least, most):
    """One image, as one would write it with loops."""
    while True:
        h, w = rng.randint(1, side), rng.randint(1, side)
        if least <= h * w / side**2 <= most and max(h, w) <= 2 * min(h, w):
            break
    top, left = rng.randint(0, side - h), rng.randint(0, side - w)
    return [[float(top <= r < top + h and left <= c < left + w) for c in range(side)] for r in range(side)]


def test_regions_lie_where_a_loop_would_put_them():
    rng = random.Random(0)
    loop = torch.tensor([loop_region(rng, 8, 0.2, 0.3) for _ in range(4000)])
    ours = region_mask(4000, 8, 0.2, 0.3, seeded()).view(-1, 8, 8)
    assert (loop.mean(0) - ours.mean(0)).abs().max() < 0.05
    assert abs(loop.sum((1, 2)).mean() - ours.sum((1, 2)).mean()) < 0.1


def test_the_centre_is_half_the_side_of_the_image():
    hole = upsample_mask(ROW_METHOD.draw_mask(2), 8)
    assert hole.sum((1, 2, 3)).tolist() == [112 * 112] * 2 and hole[:, :, 56:168, 56:168].all()
    assert centre_mask(1, 5, 3).view(5, 5).tolist() == [[0] * 5, *[[0, 1, 1, 1, 0]] * 3, [0] * 5]
    assert small(hole="centre", mask_ratio=0.5).draw_mask(1).sum() == 20**2  # 28 · √0.5 = 19.8


@pytest.mark.parametrize("hole", ["units", "region", "centre"])
def test_one_generator_gives_the_same_holes(hole):
    method = small(hole=hole)
    assert torch.equal(method.draw_mask(7, seeded()), method.draw_mask(7, seeded()))


# What reaches the network

def test_the_hole_is_zero_and_the_rest_as_it_was(images):
    method = small()
    mask = method.draw_mask(3)
    seen, hole = method.seen(images, mask), upsample_mask(mask, method.patch).bool().expand_as(images)
    assert (seen[hole] == 0).all() and torch.equal(seen[~hole], images[~hole])


@pytest.mark.parametrize("name", list(backbones.MINI))
def test_nothing_hidden_reaches_the_prediction_and_everything_visible_may(name, images):
    method = small(backbone=name)  # batch norm too learns nothing of it: the method trains
    mask = method.draw_mask(3)
    hole = upsample_mask(mask, method.patch)

    def painted(x):
        torch.manual_seed(0)  # a Swin drops paths at random
        return method.reconstruct(x, mask)

    before = painted(images)
    assert torch.equal(painted(images + 5 * hole), before) and before.shape == images.shape
    assert not torch.allclose(painted(images + 5 * (1 - hole)), before, atol=1e-3)


# The loss

def by_hand(prediction, target, mask, patch, counts):
    total, pixels = 0.0, 0
    for b, (p, t) in enumerate(zip(prediction.tolist(), target.tolist(), strict=True)):
        for y in range(len(p[0])):
            for x in range(len(p[0])):
                hidden = mask[b, y // patch * (len(p[0]) // patch) + x // patch] == 1
                if counts(hidden):
                    pixels += 1
                    total += sum((p[c][y][x] - t[c][y][x]) ** 2 for c in range(3)) / 3
    return total / pixels


@pytest.mark.parametrize("loss_on, counts", [("hole", bool), ("visible", lambda hidden: not hidden),
                                             ("all", lambda hidden: True)])
def test_the_loss_is_the_mean_square_over_pixels_and_channels(loss_on, counts, images):
    method = small(hole="region", loss_on=loss_on, unit=28)  # cells of 7 px, masks of several sizes
    mask = torch.zeros(3, 16)
    mask[0, :3], mask[1, 5:7], mask[2, 15] = 1, 1, 1
    out = method.loss(torch.ones_like(images), images, mask)
    assert out.item() == pytest.approx(by_hand(torch.ones_like(images), images, mask, 7, counts), rel=1e-5)


def test_forward_is_the_loss_of_what_it_returns(images):
    method = small()
    out = method([images])
    expected = by_hand(out["prediction"], images, out["mask"], method.patch, bool)
    assert out["loss"].item() == pytest.approx(expected, rel=1e-4)


def test_only_the_hole_has_a_gradient(images):
    method = small()
    mask, prediction = method.draw_mask(3), torch.randn_like(images, requires_grad=True)
    method.loss(prediction, images, mask).backward()
    hole = upsample_mask(mask, method.patch).expand_as(images)
    assert torch.equal(prediction.grad != 0, hole.bool())
    removed = float(mask.sum()) * method.patch**2 * 3
    assert torch.allclose(prediction.grad, 2 * (prediction - images).detach() * hole / removed, atol=1e-7)


def test_the_loss_stays_in_full_precision_under_autocast(images):
    method, mask = small(), small().draw_mask(3)
    prediction, target = torch.randn_like(images).bfloat16(), images.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = method.loss(prediction, target, mask)
    assert inside.dtype == torch.float32 == method.target(target).dtype
    assert inside.item() == method.loss(prediction.float(), target.float(), mask).item()


@HALVES
@pytest.mark.parametrize("name", list(backbones.MINI))
def test_ten_steps_in_sixteen_bits_are_finite_with_every_kind_of_backbone(name, half):
    ten_steps(small(backbone=name), [torch.randn(4, 3, 28, 28)], half)


# The decoder

def test_channel_wise_joins_places_and_no_channels():
    layer, x = ChannelWise(2, 9), torch.randn(3, 2, 3, 3)
    y = layer(x)
    for b in range(3):
        for d in range(2):
            for j in range(9):
                total = layer.bias[d, j].item()
                for i in range(9):
                    total += layer.weight[d, i, j].item() * x[b, d, i // 3, i % 3].item()
                assert y[b, d, j // 3, j % 3].item() == pytest.approx(total, abs=1e-5)
    changed = x.clone()
    changed[:, 0, 2, 2] += 1
    difference = layer(changed) - y
    assert (difference[:, 0].abs() > 1e-6).all() and (difference[:, 1] == 0).all()
    assert layer.weight.abs().max() <= 1 / 3 and layer.weight.std().item() == pytest.approx(3**-1.5, rel=0.15)


def test_it_can_be_left_out():
    with_it, without = (small(channel_fc=on).decoder for on in (True, False))
    kinds = [type(layer).__name__ for layer in without]
    assert kinds == ["ConvTranspose2d", "BatchNorm2d", "ReLU", "ConvTranspose2d"]
    assert [type(layer).__name__ for layer in with_it][:4] == ["ChannelWise", "Conv2d", "BatchNorm2d", "ReLU"]


with torch.device("meta"):
    ROW_METHOD = ROW.with_(hole="centre").build()


def test_the_imagenet_row_builds_the_real_model():
    counts = {k: sum(p.numel() for p in m.parameters()) for k, m in ROW_METHOD.named_children()}
    assert counts == {"backbone": 23_508_032, "decoder": 28_750_723}
    x, shapes = torch.zeros(1, 2048, 7, 7, device="meta"), []
    for layer in ROW_METHOD.decoder:
        x = layer(x)
        if isinstance(layer, nn.ConvTranspose2d):
            shapes.append(tuple(x.shape[1:]))
            assert (layer.kernel_size, layer.stride, layer.padding) == ((4, 4), (2, 2), (1, 1))
    assert shapes == [(512, 14, 14), (256, 28, 28), (128, 56, 56), (64, 112, 112), (3, 224, 224)]
    assert sum(p.numel() for p in ROW_METHOD.decoder[0].parameters()) == 2048 * 49 * 50
    assert isinstance(ROW_METHOD.decoder[-1], nn.ConvTranspose2d), "the target is normalised: no tanh"


def test_weights_come_from_plain_timm_and_go_back():
    plain, method = timm.create_model("resnet50", num_classes=0), ROW.with_(channel_fc=False, decoder_dim=8).build()
    method.backbone.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 224, 224)
    features = method.eval().backbone(x)
    assert torch.equal(plain.eval()(x), features)
    other = timm.create_model("resnet50", num_classes=0)
    other.load_state_dict(method.backbone.state_dict())
    assert torch.equal(other.eval()(x), features)


@pytest.mark.parametrize("changes, sentence", [
    ({"hole": "ring"}, "hole 'ring'"), ({"loss_on": "rim"}, "loss_on 'rim'"), ({"mask_ratio": 1.0}, "mask_ratio 1.0"),
    ({"unit": 6}, "unit 6 cannot be"), ({"unit": 8}, "unit 8 cannot be: .* an image of 28 px"),
    ({"hole": "region", "unit": 28, "mask_ratio": 0.01}, "No rectangle covers 1% to 1% of 4 x 4 cells"),
    ({"backbone": "resnet18"}, "a map of 4 x 4 from 28 px .* use images of 32 px")])
def test_what_cannot_be_is_named(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        small(**changes).draw_mask(1)


def test_the_image_that_the_sentence_asks_for_fits():
    assert small(backbone="resnet18", size=32)([torch.randn(2, 3, 32, 32)])["loss"].isfinite()


# The row

def test_the_row_is_ours_and_says_so():
    assert (ROW.backbone, ROW.size, ROW.total_batch, ROW.epochs, ROW.lr, ROW.weight_decay) == (
        "resnet50", 224, 512, 70, 0.2, 1e-4)
    assert ROW.source_of("lr") == "ours" and ROW.source_of("batch") == ROW.source_of("epochs") == "zoo"
    assert ROW.published == {"fine-tune, RSB A3": 78.4} and "none is public" in ROW.note
    assert (ROW.optimizer, ROW.sgd_momentum, ROW.clip, ROW.accum) == ("sgd", 0.9, 0, 1)
    steps = ROW.steps_per_epoch(1_281_167)
    assert steps == 2502
    at = {epoch: ROW.lr_at(round(epoch * steps), steps) for epoch in (0, 2.5, 5, 29.99, 30, 50, 69)}
    assert list(at.values()) == pytest.approx([0.02, 0.11, 0.2, 0.2, 0.02, 0.002, 0.002])


def test_its_optimizer_is_that_of_rotation():
    rotation = methods.recipes("rotation")["r50_8xb64_step_ep70"]
    for name in ("optimizer", "lr", "sgd_momentum", "weight_decay", "schedule", "milestones", "gamma", "warmup_epochs",
                 "warmup_from", "epochs"):
        assert getattr(ROW, name) == getattr(rotation, name), name


def test_every_tensor_decays_once():
    method = small()
    (group,) = method.param_groups(ROW)
    assert group["weight_decay"] == 1e-4
    assert sorted(map(id, group["params"])) == sorted(id(p) for p in method.parameters())


def test_the_view_is_a_crop_and_a_flip():
    views = ROW_METHOD.views(224)
    (view,) = views.views
    assert [type(op) for op in view.image_ops] == [RandomResizedCrop, HorizontalFlip] and len(view.batch_ops) == 1
    assert view.image_ops[0] == RandomResizedCrop(224, (0.08, 1.0)) and view.image_ops[1].p == 0.5


# What the squared error wants

def test_the_best_answer_to_several_pictures_that_fit_is_their_mean(images):
    """Why the holes are blurred: no single picture has as small an error on all that may be there."""
    method, mask = small(), small(hole="centre").draw_mask(3)
    errors = [method.loss(answer.expand_as(images), images, mask).item() for answer in (*images, images.mean(0))]
    assert min(errors) == errors[-1] and all(math.isfinite(e) for e in errors)


def test_the_method_is_found_by_its_name():
    assert methods.get("inpainting") is Inpainting and methods.recipes("inpainting") is RECIPES
    assert Inpainting.sync_bn and list(methods.METHODS).index("inpainting") == 1, "2016: after 2015, before 2018"
