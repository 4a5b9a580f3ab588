"""Pieces that several methods are made of: MLPs, the moving average, and sums over all processes that carry gradients.

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


# ---------------------------------------------------------------- batch norm over all processes


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose statistics span all processes, on any device.

    torch's SyncBatchNorm refuses CPU tensors, but a two-process run on a laptop must give what one process gives.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world()[1] == 1:
            return super().forward(x)
        axes = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        n = sum_over_processes(torch.tensor(float(x.numel() // x.shape[1]), device=x.device))
        mean = sum_over_processes(x.float().sum(axes)) / n
        centred = x.float() - mean.view(shape)  # two passes: E[x²] - E[x]² cancels badly in float32
        var = sum_over_processes((centred**2).sum(axes)) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        y = centred * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


def sync_batchnorm(module: nn.Module, cuda: bool) -> nn.Module:
    """Turn every batch norm below `module` into one over all processes (torch's own on GPUs)."""
    if cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            new = GlobalBatchNorm(child.num_features, child.eps, child.momentum, child.affine)
            new.load_state_dict(child.state_dict())
            for theirs, mine in zip(child.parameters(), new.parameters(), strict=True):
                mine.requires_grad_(theirs.requires_grad)  # a frozen target stays frozen
            new.train(child.training)
            setattr(module, name, new)
        else:
            sync_batchnorm(child, cuda)
    return module


# ---------------------------------------------------------------- batch norm over a few images, and shuffling (MoCo)


class SplitBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over groups of at most `images` images of a batch: one process does what several GPUs would.

    Made from a batch norm whose parameters and statistics it takes over, so the state dict stays the same. The running
    statistics move once per batch, by the mean over its groups.
    """

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, images: int):
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self.images, self.weight, self.bias = images, norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        groups = x.tensor_split(-(-len(x) // self.images))
        if not self.training or len(groups) == 1:
            return super().forward(x)
        running = self.running_mean, self.running_var
        found = [[torch.zeros_like(r) for r in running] for _ in groups]  # momentum 1.0 replaces these zeros
        y = torch.cat([F.batch_norm(group, *statistics, self.weight, self.bias, True, 1.0, self.eps)
                       for group, statistics in zip(groups, found, strict=True)])
        self.num_batches_tracked += 1
        part = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        for old, new in zip(running, zip(*found, strict=True), strict=True):
            old.lerp_(torch.stack(new).mean(0), part)
        return y


def split_batchnorm(module: nn.Module, images: int) -> nn.Module:
    """Turn every batch norm below `module` into one over groups of `images` images."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, SplitBatchNorm(child, images).train(child.training))
        else:
            split_batchnorm(child, images)
    return module


@torch.no_grad()
def average_statistics(module: nn.Module) -> None:
    """Running statistics averaged over processes: evaluation must not depend on which process wrote the checkpoint."""
    if world()[1] == 1:
        return
    statistics = [b for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
                  for b in (m.running_mean, m.running_var)]
    mean = sum_over_processes(torch.cat(statistics)) / world()[1]  # one message for all layers
    for b, new in zip(statistics, mean.split([len(b) for b in statistics]), strict=True):
        b.data.copy_(new)  # unseen by autograd, which guards what forward was given though backward never reads it


@torch.no_grad()
def shuffle(x: Tensor) -> tuple[Tensor, Tensor]:
    """Deal the rows of all processes anew: (n, ...) -> n other rows, and the order (N,) that `unshuffle` needs."""
    order = torch.randperm(len(x) * world()[1])  # drawn on the CPU, whose random state a resumed run gets back
    order = agreed(order.to(x.device))
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
        last = ((index[:, None] == index) * torch.arange(len(index), device=index.device)).amax(1)
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
