"""What "auto" stands for: the data that can be reached, and the recipe that suits the data, the device and the time."""

import os
from dataclasses import replace

from cifar_fastai.recipes import MANY_IMAGES, Recipe, auto_recipe, get_recipe
from cifar_fastai.terminal import in_words, say

LONGEST = 75 * 60  # seconds for a training on a CPU, if a quicker recipe is at hand
DIGITS = frozenset("0123456789")


def find_data(source: str, size: int) -> tuple[str, str]:
    """The source to train on; and what to tell at the end too, where digits take the place of CIFAR-10. Raises DataError."""
    if source in ("auto", "cifar10"):
        _say("data", "looking for CIFAR-10 ...")
    from cifar_fastai.cache import settle

    source, instead = settle(source, size)
    if instead:
        _say("data", instead)
    return source, instead and "these are scikit-learn's digits, not CIFAR-10, which was out of reach"


def tell_again(instead: str) -> None:
    """The last line of a command, if `find_data` gave one."""
    if instead:
        _say("data", instead)


def data_for(source: str, classes: tuple[str, ...]) -> str:
    """The source to judge an export of these classes by: never digits for one that knows others."""
    if source != "auto":
        return source
    return "digits" if set(classes) == DIGITS else "cifar10"


def place(source: str | None) -> str | None:
    """Where a run's data lies, as `--data` names it; None where it lay then, which is what "auto" means for a run."""
    return None if source == "auto" else source


def choose_recipe(overrides: dict, source: str, device: str, subset: int | None, seed: int) -> Recipe:
    """The recipe that suits, with its fields overridden; tells which and why. Raises UserError."""
    n_images = None
    if device != "cpu":
        n_images = subset or _load(source, overrides.get("size", 32)).n_train
    name, reason = auto_recipe(device, overrides.get("model"), n_images, source)
    recipe = get_recipe(name, **overrides)
    own_network = overrides.keys() & {"model", "pretrained", "weights", "input_size"}
    if name == device == "cpu" and not own_network and (words := _too_slow(recipe, source, subset, seed)):
        recipe, reason = get_recipe("slim", **overrides), words
    _say("auto", f"recipe {recipe.name} on {device}: {reason}")
    return recipe


def _too_slow(recipe: Recipe, source: str, subset: int | None, seed: int) -> str:
    """The reason, where up to 30 epochs would take longer than LONGEST, judged by the first steps."""
    if "RANK" in os.environ or (subset or MANY_IMAGES) < MANY_IMAGES:  # processes might not measure the same
        return ""
    from cifar_fastai.data import dataloaders
    from cifar_fastai.learner import create_learner
    from cifar_fastai.training import seconds_to_train

    data = _load(source, recipe.size)
    if data.n_train < MANY_IMAGES:
        return ""
    recipe = replace(recipe, epochs=min(recipe.epochs, 30))
    seconds = seconds_to_train(create_learner(dataloaders(data, recipe, subset=subset), recipe, seed=seed), recipe)
    if seconds <= LONGEST:
        return ""
    return f"`{recipe.name}` is more accurate, but would take about {in_words(seconds)} for {recipe.epochs} epochs here"


def _load(source: str, size: int):
    from cifar_fastai.cache import load_data

    return load_data(source, size)


def _say(what: str, words: str) -> None:
    """Of several processes the first alone says it."""
    if os.environ.get("RANK", "0") == "0":
        say(what, words)
