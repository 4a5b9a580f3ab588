"""Our weights out: a folder that timm, the Hugging Face hub and OpenMMLab's tools can read.

    folder = run.export()
    timm.create_model("resnet50", num_classes=0, checkpoint_path=folder / "model.safetensors")
"""

import json
import re
from pathlib import Path
from typing import Any

import torch

from ..backbones import as_timm, small_stem
from ..errors import InputError
from ..evaluate.results import shown
from ..files import expanded, save_tensors, write_atomic
from ..run import Run

LICENCE = "mit"


def export(run: Run, folder: str | Path | None = None, *, licence: str = LICENCE, openmmlab: bool = False) -> Path:
    """Write model.safetensors (timm's names), config.json (timm's, for the hub, unless timm has no name for the stem),
    recipe.json and README.md, a model card with recipe, data, the line of Python that loads it and every measured
    result that one number sums up; `openmmlab` adds openmmlab.pth, in the names of their detectors.

    `folder`: where, or `export` in the run directory. Errors: InputError for a run that is not finished.
    """
    state = run.status().get("state")
    if state != "done":
        raise InputError(f"{run.path} is {state or 'not started'} and not done; finish it before its weights go out.")
    folder = expanded(folder or run.path / "export")
    backbone, recipe = run.backbone(), run.recipe
    tensors = backbone.state_dict()
    theirs = to_openmmlab(tensors) if openmmlab else None
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "model.safetensors", tensors)
    write_atomic(folder / "config.json", json.dumps(_config(recipe, backbone), indent=1))
    write_atomic(folder / "recipe.json", json.dumps(run.settings, indent=1))
    write_atomic(folder / "README.md", _card(run, backbone, licence))
    if theirs:
        torch.save({"meta": {}, "state_dict": theirs}, folder / "openmmlab.pth")
    return folder


def push(folder: str | Path, repo: str, **settings: Any) -> str:
    """Upload an exported folder to the Hugging Face hub as `repo` ("me/byol-resnet50") and return its address.

    `settings` go to huggingface_hub's create_repo, such as private=True. You must be logged in there.
    """
    from huggingface_hub import HfApi

    folder = expanded(folder)
    needed = [name for name in ("model.safetensors", "config.json", "README.md") if not (folder / name).is_file()]
    if needed:
        raise InputError(f"{folder} is no exported run: {', '.join(needed)} is not there; write it with run.export().")
    api = HfApi()
    api.create_repo(repo, exist_ok=True, **settings)
    api.upload_folder(folder_path=folder, repo_id=repo)
    return f"https://huggingface.co/{repo}"


def to_openmmlab(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """timm's names of a ResNet or ViT as OpenMMLab's, below `backbone.`. Errors: InputError for another network."""
    if "conv1.weight" in tensors and "layer1.0.conv1.weight" in tensors:
        return {f"backbone.{name}": tensor for name, tensor in tensors.items()}
    if "cls_token" not in tensors or "blocks.0.attn.qkv.weight" not in tensors:
        raise InputError("Only ResNets and vision transformers have a form in OpenMMLab that is written here; this "
                         f"network has tensors such as {next(iter(tensors))}.")
    return {f"backbone.{_mm_name(name)}": tensor for name, tensor in tensors.items()}


def _mm_name(name: str) -> str:
    name = name.replace("patch_embed.proj.", "patch_embed.projection.")
    name = re.sub(r"^norm\.", "ln1.", name)
    block = re.match(r"blocks\.(\d+)\.(.+)", name)
    if not block:
        return name
    inner = re.sub(r"^norm([12])\.", r"ln\1.", block[2])
    inner = inner.replace("mlp.fc1.", "ffn.layers.0.0.").replace("mlp.fc2.", "ffn.layers.1.")
    return f"layers.{block[1]}.{inner}"


def _ours(recipe, backbone) -> bool:
    """Whether timm has no name for the network: a user's own, or one with a stem that timm would build another way
    without a word."""
    return ":" in recipe.backbone or bool(recipe.backbone_numbers.get("sobel")) or small_stem(backbone, recipe.size)


def _config(recipe, backbone) -> dict[str, Any]:
    about = {"num_classes": 0, "num_features": backbone.num_features}
    if _ours(recipe, backbone):
        return {"library": "sslnb", "backbone": recipe.backbone, "size": recipe.size,
                "backbone_numbers": dict(recipe.backbone_numbers), **about}
    base, arguments = as_timm(recipe.backbone, recipe.size, **recipe.backbone_numbers)
    cfg = {"input_size": [3, recipe.size, recipe.size], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
           "num_classes": 0, "interpolation": "bicubic", "crop_pct": 0.875}
    return {"architecture": base, **about, "model_args": arguments, "pretrained_cfg": cfg}


def _how_to_load(recipe, backbone) -> str:
    if _ours(recipe, backbone):
        said = "".join(f", {k}={v!r}" for k, v in recipe.backbone_numbers.items())
        return (f"backbone = sslnb.backbones.build({recipe.backbone!r}, {recipe.size}{said})\n"
                'backbone.load_state_dict(safetensors.torch.load_file("model.safetensors"))')
    base, arguments = as_timm(recipe.backbone, recipe.size, **recipe.backbone_numbers)
    said = "".join(f", {k}={v!r}" for k, v in arguments.items())
    return f'timm.create_model({base!r}, num_classes=0{said}, checkpoint_path="model.safetensors")'


def _card(run: Run, backbone, licence: str) -> str:
    recipe, start = run.recipe, (run.provenance() or [{}])[-1]
    # An evaluation of weights before the last says its step; what was evaluated again counts once.
    newest = {(r["source"], r["data"], r["protocol"], r["seed"]): r for r in run.results() if "step" not in r}
    rows = [f"| {r['source']} | {r['data']} | {r['protocol']} | {shown(r)} | "
            + (f"{r['n']:,}" if "n" in r else "–") + f" | {r['seed']} |" for r in newest.values() if shown(r)]
    table = "\n".join(["| features | data | protocol | top-1 or as said (%), 95 % interval | images | seed |",
                       "|---|---|---|---|---|---|", *rows]) if rows else "Nothing was measured yet."
    return f"""---
license: {licence}
library_name: {"sslnb" if _ours(recipe, backbone) else "timm"}
tags: [image-feature-extraction, self-supervised-learning, sslnb]
---

# {recipe.method} on {Path(recipe.data).name}: {recipe.backbone}

Trained without labels by sslnb for {recipe.epochs} epochs with a total batch of {recipe.total_batch}, seed {run.seed}.

```python
{_how_to_load(recipe, backbone)}
```

## Measured

{table}

## Recipe

```
{recipe.describe()}
```

{start.get("time", "")}, sslnb {start.get("versions", {}).get("sslnb", "")}, code {start.get("git", "unknown")}.
"""
