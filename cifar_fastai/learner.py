"""From DataLoaders and a recipe to a fastai Learner: network, loss, optimizer, metrics and what belongs to them."""

from contextlib import nullcontext
from functools import partial
from typing import TypeGuard

import fastai.callback.schedule  # noqa: F401  gives Learner its fit_one_cycle and lr_find
import numpy as np
import torch
from fastai.callback.core import Callback, CancelEpochException
from fastai.callback.mixup import MixHandler
from fastai.data.core import DataLoaders
from fastai.learner import AvgSmoothLoss, Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import OptimWrapper, set_item_pg
from fastai.torch_core import set_seed, to_float
from torch import nn
from torch.nn import functional as F

from cifar_fastai.augment import Augment, mix
from cifar_fastai.convolutions import NarrowConvolutions
from cifar_fastai.distributed import ALONE
from cifar_fastai.models import MODELS, WhitenedNet, create_model
from cifar_fastai.muon import Muon, is_filter
from cifar_fastai.pretrained import TransferNet, check_model, create_architecture, create_pretrained, network_side
from cifar_fastai.recipes import Recipe

WHITENING_IMAGES = 5000


def create_learner(dls: DataLoaders, recipe: Recipe, *, seed: int | None = None, blank: bool = False) -> Learner:
    """A Learner that trains as `recipe` says: `fit(learn, recipe)`, or `learn.fit_one_cycle(n)` to choose yourself.

    seed: of the weights and of all later draws from torch's global generator. blank: leave pretrained weights out, since a
    checkpoint's will take their place. Raises UserError for an unknown model, and DataError where pretrained weights are not
    to be had.
    """
    check_model(recipe)
    if seed is not None:
        set_seed(seed)
    model = _create_model(recipe, dls, blank)
    learn = ResumableLearner(
        dls,
        model,
        loss_func=CrossEntropyLossFlat(label_smoothing=recipe.label_smoothing),
        opt_func=partial(_optimizer, recipe=recipe),
        splitter=partial(_parameter_groups, recipe=recipe),
        lr=_learning_rates(model, recipe),
        moms=recipe.moms,
        metrics=accuracy,
        cbs=_recipe_callbacks(model, recipe, seed),
    )
    learn.in_bfloat16 = precision(recipe, dls.device, model) == "bfloat16"
    return learn


class ResumableLearner(Learner):
    """A Learner whose `fit` begins with the epoch `first_epoch`, counted from 0; one of several, where `processes` says so.

    fastai's own `start_epoch` runs every callback for the epochs left out, on figures that are not there.

    in_bfloat16: whether network and optimizer compute in bfloat16 during `fit`, where torch holds that to be safe. Weights,
    predictions and loss are in float32 all the same, and so is all that is predicted later. fastai's MixedPrecision is for
    CUDA alone, leaves the optimizer out, whose only products of matrices are Muon's, and stays on after Ctrl-C.
    """

    first_epoch = 0
    processes = ALONE  # that train together
    in_bfloat16 = False
    _fitting = False

    def _do_fit(self):
        self._fitting = True
        try:
            for epoch in range(self.first_epoch, self.n_epoch):
                self.epoch = epoch
                self._with_events(self._do_epoch, "epoch", CancelEpochException)
        finally:
            self._fitting = False

    def _do_one_batch(self):
        if not (self.in_bfloat16 and self._fitting):
            return super()._do_one_batch()
        device = self.dls.device.type
        with torch.autocast(device, torch.bfloat16), NarrowConvolutions() if device == "cpu" else nullcontext():
            super()._do_one_batch()


class CalibratedLoss(CrossEntropyLossFlat):
    """Cross-entropy of logits divided by a temperature: with it `learn.predict` gives calibrated confidences."""

    def __init__(self, temperature: float):
        super().__init__()
        self.temperature = temperature

    def __call__(self, inp, targ, **kwargs):
        return super().__call__(inp / self.temperature, targ, **kwargs)

    def activation(self, out):
        return F.softmax(out / self.temperature, dim=-1)


def fit(learn: Learner, recipe: Recipe, cbs=None) -> None:
    """`fit_one_cycle` with the recipe's schedule. cbs: callbacks for this training only."""
    learn.fit_one_cycle(
        recipe.epochs, pct_start=recipe.pct_start, div=recipe.div, div_final=recipe.div_final, moms=recipe.moms, cbs=cbs
    )


def _create_model(recipe: Recipe, dls: DataLoaders, blank: bool) -> nn.Module:
    if recipe.model in MODELS:
        model = create_model(recipe.model, len(dls.vocab), dls.data.size)
    elif blank:
        model = create_architecture(recipe.model, len(dls.vocab), network_side(recipe, dls.data.size))
    else:
        model = create_pretrained(recipe, len(dls.vocab), dls.data.size)
    if isinstance(model, WhitenedNet):
        if recipe.whiten:
            model.init_whitening(_training_images(dls))
        if recipe.dirac:
            model.init_identity()
    return model


def _training_images(dls: DataLoaders):
    """Some normalised training images without augmentation, (N, 3, size, size)."""
    rows = dls.train.dataset.items[:WHITENING_IMAGES]
    (images,) = dls.test_dl(rows, bs=len(rows)).one_batch()
    return images.as_subclass(torch.Tensor)


def _parameter_groups(model: nn.Module, recipe: Recipe) -> list[list[nn.Parameter]]:
    """The weights, by the way they learn: the halves of a pretrained body, and its head; or BatchNorm's biases and Muon's
    filters, where the recipe sets them apart, and the rest of what is trained."""
    if _fine_tunes(model, recipe):
        body = list(model.body.parameters())
        return [body[: len(body) // 2], body[len(body) // 2 :], list(model.head.parameters())]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = []
    if recipe.bias_lr_factor != 1:
        groups.append([module.bias for module in model.modules() if isinstance(module, nn.BatchNorm2d)])
    if recipe.optimizer == "muon":
        groups.append([parameter for parameter in trainable if is_filter(parameter)])
    known = {id(parameter) for group in groups for parameter in group}
    return [*groups, [parameter for parameter in trainable if id(parameter) not in known]]


def _learning_rates(model: nn.Module, recipe: Recipe) -> list[float] | float:
    """One for each of the groups, in their order."""
    if _fine_tunes(model, recipe):
        return [recipe.lr * recipe.body_lr_factor, recipe.lr * recipe.body_lr_factor**0.5, recipe.lr]
    rates = [recipe.lr * recipe.bias_lr_factor] if recipe.bias_lr_factor != 1 else []
    rates += [recipe.lr * recipe.muon_lr_factor] if recipe.optimizer == "muon" else []
    return [*rates, recipe.lr] if rates else recipe.lr


def _fine_tunes(model: nn.Module, recipe: Recipe) -> TypeGuard[TransferNet]:
    return isinstance(model, TransferNet) and recipe.pretrained


class TorchOptimizer(OptimWrapper):
    """fastai's OptimWrapper, with hyperparameters as its own optimizers have them: all of them numbers, which callbacks may
    log, and what a callback writes into them the optimizer takes."""

    @property
    def hypers(self) -> list["Hypers"]:
        return [Hypers(self, group, values) for group, values in enumerate(super().hypers)]


class Hypers(dict):
    """Those of one group of parameters, by fastai's names."""

    def __init__(self, optimizer: TorchOptimizer, group: int, values: dict):
        super().__init__({name: value for name, value in values.items() if value is not None and type(value) is not bool})
        self.optimizer, self.group = optimizer, group

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        set_item_pg(self.optimizer.opt.param_groups[self.group], self.optimizer.bwd_map[name], value)


def _optimizer(groups, lr, recipe: Recipe) -> TorchOptimizer:
    """torch's own optimizers (and Muon), which update all weights at once, where fastai's loop over them in Python."""
    rates = lr if isinstance(lr, list) else [lr]
    groups = [
        {"params": list(group), "lr": rate, "weight_decay": recipe.wd * min(1, recipe.lr / rate)}
        for group, rate in zip(groups, rates, strict=True)
    ]
    if recipe.optimizer == "adam":
        return TorchOptimizer(opt=torch.optim.Adam(groups))
    kind = Muon if recipe.optimizer == "muon" else torch.optim.SGD
    return TorchOptimizer(opt=kind(groups, momentum=recipe.moms[0], nesterov=True))


def _recipe_callbacks(model: nn.Module, recipe: Recipe, seed: int | None) -> list[Callback]:
    callbacks: list[Callback] = [PredictionsInFloat32(), LossesOnDevice()]
    if recipe.flip == "alternating":
        callbacks.append(AlternateFlips())
    if recipe.mixup or recipe.cutmix:
        callbacks.append(MixImages(recipe, seed or 0))
    if recipe.start_size:
        callbacks.append(ProgressiveResizing(recipe.start_size, recipe.grow_pct))
    if recipe.lookahead_steps:
        callbacks.append(Lookahead(recipe.lookahead_steps))
    if recipe.whiten_bias_epochs and isinstance(model, WhitenedNet):
        callbacks.append(FreezeWhitening(recipe.whiten_bias_epochs))
    if recipe.frozen_epochs and _fine_tunes(model, recipe):
        callbacks.append(FreezeBody(recipe.frozen_epochs))
    return callbacks


def precision(recipe: Recipe, device: torch.device, model: nn.Module | None = None) -> str:
    """In which a training computes: "float32" or "bfloat16". A recipe that leaves it open has bfloat16 on GPUs made for it
    and on CPUs that multiply tiles of it (AMX), which only torch 2.11 and later tell of. The network counts, too: a CPU has
    no tiles to fill where it is made of grouped convolutions, and float32 is faster (benchmarks/precision.py)."""
    if recipe.precision != "auto":
        return recipe.precision
    if device.type == "cuda":
        made_for_it = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        made_for_it = device.type == "cpu" and capabilities.get("amx_bf16", False)
        made_for_it = made_for_it and not (model and is_grouped(model))
    return "bfloat16" if made_for_it else "float32"


def is_grouped(model: nn.Module) -> bool:
    """Whether a quarter and more of a network's convolutions over neighbouring pixels see a group of the channels each,
    such as one (depthwise)."""
    wide = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and max(layer.kernel_size) > 1]
    return 4 * sum(layer.groups > 1 for layer in wide) >= len(wide) > 0


class SmoothLoss(AvgSmoothLoss):
    """fastai's smoothed training loss, kept where the loss is; to fetch it at every step is to wait for the device there."""

    def accumulate(self, learn):
        self.count += 1
        loss = learn.loss.detach()
        self.val = torch.lerp(loss, self.val.to(loss.device), self.beta)


class PredictionsInFloat32(Callback):
    """For the loss, the metrics and all other callbacks, as fastai's MixedPrecision does it."""

    order = -100  # before all others

    def after_pred(self):
        self.learn.pred = to_float(self.pred)


class LossesOnDevice(Callback):
    """Leaves the losses that Recorder collects on the device until the epoch ends."""

    order = 40  # before Recorder

    def before_fit(self):
        vars(self.recorder)["smooth_loss"] = SmoothLoss()  # fastai warns where it is set as an attribute

    def before_train(self):
        self.begin = len(self.recorder.losses)

    def after_train(self):
        losses = self.recorder.losses
        if new := losses[self.begin :]:
            losses[self.begin :] = torch.stack(new).cpu()


class Lookahead(Callback):
    """Every `steps` steps, moves slow copies of the weights towards the fast ones and sets the fast ones to them.

    In a short training it does so more often, 50 times in all: the network would else end with the weights it began with.
    The slow copies keep a share of decay * (t / T)^3 of themselves, t of T steps being done; after the last step the
    network is given the slow copies. M. Zhang et al., https://arxiv.org/abs/1907.08610; the growing share is airbench94's.
    """

    order = 30  # after MixedPrecision, before Recorder
    kept = ("slow",)

    def __init__(self, steps: int, decay: float = 0.95**5):
        self.steps, self.decay = steps, decay

    def before_fit(self):
        self.run = not hasattr(self.learn, "lr_finder") and not hasattr(self, "gather_preds")
        if self.run:
            self.slow = [weight.detach().clone() for weight in self._weights()]

    def after_batch(self):
        total = self.n_epoch * len(self.dls.train)
        if self.training and self.train_iter % max(1, min(self.steps, total // 50)) == 0:
            share = self.decay * (self.train_iter / total) ** 3
            torch._foreach_lerp_(self.slow, self._weights(), 1 - share)
            torch._foreach_copy_(self._weights(), self.slow)

    def after_train(self):
        if self.epoch == self.n_epoch - 1:
            torch._foreach_copy_(self._weights(), self.slow)

    def after_fit(self):
        self.run, self.slow = True, None

    def _weights(self):
        return [value for value in self.model.state_dict().values() if value.is_floating_point()]


class AlternateFlips(Callback):
    """Tells the augmentation which epoch it is, on which the alternating flip depends."""

    def before_train(self):
        for tfm in self.dls.train.after_batch.fs:
            if isinstance(tfm, Augment):
                tfm.epoch = self.epoch


class MixImages(MixHandler):
    """mixup and CutMix (see `augment.mix`): mixes each training image with another of its batch, and the loss likewise.

    fastai's own two callbacks draw from the global generator, and its CutMix writes into the batch.
    """

    kept = apart = ("random_state",)
    stack_y = False  # nothing of MixHandler's to be undone before the first epoch

    def __init__(self, recipe: Recipe, seed: int):
        self.recipe, self.seed = recipe, seed

    def before_fit(self):
        self.random = np.random.default_rng(self.seed + self.processes.rank)

    @property
    def random_state(self) -> dict:
        return self.random.bit_generator.state

    @random_state.setter
    def random_state(self, state: dict):
        self.random.bit_generator.state = state

    def before_batch(self):
        mixtures, others, self.lam = mix(self.x.as_subclass(torch.Tensor), self.recipe, self.random)
        self.learn.xb = (mixtures,)
        self.yb1 = tuple(labels[others] for labels in self.yb)  # MixHandler gives yb the share lam and yb1 the rest


class ProgressiveResizing(Callback):
    """Trains on smaller images at first, which cost less, and on full-sized ones in the end.

    From fast.ai's entry to DAWNBench (https://www.fast.ai/posts/2018-04-30-dawnbench-fastai.html). Validation is at full
    size throughout, so its figures are pessimistic until the images have grown.
    """

    run_valid = False
    STEP = 4  # pixels

    def __init__(self, start_size: int, grow_pct: float):
        self.start_size, self.grow_pct = start_size, grow_pct

    def side(self, full: int, done: float) -> int:
        """The side of the images when this share of the epochs is done."""
        if done >= self.grow_pct:
            return full
        growth = (full - self.start_size) * done / self.grow_pct
        return self.start_size + int(growth + 1e-9) // self.STEP * self.STEP

    def before_batch(self):
        side = self.side(self.x.shape[-1], self.epoch / self.n_epoch)
        if side < self.x.shape[-1]:
            x = self.x.as_subclass(torch.Tensor)
            self.learn.xb = (F.interpolate(x, size=(side, side), mode="bilinear", antialias=True),)


class FreezeWhitening(Callback):
    """Stops training the bias of the whitening stem after `epochs` epochs."""

    def __init__(self, epochs: int):
        self.epochs = epochs

    def before_train(self):
        self.model.stem.bias.requires_grad_(self.epoch < self.epochs)

    def after_fit(self):
        self.model.stem.bias.requires_grad_()  # an optimizer made later finds the same weights to train


class FreezeBody(Callback):
    """Trains only the head of a pretrained network for `epochs` epochs, and its normalisation layers, as fastai does.

    fastai's `fine_tune` fits twice instead; in one fit each epoch alone says what is frozen, wherever a training resumes.
    """

    def __init__(self, epochs: int):
        self.epochs = epochs

    def before_train(self):
        self.opt.freeze_to(-1 if self.epoch < self.epochs else 0)

    def after_fit(self):
        self.opt.unfreeze()
