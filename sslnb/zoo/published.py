"""Published results as data, and our own beside them.

assets/published.csv holds every row of the model zoo's linear and fine-tuning tables and those of the repositories that
it stands on, and what other libraries state for small images. `protocol` is the name of ours that a number was measured
with, or says in plain words what it was ("linear", "knn, cifar10"); `flag` says where sources contradict each other.
Nothing in it was measured here. A method that is not in this package has its own name and the family "other".
"""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..embedded import ASSETS
from ..errors import InputError
from ..files import expanded
from ..run import Run, code_of, read_jsonl

BACKBONES = {"ResNet-50": "resnet50", "ViT-Base": "vit_base_patch16_224", "ViT-Small": "vit_small_patch16_224",
             "Swin-Base": "swin_base_patch4_window7_224",
             "ResNet-18": "resnet18", "ViT-Base/32": "vit_base_patch32_224"}
KNN_SIZE = 224  # px, of all that is published of kNN on ImageNet
BASELINES = ("random initialisation", "raw pixels")  # what stands beside a source
FAMILIES = {
    "pretext": ("relative_loc", "inpainting", "rotation"), "clustering": ("deepcluster", "odc", "swav"),
    "contrastive": ("npid", "mocov1", "mocov2", "mocov3", "simclr", "densecl"),
    "joint embedding": ("byol", "simsiam", "barlowtwins"),
    "masked": ("mae", "simmim", "maskfeat", "cae", "a2mim"), "baseline": ("supervised", "random"),
}


@dataclass(frozen=True)
class Published:
    """One published number; `epochs` and `batch` of pretraining, 0 if not said."""

    protocol: str
    method: str
    backbone: str
    epochs: int
    batch: int
    metric: str
    value: float
    source: str
    flag: str

    @property
    def family(self) -> str:
        return next((family for family, methods in FAMILIES.items() if self.method in methods), "other")


@cache
def everything() -> tuple[Published, ...]:
    with open(ASSETS / "published.csv", newline="", encoding="utf-8") as file:
        return tuple(Published(**{**row, "epochs": int(row["epochs"] or 0), "batch": int(row["batch"] or 0),
                                  "value": float(row["value"])}) for row in csv.DictReader(file))


def published(**wanted: Any) -> list[Published]:
    """The published numbers whose fields are as wanted: `published(method="byol", metric="top1", family=…)`."""
    return [row for row in everything() if all(getattr(row, name) == value for name, value in wanted.items())]


# ---------------------------------------------------------------- ours


def measured(folder: str | Path) -> list[dict[str, Any]]:
    """Every row of every results.jsonl below a folder, newest first: what it says, and of the run that it judges
    `method`, `recipe`, `epochs`, `backbone`, `judged` (its directory), `baseline` and `stale`.

    `baseline`: the row is of fresh weights or raw pixels, which stand beside what is judged.

    `stale`: the code of the method is not what it was when the network was trained, or nothing says what it was. A row
    that stands beside its source and beside its protocol's run comes once, and so does what was evaluated again: the
    newest counts.
    """
    rows: dict[tuple, dict[str, Any]] = {}
    for file in sorted(expanded(folder).rglob("results.jsonl")):
        run = Run(file.parent) if (file.parent / "recipe.json").exists() else None
        for row in read_jsonl(file):
            judged = _judged(row, run)
            key = (row["source"], row["data"], row["protocol"], row["seed"], row.get("size"),
                   row.get("run") or row.get("judged") or str(file.parent.resolve()))
            if key not in rows or (row["time"], judged is not None) >= (rows[key]["time"], "judged" in rows[key]):
                rows[key] = {**row, **(_of_run(judged, row) if judged else {}), "file": str(file)}
    return sorted(rows.values(), key=lambda row: row["time"], reverse=True)


def _judged(row: Mapping[str, Any], beside: Run | None) -> Run | None:
    """The run whose weights a row is of: the one it names, if that is still there, or else the one it lies in."""
    place = Path(row["judged"]) if "judged" in row else None
    if place and (place / "recipe.json").exists():
        return Run(place)
    protocol = beside is not None and beside.recipe.method.startswith("sslnb.evaluate.")
    return None if protocol else beside


def _of_run(run: Run, row: Mapping[str, Any]) -> dict[str, Any]:
    recipe, trained = run.recipe, [start.get("code") for start in run.provenance()]
    done = row["step"] / row["total"] if row.get("total") else 1  # of a run that was judged before it was done
    return {"method": recipe.method, "recipe": recipe.name, "backbone": recipe.backbone,
            "epochs": recipe.epochs if done == 1 else round(done * recipe.epochs, 1),
            "batch": recipe.total_batch, "judged": str(run.path), "trained_seed": run.seed,
            "trained_as": recipe.to_json(), "baseline": row["source"] in BASELINES,
            "stale": not trained or set(trained) != {_code(recipe.method)}}


def _code(method: str) -> str:
    try:
        return code_of(method)
    except InputError:  # a file of one's own, which is not here
        return "gone"


def executed(folder: str | Path) -> dict[str, list[str]]:
    """Notebooks below a folder that papermill executed, and the run directories that their outputs name."""
    import nbformat

    found = {}
    for path in sorted(expanded(folder).rglob("*.ipynb")):
        book = nbformat.read(path, as_version=4)
        if "papermill" in book.metadata:
            text = "".join(output.get("text", "") for cell in book.cells for output in cell.get("outputs", ()))
            found[str(path)] = list(dict.fromkeys(re.findall(r"^ *run  (.+?), seed", text, re.M)))
    return found


def side_by_side(ours: Sequence[Mapping[str, Any]], metric: str = "top1") -> str:
    """A table to read: method, backbone, epochs, protocol, what is published for them (with a * where sources
    disagree), and what was measured: the mean over seeds, how many, and "stale" where the method's code has changed.

    Numbers stand in one line only if method, backbone and protocol agree, so nothing stands beside a protocol that was
    changed; what else differs (data, epochs, size of the images) is written out. Runs of different recipes have lines
    of their own.
    """
    from ..evaluate import RECIPES

    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in ours:
        if metric in row and "method" in row and not row["baseline"]:
            trained = json.dumps(row.get("trained_as"), sort_keys=True, default=str)
            groups.setdefault((row["method"], row["backbone"], row["epochs"], row["data"], row["protocol"],
                               row.get("size") or 0, trained), []).append(row)
    lines = [["method", "backbone", "epochs", "data", "px", "protocol", "measured (%)", "seeds",
              "published on ImageNet (%)"]]
    for (method, backbone, epochs, data, protocol, size, _), rows in sorted(groups.items()):
        # Of a protocol with several heads the accuracy of each is a dict.
        values = [row[metric]["top1"] if isinstance(row[metric], Mapping) else row[metric] for row in rows]
        mean = sum(values) / len(values)
        stale = "  stale" if any(row["stale"] for row in rows) else ""
        theirs = published(method=method, protocol="knn", metric="top1 k20") if protocol == "knn k20 t0.07" else \
            published(method=method, protocol=protocol, metric=metric)
        said = ", ".join(f"{p.value:g}{'*' if p.flag else ''} ({p.epochs} epochs)" for p in theirs
                         if BACKBONES.get(p.backbone, p.backbone) == backbone)
        usual = RECIPES[protocol].size if protocol in RECIPES else KNN_SIZE
        said += f", at {usual} px" * bool(said and size not in (0, usual))
        lines.append([method, backbone, str(epochs), Path(data).name, str(size or ""), protocol, f"{mean:.1f}{stale}",
                      " ".join(sorted({str(row["trained_seed"]) for row in rows})), said or "–"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
