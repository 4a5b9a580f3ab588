"""Interactive twins of the figures. Headless each is its own static figure, so the same cell serves both."""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from . import figures
from .backbones import image_size
from .data import load
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
    length = (images.shape[-1] // method.patch) ** 2
    noise = torch.rand(len(images), length, generator=torch.Generator().manual_seed(seed))

    def draw(mask_ratio: float) -> Figure:
        return figures.reconstructions(method, images, random_mask(noise, mask_ratio), normalize)

    if not interactive():
        return draw(method.mask_ratio)
    return mask_board(draw, noise, method.mask_ratio)


def mask_board(draw: Callable[[float], Figure], noise: torch.Tensor, mask_ratio: float):
    """Slider, board of patches and picture. `noise` (B, L) is changed in place by clicks: low stays, high goes."""
    import ipywidgets as w

    length = noise.shape[1]
    side = round(length**0.5)
    slider = w.FloatSlider(value=mask_ratio, min=0.001, max=1 - 1 / length - 1e-6, step=0.05,  # one patch stays
                           description="mask ratio", continuous_update=False)
    tiles = [w.Button(layout=w.Layout(width="26px", height="26px", margin="1px", padding="0")) for _ in range(length)]
    image = _image()

    def redraw(_=None) -> None:
        mask = random_mask(noise[:1], slider.value)[0]
        for tile, hidden in zip(tiles, mask.tolist(), strict=True):
            tile.style.button_color = "#444444" if hidden else "#E8E8E8"
            tile.tooltip = "hidden" if hidden else "visible"
        image.value = _png(draw(slider.value))

    def click(place: int) -> None:
        mask = random_mask(noise[:1], slider.value)[0]
        hidden = mask[place] > 0
        visible = length - int(mask.sum()) + (1 if hidden else -1)
        if not 0 < visible < length:
            return  # something must stay visible, and something hidden
        noise[:, place] = noise.min(1).values - 1 if hidden else noise.max(1).values + 1
        ratio = 1 - visible / length - 1e-6  # so that exactly `visible` patches stay
        if abs(ratio - slider.value) > 1e-9:
            slider.value = ratio  # redraws
        else:
            redraw()

    for place, tile in enumerate(tiles):
        tile.on_click(lambda _, place=place: click(place))
    slider.observe(redraw, "value")
    redraw()
    board = w.GridBox(tiles, layout=w.Layout(grid_template_columns=f"repeat({side}, 28px)"))
    hint = w.Label("Click a patch to hide it or to show it again.")
    return w.HBox([w.VBox([slider, hint, board], layout=w.Layout(flex="0 0 auto", overflow="visible")), image])


def masking(sources: Mapping[str, object], image=None, mask_ratio: float = 0.6, seed: int = 0):
    """Masked methods side by side, all on the same image under the same mask; one column each.

    `sources`: name -> a Run, the path of a run directory, or a Masked method. `image`: a PIL image or the path of one,
    such as your own; None: a photograph. Sliders for the ratio and the size of squares, a board to click, amplitudes
    instead of pictures, and an upload. Headless: the figure. Errors: InputError if methods have different image sizes,
    or a source has no decoder.
    """
    methods = {name: painter(source) for name, source in sources.items()}
    sizes = {name: image_size(method.backbone) for name, method in methods.items()}
    if len(set(sizes.values())) > 1:
        raise InputError(f"Side by side needs one image size, and these have {sizes}; train them at the same one.")
    size = next(iter(sizes.values()))
    shown = {"image": _square(image, size)}
    cells = [n for n in (4, 7, 14) if size % n == 0] or [7]

    def draw(mask: torch.Tensor, amplitudes: bool) -> Figure:
        return figures.side_by_side(methods, shown["image"], mask, amplitudes)

    noise = {n: torch.rand(1, n * n, generator=torch.Generator().manual_seed(seed)) for n in cells}
    first = 7 if 7 in cells else cells[0]
    if not interactive():
        return draw(random_mask(noise[first], mask_ratio)[0], False)
    return side_by_side(draw, noise, first, mask_ratio, lambda picture: shown.update(image=_square(picture, size)))


def painter(source) -> Masked:
    """The whole masked method of a run, its path, or a method itself: what can paint."""
    from .run import Run

    if isinstance(source, str | Path):
        if Path(source).is_file():
            raise InputError(f"{source} is a file of weights, and those of an encoder cannot paint: the decoder or "
                             "head that makes pictures is missing there. Give the run directory of a masked method.")
        source = Run.open(source)
    method = source.method() if isinstance(source, Run) else source
    if not isinstance(method, Masked):
        raise InputError(f"{type(method).__name__} hides no part of an image, so it has nothing to paint; use the run "
                         "of a masked method, such as mae or simmim.")
    return method


def side_by_side(draw: Callable[[torch.Tensor, bool], Figure], noise: dict[int, torch.Tensor], cells: int,
                 mask_ratio: float, upload: Callable):
    """The widget of `masking`: `noise` (1, n²) for every number n of squares in a row, changed in place by clicks."""
    import ipywidgets as w

    ratio = w.FloatSlider(value=mask_ratio, min=0.05, max=0.95, step=0.05, description="mask ratio",
                          continuous_update=False)
    squares = w.Dropdown(options=[(f"{n} x {n} squares", n) for n in noise], value=cells, description="mask of")
    amplitudes = w.Checkbox(description="Fourier amplitudes", indent=False)
    file = w.FileUpload(accept="image/*", description="your image")
    message, image, board = w.Label(), _image(), w.VBox()

    def redraw(_=None) -> None:
        mask = random_mask(noise[squares.value], ratio.value)[0]
        board.children = [_board(mask, click)]
        image.value = _png(draw(mask, amplitudes.value))

    def click(place: int) -> None:
        now, row = random_mask(noise[squares.value], ratio.value)[0], noise[squares.value][0]
        visible = int((now == 0).sum()) + (1 if now[place] else -1)
        if 0 < visible < len(row):
            row[place] = row.min() - 1 if now[place] else row.max() + 1
            ratio.min, ratio.max = 0.0, 1.0
            ratio.value = 1 - visible / len(row) - 1e-6  # so that exactly `visible` squares stay; redraws

    def receive(change) -> None:
        try:
            upload(Image.open(io.BytesIO(change["new"][0]["content"])))
            message.value = ""
        except (OSError, IndexError) as error:
            message.value = f"This file cannot be read as an image ({error}); try a PNG or a JPEG."
        redraw()

    for control in (ratio, squares, amplitudes):
        control.observe(redraw, "value")
    file.observe(receive, "value")
    redraw()
    controls = w.VBox([ratio, squares, amplitudes, file, message, board], layout=w.Layout(flex="0 0 auto"))
    return w.HBox([controls, image])


def _board(mask: torch.Tensor, click: Callable[[int], None]):
    """A button for every square; dark ones are hidden."""
    import ipywidgets as w

    side = round(len(mask) ** 0.5)
    tiles = [w.Button(layout=w.Layout(width="26px", height="26px", margin="1px", padding="0"),
                      tooltip="hidden" if hidden else "visible") for hidden in mask.tolist()]
    for place, tile in enumerate(tiles):
        tile.style.button_color = "#444444" if mask[place] else "#E8E8E8"
        tile.on_click(lambda _, place=place: click(place))
    return w.GridBox(tiles, layout=w.Layout(grid_template_columns=f"repeat({side}, 28px)"))


def _square(image, size: int) -> torch.Tensor:
    """A PIL image, a path, or None for a photograph -> its central square (3, size, size) in [0, 1]."""
    if image is None:
        image = load("photos")[1]
    elif isinstance(image, str | Path):
        if not Path(image).is_file():
            raise InputError(f"There is no image {str(image)!r}; give the path of a picture, or none for a photograph.")
        image = Image.open(image)
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
    kind = w.IntSlider if all(isinstance(v, int) for v in control) else w.FloatSlider
    return kind(value=value, min=low, max=high, step=step, continuous_update=False, **settings)


def _image():
    """A picture at its own size: boxes would stretch it to their width, and small digits to a blur."""
    import ipywidgets as w

    return w.Image(format="png", layout=w.Layout(align_self="flex-start", flex="0 1 auto", min_width="0"))


def _png(fig: Figure) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=100, facecolor="white")
    return buffer.getvalue()
