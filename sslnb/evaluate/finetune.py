"""Fine-tuning: the whole network trained on labels from an SSL start, by the published recipes.

    row = train_protocol("runs/mae", "finetune_mae", data="imagenet", processes=8)

Two families. RSB (arXiv 2110.00476) for a ResNet-50: LAMB, a binary cross-entropy for every class, mixed images. BEiT's
(arXiv 2106.08254) for transformers that learned from masked images: AdamW whose learning rate shrinks with depth,

    lr of layer l = lr · d^(L + 1 − l),   l = 0 the stem, L + 1 the head,

so that what was learned at the bottom moves little; mixed images, RandAugment, erasing, dropped paths, the mean of the
patch tokens. Where the model zoo's files (OpenMixup, mmselfsup) and official codes differ, both have a recipe.

With layer decay the lowest rate and that of the warm-up's start shrink as well, as in MAE's code and today's timm; in
SimMIM's they did not.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backbones
from ..errors import InputError, unknown
from ..parts import ema_update, frozen_copy, full_precision, world
from ..reading import draw_seed
from ..recipes import Recipe
from ..run import Run
from ..views import HorizontalFlip, Normalize, RandomResizedCrop, View, Views
from .augment import RandAugment, RandomErasing, mixed
from .pixels import MARGIN, MARGIN_FROM
from .results import accuracy
from .start import TABLE, carried_over, layer_ids
from .supervised import Supervised

RECIPES: dict[str, Recipe] = {}  # its recipes are in FINETUNE below
LOSSES = ("soft", "bce")
EMA_FROM = 0.9  # OpenMixup's ramp of the momentum begins at this share of it


class FineTune(Supervised):
    def __init__(self, backbone: nn.Module, *, classes: int = 1000, start: str = "", pool: str = "model",
                 head_std: float = 2e-5, loss: str = "soft", sum_classes: bool = True, bce_threshold: float = 0.0,
                 mixup: float = 0.8, cutmix: float = 1.0, switch_prob: float = 0.5, smoothing: float = 0.1,
                 rand_ops: int = 2, rand_magnitude: int = 9, rand_std: float = 0.5, erase: float = 0.25,
                 repeats: int = 1, layer_decay: float = 1.0, decay_positions: bool = False, decay_tables: bool = False,
                 freeze_positions: bool = False, keep_norm: bool = False, ema: float = 0.0, ema_ramp: int = 0,
                 test_scale: float = 1.0, resize: float = MARGIN, interpolation: str = "bicubic",
                 crop: tuple[float, float] = (0.08, 1.0), flip: float = 0.5, test_on: str = "test",
                 test_every: int = 1):
        """`loss`: "soft" cross-entropy, or "bce", summed over the classes (OpenMixup, mmpretrain) or with `sum_classes`
        off their mean (timm); `bce_threshold` above 0 makes targets above it 1 and the others 0.
        `mixup`, `cutmix`: their α, see augment.mixed. `rand_ops` 0: no RandAugment. `repeats`: views of an image in an
        epoch of as many images. `decay_positions`: weight decay on positions and class token too; `decay_tables`: on
        tables of relative positions; `freeze_positions`: absolute ones stay as they are. `keep_norm`: the norm of the
        pooled patches begins as the source's last norm. `ema`: momentum of a second, averaged network, over the first
        `ema_ramp` epochs smaller. `test_scale`: size of test images, in crops of training."""
        super().__init__(backbone, classes=classes, start=start, pool=pool, frozen=False, head_std=head_std,
                         resize=resize, interpolation=interpolation, crop=crop, flip=flip, test_on=test_on,
                         test_every=test_every)
        self.kind, self.sum_classes, self.bce_threshold = loss, sum_classes, bce_threshold
        self.mixing = {"mixup": mixup, "cutmix": cutmix, "switch_prob": switch_prob, "smoothing": smoothing}
        self.strengths, self.erase = (rand_ops, rand_magnitude, rand_std), erase
        self.repeats, self.layer_decay = repeats, layer_decay
        self.decay_positions, self.decay_tables, self.keep_norm = decay_positions, decay_tables, keep_norm
        if freeze_positions and backbone.pos_embed is not None:
            backbone.pos_embed.requires_grad_(False)
        self.ema, self.ema_ramp, self.test_scale = ema, ema_ramp, test_scale
        self.average = frozen_copy(self._network()) if ema else None
        self.batch = 1

    # ------------------------------------------------------------ what it sees

    def views(self, size: int) -> Views:
        strong = [RandAugment(*self.strengths, self.interpolation)] * (self.strengths[0] > 0)
        erasing = [RandomErasing(self.erase)] * (self.erase > 0)
        return Views(View(RandomResizedCrop(size, self.crop, interpolation=self.interpolation),
                          HorizontalFlip(self.flip), *strong, Normalize(), *erasing))

    def test_view(self, size: int) -> Views:
        return super().test_view(round(size * self.test_scale))

    def order(self, seed: int, epoch: int) -> np.ndarray | None:
        if self.repeats == 1:
            return None
        return repeated_order(len(self.labels), self.repeats, self.batch, world()[1], seed, epoch)

    # ------------------------------------------------------------ the step

    def forward(self, views: list[Tensor], index: Tensor | None = None) -> dict[str, Tensor]:
        (x,) = views
        x, targets = self.mix(x, self.labels_for(x, index))
        logits = self.logits(x)
        right = logits.argmax(1) == targets.argmax(1)  # of a mixed image: the larger part
        return {"loss": self.loss(logits, targets), "accuracy": right.float().mean()}

    def mix(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return mixed(x, labels, self.head.out_features, **self.mixing)

    @full_precision
    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits and targets (B, classes)."""
        if self.kind == "soft":
            return -(targets * logits.log_softmax(1)).sum(1).mean()
        if self.bce_threshold:
            targets = (targets > self.bce_threshold).float()
        each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return each.sum(1).mean() if self.sum_classes else each.mean()

    def param_groups(self, recipe) -> list[dict]:
        """No weight decay on vectors nor on what timm lists, positions and class token above all. The depth is in
        "lr_scale" alone, which the loop multiplies the rate with: a scaled "lr" beside it would count twice."""
        ids, last = layer_ids(self.backbone)
        spared = set() if self.decay_positions else getattr(self.backbone, "no_weight_decay", set)()
        spared = {name for name in spared if not (self.decay_tables and name.endswith(TABLE))}
        groups: dict[tuple[float, float], dict] = {}
        for name, p in [*self.backbone.named_parameters(), *self.head.named_parameters("head")]:
            if not p.requires_grad:
                continue
            scale = self.layer_decay ** (last - ids.get(name, last))
            decay = 0.0 if p.ndim <= 1 or name in spared else recipe.weight_decay
            groups.setdefault((scale, decay), {"params": [], "weight_decay": decay, "lr_scale": scale})
            groups[scale, decay]["params"].append(p)
        return list(groups.values())

    # ------------------------------------------------------------ the averaged network

    def _network(self) -> nn.ModuleList:
        return nn.ModuleList([self.backbone, self.head])

    def after_step(self, progress: float) -> None:
        if self.average is not None:
            ema_update(self.average, self._network(), self.momentum(round(progress * self.total) - 1))

    def momentum(self, step: int) -> float:
        """From 0.9 of `ema` at step 0 in a straight line up to it: ξ ← m ξ + (1 − m) θ."""
        ramp = self.ema_ramp * self.per_epoch
        return self.ema * (1 - (1 - EMA_FROM) * max(0.0, 1 - step / ramp)) if ramp else self.ema

    def test(self, run: Run) -> dict[str, float]:
        found = super().test(run)
        if self.average is None:
            return found
        for mean, own in zip(self.average.buffers(), self._network().buffers(), strict=True):
            mean.copy_(own)  # OpenMixup averages weights; statistics of batch norm are the network's own
        trained = self.backbone, self.head
        self.backbone, self.head = self.average
        try:
            averaged = super().test(run)
        finally:
            self.backbone, self.head = trained
        return {**found, **{f"{name}_ema": averaged[name] for name in ("top1", "top5", "correct")}}

    @staticmethod
    def results(tests: list[dict]) -> dict:
        """Of the trained network; with `ema` the averaged one stands beside it, which the zoo's numbers are of."""
        found, last = Supervised.results(tests), tests[-1]
        if "correct_ema" not in last:
            return found
        return {**found, "ema": accuracy(last["correct_ema"], last["n"]), "best_ema": max(t["top1_ema"] for t in tests)}

    # ------------------------------------------------------------ how it begins

    @classmethod
    def on_source(cls, recipe: Recipe, source, size: int | None) -> Recipe:
        """The recipe's own numbers of the backbone beside the source's, and its own size unless images are small."""
        small = source.folder and source.size < MARGIN_FROM
        return recipe.with_(backbone=source.architecture, size=size or (source.size if small else recipe.size),
                            backbone_numbers={**source.numbers, **recipe.backbone_numbers}, pool="model")

    @classmethod
    def frozen_in(cls, recipe: Recipe) -> bool:
        return False

    @classmethod
    def fitted(cls, recipe: Recipe) -> Recipe:
        recipe = super().fitted(recipe)
        numbers = recipe.numbers
        if numbers.get("loss", "soft") not in LOSSES:
            unknown("loss", numbers["loss"], LOSSES)
        if recipe.batch % 2 and (numbers.get("mixup", 1) or numbers.get("cutmix", 1)):
            raise InputError(f"batch {recipe.batch} is odd, and images are mixed in pairs; use an even one, or mixup=0 "
                             "and cutmix=0.")
        side = round(recipe.size * numbers.get("test_scale", 1))
        try:
            with backbones.shapes_only():
                network = backbones.build(recipe.backbone, recipe.size, **recipe.backbone_numbers)
                if side != recipe.size:
                    network.eval()(torch.zeros(1, 3, side, side))
        except TypeError as error:
            raise InputError(f"{recipe.backbone} cannot be built as this protocol wants it ({error}); choose a "
                             "protocol made for its kind of network.") from None
        except (AssertionError, RuntimeError) as error:
            raise InputError(f"{recipe.backbone} for images of {recipe.size} px cannot be tested on {side} px "
                             f"({error}); use test_scale=1.") from None
        return recipe

    @classmethod
    def starting_point(cls, recipe: Recipe, backbone: nn.Module) -> tuple[dict[str, Tensor], str]:
        own, state = backbones.build(recipe.backbone, recipe.size, **recipe.backbone_numbers), backbone.state_dict()
        if recipe.numbers.get("keep_norm"):
            state = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: x
                     for name, x in state.items()}
        return carried_over(state, own, recipe.backbone)

    def before_train(self, run: Run) -> None:
        begun = bool(self.started)
        super().before_train(run)
        self.batch = run.recipe.batch
        if self.average is not None and not begun:
            self.average.load_state_dict(self._network().state_dict())


def repeated_order(images: int, repeats: int, batch: int, processes: int, seed: int, epoch: int) -> np.ndarray:
    """(images,) numbers of an epoch in which each image comes `repeats` times, so that 1 in `repeats` comes at all.

    Copies are dealt out one by one, as by DeiT's and timm's sampler: those of an image go to different processes,
    where the loader takes `batch` numbers for one, then as many for the next.
    """
    shuffled = np.random.RandomState(draw_seed(seed, epoch, -1) % 2**32).permutation(images)
    copies = np.repeat(shuffled[:-(-images // repeats)], repeats)[:images]
    whole = images // (batch * processes) * batch * processes
    dealt = copies[:whole].reshape(-1, batch, processes).transpose(0, 2, 1).ravel()
    return np.concatenate([dealt, copies[whole:]])


# ---------------------------------------------------------------- the published protocols, for protocol.train_protocol

_rsb = Recipe(
    method="sslnb.evaluate.finetune:FineTune", backbone="resnet50", size=160, data="imagenet", gpus=4, batch=512,
    epochs=100, warmup_epochs=5, warmup_from=1e-5, lr_by_epoch=True, cosine_from_start=True, optimizer="lamb", lr=8e-3,
    weight_decay=0.02, min_lr=1e-6, clip=1.0, precision="fp16", source="zoo",
    numbers={"loss": "bce", "mixup": 0.1, "smoothing": 0.0, "rand_magnitude": 6, "erase": 0.0, "head_std": 0.01,
             "resize": 236 / 224, "test_scale": 224 / 160})
_vit = Recipe(
    method="sslnb.evaluate.finetune:FineTune", backbone="vit_base_patch16_224", size=224, data="imagenet", gpus=8,
    backbone_numbers={"drop_path_rate": 0.1, "global_pool": "avg"}, batch=128, epochs=100, warmup_epochs=5,
    warmup_from=1e-4, optimizer="adamw", lr=4e-3, weight_decay=0.05, min_lr=1e-6, clip=5.0, precision="fp16",
    numbers={"layer_decay": 0.65}, source="zoo")
_beit = _vit.with_(
    backbone="beit_base_patch16_224",
    backbone_numbers={"drop_path_rate": 0.1, "global_pool": "avg", "use_rel_pos_bias": True,
                      "use_shared_rel_pos_bias": False, "init_values": 0.1})
_swin = _vit.with_(
    backbone="swin_base_patch4_window7_224", backbone_numbers={"drop_path_rate": 0.1, "window_size": 7}, gpus=4,
    batch=128, accum=4, warmup_epochs=20, warmup_from=2e-4, cosine_from_start=True, lr=5e-3, precision="fp32",
    layer_decay=0.9, head_std=0.02)

_demo = _vit.with_(
    size=20, data="digits_scattered", gpus=1, batch=32, epochs=20, steps=200, warmup_steps=20, warmup_from=0.0,
    clip=0.0, precision="fp32", source="ours", rand_ops=0, erase=0.0, flip=0.0, crop=(0.5, 1.0), mixup=0.0, cutmix=0.0,
    head_std=0.01, test_every=0, note="Too short for strong augmentations: they cost 2 to 4 points on held-out digits.")

FINETUNE = {
    "finetune_demo": _demo.with_(backbone="resnet_mini", backbone_numbers={}, lr=1e-2, layer_decay=1.0),
    "finetune_demo_vit": _demo.with_(backbone="vit_mini", backbone_numbers=_vit.backbone_numbers),
    "finetune_rsb_a3": _rsb,
    "finetune_rsb_a2": _rsb.with_(
        size=224, gpus=8, batch=256, epochs=300, lr=5e-3, backbone_numbers={"drop_path_rate": 0.05}, rand_magnitude=7,
        test_scale=1.0, repeats=3, ema=0.9999, ema_ramp=20,
        note="The average is OpenMixup's; mmpretrain's file has none."),
    "finetune_mae": _vit.with_(
        published={"MAE, 400 epochs": 83.1}, note="lr is 1e-3 x 1024 / 256. mmselfsup, whose number it is, does not "
                                                  "clip."),
    "finetune_mae_official": _vit.with_(
        lr=2e-3, warmup_from=0.0, clip=0.0, source="official code", published={"MAE, 1600 epochs": 83.6},
        note="lr is 5e-4 x 1024 / 256."),
    "finetune_simmim_vit": _beit.with_(
        lr=1e-2, warmup_epochs=20, warmup_from=1e-6, head_std=0.01, ema=0.99996, ema_ramp=20,
        published={"SimMIM, 800 epochs": 83.9, "A2MIM, 800 epochs": 84.3}, note="lr is 2.5e-3 x 1024 / 256."),
    "finetune_simmim_vit_official": _beit.with_(
        gpus=16, lr=5e-3, warmup_epochs=20, warmup_from=2e-4, cosine_from_start=True, decay_tables=True,
        source="official code",
        published={"SimMIM, 800 epochs": 83.8}, note="lr is 1.25e-3 x 2048 / 512, from and to 1e-6."),
    "finetune_cae": _beit.with_(
        gpus=4, accum=2, lr=8e-3, published={"CAE, 300 epochs": 83.2},
        note="lr is 2e-3 x 1024 / 256. mmselfsup, whose number it is, normalises with 0.5 and does not clip."),
    "finetune_cae_official": _beit.with_(
        gpus=32, lr=8e-3, warmup_from=0.0, clip=0.0, decay_tables=True, freeze_positions=True, keep_norm=True,
        source="official code", published={"CAE, 300 epochs": 83.6, "CAE, 800 epochs": 83.8, "CAE, 1600 epochs": 83.9},
        note="Its code turns RandAugment on and begins the warm-up at 0, whatever --aa and --warmup_lr say."),
    "finetune_maskfeat": _vit.with_(
        batch=256, lr=8e-3, lr_by_epoch=True, warmup_epochs=20, warmup_from=1e-8, cosine_from_start=True, clip=0.0,
        precision="fp32", head_std=0.02, decay_positions=True, sources={"lr": "mmselfsup"},
        published={"MaskFeat, 300 epochs": 83.5},
        note="mmselfsup's, whose number the zoo has; lr is 2e-3 for 512 images."),
    "finetune_simmim_swin_192": _swin.with_(
        size=192, backbone_numbers={"drop_path_rate": 0.1, "window_size": 6},
        published={"SimMIM, 100 epochs": 82.9}, note="lr is 1.25e-3 x 2048 / 512, from and to 1e-6."),
    "finetune_simmim_swin_224": _swin.with_(
        published={"SimMIM, 100 epochs, official": 83.5, "SimMIM, 800 epochs, official": 84.0},
        note="The official model of 800 epochs takes a layer_decay of 0.8."),
}
