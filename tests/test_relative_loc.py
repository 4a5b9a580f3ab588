"""Relative location: where the nine patches come from, which place is which number, the loss against nested loops."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

from sslnb import methods, views
from sslnb.errors import InputError

ZOO = methods.recipes("relative_loc")["r50_8xb64_step_ep70"]


@pytest.fixture
def demo():
    return methods.recipes("relative_loc")["demo"].with_(dropout=0.0)


def coordinates(width, height):
    """A picture whose red is the column and whose green is the row of each pixel."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


# ---------------------------------------------------------------- the nine patches


def test_each_patch_lies_anywhere_in_its_own_cell_and_moves_on_its_own():
    grid, rng = views.PatchGrid(patch=5, gap=2), random.Random(0)
    boxes = np.array([grid.boxes(21, 21, rng) for _ in range(4000)])  # the square fits exactly once
    assert (boxes[..., 2:] - boxes[..., :2] == 5).all()
    corners = [[7 * (place % 3), 7 * (place // 3)] for place in range(9)]
    shifts = (boxes[..., :2] - np.array(corners)).reshape(4000, 18)
    assert all(set(column) == {0, 1, 2} for column in shifts.T)  # 0 to gap, both ends
    assert np.abs(np.corrcoef(shifts.T) - np.eye(18)).max() < 0.08


def test_the_square_lies_anywhere_in_the_image():
    rng = random.Random(0)
    draws = np.array([views.PatchGrid(patch=4, gap=1).boxes(20, 17, rng) for _ in range(4000)])
    assert draws[:, 0, :2].min(0).tolist() == [0, 0] and draws[:, 8, 2:].max(0).tolist() == [20, 17]


def test_the_view_holds_the_pixels_of_the_boxes_side_by_side():
    grid = views.PatchGrid(patch=6, gap=3)
    boxes = grid.boxes(40, 35, random.Random(3))
    mosaic = np.asarray(grid(coordinates(40, 35), random.Random(3)))
    assert mosaic.shape == (18, 18, 3)
    for place, (left, top, _, _) in enumerate(boxes):
        row, column = divmod(place, 3)
        corner = mosaic[6 * row, 6 * column]
        assert corner.tolist() == [left, top, 0]
        last = mosaic[6 * row + 5, 6 * column + 5]
        assert last.tolist() == [left + 5, top + 5, 0]


def test_without_a_gap_the_patches_are_the_image():
    image = coordinates(12, 12)
    assert np.array_equal(views.PatchGrid(4, 0)(image, random.Random(0)), image)


def test_an_image_too_small_for_nine_patches_is_refused_in_one_sentence():
    with pytest.raises(InputError, match="gaps of 1 need an image of 27 px, and this one has 20"):
        views.PatchGrid(8, 1)(coordinates(40, 20), random.Random(0))


def test_at_224_px_the_view_is_the_zoos_pipeline():
    method = methods.get("relative_loc")(torch.nn.Module.__new__(Backbone))
    view = method.views(224).views[0]
    assert view.image_ops == (views.Resize(292, "bilinear"), views.PatchGrid(64, 21))
    assert view.batch_ops == (views.Greyscale(0.66), views.Normalize())
    assert view.crop(coordinates(200, 180), random.Random(0)).shape == (3, 192, 192)


class Backbone(torch.nn.Module):
    num_features = 4


def test_the_nine_patches_of_an_image_are_grey_together(demo):
    noise = np.random.RandomState(0).randint(0, 256, (40, 40, 3), dtype=np.uint8)
    made = demo.with_(grey=0.5).build().views(40)
    x = made.normalize.undo(made([Image.fromarray(noise)] * 30)[0])
    p = x.shape[-1] // 3
    grey = [{bool((patch[0] - patch[1]).abs().max() < 1e-3) for patch in
             (one[:, r * p:(r + 1) * p, c * p:(c + 1) * p] for r in range(3) for c in range(3))} for one in x]
    assert all(len(kinds) == 1 for kinds in grey) and {kind for kinds in grey for kind in kinds} == {True, False}


# ---------------------------------------------------------------- pairs and loss


def test_places_are_numbered_row_by_row_without_the_centre(demo):
    x = torch.arange(9.0).reshape(1, 1, 3, 3).repeat_interleave(2, 2).repeat_interleave(2, 3)
    x = torch.cat([x, x + 100]).expand(-1, 3, -1, -1)  # patch i of image b is full of the number 100 b + i
    around, centre = demo.build().patches(x)
    assert around.shape == (16, 3, 2, 2) and centre.shape == (2, 3, 2, 2)
    assert around[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 100, 101, 102, 103, 105, 106, 107, 108]
    assert centre[:, 1, 1, 1].tolist() == [4, 104] and (around == around[:, :1, :1, :1]).all()


def test_the_loss_is_the_papers_sum_over_eight_pairs_of_every_image(demo):
    method = demo.build().eval()  # so that each pair can be computed alone
    x = torch.randn(3, 3, 30, 30)
    with torch.no_grad():
        out = method([x])
        total = right = 0
        for image in x:
            cells = [image[:, 10 * r:10 * r + 10, 10 * c:10 * c + 10] for r in range(3) for c in range(3)]
            centre = cells.pop(4)
            for j, patch in enumerate(cells):
                pair = torch.cat([method.backbone(patch[None]), method.backbone(centre[None])], 1)
                h = method.head(method.neck(pair))[0].tolist()
                total -= h[j] - math.log(sum(math.exp(v) for v in h))
                right += h.index(max(h)) == j
    assert out["loss"].item() == pytest.approx(total / 24, rel=1e-4)
    assert out["accuracy"].item() == pytest.approx(right / 24)


def test_one_look_at_the_centre_is_eight_looks_at_it(demo):
    """The zoo encodes the centre once per pair; mean and variance of the batch are the same, so is all else."""
    method = demo.build()
    eight = copy.deepcopy(method)
    x = torch.randn(4, 3, 30, 30)
    around, centre = method.patches(x)
    pairs = torch.cat([eight.backbone(around), eight.backbone(centre.repeat_interleave(8, 0))], 1)
    place = torch.arange(8).repeat(4)
    theirs = torch.nn.functional.cross_entropy(eight.head(eight.neck(pairs)), place)
    ours = method([x])["loss"]
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    ours.backward(), theirs.backward()
    for a, b in zip(method.parameters(), eight.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-4 * b.grad.abs().max() + 1e-6


def test_patches_that_do_not_fit_are_refused_before_any_work(demo):
    with pytest.raises(InputError, match="Three patches of 0.3 with gaps of 0.07 are wider than an image of 1 "):
        demo.with_(patch=0.3).build()


def test_a_transformer_is_refused_in_one_sentence(demo):
    with pytest.raises(InputError, match="relative_loc .* use resnet_mini"):
        demo.with_(backbone="vit_mini").build()


# ---------------------------------------------------------------- the zoo's row


def test_the_zoos_row_has_the_papers_shapes_and_numbers():
    with torch.device("meta"):
        method = ZOO.build()
        shapes = []
        method.backbone.layer4.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
        method.neck.register_forward_pre_hook(lambda module, args: shapes.append(tuple(args[0].shape)))
        method.head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
        method.loss = torch.nn.functional.cross_entropy  # autocast, which ours switches off, knows no meta device
        method([torch.empty(2, 3, 192, 192)])
    assert shapes == [(16, 2048, 2, 2), (2, 2048, 2, 2), (16, 4096), (16, 8)]
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in method.named_children()}
    assert counts == {"backbone": 23_508_032, "neck": 16_789_504, "head": 32_776}
    assert (method.neck[1].momentum, method.neck[3].p) == (0.003, 0.5)
    assert ZOO.total_batch == 512 and ZOO.published == {"linear, MoCo protocol": 38.83}


def test_the_zoos_learning_rate_warms_up_and_falls_twice():
    rates = {epoch: ZOO.lr_at(round(epoch * 100), 100) for epoch in (0, 2.5, 5, 29.99, 30, 49.99, 50, 69.99)}
    expected = {0: 0.02, 2.5: 0.11, 5: 0.2, 29.99: 0.2, 30: 0.02, 49.99: 0.02, 50: 0.002, 69.99: 0.002}
    assert rates == pytest.approx(expected)


def test_neck_and_head_decay_more_than_the_backbone_and_nothing_is_left_out():
    method = ZOO.with_(backbone="resnet_mini", size=28, hidden_dim=512).build()
    backbone, rest = method.param_groups(ZOO)
    assert (backbone["weight_decay"], rest["weight_decay"]) == (1e-4, 5e-4)
    assert {id(p) for p in backbone["params"]} == {id(p) for p in method.backbone.parameters()}
    assert len(backbone["params"]) + len(rest["params"]) == len(list(method.parameters()))


def test_neck_and_head_start_as_in_the_zoo():
    method = ZOO.with_(backbone="resnet_mini", size=28).build()
    assert method.neck[0].weight.std().item() == pytest.approx(0.005, rel=0.05) and (method.neck[0].bias == 0.1).all()
    assert method.head.weight.std().item() == pytest.approx(0.005, rel=0.05) and (method.head.bias == 0).all()
