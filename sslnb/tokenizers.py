"""Tokenizers: an image becomes a grid of numbers out of a fixed vocabulary, and numbers become an image again.

Methods that guess tokens instead of pixels (CAE, BEiT) ask them for the right answers. What a tokenizer is shown is an
image's second view, with values 0.8 x + 0.1 (x in [0, 1]); one token stands for a square of `cell` pixels of it. No
gradient reaches a tokenizer. Its buffers are in the method's checkpoint, never in the exported backbone.

| name in a recipe | what it is |
|---|---|
| `kmeans` | the nearest of `vocab_size` cluster centres of cells of the training images, clustered in seconds |
| `dvae` | a small discrete VAE that starts there and trains for some seconds more: dvae.py |
| a file `….pth` | the dVAE of DALL-E (arXiv 2102.12092), 8192 codes, cells of 8 px: CAE's and BEiT's own |
| `brightness` | the mean brightness of a cell in `vocab_size` steps; nothing to learn, for tests |
"""

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import clustering
from .decoding import BrokenImage
from .errors import InputError, unknown
from .files import expanded
from .masking import patchify, unpatchify
from .parts import agreed, full_precision
from .views import Normalize

SECOND_VIEW = Normalize((-0.125,) * 3, (1.25,) * 3)  # (x + 0.125) / 1.25 = 0.8 x + 0.1: away from 0 and 1
CLUSTERED = 1000  # images that k-means looks at
ENCODER = ("dalle_encoder.pth (OpenMMLab's plain state dict, or a released CAE checkpoint, which holds it as "
           "head.encoder.*)")


def build(name: str, vocab_size: int, cell: int) -> "Tokenizer":
    """The tokenizer of a recipe, not ready yet: `fit` makes it so. Errors: InputError for a name that is none."""
    if name == "kmeans":
        return KMeans(vocab_size, cell)
    if name == "dvae":
        from .dvae import DVAE

        return DVAE(vocab_size, cell)
    if name == "brightness":
        return Brightness(vocab_size, cell)
    if Path(name).suffix == ".pkl":
        raise InputError(f"tokenizer {name!r} is a pickled module, and to unpickle is to run whatever code the file "
                         f"holds; give {ENCODER}.")
    if Path(name).suffix not in (".pth", ".pt"):
        unknown("tokenizer (kmeans, dvae, brightness, or a file dalle_encoder.pth)", name,
                ["kmeans", "dvae", "brightness"])
    if (vocab_size, cell) != (8192, 8):
        raise InputError(f"tokenizer {name!r} has 8192 codes for cells of 8 px, not {vocab_size} for {cell} px; leave "
                         "vocab_size and cell as they are by default.")
    return Dalle(name)


class Tokenizer(nn.Module):
    """`tokenize` and `decode`, `vocab_size` numbers, each for `cell` x `cell` pixels. `ready` is in the checkpoint."""

    vocab_size: int
    cell: int
    decodes = True

    def __init__(self, ready: bool = False):
        super().__init__()
        self.register_buffer("ready", torch.tensor(ready))

    def fit(self, images, view: Callable[[list], Tensor], seed: int) -> None:
        """Once, before training, the same in all processes; `view` makes the second views of a list of images."""

    def tokenize(self, view2: Tensor) -> Tensor:
        """(B, 3, side * cell, side * cell) as SECOND_VIEW makes them -> (B, side²) int64, row by row."""
        raise NotImplementedError

    def decode(self, tokens: Tensor) -> Tensor:
        """(B, side²) -> images (B, 3, side * cell, side * cell), with values as in the second view."""
        raise NotImplementedError


def some_of(images, count: int, seed: int) -> list:
    """Up to `count` of the images that can be read, drawn by `seed`."""
    chosen = []
    for i in torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count].tolist():
        with contextlib.suppress(BrokenImage):
            chosen.append(images[i])
    return chosen


def second_view(images: Tensor, size: int) -> Tensor:
    """The second view made out of the first, (B, 3, H, W) -> (B, 3, size, size), where there is no other."""
    x = Normalize().undo(images.float())
    if size != x.shape[-1]:
        x = F.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
    return SECOND_VIEW.apply(x)


def first_view(view2: Tensor, size: int) -> Tensor:
    """And back: normalised as the first view is, and of its size."""
    return Normalize().apply(F.interpolate(SECOND_VIEW.undo(view2), size, mode="bilinear"))


class Brightness(Tokenizer):
    def __init__(self, vocab_size: int, cell: int):
        super().__init__(ready=True)
        self.vocab_size, self.cell = vocab_size, cell

    @full_precision
    @torch.no_grad()
    def tokenize(self, view2: Tensor) -> Tensor:
        share = patchify((view2 - 0.1) / 0.8, self.cell).mean(-1)
        return (share * self.vocab_size).long().clamp(0, self.vocab_size - 1)

    def decode(self, tokens: Tensor) -> Tensor:
        grey = (tokens + 0.5) / self.vocab_size * 0.8 + 0.1
        return unpatchify(grey[:, :, None].expand(-1, -1, 3 * self.cell**2), self.cell)


class KMeans(Tokenizer):
    """Each cell by itself: its token is the nearest centre, and a token's picture is its centre."""

    def __init__(self, vocab_size: int, cell: int):
        super().__init__()
        self.vocab_size, self.cell = vocab_size, cell
        # Until `fit` the centres are random colours, the same for everybody.
        draw = torch.Generator("cpu").manual_seed(0)
        colours = torch.rand(vocab_size, 3 * cell**2, generator=draw, device="cpu")
        self.register_buffer("centres", torch.empty(vocab_size, 3 * cell**2).copy_(0.1 + 0.8 * colours))

    @torch.no_grad()
    def fit(self, images, view: Callable[[list], Tensor], seed: int) -> None:
        # Equal cells count once: of 256 words for clothes 40 would be black, for a quarter of all cells is.
        cells = patchify(view(some_of(images, CLUSTERED, seed)), self.cell).flatten(0, 1).to(self.centres).unique(dim=0)
        centres, _ = clustering.kmeans(cells, self.vocab_size, seed=seed)
        self.centres.copy_(agreed(centres))
        self.ready.fill_(True)

    @full_precision
    def tokenize(self, view2: Tensor) -> Tensor:
        cells = patchify(view2, self.cell)
        return clustering.assign(cells.flatten(0, 1), self.centres).view(cells.shape[:2])

    def decode(self, tokens: Tensor) -> Tensor:
        return unpatchify(self.centres[tokens], self.cell)


# ---------------------------------------------------------------- the dVAE of DALL-E


class Dalle(Tokenizer):
    """The released dVAE, with the names and shapes of its published weights.

    `fit` reads the encoder's file; from then on its weights are in the run's checkpoints. The decoder is for pictures
    only: it is read when first needed, from the file beside it that is called "decoder" for "encoder".
    """

    vocab_size, cell = 8192, 8

    def __init__(self, path: str):
        super().__init__()
        self.path = expanded(path)
        self.encoder = DalleEncoder().requires_grad_(False)

    def fit(self, images, view: Callable[[list], Tensor], seed: int) -> None:
        read_weights(self.path, self.encoder, ENCODER)
        self.ready.fill_(True)

    @torch.no_grad()
    def tokenize(self, view2: Tensor) -> Tensor:
        return self.encoder(view2).argmax(1).flatten(1)

    @property
    def decoder_path(self) -> Path:
        return self.path.with_name(self.path.name.replace("encoder", "decoder"))

    @property
    def decodes(self) -> bool:
        return self.decoder_path != self.path and self.decoder_path.is_file()

    @functools.cached_property
    def decoder(self) -> "DalleDecoder":  # cached beside the parameters, so no checkpoint holds it
        if not self.decodes:
            raise InputError(f"{self.path} holds the encoder alone, and to see tokens as pictures DALL-E's decoder is "
                             "needed; put it as a plain state dict, dalle_decoder.pth, beside dalle_encoder.pth.")
        return read_weights(self.decoder_path, DalleDecoder().requires_grad_(False), "dalle_decoder.pth")

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        side = round(tokens.shape[1] ** 0.5)
        one_hot = F.one_hot(tokens, self.vocab_size).transpose(1, 2).float().unflatten(2, (side, side))
        return self.decoder.to(tokens.device)(one_hot)[:, :3].sigmoid()  # the other three are scales


def read_weights(path: Path, module: nn.Module, accepted: str) -> nn.Module:
    """Load the state dict of a file into `module`, whatever stands before its names.

    Errors: InputError if there is no such file, if it holds pickled objects, or weights of another network.
    """
    if not path.is_file():
        raise InputError(f"tokenizer {str(path)!r}: there is no such file; give {accepted}, or use tokenizer 'kmeans'.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's, torch's and zipfile's own kinds
        raise InputError(f"tokenizer {str(path)!r} is no plain state dict ({type(error).__name__}); pickled modules "
                         f"are refused, since loading them runs whatever code they hold: give {accepted}.") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    before = next((k.removesuffix("blocks.input.w") for k in state if k.endswith("blocks.input.w")), "")
    state = {k.removeprefix(before): v for k, v in state.items() if k.startswith(before + "blocks.")}
    try:
        module.load_state_dict(state)
    except RuntimeError:
        raise InputError(f"tokenizer {str(path)!r} does not hold the weights of a {type(module).__name__}; "
                         f"give {accepted}.") from None
    return module


class Conv(nn.Module):
    """A convolution with zeros around, so that the size stays; the published names of its weights are w and b."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__()
        self.w = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5)
        self.b = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class FullPrecisionConv(Conv):
    """The last one: of 8192 numbers that are nearly equal the largest counts."""

    @full_precision
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def _relu_then(convolutions: list[Conv]) -> nn.Sequential:
    layers = [(name, layer) for i, conv in enumerate(convolutions, 1)
              for name, layer in ((f"relu_{i}", nn.ReLU()), (f"conv_{i}", conv))]
    return nn.Sequential(OrderedDict(layers))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernels: tuple[int, ...]):
        super().__init__()
        widths = [inputs, *[outputs // 4] * 3, outputs]
        self.id_path = Conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.res_path = _relu_then([Conv(a, b, k) for a, b, k in zip(widths, widths[1:], kernels, strict=False)])

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.res_path(x) / 64  # 1 / (number of blocks)²


def _blocks(start: Conv, widths: list[int], kernels: tuple[int, ...], between: nn.Module,
            outputs: int) -> nn.Sequential:
    """Four groups of two residual blocks, `between` after the first three."""
    layers: list[tuple[str, nn.Module]] = [("input", start)]
    for g, (a, b) in enumerate(zip(widths, widths[1:], strict=False), 1):
        group = OrderedDict(block_1=Residual(a, b, kernels), block_2=Residual(b, b, kernels))
        if g < 4:
            group["scale"] = between
        layers.append((f"group_{g}", nn.Sequential(group)))
    output = OrderedDict(relu=nn.ReLU(), conv=FullPrecisionConv(widths[-1], outputs, 1))
    return nn.Sequential(OrderedDict([*layers, ("output", nn.Sequential(output))]))


class DalleEncoder(nn.Module):
    """(B, 3, 8 s, 8 s) -> logits (B, 8192, s, s)."""

    def __init__(self):
        super().__init__()
        self.blocks = _blocks(Conv(3, 256, 7), [256, 256, 512, 1024, 2048], (3, 3, 3, 1), nn.MaxPool2d(2), 8192)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class DalleDecoder(nn.Module):
    """One-hot codes (B, 8192, s, s) -> (B, 6, 8 s, 8 s): means and scales of the colours, before a sigmoid."""

    def __init__(self):
        super().__init__()
        up = nn.Upsample(scale_factor=2, mode="nearest")
        self.blocks = _blocks(Conv(8192, 128, 1), [128, 2048, 1024, 512, 256], (1, 3, 3, 3), up, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)
