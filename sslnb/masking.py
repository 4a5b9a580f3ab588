"""Masks and patches for masked image modelling. In a mask 1 means REMOVED, in every method."""

import torch
from torch import Tensor

from .errors import InputError


def check_mask_ratio(ratio: float) -> float:
    if not 0 < ratio < 1:
        raise InputError(f"mask_ratio {ratio} is impossible: it is the share of patches that is removed; "
                         "use a number between 0 and 1, such as 0.75.")
    return ratio


def random_noise(batch: int, length: int, device: torch.device) -> Tensor:
    """U(0, 1) per patch, (B, L): the patches with the smallest noise stay."""
    return torch.rand(batch, length, device=device)


def random_mask(noise: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Remove the same number of patches from every image (MAE's masking).

    noise (B, L) -> keep (B, K) indices of the visible patches, restore (B, L) which undoes the shuffling, and the
    mask (B, L) with exactly L - int(L * (1 - mask_ratio)) ones. Noise that is kept while the ratio grows gives
    nested masks, which is what a slider should show.
    """
    length = noise.shape[1]
    visible = int(length * (1 - mask_ratio))
    shuffled = noise.argsort(1)
    restore = shuffled.argsort(1)
    mask = torch.ones_like(noise)
    mask[:, :visible] = 0
    return shuffled[:, :visible], restore, mask.gather(1, restore)


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, L, patch²·C); within a patch the order is (row, column, channel), MAE's."""
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, h // patch * (w // patch), patch * patch * c)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """The inverse of `patchify` for square images: (B, L, patch²·C) -> (B, C, H, W)."""
    b, length, values = patches.shape
    side, c = round(length**0.5), values // patch**2
    x = patches.reshape(b, side, side, patch, patch, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, side * patch, side * patch)


def upsample_mask(mask: Tensor, patch: int) -> Tensor:
    """(B, L) -> (B, 1, H, W) of the square image, each value repeated over its patch."""
    side = round(mask.shape[1] ** 0.5)
    return mask.reshape(-1, 1, side, side).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
