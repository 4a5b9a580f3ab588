"""Losses that more than one method uses, each checked against nested loops in tests/test_losses.py. All in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .parts import full_precision, gather, in_groups, normalized, sum_over_processes, world

# Queries and negatives at a time. A CPU's cache holds 2 MB of logits; a GPU is slow with small things and gets 0.3 GB.
ON_CPU, ON_GPU = (512, 1024), (4096, 16384)


@full_precision
def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy over the batch of ALL processes (SimCLR, arXiv 2002.05709, eq. 1).

    z1, z2: (n, d) projections of the two views on this process. Returns the mean over this process's 2n anchors;
    averaged over processes (as DDP averages gradients) it is the loss of the global batch, gradients included.
    """
    n, (rank, _) = len(z1), world()
    z1, z2 = normalized(z1), normalized(z2)
    everyone = torch.cat([gather(z1), gather(z2)])  # 2N x d
    N = len(everyone) // 2
    similarity = torch.cat([z1, z2]) @ everyone.T / temperature  # 2n x 2N
    mine = rank * n + torch.arange(n, device=z1.device)  # my rows among the N
    itself, partner = torch.cat([mine, N + mine]), torch.cat([N + mine, mine])
    similarity = similarity.scatter(1, itself[:, None], float("-inf"))
    return F.cross_entropy(similarity, partner)


@full_precision
def regression(p: Tensor, z: Tensor) -> Tensor:
    """Mean of 2 − 2 cos(p, z): the squared distance of unit vectors (BYOL, arXiv 2006.07733, eq. 2). p, z: (n, d)."""
    return (2 - 2 * (normalized(p) * normalized(z)).sum(-1)).mean()


@full_precision
def look_up(q: Tensor, k: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Every query's similarity to its key and to all others in the dictionary, over τ (MoCo, arXiv 1911.05722, eq. 1).

    q, k: (n, d), negatives: (K, d), unit vectors -> logits (n, 1 + K), the right key first. InfoNCE is the
    cross-entropy of these logits for class 0.
    """
    return torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], 1) / temperature


@full_precision
def info_nce(logits: Tensor) -> Tensor:
    """Cross-entropy of (n, 1 + K) logits whose first column is right (CPC, arXiv 1807.03748)."""
    return F.cross_entropy(logits, logits.new_zeros(len(logits), dtype=torch.long))


@full_precision
def info_nce_of_many(q: Tensor, k: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """`info_nce(look_up(...))` of queries by the thousand; keys and negatives get no gradient.

    DenseCL's cells of 64 images have 0.8 GB of logits, over which softmax and its gradient pass again and again. With
    some of them at a time the logits stay where they were made, and only the gradient is kept.
    """
    some, few = ON_GPU if q.is_cuda else ON_CPU
    losses = []
    for qs, ks in zip(q.split(some), k.split(some), strict=True):
        among = SoftmaxInParts(qs, temperature)
        among.add(ks[:, None])
        for part in negatives.split(few):
            among.add(part)
        losses.append(among.loss(ks))
    return torch.cat(losses).mean()


class SoftmaxInParts:
    """Softmax of queries q (n, d) over more vectors v than there is room for: they come in parts, and none is kept.

        p(j|q) = exp(q·vⱼ / τ − h) / Z,   Z = Σⱼ exp(q·vⱼ / τ − h)

    h is the highest logit so far. Where a part has a higher one, all sums are multiplied by exp(old h − new h). The
    gradient ∂(−log p) / ∂q = (Σⱼ p(j|q) vⱼ − v) / τ is summed up on the way: later v is gone, or has changed.
    """

    @torch.no_grad()
    def __init__(self, q: Tensor, temperature: float):
        self.q, self.temperature, self.scaled = q, temperature, q / temperature
        self.highest = q.new_full((len(q), 1), -torch.inf)
        self.total = self.weighted = 0.0  # Z (n, 1) and Σⱼ exp(q·vⱼ / τ − h) vⱼ (n, d)

    @torch.no_grad()
    def add(self, v: Tensor) -> None:
        """v: (k, d), or (n, k, d) where every query has others."""
        logits = (self.scaled[:, None] @ v.mT)[:, 0]  # n x k
        highest = torch.maximum(self.highest, logits.amax(1, keepdim=True))
        p, correction = logits.sub_(highest).exp_(), (self.highest - highest).exp()
        self.total = self.total * correction + p.sum(1, keepdim=True)
        self.weighted = self.weighted * correction + (p[:, None] @ v)[:, 0]
        self.highest = highest

    def loss(self, right: Tensor) -> Tensor:
        """−log p of the vectors `right` (n, d), which were added too, (n,)."""
        with torch.no_grad():
            loss = (self.highest + self.total.log())[:, 0] - (self.scaled * right).sum(1)
            gradient = (self.weighted / self.total - right) / self.temperature
        return GradientIsKnown.apply(self.q, loss, gradient)


class GradientIsKnown(torch.autograd.Function):
    """q (n, d), a loss of it (n,) and its gradient (n, d) -> the loss."""

    @staticmethod
    def forward(ctx, q, loss, gradient):
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, of_loss):
        return of_loss[:, None] * ctx.saved_tensors[0], None, None


@full_precision
def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """The mean of `error` where the mask is 1; both (B, L) or both (B, 1, H, W).

    Masks of different sizes weigh by their cells, on all processes together: averaged over processes (as DDP averages
    gradients) it is the mean over the removed cells of the global batch. Accumulated micro-batches weigh the same each.
    Where nothing is removed it is 0.
    """
    removed = sum_over_processes(mask.sum())  # with autocast off: 128 x 224² ones are too many for fp16
    return (error * mask).sum() / (removed.clamp(min=1) / world()[1])


@full_precision
def focal_frequency(prediction: Tensor, target: Tensor, images: int) -> Tensor:
    """Focal frequency loss of mean spectra, as A2MIM uses it (arXiv 2012.12821 and 2205.13943). Both (B, C, H, W).

        D = |mean of F(prediction) - mean of F(target)|,   ω = sg[log(1 + D) / max log(1 + D)],   loss = mean of ω D²

    F is the orthonormal 2-D Fourier transform; means over groups of at most `images` images, which is what one GPU of
    the official runs holds: fewer processes leave the groups, and so the loss, as they are, and with more a group is
    what a process holds. The transform is linear, so that of a group's mean image does for all of them.
    """
    parts = in_groups(prediction - target, images)
    difference = torch.stack([part.mean(0) for part in parts])  # G x C x H x W
    spectrum = torch.view_as_real(torch.fft.fft2(difference, norm="ortho"))
    squared = spectrum.pow(2).sum(-1)  # D², whose gradient is finite at 0, unlike that of D
    weight = squared.detach().sqrt().log1p()
    weight = weight / weight.amax((1, 2, 3), keepdim=True).clamp(min=1e-30)  # all equal: 0 and not 0/0
    return (weight * squared).mean()
