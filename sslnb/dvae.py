"""A small discrete VAE: words for squares of an image that a network makes up, so that another one can draw them again.

DALL-E's idea (arXiv 2102.12092) at a size that trains in a quarter of a minute. An encoder gives every cell logits over
the vocabulary; choosing a word has no gradient, so while it learns the choice is soft (Gumbel noise g, temperature τ):

    y = softmax((logits + g) / τ),   x̂ = D(y),   loss = mean (x − x̂)² + β KL(softmax(logits) ‖ uniform)

τ falls, so that y becomes the one word that `tokenize` takes. It starts as k-means, the nearest centre being the word
and the centre its picture: from random weights so short a training leaves all but ten of 256 words unused. What it
learns on top is context: a word is chosen with a look at the neighbouring cells and drawn with a look at the
neighbouring words.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .masking import patchify, unpatchify
from .parts import agreed, full_precision
from .tokenizers import KMeans, some_of

WIDTH, SHARP = 64, 20.0  # of the context's layers; of the start's softmax over distances
IMAGES, STEPS, BATCH, LR = 2000, 300, 64, 3e-3
WARM, COLD, KL = 0.5, 1 / 16, 1e-4  # τ from and to, β


class DVAE(KMeans):
    def __init__(self, vocab_size: int, cell: int):
        super().__init__(vocab_size, cell)
        self.see, self.paint = _context(3 * cell**2, vocab_size), _context(vocab_size, 3 * cell**2)
        self.requires_grad_(False)  # but in `fit`

    def logits(self, view2: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, L, vocab_size)."""
        cells = patchify(view2, self.cell)
        nearness = 2 * cells @ self.centres.T - self.centres.square().sum(1)
        return SHARP * nearness + _everywhere(self.see, cells)

    def draw(self, words: Tensor) -> Tensor:
        """Weights over the vocabulary (B, L, vocab_size) -> images (B, 3, H, W)."""
        return unpatchify(words @ self.centres + _everywhere(self.paint, words), self.cell)

    @full_precision
    def loss(self, x: Tensor, temperature: float) -> Tensor:
        logits = self.logits(x)
        painted = self.draw(F.gumbel_softmax(logits, temperature, dim=-1))
        kl = (logits.softmax(-1) * (logits.log_softmax(-1) + math.log(self.vocab_size))).sum(-1).mean()
        return (painted - x).square().mean() + KL * kl

    def fit(self, images, view: Callable[[list], Tensor], seed: int) -> None:
        """k-means, then the network, on up to 2,000 of the images; nobody's random state is touched."""
        super().fit(images, view, seed)
        x = view(some_of(images, IMAGES, seed)).to(self.centres)
        self.requires_grad_(True)
        optimizer = torch.optim.Adam(self.parameters(), LR)
        with torch.enable_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            for step in range(STEPS):
                left = 1 - step / STEPS
                optimizer.param_groups[0]["lr"] = LR * left
                optimizer.zero_grad()
                self.loss(x[torch.randint(len(x), (BATCH,))], COLD * (WARM / COLD) ** left).backward()
                optimizer.step()
        self.requires_grad_(False)
        for p in self.parameters():
            agreed(p.data)

    @full_precision
    @torch.no_grad()
    def tokenize(self, view2: Tensor) -> Tensor:
        return self.logits(view2).argmax(-1)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        return self.draw(F.one_hot(tokens, self.vocab_size).to(self.centres))


def _context(inputs: int, outputs: int) -> nn.Sequential:
    """Convolutions over the grid of cells that answer 0 before they have learned."""
    last = nn.Conv2d(WIDTH, outputs, 1)
    nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Conv2d(inputs, WIDTH, 1), nn.ReLU(), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU(), last)


def _everywhere(context: nn.Module, rows: Tensor) -> Tensor:
    """(B, L, D) -> (B, L, D'), the rows being cells of a square grid."""
    side = math.isqrt(rows.shape[1])
    return context(rows.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)
