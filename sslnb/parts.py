"""Pieces that several methods are made of: MLPs, the moving average, memories, sums over all processes with gradients.

Everything here is the identity (or a plain operation) when there is one process, so methods need no rank checks.
"""

import copy
import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InputError


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def full_precision(function: Callable) -> Callable:
    """Run a loss in float32 with autocast off. Casting the inputs alone is undone by autocast at the next matmul."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        def cast(a):
            return a.float() if isinstance(a, Tensor) and a.is_floating_point() else a

        device = next((a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return function(*map(cast, args), **{k: cast(v) for k, v in kwargs.items()})

    return run


# ---------------------------------------------------------------- collectives with gradient


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(out, x.contiguous())
        return torch.cat(out)

    @staticmethod
    def backward(ctx, grad):
        # Every process holds a part of the gradient of MY rows: sum first, then keep my slice. Keeping the slice
        # alone loses those parts, and the averaged gradient comes out wrong without any error.
        grad = grad.contiguous()
        dist.all_reduce(grad)
        rank, size = world()
        return grad.chunk(size)[rank]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def gather(x: Tensor) -> Tensor:
    """(n, ...) on each of W processes -> (W*n, ...) in rank order; exact gradients for DDP's averaging."""
    return x if world()[1] == 1 else _Gather.apply(x)


def sum_over_processes(x: Tensor) -> Tensor:
    """Sum of x over all processes; exact gradients for DDP's averaging."""
    return x if world()[1] == 1 else _Sum.apply(x)


def share(x: Tensor) -> Tensor:
    """This process's part of rows that all processes hold: what `gather` joined, taken apart again."""
    rank, size = world()
    return x.tensor_split(size)[rank]


def agreed(x: Tensor) -> Tensor:
    """x as process 0 has it. For choices: a sum may differ between processes in its last digit, its argmax wholly."""
    if world()[1] > 1:
        dist.broadcast(x, 0)
    return x


# ---------------------------------------------------------------- groups, shuffling


def in_groups(x: Tensor, images: int) -> tuple[Tensor, ...]:
    """A batch in as few parts of at most `images` images as will do, as equal as can be.

    Not `tensor_split`: its backward makes a whole batch of zeros for every part, which is quadratic.
    """
    parts = -(-len(x) // images)
    return x.split([len(x) // parts + (i < len(x) % parts) for i in range(parts)])


@torch.no_grad()
def shuffle(x: Tensor) -> tuple[Tensor, Tensor]:
    """Deal the rows of all processes anew: (n, ...) -> n other rows, and the order (N,) that `unshuffle` needs."""
    order = torch.randperm(len(x) * world()[1])  # drawn on the CPU, whose random state a resumed run gets back
    order = agreed(order.to(x.device, non_blocking=True))
    return gather(x)[share(order)], order


@torch.no_grad()
def unshuffle(x: Tensor, order: Tensor) -> Tensor:
    """What became of the shuffled rows, (n, ...), back in this process and in their old places."""
    return gather(x)[share(order.argsort())]


# ---------------------------------------------------------------- networks


def mlp(dims: Sequence[int], *, hidden_bias: bool, hidden_bn: bool = True, last_bias: bool, last_bn: bool = False,
        last_affine: bool = True) -> nn.Sequential:
    """Linear (BN ReLU) Linear …: `dims` (in, hidden, …, out). Projectors and predictors differ in these flags only."""
    layers: list[nn.Module] = []
    for i, (d_in, d_out) in enumerate(zip(dims, dims[1:], strict=False)):
        last = i == len(dims) - 2
        layers.append(nn.Linear(d_in, d_out, bias=last_bias if last else hidden_bias))
        if last and last_bn:
            layers.append(nn.BatchNorm1d(d_out, affine=last_affine))
        if not last:
            layers += [nn.BatchNorm1d(d_out)] * hidden_bn + [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy that no gradient reaches: the start of a target or key network."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def ema_update(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """ξ ← m ξ + (1 − m) θ over parameters; the target keeps its own batch-norm statistics."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1 - momentum)


def cosine_to_one(start: float, progress: float) -> float:
    """The EMA momentum m_t = 1 − (1 − m_0) (1 + cos(π t/T)) / 2, from m_0 at progress 0 to 1 at progress 1."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2


def normalized(x: Tensor) -> Tensor:
    """x / ‖x‖ along the last axis."""
    return F.normalize(x, dim=-1)


class MemoryBank(nn.Module):
    """One unit vector per image: what the network said when it last saw it. The same in all processes.

        vᵢ ← m vᵢ + (1 − m) fᵢ, put back on the unit sphere
    """

    def __init__(self, images: int, dim: int, momentum: float):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("vectors", normalized(torch.randn(images, dim)))

    @full_precision
    @torch.no_grad()
    def update(self, index: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """Take in f (n, d) of the images `index` (n,); returns the numbers and new vectors of ALL processes."""
        index, f = gather(index), gather(f)
        new = normalized(self.vectors[index].lerp(f, 1 - self.momentum))
        # Of an image that is there twice the last one counts: left to itself a GPU would take either.
        ordered, order = index.sort(stable=True)
        last = order[torch.searchsorted(ordered, index, right=True) - 1]
        self.vectors[index] = new[last]
        return index, new[last]


class Queue(nn.Module):
    """A dictionary of the newest `size` keys, first in, first out, the same in all processes. Starts with random keys.

    The size is a whole number of global batches, so that a batch enters and leaves as one.
    """

    def __init__(self, dim: int, size: int):
        super().__init__()
        self.register_buffer("keys", normalized(torch.randn(size, dim)))  # float32, whatever the precision
        self.register_buffer("place", torch.zeros((), dtype=torch.long))  # of the oldest key, the next to go

    def forward(self) -> Tensor:
        """All keys (size, dim) as they are now; a copy, for `enqueue` may come before backward."""
        return self.keys.clone()

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """The keys (n, dim) of every process take the place of the oldest ones, in the order of the processes."""
        keys, size = gather(keys.float()), len(self.keys)
        if size % len(keys):
            raise InputError(f"A queue of {size} keys is no multiple of the total batch of {len(keys)}; "
                             f"use queue={-(-size // len(keys)) * len(keys)}, or another batch.")
        places = (self.place + torch.arange(len(keys), device=keys.device)) % size
        self.keys.index_copy_(0, places, keys)
        self.place.add_(len(keys)).remainder_(size)
