"""Views: what a method sees of an image. Two stages, declared once in the method's `views()`.

    Views(View(RandomResizedCrop(224, scale=(0.08, 1)), HorizontalFlip(0.5),            per image, in the workers
               ColorJitter(0.8, 0.8, 0.8, 0.2, p=0.8), Greyscale(0.2), Blur(0.5), Normalize(), count=2))   per batch

Stage one works on one PIL image and ends in uint8. Stage two works on the whole batch on the training device, with
parameters drawn PER IMAGE. Every draw is a pure function of the image's seed, so the views of an image depend on
(run seed, epoch, image) alone: not on workers, processes, batch composition or device. Each op agrees with
torchvision's functional op for the same parameters (tests/test_views.py). Augmentation is most of the CPU time of
self-supervision; this split is what makes it cheap.
"""

import random
import sys
from collections.abc import Sequence
from dataclasses import is_dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .decoding import pixels
from .draws import Draws
from .errors import InputError
from .geometry import (  # noqa: F401  methods take all their ops from here
    CenterCrop,
    HorizontalFlip,
    ImageOp,
    Pad,
    PatchGrid,
    RandomResizedCrop,
    RandomRotation,
    Resize,
)
from .photometry import (  # noqa: F401
    IMAGENET_MEAN,
    IMAGENET_STD,
    UNCHANGED,
    BatchOp,
    Blur,
    ColorJitter,
    Greyscale,
    Normalize,
    Solarize,
)

IN_CACHE = 28_000  # numbers that an op works on at a time on a CPU: images of more than 68 px come one by one


def _references(arrays: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]


class Memory:
    """Room for batches on the CPU, that of an earlier batch once all its tensors are gone: the system clears new memory
    page by page, which was a twelfth of all that a view takes. It is numpy's, which asks Linux for large pages, for
    with small ones that was a third; and a tensor counts as a reference to the array it lies in.
    """

    (ALONE,) = _references([np.empty(0)])  # in a list, and nowhere else

    def __init__(self, most: int) -> None:
        """At most so many batches are kept for later, and twice as many watched: a list of all that somebody holds on
        to would grow."""
        self.most, self.kept = most, []

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """Like torch.empty(shape), float32, on the CPU."""
        used, free = [], []
        for array, count in zip(self.kept, _references(self.kept), strict=True):
            (used if count > self.ALONE else free).append(array)
        fitting = [array for array in free if array.shape == tuple(shape)][:self.most] or [np.empty(shape, np.float32)]
        self.kept = (used + fitting)[-2 * self.most:]
        return torch.from_numpy(fitting[0])

    def __reduce__(self):
        return Memory, (self.most,)  # the arrays do not go to another process


class View:
    """One way of looking at an image: ops in order, geometry first; `count` independent draws of it.

    An `aligned` view draws what the view before it drew: with the same ops at another size it is the same crop.
    """

    def __init__(self, *ops: ImageOp | BatchOp, count: int = 1, aligned: bool = False):
        split = next((i for i, op in enumerate(ops) if isinstance(op, BatchOp)), len(ops))
        late = [type(op).__name__ for op in ops[split:] if isinstance(op, ImageOp)]
        if late:
            raise InputError(f"View: {late[0]} works on single images and must come before "
                             f"{type(ops[split]).__name__}, which works on the batch; put the geometry first.")
        self.image_ops, self.batch_ops, self.count, self.aligned = ops[:split], ops[split:], count, aligned
        self.on_tensors = all(op.on_tensors for op in self.image_ops)
        self.memory = Memory(count)

    @property
    def normalize(self) -> Normalize:
        """The view's normalisation; one that changes nothing if it has none."""
        return next((op for op in self.batch_ops if isinstance(op, Normalize)), UNCHANGED)

    def crop(self, image: Image.Image | Tensor, rng: random.Random) -> Tensor:
        """RGB, of PIL or (where all ops are `on_tensors`) as uint8 (3, H, W) -> uint8 (3, h, w)."""
        for op in self.image_ops:
            image = op(image, rng)
        return (image if isinstance(image, Tensor) else pixels(image)).contiguous()

    def goes_with(self, other: "View") -> bool:
        """Whether the other's ops are these, but for their probabilities."""
        return len(self.batch_ops) == len(other.batch_ops) and all(
            a == b or type(a) is type(b) and is_dataclass(a) and hasattr(a, "p") and replace(a, p=b.p) == b
            for a, b in zip(self.batch_ops, other.batch_ops, strict=True))

    def photometric(self, x: Tensor, *draws: Draws, views: Sequence["View"] = ()) -> Tensor:
        """uint8 (B, 3, h, w) -> float32, normalised if the view says so. Several draws lie one after the other in x, of
        this view, or else of `views` that go with it.

        On a CPU few images at a time: what the ops pass over again and again then stays in its cache (measured: 2.5
        to 3 times faster than batches of 16 at 224 px).
        """
        cpu = x.device.type == "cpu"
        few = max(1, IN_CACHE // x[0].numel() if cpu and len(x) else len(x))
        done = self.memory(x.shape) if cpu else torch.empty(x.shape, device=x.device)
        ops, last = self.batch_ops, UNCHANGED  # the last one writes into the batch
        if ops and isinstance(ops[-1], Normalize):
            *ops, last = ops
        with torch.inference_mode():  # where torch takes less time for small things; `done` is from outside
            drawn = []
            for same in zip(*(view.batch_ops[:len(ops)] for view in views or [self] * len(draws)), strict=True):
                parameters = zip(*(op.sample(d) for op, d in zip(same, draws, strict=True)), strict=True)
                numbers = few == 1 and same[0].on_numbers
                drawn.append([p.tolist() if numbers else p.split(few) for p in map(torch.cat, parameters)])
            for n, (part, place) in enumerate(zip(x.split(few), done.split(few), strict=True)):
                part = part.float().mul_(1 / 255)
                for op, parameters in zip(ops, drawn, strict=True):
                    part = op.apply(part, *(p[n] for p in parameters))
                last.apply(part, out=place)
        return done


class Views:
    """All views of a method, in order. `crop` runs in the workers, `photometric` on the training device."""

    def __init__(self, *views: View):
        self.views = [view for view in views for _ in range(view.count)]
        self.on_tensors = all(view.on_tensors for view in views)  # no op needs a PIL image, so none need be made

    def __len__(self) -> int:
        return len(self.views)

    @property
    def normalize(self) -> Normalize:
        """The normalisation of the first view, which is the network's; only a tokenizer's view has another."""
        return self.views[0].normalize

    def crop(self, image: Image.Image | Tensor, rng: random.Random) -> list[Tensor]:
        """RGB, of PIL or (where all views are `on_tensors`) as uint8 (3, H, W) -> one uint8 tensor (3, h, w) per view.
        """
        crops, aligned = [], any(view.aligned for view in self.views)
        start = rng.getstate() if aligned else None  # not for nothing: it is 625 numbers
        tensor = image
        if not isinstance(image, Tensor) and any(view.on_tensors for view in self.views):
            tensor = pixels(image)
        for view in self.views:
            if view.aligned:
                rng.setstate(start)
            elif aligned:
                start = rng.getstate()
            crops.append(view.crop(tensor if view.on_tensors else image, rng))
        return crops

    def photometric(self, crops: list[Tensor], seeds: Tensor) -> list[Tensor]:
        """uint8 batches (B, 3, h, w) and the images' seeds (B,) -> one float batch per view.

        On a GPU views that go with each other go together: it takes few large operations sooner than many small ones.
        """
        draws, stream = [], 0
        for v, (view, _) in enumerate(zip(self.views, crops, strict=True)):
            stream = stream if view.aligned else v
            draws.append(Draws(seeds, stream))
        batches: list[Tensor] = []
        while (first := len(batches)) < len(crops):
            view, shape, last = self.views[first], crops[first].shape, first + 1
            while crops[first].device.type != "cpu" and last < len(crops) and crops[last].shape == shape \
                    and view.goes_with(self.views[last]):
                last += 1
            x = torch.cat(crops[first:last]) if last - first > 1 else crops[first]
            batches += view.photometric(x, *draws[first:last], views=self.views[first:last]).split(len(seeds))
        return batches

    def __call__(self, images: list[Image.Image], seed: int = 0) -> list[Tensor]:
        """Views of a few PIL images for looking and trying: one float batch (B, 3, h, w) per view."""
        seeds = [seed * 1_000_003 + i for i in range(len(images))]
        crops = [self.crop(image, random.Random(s)) for image, s in zip(images, seeds, strict=True)]
        return self.photometric([torch.stack(view) for view in zip(*crops, strict=True)], torch.tensor(seeds))
