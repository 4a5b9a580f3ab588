"""What surrounds the code: both ways to install ask for the same, and the data that is shipped is what it says."""

import gzip
import hashlib
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml

from sslnb.embedded import ASSETS, digits, make_fashion_small

ROOT = Path(__file__).parents[1]
ON_CONDA = {"torch": "pytorch", "matplotlib": "matplotlib-base", "playwright": "playwright-python"}
HASHES = {  # sha256 of the arrays' bytes
    "train_images": "29c8d9f398a29fc328af7ba681dfc3bd86ec4075b43ba2ff985128028b9b3f00",
    "train_labels": "4e4631c48d94add2f9bebe6a9bd67ebbd633b278f520428e19d7b21f84506ed0",
    "test_images": "8d46efb2efae7259de048298adb99140d06082b91c430833a54d7ce30f21c9c9",
    "test_labels": "86fea14d645de73ec2f8e0e859add59c557ccdf73e3e419692220b128c15ec47",
}


def test_conda_and_pip_ask_for_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pip = {f"python{project['requires-python']}"}
    for line in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        name, bound = re.fullmatch(r"([\w-]+)(.*)", line).groups()
        pip.add(ON_CONDA.get(name, name) + bound)
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert {line for line in conda if isinstance(line, str)} - {"pip"} == pip
    assert conda[-1] == {"pip": ["-e ."]}


def test_the_readmes_commands_are_the_ones_that_ci_runs():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert 'pip install -e . && papermill notebooks/byol.ipynb out.ipynb' in readme
    assert 'pip install -e ".[test]" && pytest' in readme
    assert re.search(r'-e \.\n.*papermill "\$OLDPWD/notebooks/byol.ipynb" out.ipynb', ci, re.S)
    assert re.search(r'-e "\.\[test\]" && pytest -q\n', ci)


def hashes(path):
    with np.load(path) as arrays:
        return {name: hashlib.sha256(arrays[name].tobytes()).hexdigest() for name in arrays.files}


def test_fashion_small_is_the_subset_of_debians_files():
    assert hashes(ASSETS / "fashion_small.npz") == HASHES
    assert "Zalando" in (ASSETS / "fashion_small.LICENSE").read_text()


def test_digits_are_scikit_learns_and_the_last_497_are_held_out():
    from sklearn.datasets import load_digits

    theirs, parts = load_digits(), [digits(split) for split in ("train", "test")]
    assert [len(images) for images, _, _ in parts] == [1300, 497]
    images, labels = (np.concatenate(x) for x in zip(*(part[:2] for part in parts), strict=True))
    assert np.array_equal(images, np.repeat((theirs.images * 255 / 16).round().astype(np.uint8)[..., None], 3, -1))
    assert images.dtype == np.uint8 and labels.dtype == np.int64 and np.array_equal(labels, theirs.target)


@pytest.fixture
def idx_files(tmp_path):
    """The four files as Debian has them, a few images longer than the subset."""
    with np.load(ASSETS / "fashion_small.npz") as arrays:
        for split, prefix in (("train", "train"), ("test", "t10k")):
            for kind, ending in (("images", "images-idx3"), ("labels", "labels-idx1")):
                values = arrays[f"{split}_{kind}"]
                values = np.concatenate([values, values[:7] ^ 255])
                header = bytes([0, 0, 8, values.ndim]) + b"".join(n.to_bytes(4, "big") for n in values.shape)
                (tmp_path / f"{prefix}-{ending}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes(), 1))
    return tmp_path


def test_the_subset_is_made_by_the_documented_function(idx_files):
    make_fashion_small(idx_files, idx_files / "made.npz")
    assert hashes(idx_files / "made.npz") == HASHES


def test_every_folder_with_code_is_installed():
    """An editable install finds them all; a wheel has what pyproject.toml lists."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "sslnb").rglob("__init__.py")}
