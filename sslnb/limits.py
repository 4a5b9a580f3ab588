"""What the values of a recipe and of a run may be, by their names: the tables that are read before any work."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .errors import InputError, unknown


class Limit(NamedTuple):
    """`words` finish the sentence "use …"."""

    words: str
    allows: Callable[[Any], bool]


def _number(x: Any) -> bool:
    """Finite, and neither True nor "0.1"."""
    return isinstance(x, int | float) and not isinstance(x, bool) and -math.inf < x < math.inf


def _whole(x: Any, least: int) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= least


def _all(x: Any, allows: Callable[[Any], bool], length: int | None = None) -> bool:
    """A tuple, or JSON's and papermill's list."""
    return isinstance(x, tuple | list) and len(x) == (length or len(x)) and all(map(allows, x))


COUNT = Limit("a whole number of at least 1", lambda x: _whole(x, 1))
SIDE = Limit("a whole number of pixels from 1 to 4096", lambda x: _whole(x, 1) and x <= 4096)
COUNT_OR_0 = Limit("a whole number of at least 0", lambda x: _whole(x, 0))
AMOUNT = Limit("a number of at least 0", lambda x: _number(x) and x >= 0)
POSITIVE = Limit("a number above 0", lambda x: _number(x) and x > 0)
SHARE = Limit("a number from 0 to 1", lambda x: _number(x) and 0 <= x <= 1)
BELOW_1 = Limit("a number from 0 to below 1", lambda x: _number(x) and 0 <= x < 1)
INSIDE = Limit("a number between 0 and 1, such as 0.5", lambda x: _number(x) and 0 < x < 1)
HUE = Limit("a number from 0 to 0.5, half a turn of the colour circle", lambda x: _number(x) and 0 <= x <= 0.5)
BETAS = Limit("two numbers from 0 to below 1, such as (0.9, 0.999)", lambda x: _all(x, BELOW_1.allows, 2))
CROP = Limit("two shares of the area, the smaller first, such as (0.2, 1.0)",
             lambda x: _all(x, lambda share: _number(share) and 0 < share <= 1, 2) and x[0] <= x[1])
EACH_VIEW = Limit("a number from 0 to 1, or two of them where each view has its own",
                  lambda x: SHARE.allows(x) or _all(x, SHARE.allows, 2))
MILESTONES = Limit("whole numbers of at least 0 that rise, such as (60, 80)",
                   lambda x: _all(x, COUNT_OR_0.allows) and list(x) == sorted(x))
SIZES = Limit("whole numbers of at least 1, such as (64, 128)", lambda x: _all(x, COUNT.allows) and len(x) > 0)
FOUR = Limit("four whole numbers of at least 1", lambda x: _all(x, COUNT.allows, 4))
LAYER = Limit("a whole number of at least 0, or None", lambda x: x is None or _whole(x, 0))
FLAG = Limit("True or False", lambda x: isinstance(x, bool))
TEXT = Limit("a text", lambda x: isinstance(x, str))
NAME = Limit("a name in quotation marks", lambda x: isinstance(x, str) and x != "")
PLACE = Limit("a name of images or the path of a folder or list, as a text", NAME.allows)
VALUES = Limit("a dictionary of names and values", lambda x: isinstance(x, Mapping) and all(map(TEXT.allows, x)))
PART = Limit("a part such as 0.1, a list file, or None for all images",
             lambda x: x is None or TEXT.allows(x) or _number(x) and 0 < x <= 1)


def _table(*rows: tuple[Limit, str]) -> dict[str, Limit]:
    return {name: limit for limit, names in rows for name in names.split()}


# Of Recipe, then of pretrain. The rates and lengths that must fit one another are compared in recipes.py and checks.py.
FIELDS = _table(
    (SIDE, "size"), (COUNT, "epochs batch gpus accum"), (COUNT_OR_0, "chunk steps warmup_steps"),
    (NAME, "method backbone"), (PLACE, "data"),
    (AMOUNT, "lr weight_decay warmup_epochs min_lr clip"), (SHARE, "warmup_from gamma"),
    (BELOW_1, "sgd_momentum hold_out"), (BETAS, "betas"), (MILESTONES, "milestones"), (PART, "fraction"),
    (FLAG, "nesterov lr_by_epoch cosine_from_start force_accum"),
    (VALUES, "numbers backbone_numbers sources published"), (TEXT, "source note weights"),
    (COUNT, "processes"), (FLAG, "compile resume"),
    (Limit('a whole number of at least 0, or "auto"', lambda x: x == "auto" or _whole(x, 0)), "workers"),
    (Limit("a whole number from 0 to 4294967295", lambda x: _whole(x, 0) and x < 2**32), "seed"))

# Of the constructors of methods, then of protocols. What a text may be is for the constructor to say.
NUMBERS = _table(
    (CROP, "crop small_crop"), (SHARE, "flip grey momentum loss_lambda bn_momentum dropout"), (HUE, "hue"),
    (EACH_VIEW, "blur solarize"), (POSITIVE, "temperature epsilon patch zoom"), (INSIDE, "mask_ratio small_size"),
    (COUNT, "hidden_dim dim predictor_dim projector_layers decoder_dim decoder_heads queue bn_images images clusters"),
    (COUNT, "negatives prototypes pca iterations every unit cell vocab_size least fft_images"),
    (COUNT_OR_0, "pad mark small_views freeze_prototypes queue_from min_cluster gaussian_window decoder_depth"),
    (COUNT_OR_0, "regressor_depth mocov2.hidden_dim swav.queue swav.iterations"), (LAYER, "mask_layer"),
    (AMOUNT, "jitter rotate degrees gap lambd reweight align fft_weight fft_visible gamma_init"),
    (AMOUNT, "vector_lr predictor_lr head_lr token_lr head_decay"), (BELOW_1, "neck_drop_path"),
    (FLAG, "projector_bn predictor_bn predict stop_gradient shuffle freeze_patch uniform redraw ensure_neg norm_pix"),
    (FLAG, "local_norm hidden_only channel_fc focal"), (TEXT, "maskfeat.predict hole loss_on fill matching tokenizer"),
    (COUNT, "classes repeats long_side rpn_batch regions most"), (SIZES, "short_sides anchors"), (FOUR, "proposals"),
    (COUNT_OR_0, "test_every rand_ops precise_batches"), (POSITIVE, "resize test_scale"), (BELOW_1, "smoothing"),
    (AMOUNT, "head_std mixup cutmix rand_magnitude rand_std ema_ramp lighting"),
    (SHARE, "bce_threshold switch_prob erase layer_decay ema above"),
    (FLAG, "frozen adapt_vectors deterministic sum_classes decay_positions decay_tables freeze_positions keep_norm"),
    (FLAG, "square masks"),
    (TEXT, "start pool loss interpolation test_on pooling head"))


def check(name: str, value: Any, limit: Limit | None = None) -> None:
    """Raise InputError if a field, or what has the `limit`, has an impossible value."""
    limit = limit or FIELDS.get(name)
    if limit and not limit.allows(value):
        raise InputError(f"{name} {' '.join(repr(value).split())} is impossible: use {limit.words}.")


def is_ours(method: str) -> bool:
    """Whether a method comes with the package, and not from a file of the user's."""
    return ":" not in method or method.startswith("sslnb.")


def check_ours(method: str, numbers: Mapping[str, Any]) -> None:
    """The numbers of one of our methods. In a user's own file a name may mean something else, see `check_fit`."""
    if is_ours(method):
        for name, value in numbers.items():
            check(name, value, NUMBERS.get(f"{method}.{name}") or NUMBERS.get(name))


def check_fit(name: str, method: type, numbers: Mapping[str, Any]) -> None:
    """The numbers of any method beside its constructor, which is not there yet where a file lists its own recipes.

    A limit counts where the constructor's default keeps it: else that method means something else by the name.
    """
    known = inspect.signature(method).parameters
    for number, value in numbers.items():
        if number not in known:
            if any(p.kind is p.VAR_KEYWORD for p in known.values()):
                continue
            unknown(f"number of {name}", number, list(known)[1:])
        limit, default = NUMBERS.get(number), known[number].default
        if not limit or not limit.allows(default):
            continue
        check(number, value, NUMBERS.get(f"{name}.{number}") or limit)
        if limit is EACH_VIEW and isinstance(default, tuple) != isinstance(value, tuple | list):
            words = "two numbers, one per view" if isinstance(default, tuple) else "one number"
            check(number, value, Limit(f"{words}, such as {default!r}", lambda _: False))
