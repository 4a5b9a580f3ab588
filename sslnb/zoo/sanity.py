"""Are those the weights of a trained network? Three numbers that do not need ImageNet, beside fresh weights.

They catch what a matching state dict cannot: channels in a wrong order, another number of heads, positions of another
layout. They are no measure of quality, for the images are small and of clothes.
"""

import copy
import math

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..backbones import build
from .match import Match
from .networks import resized

SIZE = 64  # px: an image costs a twelfth of what it costs at 224 px, and a ResNet's last map still has four cells
DATA, COUNT = "fashion_small", 300  # of each split; ResNet-50 and two fresh twins need about 30 s on one core, ViT-B 75


def sanity(backbone: nn.Module, match: Match, *, data: str = DATA, count: int = COUNT, size: int | None = None,
           pool: str = "model", seed: int = 0) -> dict[str, dict[str, float]]:
    """Print and return feature std, effective rank and kNN accuracy (%), of the backbone and of fresh weights.

    `backbone` and `match` as `load` returned them; the backbone is copied and not changed. `count` images of each split
    of `data`, at `size` px (64, or the next smaller size that the patches divide). Fresh ResNets are shown twice: as
    built, and as in evaluation, with their residual branches on and BatchNorm statistics of these images. One draw of
    images and fresh weights, from `seed`.
    """
    from ..data import load
    from ..evaluate.collapse import POINT_STD, panel
    from ..evaluate.features import calibrated, extract
    from ..evaluate.knn import weighted_knn
    from ..evaluate.sources import switched_on

    patch = backbone.patch_embed.patch_size[0] if hasattr(backbone, "patch_embed") else 1
    size = size or max(1, SIZE // patch) * patch
    draw = torch.Generator().manual_seed(seed)
    bank, queries = (images.subset(torch.randperm(len(images), generator=draw)[:count].tolist())
                     for images in (load(data, "train"), load(data, "test")))
    trained, _ = resized(copy.deepcopy(backbone), match.backbone, match.numbers, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh, _ = resized(build(match.backbone, match.size, **match.numbers), match.backbone, match.numbers, size)
    # A fresh ResNet as timm builds it is little more than its shortcuts, and on small grey clothes those alone see more
    # than all its branches do (R50: kNN 43 against 25 %): both stand here, and the better one is what has to be beaten.
    networks = {"the file's weights": trained.eval(), "fresh weights": fresh.eval()}
    if any(isinstance(module, _BatchNorm) for module in fresh.modules()):
        switched = switched_on(copy.deepcopy(fresh))
        networks["fresh, all branches"] = calibrated(switched, bank, size=size, seed=seed)
    rows = {}
    for name, network in networks.items():
        known, asked = (extract(network, images, size=size, pool=pool, batch=50) for images in (bank, queries))
        found = panel(known.x)
        found["knn"] = weighted_knn(known.x, known.labels, asked.x, asked.labels, k=min(20, len(known.x))).top1
        rows[name] = {key: found[key] for key in ("feature_std", "effective_rank", "dimensions", "knn")}
        print(f"{name:20} feature std {found['feature_std']:.2f}   effective rank {found['effective_rank']:.0f} of "
              f"{min(len(known.x), found['dimensions'])}   kNN {found['knn']:.1f} %")
    print(_verdict(*rows.values(), n=len(asked.x), data=data, point=POINT_STD))
    return rows


def _verdict(file: dict[str, float], *fresh: dict[str, float], n: int, data: str, point: float) -> str:
    if not all(math.isfinite(number) for number in file.values()):
        return "The file's weights give numbers that are not finite: they are damaged, or the network is another one."
    if file["feature_std"] < point:
        return "The file's weights map all images to (nearly) one point: they collapsed, or the network is another one."
    best = max(row["knn"] for row in fresh)
    gain = file["knn"] - best
    error = 2 * math.sqrt(sum(p * (100 - p) for p in (file["knn"], best)) / n)  # two standard errors
    if gain > error:
        return f"The file's weights know more than fresh ones: kNN is {gain:.1f} ± {error:.1f} points higher on {data}."
    return (f"The file's weights are not clearly better than fresh ones on {data} (kNN {gain:+.1f} ± {error:.1f} "
            "points): look at the report of the match again, and try more images or your own.")
