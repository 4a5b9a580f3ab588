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


# ---------------------------------------------------------------- networks


def mlp(dims: Sequence[int], *, hidden_bias: bool, hidden_bn: bool = True, last_bias: bool, last_bn: bool = False,
        last_affine: bool = True) -> nn.Sequential:
    """Linear (BN ReLU) Linear …: `dims` (in, hidden, …, out). The projectors and predictors differ in these flags only."""
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
