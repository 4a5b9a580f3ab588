"""Frozen features: what every probe sees of a backbone, and the honest baselines beside it."""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import InputError
from ..notebook import TimeLeft
from ..reading import image_loader
from ..views import IMAGENET_MEAN, IMAGENET_STD
from .pixels import normalise, read, to_batch

RAW_PIXELS_SIZE = 32  # 3,072 numbers per image: about as many as the features it is compared with


@dataclass
class Features:
    """N images as vectors; row i belongs to image `index[i]`."""

    x: Tensor  # (N, D) float32 on the CPU
    labels: Tensor | None  # (N,) int64
    index: Tensor  # (N,) int64, position in the data set
    broken: list[str]  # one sentence per image that could not be read; those have no row


def extract(backbone: nn.Module, images, *, size: int, pool: str = "model",
            mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD, batch: int = 256,
            device: str | torch.device = "cpu", workers: int = 0, limit: int | None = None,
            title: str = "", source: str = "") -> Features:
    """Features of all images (or of `limit` of them, drawn once with a fixed seed), in the order of the
    data set. If it takes long, lines under the `title` tell how far it is.

    `pool`: "model" (the model's own forward), "mean" (patch tokens) or "cls". The backbone moves to `device` ("auto":
    the GPU if there is one) and stays there; its training flags come back as they were and its BatchNorm statistics are
    not touched. `source`: whose features they are, for an InputError if some are not finite; "" takes them as they are.
    """
    from ..backbones import features

    device = the_device(device)
    backbone.to(device)
    with torch.no_grad(), _eval_mode(backbone):
        return _of_all(lambda pixels: features(backbone, normalise(pixels.to(device), mean, std), pool), images,
                       size=size, batch=batch, workers=workers, limit=limit, title=title, source=source)


def the_device(device: str | torch.device) -> str | torch.device:
    """What "auto" means: the GPU if there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def raw_pixels(images, size: int, limit: int | None = None, workers: int = 0, title: str = "") -> Features:
    """The baseline without any network: flattened pixels in [0, 1], at most 32 x 32."""
    found = _of_all(lambda pixels: pixels.float().flatten(1) / 255, images, size=min(size, RAW_PIXELS_SIZE), batch=256,
                    workers=workers, limit=limit, title=title)
    channels = found.x.unflatten(1, (3, -1))
    if len(found.x) and torch.equal(channels[:, :1].expand_as(channels), channels):
        found.x = channels[:, 0]  # grey images: the same numbers three times only cost time
    return found


def calibrated(backbone: nn.Module, images, *, size: int, mean: Sequence[float] = IMAGENET_MEAN,
               std: Sequence[float] = IMAGENET_STD, batches: int = 8, batch: int = 128,
               seed: int = 0) -> nn.Module:
    """A copy of the backbone whose BatchNorm statistics are estimated on these images; no weight changes.

    An untrained network still has mean 0 and variance 1 there, which lets its activations vanish or explode
    and makes any trained network look good. This copy is what "random initialisation" has to mean in a
    comparison.
    """
    twin = copy.deepcopy(backbone)
    norms = [m for m in twin.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return twin
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    device = next(twin.parameters()).device
    with torch.no_grad(), _eval_mode(twin):
        momenta = [m.momentum for m in norms]
        for m in norms:
            m.reset_running_stats()
            m.momentum = None  # a plain average over the batches
            m.train()
        # A smaller last batch would weigh as much as a full one: leave it out, unless it is all there is.
        whole = [c for c in order.split(batch)[:batches] if len(c) == min(batch, len(order))]
        for chunk in whole:
            x, kept = to_batch(images, chunk.tolist(), size, mean, std)
            if len(kept) > 1:
                twin(x.to(device))
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
    return twin


class _Chunks(torch.utils.data.Dataset):
    """Item i is the i-th chunk of images, read and cropped as uint8: what a loader worker sends back."""

    def __init__(self, images, chunks: Sequence[Tensor], size: int):
        self.images, self.chunks, self.size = images, chunks, size

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, i: int) -> tuple[Tensor, list[int], list[str]]:
        return read(self.images, self.chunks[i].tolist(), self.size)


def _of_all(vectors: Callable[[Tensor], Tensor], images, *, size: int, batch: int, workers: int,
            limit: int | None, title: str, source: str = "") -> Features:
    """What `vectors` makes of uint8 pixels (B, 3, size, size), (B, D), for all images that can be read."""
    chosen = _chosen(len(images), limit)
    loader = image_loader(_Chunks(images, chosen.split(batch), size), workers, batch_size=None)
    parts = ((vectors(pixels) if kept else None, kept, bad) for pixels, kept, bad in loader)
    told = TimeLeft(title, len(chosen)) if title else None
    return joined(images, parts, len(chosen), told, source)


def joined(images, parts: Iterable[tuple[Tensor | None, list[int], list[str]]], most: int,
           told: TimeLeft | None = None, source: str = "") -> Features:
    """Features of `images` from parts: vectors (n, D), their n places in the data set, and what was broken; `most` rows
    in all. They go into one array as they come: parts that are joined at the end are there twice. `source`: as in
    `extract`."""
    x, index, broken, wrong = torch.zeros(0, 0), [], [], 0
    for z, kept, bad in parts:
        broken += bad
        if kept:
            x = x if index else torch.empty(most, z.shape[1])
            x[len(index):len(index) + len(z)] = z
            index += kept
            wrong += int((~z.isfinite()).any(1).sum())
        if told:
            told(len(index) + len(broken))
    if source and wrong:  # probes would make an accuracy of them
        raise InputError(f"The features of {source} are not finite for {wrong} of {len(index)} images of "
                         f"{images.name}: look for NaN and infinite numbers in its weights, and take another file or "
                         "an earlier checkpoint.")
    labels = None if images.labels is None else torch.as_tensor(images.labels)[index]
    return Features(x[:len(index)], labels, torch.tensor(index, dtype=torch.long), broken)


@contextlib.contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule gets its own flag back: some may be frozen on purpose."""
    flags = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, flag in flags.items():
            m.training = flag


def _chosen(n: int, limit: int | None) -> Tensor:
    """All indices, or `limit` at random: the first ones of a sorted data set would be a single class."""
    if limit is None or limit >= n:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))[:limit].sort().values
