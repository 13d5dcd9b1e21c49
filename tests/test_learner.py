"""The learner behaves as any fastai Learner does, and learns."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from PIL import Image
from torch import nn

from cifar_fastai import create_learner, dataloaders, fit, get_recipe
from cifar_fastai.augment import mix
from cifar_fastai.cache import load_data
from cifar_fastai.errors import UserError
from cifar_fastai.learner import Lookahead, MixImages, ProgressiveResizing, is_grouped, precision
from cifar_fastai.models import MODELS, create_model
from cifar_fastai.pretrained import create_architecture


@pytest.fixture(scope="module")
def data():
    return load_data("digits")


@pytest.fixture
def learn(data, tmp_path):
    recipe = get_recipe("classic-adam", bs=64, epochs=1)
    learn = create_learner(dataloaders(data, recipe, subset=300), recipe, seed=1)
    learn.path = tmp_path
    return learn


@pytest.mark.slow
def test_fast_learns_digits(data):
    recipe = get_recipe("fast", epochs=4, bs=256)
    learn = create_learner(dataloaders(data, recipe), recipe, seed=1)
    untrained, _ = learn.validate()
    fit(learn, recipe)
    losses = [row[1] for row in learn.recorder.values]
    assert losses[-1] < losses[0] and losses[-1] < untrained
    assert learn.validate(dl=learn.dls.test)[1] > 0.9


def test_bfloat16_is_for_fitting_alone(data):
    class Watch(Callback):
        def after_loss(self):
            assert self.loss.dtype == torch.float32

        def before_step(self):
            assert torch.is_autocast_enabled("cpu")

        def after_batch(self):
            assert not torch.is_autocast_enabled("cpu")

    recipe = get_recipe("fast", epochs=4, bs=256, precision="bfloat16")
    learn = create_learner(dataloaders(data, recipe), recipe, seed=1)
    kinds = {True: set(), False: set()}  # of what the network computes, in training and validation
    learn.model.head.register_forward_hook(lambda layer, inputs, output: kinds[layer.training].add(output.dtype))
    fit(learn, recipe, Watch())
    assert kinds == {True: {torch.bfloat16}, False: {torch.bfloat16}}
    assert {value.dtype for value in learn.model.state_dict().values()} == {torch.float32, torch.int64}
    kinds[False].clear()
    assert learn.validate(dl=learn.dls.test)[1] > 0.9
    assert kinds[False] == {torch.float32}


def test_an_interrupted_fit_leaves_no_bfloat16_behind(data):
    recipe = get_recipe("fast", bs=64, epochs=1, precision="bfloat16")
    learn = create_learner(dataloaders(data, recipe, subset=300), recipe, seed=1)

    def interrupt(*_):
        raise KeyboardInterrupt  # as the button of a notebook does

    hook = learn.model.head.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(learn, recipe)
    hook.remove()
    assert not torch.is_autocast_enabled("cpu")
    assert learn.get_preds()[0].dtype == torch.float32


def test_what_whitening_magnifies_is_not_rounded_first(data):
    """Grey images, in which most of what the stem tells apart is exactly nothing, in float32."""
    recipe = get_recipe("fast", bs=64, epochs=1)
    learn = create_learner(dataloaders(data, recipe, subset=300), recipe, seed=1)
    x, _ = learn.dls.one_batch()
    exact = learn.model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (learn.model(x) - exact).norm() < 0.03 * exact.norm()


def test_precision_is_the_recipes_or_what_the_device_has(monkeypatch):
    recipe, gpu, cpu = get_recipe("fast"), torch.device("cuda"), torch.device("cpu")
    for has_it, kind in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has_it=has_it: has_it)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has_it=has_it: {"amx_bf16": has_it}, raising=False)
        assert precision(recipe, gpu) == precision(recipe, cpu) == kind
        assert precision(recipe, torch.device("mps")) == "float32"
        for device in (gpu, cpu):
            assert precision(get_recipe("fast", precision="float32"), device) == "float32"
            assert precision(get_recipe("fast", precision="bfloat16"), device) == "bfloat16"
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # as in torch 2.10
    assert precision(recipe, cpu) == "float32"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("efficientnet_lite0", "float32"),
        ("efficientnet_b0", "float32"),
        ("mobilenet_v2", "float32"),
        ("resnet18", "bfloat16"),
    ],
)
def test_networks_of_grouped_convolutions_stay_in_float32_on_a_cpu(monkeypatch, name, kind):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    model, recipe = create_architecture(name, 10, 64), get_recipe("transfer", model=name)
    assert precision(recipe, torch.device("cpu"), model) == kind
    assert precision(recipe, torch.device("cuda"), model) == "bfloat16"
    assert precision(replace(recipe, precision="bfloat16"), torch.device("cpu"), model) == "bfloat16"


@pytest.mark.parametrize("name", MODELS)
def test_our_networks_are_made_for_bfloat16(name):
    assert not is_grouped(create_model(name, 10))


def test_a_seed_repeats_the_training(data):
    recipe = get_recipe("fast", epochs=2, bs=64)
    weights = []
    for seed in (5, 5, 6):
        learn = create_learner(dataloaders(data, recipe, seed, subset=200), recipe, seed=seed)
        fit(learn, recipe)
        weights.append([value.clone() for value in learn.model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[0], weights[2], strict=True))


def test_the_schedule_is_one_cycle(learn):
    fit(learn, get_recipe("classic-adam", epochs=3))
    lrs = learn.recorder.lrs
    assert max(lrs) == pytest.approx(1e-3, rel=0.1) and lrs[0] == pytest.approx(1e-3 / 25) and lrs[-1] < 1e-4
    assert max(learn.recorder.hps["mom"]) == pytest.approx(0.95) and min(learn.recorder.hps["mom"]) < 0.87


def test_bias_rates_and_weight_decay_of_fast(data):
    recipe = get_recipe("fast", bs=64)
    learn = create_learner(dataloaders(data, recipe, subset=200), recipe)
    learn.create_opt()
    biases, rest = learn.opt.opt.param_groups
    assert (biases["lr"], rest["lr"]) == (pytest.approx(96), 1.5)
    assert biases["lr"] * biases["weight_decay"] == pytest.approx(rest["lr"] * rest["weight_decay"])
    assert len(biases["params"]) == 6 and all(bias.ndim == 1 for bias in biases["params"])
    grouped = {id(parameter) for group in (biases, rest) for parameter in group["params"]}
    assert grouped == {id(parameter) for parameter in learn.model.parameters() if parameter.requires_grad}


def test_the_whitening_bias_stops_after_its_epochs(data):
    recipe = get_recipe("fast", bs=64, epochs=3, whiten_bias_epochs=1, lookahead_steps=0)
    learn = create_learner(dataloaders(data, recipe, subset=200), recipe, seed=1)
    seen = []

    class Watch(Callback):
        def after_train(self):
            seen.append((self.model.stem.bias.clone(), self.model.stem.weight.clone()))

    fit(learn, recipe, Watch())
    assert seen[0][0].abs().sum() > 0
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[1][0], seen[2][0])
    assert torch.equal(seen[0][1], seen[2][1])


def test_lookahead_against_its_definition():
    """Follow one weight by hand through a hundred steps."""

    class Fake:
        n_epoch, training, epoch = 1, True, 0
        model = nn.Linear(1, 1, bias=False)
        dls = type("Dls", (), {"train": range(100)})

    lookahead = Lookahead(steps=2)
    lookahead.learn = Fake
    weight = Fake.model.weight.data
    weight.fill_(1.0)
    lookahead.before_fit()
    slow = fast = 1.0
    for step in range(100):
        fast -= 0.01 * (step + 1)
        weight.fill_(fast)
        Fake.train_iter = step + 1  # fastai counts a step before this callback's turn
        lookahead.after_batch()
        if step % 2 == 1:
            share = 0.95**5 * ((step + 1) / 100) ** 3
            slow = fast = slow * share + fast * (1 - share)
        assert weight.item() == pytest.approx(fast, abs=1e-5)
    weight.fill_(99.0)
    lookahead.after_train()
    assert weight.item() == pytest.approx(slow, abs=1e-5)


def test_a_training_shorter_than_lookaheads_steps_learns(data):
    recipe = get_recipe("cpu", bs=24, epochs=1)
    dls = dataloaders(data, recipe, subset=200)
    learn = create_learner(dls, recipe, seed=1)
    before = learn.model.head.weight.detach().clone()
    assert len(dls.train) < recipe.lookahead_steps
    fit(learn, recipe)
    assert (learn.model.head.weight - before).norm() > 0.01 * before.norm()


def test_label_smoothing_reaches_the_loss(data):
    recipe = get_recipe("fast", bs=64)
    learn = create_learner(dataloaders(data, recipe, subset=200), recipe)
    logits, target = torch.randn(4, 10), torch.tensor([1, 2, 3, 4])
    logs = logits.log_softmax(1)
    expected = -(0.8 * logs[range(4), target] + 0.2 * logs.mean(1)).mean()
    assert learn.loss_func(logits, target).item() == pytest.approx(expected.item(), rel=1e-5)


def test_unknown_model(data):
    with pytest.raises(UserError, match=r"no model 'bsae'.*'base'"):
        create_learner(dataloaders(data, get_recipe("fast")), get_recipe("fast", model="bsae"))


# --- fastai's own verbs ------------------------------------------------------------------------------------------


def test_predict_takes_every_kind_of_image_alike(learn, tmp_path):
    pixels = learn.dls.data.images[-1]
    Image.fromarray(pixels).save(tmp_path / "digit.png")
    file = tmp_path / "digit.png"
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    with learn.no_bar():
        answers = [learn.predict(item) for item in (file, str(file), file.read_bytes(), Image.open(file), pixels, tensor)]
    label, index, probabilities = answers[0]
    assert label == learn.dls.vocab[index] and probabilities.sum() == pytest.approx(1, abs=1e-5)
    assert all(torch.equal(answer[2], probabilities) for answer in answers)


def test_lr_find_suggests_and_restores(learn):
    import matplotlib

    matplotlib.use("agg")
    before = copy.deepcopy(learn.model.state_dict())
    with learn.no_bar():
        suggestion = learn.lr_find(num_it=20)
    assert 1e-7 < suggestion.valley < 10
    assert all(torch.equal(before[name], value) for name, value in learn.model.state_dict().items())


def test_show_results_tta_and_interpretation(learn):
    from fastai.interpret import ClassificationInterpretation
    from matplotlib import pyplot

    with learn.no_bar():
        learn.show_results(max_n=4)
        titles = [axis.get_title() for axis in pyplot.gcf().axes if axis.images]
        assert len(titles) == 4 and all(re.fullmatch(r"\d\n\d", title) for title in titles)
        pyplot.close("all")
        probabilities, targets = learn.tta()
        assert probabilities.shape == (len(learn.dls.valid_ds), 10) and len(targets) == len(probabilities)
        interpretation = ClassificationInterpretation.from_learner(learn, dl=learn.dls.test)
        matrix = interpretation.confusion_matrix()
        assert matrix.sum() == 360
        _, indices = interpretation.top_losses(3)
        inputs, *_ = interpretation[indices]
        rows = learn.dls.data.n_train + np.asarray(indices)
        shown = learn.dls.test.decode((inputs,))[0].permute(0, 2, 3, 1).numpy()
        assert np.abs(shown - learn.dls.data.images[rows]).max() <= 1  # the test images, not training rows


def test_get_preds_keeps_the_order_of_the_items(learn):
    with learn.no_bar():
        _, targets = learn.get_preds(dl=learn.dls.test)
    assert targets.tolist() == learn.dls.data.labels[learn.dls.data.n_train :].tolist()


# --- augmentation that the loader cannot do alone ----------------------------------------------------------------


class Batches(Callback):
    """Keeps what the model is given in training, and the loss it gets for it."""

    order = MixImages.order + 1

    def before_fit(self):
        self.xs, self.ys = [], []

    def before_batch(self):
        if self.training:
            self.xs.append(self.x.as_subclass(torch.Tensor).clone())
            self.ys.append(self.y.as_subclass(torch.Tensor).clone())


def trained_on(data, seed=1, **fields):
    """The batches of a short training with these fields."""
    recipe = get_recipe("classic-adam", **{"bs": 64, "epochs": 2, "flip": "off", "rotate": 0.0, **fields})
    seen = Batches()
    learn = create_learner(dataloaders(data, recipe, subset=300), recipe, seed=seed)
    with learn.no_bar(), learn.no_logging():
        fit(learn, recipe, [seen])
    return learn, seen


def test_alternating_flips_go_by_epoch_and_image(data):
    learn, seen = trained_on(data, flip="alternating")
    originals = dict(zip(*images_of(learn), strict=True))
    turned = [[], []]
    for number, x in enumerate(seen.xs):
        for image in x:
            as_it_is = [row for row, original in originals.items() if torch.equal(image, original)]
            mirrored = [row for row, original in originals.items() if torch.equal(image.flip(-1), original)]
            assert as_it_is or mirrored
            turned[number * 2 // len(seen.xs)].append({**dict.fromkeys(as_it_is, False), **dict.fromkeys(mirrored, True)})
    first, second = ({row: flipped for one in epoch for row, flipped in one.items()} for epoch in turned)
    both = first.keys() & second.keys()
    asymmetric = [row for row in both if not torch.equal(originals[row], originals[row].flip(-1))]
    assert len(asymmetric) > 150 and np.mean([first[row] != second[row] for row in asymmetric]) > 0.97  # equal digits exist


def images_of(learn):
    """Row numbers and normalised images of the training split."""
    rows = list(learn.dls.train.dataset.items)
    (x,) = learn.dls.test_dl(rows, bs=len(rows)).one_batch()
    return rows, x.as_subclass(torch.Tensor)


@pytest.mark.parametrize("fields", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 1.0}], ids=str)
def test_mixed_training_repeats_by_seed_and_spares_the_rest(data, fields):
    learn, first = trained_on(data, **fields)
    plain = trained_on(data)[1]
    torch.rand(3), np.random.rand(3)
    again, other = (trained_on(data, seed, **fields)[1] for seed in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.xs, again.xs, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.xs, other.xs, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first.xs, plain.xs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first.ys, plain.ys, strict=True))  # labels are mixed in the loss alone
    assert learn.loss_func.__class__.__name__ == "CrossEntropyLossFlat"  # as before the training
    assert torch.equal(torch.from_numpy(data.images), torch.from_numpy(load_data("digits").images))


@pytest.mark.parametrize("fields", [{"mixup": 0.7}, {"cutmix": 1.0}], ids=str)
def test_the_loss_of_mixed_images_is_that_of_mixed_labels(data, fields):
    """Against cross-entropy with soft targets, which torch computes by another road."""
    recipe = get_recipe("classic-adam", bs=64, epochs=1, label_smoothing=0.1, **fields)
    learn = create_learner(dataloaders(data, recipe, subset=300), recipe, seed=1)
    losses = []

    class Compare(Callback):
        def after_loss(self):
            if self.training:
                one_hot = nn.functional.one_hot
                (others,), (y,) = self.mix_images.yb1, self.yb
                share = self.mix_images.lam[:, None]
                targets = share * one_hot(y.as_subclass(torch.Tensor), 10) + (1 - share) * one_hot(
                    others.as_subclass(torch.Tensor), 10
                )
                expected = nn.functional.cross_entropy(self.pred.as_subclass(torch.Tensor), targets, label_smoothing=0.1)
                losses.append((self.loss_grad.item(), expected.item()))

    with learn.no_bar(), learn.no_logging():
        fit(learn, recipe, [Compare()])
    assert len(losses) == 3 and all(ours == pytest.approx(expected, rel=1e-5) for ours, expected in losses)


def test_the_share_of_a_mixture_follows_its_beta_distribution():
    from scipy.stats import beta, kstest

    images = torch.zeros(5000, 3, 8, 8)
    _, others, share = mix(images, get_recipe("classic-adam", mixup=0.4), np.random.default_rng(0))
    assert kstest(share.numpy(), beta(0.4, 0.4).cdf).pvalue > 0.01
    assert sorted(others.tolist()) == list(range(5000))


# --- progressive resizing ----------------------------------------------------------------------------------------


def test_images_grow_by_four_pixels_to_their_full_size():
    resizing = ProgressiveResizing(start_size=20, grow_pct=0.6)
    assert [resizing.side(32, epoch / 10) for epoch in range(10)] == [20, 20, 24, 24, 28, 28, 32, 32, 32, 32]
    assert [resizing.side(32, epoch / 3) for epoch in range(3)] == [20, 24, 32]


def test_training_is_at_the_small_size_and_validation_at_the_full_one(data):
    recipe = get_recipe("fast", bs=64, epochs=3, lr=0.1, start_size=20, grow_pct=0.6)
    learn = create_learner(dataloaders(data, recipe, subset=300), recipe, seed=1)
    seen = []

    class Watch(Callback):
        def after_pred(self):
            seen.append((self.training, self.x.shape[-1]))

    with learn.no_bar(), learn.no_logging():
        fit(learn, recipe, [Watch()])
    assert [side for training, side in seen if training] == [20] * 4 + [24] * 4 + [32] * 4
    assert {side for training, side in seen if not training} == {32}


def test_a_model_of_one_size_cannot_resize(data):
    recipe = get_recipe("classic-adam", start_size=20)
    with pytest.raises(UserError, match="'small' takes images of one size"):
        create_learner(dataloaders(data, recipe), recipe)


def test_whitening_and_identity_can_be_switched_off(data):
    recipe = get_recipe("fast", bs=64, whiten=False, dirac=False)
    model = create_learner(dataloaders(data, recipe, subset=200), recipe, seed=1).model
    assert model.stem.weight.requires_grad and not torch.equal(model.stem.weight[:12], -model.stem.weight[12:])
    usual = create_learner(dataloaders(data, recipe, subset=200), get_recipe("fast", bs=64), seed=1).model
    assert not usual.stem.weight.requires_grad and torch.equal(usual.stem.weight[:12], -usual.stem.weight[12:])
    x = torch.randn(2, 24, 8, 8)
    assert torch.allclose(usual.groups[0][0](x)[:, :24], x, atol=1e-5)
