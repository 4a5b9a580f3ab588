"""What a notebook needs besides the package: checked parameters, source on display, equality, progress."""

import ast
import inspect
import math
import os
import time
from types import SimpleNamespace
from typing import Any

import torch

from .errors import InputError, unknown
from .files import check_place
from .launch import limit_threads

PATIENCE = 10  # s of a job before it says how long it will take


def interactive() -> bool:
    """True if a person is at this kernel: a front end that can answer questions sent the cell. Papermill cannot."""
    return in_notebook() and bool(_shell().kernel.get_parent("shell").get("content", {}).get("allow_stdin"))


def in_notebook() -> bool:
    """True in a kernel, papermill's too."""
    return hasattr(_shell(), "kernel")


def _shell():
    import sys

    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython

    return get_ipython()


# ---------------------------------------------------------------- parameters


def parameters() -> SimpleNamespace:
    """The notebook's parameters, checked and typed; call it in the cell after the one tagged `parameters`.

    Papermill puts what `-p name value` says into a cell of its own, whatever the name and the type. Here a name that
    the parameters cell does not declare stops the notebook and names the nearest; values are turned into the
    annotated type ("false" is False, 1e2 is 100), and "auto" passes where it is the declared default. An `out` that
    cannot be written is told here too, before any work.

    From here on torch takes half of the cores in every cell, as training does: with all of them a cell of 7 s was
    measured to take 249 s beside a second notebook.
    """
    limit_threads(1)
    shell = _shell()
    cell, injected = find([cell for cell in shell.user_ns["In"] if cell.strip()])
    found = check(declared(cell), assigned(injected), shell.user_ns)
    if getattr(found, "out", "auto") != "auto":
        check_place(found.out)
    return found


def find(cells: list[str]) -> tuple[str, str]:
    """Of the cells that were run: the parameters cell and papermill's ("" if none).

    The parameters cell is the one that declares most, the latest of equals: cells of the reader's own may lie anywhere.
    """
    cell = max(reversed(cells), key=lambda cell: len(declared(cell)), default="")
    if not declared(cell):
        raise InputError("parameters(): run the cell tagged `parameters` first.")
    return cell, next((c for c in reversed(cells) if c.split("\n")[0].strip() == "# Parameters"), "")


def declared(cell: str) -> dict[str, tuple[str, Any]]:
    """name -> (type, default) of the annotated assignments of a cell; a default that is computed counts as None."""
    found = {}
    for node in _statements(cell):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            default = node.value.value if isinstance(node.value, ast.Constant) else None
            found[node.target.id] = (ast.unparse(node.annotation), default)
    return found


def assigned(cell: str) -> list[str]:
    """Names that papermill's cell gives a value."""
    return [t.id for node in _statements(cell) if isinstance(node, ast.Assign) for t in node.targets]


def _statements(cell: str) -> list[ast.stmt]:
    try:
        return ast.parse(cell).body
    except SyntaxError:  # a magic, or a reader's typo
        return []


def check(known: dict[str, tuple[str, Any]], given: list[str], values: dict[str, Any]) -> SimpleNamespace:
    """Types and names, apart from the kernel (for tests)."""
    for name in given:
        if name not in known:
            unknown("parameter", name, known)
    return SimpleNamespace(**{
        name: values[name] if default == "auto" and values[name] == "auto" else coerce(name, values[name], kind)
        for name, (kind, default) in known.items()})


def coerce(name: str, value: Any, kind: str) -> Any:
    """A value as papermill hands it over -> the annotated type."""
    try:
        if kind == "bool":
            return {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[str(value).lower()]
        if kind == "int":
            if isinstance(value, bool) or float(value) != int(float(value)):
                raise ValueError
            return int(float(value))
        if kind == "float":
            return float(value)
        return str(value)
    except (ValueError, KeyError, TypeError, OverflowError):
        raise InputError(f"Parameter {name} must be a {kind}, but got {value!r}.") from None


# ---------------------------------------------------------------- looking


def show(thing: Any):
    """The source of a class, method or function, highlighted: what a lesson talks about is what runs."""
    from IPython.display import Code

    return Code(inspect.cleandoc("\n" + inspect.getsource(thing)), language="python")


def same(ours: Any, theirs: Any, tolerance: float = 1e-5) -> None:
    """Assert that a value re-derived in a cell is the package's, and say so."""
    a, b = torch.as_tensor(ours).detach().float(), torch.as_tensor(theirs).detach().float()
    worst = (a - b).abs().max().item() if a.shape == b.shape else float("inf")
    if not worst <= tolerance:  # and no assert, which python -O leaves out
        raise AssertionError(f"not the same: the largest difference is {worst:.3g}, shapes {tuple(a.shape)} "
                             f"{tuple(b.shape)}")
    print(f"same as the package (largest difference {worst:.1g})")


class Progress:
    """Lines about a long job: one line that is updated in front of a person, about ten lines in a file.

    Calling it with (share done, text) returns True where the text was shown.
    """

    def __init__(self):
        self.handle, self.shown, self.when = None, 0.0, -math.inf

    def __call__(self, share: float, text: str) -> bool:
        now = time.monotonic()
        if interactive():
            if share < 1 and now - self.when < 0.5:
                return False
            self._update(text)
        elif share < 1 and share - self.shown < 0.1 and now - self.when < 60 or share == self.shown:
            return False
        else:
            print(text, flush=True)
        self.shown, self.when = share, now
        return True

    def _update(self, text: str) -> None:
        from IPython.display import display

        bundle = {"text/plain": text}
        if self.handle is None:
            self.handle = display(bundle, raw=True, display_id=True)
        else:
            self.handle.update(bundle, raw=True)


class TimeLeft:
    """How far a job is and how long the rest will take, for one that takes more than some seconds; of several processes
    under torchrun the first one says it."""

    def __init__(self, what: str, total: int, done: int = 0):
        """`done` of `total` were done before."""
        self.what, self.total, self.before = what, total, done
        self.progress, self.began = Progress(), time.monotonic()

    def __call__(self, done: int) -> None:
        seconds = time.monotonic() - self.began
        if seconds > PATIENCE and done > self.before and os.environ.get("RANK", "0") == "0":
            left = clock(seconds / (done - self.before) * (self.total - done))
            self.progress(done / self.total, f"{self.what}: {done:,} of {self.total:,}, {left} left")


def clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
