"""Masked methods side by side: the same image under the same mask, moved by sliders, clicks and an upload."""

import io
from datetime import datetime

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import save_file
from test_widgets import find, picture

from sslnb import backbones, figures, methods, pretrain, widgets
from sslnb.errors import InputError
from sslnb.masking import regrid
from sslnb.methods.mae import MAE
from sslnb.zoo.painters import painter

NAMES = [name for name in ("mae", "simmim", "maskfeat", "a2mim", "inpainting") if name in methods.METHODS]


@pytest.fixture
def painters():
    torch.manual_seed(0)
    return {name: methods.recipes(name)["demo"].build().eval() for name in NAMES}


@pytest.fixture
def box(painters, monkeypatch):
    monkeypatch.setattr(widgets, "interactive", lambda: True)
    return widgets.masking(painters)


def hidden(box):
    return [tile.tooltip == "hidden" for tile in find(box, "Button")]


def png(color):
    buffer = io.BytesIO()
    Image.new("RGB", (50, 30), color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("side", [7, 14, 28, 4])
def test_another_grid_hides_what_a_hidden_cell_touches(side):
    mask = torch.zeros(1, 49)
    mask[0, 8] = 1  # row 1, column 1 of 7: from 1/7 to 2/7
    got = regrid(mask, side).view(side, side)
    for r in range(side):
        for c in range(side):
            touches = all(k / side < 2 / 7 and (k + 1) / side > 1 / 7 for k in (r, c))
            assert got[r, c] == touches, (r, c)


def test_headless_it_is_a_figure_with_a_column_per_method(painters):
    fig = widgets.masking(painters, mask_ratio=0.5)
    assert isinstance(fig, Figure) and len(fig.axes) == 5 * len(NAMES)
    assert fig.get_suptitle() == "25 of 49 cells hidden"
    titles = [ax.get_title() for ax in fig.axes[:len(NAMES)]]
    assert [t.split("\n")[0] for t in titles] == NAMES and titles[0].endswith(" dB")


def test_what_is_visible_is_pasted_as_it_is(painters):
    image, mask = torch.rand(3, 28, 28), torch.zeros(49)
    mask[0] = 1
    fig = figures.side_by_side({"mae": painters["mae"]}, image, mask)
    shown = [torch.from_numpy(np.asarray(ax.images[0].get_array())).permute(2, 0, 1) for ax in fig.axes]
    assert torch.allclose(shown[4][:, 4:], image[:, 4:], atol=1e-5) and not torch.allclose(shown[4], image, atol=1e-2)
    assert (shown[1][:, :4, :4] == figures.MASKED).all() and torch.allclose(shown[2], image, atol=1e-5)


def test_a_borrowed_statistic_is_said_and_no_decibel_is_claimed(painters):
    painters["mae"].norm_pix = True
    title = figures.side_by_side(painters, torch.rand(3, 28, 28), torch.eye(49)[0]).axes[0].get_title()
    assert "taken from the truth" in title and "dB" not in title


def test_the_amplitudes_of_a_wave_are_two_dots_about_the_middle():
    wave = torch.cos(torch.arange(16) * 2 * torch.pi * 3 / 16).expand(3, 16, 16)
    shown = figures.amplitude(wave)
    assert sorted(map(tuple, (shown > 0.5).nonzero().tolist())) == [(8, 5), (8, 11)]


def test_sliders_and_clicks_move_one_mask_for_all(box):
    start, before = picture(box), hidden(box)
    (ratio,), squares = find(box, "FloatSlider"), find(box, "Dropdown")[0]
    assert sum(before) == 30 and len(before) == 49  # 0.6 hidden: int(0.4 * 49) stay
    find(box, "Button")[before.index(True)].click()
    after = hidden(box)
    assert sum(after) == 29 and not after[before.index(True)] and picture(box) != start
    find(box, "Button")[after.index(False)].click()
    assert sum(hidden(box)) == 30
    ratio.value = 0.2
    assert sum(hidden(box)) == 49 - int(49 * 0.8)
    squares.value = 14
    assert len(hidden(box)) == 196
    one = picture(box)
    find(box, "Checkbox")[0].value = True
    assert picture(box) != one


def test_ones_own_image_is_taken_and_a_broken_file_named(box):
    start, (upload,) = picture(box), find(box, "FileUpload")
    upload.value = ({"name": "a.png", "type": "image/png", "size": 9, "content": png((200, 30, 30)),
                     "last_modified": datetime.now()},)
    mine = picture(box)
    assert mine != start and find(box, "Label")[0].value == ""
    upload.value = ({"name": "b.png", "type": "image/png", "size": 9, "content": b"no image",
                     "last_modified": datetime.now()},)
    assert "cannot be read as an image" in find(box, "Label")[0].value and picture(box) == mine


def test_a_path_is_an_image_too_and_a_wrong_one_is_named(painters, tmp_path):
    (tmp_path / "red.png").write_bytes(png((255, 0, 0)))
    fig = widgets.masking(painters, tmp_path / "red.png")
    assert np.asarray(fig.axes[0].images[0].get_array())[5, 5].tolist() == pytest.approx([1, 0, 0], abs=1e-6)
    with pytest.raises(InputError, match="There is no image 'nowhere.png'"):
        widgets.masking(painters, "nowhere.png")


def test_what_cannot_paint_is_refused_in_a_sentence(painters, tmp_path):
    save_file(painters["mae"].backbone.state_dict(), tmp_path / "backbone.safetensors")
    with pytest.raises(InputError, match="the decoder or head that makes pictures is missing"):
        widgets.masking({"encoder": tmp_path / "backbone.safetensors"})
    with pytest.raises(InputError, match="SimCLR hides no part of an image"):
        widgets.masking({"simclr": methods.recipes("simclr")["demo"].build()})
    large = methods.recipes("mae")["demo"].with_(size=56).build()
    with pytest.raises(InputError, match="needs one image size, and these have {'mae': 28, 'large': 56}"):
        widgets.masking({"mae": painters["mae"], "large": large})


def test_a_run_and_its_path_are_sources(tmp_path):
    run = pretrain(methods.recipes("mae")["demo"].with_(epochs=1, batch=640, data="digits_scattered"), out=tmp_path)
    fig = widgets.masking({"run": run, "path": tmp_path})
    painted = [np.asarray(fig.axes[i].images[0].get_array()) for i in (6, 7)]
    assert np.array_equal(*painted)


# ---------------------------------------------------------------- published files that can paint


OFFICIAL = (("embed.", "decoder_embed."), ("mask_token", "mask_token"), ("position", "decoder_pos_embed"),
            ("blocks.", "decoder_blocks."), ("norm.", "decoder_norm."), ("predict.", "decoder_pred."))
MM_BLOCK = (("norm1", "ln1"), ("norm2", "ln2"), ("mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1"))


def published(method, openmmlab: bool) -> dict:
    """The state dict of a MAE under the names of its official code, or of OpenMMLab."""
    state = {}
    for name, tensor in method.backbone.state_dict().items():
        for ours, theirs in MM_BLOCK if openmmlab else ():
            name = name.replace(ours, theirs)
        if openmmlab:
            name = name.replace("blocks.", "layers.").replace("patch_embed.proj", "patch_embed.projection")
            name = f"backbone.{name}".replace("backbone.norm.", "backbone.ln1.")
        state[name] = tensor
    for name, tensor in method.decoder.state_dict().items():
        ours, theirs = next(pair for pair in OFFICIAL if name.startswith(pair[0]))
        name = name.replace(ours, theirs, 1)
        for part, other in MM_BLOCK if openmmlab else ():
            name = name.replace(part, other)
        state["neck." * openmmlab + name.replace("decoder_norm", "ln1" if openmmlab else "decoder_norm")] = tensor
    return state


@pytest.mark.parametrize("openmmlab", [False, True], ids=["official", "OpenMMLab"])
def test_a_published_mae_with_its_decoder_paints_as_it_did(tmp_path, openmmlab):
    torch.manual_seed(0)
    mae = MAE(backbones.build("vit_tiny_patch16_224", 224), decoder_dim=32, decoder_depth=2).eval()
    for p in mae.parameters():  # as if trained: also what starts at zero or the same everywhere
        p.data.add_(0.02 * torch.randn_like(p))
    file = tmp_path / ("mae.pth" if openmmlab else "mae_visualize.pth")
    torch.save({"state_dict" if openmmlab else "model": published(mae, openmmlab)}, file)
    theirs = painter(file)
    assert theirs.norm_pix == openmmlab and not theirs.training
    images, mask = torch.randn(1, 3, 224, 224), mae.draw_mask(1)
    with torch.no_grad():
        assert torch.allclose(theirs.reconstruct(images, mask), mae.reconstruct(images, mask), atol=1e-5)
    assert widgets.painter(file).decoder.embed.weight.shape == (32, 192)


def test_a_decoder_of_another_build_is_refused(tmp_path):
    state = published(MAE(backbones.build("vit_tiny_patch16_224", 224), decoder_dim=32, decoder_depth=1), False)
    torch.save({"model": {k: v for k, v in state.items() if k != "decoder_norm.bias"}}, tmp_path / "mae.pth")
    with pytest.raises(InputError, match="holds a decoder of another build: norm.bias does not fit"):
        painter(tmp_path / "mae.pth")
    torch.save({"model": {**state, "decoder_blocks.0.extra.weight": torch.ones(2)}}, tmp_path / "more.pth")
    with pytest.raises(InputError, match="holds a decoder of another build: blocks.0.extra.weight does not fit"):
        painter(tmp_path / "more.pth")


@pytest.mark.parametrize("name", ["decoder.0.weight", "neck.decoder_pred.0.weight"])
def test_a_decoder_of_another_method_is_not_called_missing(tmp_path, name):
    """SimMIM's and A2MIM's whole files."""
    torch.save({"model": {"encoder.conv1.weight": torch.ones(2), name: torch.ones(2)}}, tmp_path / "full.pth")
    with pytest.raises(InputError, match="holds a decoder, but not MAE's"):
        painter(tmp_path / "full.pth")


# Features side by side

@pytest.mark.parametrize("count", [20, 21])
def test_more_classes_than_a_legend_can_hold_leave_the_room_to_the_points(count):
    """With the thousand of ImageNet there was nothing but a legend."""
    features, labels = torch.randn(42, 8, generator=torch.Generator().manual_seed(0)), torch.arange(42) % count
    classes = [f"class {c}" for c in range(count)]
    for fig in (figures.embedding(features, labels, classes, "Test images"),
                figures.embeddings({"a": features, "b": -features}, labels, classes)):
        assert all(len(ax.collections) == count for ax in fig.axes)
        assert bool(fig.axes[-1].get_legend()) == (count == 20)
        assert fig.get_suptitle().endswith("\n21 classes: colours and markers repeat") == (count == 21)
