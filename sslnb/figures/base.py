"""What all figures are made of: colours, panels, a table of pictures, lines.

Colours are Okabe and Ito's, readable for the colour-blind, but for their yellow, which hardly shows on white: three of
Tol's stand in, so that ten classes have ten. Lines differ in style too, points in their markers.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#999933",
          "#44AA99")
STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*<>"


def panels(rows: int, columns: int, width: float = 8.0, height: float | None = None, title: str = "", **kwargs):
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(rows, columns, figsize=(width, height or width * rows / columns), squeeze=False,
                             layout="constrained", **kwargs)
    plt.close(fig)  # else the notebook shows it twice and keeps it in memory
    if title:
        fig.suptitle(title, fontsize=11)
    return fig, axes


def picture(x) -> np.ndarray:
    """A PIL image, or (3, H, W) in [0, 1] -> (H, W, 3) for imshow."""
    if isinstance(x, Tensor):
        return x.detach().float().clamp(0, 1).permute(1, 2, 0).numpy()
    return np.asarray(x)


def grid(rows: Sequence[Sequence], row_names: Sequence[str] = (), title: str = "", column_names: Sequence[str] = (),
         size: float = 0.85) -> Figure:
    """A table of small pictures."""
    rows = list(rows) or [[]]
    columns = max(1, *map(len, rows))
    fig, axes = panels(len(rows), columns, width=size * columns + 1.1 * bool(row_names), height=size * len(rows) + 0.5,
                        title=title)
    for r, (line, row) in enumerate(zip(axes, rows, strict=True)):
        for c, ax in enumerate(line):
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if c < len(row) and row[c] is not None:
                ax.imshow(picture(row[c]), interpolation="nearest", vmin=0, vmax=1)
        if row_names:
            line[0].set_ylabel(row_names[r], rotation=0, ha="right", va="center", fontsize=9)
    for ax, name in zip(axes[0], column_names, strict=False):
        ax.set_title(name, fontsize=9)
    return fig


def lines(values: Mapping[str, Sequence[float]], x: Sequence[float] | None = None, *, xlabel: str, title: str,
          ylabel: str = "") -> Figure:
    """Named curves over x (their index without it)."""
    fig, ((ax,),) = panels(1, 1, 6.5, 2.8, title)
    for i, (name, y) in enumerate(values.items()):
        ax.plot(range(len(y)) if x is None else x, y, color=COLORS[i % 8], ls=STYLES[i % 4], label=name)
    ax.set(xlabel=xlabel, ylabel=ylabel or next(iter(values)))
    if x is None or all(float(v).is_integer() for v in x):  # there is no step 2.5
        ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
    if len(values) > 1:
        beside(ax, values)
    return fig


def beside(ax, names: Iterable[str]) -> None:
    """A legend beside the curves, not on them, if its names leave them room."""
    if max(map(len, names)) <= 24:
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    else:
        ax.legend(frameon=False)


def shortest(sources: Collection[str]) -> dict[str, str]:
    """As many first words of each as tell them apart: "byol" of "byol-digits-ep60-seed0", unless there is another."""
    for words in range(1, max(source.count("-") for source in sources) + 2):
        names = {source: "-".join(source.split("-")[:words]) for source in sources}
        if len(set(names.values())) == len(names):
            break
    return names


def views_grid(views, images: Sequence, draws: int = 0, seed: int = 0) -> Figure:
    """Each row one image: as it is, then `draws` draws of every view, de-normalised; 0: as many as fit beside it."""
    rows, draws = [[image] for image in images], draws or max(1, 8 // len(views))
    for draw in range(draws):
        for view, batch in zip(views.views, views(list(images), seed=seed + draw), strict=True):
            for row, x in zip(rows, view.normalize.undo(batch), strict=True):
                row.append(x)
    several = len(views) > 1
    names = ["image"] + [f"view {v + 1}" if several else f"draw {draw + 1}" for draw in range(draws)
                         for v in range(len(views))]
    return grid(rows, title="What the network gets to see", column_names=names)
