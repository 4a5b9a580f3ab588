"""sslnb: self-supervised learning of images, one notebook per method.

    from sslnb import pretrain
    from sslnb.evaluate import evaluate, table

    run = pretrain("byol")            # embedded data, about a minute on two cores
    print(table(evaluate(run)))

Names are imported when they are first used, so `import sslnb` is quick and touches no GPU.
"""

from importlib import import_module

_HOMES = {"pretrain": "train", "prepare": "checks", "Run": "run", "Recipe": "recipes", "resolve": "choice",
          "load": "data", "InputError": "errors", "preflight": "estimate"}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'sslnb' has no attribute {name!r}")
    module = import_module(f".{_HOMES[name]}", __name__)
    return getattr(module, name)
