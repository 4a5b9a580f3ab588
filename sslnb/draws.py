"""Random numbers of views: one per image, from its seed alone."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the step of splitmix64


@dataclass
class Draws:
    """Uniform numbers, one per image, that depend on (seed, stream, how many were drawn before) and nothing else.

    A counter-based generator (splitmix64's finaliser, Steele et al. 2014) instead of a stateful one: there is no
    state to save for an exact resume and no order to respect between images.
    """

    seeds: Tensor  # int64 (B,)
    stream: int = 0
    drawn: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.mixed = _mix(self.seeds.cpu().numpy().astype(np.uint64))

    def __call__(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """float32 (B,) in [low, high), on the CPU."""
        self.drawn += 1
        counter = (self.stream * 1000 + self.drawn) * GOLDEN % 2**64
        unit = (_mix(self.mixed + np.uint64(counter)) >> np.uint64(11)) * 2.0**-53
        return torch.from_numpy((low + (high - low) * unit).astype(np.float32))


def _mix(x: np.ndarray) -> np.ndarray:
    """uint64, whose products wrap around, which is what the mixing needs."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
