"""Features of images, and matrices of them."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .base import COLORS, MARKERS, grid, panels, picture

NAMED = 20  # so many classes fit into a legend; the thousand of ImageNet would leave no room for the points


def neighbours(images, features: Tensor, queries: Sequence[int], k: int = 8) -> Figure:
    """For each query its nearest images by cosine; the title of a neighbour is its similarity."""
    z = torch.nn.functional.normalize(features, dim=1)
    similarity, index = (z[[q for q in queries if q < len(z)]] @ z.T).topk(min(k + 1, len(z)))
    rows = [[images[int(j)] for j in row] for row in index]
    return grid(rows, title="Query (left) and its nearest neighbours in feature space",
                column_names=["query", *(f"{i}." for i in range(1, k + 1))])


def embedding(features: Tensor, labels: Tensor | None, classes: Sequence[str], title: str = "") -> Figure:
    """t-SNE of features in the plane. Colours AND markers tell the classes apart; labels are for looking only."""
    from sklearn.manifold import TSNE

    xy = TSNE(perplexity=min(30, len(features) // 4), init="pca", random_state=0).fit_transform(features.numpy())
    fig, ((ax,),) = panels(1, 1, 6.5, 4.6, (title or "Features in the plane (t-SNE)") + _repeated(classes))
    _scatter(ax, xy, labels, classes, size=20)
    _legend(ax, classes)
    return fig


def embeddings(features: Mapping[str, Tensor], labels: Tensor | None, classes: Sequence[str]) -> Figure:
    """`embedding` for several features of the same images, side by side."""
    from sklearn.manifold import TSNE

    fig, (axes,) = panels(1, len(features), 3.3 * len(features) + 1, 3.6,
                          "The same images in the plane (t-SNE)" + _repeated(classes))
    for ax, (name, x) in zip(axes, features.items(), strict=True):
        xy = TSNE(perplexity=min(30, len(x) // 4), init="pca", random_state=0).fit_transform(x.numpy())
        _scatter(ax, xy, labels, classes, size=14)
        ax.set_title(name, fontsize=10)
    _legend(axes[-1], classes)
    return fig


def _scatter(ax, xy: np.ndarray, labels: Tensor | None, classes: Sequence[str], size: float) -> None:
    of = np.zeros(len(xy)) if labels is None else np.asarray(labels)
    for c, name in enumerate(classes or ["images"]):
        ax.scatter(*xy[of == c].T, s=size, alpha=0.8, color=COLORS[c % 10], marker=MARKERS[c % 10], label=name, lw=0)
    ax.set(xticks=[], yticks=[])


def _legend(ax, classes: Sequence[str]) -> None:
    if len(classes) <= NAMED:
        ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def _repeated(classes: Sequence[str]) -> str:
    """For a title, where there is no legend."""
    return f"\n{len(classes):,} classes: colours and markers repeat" if len(classes) > NAMED else ""


def confusion(truth: Tensor, guess: Tensor, names: Sequence[str], title: str = "") -> Figure:
    """How often each answer was given for each truth, in % of the row. truth, guess: (N,) numbers into `names`."""
    n = len(names)
    counts = torch.bincount(truth * n + guess, minlength=n * n).view(n, n)
    percent = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    fig, ((ax,),) = panels(1, 1, 0.5 * n + 2.6, 0.5 * n + 1.6, title)
    shown = ax.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for row in range(n):
        for column in range(n):
            value = float(percent[row, column])
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if value > 50 else "black")
    ax.set_xticks(range(n), names)
    ax.set_yticks(range(n), names)
    ax.set(xlabel="answer", ylabel="truth")
    fig.colorbar(shown, ax=ax, label="% of the row", shrink=0.85)
    return fig


def similarities(matrices: Tensor | Mapping[str, Tensor], title: str, xlabel: str = "", ylabel: str = "",
                 label: str = "cosine similarity") -> Figure:
    """A matrix of cosines or correlations, or named ones side by side: blue is opposite, white unrelated, red alike."""
    named = {"": matrices} if isinstance(matrices, Tensor) else matrices
    fig, (axes,) = panels(1, len(named), 3.1 * len(named) + 1.3, 3.8, title)
    for ax, (name, matrix) in zip(axes, named.items(), strict=True):
        shown = ax.imshow(matrix.detach().numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
        ax.set_title(name, fontsize=10)
        ax.set_xlabel(xlabel)
    axes[0].set_ylabel(ylabel)
    fig.colorbar(shown, ax=list(axes), label=label, shrink=0.85)
    return fig


def codes(matrices: Mapping[str, Tensor], title: str = "") -> Figure:
    """Named assignments (images x prototypes, rows sum to 1); below, what each prototype gets beside an equal share."""
    fig, (above, below) = panels(2, len(matrices), 2.6 * len(matrices) + 0.8, 4.2, title, height_ratios=(3, 1))
    most = 1.05 * max(float(q.sum(0).max()) for q in matrices.values())
    for assigned, sums, (name, q) in zip(above, below, matrices.items(), strict=True):
        shown = assigned.imshow(q.detach(), cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        assigned.set_title(name, fontsize=9)
        sums.bar(range(q.shape[1]), q.detach().sum(0), width=1.0, color=COLORS[0])
        sums.axhline(len(q) / q.shape[1], color=COLORS[1], ls="--", label="equal share")
        sums.set(xlim=(-0.5, q.shape[1] - 0.5), ylim=(0, most), xlabel="prototype")
    above[0].set_ylabel("image")
    below[0].set_ylabel("images it gets")
    below[0].legend(frameon=False, fontsize=8)
    fig.colorbar(shown, ax=list(above), label="share of the image", shrink=0.9)
    return fig


def dictionary(similarity: Tensor, batch: int, title: str = "") -> Figure:
    """MoCo's look-up, (n, 1 + K) cosines: one row per query, its own key at the left, then the queue from the newest
    key to the oldest, `batch` of them per step."""
    n, K = len(similarity), similarity.shape[1] - 1
    fig, ((own, queue),) = panels(1, 2, 9.5, 0.22 * n + 1.2, title, width_ratios=(1, 30))
    for ax, part in ((own, similarity[:, :1]), (queue, similarity[:, 1:])):
        shown = ax.imshow(part.detach(), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
        ax.set_yticks(range(n) if ax is own else [])
    own.set(xticks=[], ylabel="query")
    own.set_title("own key", fontsize=9)
    ticks = range(0, K + 1, batch * max(1, K // batch // 10))
    queue.set_xticks([x - 0.5 for x in ticks], [f"{x // batch}" for x in ticks])
    queue.set(xlabel="age of the keys in the queue (steps)")
    fig.colorbar(shown, ax=queue, label="cosine")
    return fig


def matches(x1: Tensor, x2: Tensor, found: Mapping[str, Tensor], true: Tensor, shown: Tensor,
            title: str = "") -> Figure:
    """Two views of each image, the second half a picture lower, joined cell by cell; one row per entry of `found`.

    x1, x2 (n, 3, H, W) in [0, 1]; found[name] and true (n, S²): numbers of cells of view 2, row by row; shown (n, m):
    the cells of view 1 to join. Solid blue: as in `true`. Dashed orange: elsewhere.
    """
    n, size, side = len(x1), x1.shape[-1], round(true.shape[1] ** 0.5)
    fig, axes = panels(len(found), n, 2.5 * n, 1.75 * len(found) + 0.4, title)
    down, right = size // 2, size + size // 5  # where view 2 lies
    pairs = torch.ones(n, 3, down + size, right + size)
    pairs[:, :, :size, :size], pairs[:, :, down:, right:] = x1, x2
    for line, (name, to) in zip(axes, found.items(), strict=True):
        for i, ax in enumerate(line):
            ax.imshow(picture(pairs[i]), interpolation="nearest", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            for s in shown[i].tolist():
                ends = torch.tensor([divmod(s, side), divmod(int(to[i, s]), side)])  # (row, column) in either view
                y, x = ((ends + 0.5) * size / side - 0.5).unbind(1)
                color, style = (COLORS[5], "-") if to[i, s] == true[i, s] else (COLORS[4], "--")
                ax.plot(x + torch.tensor([0, right]), y + torch.tensor([0, down]), color=color, ls=style,
                        marker="o", ms=3, lw=1.3)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    return fig
