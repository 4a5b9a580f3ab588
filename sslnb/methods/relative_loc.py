"""Relative Location: Unsupervised Visual Representation Learning by Context Prediction (arXiv 1505.05192, ICCV 2015).

Cut nine patches out of an image; given the one in the centre and one of its neighbours, say where the neighbour lies.

    loss = −1/(8n) Σᵢ Σⱼ log softmax(h([f(p_ij); f(p_ic)]))_j,   places j: 0 1 2 / 3 c 4 / 5 6 7

Gaps between the patches, a random shift of each and grey images take away what would give the answer without looking
at the content: edges that go on, and the colour fringes of a lens.

Where we differ from the zoo's code: the centre patch is encoded once instead of eight times (same statistics of the
batch, same gradient), and batch norm sees all processes (there: the 64 images of one GPU), so that two processes are
one. The paper's own recipe is another one: an AlexNet on patches of 96 px, 48 px apart, with colours dropped.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..parts import full_precision
from ..recipes import Recipe
from ..views import Greyscale, Normalize, PatchGrid, Resize, View, Views
from .base import Method


class RelativeLoc(Method):
    accumulable = True
    sync_bn = True

    def __init__(self, backbone: nn.Module, *, zoom: float = 292 / 224, patch: float = 64 / 224, gap: float = 21 / 224,
                 grey: float = 0.66, hidden_dim: int = 4096, dropout: float = 0.5, bn_momentum: float = 0.003,
                 head_decay: float = 5e-4):
        super().__init__()
        if hasattr(backbone, "patch_embed"):
            raise InputError("relative_loc shows its backbone patches that are smaller than the image, and "
                             f"{type(backbone).__name__} takes one size only; use resnet_mini or resnet50, say.")
        if 3 * (patch + gap) > zoom:
            raise InputError(f"Three patches of {patch:.3g} with gaps of {gap:.3g} are wider than an image of "
                             f"{zoom:.3g} (shares of the size); choose a smaller patch or gap, or a larger zoom.")
        self.backbone = backbone
        self.neck = nn.Sequential(nn.Linear(2 * backbone.num_features, hidden_dim),
                                  nn.BatchNorm1d(hidden_dim, momentum=bn_momentum), nn.ReLU(inplace=True),
                                  nn.Dropout(dropout))
        self.head = nn.Linear(hidden_dim, 8)
        for layer, bias in ((self.neck[0], 0.1), (self.head, 0.0)):
            nn.init.normal_(layer.weight, std=0.005)
            nn.init.constant_(layer.bias, bias)
        self.zoom, self.patch, self.gap, self.grey, self.head_decay = zoom, patch, gap, grey, head_decay

    def views(self, size: int) -> Views:
        """The nine patches side by side. Lengths are shares of the size: at 224 they are 292, 64 and 21 px."""
        zoom, patch, gap = (round(size * share) for share in (self.zoom, self.patch, self.gap))
        return Views(View(Resize(zoom, "bilinear"), PatchGrid(patch, gap), Greyscale(self.grey), Normalize()))

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> dict[str, Tensor]:
        around, centre = self.patches(views[0])
        logits = self.head(self.neck(self.pairs(around, centre)))
        place = torch.arange(8, device=logits.device).repeat(len(centre))
        return {"loss": self.loss(logits, place), "accuracy": (logits.argmax(1) == place).float().mean()}

    def patches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, 3p, 3p) -> the neighbours (8B, 3, p, p), image by image, and the centres (B, 3, p, p)."""
        p = x.shape[-1] // 3
        x = x[..., :3 * p, :3 * p].unflatten(3, (3, p)).unflatten(2, (3, p))  # B x 3 x row x p x column x p
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # B x 9 x 3 x p x p
        return torch.cat([x[:, :4], x[:, 5:]], 1).flatten(0, 1), x[:, 4]

    def pairs(self, around: Tensor, centre: Tensor) -> Tensor:
        """[f(p_ij); f(p_ic)], (8B, 2D). Two forwards, so that neighbours and centres have their own BN statistics."""
        return torch.cat([self.backbone(around), self.backbone(centre).repeat_interleave(8, 0)], 1)

    @full_precision
    def loss(self, logits: Tensor, place: Tensor) -> Tensor:
        return F.cross_entropy(logits, place)

    def param_groups(self, recipe) -> list[dict]:
        """Everything decays, neck and head more than the backbone."""
        return [{"params": list(self.backbone.parameters()), "weight_decay": recipe.weight_decay},
                {"params": [*self.neck.parameters(), *self.head.parameters()], "weight_decay": self.head_decay}]


RECIPES = {
    "demo": Recipe(
        method="relative_loc", backbone="resnet_mini", size=28, data="fashion_small", batch=50, epochs=8,
        warmup_epochs=0.5, optimizer="adamw", lr=3e-3, weight_decay=1e-4,
        numbers={"zoom": 1.0, "patch": 0.25, "gap": 0.07, "grey": 0.0, "hidden_dim": 256, "dropout": 0.0,
                 "bn_momentum": 0.1, "head_decay": 1e-4},
        source="ours", note="Patches of 7 px, 0 to 4 px apart; the images are grey already."),
    "r50_8xb64_step_ep70": Recipe(
        method="relative_loc", backbone="resnet50", size=224, data="imagenet", gpus=8, batch=64, epochs=70,
        warmup_epochs=5, warmup_from=0.1, schedule="step", milestones=(30, 50), optimizer="sgd", lr=0.2,
        weight_decay=1e-4, source="zoo", published={"linear, MoCo protocol": 38.83},
        note="Neck and head decay with 5e-4. The paper trained an AlexNet-like network with another recipe."),
}
