"""The search for a learning rate, and the command that it suggests."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from helpers.commands import assert_clear_error, call, call_here

from cifar_fastai import create_learner, dataloaders, get_recipe
from cifar_fastai.cli import _parser, _without
from cifar_fastai.lrfinder import END_LR, START_LR, STEPS, search_lr, without_epochs


class Rates(Callback):
    """The learning rate of every parameter group and the pixels of the images, step by step."""

    order = 70  # after LRFinder has set them

    def before_fit(self):
        self.rates, self.sides, self.frozen = [], [], 0

    def before_batch(self):
        self.rates.append([hypers["lr"] for hypers in self.opt.hypers])
        self.sides.append(self.x.shape[-1])
        self.frozen += not self.model.stem.bias.requires_grad


def test_a_search_keeps_the_groups_proportion_and_the_weights(tmp_path):
    """With a recipe that does everything that could come between: its own rates, epochs that count, growing images."""
    recipe = get_recipe("cpu", bs=8, whiten_bias_epochs=1, lookahead_steps=3)
    quiet = without_epochs(recipe)
    learn = create_learner(dataloaders("digits", quiet, subset=100), quiet, seed=1)
    learn.path = tmp_path
    learn.add_cb(rates := Rates())
    before = {name: value.clone() for name, value in learn.model.state_dict().items()}
    search = search_lr(learn, quiet)
    biases, filters, rest = np.array(rates.rates).T
    assert biases == pytest.approx(64 * rest) and filters == pytest.approx(0.2 * rest) and len(rest) <= STEPS + 1
    assert rest == pytest.approx(START_LR * (END_LR / START_LR) ** (np.arange(len(rest)) / STEPS))
    assert set(rates.sides) == {32} and rates.frozen == 0
    assert search.lrs == pytest.approx(rest[10 : 10 + len(search.lrs)])
    assert all(torch.equal(value, before[name]) for name, value in learn.model.state_dict().items())
    slopes = np.diff(search.losses) / np.diff(np.log(search.lrs))
    assert search.suggestions["minimum"] == pytest.approx(search.lrs[np.argmin(search.losses)] / 10)
    assert search.suggestions["steep"] == pytest.approx(search.lrs[np.argmin(slopes)])
    assert all(search.lrs[0] / 10 <= lr <= search.lrs[-1] for lr in search.suggestions.values())


def test_the_command_on_one_batch_an_epoch(tmp_path, pictures):
    arguments = ("--data", "pictures", "--recipe", "classic-adam", "--subset", "30", "--lr", "5", "--out", "tries")
    done = call("-m", "cifar_fastai", "find-lr", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "tries").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-find-lr-classic-adam-pictures", folder.name)
    assert sorted(path.name for path in folder.iterdir()) == ["lr_find.json", "lr_find.png"]
    found = json.loads((folder / "lr_find.json").read_text())
    assert len(found["lrs"]) == len(found["losses"]) and found["recipe"]["name"] == "classic-adam"
    printed = dict(line.split()[:2] for line in done.stdout.splitlines())
    assert {name: float(printed[name]) for name in found["suggestions"]} == pytest.approx(found["suggestions"], rel=0.06)

    (command,) = (line.removeprefix("try ").strip() for line in done.stdout.splitlines() if line.startswith("try "))
    assert command.startswith("python -m cifar_fastai train ") and command.count("--lr") == 1
    options = _parser(None).parse_args(shlex.split(command)[3:])
    assert options.lr in [pytest.approx(lr, rel=0.06) for lr in found["suggestions"].values()]
    assert (options.data, options.subset, str(options.out)) == ("pictures", 30, "tries")


def test_an_option_is_left_out_in_either_spelling():
    words = ["--lr", "3", "--data", "digits", "--lr=4", "--lrx", "5"]
    assert list(_without("--lr", words)) == ["--data", "digits", "--lrx", "5"]


def test_a_loss_that_explodes_at_once_is_a_clear_error(tmp_path, pictures):
    arguments = ("--data", "pictures", "--recipe", "classic-sgd", "--subset", "30", "--bs", "8", "--wd", "1e30")
    done = call_here("find-lr", *arguments, cwd=tmp_path)
    assert_clear_error(done, 4, "The loss exploded after", "--bs", "--wd")


def test_what_is_no_option_of_a_search_is_refused(tmp_path):
    done = call_here("find-lr", "--data", "digits", "--seeds", "3", cwd=tmp_path)
    assert_clear_error(done, 2, "unrecognized arguments: --seeds")
