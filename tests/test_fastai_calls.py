"""What fastai's documentation does with DataLoaders and Learners, done with ours."""

import copy
import itertools
import json
import pickle

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.data import PartialDL, WeightedDL
from fastai.callback.mixup import CutMix
from fastai.callback.tensorboard import TensorBoardCallback
from fastai.callback.tracker import ReduceLROnPlateau
from fastai.data.load import fa_collate
from fastai.learner import load_learner as open_pickle
from fastai.metrics import F1Score, RocAuc
from matplotlib import pyplot
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from cifar_fastai import Classifier, callbacks, create_learner, dataloaders, fit, get_recipe
from cifar_fastai.artifacts import Export, model_card
from cifar_fastai.augment import tta_views
from cifar_fastai.cache import load_data
from cifar_fastai.evaluation import predict
from cifar_fastai.metrics import accuracy
from cifar_fastai.sources import ImageData


@pytest.fixture(scope="module")
def data():
    return load_data("digits")


@pytest.fixture
def dls(data):
    return dataloaders(data, get_recipe("classic-adam", bs=32), subset=200)


def learner(data, tmp_path, name="classic-adam", subset=200, **fields):
    recipe = get_recipe(name, **{"bs": 40, "epochs": 1, **fields})
    learn = create_learner(dataloaders(data, recipe, seed=1, subset=subset), recipe, seed=1)
    learn.path = tmp_path
    learn.remove_cbs(learn.progress)
    return learn, recipe


@pytest.fixture
def learn(data, tmp_path):
    return learner(data, tmp_path)[0]


# --- loaders -----------------------------------------------------------------------------------------------------


def test_show_batch_of_one_image_in_several_variations(dls):
    dls.train.show_batch(max_n=4, nrows=1, unique=True)
    titles = [axis.get_title() for axis in pyplot.gcf().axes if axis.images]
    pyplot.close("all")
    assert len(titles) == 4 and len(set(titles)) == 1
    assert len(list(dls.train)) == 5  # the loader goes its usual way again


def test_a_sampler_is_read_no_further_than_batches_are_taken(dls):
    drawn = []

    def endless():
        for number in itertools.cycle(range(10)):
            drawn.append(number)
            yield number

    batches = iter(dls.valid.new(get_idxs=endless, bs=8))
    for taken in range(1, 4):
        _, labels = next(batches)
        assert len(labels) == 8 and len(drawn) == 8 * taken
    expected = [int(dls.valid_ds[number][1]) for number in drawn[16:]]
    assert labels.tolist() == expected


def test_fastais_own_kinds_of_loader_over_our_rows(dls):
    weights = np.zeros(len(dls.train_ds))
    weights[3] = 1
    _, labels = dls.train.new(cls=WeightedDL, wgts=weights).one_batch()
    assert labels.tolist() == [int(dls.train_ds[3][1])] * 32
    assert sum(len(x) for x, _ in dls.train.new(cls=PartialDL, partial_n=70, drop_last=False)) == 70
    assert len(list(dls.valid.new(bs=None))) == len(dls.valid_ds)


def test_methods_of_the_users_are_called(dls):
    sizes = []

    def create_batch(items):
        sizes.append(len(items))
        return fa_collate(items)

    assert [len(x) for x, _ in dls.valid.new(create_batch=create_batch, bs=15)] == sizes == [15, 15, 10]
    x, _ = dls.valid.new(num_workers=1, bs=15).one_batch()  # no fork of a process that uses a GPU reads from it
    assert torch.equal(x, dls.valid.new(bs=15).one_batch()[0])


# --- copies ------------------------------------------------------------------------------------------------------


def test_a_copied_learner_trains_as_the_original_would(learn):
    learn.fit(1)
    copies = [copy.deepcopy(learn), pickle.loads(pickle.dumps(learn))]
    torch.manual_seed(0)
    learn.fit(1)
    for other in copies:
        torch.manual_seed(0)
        other.fit(1)
        assert all(map(torch.equal, other.model.state_dict().values(), learn.model.state_dict().values()))


def test_pickled_loaders_bring_the_data_and_an_export_leaves_it(learn, data, tmp_path):
    again = pickle.loads(pickle.dumps(learn.dls))
    for ours, theirs in ((learn.dls.valid, again.valid), (learn.dls.test, again.test)):
        for (x, y), (other_x, other_y) in zip(ours, theirs, strict=True):
            assert torch.equal(x, other_x) and torch.equal(y, other_y)
    learn.export("learner.pkl")
    weights = sum(value.nbytes for value in learn.model.state_dict().values())
    assert (tmp_path / "learner.pkl").stat().st_size < weights + 100_000 < data.images.nbytes
    answer = open_pickle(tmp_path / "learner.pkl").predict(data.images[-1])
    assert torch.equal(answer[2], learn.predict(data.images[-1])[2])
    assert len(learn.dls.train.one_batch()[0]) == 40  # the learner itself has its data still


# --- callbacks and metrics ---------------------------------------------------------------------------------------


def test_metrics_and_callbacks_see_float32(data, tmp_path):
    seen, kinds = set(), set()

    class Watch(Callback):
        order = -99

        def after_pred(self):
            seen.add(self.pred.dtype)

        def after_loss(self):
            seen.update({self.loss.dtype, self.loss_grad.dtype})

    learn, _ = learner(data, tmp_path, "fast", precision="bfloat16")
    learn.model.head.register_forward_hook(lambda layer, inputs, output: kinds.add(output.dtype))
    learn.metrics = [RocAuc(), F1Score(average="macro"), lambda predicted, labels: float(predicted.numpy().sum())]
    learn.fit(1, cbs=Watch())
    assert kinds == {torch.bfloat16} and seen == {torch.float32}
    assert 0 <= learn.recorder.values[-1][2] <= 1


@pytest.mark.parametrize("name", ["classic-adam", "short"])
def test_hyperparameters_are_numbers_that_callbacks_log_and_set(data, tmp_path, name):
    learn, _ = learner(data, tmp_path, name)
    board = TensorBoardCallback(tmp_path / "board", trace_model=False, log_preds=False)
    learn.fit(3, 1e-3, cbs=[board, ReduceLROnPlateau(patience=1, min_delta=100, factor=10)])
    assert learn.recorder.lrs[0] == 1e-3 and learn.recorder.lrs[-1] == pytest.approx(1e-4)
    assert [group["lr"] for group in learn.opt.opt.param_groups] == [pytest.approx(1e-5)] * len(learn.opt.hypers)
    for group in learn.opt.hypers:
        assert group.keys() >= {"lr", "wd", "mom"} and {type(value) for value in group.values()} <= {int, float}
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    assert sorted({event.value for event in events.Scalars("lr_0")}) == pytest.approx(sorted({*learn.recorder.lrs}))


def test_cutmix_of_fastais_leaves_the_images_alone(data, tmp_path):
    before = data.images.copy(), data.labels.copy()
    learn, _ = learner(data, tmp_path, flip="off", rotate=0.0)  # batches without augmentation
    learn.fit(1, cbs=CutMix())
    assert np.array_equal(data.images, before[0]) and np.array_equal(data.labels, before[1])


def test_callbacks_keep_the_best_epoch_and_stop_early(data, tmp_path):
    class Spoil(Callback):
        order = 99

        def after_epoch(self):
            for parameter in self.model.parameters():
                parameter.data.add_(1)

    learn, recipe = learner(data, tmp_path, epochs=8, patience=2, lr=1e-4)
    fit(learn, recipe, cbs=[*callbacks(recipe), Spoil()])
    losses = [row[1] for row in learn.recorder.values]
    assert len(losses) < 8 and learn.validate()[0] == pytest.approx(min(losses), rel=1e-3)
    best = copy.deepcopy(learn.model.state_dict())
    fit(learn, get_recipe("classic-adam", epochs=1))
    learn.load("best")
    assert all(map(torch.equal, best.values(), learn.model.state_dict().values()))


# --- images without variety --------------------------------------------------------------------------------------


def dull(kind, data) -> ImageData:
    if kind == "grey digits":
        return data
    labels = np.arange(160) % 10
    images = np.zeros((160, 32, 32, 3), np.uint8)
    if kind == "flat":
        images += (labels * 20).astype(np.uint8)[:, None, None, None]
    if kind == "one channel":
        images[..., 0] = np.random.default_rng(0).integers(0, 255, (160, 32, 32))
    return ImageData(kind, images, labels, data.classes, 140, "lossless")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grey digits", "flat", "one channel", "black"])
@pytest.mark.parametrize("name", ["short", "cpu", "fast"])
def test_fine_tuning_on_dull_images_is_finite_and_alike_in_both_precisions(data, tmp_path, kind, name):
    norms = {"float32": [], "bfloat16": []}
    for precision, seen in norms.items():

        class Watch(Callback):
            def before_step(self, seen=seen):
                gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
                seen.append(torch.nn.utils.get_total_norm(gradients).item())

        subset = 120 if kind == "grey digits" else None
        learn, _ = learner(dull(kind, data), tmp_path, name, subset, model="slim", start_size=0, precision=precision)
        learn.fine_tune(1, cbs=Watch())
        assert np.isfinite(learn.recorder.values[-1]).all()
        assert all(value.isfinite().all() for value in learn.model.state_dict().values())
    assert max(norms["float32"] + norms["bfloat16"]) < 20
    assert norms["bfloat16"][0] == pytest.approx(norms["float32"][0], rel=0.05)


# --- test-time augmentation --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "views"),
    [
        ({}, ["mirror", "shift"]),
        ({"flip": "off"}, ["shift"]),
        ({"crop_pad": 0, "flip": "alternating"}, ["mirror"]),
        ({"crop_pad": 0, "translate": 0.1, "flip": "off"}, ["shift"]),
        ({"crop_pad": 0, "rotate": 10.0, "flip": "off"}, []),
    ],
    ids=str,
)
def test_views_are_those_that_the_recipe_allows(fields, views):
    assert tta_views(get_recipe("fast", **fields)) == views


@pytest.mark.slow
def test_digits_are_not_mirrored_by_a_recipe_that_does_not(data, tmp_path):
    learn, recipe = learner(data, tmp_path, subset=None, epochs=4, bs=64, lr=3e-3, flip="off", rotate=0.0, crop_pad=2)
    fit(learn, recipe)
    judged = predict(learn, learn.dls.test, tta_views(recipe))
    assert accuracy(judged.tta, judged.labels) >= judged.accuracy - 0.006  # two images
    mirrored = predict(learn, learn.dls.test)
    assert accuracy(mirrored.tta, mirrored.labels) < judged.accuracy - 0.01
    plain = predict(learn, learn.dls.test, [])
    assert torch.equal(plain.tta, judged.logits)


def test_an_export_says_its_views_and_the_classifier_takes_them(digits_run, trained, data):
    config = json.loads((digits_run.export / "config.json").read_text())
    assert config["tta_views"] == ["mirror", "shift"]  # classic-sgd's
    picture = data.images[-1]
    answers = {}
    for views in ([], ["mirror"], ["shift"], ["mirror", "shift"]):
        export = Export(digits_run.export, trained.model, {**config, "tta_views": views})
        answers[tuple(views)] = Classifier(export).predict(picture, tta=True)
        words = {1: "one run", 2: "averaged over 2 views", 3: "averaged over 3 views", 6: "averaged over 6 views"}
        n = (1 + ("mirror" in views)) * (1 + 2 * ("shift" in views))
        assert words[n] in model_card(export.config) and ("augmentation" in model_card(export.config)) == (n > 1)
    assert answers[()] == pytest.approx(Classifier(digits_run.export).predict(picture))
    assert len({json.dumps(answer) for answer in answers.values()}) == 4


def test_learn_tta_is_fastais(learn):
    probabilities, labels = learn.tta(n=2)
    assert probabilities.shape == (40, 10) and len(labels) == 40 and isinstance(probabilities, Tensor)
