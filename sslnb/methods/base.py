"""The contract of a method. A method is one nn.Module in one file: backbone, heads, views, loss, hooks, recipes."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from ..optim import decay_groups
from ..views import Views


class Method(nn.Module):
    """What the loop in train.py needs. Subclasses set `backbone` and write `views` and `forward`; the rest is optional.

    - `backbone`: a timm model with `num_classes=0`; it is all that evaluation keeps.
    - constructor: `Method(backbone, **numbers)`; every number of the method and of its views, with the paper's default.
    - `forward(views, index)`: views as `views(size)` makes them, one float batch (B, 3, h, w) each; index (B,) the
      images' places in the data set. Returns {"loss": scalar, …}; other entries are for figures. No labels, ever.
    - no `.cuda()`, no rank checks: parts.gather and friends know about processes.
    """

    accumulable = True
    """False where negatives or batch statistics make accumulated small batches another method than one big batch."""

    chunks = False
    """True where a recipe may say `chunk`: forward does no more with the backbone than call it (sslnb/chunks.py)."""

    sync_bn = False
    """True where batch norm must see the batch of all processes."""

    monitored = True
    """False where nobody asks, while it trains, whether the backbone's features collapse or become better."""

    backbone: nn.Module

    def views(self, size: int) -> Views:
        raise NotImplementedError

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> dict[str, Tensor]:
        raise NotImplementedError

    def param_groups(self, recipe) -> list[dict]:
        """Groups for the optimizer; default: no weight decay on biases and norms."""
        return decay_groups(self.named_parameters(), recipe.weight_decay)

    def before_train(self, run) -> None:
        """Once, before the first step (also of a resumed run)."""

    def before_epoch(self, run, epoch: int) -> None:
        """At the start of every epoch."""

    def after_epoch(self, run, epoch: int) -> None:
        """At the end of every epoch, in every process, before its checkpoint."""

    def order(self, seed: int, epoch: int) -> Sequence[int] | None:
        """Image numbers of an epoch in the order they come, as many as there are images; None: each once, shuffled.

        Asked after `before_epoch`, also by a resumed run, so it must follow from (seed, epoch) and buffers alone and
        be the same in every process.
        """

    def before_step(self, progress: float) -> None:
        """After backward, before the optimizer's step. progress in (0, 1] counts optimizer steps."""

    def after_step(self, progress: float) -> None:
        """Once per optimizer step that was taken: EMA, queues, schedules."""

    def snapshot(self, views: list[Tensor]) -> dict[str, Tensor]:
        """Figures' tensors on a few fixed images, saved as training goes on; {} if there is nothing to look at."""
        return {}


class Masked(Method):
    """A method that hides a part of every image: its training step, and what figures and measurements may ask of it.

    Images (B, 3, H, W) are normalised; a mask (B, L) has a 1 for every removed cell of `patch` x `patch` pixels.
    """

    patch: int

    paints = True
    """False where what is predicted is not the image: `to_image` then draws it, at a size of its own."""

    borrows = ""
    """What `to_image` takes from the hidden truth, in words: "brightness and contrast are"; "" if nothing."""

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> dict[str, Tensor]:
        (images,) = views
        mask = self.draw_mask(len(images))
        prediction, mask = self.reconstruct(images, mask), mask.to(images.device, non_blocking=True)
        return {"loss": self.loss(prediction, self.target(images), mask), "prediction": prediction, "mask": mask}

    def draw_mask(self, batch: int, generator: Generator | None = None) -> Tensor:
        """Masks (batch, L) as training draws them, on the CPU."""
        raise NotImplementedError

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """The network's prediction, everywhere, in the form that `target` has."""
        raise NotImplementedError

    def target(self, images: Tensor) -> Tensor:
        """What the loss compares the prediction to: the image itself, unless a method says otherwise."""
        return images.float()

    def loss(self, prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError

    def to_image(self, prediction: Tensor, images: Tensor) -> Tensor:
        """A prediction, or a target, as normalised pictures (B, 3, H, W)."""
        return prediction.float()

    def seen(self, images: Tensor, mask: Tensor) -> Tensor | None:
        """The input as the network gets it, if its holes are painted; None if nothing is let in where it is hidden."""
        return None

    def snapshot(self, views: list[Tensor]) -> dict[str, Tensor]:
        images = views[0]
        # The same masks every time, so that the film shows learning only.
        mask = self.draw_mask(len(images), torch.Generator().manual_seed(0)).to(images.device)
        painted = self.to_image(self.reconstruct(images, mask), images)
        shown = {"images": images, "mask": mask, "reconstruction": painted}
        if (seen := self.seen(images, mask)) is not None:
            shown["seen"] = seen
        return shown if self.paints else {**shown, "target": self.to_image(self.target(images), images)}
