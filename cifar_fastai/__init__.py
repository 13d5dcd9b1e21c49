"""Train, judge and serve image classifiers with fastai. The public names are imported when they are first used."""

import importlib

_PUBLIC = {
    "BadImage": "images",
    "Classifier": "inference",
    "Recipe": "recipes",
    "create_learner": "learner",
    "dataloaders": "data",
    "decode_image": "images",
    "fit": "learner",
    "get_recipe": "recipes",
    "load_learner": "artifacts",
    "load_pickled_learner": "artifacts",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__():
    return __all__
