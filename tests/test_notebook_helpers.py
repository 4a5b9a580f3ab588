"""Checked parameters, source on display, equality and progress, apart from any notebook."""

import re

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from sslnb import notebook
from sslnb.errors import InputError, Interrupted
from sslnb.methods.simclr import SimCLR
from sslnb.notebook import Progress, TimeLeft, assigned, check, coerce, declared, interactive, same, show

CELL = """
epochs: int = 10  # passes over the data
lr: float = "auto"  # learning rate
resume: bool = True
out: str = "auto"
"""


# What papermill hands over becomes what the cell declares

@pytest.mark.parametrize("value, kind, expected", [
    (300, "int", 300),
    (1e5, "int", 100_000),  # -p epochs 1e5
    ("1e2", "int", 100),
    ("300", "int", 300),
    (0.001, "float", 0.001),
    ("1e-3", "float", 0.001),  # YAML without the dot
    (1, "float", 1.0),
    ("true", "bool", True),
    ("false", "bool", False),  # -p resume false: a truthy string
    (False, "bool", False),
    ("no", "bool", False),
    ("YES", "bool", True),
    (0, "bool", False),
    ("1", "bool", True),
    ("runs/a", "str", "runs/a"),
    (3, "str", "3"),  # -p out 003 is a number
])
def test_a_value_gets_the_declared_type(value, kind, expected):
    found = coerce("x", value, kind)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("value, kind", [
    ("many", "int"), (1.5, "int"), (True, "int"), (None, "int"), ("auto", "int"), (float("inf"), "int"),
    (float("nan"), "int"), ("fast", "float"), (None, "float"), ([1], "float"), ("maybe", "bool"), (2, "bool"),
    (None, "bool"), ("", "bool"), ("", "int"),
])
def test_a_value_that_cannot_have_the_type_is_named(value, kind):
    with pytest.raises(InputError, match=rf"Parameter size must be an? {kind}, but got {re.escape(repr(value))}\."):
        coerce("size", value, kind)


def test_auto_passes_only_where_it_is_the_declared_default():
    known = declared(CELL)
    values = {"epochs": 10, "lr": "auto", "resume": "false", "out": "auto"}
    found = check(known, [], values)
    assert vars(found) == {"epochs": 10, "lr": "auto", "resume": False, "out": "auto"}
    with pytest.raises(InputError, match="Parameter epochs must be an? int, but got 'auto'"):
        check(known, [], {**values, "epochs": "auto"})


def test_the_names_of_a_cell_and_of_what_was_injected():
    assert declared(CELL) == {"epochs": ("int", 10), "lr": ("float", "auto"), "resume": ("bool", True),
                              "out": ("str", "auto")}
    assert assigned('# Parameters\nepochs = 3\nnote = "a=b"\n') == ["epochs", "note"]


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(InputError, match="Unknown parameter 'epoch': did you mean 'epochs'"):
        check(declared(CELL), ["lr", "epoch"], {})


# In a shell

@pytest.fixture
def shell(monkeypatch):
    config = Config()
    config.HistoryManager.hist_file = ":memory:"
    shell = InteractiveShell(config=config)
    monkeypatch.setattr(notebook, "_shell", lambda: shell)
    return shell


def run(shell, *cells):
    """Cells one after another; returns `p` of the user."""
    for cell in cells:
        shell.run_cell(cell, store_history=True)
    return shell.user_ns.get("p")


READ = "from sslnb.notebook import parameters\np = parameters()"


def test_injected_values_win_and_are_typed(shell):
    p = run(shell, CELL, "# Parameters\nepochs = 1e2\nresume = 'false'\n", READ)
    assert (p.epochs, p.lr, p.resume) == (100, "auto", False)


def test_cells_take_half_of_the_cores(shell, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("sslnb.launch.cores", lambda: 6)
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    run(shell, CELL, READ)
    assert asked == [3]


def test_an_out_that_cannot_be_written_stops_the_cell(shell, tmp_path, monkeypatch):
    (tmp_path / "file").touch()

    def said(out):
        run(shell, CELL, f"# Parameters\nout = {str(out)!r}\n")
        return str(shell.run_cell(READ, store_history=True).error_in_exec)

    assert f"for {tmp_path / 'file'} is none; choose another one." in said(tmp_path / "file" / "runs" / "a")
    assert said(tmp_path / "new" / "run") == "None" and not (tmp_path / "new").exists()
    monkeypatch.setattr("os.access", lambda place, how: False)  # else root may write anywhere
    assert f"this user may not write to {tmp_path}; choose another folder." in said(tmp_path / "new" / "run")


def test_an_injected_name_that_is_not_declared_stops_the_cell(shell):
    run(shell, CELL, "# Parameters\nepoch = 3\n")
    result = shell.run_cell(READ, store_history=True)
    assert isinstance(result.error_in_exec, InputError) and "did you mean 'epochs'" in str(result.error_in_exec)
    assert "p" not in shell.user_ns


def test_bad_input_shows_the_readers_lines_and_the_sentence_alone(shell, capsys, monkeypatch):
    """Through a function of the reader's own, and where another error led to it."""
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    run(shell, "from sslnb import load, resolve\ndef mine(name):\n    return resolve(name)")
    for call, sentence in (("mine('simcrl')", "Unknown method 'simcrl': did you mean 'simclr'?"),
                           ("load('fashion_mnist', root='nowhere')", "fashion_mnist is not whole in ")):
        capsys.readouterr()
        shell.run_cell(f"x = 1\n{call}", store_history=True)
        said = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
        assert call in said and ("return resolve(name)" in said) == ("mine" in call)
        assert f"InputError: {sentence}" in said and said.count("InputError") == 2, "above and below"
        assert "sslnb/" not in said and "During handling" not in said


def test_the_stop_button_shows_the_readers_line_alone(shell, capsys, monkeypatch):
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    run(shell, "from sslnb.stop import Stop\nstop = Stop()\nstop.reason = 'SIGINT'",
        "def train():\n    raise stop.exception()")
    shell.run_cell("x = 1\ntrain()", store_history=True)
    said = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert "train()" in said and "Interrupted: SIGINT" in said and "sslnb/" not in said
    assert issubclass(Interrupted, KeyboardInterrupt)


def test_without_a_parameters_cell_the_remedy_is_named(shell):
    result = shell.run_cell(READ, store_history=True)
    assert "run the cell tagged `parameters` first" in str(result.error_in_exec)


def test_a_changed_parameters_cell_counts_when_both_cells_run_again(shell):
    p = run(shell, CELL, READ, CELL.replace("10", "20"), READ)
    assert p.epochs == 20


@pytest.mark.parametrize("between", [
    "this is not python (",
    "%matplotlib inline",
    "total: int = len('four')",
    "class A: pass\na = A()\na.b: int = 3",
    "steps: int = 3",
    "# Parameters of my own\nheads = 3",
], ids=["a typo", "a magic", "a computed annotation", "an annotated attribute", "an annotated number", "a comment"])
def test_cells_of_the_readers_own_do_not_disturb_the_parameters(between, shell):
    run(shell, CELL, READ, between, "del p")
    p = run(shell, READ)
    assert p is not None and list(vars(p)) == ["epochs", "lr", "resume", "out"]


def test_a_cell_of_the_readers_own_before_the_first_call_is_not_taken_for_the_parameters(shell):
    assert list(vars(run(shell, CELL, "steps: int = 3", READ))) == ["epochs", "lr", "resume", "out"]


def test_a_parameter_may_be_computed(shell):
    p = run(shell, CELL.replace("10", "2 * 50"), READ)
    assert p.epochs == 100


def test_nobody_is_at_this_process(shell):
    assert interactive() is False


# Looking

def test_show_returns_the_highlighted_source_without_its_indent():
    shown = show(SimCLR.forward)
    assert shown.data.startswith("def forward(self, views") and "\n    return" in shown.data
    assert shown.language == "python" and "<span" in shown._repr_html_()
    assert show(SimCLR).data.startswith("class SimCLR(Method):")


def test_same_passes_on_equal_values_and_says_how_equal(capsys):
    same(torch.ones(3, requires_grad=True), torch.ones(3) + 1e-6)
    assert re.fullmatch(r"same as the package \(largest difference 1e-06\)\n", capsys.readouterr().out)
    same(0.5, torch.tensor(0.5))
    same(torch.tensor([1, 2]), [1.0, 2.0])


def test_same_fails_on_another_value_or_shape_and_names_it():
    with pytest.raises(AssertionError, match="not the same: the largest difference is 0.5"):
        same(torch.zeros(3), torch.tensor([0, 0.5, 0]))
    with pytest.raises(AssertionError, match=r"shapes \(3,\) \(1, 3\)"):
        same(torch.zeros(3), torch.zeros(1, 3))
    with pytest.raises(AssertionError, match="not the same"):
        same(torch.tensor([float("nan")]), torch.zeros(1))


# Progress

def test_progress_prints_about_ten_lines_and_always_the_last(capsys):
    progress = Progress()
    returned = [progress(i / 1000, f"line {i}") for i in range(1, 1001)]
    lines = capsys.readouterr().out.splitlines()
    assert 9 <= len(lines) <= 12 and lines[-1] == "line 1000" and sum(returned) == len(lines)


def test_progress_prints_the_last_line_once_even_right_after_another(capsys):
    progress = Progress()
    for share in (0.99, 1.0, 1.0):
        progress(share, f"{share}")
    assert capsys.readouterr().out.splitlines() == ["0.99", "1.0"]


def test_progress_prints_at_least_every_minute(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(notebook.time, "monotonic", lambda: float(next(clock)) + 1e6)
    progress = Progress()
    for i in range(1, 31):
        progress(i / 1e5, f"{i}")
    assert capsys.readouterr().out.split() == ["1", "7", "13", "19", "25"]


def test_progress_in_front_of_a_person_updates_one_line(monkeypatch):
    calls = []

    class Handle:
        def update(self, bundle, raw):
            calls.append(("update", bundle["text/plain"]))

    def display(bundle, raw, display_id):
        calls.append(("display", bundle["text/plain"]))
        return Handle()

    monkeypatch.setattr(notebook, "interactive", lambda: True)
    monkeypatch.setattr("IPython.display.display", display)
    progress = Progress()
    assert [progress(share, f"{share}") for share in (0.1, 0.2, 1.0)] == [True, False, True]
    assert calls == [("display", "0.1"), ("update", "1.0")]


def test_what_takes_long_says_how_long_it_will_take_and_what_is_quick_says_nothing(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("sslnb.notebook.time.monotonic", lambda: now[0])
    quick, slow, again = TimeLeft("quick", 4), TimeLeft("slow", 400), TimeLeft("again", 400, done=200)
    for done in (1, 2, 3, 4):
        now[0] += 2.5
        quick(done)
    assert capsys.readouterr().out == ""
    for done in range(0, 401, 20):
        now[0] = 10 + 10 * done
        slow(done), again(max(200, done))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "slow: 20 of 400, 1:06:30 left" and lines[-2:] == [
        "slow: 400 of 400, 0:00 left", "again: 400 of 400, 0:00 left"]
    assert "again: 300 of 400, 50:10 left" in lines
    monkeypatch.setenv("RANK", "1")
    second = TimeLeft("of a second process", 4)
    now[0] += 60
    second(2)
    assert capsys.readouterr().out == ""
