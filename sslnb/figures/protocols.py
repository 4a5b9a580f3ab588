"""What protocols find out: accuracy against something, and class by class."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .base import COLORS, MARKERS, STYLES, panels, picture


def against(values: Mapping[str, Mapping[float, float | Mapping]], xlabel: str, title: str = "") -> Figure:
    """Accuracy (%) over something on a logarithmic axis, a line per name.

    `values`: {name: {x: accuracy, or a row with `top1` and its `interval`, which is drawn as a bar}}.
    """
    fig, ((ax,),) = panels(1, 1, 6.5, 3.2, title)
    for i, (name, points) in enumerate(values.items()):
        rows = [p if isinstance(p, Mapping) else {"top1": p} for p in points.values()]
        x, y = list(points), np.array([r["top1"] for r in rows])
        ax.plot(x, y, color=COLORS[i % 8], ls=STYLES[i % 4], marker=MARKERS[i % 10], ms=4, label=name)
        if all("interval" in r for r in rows):
            low, high = np.array([r["interval"] for r in rows]).T
            ax.errorbar(x, y, yerr=[y - low, high - y], fmt="none", ecolor=COLORS[i % 8], capsize=3)
    ax.set(xscale="log", xlabel=xlabel, ylabel="accuracy (%)")
    ax.grid(alpha=0.3)
    if len(values) > 1:
        ax.legend(frameon=False)
    return fig


def class_gain(truth: Tensor, guess: Tensor, rival: Tensor, classes: Sequence[str], title: str = "") -> Figure:
    """Of each class, how much more is recognised by `guess` than by `rival`, in points; all (N,)."""
    recall = [torch.stack([(g == truth)[truth == c].float().mean() for c in range(len(classes))])
              for g in (guess, rival)]
    gain = (100 * (recall[0] - recall[1])).numpy()
    order = np.argsort(gain)
    fig, ((ax,),) = panels(1, 1, 6.5, 0.26 * len(classes) + 0.9, title)
    ax.barh(range(len(classes)), gain[order], color=[COLORS[0] if g >= 0 else COLORS[1] for g in gain[order]])
    ax.set_yticks(range(len(classes)), [f"{classes[c]}  {100 * recall[0][c]:.0f}" for c in order], fontsize=8)
    ax.axvline(0, color="black", lw=0.8)
    ax.set(xlabel="gain in recall (percentage points); beside the class its recall (%)")
    return fig


# ---------------------------------------------------------------- detection


def frames(image, sets: Mapping[str, np.ndarray], title: str = "") -> Figure:
    """One picture with several sets of boxes (n, 4), x1 y1 x2 y2 in px: a colour and a line style per set."""
    fig, ((ax,),) = panels(1, 1, 4.6, 4.2, title)
    ax.imshow(picture(image))
    for i, (name, boxes) in enumerate(sets.items()):
        for n, box in enumerate(boxes):
            _frame(ax, box, COLORS[i % 8], STYLES[i % 4], label=name if n == 0 else None)
    ax.set(xticks=[], yticks=[])
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return fig


def things(images, which: Sequence[int], found: Sequence[Mapping] = (), above: float = 0.5, title: str = "") -> Figure:
    """Images with what is in them, solid, and what was found with a score of at least `above`, dashed.

    `images`: a set with boxes; `found`: detections as COCO's results have them. A colour per class, named where a thing
    is in the picture; the number is the score.
    """
    columns = min(4, len(which))
    fig, axes = panels(-(-len(which) // columns), columns, 2.4 * columns, 2.5 * -(-len(which) // columns) + 0.3, title)
    number = {k: c for c, k in enumerate(images.category_ids)}
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for ax, i in zip(axes.flat, which, strict=False):
        ax.imshow(picture(images[i]))
        here = images.objects(i)
        for box, c in zip(here.boxes, here.classes, strict=True):
            _frame(ax, box, COLORS[c % 7], "-", "" if found else images.classes[c])
        for d in found:
            if d["image_id"] == images.ids[i] and d["score"] >= above:
                x, y, w, h = d["bbox"]
                c = number[d["category_id"]]
                _frame(ax, (x, y, x + w, y + h), COLORS[c % 7], "--", f"{images.classes[c]} {d['score']:.2f}")
    return fig


def _frame(ax, box, color: str, style: str, text: str = "", label: str | None = None) -> None:
    import matplotlib.patheffects as effects

    x1, y1, x2, y2 = (float(v) - 0.5 for v in box)  # the first pixel of an image is drawn around 0
    around = [effects.withStroke(linewidth=3.2, foreground="white")]  # else a dark line is lost on a dark picture
    ax.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=color, ls=style, lw=1.6, path_effects=around, label=label)
    if text:
        ax.text(x1, y1, text, fontsize=7, color=color, va="bottom", path_effects=around, clip_on=True)


def precision_recall(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str = "") -> Figure:
    """Precision over recall, a stair per name: {name: (precision, recall)}, the surest detection first."""
    fig, ((ax,),) = panels(1, 1, 5.6, 3.4, title)
    for i, (name, (precision, recall)) in enumerate(curves.items()):
        ax.plot(recall, precision, color=COLORS[i % 8], ls=STYLES[i % 4], marker="o" * (len(recall) < 20), label=name)
    ax.set(xlabel="recall: share of the objects that were found", ylabel="precision: share that is right",
           xlim=(0, 1.02), ylim=(0, 1.05))
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8)
    return fig


def ap_bars(rows: Sequence[Mapping], title: str = "") -> Figure:
    """AP50 of rows with `source` and `ap50`, and its 95 % interval where a row has one."""
    fig, ((ax,),) = panels(1, 1, 6.5, 0.4 * len(rows) + 0.9, title)
    for y, row in enumerate(rows[::-1]):
        ax.barh(y, row["ap50"], color=COLORS[(len(rows) - 1 - y) % 8], height=0.6)
        if "interval" in row:
            low, high = row["interval"]
            ax.plot([low, high], [y, y], color="black", marker="|")
    ax.set_yticks(range(len(rows)), [f"{row['source']}  {row['ap50']:.1f}" for row in rows[::-1]], fontsize=9)
    ax.set(xlim=(0, 100), xlabel="AP50 (%)")
    return fig
