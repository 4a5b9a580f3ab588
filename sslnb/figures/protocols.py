"""What protocols find out: accuracy against something, and class by class."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .base import COLORS, MARKERS, STYLES, panels


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
