"""How a network that is trained on begins: which tensors it takes from the source, which change shape, which are new.

Every tensor must be accounted for. What may be new or left over is listed here; anything else stops before any work.
"""

import re

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError

TABLE = "relative_position_bias_table"
SHARED = f"rel_pos_bias.{TABLE}"
NEW = re.compile(rf"fc_norm\.|.*\.{TABLE}$|.*\.gamma_[12]$")  # norm of the pooled tokens, positions, layer scale
LEFT = re.compile(r"norm\.|mask_token$")  # the norm of the tokens, where the pooled ones have one instead


def carried_over(source: dict[str, Tensor], target: nn.Module, name: str) -> tuple[dict[str, Tensor], str]:
    """The state dict of `target`, as much as possible from `source`, and a sentence about each part of it.

    Positions are resampled for another size or window. One table of relative positions for all blocks becomes one for
    each, as in SimMIM's code. Errors: InputError if a tensor is missing, too much or of another shape.
    """
    wanted, found = target.state_dict(), dict(source)
    if SHARED in found and SHARED not in wanted:
        table = found.pop(SHARED)
        found.update({k: table for k in wanted if k.endswith(TABLE) and k not in found})
    new, left = (sorted(a.keys() - b.keys()) for a, b in ((wanted, found), (found, wanted)))
    wrong = [k for k in new if not NEW.match(k)] + [k for k in left if not LEFT.match(k)]
    if wrong:
        raise InputError(f"The source does not fit {name}: {', '.join(wrong[:3])}"
                         f"{' and others are' if len(wrong) > 3 else ' is' if len(wrong) == 1 else ' are'} in one of "
                         "them only; choose a protocol made for its kind of network.")
    resampled = [k for k in wanted if k in found and found[k].shape != wanted[k].shape]
    for k in resampled:
        found[k] = _resampled(k, found[k], target)
    said = f"{len(wanted) - len(new)} of the {len(wanted)} tensors of {name} come from the source"
    for words, names in (("resampled", resampled), ("new", new), ("left over", left)):
        if names:
            said += f"; {words}: {', '.join(names[:4])}" + f" and {len(names) - 4} more" * (len(names) > 4)
    return {k: found.get(k, wanted[k]) for k in wanted}, said + "."


def _resampled(name: str, x: Tensor, target: nn.Module) -> Tensor:
    shape = target.state_dict()[name].shape
    if name == "pos_embed" and x.shape[-1] == shape[-1]:
        from timm.layers import resample_abs_pos_embed

        placed = 0 if getattr(target, "no_embed_class", False) else target.num_prefix_tokens  # tokens with positions
        return resample_abs_pos_embed(x, target.patch_embed.grid_size, num_prefix_tokens=placed)
    if name.endswith(TABLE) and x.shape[-1] == shape[-1]:
        window = target.get_submodule(name.rpartition(".")[0]).window_size
        return resampled_table(x, 2 * window[0] - 1, extra=shape[0] - (2 * window[0] - 1) * (2 * window[1] - 1))
    raise InputError(f"{name} of the source has the shape {tuple(x.shape)}, and here it must be {tuple(shape)}; "
                     "fine-tune the same architecture.")


def resampled_table(table: Tensor, side: int, extra: int = 0) -> Tensor:
    """A table of relative positions for another window: (n² + extra, heads) -> (side² + extra, heads).

    As in BEiT's and SimMIM's code: the old offsets are laid out so that the gaps between them grow geometrically from 1
    at the middle and the last one comes to lie on the new last one; then cubic splines. So near neighbours keep their
    biases and only far ones are stretched. (timm interpolates linearly there: SciPy's old function is gone.)
    `extra` rows for the class token stay as they are.
    """
    from scipy.interpolate import RectBivariateSpline

    n = round((len(table) - extra) ** 0.5)
    reach = offsets(n // 2, side // 2)
    old, new = np.concatenate([-reach[::-1], [0.0], reach]), np.arange(side) - side // 2
    maps = table[:n * n].T.reshape(-1, n, n).double().cpu().numpy()
    grids = [RectBivariateSpline(old, old, m, kx=min(3, n - 1), ky=min(3, n - 1))(new, new) for m in maps]
    resized = torch.from_numpy(np.stack(grids)).flatten(1).T
    return torch.cat([resized.to(table), table[n * n:]])


def offsets(count: int, last: int) -> np.ndarray:
    """`count` offsets from 1 with geometrically growing gaps: 1, 1 + q, 1 + q + q², …, the last one at `last`."""
    low, high = 0.5, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (q ** np.arange(count)).sum() > last else (q, high)
    return np.cumsum(low ** np.arange(count))


def layer_ids(backbone: nn.Module) -> tuple[dict[str, int], int]:
    """How deep every parameter of a timm model lies, 0 for the stem, and the number of the last layer, the head's.

    timm's numbers, but two things as in the official codes (BEiT's, SimMIM's): the last norm goes with the head, and
    the down-sampling of a Swin with the block before it. timm puts each of them with its neighbour on the other side.
    """
    from timm.models import group_parameters

    ids = group_parameters(backbone, backbone.group_matcher(coarse=False), reverse=True)
    late = re.compile(r"(fc_)?norm\.|rel_pos_bias\.")
    last = 1 + max(i for name, i in ids.items() if not late.match(name))
    for name in ids:
        if late.match(name):
            ids[name] = last
        elif re.match(r"layers\.\d+\.downsample\.", name):
            ids[name] -= 1
    return ids, last
