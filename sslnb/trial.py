"""What only building a recipe, or a step of it, can tell: tried before a run has a directory, without memory."""

import inspect
import traceback

import torch
from PIL import Image
from torch import nn

from . import backbones, limits, methods, optim
from .errors import InputError
from .methods.base import Method
from .parts import Queue
from .recipes import Recipe
from .views import Normalize


def try_out(recipe: Recipe, total: int) -> None:
    """Build the method, its optimizer and its views, and go forward once, on torch's meta device, which has shapes and
    no numbers. `total`: optimizer steps of the run. Errors: InputError for all that does not fit together."""
    if recipe.warmup_steps > total:
        raise InputError(f"warmup_steps {recipe.warmup_steps:,} is longer than the run, which has {total:,} steps; use "
                         "fewer, or train for longer.")
    with torch.random.fork_rng(devices=[]):  # masks are drawn
        try:
            with backbones.shapes_only():
                method = recipe.build()
                if not isinstance(getattr(method, "backbone", None), nn.Module):
                    raise InputError(f"{recipe.method} has no self.backbone, which is what evaluation keeps of it; set "
                                     "it in __init__.")
                optim.build(method.param_groups(recipe), recipe)
                if not limits.is_ours(recipe.method):
                    _keeps(method, recipe)
            views = method.views(recipe.size)
            if method.monitored:  # not a protocol, whose images may bring boxes
                normal = views.normalize
                views = views([Image.new("RGB", (recipe.size, recipe.size))])
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{recipe.method} on {recipe.backbone} at {recipe.size} px cannot be built with "
                             f"{_numbers(recipe)}{_reason(error, recipe)}; change what that names.") from error
        if method.monitored and normal != Normalize():
            raise InputError(f"{recipe.method}: its first view is normalised by {normal}, but evaluation shows every "
                             "backbone images that are normalised by Normalize(); end the view with that.")
        if ":" in recipe.backbone:
            _own_backbone(recipe)
        if method.monitored:
            _step(method, recipe, views)
            if not limits.is_ours(recipe.method):
                _own_forward(recipe, views)
    if recipe.pool != "model" and not hasattr(method.backbone, "num_prefix_tokens"):
        raise InputError(f"pool {recipe.pool!r} is impossible for {recipe.backbone}, which has no tokens: use 'model'.")


def _keeps(method: Method, recipe: Recipe) -> None:
    """InputError if the backbone is another network than the recipe's, which nobody could build again."""
    named = backbones.build(recipe.backbone, recipe.size, **recipe.backbone_numbers).state_dict()
    kept = method.backbone.state_dict()
    if wrong := [k for k in {**named, **kept} if k not in named or k not in kept or named[k].shape != kept[k].shape]:
        raise InputError(f"{recipe.method} has another self.backbone than the {recipe.backbone} that its constructor "
                         f"is given ({wrong[0]} differs): evaluation builds it by its name in the recipe. Write "
                         "backbone='my_file.py:my_net' there, with a function my_net(size) that makes yours.")


def _own_backbone(recipe: Recipe) -> None:
    """InputError unless a backbone of the user's own gives features as it says, of images of noise on the CPU."""
    net = backbones.build(recipe.backbone, recipe.size, **recipe.backbone_numbers).eval()
    try:
        with torch.no_grad():
            features = net(torch.randn(2, 3, recipe.size, recipe.size))
    except Exception as error:
        raise InputError(f"{recipe.backbone}: forward with 2 images of {recipe.size} px failed{_reason(error, recipe)}"
                         "; mend it.") from error
    found = f"the shape {tuple(features.shape)}" if isinstance(features, torch.Tensor) else type(features).__name__
    if found != f"the shape {(2, net.num_features)}":
        raise InputError(f"{recipe.backbone}: forward with 2 images gives {found}; its num_features is "
                         f"{net.num_features}, so it must give a tensor of the shape {(2, net.num_features)}.")


def _own_forward(recipe: Recipe, views: list[torch.Tensor]) -> None:
    """Forward with real numbers, on the CPU and a few images of noise, of a method of the user's own: whether it gives
    what it must, and whether its hooks can be called. One whose hooks prepare something first is taken on trust."""
    kind, name = methods.get(recipe.method), recipe.method
    for hook, given in (("before_train", 1), ("before_epoch", 2), ("before_step", 1), ("after_step", 1),
                        ("after_epoch", 2)):
        try:
            inspect.signature(getattr(kind, hook)).bind(*range(1 + given))
        except TypeError as error:
            raise InputError(f"{name}: {hook} {error}; see the hooks in sslnb/methods/base.py.") from error
    if any(getattr(kind, hook) is not getattr(Method, hook) for hook in ("before_train", "before_epoch")):
        return
    few = min(recipe.batch, 4)
    try:
        out = recipe.build().train()([torch.randn(few, *view.shape[1:]) for view in views], torch.arange(few))
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{name}: forward with {few} images failed{_reason(error, recipe)}; mend it.") from error
    if found := _wrong(out):
        raise InputError(f"{name}: forward gives {found}; it must return a dict of tensors with a scalar 'loss' that "
                         "can be differentiated.")


def _reason(error: Exception, recipe: Recipe) -> str:
    """In words: the last line of the user's own files that led to an error, if one did, its kind and what it says."""
    files = {methods.located(name).rpartition(":")[0] for name in (recipe.method, recipe.backbone) if ":" in name}
    lines = [at for at in traceback.extract_tb(error.__traceback__) if at.filename in files]
    where = f" in {lines[-1].filename}, line {lines[-1].lineno}" if lines else ""
    return f"{where} ({type(error).__name__}: {' '.join(str(error).split())})"


def _wrong(out: object) -> str:
    """What is wrong with the output of a method, in words; "" if nothing is."""
    if not isinstance(out, dict):
        return f"a {type(out).__name__}"
    if "loss" not in out:
        return f"no 'loss', only {', '.join(out) or 'nothing'}"
    if others := [key for key, value in out.items() if not isinstance(value, torch.Tensor)]:
        return f"{', '.join(others)}, which is no tensor"
    if out["loss"].ndim:
        return f"a loss of shape {tuple(out['loss'].shape)}"
    return "" if out["loss"].requires_grad else "a loss without a gradient"


def _numbers(recipe: Recipe) -> str:
    """What a caller changed; where nobody said so, all numbers."""
    numbers = {**recipe.backbone_numbers, **recipe.numbers}
    yours = {k: v for k, v in numbers.items() if recipe.sources.get(k) == "you" or k in recipe.backbone_numbers}
    return ", ".join(f"{k} {v!r}" for k, v in (yours or numbers).items()) or "these numbers"


def _step(method: Method, recipe: Recipe, views: list[torch.Tensor]) -> None:
    """Forward in training: masks, queues, batch norms and backbone say what does not fit. Other errors only say that
    the device has no numbers, or that the method's hooks have not run."""
    rows = recipe.batch * (recipe.gpus if method.sync_bn else 1)
    rows = next((few for few in range(2, rows) if rows % few == 0), rows)  # more tell no more, and cost MoCo 0.4 s
    for queue in (module for module in method.modules() if isinstance(module, Queue)):
        queue.enqueue(torch.empty(recipe.gpus * recipe.batch, queue.keys.shape[1], device="meta"))
    at_work: list[nn.Module] = []  # modules of the backbone

    def leave(*_) -> None:
        at_work.pop()

    for module in method.backbone.modules():
        module.register_forward_pre_hook(lambda module, _: at_work.append(module))
        module.register_forward_hook(leave)
    try:
        with torch.no_grad():
            method([torch.empty(rows, *view.shape[1:], device="meta") for view in views],
                   torch.zeros(rows, dtype=torch.long, device="meta"))
    except InputError:
        raise
    except Exception as error:
        if "more than 1 value per channel" in str(error):  # torch's words
            raise InputError(f"batch {recipe.batch} is too small for {recipe.method}: its batch norms need more than "
                             "one image at a time; use 2 or more.") from error
        if at_work and not isinstance(error, NotImplementedError) and "meta" not in str(error).lower():
            sizes = sorted({view.shape[-1] for view in views})
            flexible = (", or backbone_numbers={'dynamic_img_size': True}, with which a timm ViT takes several sizes"
                        ) * (len(sizes) > 1 and hasattr(method.backbone, "dynamic_img_size"))
            raise InputError(f"{recipe.backbone} cannot take the views of {' and '.join(map(str, sizes))} px that "
                             f"{recipe.method} shows it ({' '.join(str(error).split())}); use another size or backbone"
                             f"{flexible}.") from error
