"""What can be evaluated: a run, its path or export, a file of weights, a name of the zoo or timm; and its rivals."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import InputError
from ..files import expanded
from ..run import Run
from .features import Features, calibrated, extract, raw_pixels, the_device

WEIGHTS = (".pth", ".pt", ".safetensors", ".pkl", ".tar", ".bin")  # no name of a network ends so
LARGEST_SIZE = 224  # where nothing says the size: that of the images, but not more than this


@dataclass
class Source:
    """A trained or named backbone and where it came from; `size`, `data` and `folder` are None if unknown."""

    name: str
    backbone: Callable[[int], nn.Module]  # size -> the backbone to evaluate
    fresh: Callable[[int], nn.Module]  # size -> the same architecture with fresh weights
    size: int | None = None
    data: str | None = None
    folder: Path | None = None
    pool: str = "model"
    architecture: str = ""  # for backbones.build, with these arguments
    numbers: Mapping[str, object] = field(default_factory=dict)
    fresh_weights: bool = False  # nothing was learned yet
    origin: str = ""  # what `open_source` was given, for another process to open it again, and
    given: str | None = None  # the `backbone` beside it
    progress: Mapping[str, int] = field(default_factory=dict)  # of a run that is not done: its rows say how far it was

    def untrained(self) -> "Source":
        """The same network with fresh weights: the baseline of everything that is claimed for the source."""
        return replace(self, name="random initialisation", backbone=self.fresh, fresh_weights=True, progress={})

    @property
    def judged(self) -> dict[str, str]:
        """For rows: the directory of the run whose weights, or whose rival's, are evaluated."""
        return {"judged": str(self.folder.resolve())} if self.folder else {}

    def rival(self, images, size: int, seed: int, device: str | torch.device = "auto") -> nn.Module:
        """The same network with fresh weights as a frozen one has to be for a fair comparison: every branch switched
        on, BatchNorm statistics of these images."""
        return calibrated(switched_on(self.fresh(size)).to(the_device(device)), images, size=size, seed=seed)


@dataclass
class Subject:
    """One row of the table: a backbone with the input it expects, or raw pixels (`backbone=None`)."""

    name: str
    backbone: nn.Module | None
    size: int
    pool: str = "model"
    device: str | torch.device = "cpu"
    workers: int = 0
    parallel: Callable[[nn.Module, object], Features] | None = None  # instead of `extract`: by several processes
    _cache: dict = field(default_factory=dict, repr=False)

    def features(self, images) -> Features:
        """Features of `images`, computed once per set of images, so that several protocols share them."""
        if images not in self._cache:
            title = f"Features of {images.name}, {self.name}"
            if self.backbone is None:
                self._cache[images] = raw_pixels(images, self.size, workers=self.workers, title=title)
            elif self.parallel:
                self._cache[images] = self.parallel(self.backbone, images)
            else:
                self._cache[images] = extract(self.backbone, images, size=self.size, pool=self.pool,
                                              device=self.device, workers=self.workers, title=title, source=self.name)
        return self._cache[images]


def open_source(source, seed: int, backbone: str | None = None, **numbers: object) -> Source:
    """A Run, the path of a run directory or exported folder, a file of weights, a name of the zoo's, a timm name
    (weights drawn from `seed`), or a Source, which is open already.

    `backbone` is the timm name of a file's network, if the file does not tell; `numbers` are for its construction, such
    as sobel=True. Errors: InputError for anything else.
    """
    from .. import backbones, zoo

    if isinstance(source, Source):
        return source
    if isinstance(source, Run):
        return _from_run(source, seed)
    if not isinstance(source, str | Path):
        raise InputError(f"A {type(source).__name__} is nothing that can be evaluated: give a run, a path, a file of "
                         "weights or a name; of a model in memory save the state_dict() to a file, and give that and "
                         "its timm name as `backbone`.")
    if str(source).startswith("~"):
        source = expanded(source)
    if Path(source).name == "backbone.safetensors" and backbone is None:
        source = zoo.home_of(source) or source  # a run's weights are the run
    weights, exported = (Path(source, name) for name in zoo.OURS)
    if exported.is_file() and not weights.is_file():
        source = exported
    if Path(source).is_file() or str(source) in zoo.MODELS:
        return _from_file(source, seed, backbone, numbers)
    if Path(source).is_dir():
        return _from_run(Run.open(source), seed)
    if isinstance(source, Path) or "/" in source and ":" not in source or source.endswith(WEIGHTS):
        raise InputError(f"There is no run directory or file {str(source)!r}: give one that exists, or a timm name.")
    if ":" not in source:
        backbones.check_name(source)  # before anything is loaded for it
    build = _seeded(seed, lambda size: backbones.build(source, size))
    return Source(f"{source} (untrained)", build, build, architecture=source, fresh_weights=True, origin=source)


def _from_run(run: Run, seed: int) -> Source:
    from ..zoo.networks import resized

    recipe, name, progress, early = run.recipe, Path(run.path).name, run.progress(), None
    while progress and early is None:  # it may go on training: step and weights must be those of one moment
        early, before = run.backbone(), progress
        if (progress := run.progress()) != before:
            early = None
    if progress:
        print(f"{name} is not done: its weights are those of step {progress['step']} of {progress['total']}, and its "
              "rows say so.")

    def at(size: int, backbone: nn.Module) -> nn.Module:
        return backbone if size == recipe.size else resized(backbone, recipe.backbone, recipe.backbone_numbers, size)[0]

    # Fresh weights come from the method: MAE, for one, initialises its ViT in its own way.
    return Source(name, lambda size: at(size, copy.deepcopy(early) or run.backbone()),
                  _seeded(seed, lambda size: at(size, recipe.build().backbone)), recipe.size, recipe.data,
                  Path(run.path), recipe.pool, recipe.backbone, recipe.backbone_numbers, origin=str(run.path),
                  progress=progress)


def _from_file(file: str | Path, seed: int, backbone: str | None, numbers: Mapping[str, object]) -> Source:
    from .. import zoo

    name, numbers, native = zoo.network(file, backbone, **numbers)

    def trained(size: int) -> nn.Module:
        model, match = zoo.load(file, backbone, size, **numbers)
        print(f"{Path(file).name}: {match}")
        return model

    fresh = _seeded(seed, lambda size: zoo.fresh(name, numbers, native, size))
    row, home = zoo.find(file), zoo.home_of(file)
    about = row or (Run.open(home).recipe if home else None)
    return Source(f"{home.name}/{Path(file).name}" if home else Path(file).name, trained, fresh, native,
                  pool=about.pool if about else "model", architecture=name, numbers=numbers, origin=str(file),
                  given=backbone)


def subjects(source: Source, train, *, size: int | None, baselines: bool, seed: int,
             device: str | torch.device, workers: int, processes: int = 1, folder: Path | None = None
             ) -> Iterator[Subject]:
    """The source, then its random initialisation (statistics calibrated on `train`), then raw pixels. Several
    `processes` leave their pieces of features in `folder`."""
    size = size or source.size or min(LARGEST_SIZE, *train.first(1)[0].size)
    inputs = dict(size=size, pool=source.pool, device=device, workers=workers)

    def by(who: Source) -> Callable | None:
        from .pieces import features_by_pieces

        return partial(features_by_pieces, who, size=size, seed=seed, folder=folder or Path("runs"),
                       processes=processes, device="cpu" if str(device) == "cpu" else "auto") if processes > 1 else None

    yield Subject(source.name, source.backbone(size), **inputs, parallel=by(source))
    if baselines:
        rival = source.rival(train, size, seed, device)
        yield Subject("random initialisation", rival, **inputs, parallel=by(source.untrained()))
        yield Subject("raw pixels", None, **inputs)


def switched_on(backbone: nn.Module) -> nn.Module:
    """Every residual branch of a fresh backbone switched on; `calibrated` makes a fair baseline of it.

    timm starts the last BatchNorm of a ResNet block at weight 0, which helps training but leaves an untrained ResNet
    with little more than its shortcuts, and any trained network would look good beside that. (The two blocks of
    resnet_mini do not mind: kNN on digits_scattered is 28 to 31 % with zeros and 27 to 34 % without, three seeds.)
    """
    for module in backbone.modules():
        if isinstance(module, _BatchNorm) and module.affine and not module.weight.any():
            nn.init.ones_(module.weight)
    return backbone


def _seeded(seed: int, build: Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    """Draw the weights from `seed` without disturbing the caller's random state."""
    def seeded(size: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(size)
    return seeded
