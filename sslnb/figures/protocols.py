"""What protocols find out: accuracy against something, and class by class."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .base import COLORS, MARKERS, STYLES, beside, panels, picture, shortest


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
    ticks = _apart(sorted({x for points in values.values() for x in points}))
    ax.set_xticks(ticks, [f"{x:,.0f}" if x == int(x) else f"{x:.2g}" for x in ticks])
    ax.set_xticks([], minor=True)
    ax.grid(alpha=0.3)
    if len(values) > 1:
        beside(ax, values)
    return fig


def _apart(x: Sequence[float]) -> list[float]:
    """Those of the ascending positive numbers that are far enough apart to be written below a logarithmic axis."""
    room, kept = np.log(x[-1] / x[0]) / 14 if x else 0, []
    for value in x:
        if not kept or np.log(value / kept[-1]) >= room:
            kept.append(value)
    return kept


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
    is in the picture; the number is the score. Of a small set those of `which` that it has.
    """
    which = [i for i in which if i < len(images)]
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


# ---------------------------------------------------------------- layers, few labels, margins


def depths(values: Mapping[str, Mapping[str, float | Mapping]], title: str = "") -> Figure:
    """Accuracy (%) per level of a network, a line per name.

    `values`: {name: {"feat1": accuracy, or a row with `top1` and its `interval`, which is drawn as a bar}}.
    """
    fig, ((ax,),) = panels(1, 1, 6.5, 3.4, title)
    # directories of runs are long, and the levels need the room
    names = shortest(set(values)) if max(map(len, values)) > 24 else {name: name for name in values}
    for i, (name, found) in enumerate(values.items()):
        rows = [v if isinstance(v, Mapping) else {"top1": v} for v in found.values()]
        y = np.array([r["top1"] for r in rows])
        ax.plot(list(found), y, color=COLORS[i % 8], ls=STYLES[i % 4], marker=MARKERS[i % 10], ms=5,
                label=names[name])
        if all("interval" in r for r in rows):
            low, high = np.array([r["interval"] for r in rows]).T
            ax.errorbar(list(found), y, yerr=[y - low, high - y], fmt="none", ecolor=COLORS[i % 8], capsize=3)
    ax.set(xlabel="level, from the stem to the last stage", ylabel="accuracy (%)")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def spread(values: Mapping[str, Mapping[str, Mapping]], xlabel: str, ylabel: str, title: str = "",
           lines: Mapping[str, float] | None = None) -> Figure:
    """Over a doubling number, the mean of several draws as a line and their lowest and highest as a band.

    `values`: {name: {number: {"mean", "min", "max"}}}; `lines` are levels to compare with, {name: number}.
    """
    fig, ((ax,),) = panels(1, 1, 6.5, 3.4, title)
    for i, (name, points) in enumerate(values.items()):
        x = [int(k) for k in points]
        mean, low, high = ([p[key] for p in points.values()] for key in ("mean", "min", "max"))
        ax.plot(x, mean, color=COLORS[i % 8], ls=STYLES[i % 4], marker=MARKERS[i % 10], ms=4, label=name)
        ax.fill_between(x, low, high, color=COLORS[i % 8], alpha=0.15, lw=0)
    for i, (name, y) in enumerate((lines or {}).items()):
        ax.axhline(y, color="0.4", ls=STYLES[(i + 1) % 4], lw=1)
        ax.annotate(name, (1, y), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color="0.3")
    ax.set_xscale("log", base=2)
    ax.set_xticks(x, [str(k) for k in x])
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def margins(x: np.ndarray, y: np.ndarray, fits: Mapping[str, object], title: str = "") -> Figure:
    """Points x (N, 2) with answers y (N,) of 1 or -1, and linear classifiers of them, a panel for each.

    The line is where the classifier changes its mind, dashed are its margins: points between them, or on the wrong
    side, are what the loss counts, and ringed.
    """
    fig, (axes,) = panels(1, len(fits), 3.3 * len(fits), 3.4, title)
    edges = np.stack([x.min(0), x.max(0)]) + np.array([[-0.1], [0.1]]) * np.ptp(x, 0)
    across, up = np.meshgrid(*(np.linspace(*edges[:, i], 120) for i in (0, 1)))
    for ax, (name, fit) in zip(axes, fits.items(), strict=True):
        for value, color, marker in ((1, COLORS[1], "o"), (-1, COLORS[0], "s")):
            ax.scatter(*x[y == value].T, s=18, color=color, marker=marker, alpha=0.7, lw=0,
                       label="shows it" if value == 1 else "does not")
        counted = y * fit.decision_function(x) < 1
        ax.scatter(*x[counted].T, s=60, facecolors="none", edgecolors="0.4", lw=0.6)
        height = fit.decision_function(np.stack([across.ravel(), up.ravel()], 1)).reshape(across.shape)
        ax.contour(across, up, height, levels=[-1, 0, 1], colors="black", linestyles=["--", "-", "--"], linewidths=1)
        ax.set_title(f"{name}: {counted.sum()} of {len(y)} count", fontsize=9)
        ax.set(xticks=[], yticks=[], xlim=edges[:, 0], ylim=edges[:, 1])
    axes[0].legend(frameon=True, fontsize=8)
    return fig


def class_lines(values: Mapping[str, Mapping[str, float]], xlabel: str, title: str = "") -> Figure:
    """A number per class, a marker per name, the classes sorted by the first: {name: {class: number}}."""
    first = next(iter(values.values()))
    order = sorted(first, key=first.get)
    fig, ((ax,),) = panels(1, 1, 6.5, 0.26 * len(order) + 1.1, title)
    for i, (name, found) in enumerate(values.items()):
        ax.plot([found[c] for c in order], range(len(order)), ls="", marker=MARKERS[i % 10], color=COLORS[i % 8],
                label=name)
    ax.set_yticks(range(len(order)), order, fontsize=8)
    ax.set(xlabel=xlabel)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def pairs(values: Mapping[str, Mapping[str, tuple[float, float]]], xlabel: str, ylabel: str, title: str = "") -> Figure:
    """Two numbers of each thing against each other: {group: {name: (x, y)}}, names written beside the points, to the
    left and to the right in turn."""
    fig, ((ax,),) = panels(1, 1, 6.5, 3.6, title)
    for i, (group, points) in enumerate(values.items()):
        x, y = zip(*points.values(), strict=True)
        ax.scatter(x, y, color=COLORS[i % 8], marker=MARKERS[i % 10], label=group, s=30)
    named = sorted((at[::-1], name) for points in values.values() for name, at in points.items())
    for i, ((y, x), name) in enumerate(named):  # from below and the left: neighbours of one height take turns
        ax.annotate(name, (x, y), (6 if i % 2 else -6, 0), textcoords="offset points", fontsize=8, va="center",
                    ha="left" if i % 2 else "right")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.3)
    ax.margins(x=0.2)
    ax.legend(frameon=False, fontsize=8)
    return fig
