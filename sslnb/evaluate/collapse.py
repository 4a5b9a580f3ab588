"""Is the network learning or collapsing? Numbers beside the loss, and one sentence on what they mean.

A falling loss says little in self-supervision: mapping every image to one point can be its cheapest minimum.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

POINT_STD = 0.1  # below: all images on (nearly) one point
LOW_RANK = 0.05  # effective rank as a part of the dimensions; below, and not growing: dimensional collapse
KNN_GAIN = 2.0  # percentage points of kNN accuracy that count as learning
EARLY = 3  # measurements before any verdict


def feature_std(z: Tensor) -> float:
    """Mean over dimensions of the std of the unit vectors of z (N, D), times sqrt(D).

    1 for directions spread evenly over the sphere, 0 for one point (SimSiam's measure, arXiv 2011.10566,
    there without the sqrt(D)).
    """
    return float(_spread(z))


EMBEDDINGS = ("z1", "q1", "q", "f")  # what methods call the vectors that their loss compares


def output_std(out: dict[str, Tensor]) -> dict[str, Tensor]:
    """{"output_std": feature_std of the embeddings (N, D) in a method's output}, {} if it compares none.

    A collapse begins here: the backbone's features can differ for long after the heads map them to one point. It stays
    on the device, for nothing in the loop may wait.
    """
    found = next((out[name] for name in EMBEDDINGS if name in out), None)
    return {} if found is None else {"output_std": _spread(found)}


def effective_rank(z: Tensor) -> float:
    """exp of the entropy of the singular values of z (N, D), normalised to sum 1; z as it is, neither
    centred nor scaled (RankMe, arXiv 2210.02885). Between 1 and min(N, D); 0 for z = 0.
    """
    sigma = torch.linalg.svdvals(z.detach().float())
    if sigma.sum() == 0:
        return 0.0
    p = sigma / sigma.sum()
    return float(torch.special.entr(p).sum().exp())  # entr(p) = -p log p, 0 at p = 0


def alignment(z1: Tensor, z2: Tensor) -> float:
    """Mean squared distance of the unit vectors of two views, z1 and z2 (N, D); 0 is best, 2 is chance.

    arXiv 2005.10242 with α = 2.
    """
    return float((_unit(z1) - _unit(z2)).square().sum(1).mean())


def uniformity(z: Tensor) -> float:
    """log of the mean of exp(-2 d²) over distinct pairs of unit vectors of z (N, D); 0 for one point, about
    -4 at best (arXiv 2005.10242 with t = 2). Takes N² / 2 numbers of memory: give it a few thousand rows;
    nan below two.
    """
    u = _unit(z)
    return float(torch.pdist(u).square().mul(-2).exp().mean().log())


def panel(z: Tensor, z1: Tensor | None = None, z2: Tensor | None = None) -> dict[str, float]:
    """All numbers of the panel from features z (N, D) and, for the alignment, two views z1, z2 (N, D)."""
    numbers = {"feature_std": feature_std(z), "effective_rank": effective_rank(z), "dimensions": z.shape[1],
               "uniformity": uniformity(z)}
    if z1 is not None and z2 is not None:
        numbers["alignment"] = alignment(z1, z2)
    return numbers


def diagnose(history: list[dict]) -> str:
    """One plain sentence on what the panel's numbers say over time.

    `history`: dicts in the order of training with any of `loss`, `output_std`, `feature_std`,
    `effective_rank`, `dimensions`, `knn` (in %); entries may lack some.
    """
    loss, output, std, rank, dimensions, knn = (
        [row[name] for row in history if row.get(name) is not None]
        for name in ("loss", "output_std", "feature_std", "effective_rank", "dimensions", "knn"))
    if not all(math.isfinite(v) for v in loss + std):
        return "Diverged: the loss or the features are no longer finite; try a lower learning rate first."
    if max(len(std), len(rank), len(knn)) < EARLY:
        return f"Too early to tell: fewer than {EARLY} measurements so far."
    falls = len(loss) > 1 and loss[-1] < loss[0]
    if std and std[-1] < POINT_STD:
        which = " although the loss falls" if falls else ""
        return (f"Collapsed: all images map to (nearly) one point{which} "
                f"(feature std {std[-1]:.2f}; healthy is near 1).")
    # A growing rank only says that training is young, so both conditions are needed.
    if rank and dimensions and rank[-1] < LOW_RANK * dimensions[-1] and rank[-1] <= rank[0]:
        return (f"Dimensional collapse: the features use about {rank[-1]:.0f} of {dimensions[-1]:.0f} "
                f"dimensions, and not more than at the start.")
    if len(knn) >= EARLY and knn[-1] - knn[0] >= KNN_GAIN:
        return f"Learning: kNN accuracy rose from {knn[0]:.1f} to {knn[-1]:.1f} %, without collapse."
    if output and output[-1] < POINT_STD:
        return (f"Collapsed at the output: what the loss compares is (nearly) the same for every image (std "
                f"{output[-1]:.2f}; healthy is near 1), and the kNN accuracy does not rise.")
    if len(knn) >= EARLY and knn[0] - knn[-1] >= KNN_GAIN:
        return f"Getting worse: kNN accuracy fell from {knn[0]:.1f} to {knn[-1]:.1f} %."
    if len(knn) < EARLY:
        return "No collapse: the features stay spread out; a kNN curve is needed to see whether they learn."
    if falls:
        return ("No collapse, but the loss falls without the kNN accuracy rising: the task may be solved by "
                "a shortcut, or it is still early.")
    return "No collapse, but nothing moves: neither the loss nor the kNN accuracy improves."


def _spread(z: Tensor) -> Tensor:
    u = _unit(z)
    return u.std(0, correction=0).mean() * math.sqrt(u.shape[1])


def _unit(z: Tensor) -> Tensor:
    return F.normalize(z.detach().float(), dim=1)
