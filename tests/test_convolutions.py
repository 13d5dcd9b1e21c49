import pytest
import torch
from fastai.callback.core import Callback
from torch import nn

from cifar_fastai import convolutions, create_learner, dataloaders, fit, get_recipe
from cifar_fastai.convolutions import NarrowConvolutions, filter_gradient


def gradients(conv: nn.Conv2d, x: torch.Tensor):
    """Of the filters and of `x`, for some loss."""
    conv.zero_grad()
    x = x.detach().requires_grad_()
    output = conv(x)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    return conv.weight.grad, x.grad


@pytest.mark.parametrize("sides", [(1, 1), (2, 2), (3, 7), (7, 3), (5, 5)])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_gradients_are_torchs_own(sides, memory_format):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, padding=1, bias=False).double().to(memory_format=memory_format)
    x = torch.randn(3, 4, *sides).double().contiguous(memory_format=memory_format)
    own = gradients(conv, x)
    with NarrowConvolutions():
        ours = gradients(conv, x)
    for mine, torchs in zip(ours, own, strict=True):
        assert torch.allclose(mine, torchs, rtol=1e-12, atol=1e-12)


@pytest.fixture
def calls(monkeypatch):
    """The widths of the maps for which the filters' gradient was worked out here."""
    widths = []

    def watched(x, gradient):
        widths.append(x.shape[-1])
        return filter_gradient(x, gradient)

    monkeypatch.setattr(convolutions, "filter_gradient", watched)
    return widths


@pytest.mark.parametrize(
    ("kind", "side", "n"),
    [
        ({"padding": 1, "bias": False}, 7, 1),
        ({"padding": 1, "bias": False}, 8, 0),
        ({"padding": 0, "bias": False}, 7, 0),
        ({"padding": 1, "bias": True}, 7, 0),
        ({"padding": 1, "bias": False, "stride": 2}, 7, 0),
        ({"padding": 2, "bias": False, "dilation": 2}, 7, 0),
        ({"padding": 1, "bias": False, "groups": 2}, 7, 0),
    ],
)
def test_it_is_for_small_maps_and_plain_convolutions(calls, kind, side, n):
    conv, x = nn.Conv2d(4, 4, 3, **kind), torch.randn(2, 4, side, side)
    own = gradients(conv, x)
    with NarrowConvolutions():
        ours = gradients(conv, x)
    assert len(calls) == n
    for mine, torchs in zip(ours, own, strict=True):
        assert torch.allclose(mine, torchs, atol=1e-4)


def test_frozen_filters_stay_frozen(calls):
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False).requires_grad_(False)
    with NarrowConvolutions():
        filters, of_input = gradients(conv, torch.randn(2, 4, 5, 5))
    assert filters is None and of_input is not None and not calls


def test_a_training_in_bfloat16_uses_it_and_one_in_float32_does_not(calls):
    class Kinds(Callback):
        def after_backward(self):
            self.seen = {parameter.grad.dtype for parameter in self.model.parameters() if parameter.grad is not None}

    for precision, widths in (("float32", set()), ("bfloat16", {3, 7})):
        recipe = get_recipe("classic-sgd", model="base", bs=64, epochs=1, precision=precision)
        learn = create_learner(dataloaders("digits", recipe, subset=300), recipe, seed=0)
        fit(learn, recipe, kinds := Kinds())
        assert set(calls) == widths and kinds.seen == {torch.float32}
