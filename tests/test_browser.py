"""A reader's view: JupyterLab in a browser, where the explorers are widgets that answer to keyboard and mouse."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install sslnb[test]")

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = 120_000  # ms; two kernels import torch on a busy machine

pytestmark = [pytest.mark.notebook,
              pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt install chromium")]


def part(name, *wanted, extra=""):
    """A notebook's own cells: parameters and imports, then those that contain one of the texts, then `extra`."""
    book = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    book.cells = code[:2] + [cell for cell in code[2:] if any(text in cell.source for text in wanted)]
    assert len(book.cells) == 2 + len(wanted)
    if extra:
        book.cells.append(nbformat.v4.new_code_cell(extra))
    return book


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab whose folder holds the notebooks of these tests, and that folder."""
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("lab")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {name: str(home / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR",
                                                 "IPYTHONDIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")}
    news = home / "JUPYTERLAB_SETTINGS_DIR" / "@jupyterlab" / "apputils-extension"
    news.mkdir(parents=True)
    (news / "notification.jupyterlab-settings").write_text(json.dumps({"fetchNews": "false"}))
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with (home / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--ServerApp.port={port}",
             "--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}",
             "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
            stdout=log, stderr=log, cwd=folder, env={**os.environ, **places, "PYTHONPATH": paths})
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=2)
                break
            except OSError:
                assert server.poll() is None, (home / "log").read_text()
                time.sleep(0.5)
        yield address, folder
    finally:
        server.terminate()  # ends its kernels too
        server.wait(20)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(lab, browser, tmp_path):
    """show(notebook) opens it in JupyterLab, runs all its cells and returns the page; a screenshot stays at the end."""
    address, folder = lab
    page = browser.new_page(viewport={"width": 1500, "height": 1100})

    def show(book, name):
        nbformat.write(book, folder / f"{name}.ipynb")
        page.goto(f"{address}/lab/workspaces/{name}/tree/{name}.ipynb")
        page.locator("#jp-main-statusbar").get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=WAIT)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        return page

    yield show
    page.screenshot(path=tmp_path / "screen.png")
    print(f"screenshot: {tmp_path / 'screen.png'}")
    page.close()


PICTURE = """image => fetch(image.src).then(r => r.arrayBuffer()).then(b => crypto.subtle.digest("SHA-256", b))
             .then(h => Array.from(new Uint8Array(h)).join())"""


def picture(page):
    """A digest of the picture on display in the widget (not of its address, which is new with every redraw)."""
    image = page.locator(".jp-OutputArea-output img.widget-image, .jp-OutputArea-output .widget-image img")
    image.first.wait_for(timeout=WAIT)
    image.first.scroll_into_view_if_needed()
    assert image.first.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
    return image.first.evaluate(PICTURE)


def changed(page, before):
    """Wait until the picture is another one."""
    for _ in range(100):
        if (now := picture(page)) != before:
            return now
        page.wait_for_timeout(200)
    raise AssertionError("the picture in the widget stayed as it was")


def looks_right(page):
    """No text of a control is cut off, no picture is blown up, and nothing went to stderr."""
    cut = page.locator(".widget-label, .widget-readout, .widget-vbox, .widget-hbox").evaluate_all(
        "all => all.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText)")
    assert cut == []
    assert page.locator("img.widget-image").evaluate_all("all => all.filter(e => e.width > e.naturalWidth).length") == 0
    assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").count() == 0, \
        page.locator("[data-mime-type='application/vnd.jupyter.stderr']").first.inner_text()


def test_someone_is_at_a_kernel_of_jupyterlab_and_the_views_answer_to_the_keyboard(show):
    page = show(part("byol", "print(recipe.describe", "views_grid", "widgets.views", extra="""
from sslnb.notebook import interactive
print("interactive:", interactive())"""), "views")
    page.get_by_text("interactive: True", exact=True).wait_for(timeout=WAIT)
    start = picture(page)
    crop = page.locator(".widget-slider", has_text="crop")
    handle, reading = crop.locator(".noUi-handle"), crop.locator(".widget-readout")
    value = float(reading.inner_text())
    handle.focus()
    page.keyboard.press("ArrowRight")
    moved = changed(page, start)
    assert float(reading.inner_text()) == pytest.approx(value + 0.05)
    page.keyboard.press("ArrowLeft")
    assert changed(page, moved) == start
    looks_right(page)


def test_the_mask_ratio_answers_to_the_keyboard_and_the_patches_to_clicks(show):
    book = part("mae", "print(recipe.describe", "views = method.views", "widgets.reconstructions")
    book.cells[-1].source = book.cells[-1].source.replace("run.method()", "method.eval()")  # not trained
    page = show(book, "masks")
    start = picture(page)
    tiles = page.locator(".widget-gridbox button")
    assert tiles.count() == 49 and page.locator(".widget-gridbox button[title=hidden]").count() == 37
    page.locator(".widget-gridbox button[title=visible]").first.click()
    clicked = changed(page, start)
    assert page.locator(".widget-gridbox button[title=hidden]").count() == 38
    page.locator(".widget-slider .noUi-handle").first.focus()
    page.keyboard.press("ArrowLeft")
    changed(page, clicked)
    assert page.locator(".widget-gridbox button[title=hidden]").count() < 38
    looks_right(page)
    page.set_viewport_size({"width": 900, "height": 1100})
    page.wait_for_timeout(1000)
    width = page.locator("img.widget-image").first.evaluate("image => image.width")
    assert width > 350, "below the board, not beside it"
    looks_right(page)
