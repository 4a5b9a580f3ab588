import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two spinning threads per process are slower than one on a busy machine

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny():
    """A recipe of a method that trains in seconds: the demo with little data per step and few epochs."""
    from sslnb import methods

    def make(method: str = "simclr", **changes):
        small = {"epochs": 2, "batch": 320, "data": "digits_scattered", "size": 20}
        return methods.recipes(method)["demo"].with_(**{**small, **changes})

    return make
