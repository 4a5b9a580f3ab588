"""Every notebook: clean files in a fixed order, and each one runs through papermill as users run it."""

import ast
import importlib
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from papermill.exceptions import PapermillExecutionError

from sslnb.data import load
from sslnb.methods import METHODS
from sslnb.notebook import declared

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LESSONS = [path for path in NOTEBOOKS if path.stem in METHODS]
EXAMS = [path for path in NOTEBOOKS if path.stem.startswith("eval_") or path.stem == "throughput"]
SHARED = ["data", "recipe", "size", "backbone", "weights", "epochs", "batch", "lr", "precision", "processes", "workers",
          "compile", "seed", "out", "resume"]
SECTIONS = ["parameters", "recipe", "view", "step by step", "train", "learning|curve|collaps", "look", "evaluat",
            "break", "scale", "exercise"]

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def code(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def trees(path):
    """The syntax trees of the code cells, magics turned into calls."""
    return [ast.parse(TransformerManager().transform_cell(cell.source)) for cell in code(path)]


def nodes(path, *kinds):
    return [node for tree in trees(path) for node in ast.walk(tree) if isinstance(node, kinds)]


def parameters_cell(path):
    (cell,) = (cell for cell in read(path).cells if "parameters" in cell.metadata.get("tags", []))
    return cell


# The files

# Methods that can be trained and evaluated, but whose lecture is not written yet. Take a name out with its notebook.
TO_COME: set[str] = set()


def test_every_method_has_a_notebook():
    assert {path.stem for path in LESSONS} == set(METHODS) - TO_COME and set(METHODS) >= TO_COME


@every_notebook
def test_the_file_is_valid_with_unique_ids_that_say_where_they_belong(path):
    book = read(path)
    assert (book.nbformat, book.nbformat_minor) == (4, 5)
    nbformat.validate(book)
    ids = [cell.id for cell in book.cells]
    assert len(set(ids)) == len(ids)
    # an editor's random id, as opposed to a chosen one, changes with every rebuild and fills the history
    assert not [i for i in ids if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f-]{27})?|\d+", i)]


@every_notebook
def test_the_file_holds_nothing_of_a_run_or_of_somebodys_machine(path):
    book = read(path)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code(path))
    assert book.metadata.kernelspec.name == "python3" and book.metadata.language_info.name == "python"
    assert set(book.metadata) == {"kernelspec", "language_info"}
    assert all(set(cell.metadata) <= {"tags"} for cell in book.cells)
    text = "\n".join(cell.source for cell in book.cells)
    assert not re.search(r"/(home|root|work|tmp|mnt|Users)/|[A-Z]:\\", text)
    strings = [node.value for node in nodes(path, ast.Constant) if isinstance(node.value, str)]
    assert not [s for s in strings if re.match(r"[/~]\w", s)]


@every_notebook
def test_all_code_parses_and_what_it_imports_from_the_package_exists(path):
    modules = {}
    for node in nodes(path, ast.ImportFrom):
        if node.module.split(".")[0] == "sslnb":
            home = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(home, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")  # or fails
                modules[alias.asname or alias.name] = getattr(home, alias.name)
    for node in nodes(path, ast.Attribute):  # figures.curves, widgets.views ...
        if isinstance(node.value, ast.Name) and isinstance(module := modules.get(node.value.id), type(ast)):
            assert hasattr(module, node.attr), f"{module.__name__} has no {node.attr}"


@every_notebook
def test_cells_are_short(path):
    lengths = [len(cell.source.splitlines()) for cell in code(path)]
    assert statistics.median(lengths) <= 8 and max(lengths) <= 30 and min(lengths) > 0


# Parameters

@every_notebook
def test_papermill_lists_every_parameter_with_type_and_help(path):
    source, found = parameters_cell(path).source, papermill.inspect_notebook(str(path))
    assert [(name, kind) for name, (kind, _) in declared(source).items()] == [
        (name, known["inferred_type_name"]) for name, known in found.items()]
    for line in source.splitlines():
        name, kind, default, about = re.fullmatch(r"(\w+): (str|int|float|bool) = (\S+) +# ([^=]+)", line).groups()
        assert found.pop(name) == {"name": name, "inferred_type_name": kind, "default": default, "help": about}
    assert not found


@every_notebook
def test_the_next_code_cell_checks_the_parameters(path):
    cells = code(path)
    after = cells[[cell.id for cell in cells].index(parameters_cell(path).id) + 1]
    assert re.search(r"^p = parameters\(\)$", after.source, re.M)


@every_notebook
def test_every_parameter_is_used(path):
    used = {ast.unparse(node) for node in nodes(path, ast.Attribute)}
    assert {f"p.{name}" for name in declared(parameters_cell(path).source)} <= used


@every_lesson
def test_the_shared_parameters_have_the_same_names_types_and_defaults_everywhere(path):
    mine, first = (declared(parameters_cell(p).source) for p in (path, LESSONS[0]))
    assert [name for name in mine if name in SHARED] == SHARED
    assert {name: mine[name] for name in SHARED} == {name: first[name] for name in SHARED}


# What a lesson is

@every_lesson
def test_a_lesson_has_its_sections_in_the_order_of_the_design(path):
    prose = [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]
    assert re.match(r"# \w", prose[0]) and re.search(r"\(https://arxiv\.org/abs/\d{4}\.\d{5}\)", prose[0])
    headings = [line.lower() for text in prose for line in text.splitlines() if line.startswith("## ")]
    assert len(headings) == len(SECTIONS), headings
    for heading, words in zip(headings, SECTIONS, strict=True):
        assert re.search(words, heading), f"expected a section about {words!r}, found {heading!r}"


@every_lesson
def test_a_lesson_shows_the_source_and_asserts_that_the_steps_are_the_packages(path):
    calls = [node.func.id for node in nodes(path, ast.Call) if isinstance(node.func, ast.Name)]
    assert {"show", "same", "pretrain", "evaluate"} <= set(calls)


@every_lesson
def test_a_lesson_has_25_to_45_cells(path):
    assert 25 <= len(read(path).cells) <= 45


@every_notebook
def test_what_notebooks_share_is_in_the_package(path):
    named = [node.attr if isinstance(node, ast.Attribute) else node.id for node in nodes(path, ast.Attribute, ast.Name)]
    assert not {"DataLoader", "Accelerator", "cuda", "notebook_launcher"} & set(named)
    bases = [ast.unparse(base) for node in nodes(path, ast.ClassDef) for base in node.bases]
    assert not [base for base in bases if re.search(r"\b(Module|Method)$", base)]
    loops = nodes(path, ast.For, ast.While)
    assert not [loop for loop in loops for node in ast.walk(loop) if getattr(node, "attr", "") == "backward"]


# Running them

def execute(path, folder, **values):
    """As `papermill path folder/out.ipynb -p name value …` in `folder`."""
    return papermill.execute_notebook(str(path), str(folder / "out.ipynb"), parameters=values, cwd=str(folder),
                                      progress_bar=False)


def short(path):
    """One epoch of everything, or a few steps; one round of what is timed, with little."""
    names = declared(parameters_cell(path).source)
    few = {name: 10 if name.endswith("steps") else 1 for name in names
           if re.fullmatch(r"(\w+_)?(epochs|steps|rounds)", name)}
    less = {"throughput": {"batch": 2, "files": 16}, "eval_lowshot": {"shots": 4, "samples": 2, "costs": 2},
            "eval_finetune": {"epochs": "auto"}}  # its demo is counted in steps
    return few | less.get(path.stem, {})


def outputs(book):
    return [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(book):
    return "".join(output.text for output in outputs(book) if output.output_type == "stream")


def run_headless(path, tmp_path):
    """The whole notebook, which must show pictures instead of widgets."""
    book = execute(path, tmp_path, **short(path), out=str(tmp_path / "run"))
    assert {cell.metadata.papermill.status for cell in book.cells if cell.cell_type == "code"} == {"completed"}
    kinds = [kind for output in outputs(book) for kind in output.get("data", {})]
    assert kinds.count("image/png") >= 3 and not [kind for kind in kinds if "widget" in kind]
    assert not [output for output in outputs(book) if output.get("name") == "stderr" and "Error" in output.text]
    assert len(outputs(book)) < 100  # text lines are throttled
    if path in EXAMS:
        rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
        assert rows and all(row["protocol"] and row["source"] and row["versions"] for row in rows)
    else:
        assert "\nstatus     done at step" in printed(book) and "\nhardware   " in printed(book)
        assert (tmp_path / "run" / "backbone.safetensors").exists()
    return book


@pytest.mark.notebook
@pytest.mark.parametrize("path", [path for path in NOTEBOOKS[::-1] if path.stem != "byol"],  # the longest is the last
                         ids=lambda path: path.stem)
def test_a_notebook_runs_headless_with_pictures_instead_of_widgets(path, tmp_path):
    run_headless(path, tmp_path)


@pytest.mark.notebook
def test_byol_runs_headless_and_the_same_command_again_finds_the_finished_run(tmp_path):
    path = ROOT / "notebooks" / "byol.ipynb"
    first, second = (run_headless(path, tmp_path) for _ in range(2))
    assert "finished already" not in printed(first)
    assert f"{tmp_path / 'run'} is finished already" in printed(second)
    assert re.search(r"status     done at step (\d+) of \1, .* in 1 start\(s\)", printed(second))
    assert sorted(folder.name for folder in tmp_path.iterdir() if folder.is_dir()) == ["run", "runs"]
    assert len(list((tmp_path / "runs").iterdir())) == 3  # the broken ones and their healthy companion, once each


@pytest.mark.notebook
@pytest.mark.parametrize("wrong, sentence", [
    ({"epoch": 3}, "Unknown parameter 'epoch': did you mean 'epochs'"),
    ({"epochs": "many"}, "int, but got 'many'"),
], ids=["unknown", "ill-typed"])
def test_a_wrong_parameter_stops_the_notebook_before_any_work(wrong, sentence, tmp_path):
    path = LESSONS[0]
    with pytest.raises(PapermillExecutionError) as failed:
        execute(path, tmp_path, **wrong)
    assert failed.value.ename == "InputError" and sentence in failed.value.evalue
    cells = [cell for cell in read(tmp_path / "out.ipynb").cells if cell.cell_type == "code"]
    assert [cell.id for cell in cells if cell.metadata.papermill.get("status") == "failed"] == [code(path)[1].id]
    assert [found.name for found in tmp_path.iterdir()] == ["out.ipynb"]


@pytest.mark.notebook
def test_a_few_images_are_enough_to_look_for_neighbours(tmp_path):
    digits = load("digits_scattered")
    for i in range(30):
        folder = tmp_path / "few" / digits.classes[digits.labels[i] % 3]
        folder.mkdir(parents=True, exist_ok=True)
        if len(list(folder.iterdir())) < 5:
            digits[i].save(folder / f"{i}.png")
    book = execute(ROOT / "notebooks" / "eval_knn.ipynb", tmp_path, source="resnet_mini", data="few", out="rows")
    assert "; 12 vote" in printed(book)
    rows = [json.loads(line) for line in (tmp_path / "rows" / "results.jsonl").read_text().splitlines()]
    assert {row["protocol"] for row in rows} == {"knn k12 t0.07"}


@pytest.mark.notebook
def test_papermill_help_prints_them():
    path = ROOT / "notebooks" / "byol.ipynb"
    shown = subprocess.run([sys.executable, "-m", "papermill", "--help-notebook", str(path)], capture_output=True,
                           text=True, check=True)
    assert "Unable to parse" not in shown.stdout + shown.stderr
    assert "processes: int (default 1) as many as GPUs; the total batch stays" in " ".join(shown.stdout.split())


@pytest.mark.notebook
def test_nobody_is_at_a_kernel_that_papermill_started(tmp_path):
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(
        "from sslnb.notebook import interactive\nprint(interactive())")])
    book.metadata.kernelspec = read(LESSONS[0]).metadata.kernelspec
    nbformat.write(book, tmp_path / "book.ipynb")
    assert printed(execute(tmp_path / "book.ipynb", tmp_path)).endswith("False\n")
