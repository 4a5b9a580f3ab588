"""Masks with exact counts, patches that can be put back, and the encoder that sees visible patches only."""

import pytest
import torch

from sslnb import backbones, methods
from sslnb.errors import InputError
from sslnb.masking import patchify, random_mask, unpatchify, upsample_mask


def test_patchify_orders_row_column_channel_and_can_be_undone():
    images = torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8).float()
    patches = patchify(images, 4)
    for r in range(4):
        for c in range(4):
            assert patches[1, 3, (r * 4 + c) * 3: (r * 4 + c) * 3 + 3].tolist() == images[1, :, 4 + r, 4 + c].tolist()
    assert torch.equal(unpatchify(patches, 4), images)


@pytest.mark.parametrize("length, ratio, removed", [(196, 0.75, 147), (49, 0.75, 37), (196, 0.4, 79)])
def test_the_mask_removes_exactly_the_asked_number(length, ratio, removed):
    noise = torch.rand(5, length)
    keep, restore, mask = random_mask(noise, ratio)
    assert mask.sum(1).tolist() == [removed] * 5 and keep.shape == (5, length - removed)
    assert (mask.gather(1, keep) == 0).all()
    shuffled = torch.cat([keep, torch.full((5, removed), -1)], 1)
    assert (shuffled.gather(1, restore)[mask == 0] >= 0).all() and (shuffled.gather(1, restore)[mask == 1] == -1).all()


def test_one_noise_gives_nested_masks_and_uniform_ones():
    noise = torch.rand(4000, 16)
    small, large = random_mask(noise, 0.25)[2], random_mask(noise, 0.75)[2]
    assert (large >= small).all()
    assert (large.mean(0) - 0.75).abs().max() < 0.03


def test_upsampled_mask_covers_its_patches():
    mask = torch.zeros(1, 49)
    mask[0, 8] = 1  # second row, second column
    assert upsample_mask(mask, 4)[0, 0].nonzero().min(0).values.tolist() == [4, 4]
    assert upsample_mask(mask, 4).sum() == 16


@pytest.mark.parametrize("ratio", [0, 1, 1.2, -0.5])
def test_impossible_mask_ratios_are_named(ratio):
    with pytest.raises(InputError, match=f"mask_ratio {ratio} is impossible"):
        methods.recipes("mae")["demo"].with_(mask_ratio=ratio).build()


def test_encoding_all_patches_equals_timms_forward():
    vit = backbones.build("vit_mini", 28).eval()
    images = torch.randn(2, 3, 28, 28)
    keep = torch.arange(49).expand(2, -1)
    assert torch.allclose(backbones.encode_visible(vit, images, keep), vit.forward_features(images), atol=1e-5)


def test_the_encoder_neither_sees_nor_computes_hidden_patches():
    vit = backbones.build("vit_mini", 28).eval()
    images, noise = torch.randn(2, 3, 28, 28), torch.rand(2, 49)
    keep, _, mask = random_mask(noise, 0.75)
    seen = []
    vit.blocks[0].register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
    before = backbones.encode_visible(vit, images, keep)
    changed = images + 100 * upsample_mask(mask, 4)
    assert torch.equal(backbones.encode_visible(vit, changed, keep), before)
    assert seen[0] == (2, 1 + 12, 64)


def test_sine_cosine_positions_by_hand():
    import math

    table = backbones.sincos_position(3, 8)[0]
    assert table.shape == (10, 8) and table[0].abs().sum() == 0
    row, column = 2, 1
    omegas = [1.0, 10000 ** (-1 / 2)]
    expected = [f(p * w) for p in (column, row) for f in (math.sin, math.cos) for w in omegas]
    assert table[1 + row * 3 + column].tolist() == pytest.approx(expected, abs=1e-6)
    swapped = backbones.sincos_position(3, 8, first="row")[0]
    assert torch.equal(swapped[:, :4], table[:, 4:]) and torch.equal(swapped[:, 4:], table[:, :4])
