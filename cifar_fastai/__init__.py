"""Train, judge and serve image classifiers with fastai. The public names are imported when they are first used."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for those who read types, which cannot follow __getattr__
    from cifar_fastai.artifacts import load_learner as load_learner
    from cifar_fastai.artifacts import load_pickled_learner as load_pickled_learner
    from cifar_fastai.data import dataloaders as dataloaders
    from cifar_fastai.images import BadImage as BadImage
    from cifar_fastai.images import decode_image as decode_image
    from cifar_fastai.inference import Classifier as Classifier
    from cifar_fastai.learner import create_learner as create_learner
    from cifar_fastai.learner import fit as fit
    from cifar_fastai.recipes import Recipe as Recipe
    from cifar_fastai.recipes import get_recipe as get_recipe
    from cifar_fastai.training import callbacks as callbacks

_PUBLIC = {
    "BadImage": "images",
    "Classifier": "inference",
    "Recipe": "recipes",
    "callbacks": "training",
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
    value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    return globals().setdefault(name, value)


def __dir__():
    return __all__
