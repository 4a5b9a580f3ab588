"""Interactive twins of the figures. Headless each is its own static figure, so the same cell serves both."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from . import figures
from .backbones import image_size
from .data import load
from .decoding import read_image
from .errors import InputError
from .masking import random_mask
from .methods.base import Masked
from .notebook import interactive


def explore(draw: Callable[..., Figure], **controls):
    """A figure under sliders: `draw(**values)` again whenever one moves. Headless: the figure for the first values.

    A control is (low, high, step, value), a list of choices, or a bool.
    """
    start = {name: _first(control) for name, control in controls.items()}
    if not interactive():
        return draw(**start)
    return explorer(draw, controls)


def explorer(draw: Callable[..., Figure], controls: Mapping[str, object]):
    """The widget of `explore`, whoever is watching."""
    import ipywidgets as w

    knobs = {name: _knob(name, control) for name, control in controls.items()}
    image = _image()

    def redraw(_=None) -> None:
        image.value = _png(draw(**{name: knob.value for name, knob in knobs.items()}))

    for knob in knobs.values():
        knob.observe(redraw, "value")
    redraw()
    return w.VBox([*knobs.values(), image])


def views(recipe, images: Sequence, **controls):
    """The recipe's real pipeline under sliders over its own numbers, e.g. jitter=(0, 2, 0.1)."""
    method = recipe.build()

    def draw(seed: int = 0, **numbers) -> Figure:
        for name, value in numbers.items():
            if name == "crop":
                value = (value, method.crop[1])
            setattr(method, name, value)
        return figures.views_grid(method.views(recipe.size), images, seed=seed)

    full = {}
    for name, (low, high, step) in controls.items():
        value = getattr(method, name)
        full[name] = (low, high, step, value[0] if name == "crop" else value)
    return explore(draw, **full, seed=(0, 20, 1, 0))


def reconstructions(method, images: torch.Tensor, normalize, seed: int = 0):
    """Reconstructions under a mask-ratio slider (nested masks), and a board of patches of the first image to click.

    A clicked patch is hidden or shown again in every image. Headless: the static figure.
    """
    side = images.shape[-1] // method.patch
    noise = torch.rand(len(images), side * side, generator=torch.Generator().manual_seed(seed))

    def draw(mask: torch.Tensor) -> Figure:
        return figures.reconstructions(method, images, mask, normalize)

    if not interactive():
        return draw(random_mask(noise, method.mask_ratio))
    return mask_board(draw, {side: noise}, method.mask_ratio)


def mask_board(draw: Callable[[torch.Tensor], Figure], noise: Mapping[int, torch.Tensor], mask_ratio: float,
               more: Callable[[Callable], Sequence] = lambda redraw: ()):
    """Slider, board of squares and picture: `draw(mask)` again whenever something moves, mask (B, L).

    `noise`: (B, n²) for every number n of squares in a row that may be chosen, changed in place by clicks: low stays,
    high goes. `more(redraw)`: further controls.
    """
    import ipywidgets as w

    grids = w.Dropdown(options=[(f"{n} x {n} squares", n) for n in noise], description="mask of")
    slider = w.FloatSlider(value=mask_ratio, min=0.001, max=1, step=0.05, description="mask ratio",
                           continuous_update=False)
    board, image = w.GridBox(), _image()

    def mask() -> torch.Tensor:
        return random_mask(noise[grids.value], slider.value)

    def redraw(_=None) -> None:
        now = mask()
        for tile, hidden in zip(board.children, now[0].tolist(), strict=True):
            tile.style.button_color = "#444444" if hidden else "#E8E8E8"
            tile.tooltip = "hidden" if hidden else "visible"
        fig = draw(now)
        image.value, image.layout.max_width = _png(fig), f"{100 * fig.get_figwidth():.0f}px"

    def click(place: int) -> None:
        now, row = mask()[0], noise[grids.value]
        visible = int((now == 0).sum()) + (1 if now[place] else -1)
        if not 0 < visible < len(now):
            return  # something must stay visible, and something hidden
        row[:, place] = row.min(1).values - 1 if now[place] else row.max(1).values + 1
        ratio = 1 - visible / len(now) - 1e-6  # so that exactly `visible` squares stay
        if abs(ratio - slider.value) > 1e-9:
            slider.value = ratio  # redraws
        else:
            redraw()

    def lay_out(_=None) -> None:
        n = grids.value
        square = w.Layout(width="26px", height="26px", margin="1px", padding="0")
        tiles = [w.Button(layout=square) for _ in range(n * n)]
        for place, tile in enumerate(tiles):
            tile.on_click(lambda _, place=place: click(place))
        board.children, board.layout.grid_template_columns = tiles, f"repeat({n}, 28px)"
        slider.max = 1 - 1 / n**2 - 1e-6  # one square stays
        redraw()

    slider.observe(redraw, "value")
    grids.observe(lay_out, "value")
    lay_out()
    hint = w.Label("Click a square to hide it or to show it again.")
    controls = [slider, *([grids] if len(noise) > 1 else []), *more(redraw), hint, board]
    image.layout.flex = "1 1 500px"  # below that it goes under the board instead of getting smaller beside it
    return w.HBox([w.VBox(controls, layout=w.Layout(flex="0 0 auto", overflow="visible")), image],
                  layout=w.Layout(flex_flow="row wrap"))


def masking(sources: Mapping[str, object], image=None, mask_ratio: float = 0.6, seed: int = 0):
    """Masked methods side by side, all on the same image under the same mask; one column each.

    `sources`: name -> a Run, the path of a run directory, a published file of MAE that holds its decoder, or a Masked
    method. `image`: a PIL image or the path of one, such as your own; None: a photograph. Sliders for the ratio and the
    size of squares, a board to click, amplitudes instead of pictures, and an upload. Headless: the figure. Errors:
    InputError if methods have different image sizes, or a source has no decoder.
    """
    methods = {name: painter(source) for name, source in sources.items()}
    sizes = {name: image_size(method.backbone) for name, method in methods.items()}
    if len(set(sizes.values())) > 1:
        raise InputError(f"Side by side needs one image size, and these have {sizes}; train them at the same one.")
    size = next(iter(sizes.values()))
    state = {"image": _square(image, size), "amplitudes": False}
    numbers = [n for n in (7, 4, 14) if size % n == 0] or [7]  # of squares in a row
    noise = {n: torch.rand(1, n * n, generator=torch.Generator().manual_seed(seed)) for n in numbers}

    def draw(mask: torch.Tensor) -> Figure:
        return figures.side_by_side(methods, state["image"], mask[0], state["amplitudes"])

    if not interactive():
        return draw(random_mask(noise[numbers[0]], mask_ratio))
    return mask_board(draw, noise, mask_ratio, lambda redraw: _what_to_show(state, size, redraw))


def painter(source) -> Masked:
    """The whole masked method of a run, its path, a file of MAE with its decoder, or a method itself."""
    from .run import Run

    if isinstance(source, str | Path):
        if Path(source).is_file():
            from .zoo import painters

            return painters.painter(source)
        source = Run.open(source)
    method = source.method() if isinstance(source, Run) else source
    if not isinstance(method, Masked):
        raise InputError(f"{type(method).__name__} hides no part of an image, so it has nothing to paint; use the run "
                         "of a masked method, such as mae or simmim.")
    return method


def _what_to_show(state: dict, size: int, redraw: Callable) -> list:
    """A checkbox for amplitudes, an upload, and a line for what is wrong with it."""
    import ipywidgets as w

    amplitudes = w.Checkbox(description="Fourier amplitudes", indent=False)
    file, message = w.FileUpload(accept="image/*", description="your image"), w.Label()

    def receive(change) -> None:
        try:
            state["image"] = _square(read_image(io.BytesIO(change["new"][0]["content"])), size)
            message.value = ""
        except (InputError, OSError, IndexError):
            message.value = "This file cannot be read as an image; try a PNG or a JPEG."
        redraw()

    def switch(change) -> None:
        state["amplitudes"] = change["new"]
        redraw()

    amplitudes.observe(switch, "value")
    file.observe(receive, "value")
    return [amplitudes, file, message]


def _square(image, size: int) -> torch.Tensor:
    """A PIL image, a path, or None for a photograph -> its central square (3, size, size) in [0, 1]."""
    if image is None:
        image = load("photos")[1]
    elif isinstance(image, str | Path):
        if not Path(image).is_file():
            raise InputError(f"There is no image {str(image)!r}; give the path of a picture, or none for a photograph.")
        image = read_image(image)
    pixels = numpy.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255


def watch(run, seconds: float = 2.0):
    """Follow a run that trains elsewhere: status and curves, redrawn until it ends. Headless: as it is now."""
    import time

    from IPython.display import clear_output, display

    while True:
        status = run.status()
        text = f"{run.path}: {status.get('state')} at step {status.get('step')} of {status.get('total')}"
        if interactive():
            clear_output(wait=True)
        print(text)
        if run.history():
            display(figures.curves({run.path.name: run}))
        if not interactive() or status.get("state") != "running":
            return
        time.sleep(seconds)


def _first(control):
    return control[3] if isinstance(control, tuple) else control[0] if isinstance(control, list) else control


def _knob(name: str, control):
    import ipywidgets as w

    settings = {"description": name.replace("_", " "), "style": {"description_width": "120px"}}
    if isinstance(control, bool):
        return w.Checkbox(value=control, **settings)
    if isinstance(control, list):
        return w.Dropdown(options=control, value=control[0], **settings)
    low, high, step, value = control
    kind = w.FloatSlider
    if all(isinstance(v, int) for v in control):
        kind = w.IntSlider
    else:  # as many places as the step has: two would make 0.01 of 0.005
        settings["readout_format"] = f".{max(2, math.ceil(-math.log10(step)))}f"
    return kind(value=value, min=low, max=high, step=step, continuous_update=False, **settings)


def _image():
    """A picture at its own size: boxes would stretch it to their width, and small digits to a blur."""
    import ipywidgets as w

    return w.Image(format="png", layout=w.Layout(align_self="flex-start", flex="0 1 auto", min_width="0"))


def _png(fig: Figure) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=100, facecolor="white")
    return buffer.getvalue()
