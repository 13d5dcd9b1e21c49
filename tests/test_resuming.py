"""An interrupted training, resumed, is the uninterrupted one: every bit of it."""

import io

import pytest
from fastai.callback.core import Callback
from helpers.trainings import assert_equal, assert_same_training, random_data, train_in_legs

from cifar_fastai import create_learner, dataloaders, get_recipe, resuming
from cifar_fastai.checkpoints import LAST, load
from cifar_fastai.errors import TrainingDiverged
from cifar_fastai.training import train

SHORT = {"bs": 24, "epochs": 3}
EVERYTHING = {"mixup": 0.2, "cutmix": 1.0, "trivial_augment": True, "flip": "random", "whiten_bias_epochs": 1}
EVERYTHING |= {"optimizer": "muon", "precision": "bfloat16"}
RECIPES = {
    "classic-adam": get_recipe("classic-adam", **SHORT),
    "classic-sgd": get_recipe("classic-sgd", **SHORT),
    "fast": get_recipe("fast", **SHORT, lr=0.05, lookahead_steps=2, whiten_bias_epochs=1),
    "cpu": get_recipe("cpu", **SHORT, lr=0.05, lookahead_steps=2),
    "everything": get_recipe("cpu", **SHORT, lr=0.05, lookahead_steps=2, **EVERYTHING),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_resumed_training_is_the_same_training(tmp_path, monkeypatch, name):
    recipe = RECIPES[name]
    whole = train_in_legs(tmp_path / "whole", recipe, [])
    monkeypatch.setattr(resuming, "SAVE_SECONDS", 0)  # after every batch
    assert_same_training(whole, train_in_legs(tmp_path / "cut", recipe, [(0, 1), (1, 0), (1, 2), (2, 4)]))


def test_early_stopping_goes_on_counting(tmp_path):
    recipe = get_recipe("classic-adam", bs=64, epochs=16, patience=3, lr=0.01, flip="off", rotate=0.0)
    whole = train_in_legs(tmp_path / "whole", recipe, [], random_data(), None)
    stopped_after = len(whole[1].history)
    assert stopped_after < 16
    cut = train_in_legs(tmp_path / "cut", recipe, [(stopped_after - 2, 0), (stopped_after - 1, 0)], random_data(), None)
    assert_same_training(whole, cut)
    learn = create_learner(dataloaders(random_data(), recipe), recipe, seed=1)
    training = train(learn, recipe, tmp_path / "cut", io.StringIO(), resume=True)  # over already: only loaded
    assert training.history == cut[1].history and training.seconds > 0
    assert_equal(learn.model.state_dict(), whole[0].model.state_dict())


def test_mixing_recipes_can_be_resumed_after_their_end(tmp_path):
    recipe = get_recipe("classic-adam", bs=64, epochs=12, patience=1, lr=0.01, mixup=0.2)
    learn, training, _ = train_in_legs(tmp_path / "run", recipe, [], random_data(), None)
    again = create_learner(dataloaders(random_data(), recipe), recipe, seed=1)
    assert train(again, recipe, tmp_path / "run", io.StringIO(), resume=True).history == training.history
    assert_equal(learn.model.state_dict(), again.model.state_dict())


def test_weights_that_broke_in_the_last_step_are_not_saved(tmp_path, monkeypatch):
    class Break(Callback):
        def after_step(self):
            if self.epoch == 1 and self.iter == 1:
                next(self.model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(resuming, "SAVE_SECONDS", 0)
    recipe = get_recipe("classic-adam", bs=64, epochs=2)
    learn = create_learner(dataloaders(random_data(), recipe), recipe, seed=1)
    learn.add_cb(Break())
    with pytest.raises(TrainingDiverged, match="epoch 2, at step 3"):
        train(learn, recipe, tmp_path, io.StringIO())
    state = load(tmp_path / "checkpoints" / LAST)
    assert (state["epoch"], state["batch"]) == (1, 1)
    assert all(value.isfinite().all() for value in state["model"].values())
