"""What training reads: which image when, and its crops, all pure functions of (seed, epoch, step)."""

import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .data import BrokenImage, Images
from .errors import InputError


class ViewSet(Dataset):
    """`views[(index, seed)]` is (crops, index, seed, broken), the crops being uint8 tensors (3, h, w).

    `crop(image, rng)` makes them, with rng a `random.Random(seed)`: they depend on no worker. For a broken image the
    next readable one is taken, so that batches stay full: `index` is the image that is shown, `broken` the one that
    was asked for (-1 if all is well). After 100 broken ones it is an InputError.
    Torch's default collate gives a list of (B, 3, h, w), then index, seed and broken, each (B,) int64.
    """

    def __init__(self, images: Images, crop: Callable[[Image.Image, random.Random], list[Tensor]]) -> None:
        self.images, self.crop = images, crop

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], int, int, int]:
        asked, seed = key
        for index in range(asked, asked + 100):
            index %= len(self)
            try:
                image = self.images[index]
            except BrokenImage:
                continue
            return self.crop(image, random.Random(seed)), index, seed, -1 if index == asked else asked
        raise InputError(f"No image can be decoded from {self.images.where(asked)} to the 100th after it.")


def next_batch(batches: Iterator):
    """`next`, where a loader process that died is told as such: what breaks first is often the socket to it."""
    try:
        return next(batches)
    except (OSError, EOFError) as error:
        if "in DataLoader worker process" not in str(error):  # else it lives, and an error of its own comes from there
            time.sleep(1)  # torch says by a signal which process it was
            raise RuntimeError(f"DataLoader worker is gone ({error})") from error
        raise


def in_order(images: Images, crop: Callable[[Image.Image, random.Random], list[Tensor]], batch: int,
             workers: int | str = "auto", rank: int = 0, world: int = 1) -> DataLoader:
    """Batches of a ViewSet for a test: every image once, in order; of `world` processes each gets every world-th.

    Its own generator: a loader draws a seed, which would otherwise disturb the training around it.
    """
    mine = [(i, 0) for i in range(rank, len(images), world)]
    return DataLoader(ViewSet(images, crop), batch_size=batch, sampler=mine, generator=torch.Generator(),
                      num_workers=loader_workers(workers, images, world))


class EpochSampler(Sampler):
    """A batch sampler: lists of `batch` pairs (index, seed) for process `rank` of `world`.

    All processes share one permutation per (seed, epoch); step t is its t-th slice of batch * world images,
    so together they see what one process with the whole batch sees. The incomplete last step is dropped.
    A method may ask for another order, in which images come several times or never (`Method.order`).
    """

    def __init__(self, size: int, batch: int, *, rank: int = 0, world: int = 1, seed: int = 0) -> None:
        if batch * world > size:
            raise InputError(f"The batch is larger than the data: {batch} on {world} process(es) are "
                             f"{batch * world} images, but there are {size}; lower batch or add images.")
        self.size, self.batch, self.rank, self.world, self.seed = size, batch, rank, world, seed
        self.epoch = self.step = 0
        self.order: Sequence[int] | None = None

    def set_position(self, epoch: int, step: int = 0, order: Sequence[int] | None = None) -> None:
        """Iterating next starts at this step of this epoch; `order` (size,) replaces the permutation of the epoch."""
        self.epoch, self.step, self.order = epoch, step, order

    def __len__(self) -> int:
        return max(0, self.size // (self.batch * self.world) - self.step)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        seed, epoch, total = self.seed, self.epoch, self.batch * self.world
        asked = self.order
        order = np.random.RandomState(draw_seed(seed, epoch, -1) % 2**32).permutation(self.size) if asked is None \
            else np.asarray(asked)
        for step in range(self.step, self.size // total):
            start = step * total + self.rank * self.batch
            mine = order[start:start + self.batch].tolist()
            # An image that comes twice must not come with the same views twice: then its place counts, not its number.
            keys = mine if asked is None else range(start, start + self.batch)
            yield [(i, draw_seed(seed, epoch, key)) for i, key in zip(mine, keys, strict=True)]


def draw_seed(seed: int, epoch: int, index: int) -> int:
    """62 bits from the three numbers and nothing else, so a resumed or rescaled run draws the same crops."""
    digest = hashlib.blake2b(f"{seed} {epoch} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def loader_workers(workers: int | str, images: Images, processes: int = 1) -> int:
    """How many loader processes "auto" means: none for images in memory (starting them costs more), else most cores."""
    if workers != "auto":
        return int(workers)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", processes))  # other machines have cores of their own
    return 0 if getattr(images, "root", None) is None else max(1, min(12, (os.cpu_count() or 2) // processes - 1))
