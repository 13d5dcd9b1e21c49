"""The learning-rate finder: a short training whose learning rate grows, and what its losses suggest for --lr."""

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fastai.callback.schedule import minimum, slide, steep, valley
from fastai.learner import Learner

from cifar_fastai import figures
from cifar_fastai.distributed import check_alone
from cifar_fastai.errors import TrainingDiverged
from cifar_fastai.pretrained import check_model
from cifar_fastai.recipes import Recipe
from cifar_fastai.run import RunOptions, announce, configuration, prepare, run_name
from cifar_fastai.runfolder import make_run_folder, write_json
from cifar_fastai.terminal import say
from cifar_fastai.training import clear_errors

START_LR, END_LR, STEPS = 1e-7, 10.0, 100
FIRST, LAST = STEPS // 10, 5  # steps at either end that fastai leaves out, since they say little or nothing
LEAST = 20  # steps between them, to suggest anything from; `slide` needs 17
METHODS = {
    "valley": (valley, "in the middle of the longest fall of the loss; the most careful"),
    "steep": (steep, "where the loss falls most steeply"),
    "minimum": (minimum, "a tenth of where the loss is lowest"),
    "slide": (slide, "where the loss is about to rise"),
}
# The one to try as the highest rate of one cycle: on digits it came nearest to the recipes' own rates; valley, fastai's
# default, was far too low with SGD.
CHOICE = "slide"


@dataclass(frozen=True)
class LrSearch:
    """The steps that suggestions are made from, and the suggestions."""

    lrs: list[float]
    losses: list[float]  # smoothed, as fastai's Recorder does it
    suggestions: dict[str, float]  # by METHODS, in terms of a recipe's lr


def without_epochs(recipe: Recipe) -> Recipe:
    """The recipe without what changes a training by its epochs: what happens in them while searching means nothing."""
    return dataclasses.replace(recipe, lookahead_steps=0, whiten_bias_epochs=0, start_size=0, frozen_epochs=0)


def search_lr(learn: Learner, recipe: Recipe) -> LrSearch:
    """Search with fastai's `lr_find`, which gives the learner its weights back. Raises TrainingDiverged.

    Weights that learn at their own rate keep its proportion to the recipe's lr, so the suggestions are for that one.
    """
    factors = np.atleast_1d(learn.lr) / recipe.lr  # one, or one a parameter group
    with learn.no_bar():
        learn.lr_find(START_LR * factors, END_LR * factors, num_it=STEPS, show_plot=False, suggest_funcs=None)
    lrs, losses = (torch.tensor(values[FIRST:-LAST]) for values in (learn.recorder.lrs, learn.recorder.losses))
    finite = int(losses.isfinite().long().cumprod(0).sum())  # steps before the first loss that is none
    if finite < LEAST:
        raise TrainingDiverged(
            f"The loss exploded after {len(learn.recorder.losses)} of {STEPS} steps, at a learning rate of "
            f"{learn.recorder.lrs[-1]:.1e}: too early to suggest anything. Try a larger --bs or a lower --wd."
        )
    lrs, losses = lrs[:finite], losses[:finite]
    suggestions = {name: float(method(lrs, losses, STEPS)[0]) for name, (method, _) in METHODS.items()}
    return LrSearch(lrs.tolist(), losses.tolist(), suggestions)


def find_lr(recipe: Recipe, options: RunOptions) -> tuple[Path, LrSearch]:
    """Search on the training split; leaves lr_find.png and lr_find.json in a new folder and returns it too.

    Raises UserError and its kinds.
    """
    check_alone("find-lr")
    check_model(recipe)  # as it is; the search leaves some of it out
    started = time.time()
    learn = prepare(without_epochs(recipe), options)
    folder = make_run_folder(options.out, f"find-lr-{run_name(recipe, options, learn.dls.data.source)}", started)
    config = configuration(folder.name, recipe, options, learn)
    learn.path, learn.model_dir = folder, "."  # where lr_find keeps the weights meanwhile
    announce(learn, recipe, config["initial_weights"], options.device, folder)
    say("search", f"{STEPS} steps of {learn.dls.train.bs} images, learning rates from {START_LR:g} to {END_LR:g}")
    with clear_errors(learn):
        search = search_lr(learn, recipe)
    write_json(folder / "lr_find.json", config | dataclasses.asdict(search))
    figures.draw(folder / "lr_find.png", figures.lr_search, search.lrs, search.losses, search.suggestions)
    for name, (_, words) in METHODS.items():
        say(name, f"{search.suggestions[name]:<8.2g} {words}")
    say("plot", folder / "lr_find.png")
    return folder, search
