"""Fine-tuning on few labels: nine settings, chosen without the test images, the best one trained on all labels."""

import json
import math

import pytest
import torch

from sslnb import Run, data
from sslnb.errors import InputError
from sslnb.evaluate import semi_supervised
from sslnb.evaluate.semi import HEAD_LRS, LRS, SEMI

SHORT = {"steps": 6, "milestones": (4, 5), "batch": 8}


@pytest.fixture(scope="module")
def row(source, tmp_path_factory):
    return semi_supervised(source, "semi_demo", out=tmp_path_factory.mktemp("semi") / "run", lrs=(0.001, 0.01),
                           head_lrs=(1.0, 10.0), **SHORT)


@pytest.mark.parametrize("name, decay, fraction", [("semi_1", 5e-4, 0.01), ("semi_10", 1e-4, 0.1)])
def test_the_recipes_are_the_zoos(name, decay, fraction):
    r = SEMI[name]
    assert (r.total_batch, r.weight_decay, r.fraction, r.epochs, r.size) == (256, decay, fraction, 20, 224)
    assert [r.lr_at(e * 50, 50) / r.lr for e in (0, 11, 12, 16, 19)] == pytest.approx([1, 1, 0.2, 0.04, 0.04])
    assert LRS == (0.001, 0.01, 0.1) and HEAD_LRS == (1, 10, 100)
    with torch.device("meta"):
        method = r.build().train()
        backbone, head = r.with_(head_lr=100.0).build().param_groups(r)
    assert all(m.training for m in method.backbone.modules())
    assert all(p.requires_grad for p in method.parameters()) and method.sync_bn and method.deterministic
    assert method.test_every == 0, "tested once: the best epoch would be chosen on the test images"
    assert head["lr_scale"] == 100 and "lr_scale" not in backbone and backbone["weight_decay"] == decay


def test_every_setting_is_compared_on_images_that_it_was_not_trained_on(source, row):
    settings = row["settings"]
    assert [(s["lr"], s["head_lr"]) for s in settings] == [(a, b) for a in (0.001, 0.01) for b in (1.0, 10.0)]
    chosen = max(settings, key=lambda s: s["held_out"])
    assert (row["lr"], row["head_lr"], row["held_out"]) == (chosen["lr"], chosen["head_lr"], chosen["held_out"])
    run = Run.open(row["run"])
    tried = Run.open(run.path / f"lr{row['lr']:g}_head{row['head_lr']:g}")
    assert tried.recipe.numbers["test_on"] == "held out" and tried.recipe.hold_out == 0.2
    fit, held = tried.recipe.load(), tried.recipe.load("held out")
    assert len(fit) + len(held) == 130 and tried.history("test")[-1]["n"] == len(held)
    assert run.recipe.hold_out == 0 and len(run.recipe.load()) == 130 == row["labels"]
    assert run.history("test")[-1]["n"] == 497 == row["n"], "the test images, once"
    assert len(run.history("test")) == 1


def test_the_row_names_the_protocol_and_what_was_changed_of_it(source, row):
    assert row["protocol"] == ("semi_demo, with steps 6, milestones (4, 5), batch 8, lrs (0.001, 0.01), head_lrs "
                               "(1.0, 10.0)") and row["fraction"] == 0.1
    for folder in (source.path, Run.open(row["run"]).path):
        assert json.loads((folder / "results.jsonl").read_text().splitlines()[-1]) == json.loads(json.dumps(row))


def test_the_same_call_again_trains_nothing(source, row, capsys):
    again = semi_supervised(source, "semi_demo", out=row["run"], lrs=(0.001, 0.01), head_lrs=(1.0, 10.0), **SHORT)
    printed = capsys.readouterr().out
    assert printed.count("is finished already") == 1 and printed.count("% of the held-out images") == 4
    trials = [Run.open(Run.open(row["run"]).path / f"lr{s['lr']:g}_head{s['head_lr']:g}") for s in row["settings"]]
    assert all(len(trial.provenance()) == 1 for trial in trials), "none was started again"
    assert again["top1"] == row["top1"] and again["settings"] == row["settings"]


def test_a_published_list_of_images_is_the_fraction(tmp_path, source):
    """The file has a name per line, `class_number.ending`, as 1percent.txt."""
    folder = tmp_path / "images"
    pictures, names = data.load("digits_scattered"), []
    for split in ("train", "val"):
        for c in range(4):
            (folder / split / f"n0{c}").mkdir(parents=True)
    for i in range(300):
        c = int(pictures.labels[i])
        if c < 4:
            name = f"n0{c}_{i}.png"
            pictures[i].save(folder / ("train" if i < 200 else "val") / f"n0{c}" / name)
            names += [name] if i < 200 and len([n for n in names if n.startswith(f"n0{c}")]) < 5 else []
    (tmp_path / "list.txt").write_text("\n".join(names))
    row = semi_supervised(source, "semi_demo", str(folder), tmp_path / "run", lrs=(0.01,), head_lrs=(1.0,),
                          fraction=str(tmp_path / "list.txt"), **SHORT)
    assert row["labels"] == 20 and row["fraction"] == str(tmp_path / "list.txt")
    assert not math.isnan(row["top1"]) and "fraction" not in row["protocol"]


def test_a_missing_list_is_named_before_any_work(tmp_path, source):
    with pytest.raises(InputError, match="1percent.txt cannot be read as a list file"):
        semi_supervised(source, "semi_demo", out=tmp_path / "run", fraction="1percent.txt", **SHORT)
    assert not (tmp_path / "run").exists()


def test_the_semi_supervised_run_that_counts_has_the_callers_seed(source, tmp_path):
    from sslnb.evaluate import semi_supervised

    row = semi_supervised(source, "semi_demo", out=tmp_path / "run", lrs=(0.01,), head_lrs=(1.0,), seed=3, steps=2,
                          milestones=(1,), batch=8)
    tried = Run.open(tmp_path / "run" / "lr0.01_head1")
    assert Run.open(row["run"]).seed == tried.seed == row["seed"] == 3
