"""Published weights in: every row as a file of its layout, values against independent networks, safety, fetching."""

import functools
import hashlib
import http.server
import os
import pickle
import re
import sys
import threading
import types
from argparse import Namespace
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sslnb import methods, zoo
from sslnb.backbones import build
from sslnb.errors import InputError
from sslnb.tokens import sincos_position
from sslnb.zoo import download, layouts, models, networks
from sslnb.zoo.models import MODELS
from sslnb.zoo.sanity import _verdict

BUILT = [name for name, row in MODELS.items() if row.backbone]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """torch's cache, empty."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    download.folder().mkdir(parents=True)
    return download.folder()


# ---------------------------------------------------------------- files as they are published, from spec D and 0.14


def mm_name(name):
    """timm's name of a ViT's tensor -> OpenMMLab's (spec D.2, read from right to left)."""
    name = name.replace("patch_embed.proj.", "patch_embed.projection.").replace("blocks.", "layers.")
    name = re.sub(r"^norm\.", "ln1.", re.sub(r"\.norm(\d)\.", r".ln\1.", name))
    return name.replace("mlp.fc1.", "ffn.layers.0.0.").replace("mlp.fc2.", "ffn.layers.1.")


def mm_swin_name(name):
    """timm's name of a Swin's tensor -> OpenMMLab's (D.3)."""
    name = name.replace("patch_embed.proj.", "patch_embed.projection.").replace(".attn.", ".attn.w_msa.")
    name = re.sub(r"^layers\.(\d)\.downsample", lambda m: f"stages.{int(m[1]) - 1}.downsample", name)
    name = re.sub(r"^norm\.", "norm3.", re.sub(r"^layers\.", "stages.", name))
    return name.replace("mlp.fc1.", "ffn.layers.0.0.").replace("mlp.fc2.", "ffn.layers.1.")


def official_swin_name(name):
    return re.sub(r"^layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)


def below(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


ONE = torch.zeros(1)
MM = {"MoCo": "encoder_q.0.", "BYOL": "online_net.0.", "SimSiam": "encoder.0.", "MoCo v3": "base_encoder.0."}
BESIDE = {"MoCo": ("encoder_k.0.", "encoder_q.1.mlp.0.weight", "queue", "queue_ptr"),
          "BYOL": ("target_net.0.", "online_net.1.fc0.weight", "neck.fc0.weight", "head.predictor.fc0.weight"),
          "SimSiam": ("", "encoder.1.fc0.weight", "neck.fc0.weight", "head.predictor.fc0.weight"),
          "MoCo v3": ("momentum_encoder.0.", "base_encoder.1.fc0.weight", "head.predictor.fc0.weight")}
V3 = "module.base_encoder."
OFFICIAL = {"MoCo, official": ("module.encoder_q.", "module.encoder_k.", "module.encoder_q.fc.0.weight"),
            "MoCo v3, official": (V3, "module.momentum_encoder.", f"{V3}head.0.weight"),
            "SimSiam, official": ("module.encoder.", "", "module.predictor.0.weight"),
            "SwAV or DeepCluster-v2, official": ("module.", "", "module.prototypes.weight"),
            "SimMIM, official": ("encoder.", "", "decoder.0.weight"),
            "CAE, official": ("encoder.", "teacher.", "pretext_neck.mask_token")}


def published(layout, state):
    """What a file of this layout holds, the backbone's tensors being `state`; a momentum copy has other numbers."""
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    swin, vit = "layers.0.blocks.0.norm1.weight" in state, "cls_token" in state
    other = {name: tensor + 1 for name, tensor in state.items()}
    if "OpenMMLab" in layout:
        rename = mm_swin_name if swin else mm_name if vit else str
        ours = {rename(name): tensor for name, tensor in old.items()}
        kind = layout.partition(" of OpenMMLab")[0]
        if kind in MM:
            copy, *more = BESIDE[kind]
            file = below(MM[kind], ours) | below("backbone.", ours) | (below(copy, other) if copy else {})
        else:
            file, more = below("backbone.", ours), ["backbone.mask_token", "neck.decoder_embed.weight"]
            file |= below("teacher.", other)
        return {"meta": {"epoch": 3}, "state_dict": file | dict.fromkeys(more, ONE)}
    if layout in OFFICIAL:
        prefix, copy, head = OFFICIAL[layout]
        ours = {official_swin_name(name): tensor for name, tensor in state.items()}
        file = below(prefix, ours) | (below(copy, other) if copy else {}) | {head: ONE, prefix + "mask_token": ONE}
        return {"model" if "official" in layout and prefix == "encoder." else "state_dict": file}
    if layout == "Barlow Twins or DINO, whole file":
        return {"epoch": 1, "model": below("module.backbone.", state) | {"module.projector.0.weight": ONE}}
    if layout == "VISSL":
        trunk = below("_feature_blocks.", state)
        return {"classy_state_dict": {"base_model": {"model": {"trunk": trunk, "heads": {"0.clf.0.weight": ONE}}}}}
    if layout == "MaskFeat of SlowFast":
        ours = {name.replace("norm.", "pred_head.transforms.0.0.") if name.startswith("norm.") else name: tensor
                for name, tensor in state.items()}
        return {"epoch": 1600, "model_state": ours | {"mask_token": ONE, "pred_head.projections.0.weight": ONE}}
    more = {"BEiT, official": "lm_head.weight", "MAE with its decoder": "decoder_blocks.0.norm1.weight"}
    return {"model": old | {more.get(layout, "fc.weight"): ONE}}


@functools.cache
def shapes(backbone, size, numbers):
    with torch.device("meta"):
        return build(backbone, size, **dict(numbers)).state_dict()


@pytest.mark.parametrize("name", [name for name in BUILT if MODELS[name].layout != "BYOL's JAX file"])
def test_a_file_of_every_row_fills_its_network(name, home, monkeypatch, tmp_path):
    """Full size, without numbers: names and shapes are what is checked here. Once by the row, once by the tensors."""
    monkeypatch.setattr(zoo, "verify", lambda *_: None)
    monkeypatch.setattr(download, "verify", lambda *_, **__: None)
    row = MODELS[name]
    state = shapes(row.backbone, row.size, tuple(row.numbers.items()))
    torch.save(published(row.layout, state), home / row.file)
    with torch.device("meta"):
        backbone, match = zoo.load(name)
    assert sorted(backbone.state_dict()) == sorted({*match.taken, *(k for k in state if "num_batches" in k)})
    assert not match.missing and match.layout == row.layout and not any("expected" in note for note in match.notes)
    assert match.leftover or match.layout == "VISSL", "where the heads lie in a dictionary of their own"
    (home / row.file).rename(tmp_path / "anything.pth")
    if row.backbone == "vit_small_patch16_224":
        heads = 12 if row.method == "mocov3" else 6
        assert backbone.blocks[0].attn.num_heads == heads
        assert zoo.network(tmp_path / "anything.pth")[1].get("num_heads", 6) == heads
    kind, numbers, size = zoo.network(tmp_path / "anything.pth")
    assert (kind, size) == (row.backbone, row.size)
    again = shapes(kind, size, tuple(numbers.items()))
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}


def test_the_rows_of_the_seed_are_our_recipes():
    assert len(models.SEED) == 24 and len(MODELS) == len(models.SEED) + len(models.OFFICIAL)
    for row in models.SEED:
        recipe = methods.recipes(row.method)[row.config]
        assert (recipe.backbone, recipe.size, recipe.epochs) == (row.backbone, row.size, row.epochs), row.name
        assert row.pool == recipe.pool
        assert row.numbers.get("num_heads") == recipe.backbone_numbers.get("num_heads")
        assert row.checksum == f"sha256:{row.file[-12:-4]}" or row.url.startswith(models.WESTLAKE)
        if "rgb_m" not in row.name:  # where the file and our recipe differ, and its note says so
            assert ({k: v.shape for k, v in shapes(row.backbone, row.size, tuple(row.numbers.items())).items()}
                    == {k: v.shape for k, v in shapes(recipe.backbone, recipe.size,
                                                      tuple(recipe.backbone_numbers.items())).items()}), row.name
    addresses = "\n".join(sorted(row.url for row in models.SEED))
    assert hashlib.sha256(addresses.encode()).hexdigest().startswith("6b5d7dce8c7c0a3f"), "as on the seed's page"
    assert {row.layout for row in MODELS.values()} <= {layout for layout, _, _ in layouts.LAYOUTS}
    files = [row.file for row in MODELS.values() if row.backbone]
    assert len(set(files)) == len(files), "one name on disk for two files"
    assert zoo.names("npid") == ["npid_resnet50_8xb32-steplr-200e_in1k"] and len(zoo.names()) == len(MODELS)
    with pytest.raises(InputError, match="did you mean 'byol'"):
        zoo.names("bylo")


@pytest.mark.parametrize("name, size, numbers", [
    *((f"resnet{depth}", 224, {}) for depth in (18, 34, 50, 101, 152, 200)), ("resnet50", 32, {}),
    *((f"vit_{kind}_224", 224, {}) for kind in ("tiny_patch16", "small_patch16", "base_patch8", "large_patch16",
                                                "huge_patch14")), ("vit_base_patch16_224", 384, {"depth": 3}),
    *((f"swin_{kind}_patch4_window7_224", 224, {}) for kind in ("tiny", "small", "base", "large")),
    ("swin_base_patch4_window7_224", 384, {"window_size": 12}),
    ("beit_large_patch16_224", 224, {"use_abs_pos_emb": True, "use_rel_pos_bias": False, "init_values": None}),
    ("beit_base_patch16_224", 160, {"use_rel_pos_bias": True, "qkv_bias": False})])
def test_a_network_is_recognised_by_its_tensors(name, size, numbers):
    state = shapes(name, size, tuple(numbers.items()))
    found, more, native = networks.recognise(layouts.convert(state))
    assert (found, native) == (name, size)
    assert ({key: tensor.shape for key, tensor in shapes(found, native, tuple(more.items())).items()}
            == {key: tensor.shape for key, tensor in state.items()})


# ---------------------------------------------------------------- values, against networks written here


def attention(x, w, heads, bias=None, table=None):
    """Softmax attention from a mapping of qkv.weight, proj.*; `bias` of qkv; `table` (heads, N, N) is added."""
    q, k, v = (F.linear(x, w["qkv.weight"], bias)).chunk(3, -1)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(-3, -2) for part in (q, k, v))
    a = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    a = (a if table is None else a + table).softmax(-1) @ v
    return F.linear(a.transpose(-3, -2).flatten(-2), w["proj.weight"], w["proj.bias"])


def part(state, prefix):
    return {name[len(prefix):]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def norm(x, w, name, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def ffn(x, w):
    x = F.gelu(F.linear(x, w["ffn.layers.0.0.weight"], w["ffn.layers.0.0.bias"]))
    return F.linear(x, w["ffn.layers.1.weight"], w["ffn.layers.1.bias"])


def cross_table(table, side):
    """BEiT's positions, pair by pair: the offset of two patches, and three more rows around the class token."""
    n = side * side + 1
    out = torch.zeros(table.shape[1], n, n)
    for i in range(n):
        for j in range(n):
            (y, x), (v, u) = (divmod(k - 1, side) for k in (i, j))
            row = (y - v + side - 1) * (2 * side - 1) + x - u + side - 1
            row = len(table) - 1 if i == j == 0 else len(table) - 3 if i == 0 else len(table) - 2 if j == 0 else row
            out[:, i, j] = table[row]
    return out


def mm_vit(state, images, heads, side):
    """OpenMMLab's ViT, plain or as CAE's and OpenMixup's: biases of q and v, layer scale, a table in every layer."""
    patches = F.conv2d(images, state["patch_embed.projection.weight"], state["patch_embed.projection.bias"], stride=16)
    x = torch.cat([state["cls_token"].expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    x = x + state["pos_embed"]
    for i in range(2):
        w = part(state, f"layers.{i}.")
        a = part(w, "attn.")
        bias = a.get("qkv.bias")
        if "q_bias" in a:
            bias = torch.cat([a["q_bias"], 0 * a["q_bias"], a["v_bias"]])
        table = cross_table(a["relative_position_bias_table"], side) if "relative_position_bias_table" in a else None
        x = x + w.get("gamma_1", 1) * attention(norm(x, w, "ln1"), a, heads, bias, table)
        x = x + w.get("gamma_2", 1) * ffn(norm(x, w, "ln2"), w)
    return norm(x, state, "ln1")[:, 0]


def random_mm_vit(width, side, heads, beit=False, tables=False):
    draw = lambda *shape: torch.randn(*shape) * 0.2  # noqa: E731
    state = {"cls_token": draw(1, 1, width), "pos_embed": draw(1, side**2 + 1, width), "ln1.weight": draw(width),
             "ln1.bias": draw(width), "patch_embed.projection.weight": draw(width, 3, 16, 16),
             "patch_embed.projection.bias": draw(width)}
    for i in range(2):
        at = f"layers.{i}."
        state |= {f"{at}ln{k}.{what}": draw(width) for k in (1, 2) for what in ("weight", "bias")}
        state |= {f"{at}attn.qkv.weight": draw(3 * width, width), f"{at}attn.proj.weight": draw(width, width),
                  f"{at}attn.proj.bias": draw(width), f"{at}ffn.layers.0.0.weight": draw(4 * width, width),
                  f"{at}ffn.layers.0.0.bias": draw(4 * width), f"{at}ffn.layers.1.weight": draw(width, 4 * width),
                  f"{at}ffn.layers.1.bias": draw(width)}
        if not beit:
            state[f"{at}attn.qkv.bias"] = draw(3 * width)
            continue
        state |= {f"{at}{name}": draw(width) for name in ("attn.q_bias", "attn.v_bias", "gamma_1", "gamma_2")}
        if tables:
            state[f"{at}attn.relative_position_bias_table"] = draw((2 * side - 1) ** 2 + 3, heads)
            state[f"{at}attn.relative_position_index"] = torch.zeros(side**2 + 1, side**2 + 1, dtype=torch.long)
    return state


def features(backbone, images):
    with torch.no_grad():
        return backbone(images)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width, heads, beit, tables", [(192, 3, False, False), (768, 12, True, False),
                                                        (768, 12, True, True)])
def test_openmmlabs_transformers_see_what_an_independent_one_sees(width, heads, beit, tables, tmp_path):
    state = random_mm_vit(width, 2, heads, beit, tables)
    file = below("backbone.", state) | {"backbone.mask_token": ONE, "neck.mask_token": ONE}
    torch.save({"meta": {}, "state_dict": file | below("teacher.", random_mm_vit(width, 2, heads, beit))},
               tmp_path / "x.pth")
    backbone, match = zoo.load(tmp_path / "x.pth")
    assert match.size == 32 and match.numbers["depth"] == 2
    assert match.renamed["blocks.1.mlp.fc1.weight"] == "backbone.layers.1.ffn.layers.0.0.weight"
    images = torch.randn(3, 3, 32, 32)
    close(features(backbone, images), mm_vit(state, images, heads, 2))


def test_a_beit_may_become_a_vit_with_layer_scale(tmp_path):
    state = random_mm_vit(768, 2, 12, beit=True)
    torch.save({"state_dict": below("backbone.", state)}, tmp_path / "x.pth")
    backbone, match = zoo.load(tmp_path / "x.pth", "vit_base_patch16_224", depth=2, init_values=0.1, size=32)
    images = torch.randn(2, 3, 32, 32)
    close(features(backbone, images), mm_vit(state, images, 12, 2))
    assert "biases of query and value, with zeros for the key" in str(match)
    assert not match.leftover, match.leftover


def test_moco_v3s_small_vit_has_twelve_heads(tmp_path):
    state = random_mm_vit(384, 2, 12)
    other = below("momentum_encoder.0.", random_mm_vit(384, 2, 12))
    torch.save({"state_dict": below("base_encoder.0.", state) | other}, tmp_path / "x.pth")
    backbone, match = zoo.load(tmp_path / "x.pth")
    images = torch.randn(2, 3, 32, 32)
    assert match.numbers["num_heads"] == 12
    close(features(backbone, images), mm_vit(state, images, 12, 2))
    torch.save({"state_dict": below("backbone.", state)}, tmp_path / "y.pth")  # nothing says whose it is
    with pytest.raises(InputError, match="12 heads .MoCo v3's. or 6"):
        zoo.load(tmp_path / "y.pth")
    with pytest.raises(InputError, match="12 heads"):
        zoo.load(tmp_path / "y.pth", "vit_small_patch16_224", depth=2)
    six, _ = zoo.load(tmp_path / "y.pth", "vit_small_patch16_224", num_heads=6)
    assert (features(six, images) - features(backbone, images)).abs().max() > 1e-3, "heads cannot be seen in shapes"
    plain = build("vit_small_patch16_224", 64, depth=2).state_dict()
    for first, heads in (("row", 12), ("column", 6)):  # its fixed positions tell, where a converter left timm's names
        torch.save({**plain, "pos_embed": sincos_position(4, 384, first)}, tmp_path / "z.pth")
        assert zoo.load(tmp_path / "z.pth")[0].blocks[0].attn.num_heads == heads


def swin(state, images, names, merged):
    """A Swin of two stages with one block each, windows of 4 x 4 cells, by names of OpenMMLab ("mm") or official."""
    mm = names == "mm"
    at = "patch_embed.projection" if mm else "patch_embed.proj"
    x = F.conv2d(images, state[f"{at}.weight"], state[f"{at}.bias"], stride=4).permute(0, 2, 3, 1)
    x = norm(x, state, "patch_embed.norm", 1e-5)
    for stage, heads in ((0, 4), (1, 8)):
        w = part(state, f"{'stages' if mm else 'layers'}.{stage}.")
        b, side, width = part(w, "blocks.0."), x.shape[1], x.shape[-1]
        a = part(b, "attn.w_msa." if mm else "attn.")
        place = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        far = place[:, :, None] - place[:, None] + 3
        table = a["relative_position_bias_table"][far[0] * 7 + far[1]].permute(2, 0, 1)
        y = norm(x, b, "norm1", 1e-5).unflatten(1, (-1, 4)).unflatten(3, (-1, 4)).transpose(2, 3)  # B, n, n, 4, 4, C
        y = attention(y.flatten(3, 4), a, heads, a["qkv.bias"], table).unflatten(3, (4, 4))
        x = x + y.transpose(2, 3).reshape(len(x), side, side, width)
        y = norm(x, b, "norm2", 1e-5)
        x = x + ffn(y, b if mm else {k.replace("mlp.fc1", "ffn.layers.0.0").replace("mlp.fc2", "ffn.layers.1"): v
                                     for k, v in b.items()})
        if stage == 0:
            x = F.linear(norm(merged(x), part(w, "downsample."), "norm", 1e-5), w["downsample.reduction.weight"])
    return norm(x, state, "norm3" if mm else "norm", 1e-5).mean((1, 2))


def unfolded(x):  # mmcv's: nn.Unfold on B x C x H x W
    b, side, _, c = x.shape
    return F.unfold(x.permute(0, 3, 1, 2), 2, stride=2).transpose(1, 2).reshape(b, side // 2, side // 2, 4 * c)


def concatenated(x):  # the official Swin's
    return torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)


@pytest.mark.parametrize("names, merged, prefix", [("mm", unfolded, "backbone."), ("off", concatenated, "encoder.")])
def test_swins_merge_patches_in_their_own_order_and_place(names, merged, prefix, tmp_path):
    numbers = {"depths": (1, 1), "num_heads": (4, 8), "window_size": 4}
    ours = build("swin_base_patch4_window7_224", 32, **numbers).state_dict()
    rename = mm_swin_name if names == "mm" else official_swin_name
    state = {rename(name): torch.randn_like(tensor) * 0.3 for name, tensor in ours.items()}
    stages = "stages" if names == "mm" else "layers"
    extra = {"mask_token": ONE, f"{stages}.0.blocks.0.attn.relative_position_index": ONE}
    torch.save({"model": below(prefix, state | extra) | {"decoder.0.weight": ONE}}, tmp_path / "x.pth")
    backbone, match = zoo.load(tmp_path / "x.pth", "swin_base_patch4_window7_224", 32, **numbers)
    images = torch.randn(2, 3, 32, 32)
    close(features(backbone, images), swin(state, images, names, merged))
    assert len(match.changed) == (3 if names == "mm" else 0)
    assert "layers.1.downsample.reduction.weight" in match.renamed
    assert match.renamed["layers.1.downsample.norm.bias"].endswith(".0.downsample.norm.bias")


def test_positions_are_the_files_own(tmp_path):
    """MAE's official table says the column first, MoCo v3's the row; a table made anew would be one of them."""
    vit = build("vit_tiny_patch16_224", 64, depth=1)
    tables = {first: sincos_position(4, 192, first) for first in ("column", "row")}
    assert not torch.equal(tables["column"], tables["row"])
    for first, table in tables.items():
        torch.save({"model": vit.state_dict() | {"pos_embed": table}}, tmp_path / f"{first}.pth")
        backbone, match = zoo.load(tmp_path / f"{first}.pth")
        assert torch.equal(backbone.pos_embed, table) and match.size == 64
    smaller, match = zoo.load(tmp_path / "row.pth", size=32)
    assert smaller.pos_embed.shape == (1, 5, 192) and match.changed == {"pos_embed": "resampled from 64 to 32 px"}


@pytest.mark.parametrize("layout", [*(f"{kind} of OpenMMLab 0.x or OpenMixup" for kind in MM), *list(OFFICIAL)[:4]])
def test_the_first_of_two_encoders_is_taken(layout, tmp_path):
    resnet = build("resnet18", 224)
    for alias in (True, False):
        file = published(layout, resnet.state_dict())
        if not alias:  # without OpenMMLab's second name for the same tensors
            file["state_dict"] = {k: v for k, v in file["state_dict"].items() if not k.startswith("backbone.")}
        torch.save(file, tmp_path / "x.pth")
        backbone, match = zoo.load(tmp_path / "x.pth")
        assert match.backbone == "resnet18" and len(match.taken) >= 100
        assert torch.equal(backbone.layer4[1].conv2.weight, resnet.layer4[1].conv2.weight)
        assert torch.equal(backbone.bn1.running_var, resnet.bn1.running_var)


def test_tables_of_positions_shared_or_in_every_block(tmp_path):
    shared = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "depth": 2}
    beit = build("beit_base_patch16_224", 32, **shared)
    beit.rel_pos_bias.relative_position_bias_table.data.normal_()
    file = below("encoder.", beit.state_dict()) | {"decoder.0.weight": ONE, "encoder.mask_token": ONE,
                                                    "encoder.rel_pos_bias.relative_position_index": ONE}
    torch.save({"model": file}, tmp_path / "x.pth")
    images = torch.randn(2, 3, 32, 32)
    same, match = zoo.load(tmp_path / "x.pth")
    assert match.numbers["use_shared_rel_pos_bias"] and not match.changed and match.size == 32
    each, match = zoo.load(tmp_path / "x.pth", "beit_base_patch16_224", depth=2, use_rel_pos_bias=True,
                           use_shared_rel_pos_bias=False)
    assert len(match.changed) == 2 and "a copy for each" in str(match)
    for loaded in (same, each):
        close(features(loaded, images), features(beit.eval(), images))


def test_sobel_stems_small_stems_lightly_dino_and_solo(tmp_path):
    sobel = build("resnet18", 224, sobel=True)
    torch.save(sobel.state_dict(), tmp_path / "a.pth")
    assert zoo.network(tmp_path / "a.pth") == ("resnet18", {"sobel": True}, 224)
    with pytest.raises(InputError, match="give sobel=True"):
        zoo.load(tmp_path / "a.pth", "resnet18", sobel=False)
    small = build("resnet18", 32)
    modules = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    images = torch.randn(2, 3, 32, 32)
    numbers = {True: dict(zip(modules, "014567", strict=True)), False: dict(zip(modules, "012345", strict=True))}
    for torchvision in (True, False):
        state = {".".join([numbers[torchvision][name.split(".")[0]], *name.split(".")[1:]]): tensor
                 for name, tensor in small.state_dict().items()}
        if not torchvision:  # lightly's own ResNets
            state = {name.replace("downsample", "shortcut"): tensor for name, tensor in state.items()}
        torch.save({"state_dict": below("backbone.", state) | {"projection_head.layers.0.weight": ONE}},
                   tmp_path / "b.ckpt")
        loaded, match = zoo.load(tmp_path / "b.ckpt")
        assert match.layout == "lightly" and match.size == 32
        close(features(loaded, images), features(small.eval(), images))
    torch.save({"state_dict": below("backbone.", small.state_dict()) | {"classifier.weight": ONE}
                | below("momentum_backbone.", {k: v + 1 for k, v in small.state_dict().items()})}, tmp_path / "c.ckpt")
    loaded, match = zoo.load(tmp_path / "c.ckpt", size=48)
    assert match.layout == "solo-learn" and loaded.pretrained_cfg["input_size"] == (3, 48, 48)
    close(features(loaded, images), features(small.eval(), images))
    vit = build("vit_tiny_patch16_224", 32, depth=1)
    torch.save({"student": below("module.backbone.", {k: v + 1 for k, v in vit.state_dict().items()}), "epoch": 1,
                "teacher": below("backbone.", vit.state_dict()) | {"head.mlp.0.weight": ONE}}, tmp_path / "d.pth")
    close(features(zoo.load(tmp_path / "d.pth")[0], images), features(vit.eval(), images))
    state = vit.state_dict()
    for what in ("weight", "bias"):
        three = state.pop(f"blocks.0.attn.qkv.{what}").chunk(3)
        state |= {f"blocks.0.attn.{letter}.{what}": part for letter, part in zip("qkv", three, strict=True)}
    torch.save(published("MaskFeat of SlowFast", state), tmp_path / "e.pyth")
    loaded, match = zoo.load(tmp_path / "e.pyth")
    assert set(match.changed.values()) == {"query, key and value joined"}
    close(features(loaded, images), features(vit.eval(), images))


@pytest.mark.parametrize("name, size", [("vit_mini", 32), ("beit_mini", 28), ("swin_mini", 20), ("swin_mini", 28)])
def test_a_file_of_a_network_of_ours_says_its_size_itself(name, size, tmp_path):
    """No shape tells the heads of such a width, so the name must be given; the size need not be."""
    from sslnb.evaluate.sources import open_source

    path, ours = tmp_path / "x.pth", build(name, size).eval()
    torch.save(ours.state_dict(), path)
    images = torch.randn(2, 3, size, size)
    for asked in (None, size):
        backbone, match = zoo.load(path, name, asked)
        assert match.size == size and not match.changed
        close(features(backbone, images), features(ours, images))
    larger, match = zoo.load(path, name, size + 4)
    assert features(larger, torch.randn(2, 3, size + 4, size + 4)).shape == (2, 64)
    assert all("resampled" in change for change in match.changed.values())
    assert open_source(path, 0, name).size == size
    with pytest.raises(InputError, match="give `backbone`"):
        zoo.load(path)


def test_a_swin_v2_is_loaded_by_its_name(tmp_path):
    name, path = "swinv2_tiny_window8_256", tmp_path / "x.pth"
    torch.save(shapes(name, 256, ()), path)
    with pytest.raises(InputError, match="a Swin V2, whose windows and size are in no shape: .* 'swinv2_tiny_window8"):
        zoo.load(path)
    with torch.device("meta"):
        assert zoo.load(path, name)[1].size == zoo.network(path, name)[2] == 256, "that of timm's weights"
        assert zoo.load(path, name, 128)[0].patch_embed.grid_size == (32, 32)
    numbers = {"depths": (1, 1), "num_heads": (3, 6)}
    ours = build(name, 64, **numbers).eval()
    file = {official_swin_name(key): tensor for key, tensor in ours.state_dict().items()}
    buffers = dict.fromkeys(("relative_coords_table", "relative_position_index"), ONE)
    torch.save({"model": file | below("layers.0.blocks.0.attn.", buffers) | {"head.weight": ONE}}, path)
    backbone, match = zoo.load(path, name, 64, **numbers)
    assert len(match.leftover) == 3
    close(features(backbone, torch.ones(1, 3, 64, 64)), features(ours, torch.ones(1, 3, 64, 64)))


def test_patches_that_overlap_tell_no_size(tmp_path):
    """Hiera's kernels are 7 px wide and 4 apart, so its 56 x 56 positions are of 224 px and not of 392."""
    torch.save(shapes("hiera_tiny_224", 224, ()), tmp_path / "x.pth")
    assert zoo.network(tmp_path / "x.pth", "hiera_tiny_224")[2] == 224


def test_register_tokens_are_not_lost(tmp_path):
    """DINOv2's own files and timm's keep them in two ways; timm's conversion is the judge of ours."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    bare, right, path = "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", tmp_path / "x.pth"
    official = {name: torch.randn_like(tensor) for name, tensor in build(bare, 56, depth=1).state_dict().items()}
    official |= {"register_tokens": torch.randn(1, 4, 384), "mask_token": torch.zeros(1, 384)}
    ours = build(right, 56, depth=1).eval()
    ours.load_state_dict(checkpoint_filter_fn(dict(official), ours))
    images = torch.randn(2, 3, 56, 56)
    for file, name in ((official, "register_tokens"), (ours.state_dict(), "reg_token")):
        torch.save(below("backbone.", file), path)
        with pytest.raises(InputError, match=rf"has register tokens \({name}\), and {bare} has no .*, such as {right}"):
            zoo.load(path, bare, depth=1)
        with pytest.raises(InputError, match=f"with register tokens: give `backbone`, a timm name such as '{right}'"):
            zoo.load(path)
        backbone, match = zoo.load(path, right, depth=1)
        assert match.size == 56 and match.leftover == ["backbone.mask_token"] * (file is official)
        close(features(backbone, images), features(ours, images))
        smaller, _ = zoo.load(path, right, 28, depth=1)  # only places have positions in timm's, and all of them move
        grid = F.interpolate(ours.pos_embed.unflatten(1, (4, 4)).permute(0, 3, 1, 2), (2, 2), mode="bicubic",
                             antialias=True)
        close(smaller.pos_embed, grid.flatten(2).transpose(1, 2))


def test_tensors_beside_a_wrapper_are_not_the_state_dict(tmp_path):
    """torchvision's and MoCo's training scripts save the best accuracies as tensors, on the level of the wrapper."""
    resnet = build("resnet18", 224)
    scores = {"best_acc1": torch.tensor(71.0), "best_acc5": torch.tensor(90.0), "epoch": 3, "model": {"lr": 0.1}}
    torch.save({**scores, "state_dict": below("module.encoder_q.", resnet.state_dict())}, tmp_path / "x.pth")
    backbone, match = zoo.load(tmp_path / "x.pth")
    assert torch.equal(backbone.conv1.weight, resnet.conv1.weight) and not match.leftover
    torch.save({**resnet.state_dict(), "model": {"lr": 0.1, "mean": torch.zeros(3)}}, tmp_path / "y.pth")
    assert zoo.load(tmp_path / "y.pth")[1].backbone == "resnet18", "a state dict with something about it"


# ---------------------------------------------------------------- BYOL's JAX file


class FlatMapping(dict):
    """By this name in haiku's module; its pickle calls the class with a plain dict."""

    def __reduce__(self):
        return FlatMapping, (dict(self),)


class _ByolExperimentState(NamedTuple):
    online_params: object
    target_params: object
    online_state: object
    target_state: object
    opt_state: object = ()


class Dill(pickle.Pickler):
    """Says three things in dill's words: a class of named tuples, a module, a function in it. (Files that dill 0.3.1.1,
    0.3.2 and 0.3.8 themselves wrote were read when this was written.)"""

    def reducer_override(self, obj):
        if obj is _ByolExperimentState:
            return _create_namedtuple, (obj.__name__, obj._fields, obj.__module__)
        if isinstance(obj, ModuleName):
            return _import_module, (obj.name,)
        if obj is np._core.multiarray._reconstruct:
            return _get_attr, (ModuleName("numpy.core._multiarray_umath"), "_reconstruct")
        return NotImplemented


class ModuleName:
    def __init__(self, name):
        self.name = name


def _create_namedtuple(*_): ...
def _import_module(*_): ...
def _get_attr(*_): ...


def pickled(path, found, monkeypatch, pickler=pickle.Pickler):
    """A pickle whose classes say that they are of haiku and byol, which are not installed when it is read."""
    pair = types.SimpleNamespace(FlatMapping=FlatMapping, _ByolExperimentState=_ByolExperimentState)
    names = ("haiku", "haiku._src", "haiku._src.data_structures", "byol", "byol.byol_experiment", "dill", "dill._dill")
    for word in (_create_namedtuple, _import_module, _get_attr):
        setattr(pair, word.__name__, word)
        monkeypatch.setattr(word, "__module__", "dill._dill")
    for name in names:
        monkeypatch.setitem(sys.modules, name, pair)
    monkeypatch.setattr(FlatMapping, "__module__", "haiku._src.data_structures")
    monkeypatch.setattr(_ByolExperimentState, "__module__", "byol.byol_experiment")
    with open(path, "wb") as file:
        pickler(file, protocol=2 if pickler is Dill else 4).dump(found)
    for name in names:
        monkeypatch.delitem(sys.modules, name)


def haiku_tree(scale):
    """Parameters and statistics of a ResNet-50 by Haiku's names: BatchNorm vectors are 1 x 1 x 1 x C, kernels HWIO."""
    rng, params, stats = np.random.default_rng(0), {}, {}

    def conv(name, side, into, out):
        params[name] = {"w": (scale * rng.normal(size=(side, side, into, out)) / side).astype("f4")}

    def norm(name, width):
        params[name] = {"scale": rng.normal(size=(1, 1, 1, width)).astype("f4") * scale,
                        "offset": rng.normal(size=(1, 1, 1, width)).astype("f4") * scale}
        for kind in ("mean_ema", "var_ema"):
            average = np.abs(rng.normal(size=(1, 1, 1, width))).astype("f4") * scale
            stats[f"{name}/~/{kind}"] = {"hidden": average * 0.9, "average": average, "counter": np.array(3)}

    conv("res_net50/~/initial_conv", 7, 3, 64)
    norm("res_net50/~/initial_batchnorm", 64)
    into = 64
    for group, (count, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for block in range(count):
            at = f"res_net50/~/block_group_{group}/~/block_{block}/~/"
            if block == 0:
                conv(f"{at}shortcut_conv", 1, into, 4 * width)
                norm(f"{at}shortcut_batchnorm", 4 * width)
            for i, (side, a, b) in enumerate(((1, into, width), (3, width, width), (1, width, 4 * width))):
                conv(f"{at}conv_{i}", side, a, b)
                norm(f"{at}batchnorm_{i}", b)
            into = 4 * width
    params["projector/~/linear"] = {"w": np.zeros((2048, 4), "f4"), "b": np.zeros(4, "f4")}
    return params, stats


@pytest.mark.parametrize("pickler", [pickle.Pickler, Dill])
def test_byols_file_fills_a_resnet_without_jax(pickler, home, monkeypatch):
    params, stats = haiku_tree(1)
    target = {name: {key: value + 1 for key, value in group.items()} for name, group in params.items()}
    as_haiku = [FlatMapping({name: FlatMapping(group) for name, group in tree.items()})
                for tree in (params, target, stats, stats)]
    pickled(home / "pretrain_res50x1.pkl", {"experiment_state": _ByolExperimentState(*as_haiku), "step": 5,
                                            "rng": np.zeros(2, "u4")}, monkeypatch, pickler)
    backbone, match = zoo.load("byol_resnet50_1000ep")
    state = backbone.state_dict()
    assert len(match.taken) == 265 and match.leftover == ["projector/~/linear/w", "projector/~/linear/b"]
    assert "JAX's padding" in str(match)
    at = "res_net50/~/block_group_2/~/block_4/~/"
    kernel = params[f"{at}conv_1"]["w"]
    for o, i, y, x in ((0, 0, 0, 0), (7, 200, 2, 1), (255, 3, 0, 2)):
        assert state["layer3.4.conv2.weight"][o, i, y, x] == kernel[y, x, i, o]
    assert state["layer3.4.bn3.weight"].tolist() == params[f"{at}batchnorm_2"]["scale"].ravel().tolist()
    assert (state["layer3.4.bn3.running_var"].tolist()
            == stats[f"{at}batchnorm_2/~/var_ema"]["average"].ravel().tolist())
    down = "res_net50/~/block_group_3/~/block_0/~/shortcut_"
    assert state["layer4.0.downsample.1.bias"].tolist() == params[f"{down}batchnorm"]["offset"].ravel().tolist()
    assert state["layer4.0.downsample.0.weight"][5, 9, 0, 0] == params[f"{down}conv"]["w"][0, 0, 9, 5]


# ---------------------------------------------------------------- nothing in a file is executed


class Evil:
    """Unpickling it in good faith runs a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class EvilWords(Evil):
    def __reduce__(self):
        return eval, (f"open({str(self.marker)!r}, 'w').close()",)


class EvilDill(Dill):
    """Asks for the command as the attribute of a module, which a reader that looks attributes up would hand out."""

    def reducer_override(self, obj):
        return (_get_attr, (ModuleName("os"), "system")) if obj is os.system else super().reducer_override(obj)


@pytest.mark.parametrize("kind", [Evil, EvilWords])
@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: {"state_dict": {"conv1.weight": ONE, "x": e}},
                                  lambda e: {"meta": e, "state_dict": {"conv1.weight": ONE}},
                                  lambda e: {"state_dict": {"conv1.weight": [np.array([e], dtype=object)]}}])
def test_a_command_in_a_pickle_does_not_run(kind, wrap, tmp_path):
    marker = tmp_path / "ran"
    pickle.loads(pickle.dumps(kind(tmp_path / "proof")))
    assert (tmp_path / "proof").exists(), "the command works where pickle is trusted"
    for suffix in ("pth", "pkl"):
        file = tmp_path / f"evil.{suffix}"
        if suffix == "pth":
            torch.save(wrap(kind(marker)), file)
        else:
            file.write_bytes(pickle.dumps(wrap(kind(marker))))
        with pytest.raises(InputError) as said:
            zoo.load(file, "resnet18")
        assert not marker.exists() and str(said.value).count("\n") == 0


def test_commands_deep_in_byols_containers_do_not_run(tmp_path, monkeypatch):
    marker = tmp_path / "ran"
    for pickler in (pickle.Pickler, Dill, EvilDill):
        nested = FlatMapping({"a": [Evil(marker)]})
        for found in (FlatMapping({"a/b": Evil(marker)}), _ByolExperimentState(0, 0, nested, 0)):
            pickled(tmp_path / "evil.pkl", {"experiment_state": found}, monkeypatch, pickler)
            with pytest.raises(InputError, match=r"asks for (posix|os)\.system"):
                zoo.load(tmp_path / "evil.pkl")
            assert not marker.exists()
    inner = pickle.dumps(Evil(marker))
    for call in ((np._core.multiarray.scalar, (np.dtype(object), inner)), (eval, ("1",))):
        hidden = type("Hidden", (), {"__reduce__": lambda self, call=call: call})
        monkeypatch.setattr(sys.modules[__name__], "Hidden", hidden, raising=False)
        hidden.__module__, hidden.__qualname__ = __name__, "Hidden"
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"w": hidden()}))
        with pytest.raises(InputError, match="asks for"):
            zoo.load(tmp_path / "evil.pkl")
    assert not marker.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_openmmlabs_logs_are_swallowed_without_openmmlab(zipped, tmp_path, monkeypatch):
    """A HistoryBuffer as mmengine pickles it: arrays, and its own methods, which pickle writes as getattr; and a
    dictionary of a kind of its own, as yacs has. (Those of mmengine 0.10.7, yacs 0.1.8, omegaconf 2.4.0 and addict
    2.4.0 themselves were read in the same way when this was written.)"""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self):
            self._log_history, self._max_length = np.array([1.5, 2.5]), 10

        def mean(self):
            raise AssertionError("called")

        def __getstate__(self):
            return {**self.__dict__, "statistics_methods": {"mean": HistoryBuffer.mean}}

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = module.__name__, "HistoryBuffer.mean"
    module.HistoryBuffer = HistoryBuffer
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    names = ("mmengine", "mmengine.logging", module.__name__, "yacs", "yacs.config")
    for name in names:
        monkeypatch.setitem(sys.modules, name, module)
    config = module.CfgNode(A=module.CfgNode(B=1))
    config.__dict__["__immutable__"] = True
    resnet = build("resnet18", 224)
    torch.save({"meta": {"epoch": 3, "cfg": "text"}, "state_dict": below("backbone.", resnet.state_dict()),
                "message_hub": {"log_scalars": {"train/loss": HistoryBuffer()}}, "lr": np.float64(0.1),
                "args": Namespace(lr=0.1), "config": config},
               tmp_path / "mm.pth", _use_new_zipfile_serialization=zipped)
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    backbone, match = zoo.load(tmp_path / "mm.pth")
    assert torch.equal(backbone.conv1.weight, resnet.conv1.weight) and match.backbone == "resnet18"


# ---------------------------------------------------------------- one sentence for what is wrong


def resnet_file(path, name="resnet18", **more):
    torch.save(build(name, 224).state_dict() | more, path)
    return path


@pytest.mark.parametrize("make, words", [
    (lambda p: p.write_bytes(b""), "is empty"),
    (lambda p: p.write_text("<!DOCTYPE html><html>Sign in</html>"), "is a web page and no weights"),
    (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1"), "Git LFS pointer"),
    (lambda p: p.write_bytes(resnet_file(p).read_bytes()[:100_000]), "truncated or damaged"),
    (lambda p: p.write_bytes(pickle.dumps({"a": 1})[:-3]), "no file of weights|truncated|damaged"),
    (lambda p: torch.save([1, 2], p), "no state dict in it"),
    (lambda p: torch.save({"stem.0.kernel": ONE}, p), r"layout is unknown here: of which network are stem.0.kernel"),
    (lambda p: torch.save({"conv1.weight": ONE, "layer1.0.conv1.weight": ONE, "layer1.0.conv2.weight": ONE}, p),
     "a ResNet of 1-0-0-0 blocks"),
    (lambda p: resnet_file(p, **{"layer1.2.conv1.weight": ONE}), "a ResNet of 3-2-2-2 blocks"),
])
def test_what_cannot_be_loaded_says_so_in_one_sentence(make, words, tmp_path):
    path = tmp_path / "file.pth"
    make(path)
    with pytest.raises(InputError, match=words) as said:
        zoo.load(path)
    assert "\n" not in str(said.value) and str(path) in str(said.value)


def test_a_part_of_a_larger_network_is_not_loaded(tmp_path):
    path = resnet_file(tmp_path / "r34.pth", "resnet34")
    with pytest.raises(InputError, match="larger network than resnet18: .* lost, such as layer1.2"):
        zoo.load(path, "resnet18")
    with pytest.raises(InputError, match="does not f(it|ill) resnet50"):
        zoo.load(path, "resnet50")
    beit = build("beit_base_patch16_224", 32, depth=1, use_abs_pos_emb=True)
    torch.save(beit.state_dict(), tmp_path / "beit.pth")
    with pytest.raises(InputError, match="larger network .* pos_embed"):  # its positions would be forgotten
        zoo.load(tmp_path / "beit.pth", "beit_base_patch16_224", 32, depth=1, use_abs_pos_emb=False)
    with pytest.raises(InputError, match="neither a file nor the name .* did you mean moco_v2_800ep"):
        zoo.load("moco_v2_80ep")
    with pytest.raises(InputError, match=r"There is no file and no run 'runs/moco_v2'; give one that is there"):
        zoo.load("runs/moco_v2")
    with pytest.raises(InputError, match="is not read here: A ResNet-200 of twice the width.*storage.googleapis"):
        zoo.load("byol_resnet200x2_1000ep")


# ---------------------------------------------------------------- fetching


class Server(http.server.BaseHTTPRequestHandler):
    content, ranges, html, short, asked = b"", True, False, 0, []

    def do_GET(self):
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(start[1]) if start and self.ranges else 0
        type(self).asked.append(start)
        if start >= len(self.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(self.content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "text/html" if self.html else "application/octet-stream")
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start:len(self.content) - self.short])

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A row of the zoo whose file a server here has: (row's name, the server's settings, where the file comes to)."""
    content = resnet_file(tmp_path / "origin.pth").read_bytes()
    kind = type("Here", (Server,), {"content": content, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    row = replace(MODELS["moco_v2_800ep"], name="here", backbone="resnet18", file="here.pth", layout="plain names",
                  url=f"http://127.0.0.1:{server.server_port}/here.pth",
                  checksum=f"sha256:{hashlib.sha256(content).hexdigest()[:8]}")
    monkeypatch.setitem(MODELS, "here", row)
    yield kind, download.folder() / "here.pth"
    server.shutdown()
    server.server_close()


def test_a_file_is_fetched_once_and_continued_where_it_broke_off(served):
    server, path = served
    server.short = 1000
    with pytest.raises(InputError, match=r"cut off after .* bytes are kept and the same call continues"):
        zoo.load("here")
    kept = len(server.content) - 1000
    assert path.with_name("here.pth.part").stat().st_size == kept and not path.exists()
    server.short = 0
    backbone, match = zoo.load("here")
    assert server.asked == [0, kept] and path.read_bytes() == server.content and not list(path.parent.glob("*.part"))
    assert match.backbone == "resnet18" and len(match.taken) == 120
    zoo.load("here")
    assert len(server.asked) == 2, "it is here already"


@pytest.mark.parametrize("part", [b"whole", b"too long", b"no ranges"])
def test_what_an_earlier_call_left_is_used_or_thrown_away(served, part):
    server, path = served
    left = {b"whole": server.content, b"too long": server.content + b"x", b"no ranges": server.content[:50]}[part]
    server.ranges = part != b"no ranges"
    path.with_name("here.pth.part").write_bytes(left)
    if part == b"too long":
        with pytest.raises(InputError, match="thrown away"):
            zoo.load("here")
    zoo.load("here")
    assert path.read_bytes() == server.content


def test_a_file_that_is_another_one_is_not_taken(served):
    server, path = served
    whole, server.content = server.content, server.content[:-1] + b"?"
    with pytest.raises(InputError, match="sha256 begins with .* should begin with .*; the next call begins anew"):
        zoo.load("here")
    assert not list(path.parent.iterdir())
    server.content, server.html = whole, True
    with pytest.raises(InputError, match="the answer was a web page"):
        zoo.load("here")
    path.write_bytes(whole[:-1] + b"?")  # put there by hand
    for source in ("here", path):
        with pytest.raises(InputError, match="damaged or another file: .*; remove it and fetch it again"):
            zoo.load(source)
    path.write_bytes(whole)
    assert len(zoo.load("here")[1].taken) == len(zoo.load(path)[1].taken) == 120, "by hand is as good"


def test_without_a_network_the_sentence_has_the_address_and_the_path(home, monkeypatch):
    monkeypatch.setitem(MODELS, "gone", replace(MODELS["moco_v2_800ep"], url="http://127.0.0.1:9/x.pth", file="x.pth"))
    with pytest.raises(InputError, match=f"fetch http://127.0.0.1:9/x.pth elsewhere and save it as {home}/x.pth"):
        zoo.load("gone")
    with pytest.raises(InputError, match="a page for people; fetch https://drive.google.com"):
        zoo.load("simmim_vit_base_800ep")


# ---------------------------------------------------------------- our own runs, sources, and the sanity score


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from sslnb import pretrain

    recipe = methods.recipes("simclr")["demo"].with_(epochs=2, batch=32, data="digits_scattered", fraction=0.1)
    return pretrain(recipe, out=tmp_path_factory.mktemp("zoo") / "run", resume=False)


def test_our_own_runs_and_exports_say_themselves_what_they_are(run, tmp_path):
    images = torch.randn(2, 3, 20, 20)
    exported = run.export(tmp_path / "out")
    for source in (run.path, run.path / "backbone.safetensors", exported, exported / "model.safetensors",
                   run.checkpoints()[-1]):
        backbone, match = zoo.load(source)
        assert (match.backbone, match.size) == ("resnet_mini", 20)
        assert bool(match.leftover) == (source == run.checkpoints()[-1]), "which has the heads, too"
        close(features(backbone, images), features(run.backbone(), images))


def test_a_source_may_be_a_file_without_a_name_or_a_name_of_the_zoo(served, capsys, monkeypatch):
    from sslnb.evaluate import train_protocol
    from sslnb.evaluate.sources import open_source

    server, path = served
    for source in ("here", path):
        opened = open_source(source, seed=3)
        assert (opened.architecture, opened.size) == ("resnet18", 224)
        backbone = opened.backbone(48)
        assert torch.equal(backbone.conv1.weight, torch.load(path)["conv1.weight"]) and backbone.conv1.stride == (2, 2)
        assert "120 tensors of the backbone come from the file" in capsys.readouterr().out
        fresh = opened.fresh(48)
        assert not torch.equal(fresh.conv1.weight, backbone.conv1.weight)
        assert fresh.conv1.weight.shape == backbone.conv1.weight.shape, "the same stem, whatever the size"
    with pytest.raises(InputError, match=r"resnet18 at 20 px, where conv1.weight has the shape \(64, 3, 3, 3\)"):
        train_protocol("here", "linear_demo", "digits_scattered", path.parent / "run", size=20)
    monkeypatch.setitem(MODELS, "here", replace(MODELS["here"], pool="mean"))
    assert open_source(path, seed=0).pool == open_source("here", seed=0).pool == "mean"


def test_the_sanity_score_is_what_evaluation_measures_and_knows_fresh_weights(run, capsys):
    from sslnb.data import load
    from sslnb.evaluate import collapse
    from sslnb.evaluate.features import extract

    backbone, match = zoo.load(run.path)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    rows = zoo.sanity(backbone, match, count=60, size=28)
    printed = capsys.readouterr().out
    assert list(rows) == ["the file's weights", "fresh weights", "fresh, all branches"]
    bank = load("fashion_small", "train")
    bank = bank.subset(torch.randperm(len(bank), generator=torch.Generator().manual_seed(0))[:60].tolist())
    x = extract(backbone, bank, size=28).x
    ours = rows["the file's weights"]
    assert ours["effective_rank"] == pytest.approx(collapse.effective_rank(x), rel=1e-4)
    assert ours["feature_std"] == pytest.approx(collapse.feature_std(x), rel=1e-4) and ours["dimensions"] == 64
    assert f"kNN {ours['knn']:.1f} %" in printed
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert backbone.pretrained_cfg["input_size"] == (3, 20, 20) and backbone.layer1[0].conv1.weight.requires_grad
    torch.manual_seed(1)
    zoo.sanity(build("resnet_mini", 20).eval(), match, count=60, size=20)
    assert "not clearly better than fresh ones" in capsys.readouterr().out
    with torch.no_grad():
        backbone.layer2[0].bn2.weight.zero_(), backbone.layer2[0].downsample[-1].weight.zero_()
        backbone.layer2[0].bn2.bias.fill_(1), backbone.layer2[0].downsample[-1].bias.fill_(1)
    zoo.sanity(backbone, match, count=60, size=20)
    assert "map all images to (nearly) one point" in capsys.readouterr().out


@pytest.mark.parametrize("knn, words", [(60.0, "kNN is 17.0 ± 8.0 points higher on clothes"),
                                        (44.0, "not clearly better"), (float("nan"), "not finite")])
def test_the_better_of_two_fresh_networks_has_to_be_beaten(knn, words):
    """Fresh ResNet-50s as timm builds them: 43 %, with all branches: 25 %. 2·√((60·40 + 43·57) / 300 images) = 8.0"""
    file, fresh, branches = ({"knn": value, "feature_std": 1.0} for value in (knn, 43.0, 25.0))
    assert words in _verdict(file, fresh, branches, n=300, data="clothes", point=0.1)
