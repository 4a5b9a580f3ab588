"""Runs over time, and what they are worth: curves, the collapse panel, accuracies."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from .base import COLORS, STYLES, grid, panels, shortest


def curves(runs: Mapping[str, object] | object, value: str = "loss", title: str = "") -> Figure:
    """One value over epochs for one or several runs, from their logs."""
    runs = runs if isinstance(runs, Mapping) else {"": runs}
    fig, ((ax,),) = panels(1, 1, 6.5, 3.0, title or f"{value} while training")
    for i, (name, run) in enumerate(runs.items()):
        rows = [row for kind in ("step", "monitor") for row in run.history(kind) if value in row]
        ax.plot([r["epoch"] for r in rows], [r[value] for r in rows], color=COLORS[i % 8], ls=STYLES[i % 4],
                marker="o" * (len(rows) < 30), ms=3, label=name)
    ax.set(xlabel="epoch", ylabel=value)
    ax.grid(alpha=0.3)
    if len(runs) > 1:
        ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))  # beside the curves, not on them
    return fig


PANEL = {"knn": ("kNN (%)", "higher is better"), "feature_std": ("feature std", "near 0: all images alike"),
         "effective_rank": ("effective rank", "low: few directions used"),
         "alignment": ("alignment", "low: views of an image agree"),
         "uniformity": ("uniformity", "low: images spread out")}
OUTPUTS = {"output_std": ("output std", "near 0: all outputs alike")}


def collapse_panel(runs: Mapping[str, object] | object) -> Figure:
    """Is it learning or collapsing? kNN, std, rank, alignment and uniformity over epochs, and a plain sentence; of a
    method that compares outputs also their std in the training batches.

    Two rows, so that they can be read in a narrow window; what is bad near 0 shows its 0.
    """
    from ..evaluate.collapse import diagnose

    runs = runs if isinstance(runs, Mapping) else {"": runs}
    outputs = any("output_std" in row for run in runs.values() for row in run.history("step"))
    shown = PANEL | (OUTPUTS if outputs else {})
    fig, rows = panels(2, 3, 8.4, 4.4 + 0.3 * (len(runs) > 1))
    axes = rows.flat[:len(shown)]
    for ax in rows.flat[len(shown):]:
        ax.remove()
    for i, (name, run) in enumerate(runs.items()):
        history = run.history("monitor")
        losses = run.history("step")
        if losses:  # the verdict wants to know whether the loss fell
            history = [{**losses[0], **history[0]}, *history[1:-1], {**losses[-1], **history[-1]}]
        print(f"{name}: {diagnose(history)}" if name else diagnose(history))
        for ax, (key, (label, hint)) in zip(axes, shown.items(), strict=True):
            known = [row for row in (losses if key in OUTPUTS else history) if key in row]
            ax.plot([r["epoch"] for r in known], [r[key] for r in known], color=COLORS[i % 8], ls=STYLES[i % 4],
                    marker="" if key in OUTPUTS else "o", ms=3, label=name)
            ax.set_title(f"{label}\n{hint}", fontsize=9)
            ax.set_xlabel("epoch", fontsize=9)
            ax.grid(alpha=0.3)
    for ax, key in zip(axes, shown, strict=True):
        ax.xaxis.get_major_locator().set_params(integer=True)
        if "std" in key:
            ax.set_ylim(0, 1.1 * max((max(line.get_ydata(), default=0) for line in ax.lines), default=0) or 1)
    if len(runs) > 1:
        fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(6, len(runs)),
                   frameon=False, fontsize=8)
    return fig


def accuracy_bars(rows: Sequence[Mapping]) -> Figure:
    """Evaluation rows as bars with their 95 % intervals, a panel for each protocol and a line for each source."""
    if not rows:
        return grid([[np.full((8, 8, 3), 255)]], title="no labels, no accuracy")
    protocols = list(dict.fromkeys(r["protocol"] for r in rows))
    names = shortest({r["source"] for r in rows})
    place = {source: -i for i, source in enumerate(dict.fromkeys(r["source"] for r in rows))}
    fig, (axes,) = panels(1, len(protocols), 9, 1.1 + 0.35 * len(place), sharey=True)
    for ax, protocol in zip(axes, protocols, strict=True):
        mine = [r for r in rows if r["protocol"] == protocol]
        y = [place[r["source"]] for r in mine]
        x = np.array([r["top1"] for r in mine])
        low, high = np.array([r["interval"] for r in mine]).T
        ax.barh(y, x, color=[COLORS[-i % 8] for i in y], height=0.6)
        ax.errorbar(x, y, xerr=[x - low, high - x], fmt="none", ecolor="black", capsize=3)
        for where, value in zip(y, x, strict=True):
            ax.text(1, where, f"{value:.1f}", va="center", fontsize=8,
                    bbox={"facecolor": "white", "alpha": 0.8, "pad": 1, "lw": 0})
        ax.set(xlim=(0, 100), xlabel="test accuracy (%)")
        ax.set_title(protocol, fontsize=9)
    axes[0].set_yticks(list(place.values()), [names[source] for source in place], fontsize=9)
    return fig
