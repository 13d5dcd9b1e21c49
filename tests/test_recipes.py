import dataclasses

import pytest

from cifar_fastai.errors import UserError
from cifar_fastai.models import MODELS
from cifar_fastai.recipes import RECIPES, auto_recipe, get_recipe


def test_recipes_are_frozen_and_overridden_by_name():
    recipe = get_recipe("fast", epochs=10, bs=512)
    assert (recipe.name, recipe.epochs, recipe.bs, recipe.lr) == ("fast", 10, 512, RECIPES["fast"].lr)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.epochs = 3


def test_the_originals_recipes():
    adam, sgd = get_recipe("classic-adam"), get_recipe("classic-sgd")
    assert (adam.optimizer, adam.lr, adam.valid_pct, adam.flip, adam.rotate > 0) == ("adam", 1e-3, 0.2, "random", True)
    assert (sgd.optimizer, sgd.valid_pct) == ("sgd", 0.1)
    assert all((sgd.translate, sgd.scale, sgd.perspective, sgd.brightness, sgd.contrast, sgd.saturation))


def test_every_recipe_names_a_model_and_itself():
    for name, recipe in RECIPES.items():
        assert recipe.name == name and recipe.model in MODELS and recipe.about
    assert {auto_recipe(device)[0] for device in ("cpu", "cuda", "mps")} <= RECIPES.keys()


@pytest.mark.parametrize("valid_pct", [0.1, 0.15, 0.2])
def test_valid_pct_inside_its_range(valid_pct):
    assert get_recipe("fast", valid_pct=valid_pct).valid_pct == valid_pct


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("valid_pct", 0.5, "between 0.10 and 0.20"),
        ("valid_pct", 0.0, "between 0.10 and 0.20"),
        ("valid_pct", float("nan"), "between 0.10 and 0.20"),
        ("epochs", 0, "at least 1"),
        ("bs", -1, "at least 1"),
        ("patience", 0, "at least 1"),
        ("lr", 0.0, "positive"),
        ("lr", float("nan"), "positive"),
        ("lr", float("inf"), "positive"),
        ("wd", -0.1, "positive"),
        ("optimizer", "adma", "'adam' or 'sgd'"),
        ("size", 16, "between 32 and 128"),
        ("size", 256, "between 32 and 128"),
        ("start_size", 8, "0 or lie between 16 and the size, 32"),
        ("start_size", 48, "0 or lie between 16 and the size, 32"),
        ("grow_pct", 1.0, "grow_pct must lie between"),
        ("flip", "sometimes", "random, alternating, off"),
        ("rotate", -1.0, "rotate must lie between 0 and 180"),
        ("scale", 1.0, "scale must lie between 0 and 0.9"),
        ("cutout", 64, "cutout must lie between 0 and 32"),
        ("mixup", float("nan"), "mixup must lie between"),
    ],
)
def test_values_out_of_range(field, value, words):
    with pytest.raises(UserError, match=words):
        get_recipe("fast", **{field: value})


def test_misspellings_get_a_hint():
    with pytest.raises(UserError, match="Did you mean 'classic-adam'"):
        get_recipe("clasic-adam")
    with pytest.raises(UserError, match="Did you mean 'epochs'"):
        get_recipe("fast", epoch=3)
