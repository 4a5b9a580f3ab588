"""Our weights out, and published results beside measured ones."""

import json
import re
import shutil

import nbformat
import pytest
import timm
import torch
from safetensors.torch import load_file

import sslnb
from sslnb import Run, backbones, methods, pretrain
from sslnb.errors import InputError
from sslnb.evaluate import RECIPES, evaluate, train_protocol
from sslnb.files import append_jsonl
from sslnb.run import code_of
from sslnb.views import IMAGENET_MEAN, IMAGENET_STD
from sslnb.zoo.export import _config, export, push, to_openmmlab
from sslnb.zoo.published import BACKBONES, everything, executed, measured, published, side_by_side


@pytest.fixture(scope="module")
def run(source):
    """A short SimCLR run, evaluated."""
    evaluate(source, protocols=["knn"])
    return source


# ---------------------------------------------------------------- out


def test_timm_loads_an_exported_resnet_and_computes_the_same(tmp_path):
    recipe = methods.recipes("simclr")["demo"].with_(backbone="resnet18", size=72, epochs=1, batch=8, data="few_digits",
                                                     steps=2)
    run = pretrain(recipe, out=tmp_path / "run")
    folder = run.export(openmmlab=True)
    theirs = torch.load(folder / "openmmlab.pth", weights_only=True)["state_dict"]
    assert torch.equal(theirs["backbone.conv1.weight"], run.backbone().conv1.weight)
    assert "timm.create_model('resnet18', num_classes=0, checkpoint_path=" in (folder / "README.md").read_text()
    model = timm.create_model("resnet18", num_classes=0, checkpoint_path=str(folder / "model.safetensors")).eval()
    hub = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    x = torch.rand(2, 3, 72, 72)
    with torch.no_grad():
        assert torch.equal(model(x), run.backbone()(x)) and torch.equal(hub(x), run.backbone()(x))


@pytest.mark.parametrize("method, numbers, size", [("simmim", {"backbone": "beit_mini"}, 28),
                                                   ("mae", {}, 20), ("simmim", {"backbone": "swin_mini"}, 28)])
def test_the_cards_own_line_and_the_hubs_way_give_the_same_network(tmp_path, monkeypatch, method, numbers, size):
    recipe = methods.recipes(method)["demo"].with_(epochs=1, steps=2, data="few_digits", batch=8, size=size, **numbers)
    run = pretrain(recipe, out=tmp_path / "run")
    folder, x = export(run, tmp_path / "out"), torch.rand(2, 3, size, size)
    (line,) = re.findall(r"timm.create_model.*", (folder / "README.md").read_text())
    monkeypatch.chdir(folder)
    with torch.no_grad():
        expected = run.backbone()(x)
        assert torch.equal(eval(line, {"timm": timm}).eval()(x), expected)
        assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()(x), expected)
    cfg = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert (cfg["mean"], cfg["std"]) == (list(IMAGENET_MEAN), list(IMAGENET_STD))
    assert (cfg["input_size"], cfg["crop_pct"], cfg["interpolation"]) == ([3, size, size], 224 / 256, "bicubic")


@pytest.mark.parametrize("size, ours", [(64, True), (65, False)])
def test_up_to_64_px_a_resnet_has_the_small_stem_which_only_we_can_build(size, ours):
    recipe = methods.recipes("simclr")["demo"].with_(backbone="resnet18", size=size)
    backbone = recipe.build().backbone
    assert (backbone.conv1.kernel_size == (3, 3)) == (_config(recipe, backbone).get("library") == "sslnb") == ours
    assert backbone.conv1.weight.std().item() == pytest.approx((2 / backbone.conv1.weight[:, 0].numel()) ** 0.5,
                                                               rel=0.1), "Kaiming's, by what comes out"


def test_timm_loads_an_exported_vit_by_what_its_card_says(tmp_path):
    run = pretrain(methods.recipes("mae")["demo"].with_(epochs=1, steps=2, data="few_digits", batch=8),
                   out=tmp_path / "run")
    folder = export(run, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    model = timm.create_model(config["architecture"], num_classes=0, checkpoint_path=str(folder / "model.safetensors"),
                              **config["model_args"]).eval()
    x = torch.rand(2, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(model(x), run.backbone()(x))


def test_the_card_of_small_images_names_our_builder_and_the_measured_results(run, tmp_path):
    folder = run.export(tmp_path / "out", licence="apache-2.0")
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card and "sslnb.backbones.build('resnet_mini', 20)" in card
    row = run.results()[0]
    assert f"| {row['top1']:.1f} [{row['interval'][0]:.1f}, {row['interval'][1]:.1f}] | 497 | 0 |" in card
    assert "random initialisation" in card and "total batch" in card
    backbone = backbones.build("resnet_mini", 20)
    backbone.load_state_dict(load_file(folder / "model.safetensors"))
    assert json.loads((folder / "recipe.json").read_text()) == run.settings
    with pytest.raises(Exception, match="architecture|pretrained_cfg"):  # timm would keep a pool that we removed
        timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)


def test_a_card_has_no_results_of_half_trained_weights_and_none_twice(copied, tmp_path):
    row = next(r for r in copied.results() if r["source"] == "run")
    append_jsonl(copied.path / "results.jsonl", {**row, "top1": 45.6})
    append_jsonl(copied.path / "results.jsonl", {**row, "top1": 12.3, "step": 3, "total": 6})
    card = (copied.export(tmp_path / "out") / "README.md").read_text()
    assert "12.3" not in card and "| 45.6 [" in card and card.count("| run |") == 1


def test_a_card_has_what_detectors_and_support_vector_machines_reached(copied, tmp_path):
    about = {"source": "run", "data": "VOCdevkit", "seed": 0}
    for row in ({"protocol": "detect_voc_c4", "ap50": 80.0, "ap": 50.0, "ap75": 55.0, "interval": [78.0, 82.0]},
                {"protocol": "detect_coco_c4_1x", "ap50": 60.0, "ap": 40.0, "ap75": 44.0},
                {"protocol": "voc07_svm", "mAP": 70.0, "n": 4952},
                {"protocol": "voc07_low_shot", "mAP": {"1": 20.0}, "n": 4952}):
        append_jsonl(copied.path / "results.jsonl", {**about, **row})
    card = (copied.export(tmp_path / "out") / "README.md").read_text()
    for words in ("detect_voc_c4 | AP50 80.0 [78.0, 82.0] | – |", "detect_coco_c4_1x | AP 40.0 | – |",
                  "voc07_svm | mAP 70.0 | 4,952 |"):
        assert f"| run | VOCdevkit | {words} 0 |" in card, card
    assert "low_shot" not in card, "no number sums a curve up"


def test_a_run_that_is_not_done_does_not_go_out(run, tmp_path):
    from sslnb.checks import prepare

    begun = prepare(methods.recipes("simclr")["demo"], out=tmp_path / "begun")
    with pytest.raises(InputError, match="begun is not started and not done"):
        begun.export()
    assert not (begun.path / "export").exists()


def test_openmmlabs_names():
    with torch.device("meta"):
        resnet, vit, swin = (timm.create_model(m, num_classes=0).state_dict()
                             for m in ("resnet50", "vit_base_patch16_224", "swin_base_patch4_window7_224"))
    assert set(to_openmmlab(resnet)) == {f"backbone.{name}" for name in resnet}
    names = set(to_openmmlab(vit))
    assert len(names) == len(vit) and names >= {
        "backbone.cls_token", "backbone.pos_embed", "backbone.patch_embed.projection.weight", "backbone.ln1.bias",
        "backbone.layers.11.ln2.weight", "backbone.layers.0.attn.qkv.bias", "backbone.layers.3.ffn.layers.0.0.weight",
        "backbone.layers.3.ffn.layers.1.bias", "backbone.layers.3.attn.proj.weight"}
    with pytest.raises(InputError, match="Only ResNets and vision transformers"):
        to_openmmlab(swin)


def test_the_folder_that_is_pushed(run, tmp_path, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo, **settings):
            calls.append((repo, settings))

        def upload_folder(self, folder_path, repo_id):
            calls.append((sorted(p.name for p in folder_path.iterdir()), repo_id))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    with pytest.raises(InputError, match="Only ResNets"):  # its deep stem has no name there
        run.export(tmp_path / "out", openmmlab=True)
    assert not (tmp_path / "out").exists()
    folder = run.export(tmp_path / "out")
    assert push(folder, "me/simclr", private=True) == "https://huggingface.co/me/simclr"
    assert calls == [("me/simclr", {"exist_ok": True, "private": True}),
                     (["README.md", "config.json", "model.safetensors", "recipe.json"], "me/simclr")]
    with pytest.raises(InputError, match="is no exported run: model.safetensors, config.json"):
        push(tmp_path, "me/simclr")
    assert len(calls) == 2


# ---------------------------------------------------------------- published


def test_every_row_of_the_zoos_tables_is_there():
    linear = [p for p in everything() if p.source == "zoo"]
    tuned = [p for p in everything() if p.source.startswith("zoo, weights of")]
    assert len(linear) == 19 and len(tuned) == 26
    assert sum(p.value for p in linear) == pytest.approx(1143.10), "the sum of the seed's column"
    assert sum(p.value for p in tuned) == pytest.approx(2079.6)
    assert {p.protocol for p in linear + tuned} <= set(RECIPES)


def test_recipes_and_table_agree_where_both_state_a_number():
    """A recipe's `published` is a number of the table, with the same epochs."""
    seen = 0
    for method in methods.METHODS:
        for name, recipe in methods.recipes(method).items():
            for value in recipe.published.values():
                rows = published(method=method, value=value)
                seen += 1
                assert any(recipe.epochs == p.epochs or p.flag for p in rows), (method, name, value)
    assert seen > 30


def test_contradictions_are_flagged():
    (torchvision,) = published(method="supervised", protocol="linear_moco", value=76.17)
    assert "74.12" in torchvision.flag
    assert [p.value for p in published(method="supervised", protocol="linear_moco", source="OpenSelfSup")] == [74.12]
    assert all(p.flag for p in published(method="simsiam", source="zoo"))
    assert published(method="byol", source="zoo")[0].flag == ""


def test_filters_and_names():
    assert {p.method for p in published(family="masked", protocol="finetune_simmim_vit")} == {"simmim", "a2mim"}
    assert {p.backbone for p in everything()} == set(BACKBONES)
    assert all(timm.is_model(name) for name in BACKBONES.values())
    ours = {"voc07_svm", "voc07_low_shot", "knn", *RECIPES}
    for p in everything():
        known = p.method in methods.METHODS or p.method in ("supervised", "random")
        assert known == (p.family != "other") and 0 < p.value < 100, p
        assert p.protocol in ours or p.protocol.split(",")[0] in ("knn", "linear", "finetune", "segment_voc12aug"), p
    assert len(published(protocol="linear, cifar10")) == 16 and len(published(protocol="segment_voc12aug")) == 10


# ---------------------------------------------------------------- measured


def test_rows_are_found_with_the_run_that_they_judge(run):
    rows = measured(run.path.parent)
    assert [r["source"] for r in rows if r["source"] == "run"] == ["run"] and len(rows) == 3
    mine = next(r for r in rows if r["source"] == "run")
    assert (mine["method"], mine["epochs"], mine["judged"]) == ("simclr", 1, str(run.path)) and not mine["stale"]
    assert mine["top1"] == run.results()[0]["top1"]
    assert [r["baseline"] for r in rows if r["source"] != "run"] == [True, True] and not mine["baseline"]


def test_a_changed_method_makes_its_numbers_stale(run, tmp_path, monkeypatch):
    assert run.provenance()[0]["code"] == code_of("simclr") != code_of("byol")
    monkeypatch.setattr("sslnb.zoo.published.code_of", lambda method: "another1")
    assert all(row["stale"] for row in measured(run.path))
    assert "stale" in side_by_side(measured(run.path))


@pytest.mark.parametrize("place", ["a probe", "z probe"], ids=["found before its source", "found after it"])
def test_a_row_beside_source_and_probe_comes_once(run, place):
    out = run.path.parent / place
    train_protocol(run, "linear_demo", out=out, epochs=1)
    rows = [r for r in measured(run.path.parent) if r.get("run") == str(out)]
    assert len(rows) == 1 and rows[0]["method"] == "simclr" and Run.open(rows[0]["run"]).recipe.method != "simclr"


@pytest.fixture
def copied(run, tmp_path):
    return Run.open(shutil.copytree(run.path, tmp_path / "run"))


def test_what_was_evaluated_again_counts_once_and_the_newest_counts(copied):
    rows = copied.results()
    append_jsonl(copied.path / "results.jsonl", {**rows[0], "top1": 99.0, "time": "2999-01-01T00:00:00+00:00"})
    again = [r for r in measured(copied.path) if all(r[key] == rows[0][key] for key in ("source", "protocol", "data"))]
    assert [r["top1"] for r in again] == [99.0]


def test_a_run_that_was_not_done_has_the_epochs_that_it_had(copied):
    append_jsonl(copied.path / "results.jsonl", {**copied.results()[0], "data": "other", "step": 3, "total": 6})
    (row,) = [r for r in measured(copied.path) if r["data"] == "other"]
    assert row["epochs"] == 0.5 == copied.recipe.epochs / 2


def test_published_stands_beside_measured_and_seeds_are_counted():
    row = {"method": "byol", "backbone": "resnet50", "epochs": 200, "data": "/data/imagenet",
           "protocol": "linear_simsiam", "stale": False, "baseline": False}
    text = side_by_side([{**row, "top1": 71.0, "trained_seed": 0}, {**row, "top1": 72.0, "trained_seed": 1}])
    (line,) = [line for line in text.splitlines() if line.startswith("byol")]
    assert line.split() == [
        "byol", "resnet50", "200", "imagenet", "linear_simsiam", "71.5", "0", "1", "71.88", "(200", "epochs),",
        "72.93", "(300", "epochs)"]
    for other in ("linear_demo", "linear_simsiam, with epochs 3"):  # a changed protocol is another one
        assert "–" in side_by_side([{**row, "protocol": other, "top1": 1.0, "trained_seed": 0}])
    near = {**row, "protocol": "knn k20 t0.07", "top1": 60.0, "trained_seed": 0}
    assert side_by_side([near, {**near, "top1": 10.0, "baseline": True}]).splitlines()[1].split()[7:] == [
        "60.0", "0", "64.2", "(200", "epochs),", "66.3", "(300", "epochs)"]


def test_runs_of_one_name_and_runs_that_moved_stay_what_they_are(run, tmp_path):
    """Two runs whose directories have one name, evaluated into one folder; a run under another name; another cwd."""
    for place in "ab":
        evaluate(shutil.copytree(run.path, tmp_path / place / "run"), protocols=["knn"], baselines=False,
                 out=tmp_path / "all")
    rows = measured(tmp_path / "all")
    assert sorted(row["judged"] for row in rows) == [str(tmp_path / place / "run") for place in "ab"]
    assert all(row["method"] == "simclr" and not row["baseline"] for row in rows)
    assert side_by_side(rows).count("simclr") == 1, "the same recipe and seed"
    moved = shutil.move(tmp_path / "a" / "run", tmp_path / "a" / "run-first")
    (row,) = [row for row in measured(moved) if row["source"] == "run" and row["protocol"].startswith("knn")]
    assert row["method"] == "simclr" and not row["baseline"]


def test_runs_of_another_recipe_or_backbone_have_lines_of_their_own():
    row = {"method": "mocov3", "backbone": "resnet50", "epochs": 300, "data": "imagenet", "seed": 0, "trained_seed": 0,
           "protocol": "linear_mocov3", "stale": False, "baseline": False, "trained_as": {"lr": 1}}
    text = side_by_side([{**row, "top1": 60.0}, {**row, "top1": 50.0, "trained_as": {"lr": 2}}])
    assert "60.0" in text and "50.0" in text and "73.19" not in text, "those are of a ViT"
    small = side_by_side([{**row, "top1": 60.0, "backbone": "vit_small_patch16_224"}])
    assert "73.19" in small
    heads = {**row, "protocol": "multihead_imagenet", "method": "byol", "feat5": {"top1": 66.0}}
    assert "66.0" in side_by_side([heads], metric="feat5")


def test_a_line_says_the_size_and_that_of_the_published_numbers_where_it_is_another():
    row = {"method": "byol", "backbone": "resnet50", "epochs": 200, "data": "imagenet", "trained_seed": 0,
           "protocol": "knn k20 t0.07", "stale": False, "baseline": False}
    text = side_by_side([{**row, "size": size, "top1": top1} for size, top1 in ((96, 35.0), (224, 40.0))])
    assert [" ".join(line.split()[4:]) for line in text.splitlines()[1:]] == [
        "96 knn k20 t0.07 35.0 0 64.2 (200 epochs), 66.3 (300 epochs), at 224 px",
        "224 knn k20 t0.07 40.0 0 64.2 (200 epochs), 66.3 (300 epochs)"]
    tuned = {**row, "method": "simmim", "backbone": "swin_base_patch4_window7_224", "size": 192, "top1": 80.0}
    assert side_by_side([{**tuned, "protocol": "finetune_simmim_swin_192"}]).endswith("epochs)"), "that is its size"
    assert side_by_side([{**tuned, "protocol": "finetune_simmim_swin_224"}]).endswith("epochs), at 224 px")
    small = side_by_side([{**row, "method": "npid", "backbone": "resnet_mini", "size": 20, "top1": 9.0}])
    assert small.endswith("–") and small.splitlines()[1].split()[4] == "20"


def test_executed_notebooks_name_their_runs(tmp_path):
    shown = nbformat.v4.new_output("stream", text="  precision  fp32\n         run  runs/byol-ep3, seed 0, on CPU\n")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("pretrain()", outputs=[shown])])
    nbformat.write(book, tmp_path / "plain.ipynb")
    book.metadata["papermill"] = {"parameters": {}}
    nbformat.write(book, tmp_path / "out.ipynb")
    assert executed(tmp_path) == {str(tmp_path / "out.ipynb"): ["runs/byol-ep3"]}


def test_a_filtered_network_goes_out_by_our_builder(tmp_path):
    recipe = methods.recipes("deepcluster")["demo"].with_(epochs=1, steps=1, data="few_digits", batch=16, clusters=4)
    run = pretrain(recipe, out=tmp_path / "run")
    card = (run.export() / "README.md").read_text()
    assert json.loads((run.path / "export" / "config.json").read_text())["backbone_numbers"] == {"sobel": True}
    (line,) = re.findall(r"sslnb.backbones.build\(.*\)", card)
    eval(line, {"sslnb": sslnb}).load_state_dict(load_file(run.path / "export" / "model.safetensors"))
