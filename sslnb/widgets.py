"""Interactive twins of the figures. Headless each is its own static figure, so the same cell serves both."""

import io
from collections.abc import Callable, Mapping, Sequence

import torch
from matplotlib.figure import Figure

from . import figures, masking
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
        return figures.reconstructions(method, images, masking.random_mask(noise, mask_ratio), normalize)

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
        mask = masking.random_mask(noise[:1], slider.value)[0]
        for tile, hidden in zip(tiles, mask.tolist(), strict=True):
            tile.style.button_color = "#444444" if hidden else "#E8E8E8"
            tile.tooltip = "hidden" if hidden else "visible"
        image.value = _png(draw(slider.value))

    def click(place: int) -> None:
        mask = masking.random_mask(noise[:1], slider.value)[0]
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
