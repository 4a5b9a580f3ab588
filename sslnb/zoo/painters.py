"""Published MAE files that hold the decoder too: whole methods, which can paint what is hidden.

    method = painter("mae_visualize_vit_large.pth")

Most published files are encoders alone and cannot. Names: facebookresearch/mae models_mae.py; OpenMMLab keeps the same
ones below `neck.`, with its own for the parts of a block.
"""

import copy
import re
from pathlib import Path

from torch import Tensor

from ..errors import InputError
from ..methods.mae import MAE
from .files import read
from .layouts import MLP, renamed
from .match import tensors

OURS = ((r"^decoder_embed\.", "embed."), (r"^decoder_pos_embed", "position"), (r"^decoder_blocks\.", "blocks."),
        (r"^decoder_norm\.|^ln1\.", "norm."), (r"^decoder_pred\.", "predict."), *MLP, (r"\.ln(\d)\.", r".norm\1."))
HEADS = 16  # of every published decoder, whatever its width


def painter(file: str | Path, backbone: str | None = None, *, heads: int = HEADS, norm_pix: bool | None = None) -> MAE:
    """The whole MAE of a file, in eval mode. `norm_pix`: whether it predicts standardised patches, which no file says:
    all published ones do, but those that are called "visualize".

    Errors: InputError, one sentence, if the decoder is missing or something does not fit.
    """
    from . import load

    held = tensors(read(file))
    state = decoder_of(held)
    if not state and any(re.match(r"(neck\.)?decoder", name) for name in held):
        raise InputError(f"{file} holds a decoder, but not MAE's, and no other one is read here; give the run "
                         "directory of its method, or a file of MAE.")
    if not state:
        raise InputError(f"{file} is a file of weights, and those of an encoder cannot paint: the decoder or head that "
                         "makes pictures is missing there. Give the run directory of a masked method, or a file of MAE "
                         "that holds its decoder, such as mae_visualize_vit_large.pth.")
    vit, match = load(file, backbone)
    weights = copy.deepcopy(vit.state_dict())
    method = MAE(vit, decoder_dim=len(state["embed.weight"]), decoder_heads=heads,
                 decoder_depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
                 norm_pix="visualize" not in Path(file).name if norm_pix is None else norm_pix)
    vit.load_state_dict(weights)  # MAE has just drawn new ones
    wanted = {name: tensor.shape for name, tensor in method.decoder.state_dict().items()}
    wrong = [name for name in wanted if name not in state or state[name].shape != wanted[name]]
    if wrong or len(state) > len(wanted):
        name = (wrong or sorted(state.keys() - wanted.keys()))[0]
        raise InputError(f"{file} holds a decoder of another build: {name} does not fit that of a MAE on "
                         f"{match.backbone}.")
    method.decoder.load_state_dict(state)
    return method.eval()


def decoder_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of MAE's decoder under our names, {} if there are none."""
    start = next((k.removesuffix("decoder_embed.weight") for k in state if k.endswith("decoder_embed.weight")), None)
    if start is None:
        return {}
    inside = {name[len(start):]: tensor for name, tensor in state.items() if name.startswith(start)}
    return {renamed(name, OURS): tensor for name, tensor in inside.items()
            if re.match(r"decoder_|mask_token$|ln1\.", name)}
