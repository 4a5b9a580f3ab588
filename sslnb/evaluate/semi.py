"""Semi-supervised evaluation: the whole network is fine-tuned on 1 % or 10 % of the labels.

    row = semi_supervised("runs/simclr", "semi_1", data="imagenet", fraction="1percent.txt", processes=4)

Nine settings, three learning rates times three for the new classifier, are trained on 80 % of the labelled images and
compared on the others; the best one is trained again on all of them and tested once. The zoo chose by its test images
instead: with so few labels that flatters, so our numbers may lie below its for the same network.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import limits
from ..errors import InputError
from ..recipes import Recipe
from .protocol import find, named, train_from, write_row
from .sources import open_source

LRS, HEAD_LRS = (0.001, 0.01, 0.1), (1.0, 10.0, 100.0)  # at a total batch of 256, and times that for the classifier
HOLD_OUT = 0.2

_semi = Recipe(
    method="sslnb.evaluate.supervised:Supervised", backbone="resnet50", size=224, data="imagenet", gpus=4, batch=64,
    epochs=20, optimizer="sgd", lr=0.01, schedule="step", milestones=(12, 16), gamma=0.2, lr_by_epoch=True,
    numbers={"frozen": False, "interpolation": "bicubic", "deterministic": True, "test_every": 0}, source="zoo",
)

SEMI = {
    "semi_1": _semi.with_(fraction=0.01, weight_decay=5e-4, note="13 or 12 images of every class in the published list "
                          "(1percent.txt of google-research/simclr); 0.01 draws another one per class by a seed."),
    "semi_10": _semi.with_(fraction=0.1, weight_decay=1e-4, note="The published list is 10percent.txt of "
                           "google-research/simclr; 0.1 draws another one per class by a seed."),
    "semi_demo": _semi.with_(
        backbone="resnet_mini", size=20, data="digits_scattered", gpus=1, batch=16, steps=300, milestones=(180, 240),
        lr_by_epoch=False, fraction=0.1, weight_decay=1e-4, crop=(0.7, 1.0), flip=0.0, source="ours",
        note="300 steps whatever the fraction, so that a curve over fractions compares labels and not lengths."),
}


def semi_supervised(source, protocol: str = "semi_1", data: str | Path | None = None, out: str | Path = "auto", *,
                    lrs: Sequence[float] = LRS, head_lrs: Sequence[float] = HEAD_LRS, hold_out: float = HOLD_OUT,
                    fraction: float | str | None = None, backbone: str | None = None, fresh: bool = False,
                    seed: int = 0,
                    **settings: Any) -> dict:
    """Choose among the settings on held-out labelled images, train the best on all, test once; the row, with all nine.

    `fraction`: of the labels, or a file that lists images (`n01440764_10026.JPEG` per line), as the published splits
    are. `fresh`: the network with fresh weights, which is training from scratch. `out`: run directory of the chosen
    setting, those of the others lie in it. `settings` go to `train_from`: processes, epochs …
    Errors: InputError before any work.
    """
    check_rates(protocol, settings, lrs, head_lrs)
    if fraction is not None:
        settings["fraction"] = fraction if isinstance(fraction, float) else str(fraction)
    source, recipe = open_source(source, seed, backbone), find(protocol)
    source = source.untrained() if fresh else source
    found = []
    for lr in lrs:
        for head_lr in head_lrs:
            place = "auto" if out == "auto" else Path(out) / f"lr{lr:g}_head{head_lr:g}"
            with contextlib.redirect_stdout(io.StringIO()):  # one line for each of them is enough
                run = train_from(source, recipe, data, place, seed=seed, lr=lr, head_lr=head_lr, hold_out=hold_out,
                                 test_on="held out", **settings)
            top1 = run.history("test")[-1]["top1"]
            found.append({"lr": lr, "head_lr": head_lr, "held_out": top1})
            print(f"lr {lr:g}, times {head_lr:g} for the classifier: {top1:.1f} % of the held-out images")
    best = max(found, key=lambda setting: setting["held_out"])
    run = train_from(source, recipe, data, out, seed=seed, lr=best["lr"], head_lr=best["head_lr"], **settings)
    changed = {name: value for name, value, own in (("lrs", lrs, LRS), ("head_lrs", head_lrs, HEAD_LRS),
                                                    ("hold_out", hold_out, HOLD_OUT)) if value != own}
    if not isinstance(fraction, float):
        settings.pop("fraction", None)  # the published splits are files, and stand in the row by themselves
    return write_row(run, source, named(protocol, {**settings, **changed}, run), labels=len(run.recipe.load()),
                     fraction=run.recipe.fraction, **best, settings=found)


def check_rates(protocol: str, settings: Mapping[str, Any], lrs: Sequence[float] = LRS,
                head_lrs: Sequence[float] = HEAD_LRS) -> None:
    """Errors: InputError if there is nothing to choose among, or if a rate is among the settings."""
    if wrong := settings.keys() & {"lr", "head_lr"}:
        raise InputError(f"{' and '.join(sorted(wrong))} cannot be given: {protocol} chooses among `lrs` and "
                         "`head_lrs`. For one setting call train_protocol.")
    for name, values in (("lrs", lrs), ("head_lrs", head_lrs)):
        if not values:
            raise InputError(f"{name} is empty: give the rates to choose among.")
        for value in values:
            limits.check(name.removesuffix("s"), value)
