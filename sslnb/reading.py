"""What training reads: which image when, and its crops, all pure functions of (seed, epoch, step)."""

import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from . import methods  # noqa: F401 (a process that loads images finds the views of users' own files by it)
from .data import Images
from .decoding import BrokenImage
from .errors import InputError
from .launch import cores
from .views import Views


class ViewSet(Dataset):
    """Item (index, seed) is (crops, index, seed, broken), the crops being uint8 tensors (3, h, w).

    `views.crop` makes them, with a `random.Random(seed)`: they depend on no worker. For a broken image the next
    readable one is taken, so that batches stay full: `index` is the image that is shown, `broken` the one that was
    asked for (-1 if all is well). After 100 broken ones it is an InputError. What no image is to blame for, such as a
    network disk that is gone, is raised at once.
    Torch's default collate gives a list of (B, 3, h, w), then index, seed and broken, each (B,) int64.
    """

    def __init__(self, images: Images, views: Views) -> None:
        self.images, self.views = images, views
        self.read = images.pixels if views.on_tensors else images.__getitem__

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], int, int, int]:
        asked, seed = key
        reason: BrokenImage | None = None
        for index in range(asked, asked + 100):
            index %= len(self)
            try:
                image = self.read(index)
            except BrokenImage as error:
                reason = error
                continue
            return self.views.crop(image, random.Random(seed)), index, seed, -1 if index == asked else asked
        raise InputError(f"No image can be decoded from {self.images.where(asked)} to the 100th after it: restore the "
                         f"files ({reason}).")


def next_batch(batches: Iterator):
    """`next`, where a loader process that died is told as such: what breaks first is often the socket to it."""
    try:
        return next(batches)
    except (OSError, EOFError) as error:
        # Else it lives and an error of its own comes from there, or an image could not be opened in this process.
        if "in DataLoader worker process" not in str(error) and getattr(error, "filename", None) is None:
            time.sleep(1)  # torch says by a signal which process it was
            raise RuntimeError(f"DataLoader worker is gone ({error})") from error
        raise


def image_loader(images: Dataset, workers: int, **how) -> DataLoader:
    """A DataLoader beside training, or of training: what all of them need.

    Its own generator: a loader draws a seed, else from the state that masks are drawn from. And processes that live on
    when everything here is told to stop: the trainer still writes its checkpoint then, and ends them itself.
    """
    return DataLoader(images, num_workers=workers, generator=torch.Generator(), worker_init_fn=_outlive_signals, **how)


def _outlive_signals(worker: int) -> None:
    """Slurm, systemd and terminals signal all processes at once, and a loader process has to live until its trainer is
    done. Of that one SIGTERM counts, for it is how Python's end gets rid of processes that are left; a loader that
    finds no trainer any more goes by itself, which torch looks after."""
    def wait():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on a Mac
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # a handler would not know who sent it
        threading.Thread(target=wait, daemon=True).start()


def in_order(images: Images, views: Views, batch: int, workers: int | str = "auto", rank: int = 0,
             world: int = 1) -> DataLoader:
    """Batches of a ViewSet for a test: every image once, in order; of `world` processes each gets every world-th."""
    mine = [(i, 0) for i in range(rank, len(images), world)]
    return image_loader(ViewSet(images, views), loader_workers(workers, images, world), batch_size=batch, sampler=mine)


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
    return 0 if getattr(images, "root", None) is None else max(1, min(12, cores() // processes - 1))
