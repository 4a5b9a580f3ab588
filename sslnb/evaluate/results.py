"""Results as data: intervals, and a table to read."""

import csv
import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import InputError, unknown
from ..run import versions


def result_row(source: str, data: str, protocol: str, numbers: Mapping[str, Any], seed: int) -> dict:
    """One row of results.jsonl: what was evaluated how, the numbers, and where they come from."""
    return {"source": source, "data": data, "protocol": protocol, **numbers, "seed": seed,
            "time": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions()}


def accuracy(correct: int, n: int) -> dict[str, Any]:
    """top1 and its 95 % interval, in %, of `n` images."""
    return {"top1": 100 * correct / n, "interval": [100 * edge for edge in interval(correct, n)], "n": n}


def interval(correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion of `correct` out of `n`, as fractions in [0, 1].

    It says how far the accuracy could be off because the test set is finite; it knows nothing of training
    seeds.
    """
    if not 0 <= correct <= n or n < 1:
        raise InputError(f"{correct} correct out of {n} is no proportion: need 0 <= correct <= n, n >= 1.")
    z = statistics.NormalDist().inv_cdf((1 + level) / 2)
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student-t interval of the mean of one value per seed, in the values' unit. Needs two seeds at least."""
    if len(values) < 2:
        raise InputError(f"An interval over seeds needs two values at least, not {len(values)}: run more.")
    from scipy.stats import t

    half = t.ppf((1 + level) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - float(half), mean + float(half)


STYLES = ("text", "markdown", "latex", "csv")


def table(rows: Sequence[dict], published: Sequence[dict] | None = None, style: str = "text") -> str:
    """Rows of `evaluate` as aligned text: features down, protocols across, "88.1 [86.0, 89.9]" in %.

    A later row replaces an earlier one of the same features, protocol and size, and the lines say the size where one
    protocol has several. Rows without one number that sums them up, such as curves of low shot, are left out.
    Runs of one name in several folders have the folder before it.
    `published` numbers (dicts with `top1`, `protocol`, `source`) come below, in lines of their own: they belong to
    other data and protocols than the cells above.
    `style`: "text" or "markdown", or, without what was published, "latex" (a tabular) or "csv". Errors: InputError for
    another.
    """
    if style not in STYLES:
        unknown("style of a table", style, STYLES)
    rows = [row for row in rows if shown(row)]
    protocols = list(dict.fromkeys(row["protocol"] for row in rows))
    sized = {(row["protocol"], row["size"]) for row in rows if "size" in row}
    several = len(sized) > len({protocol for protocol, _ in sized})
    features = [f"{name}, {row['size']} px" if several and "size" in row else name
                for name, row in zip(_names(rows), rows, strict=True)]
    cells = {(name, row["protocol"]): shown(row) for name, row in zip(features, rows, strict=True)}
    grid = [["features", *protocols]]
    grid += [[name, *(cells.get((name, p), "–") for p in protocols)] for name in dict.fromkeys(features)]
    if style == "csv":
        csv.writer(file := io.StringIO(), lineterminator="\n").writerows(grid)
        return file.getvalue().rstrip("\n")
    if style == "latex":
        head, *body = [" & ".join(re.sub(r"([&%$#_{}])", r"\\\1", c) for c in line) + r" \\" for line in grid]
        return "\n".join([rf"\begin{{tabular}}{{l{'r' * len(protocols)}}}", r"\hline", head, r"\hline", *body,
                          r"\hline", r"\end{tabular}"])
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    if style == "markdown":
        grid.insert(1, ["-" * w for w in widths])
    pad = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in grid]
    lines = [f"| {' | '.join(line)} |" if style == "markdown" else "  ".join(line).rstrip() for line in pad]
    lines += [""] * (style == "markdown" and bool(published))
    lines += [f"published ({p['protocol']}, {p['source']}): {p['top1']:.1f}" for p in published or ()]
    return "\n".join(lines)


def _names(rows: Sequence[dict]) -> list[str]:
    """What the features of each row are called: a run with its folder, where several runs have its name."""
    runs = [Path(row.get("judged", "")) for row in rows]
    names = [run.name for run in {*runs}]
    return [f"{run.parent.name}/{run.name}" if run.name == row["source"] and names.count(run.name) > 1
            else row["source"] for row, run in zip(rows, runs, strict=True)]


def shown(row: dict) -> str:
    """The number that sums a row up, in %: accuracy; of detectors VOC's AP50 with its interval or COCO's AP; of support
    vector machines the mean AP. "" where there is none, as in curves of low shot."""
    detector = "ap50" if "interval" in row else "ap"
    for key, name in (("top1", ""), (detector, detector.upper() + " "), ("mAP", "mAP ")):
        if isinstance(value := row.get(key), int | float):
            edges = row.get("interval")
            return f"{name}{value:.1f}" + (f" [{edges[0]:.1f}, {edges[1]:.1f}]" if edges else "")
    return ""
