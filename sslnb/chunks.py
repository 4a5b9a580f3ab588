"""A big batch on a small machine: few images at a time through the backbone, and the loss still over all of them.

    first pass    h = f(x), `chunk` images at a time, of which only h is kept (2,048 numbers of a picture of 150,528)
    then          heads and loss on the whole batch, and back to ∂loss/∂h
    second pass   f(x) again, chunk by chunk, now with ∂loss/∂h to go on from

The gradient is that of the whole batch, which accumulated small batches do not give where the loss compares images. It
costs a second forward pass. The idea is GradCache's (arXiv 2101.06983), cut at the backbone so that batch norms in the
heads see the whole batch; autograd's checkpoints do the second pass. A batch norm in the backbone sees a chunk: there
the whole is a batch whose statistics are those of groups of `chunk` images, as on so many unsynchronised GPUs.
"""

import contextlib
import functools
from collections.abc import Iterator
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def in_chunks(method: nn.Module, images: int) -> None:
    """From here on every backbone of the method, target and key encoders too, takes `images` images at a time."""
    for module in method.modules():
        if type(module) is type(method.backbone):
            module.chunk, module.forward = images, MethodType(_forward, module)


def _forward(backbone: nn.Module, x: Tensor) -> Tensor:
    whole = functools.partial(type(backbone).forward, backbone)
    parts = x.split(backbone.chunk)
    if len(parts) == 1:
        return whole(x)
    norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    # All chunks together move the running statistics as far as one batch does; the second pass leaves them alone.
    first = [1 - (1 - norm.momentum) ** (1 / len(parts)) for norm in norms]

    def passes():
        return _momenta(norms, first), _momenta(norms, [0.0] * len(norms))
    return torch.cat([checkpoint(whole, part, use_reentrant=False, context_fn=passes) for part in parts])


@contextlib.contextmanager
def _momenta(norms: list[_BatchNorm], momenta: list[float]) -> Iterator[None]:
    """Inside, the batch norms move their running statistics by these shares."""
    before = [norm.momentum for norm in norms]
    try:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
