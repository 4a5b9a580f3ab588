"""Explorers moved by setting values, their headless twins, and every figure on small real runs."""

import io
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from sslnb import figures, load, methods, pretrain, widgets
from sslnb.masking import random_mask
from sslnb.recipes import method_numbers


@pytest.fixture(scope="module")
def digits():
    images = load("digits_scattered", "test")
    return [images[i] for i in range(4)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A small run of a joint-embedding method and one of a masked method."""
    folder = tmp_path_factory.mktemp("runs")
    small = {"simclr": {"size": 20, "batch": 320}, "mae": {"batch": 640}}
    return {name: pretrain(methods.recipes(name)["demo"].with_(epochs=1, data="digits_scattered", **changes),
                           out=folder / name) for name, changes in small.items()}


@pytest.fixture
def mae():
    torch.manual_seed(0)
    return methods.recipes("mae")["demo"].build().eval()


@pytest.fixture
def clothes(mae):
    """Three normalised images and the normalisation."""
    images, views = load("fashion_small", "test"), mae.views(28)
    return views([images[i] for i in range(3)])[0], views.normalize


def to_tensor(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def picture(box):
    """The PNG on display in a widget."""
    (image,) = find(box, "Image")
    return bytes(image.value)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def find(widget, kind):
    """All widgets of a kind inside another."""
    found = [widget] if type(widget).__name__ == kind else []
    return found + [w for child in getattr(widget, "children", ()) for w in find(child, kind)]


# Sliders

def line(height=1.0, color="black", grid=False):
    fig = figures.lines({"y": [0, height, 2]}, xlabel="x", title="a line")
    fig.axes[0].lines[0].set_color(color)
    fig.axes[0].grid(grid)
    return fig


def test_headless_an_explorer_is_the_figure_of_the_first_values():
    seen = []
    shown = widgets.explore(lambda **values: seen.append(values) or line(), height=(0.0, 2.0, 0.1, 0.5),
                            color=["red", "blue"], grid=True)
    assert isinstance(shown, Figure) and seen == [{"height": 0.5, "color": "red", "grid": True}]


def test_with_a_person_an_explorer_is_a_widget(monkeypatch):
    monkeypatch.setattr(widgets, "interactive", lambda: True)
    assert find(widgets.explore(line, height=(0.0, 2.0, 0.1, 0.5)), "Image")


@pytest.mark.parametrize("control, kind, value", [
    ({"height": (0.0, 2.0, 0.1, 0.5)}, "FloatSlider", 2.0),
    ({"height": (0, 2, 1, 0)}, "IntSlider", 2),
    ({"color": ["red", "blue"]}, "Dropdown", "blue"),
    ({"grid": False}, "Checkbox", True),
])
def test_an_explorer_redraws_when_a_control_moves(control, kind, value):
    box = widgets.explorer(line, control)
    (knob,) = find(box, kind)
    before = picture(box)
    assert before.startswith(b"\x89PNG") and (pixels(before)[0, 0] == 255).all()
    knob.value = value
    assert (pixels(picture(box)) != pixels(before)).any()


def test_headless_views_are_a_figure_at_the_recipes_own_numbers(digits):
    recipe = methods.recipes("simclr")["demo"]
    fig = widgets.views(recipe, digits, crop=(0.05, 1.0, 0.05), jitter=(0.0, 1.2, 0.1))
    ours = figures.views_grid(recipe.build().views(recipe.size), digits, seed=0)
    assert isinstance(fig, Figure) and (drawn(fig) == drawn(ours)).all()


def drawn(fig):
    return pixels(widgets._png(fig))


@pytest.mark.parametrize("name", sorted(m for m in methods.METHODS if "crop" in method_numbers(m)))
def test_the_views_sliders_start_at_the_recipe_and_change_what_the_network_sees(name, digits, monkeypatch):
    monkeypatch.setattr(widgets, "interactive", lambda: True)
    recipe = methods.recipes(name)["demo"]
    box = widgets.views(recipe, digits[:1], crop=(0.05, 1.0, 0.05))
    (crop,), (seed,) = find(box, "FloatSlider"), find(box, "IntSlider")
    assert crop.value == pytest.approx(recipe.build().crop[0]) and crop.description == "crop"
    start = picture(box)
    crop.value = 1.0
    whole = picture(box)
    seed.value = 3
    assert len({start, whole, picture(box)}) == 3
    crop.value, seed.value = recipe.build().crop[0], 0
    assert picture(box) == start  # the same numbers and seed are the same picture


# The board of patches

class Board:
    """A mask board that keeps the masks it has drawn, and ways to its parts. Without a figure the drawing is empty."""

    def __init__(self, noise, figure=lambda mask: Figure(figsize=(1, 1)), ratio=0.75):
        self.masks = []

        def draw(mask):
            self.masks.append(mask)
            return figure(mask)

        self.box = widgets.mask_board(draw, {round(noise.shape[1] ** 0.5): noise}, ratio)
        (self.slider,), self.tiles = find(self.box, "FloatSlider"), find(self.box, "Button")

    def click(self, place):
        """Click; returns the masks and pictures before and after."""
        old = self.masks[-1], picture(self.box)
        self.tiles[place].click()
        return *old, self.masks[-1], picture(self.box)

    def hidden(self):
        """What the tiles say of the first image."""
        return [tile.tooltip == "hidden" for tile in self.tiles]


@pytest.fixture
def board(mae, clothes):
    noise = torch.rand(3, 49, generator=torch.Generator().manual_seed(0))

    def figure(mask):
        return figures.reconstructions(mae, clothes[0], mask, clothes[1])

    return Board(noise, figure)


def test_the_board_shows_the_mask_of_the_first_image(board):
    assert len(board.tiles) == 49 and board.hidden() == board.masks[-1][0].bool().tolist()
    colors = {tile.style.button_color for tile, hidden in zip(board.tiles, board.hidden(), strict=True) if hidden}
    assert len(colors) == 1 and sum(board.hidden()) == 37


@pytest.mark.parametrize("was_hidden", [True, False], ids=["hidden", "visible"])
def test_a_clicked_patch_flips_in_the_first_image_and_is_the_same_in_all(was_hidden, board):
    place = board.hidden().index(was_hidden)
    before, old, after, new = board.click(place)
    assert (after[:, place] == (not was_hidden)).all()
    assert (before[0] != after[0]).nonzero().flatten().tolist() == [place]
    assert (after.sum(1) == before.sum(1) + (-1 if was_hidden else 1)).all()
    assert board.hidden() == after[0].bool().tolist() and (pixels(old) != pixels(new)).any()


@pytest.mark.parametrize("was_hidden", [True, False], ids=["hidden", "visible"])
def test_with_one_mask_for_all_images_a_click_changes_that_patch_and_no_other(was_hidden):
    board = Board(torch.rand(1, 49).expand(3, 49).clone())
    for _ in range(3):
        place = board.hidden().index(was_hidden)
        before, _, after, _ = board.click(place)
        assert ((before != after) == (torch.arange(49) == place)).all()


def test_a_second_click_undoes_the_first(board):
    place = board.hidden().index(False)
    before, _, _, _ = board.click(place)
    _, _, after, _ = board.click(place)
    assert before[0].equal(after[0])


@pytest.mark.parametrize("ratio", [0.9, 0.1], ids=["the last visible", "the last hidden"])
@pytest.mark.parametrize("length", [49, 196])
def test_patches_can_be_clicked_away_until_one_is_left_and_that_one_stays(length, ratio):
    board, kind = Board(torch.rand(3, length), ratio=ratio), ratio < 0.5
    while board.hidden().count(kind) > 1:
        place = board.hidden().index(kind)
        before, _, after, _ = board.click(place)
        assert (before[0] != after[0]).nonzero().flatten().tolist() == [place]
    draws = len(board.masks)
    board.click(board.hidden().index(kind))
    assert len(board.masks) == draws and board.hidden().count(kind) == 1


def test_a_click_leaves_the_sliders_range_and_steps_alone(board):
    before = board.slider.min, board.slider.max, board.slider.step
    board.click(0)
    assert (board.slider.min, board.slider.max, board.slider.step) == before


@pytest.mark.parametrize("length", [49, 196])
def test_at_both_ends_of_the_slider_something_is_visible_and_something_hidden(length):
    board = Board(torch.rand(3, length))
    for end in (board.slider.min, board.slider.max):
        board.slider.value = end
        assert set(board.hidden()) == {True, False}


def test_growing_mask_ratios_give_nested_masks(board):
    masks = []
    for ratio in (0.2, 0.4, 0.6, 0.8, 0.95):
        board.slider.value = ratio
        masks.append(board.masks[-1])
        assert board.hidden() == masks[-1][0].bool().tolist()
    for small, large in zip(masks, masks[1:], strict=False):
        assert (small <= large).all() and (small.sum(1) < large.sum(1)).all()


def test_headless_reconstructions_are_the_static_figure_and_with_a_person_the_board(mae, clothes, monkeypatch):
    assert isinstance(widgets.reconstructions(mae, *clothes), Figure)
    monkeypatch.setattr(widgets, "interactive", lambda: True)
    box = widgets.reconstructions(mae, *clothes)
    (slider,) = find(box, "FloatSlider")
    start = picture(box)
    slider.value = 0.5
    assert (pixels(picture(box)) != pixels(start)).any()


def test_watching_a_finished_run_says_so_once_and_returns(runs, capsys):
    widgets.watch(runs["simclr"])
    assert "done at step" in capsys.readouterr().out


# Figures

def test_curves_of_one_and_of_two_runs(runs):
    one, two = figures.curves({"SimCLR": runs["simclr"]}), figures.curves(runs, "knn", title="kNN")
    rows = runs["simclr"].history("step")
    assert one.axes[0].lines[0].get_ydata().tolist() == [row["loss"] for row in rows]
    assert len(two.axes[0].lines) == 2 and two.axes[0].get_legend() and two.get_suptitle() == "kNN"
    assert len({(line.get_color(), line.get_linestyle()) for line in two.axes[0].lines}) == 2


def test_the_collapse_panel_draws_five_values_or_six_and_says_a_sentence(runs, capsys):
    fig = figures.collapse_panel(runs["simclr"])
    said = capsys.readouterr().out
    assert len(fig.axes) == 6 and len(said.split()) > 3 and len(figures.collapse_panel(runs["mae"]).axes) == 5
    rows = runs["simclr"].history("step")
    assert fig.axes[5].lines[0].get_ydata().tolist() == [row["output_std"] for row in rows]
    assert all(len(ax.lines[0].get_xdata()) >= 2 for ax in fig.axes)
    capsys.readouterr()
    both = figures.collapse_panel(runs)
    assert [text.get_text() for text in both.legends[0].texts] == list(runs)
    assert "simclr: " in (said := capsys.readouterr().out) and "mae: " in said and len(both.axes[0].lines) == 2
    assert both.get_figwidth() < 9, "wider ones cannot be read in a narrow window"
    for ax in both.axes:
        low, high = ax.get_ylim()
        assert all(low <= y <= high for line in ax.lines for y in line.get_ydata())
        assert low == 0 or "std" not in ax.get_title()


def test_pictures_are_drawn_as_they_are(digits):
    x = to_tensor(digits[0])
    for picture in (digits[0], x):
        assert np.allclose(np.asarray(figures.picture(picture), dtype=float) / (255 if picture is digits[0] else 1),
                           x.permute(1, 2, 0))
    fig = figures.grid([digits[:2], [None], []], ["a", "b", "c"], column_names=["one", "two"])
    assert [bool(ax.images) for ax in fig.axes] == [True, True, False, False, False, False]


@pytest.mark.parametrize("rows", [[], [[]], [[None]]], ids=["no rows", "an empty row", "no image"])
def test_a_grid_without_images_is_an_empty_figure(rows):
    drawn(figures.grid(rows, title="nothing"))


def test_the_views_grid_shows_the_image_and_every_draw(digits):
    recipe = methods.recipes("byol")["demo"]
    fig = figures.views_grid(recipe.build().views(recipe.size), digits[:2], draws=3)
    assert len(fig.axes) == 2 * (1 + 3 * 2) and all(ax.images for ax in fig.axes)


@pytest.mark.parametrize("name, draws", [("byol", 4), ("rotation", 8), ("swav", 1)])
def test_the_views_grid_draws_as_often_as_there_is_room(digits, name, draws):
    recipe = methods.recipes(name)["demo"]
    views = recipe.build().views(recipe.size)
    fig = figures.views_grid(views, digits[:1])
    assert len(fig.axes) == 1 + draws * len(views)
    assert fig.axes[-1].get_title() == (f"view {len(views)}" if len(views) > 1 else f"draw {draws}")


def test_a_logarithmic_axis_is_labelled_with_plain_numbers_that_do_not_touch():
    fig = figures.against({"a": dict.fromkeys((20, 500, 1000, 1050), 1.0), "b": {0.5: 2.0}}, "images")
    assert [label.get_text() for label in fig.axes[0].get_xticklabels()] == ["0.5", "20", "500", "1,000"]


def test_long_names_of_runs_leave_room_for_the_levels():
    fig = figures.depths({"simclr-digits_scattered-ep2-seed0-cb6b9c": {"feat1": 1.0}, "raw pixels": {"feat1": 2.0}})
    assert [text.get_text() for text in fig.axes[0].get_legend().texts] == ["simclr", "raw pixels"]


def test_a_legend_stands_beside_the_curves_if_its_names_leave_them_room():
    for name, beside in (("simclr", True), ("simclr-digits_scattered-ep2-seed0", False)):
        fig = figures.lines({name: [1, 2], "raw pixels": [2, 1]}, xlabel="x", title="t")
        fig.canvas.draw()
        ax = fig.axes[0]
        assert (ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1) == beside


def test_lines_over_an_index_and_over_x():
    fig = figures.lines({"a": [1, 2], "b": [2, 1]}, [0.5, 1.0], xlabel="share", title="t")
    assert list(fig.axes[0].lines[1].get_xdata()) == [0.5, 1.0] and fig.axes[0].get_legend()
    whole = figures.lines({"a": [1, 2, 3]}, [1, 2, 3], xlabel="stage", title="t")
    assert all(float(tick).is_integer() for tick in whole.axes[0].get_xticks())
    assert list(figures.lines({"a": [1, 2]}, xlabel="x", title="t").axes[0].lines[0].get_xdata()) == [0, 1]


def test_no_figure_stays_open_to_be_shown_twice():
    import matplotlib.pyplot as plt

    figures.lines({"a": [1, 2]}, xlabel="x", title="t")
    assert plt.get_fignums() == []


def test_accuracy_bars_draw_the_95_percent_intervals():
    rows = [{"protocol": protocol, "source": source, "top1": top1, "interval": [top1 - 3, top1 + 2]}
            for protocol in ("knn", "linear") for source, top1 in (("trained", 80.0), ("raw pixels", 60.0))]
    fig = figures.accuracy_bars(rows)
    assert [text.get_text() for text in fig.axes[0].get_yticklabels()] == ["trained", "raw pixels"]
    assert [ax.get_title() for ax in fig.axes] == ["knn", "linear"]
    for ax in fig.axes:
        bars, whiskers = [c for c in ax.containers if hasattr(c, "patches")][0], ax.collections[0].get_segments()
        assert [bar.get_width() for bar in bars.patches] == [80, 60]
        assert [(round(a[0]), round(b[0])) for a, b in whiskers] == [(77, 82), (57, 62)]
        assert [text.get_text() for text in ax.texts] == ["80.0", "60.0"] and ax.get_xlim() == (0, 100)


def test_a_source_keeps_line_and_colour_in_every_panel():
    rows = [{"protocol": protocol, "source": source, "top1": 50.0, "interval": [45.0, 55.0]}
            for protocol, sources in (("knn", "abc"), ("linear", "cb")) for source in sources]
    one, two = figures.accuracy_bars(rows).axes
    bars = [{bar.get_y(): bar.get_facecolor() for bar in ax.containers[0].patches} for ax in (one, two)]
    assert len(set(bars[0].values())) == 3 and len(bars[1]) == 2 and bars[1].items() <= bars[0].items()


def test_bars_have_names_that_tell_them_apart():
    sources = ["byol-digits-ep60-seed0", "byol-digits-ep60-seed1", "raw pixels"]
    rows = [{"protocol": "knn", "source": s, "top1": 50.0, "interval": [45.0, 55.0]} for s in sources]
    labels = [text.get_text() for text in figures.accuracy_bars(rows).axes[0].get_yticklabels()]
    assert labels == ["byol-digits-ep60-seed0", "byol-digits-ep60-seed1", "raw pixels"]
    labels = [text.get_text() for text in figures.accuracy_bars(rows[1:]).axes[0].get_yticklabels()]
    assert labels == ["byol", "raw pixels"]


def test_without_labels_there_are_no_bars():
    assert "no labels" in figures.accuracy_bars([]).get_suptitle()


def test_neighbours_puts_the_query_first_and_the_nearest_next(digits):
    x = torch.tensor([[1.0, 0], [0, 1], [3, 0.3], [0.1, 9]])
    fig = figures.neighbours(digits, x, queries=[0, 1], k=2)
    shown = [ax.images[0].get_array() for ax in fig.axes]
    for found, expected in zip(shown, [0, 2, 3, 1, 3, 2], strict=True):
        assert (found == np.asarray(digits[expected])).all()


@pytest.mark.parametrize("labelled", [True, False])
def test_an_embedding_with_and_without_labels(labelled):
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    labels, classes = (torch.arange(40) % 3, ["a", "b", "c"]) if labelled else (None, [])
    fig = figures.embedding(features, labels, classes)
    assert [len(points.get_offsets()) for points in fig.axes[0].collections] == ([14, 13, 13] if labelled else [40])


def test_similarities_are_drawn_from_minus_one_to_one():
    shown = figures.similarities(torch.eye(3), "cosines").axes[0].images[0]
    assert shown.get_clim() == (-1, 1) and (shown.get_array() == np.eye(3)).all()


def test_a_film_has_a_row_per_snapshot(runs):
    snapshots = runs["mae"].snapshots()
    fig = figures.film(runs["mae"], count=3)
    assert len(snapshots) >= 2 and len(fig.axes) == (2 + len(snapshots)) * 3
    assert fig.axes[-3].get_ylabel() == f"step {snapshots[-1][0]}"
    with Image.open(runs["mae"].path / "film.gif") as gif:  # image, input and painting above each other, three images
        assert gif.n_frames == len(snapshots) and gif.width == gif.height >= 3 * 28
        first = np.asarray(gif.convert("RGB")).astype(int)
        gif.seek(gif.n_frames - 1)
        last = np.asarray(gif.convert("RGB")).astype(int)
    third = len(first) // 3
    change = np.abs(first - last).mean((1, 2))
    assert change[2 * third:].mean() > 5 > change[:2 * third].mean()  # only the paintings change
    assert (runs["mae"].path / "film.png").stat().st_size > 1000


def test_reconstructions_say_how_many_patches_and_how_good(mae, clothes):
    mask = random_mask(torch.rand(3, 49), 0.75)
    fig = figures.reconstructions(mae, clothes[0], mask, clothes[1])
    assert fig.get_suptitle().startswith("37 of 49 patches removed, ") and "dB" in fig.get_suptitle()
    assert "from the truth" not in fig.get_suptitle()
    mae.norm_pix = True
    assert "from the truth" in figures.reconstructions(mae, clothes[0], mask, clothes[1]).get_suptitle()
    inpainting = methods.recipes("inpainting")["demo"].build().eval()  # its holes have the shape that they have
    fig = figures.reconstructions(inpainting, clothes[0], random_mask(torch.rand(3, 784), 0.25), clothes[1])
    assert fig.get_suptitle().startswith("196 of 784 pixels removed, ")


def test_removed_patches_are_grey_and_the_others_untouched():
    images = torch.rand(1, 3, 4, 4)
    shown = figures.masked(images, torch.tensor([[1.0, 0, 0, 0]]), 2)
    assert (shown[:, :, :2, :2] == figures.MASKED).all() and shown[:, :, 2:].equal(images[:, :, 2:])


def test_psnr_by_hand():
    truth = torch.zeros(1, 3, 2, 2)
    painted = truth.clone()
    painted[..., 0, 0], painted[..., 1, 1] = 0.1, 0.9  # the second pixel was visible
    hole = torch.tensor([[1.0, 1], [0, 0]])[None, None]
    assert figures.psnr(painted, truth, hole) == pytest.approx(-10 * math.log10(0.01 / 2), abs=1e-4)
