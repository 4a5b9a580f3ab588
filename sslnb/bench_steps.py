"""One training step with nothing around it, its backbone alone, and what happens once, for
notebooks/throughput.ipynb."""

import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from torch import Tensor, nn

from . import backbones
from .evaluate.features import the_device
from .launch import autocast
from .recipes import Recipe
from .run import Run


def random_views(recipe: Recipe) -> list[Tensor]:
    """Noise of the shapes that the recipe's method gets to see, on the device."""
    with backbones.shapes_only():
        method = recipe.build()
    picture = Image.new("RGB", (recipe.size + 32, recipe.size + 32))
    shapes = [x.shape[1:] for x in method.views(recipe.size)([picture])]
    drawn = [torch.randn(recipe.batch, *shape) for shape in shapes]
    return [x.to(the_device("auto"), memory_format=torch.channels_last) for x in drawn]


def training_step(recipe: Recipe, views: list[Tensor] | None = None, compile: bool = False) -> Callable[[], object]:
    """One optimizer step of the trainer: forward, backward, update, hooks. No images are loaded, no row is written."""
    from .checks import prepare
    from .monitor import Meter
    from .train import Trainer

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng():
        one = recipe.with_(data="digits_scattered", gpus=1, accum=1, force_accum=True)
        trainer = Trainer(prepare(one, out=Path(folder) / "run", compile=compile))
    torch.set_num_threads(trainer.threads)  # as many as for what stands beside it
    trainer.log_every = trainer.check_every = trainer.total = 10**9
    trainer.views = SimpleNamespace(photometric=lambda crops, seeds: crops)
    index = torch.arange(recipe.batch)
    batch, meter = (views or random_views(recipe), index, index, torch.full_like(index, -1)), Meter(trainer)
    return lambda: trainer._step(iter([batch]), meter)


def photometry(recipe: Recipe) -> Callable[[], object]:
    """What happens on the training device before the step: a batch of crops, noise here, becomes normalised views."""
    with backbones.shapes_only():
        views = recipe.build().views(recipe.size)
    shapes = [x.shape[1:] for x in random_views(recipe.with_(batch=1))]
    crops = [torch.randint(256, (recipe.batch, *shape), dtype=torch.uint8, device=the_device("auto"))
             for shape in shapes]
    return lambda: views.photometric(crops, torch.arange(recipe.batch))


def bare_step(recipe: Recipe, views: list[Tensor]) -> Callable[[], object]:
    """The backbone alone: what the method sends through it, forward, and backward where the method learns from it.

    Backward comes after all views are through, as in a method whose loss compares them: until then it must keep what
    backward needs of each, and memory that is new is slow.
    """
    backbone = backbones.build(recipe.backbone, recipe.size, **recipe.backbone_numbers)
    backbone.to(the_device("auto"), memory_format=torch.channels_last).train()
    sent = [(torch.randn(shape, device=views[0].device).to(memory_format=torch.channels_last), learns)
            for shape, learns in passes(recipe, views)]

    def step() -> None:
        loss = 0.0
        for x, learns in sent:
            with torch.set_grad_enabled(learns), autocast(recipe.precision, x.device):
                out = backbone(x)
            if learns:
                loss = loss + out.sum()
        loss.backward()
        backbone.zero_grad()
    return step


def passes(recipe: Recipe, views: list[Tensor]) -> list[tuple[torch.Size, bool]]:
    """What one step of the method sends into its backbone and into copies of it: (shape, whether it learns from it)."""
    method, sent = recipe.build().to(views[0].device).train(), []

    def note(net: nn.Module) -> Callable:
        learns = any(p.requires_grad for p in net.parameters())
        return lambda module, inputs: sent.append((inputs[0].shape, learns and torch.is_grad_enabled()))

    for net in method.modules():
        if type(net) is type(method.backbone):  # its first layer, for not every method calls the whole
            next(m for m in net.modules() if isinstance(m, nn.Conv2d)).register_forward_pre_hook(note(net))
    method(views, torch.arange(len(views[0]), device=views[0].device))
    return sent


def startup(recipe: Recipe, folder: str | Path) -> dict[str, float]:
    """Seconds of what happens once: importing, a run of one step as a process of its own, and one and the same training
    as a script and here, in this kernel."""
    from .train import pretrain

    def script(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - start

    def imported(code: str) -> float:
        timed = f"import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
        return float(subprocess.run([sys.executable, "-c", timed], check=True, stdout=subprocess.PIPE).stdout)

    def run(recipe: Recipe, out: str) -> str:
        values = json.dumps(recipe.to_json())
        return ("import json; from sslnb import pretrain; from sslnb.recipes import Recipe; "
                f"pretrain(Recipe.from_json(json.loads({values!r})), out={str(Path(folder) / out)!r})")

    taken = {"import sslnb": imported("import sslnb"),
             "from sslnb import pretrain, with torch": imported("from sslnb import pretrain"),
             "a run of one step, from its command to its end": script(run(recipe.with_(steps=1), "one step"))}
    script(run(recipe, "script"))
    pretrain(recipe, out=Path(folder) / "kernel")
    for place in ("script", "kernel"):
        taken[f"the training itself, in a {place}"] = Run(Path(folder) / place).status()["seconds"]
    return taken
