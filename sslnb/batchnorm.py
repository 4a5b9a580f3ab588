"""Batch norm over more images than a process has, or over fewer: whose statistics an image meets decides what leaks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import in_groups, sum_over_processes, world


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
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(module)  # torch's, which would forget the activations of timm's norms
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            new = GlobalBatchNorm(child.num_features, child.eps, child.momentum, child.affine)
            new.load_state_dict(child.state_dict())
            for theirs, mine in zip(child.parameters(), new.parameters(), strict=True):
                mine.requires_grad_(theirs.requires_grad)  # a frozen target stays frozen
            setattr(module, name, _activated(new, child))
        else:
            sync_batchnorm(child, cuda)
    return module


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
        groups = in_groups(x, self.images)
        if not self.training or len(groups) == 1:
            return super().forward(x)
        self.num_batches_tracked += 1
        part = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        each = part / len(groups)  # what every group weighs in the end, so a later one must count for less
        return torch.cat([F.batch_norm(group, self.running_mean, self.running_var, self.weight, self.bias, True,
                                       each / (1 - later * each), self.eps)
                          for later, group in zip(reversed(range(len(groups))), groups, strict=True)])


def split_batchnorm(module: nn.Module, images: int) -> nn.Module:
    """Turn every batch norm below `module` into one over groups of `images` images."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, _activated(SplitBatchNorm(child, images), child))
        else:
            split_batchnorm(child, images)
    return module


def _activated(new: nn.Module, old: nn.Module) -> nn.Module:
    """The new norm in the old one's mode, and with its activation: those of timm's EfficientNets or RegNets have one.
    """
    if hasattr(old, "act"):
        new.drop, new.act = old.drop, old.act
        new.register_forward_hook(_activate)
    return new.train(old.training)


def _activate(norm: nn.Module, inputs: tuple, out: Tensor) -> Tensor:
    return norm.act(norm.drop(out))


@torch.no_grad()
def average_statistics(module: nn.Module) -> None:
    """Running statistics averaged over processes: evaluation must not depend on which process wrote the checkpoint."""
    if world()[1] == 1:
        return
    statistics = [b for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
                  for b in (m.running_mean, m.running_var)]
    if not statistics:
        return  # a transformer
    mean = sum_over_processes(torch.cat(statistics)) / world()[1]  # one message for all layers
    for b, new in zip(statistics, mean.split([len(b) for b in statistics]), strict=True):
        b.data.copy_(new)  # unseen by autograd, which guards what forward was given though backward never reads it
