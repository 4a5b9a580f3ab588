"""The same training steps made of lightly's building blocks (its extra `bench`), for notebooks/throughput.ipynb.

Each is what lightly's documentation shows for the method, with our recipe's backbone, widths and optimizer: the same
memory format and precision, the same views, no data loading. What differs is how a step is written.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .launch import autocast
from .recipes import Recipe, method_numbers


def lightly_step(recipe: Recipe, views: list[Tensor]) -> Callable[[], object] | None:
    """One optimizer step on these views; None for a method that lightly has no blocks for.

    Errors: ImportError without lightly.
    """
    from . import optim

    makers = {"simclr": _simclr, "byol": _byol, "simsiam": _simsiam, "barlowtwins": _barlowtwins, "mocov2": _moco,
              "densecl": _densecl, "swav": _swav, "mae": _mae, "simmim": _simmim}
    if recipe.method not in makers:
        return None
    numbers = {**method_numbers(recipe.method), **recipe.numbers}
    net, loss, after = makers[recipe.method](recipe.build().backbone, numbers)
    net.to(views[0].device, memory_format=torch.channels_last).train()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = optim.build([{"params": trained, "weight_decay": recipe.weight_decay}], recipe)

    def step() -> None:
        with autocast(recipe.precision, views[0].device):
            value = loss(views)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        after()
    return step


Made = tuple[nn.Module, Callable[[list[Tensor]], Tensor], Callable[[], None]]  # network, loss of views, after the step


def _nothing() -> None:
    pass


def _simclr(backbone: nn.Module, numbers: dict) -> Made:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    net = nn.Sequential(backbone, SimCLRProjectionHead(backbone.num_features, numbers["hidden_dim"], numbers["dim"]))
    criterion = NTXentLoss(temperature=numbers["temperature"])
    return net, lambda views: criterion(*(net(x) for x in views)), _nothing


def _byol(backbone: nn.Module, numbers: dict) -> Made:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import update_momentum

    widths = numbers["hidden_dim"], numbers["dim"]
    online = nn.Sequential(backbone, BYOLProjectionHead(backbone.num_features, *widths))
    target = copy.deepcopy(online).requires_grad_(False)
    predictor, criterion = BYOLPredictionHead(numbers["dim"], *widths), NegativeCosineSimilarity()

    def loss(views: list[Tensor]) -> Tensor:
        p1, p2 = (predictor(online(x)) for x in views)
        z1, z2 = (target(x) for x in views)
        return (criterion(p1, z2) + criterion(p2, z1)) / 2

    return nn.ModuleList([online, target, predictor]), loss, lambda: update_momentum(online, target, 0.99)


def _simsiam(backbone: nn.Module, numbers: dict) -> Made:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead

    d = numbers["dim"]
    encoder = nn.Sequential(backbone, SimSiamProjectionHead(backbone.num_features, d, d))
    predictor, criterion = SimSiamPredictionHead(d, numbers["predictor_dim"], d), NegativeCosineSimilarity()

    def loss(views: list[Tensor]) -> Tensor:
        z1, z2 = (encoder(x) for x in views)
        return (criterion(z1.detach(), predictor(z2)) + criterion(z2.detach(), predictor(z1))) / 2

    return nn.ModuleList([encoder, predictor]), loss, _nothing


def _barlowtwins(backbone: nn.Module, numbers: dict) -> Made:
    from lightly.loss import BarlowTwinsLoss
    from lightly.models.modules import BarlowTwinsProjectionHead

    head = BarlowTwinsProjectionHead(backbone.num_features, numbers["hidden_dim"], numbers["dim"])
    net, criterion = nn.Sequential(backbone, head), BarlowTwinsLoss(numbers["lambd"])
    return net, lambda views: criterion(*(net(x) for x in views)), _nothing


def _moco(backbone: nn.Module, numbers: dict) -> Made:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import update_momentum

    query = nn.Sequential(backbone, MoCoProjectionHead(backbone.num_features, backbone.num_features, numbers["dim"]))
    key = copy.deepcopy(query).requires_grad_(False)
    criterion = NTXentLoss(numbers["temperature"], memory_bank_size=(numbers["queue"], numbers["dim"]))
    return (nn.ModuleList([query, key]), lambda views: criterion(query(views[0]), key(views[1])),
            lambda: update_momentum(query, key, numbers["momentum"]))


def _densecl(backbone: nn.Module, numbers: dict) -> Made:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import DenseCLProjectionHead
    from lightly.models.utils import select_most_similar, update_momentum

    d, c = numbers["dim"], backbone.num_features
    query = nn.ModuleList([backbone, DenseCLProjectionHead(c, c, d), DenseCLProjectionHead(c, c, d)])
    key = copy.deepcopy(query).requires_grad_(False)
    of_images, of_cells = (NTXentLoss(numbers["temperature"], memory_bank_size=(numbers["queue"], d)) for _ in range(2))

    def encode(net: nn.ModuleList, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cells = net[0].forward_features(x).flatten(2).transpose(1, 2)  # n x S x c
        return cells, net[1](cells.mean(1)), net[2](cells)

    def loss(views: list[Tensor]) -> Tensor:
        (f, q, r), (g, k, s) = encode(query, views[0]), encode(key, views[1])
        matched = select_most_similar(f, g, s)
        return (of_images(q, k) + of_cells(r.flatten(0, 1), matched.flatten(0, 1))) / 2

    return nn.ModuleList([query, key]), loss, lambda: update_momentum(query, key, numbers["momentum"])


def _swav(backbone: nn.Module, numbers: dict) -> Made:
    from lightly.loss import SwaVLoss
    from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes

    head = SwaVProjectionHead(backbone.num_features, numbers["hidden_dim"], numbers["dim"])
    net, prototypes = nn.Sequential(backbone, head), SwaVPrototypes(numbers["dim"], numbers["prototypes"])
    criterion = SwaVLoss(numbers["temperature"], numbers["iterations"], numbers["epsilon"])

    def loss(views: list[Tensor]) -> Tensor:
        prototypes.normalize()
        scores = [prototypes(nn.functional.normalize(net(x), dim=1)) for x in views]
        return criterion(scores[:2], scores[2:])

    return nn.ModuleList([net, prototypes]), loss, _nothing


def _mae(backbone: nn.Module, numbers: dict) -> Made:
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM

    encoder, patch = MaskedVisionTransformerTIMM(backbone), backbone.patch_embed.patch_size[0]
    length = backbone.patch_embed.num_patches + 1
    decoder = MAEDecoderTIMM(backbone.patch_embed.num_patches, patch, embed_dim=backbone.embed_dim,
                             decoder_embed_dim=numbers["decoder_dim"], decoder_depth=numbers["decoder_depth"],
                             decoder_num_heads=numbers["decoder_heads"])

    def loss(views: list[Tensor]) -> Tensor:
        (x,) = views
        keep, hidden = utils.random_token_mask((len(x), length), numbers["mask_ratio"], device=x.device)
        seen = decoder.embed(encoder.encode(x, idx_keep=keep))
        tokens = utils.set_at_index(utils.repeat_token(decoder.mask_token, (len(x), length)).to(seen.dtype),
                                    keep, seen)
        painted = decoder.predict(utils.get_at_index(decoder.decode(tokens), hidden))
        return nn.functional.mse_loss(painted, utils.get_at_index(utils.patchify(x, patch), hidden - 1))

    return nn.ModuleList([encoder, decoder]), loss, _nothing


def _simmim(backbone: nn.Module, numbers: dict) -> Made:
    from lightly.models import utils
    from lightly.models.modules import MaskedVisionTransformerTIMM

    encoder, patch = MaskedVisionTransformerTIMM(backbone), backbone.patch_embed.patch_size[0]
    length, head = backbone.patch_embed.num_patches + 1, nn.Linear(backbone.embed_dim, 3 * patch**2)

    def loss(views: list[Tensor]) -> Tensor:
        (x,) = views
        _, hidden = utils.random_token_mask((len(x), length), numbers["mask_ratio"], device=x.device)
        painted = head(utils.get_at_index(encoder.encode(x, idx_mask=hidden), hidden))
        return nn.functional.l1_loss(painted, utils.get_at_index(utils.patchify(x, patch), hidden - 1))

    return nn.ModuleList([encoder, head]), loss, _nothing
