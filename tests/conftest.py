import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two spinning threads per process are slower than one on a busy machine

import pytest
import torch

torch.set_num_threads(1)


def few_digits(split):
    """130 scattered digits: enough for four steps of 32 and for every mechanism, few enough for many runs."""
    from sslnb.embedded import digits_scattered

    images, labels, classes = digits_scattered(split)
    return images[:130], labels[:130], classes


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    from sslnb.embedded import EMBEDDED

    torch.manual_seed(0)
    monkeypatch.setitem(EMBEDDED, "few_digits", few_digits)


@pytest.fixture
def tiny():
    """A recipe of a method that trains in seconds: the demo on few images, two epochs of four steps."""
    from sslnb import methods

    def make(method: str = "simclr", **changes):
        small = {"epochs": 2, "batch": 32, "data": "few_digits", "size": 20}
        return methods.recipes(method)["demo"].with_(**{**small, **changes})

    return make
