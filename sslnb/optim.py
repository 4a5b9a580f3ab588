"""Optimizers and the learning rate. The learning rate is a pure function of the global step: nothing to save, nothing
for Accelerate to step too often."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .errors import unknown


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (arXiv 1708.03888) in the form of BYOL's, Barlow Twins' and MoCo v3's code.

        g ← ∇ + λ w,   ρ = η ‖w‖ / ‖g‖,   v ← μ v + ρ g,   w ← w − lr v

    Tensors with at most one dimension (biases, norms) skip both λ and ρ, unless their group says "adapt_vectors"
    (apex's LARC, which SwAV uses, excludes nothing). Two public variants differ: timm divides by
    ‖∇‖ + λ ‖w‖, and OpenMixup's default never computes ρ, which makes it plain SGD at the lr of LARS.
    """

    def __init__(self, params, lr: float, sgd_momentum: float = 0.9, weight_decay: float = 0.0, trust: float = 1e-3):
        super().__init__(params, dict(lr=lr, sgd_momentum=sgd_momentum, weight_decay=weight_decay, trust=trust))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """All tensors of a group in a handful of operations: one by one their launching would hold up a GPU.

        The gradients themselves become ρ g on the way: a copy of them would be as large as all weights.
        """
        for group in self.param_groups:
            trained = [w for w in group["params"] if w.grad is not None]
            adapted = [w for w in trained if w.ndim > 1 or group.get("adapt_vectors")]
            if adapted:
                g = [w.grad for w in adapted]
                torch._foreach_add_(g, adapted, alpha=group["weight_decay"])
                norm_w, norm_g = torch.stack(torch._foreach_norm(adapted)), torch.stack(torch._foreach_norm(g))
                rho = torch.where((norm_w > 0) & (norm_g > 0), group["trust"] * norm_w / norm_g, 1.0)
                torch._foreach_mul_(g, list(rho.unbind()))
            if trained:
                for w in trained:
                    if w not in self.state:
                        self.state[w]["momentum_buffer"] = torch.zeros_like(w)
                v = [self.state[w]["momentum_buffer"] for w in trained]
                torch._foreach_mul_(v, group["sgd_momentum"])
                torch._foreach_add_(v, [w.grad for w in trained])
                torch._foreach_add_(trained, v, alpha=-group["lr"])


LARGE = 10**7  # weights: no demo has a tenth of them, a ResNet-18 has 11 million
OPTIMIZERS = ("sgd", "lars", "adamw", "lamb")
SCHEDULES = ("cosine", "step", "constant")


def build(groups: list[dict], recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over groups of parameters; one may hold "lr_scale", or "fixed_lr" against the schedule."""
    fused = _fused([p for group in groups for p in group["params"]], recipe.precision) or None
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.sgd_momentum, weight_decay=recipe.weight_decay,
                               nesterov=recipe.nesterov, fused=fused)
    if recipe.optimizer == "lars":
        return LARS(groups, lr=recipe.lr, sgd_momentum=recipe.sgd_momentum, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay,
                                 fused=fused)
    if recipe.optimizer == "lamb":
        from timm.optim import Lamb

        # It would clip by itself; the loop does that, `recipe.clip`, after the gradients of fp16 were scaled back.
        return Lamb(groups, lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, max_grad_norm=None)
    unknown("optimizer", recipe.optimizer, OPTIMIZERS)


def _fused(weights: list[Tensor], precision: str) -> bool:
    """Whether the optimizer goes over everything once instead of once per operation.

    On a CPU AdamW takes 106 ms instead of 380 for a ViT-B so; a demo's network would gain half a millisecond. Not in
    fp16 on a GPU: Accelerate would not see the steps that the scaler skips.
    """
    if all(p.is_cuda for p in weights):
        return precision != "fp16"
    return all(p.is_cpu for p in weights) and sum(p.numel() for p in weights) >= LARGE


def decay_groups(named: Iterable[tuple[str, Tensor]], weight_decay: float) -> list[dict]:
    """Weight decay on matrices only: tensors with at most one dimension (biases, norms) get none.

    Rule of Barlow Twins', MoCo v3's and MAE's code. Regular expressions on names miss the norm of a ResNet shortcut.
    """
    named = [(name, p) for name, p in named if p.requires_grad]
    return [{"params": [p for _, p in named if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0}]


def lr_at(step: int, *, lr: float, total: int, warmup: int, warmup_from: float = 0.0, schedule: str = "cosine",
          min_lr: float = 0.0, milestones: tuple[int, ...] = (), gamma: float = 0.1,
          cosine_from_start: bool = False) -> float:
    """Learning rate of optimizer step `step` (0 … total-1); all lengths are in optimizer steps.

    Linear from `warmup_from` (a share of lr) to lr over `warmup`, then "cosine" to min_lr, "step" (times gamma at each
    milestone) or "constant".
    The cosine starts AFTER the warm-up as in the official codes; OpenMMLab's runs under it and peaks lower, and so does
    timm's, which SimMIM uses: `cosine_from_start`.
    """
    if step < warmup:
        return lr * (warmup_from + (1 - warmup_from) * step / warmup)
    if schedule == "cosine":
        start = 0 if cosine_from_start else warmup
        progress = (step - start) / max(1, total - start)
        return min_lr + (lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2
    if schedule == "step":
        return lr * gamma ** sum(step >= m for m in milestones)
    if schedule == "constant":
        return lr
    unknown("schedule", schedule, SCHEDULES)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its learning rate: its own fixed one, or lr times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = group.get("fixed_lr", lr * group.get("lr_scale", 1.0))


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]
