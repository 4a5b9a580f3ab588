"""Rotation: Unsupervised Representation Learning by Predicting Image Rotations (arXiv 1803.07728, ICLR 2018).

Turn every image by 0, 90, 180 and 270 degrees; whoever can tell the turns apart has recognised what is in the image.

    R_k x = x turned k times by 90°,   loss = −1/(4n) Σᵢ Σₖ log softmax(W f(R_k xᵢ) + b)_k

Where we differ from the official code: ResNet-50 on random resized crops with the zoo's numbers (there: AlexNet on the
central crop of ImageNet, Network-in-Network on CIFAR, and stronger weight decay).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..optim import trainable
from ..parts import full_precision
from ..recipes import Recipe
from ..views import HorizontalFlip, Normalize, RandomResizedCrop, RandomRotation, View, Views
from .base import Method


class Rotation(Method):
    accumulable = True
    sync_bn = True

    def __init__(self, backbone: nn.Module, *, crop: tuple[float, float] = (0.08, 1.0), flip: float = 0.5,
                 degrees: float = 0.0, mark: int = 0):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.num_features, 4)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.crop, self.flip, self.degrees, self.mark = crop, flip, degrees, mark

    def views(self, size: int) -> Views:
        return Views(View(RandomResizedCrop(size, self.crop), HorizontalFlip(self.flip), RandomRotation(self.degrees),
                          Normalize()))

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> dict[str, Tensor]:
        (x,) = views
        logits = self.head(self.backbone(self.turns(x)))  # all turns of an image share one batch
        k = torch.arange(4, device=x.device).repeat(len(x))
        return {"loss": self.loss(logits, k), "accuracy": (logits.argmax(1) == k).float().mean()}

    def turns(self, x: Tensor) -> Tensor:
        """Every image four times, k = 0, 1, 2, 3 quarter turns against the clock: (B, 3, h, h) -> (4B, 3, h, h)."""
        if self.mark:  # break it! a grey line at the top is turned too, and gives the answer away
            x = F.pad(x[:, :, self.mark:], (0, 0, self.mark, 0))
        return torch.stack([x.rot90(k, (2, 3)) for k in range(4)], 1).flatten(0, 1)

    @full_precision
    def loss(self, logits: Tensor, k: Tensor) -> Tensor:
        return F.cross_entropy(logits, k)

    def param_groups(self, recipe) -> list[dict]:
        return [{"params": trainable(self), "weight_decay": recipe.weight_decay}]  # biases and norms decay too


RECIPES = {
    "demo": Recipe(
        method="rotation", backbone="resnet_mini", size=20, data="fashion_small", batch=50, epochs=6,
        backbone_numbers={"layers": (1, 1, 1, 0), "channels": (32, 64, 128, 128)}, warmup_epochs=0.5,
        optimizer="adamw", lr=4e-3, weight_decay=1e-4, numbers={"crop": (0.5, 1.0)}, source="ours",
        note="Every image counts four times: 50 images are 200 pictures per step. A third block takes kNN on held-out "
             "training clothes from 73 and 74 % to 78 and 80 % (two seeds)."),
    "r50_8xb64_step_ep70": Recipe(
        method="rotation", backbone="resnet50", size=224, data="imagenet", gpus=8, batch=16, epochs=70,
        warmup_epochs=5, warmup_from=0.1, schedule="step", milestones=(30, 50), optimizer="sgd", lr=0.2,
        weight_decay=1e-4, source="zoo", published={"linear, MoCo protocol": 47.01},
        note="The 64 of its name are pictures per GPU: 16 images, each turned four ways."),
}
