import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cifar_fastai import create_learner, dataloaders, fit, get_recipe
from cifar_fastai.errors import UserError
from cifar_fastai.muon import Muon, orthogonal

MUON = {"optimizer": "muon", "muon_lr_factor": 0.2}


@pytest.mark.parametrize("shape", [(16, 27), (32, 288), (27, 16), (8, 8)])
def test_the_nearest_orthogonal_matrix(shape):
    torch.manual_seed(0)
    left, values, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = left @ torch.diag(torch.linspace(1, 10, len(values))) @ right
    singular_values = torch.linalg.svdvals(orthogonal(matrix, steps=5))
    assert singular_values.min() > 0.6 and singular_values.max() < 1.3
    same_vectors = left.T @ orthogonal(matrix, steps=5) @ right.T
    assert torch.allclose(same_vectors, torch.diag(same_vectors.diag()), atol=1e-3)
    assert torch.allclose(orthogonal(1000 * matrix), orthogonal(matrix), atol=1e-4)


def test_under_autocast_the_products_are_in_bfloat16():
    torch.manual_seed(0)
    matrix = torch.randn(32, 90)
    exact = orthogonal(matrix)
    with torch.autocast("cpu", torch.bfloat16):
        rough = orthogonal(matrix)
    assert rough.dtype == torch.bfloat16 and 0 < (rough - exact).norm() < 0.03 * exact.norm()


def test_steps_on_matrices_are_those_of_torchs_own():
    torch.manual_seed(0)
    start = torch.randn(12, 3, 3, 3)
    start *= 12**0.5 / start.norm()  # whereas torch's scales nothing
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    optimizers = (
        Muon([ours], lr=1e-3, momentum=0.9, nesterov=True),
        torch.optim.Muon([theirs], lr=1e-3, momentum=0.9, nesterov=True, weight_decay=0, ns_steps=3),
    )
    for _ in range(5):
        gradient = torch.randn(12, 27)
        ours.grad, theirs.grad = gradient.view_as(ours).clone(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = theirs.detach() - start.flatten(1)
    ours_moved = ours.detach().flatten(1) - start.flatten(1)
    assert torch.allclose(ours_moved, moved, atol=0.1 * moved.abs().max())  # torch's computes in bfloat16


def test_filters_alone_are_scaled_and_the_rest_is_sgds():
    torch.manual_seed(0)
    weights = {"filters": torch.randn(6, 3, 3, 3), "head": torch.randn(4, 6), "bias": torch.randn(4)}
    models = [{name: nn.Parameter(value.clone()) for name, value in weights.items()} for _ in range(2)]
    settings = {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.01}
    optimizers = [kind(model.values(), **settings) for kind, model in zip((Muon, torch.optim.SGD), models, strict=True)]
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.linear(torch.ones(2, 6), model["head"], model["bias"]).square().sum()
            (loss + (model["filters"] ** 3).sum()).backward()
            optimizer.step()
    for name in ("head", "bias"):
        assert torch.equal(models[0][name], models[1][name])
    assert not torch.allclose(models[0]["filters"], models[1]["filters"], atol=0.1)
    models[0]["filters"].grad = torch.zeros(6, 3, 3, 3)
    optimizers[0].state.clear()
    optimizers[0].step()
    assert models[0]["filters"].norm().item() == pytest.approx(6**0.5)


@pytest.mark.parametrize(
    ("fields", "sizes", "rates"),
    [
        ({"model": "base", "bias_lr_factor": 64.0, "whiten": False, "lr": 1.0}, [6, 7, 2], [64, 0.2, 1]),
        ({"model": "base", "bias_lr_factor": 1.0, "whiten": True, "lr": 1.0}, [6, 8], [0.2, 1]),
        ({"model": "small", "bias_lr_factor": 1.0, "lr": 1.0}, [6, 17], [0.2, 1]),
    ],
)
def test_which_weights_are_set_apart(fields, sizes, rates):
    recipe = get_recipe("classic-sgd", **MUON, **fields)
    learn = create_learner(dataloaders("digits", recipe, subset=300), recipe)
    learn.create_opt()
    groups = learn.opt.opt.param_groups
    assert [len(group["params"]) for group in groups] == sizes
    assert [group["lr"] for group in groups] == rates
    trained = [parameter for parameter in learn.model.parameters() if parameter.requires_grad]
    assert sorted(map(id, trained)) == sorted(id(parameter) for group in groups for parameter in group["params"])


def test_a_network_learns_with_it():
    recipe = get_recipe("classic-sgd", bs=64, epochs=3, **MUON)
    learn = create_learner(dataloaders("digits", recipe), recipe, seed=1)
    fit(learn, recipe)
    assert learn.validate(dl=learn.dls.test)[1] > 0.9


def test_it_is_for_networks_that_normalise():
    recipe = get_recipe("transfer", **MUON)
    with pytest.raises(UserError, match=r"muon is for small, base, slim, deep, large,.* 'resnet18'"):
        create_learner(dataloaders("digits", recipe, subset=300), recipe, blank=True)
