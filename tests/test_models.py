import pytest
import torch
from torch import nn

from cifar_fastai.models import (
    MODELS,
    ConvNet,
    Norm,
    WhitenedNet,
    count_flops,
    count_parameters,
    create_model,
    n_views,
    tta_logits,
)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("n_classes", "size"), [(10, 32), (3, 64), (2, 16)])
def test_shapes(name, n_classes, size):
    model = create_model(name, n_classes, size).eval()
    assert model(torch.randn(4, 3, size, size)).shape == (4, n_classes)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_one_gives_what_it_gives_in_company(name):
    torch.manual_seed(0)
    model, x = create_model(name, 10).eval(), torch.randn(5, 3, 32, 32)
    with torch.inference_mode():
        assert torch.allclose(model(x)[2:3], model(x[2:3]), atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_trainable_weight_learns(name):
    torch.manual_seed(0)
    model = create_model(name, 10)
    nn.functional.cross_entropy(model(torch.randn(16, 3, 32, 32)), torch.arange(16) % 10).backward()
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, parameter_name


def test_small_is_the_classic_network():
    kinds = [type(layer).__name__ for layer in ConvNet(10).features[0]]
    assert kinds == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "Dropout"]
    assert len(ConvNet(10).features) == 3 and isinstance(ConvNet(10).head[-1], nn.Linear)


def test_base_has_the_published_size():
    assert round(count_parameters(WhitenedNet(10)) / 1e6, 2) == 1.97  # airbench94


def test_large_has_the_published_size():
    model = create_model("large", 10)
    assert round(count_parameters(model) / 1e6, 1) == 12.7  # airbench96, the wider one
    convolutions = [layer for layer in model.groups.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 9 and convolutions[-1].out_channels == 512


def test_widths_and_depth_are_arguments():
    model = WhitenedNet(10, widths=(16, 24, 32), depth=4)
    assert [len(group) for group in model.groups] == [6, 6, 6] and model.head.in_features == 32
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_the_shortcut_adds_the_groups_own_input():
    model, x = WhitenedNet(10, widths=(32, 32, 32), depth=3).eval(), torch.randn(2, 24, 16, 16)
    group = model.groups[0]
    first = group[:4](x)
    second = group[4][2](group[4][1](group[4][0](first)))
    third = group[4][4](group[4][3](second))
    assert torch.allclose(group(x), nn.functional.gelu(first + third), atol=1e-6)


def test_flops_against_counting_by_hand():
    model = WhitenedNet(10)
    expected = 2 * 31 * 31 * 24 * 12
    for n_in, n_out, side in ((24, 64, 31), (64, 256, 15), (256, 256, 7)):
        expected += 2 * 9 * (side**2 * n_in * n_out + (side // 2) ** 2 * n_out * n_out)
    expected += 2 * 256 * 10
    model.train()
    assert count_flops(model) == expected and model.training


def test_whitened_patches_are_uncorrelated_with_unit_variance():
    torch.manual_seed(0)
    images = nn.functional.interpolate(torch.randn(500, 3, 8, 8), size=32, mode="bicubic")
    model = WhitenedNet(10)
    model.init_whitening(images, eps=0.0)
    with torch.inference_mode():
        out = model.stem(images)[:, :12].transpose(0, 1).reshape(12, -1)
    second_moments = out @ out.T / out.shape[1]
    assert torch.allclose(second_moments, torch.eye(12), atol=1e-2)
    assert torch.equal(model.stem.weight[:12], -model.stem.weight[12:])
    assert not model.stem.weight.requires_grad


def test_convolutions_start_as_the_identity():
    model, x = WhitenedNet(10, depth=3), torch.randn(2, 24, 8, 8)
    assert not torch.allclose(model.groups[0][0](x)[:, :24], x, atol=0.1)
    model.init_identity()
    for conv in (layer for layer in model.groups.modules() if isinstance(layer, nn.Conv2d)):
        x = torch.randn(2, conv.in_channels, 8, 8)
        assert torch.allclose(conv(x)[:, : conv.in_channels], x, atol=1e-6)
        assert conv.out_channels == conv.in_channels or conv.weight[conv.in_channels :].std() > 1e-3


def test_too_small_images_are_refused():
    with pytest.raises(ValueError, match="too small"):
        create_model("small", 10, 8)


def test_tta_is_the_weighted_average_of_six_views():
    torch.manual_seed(0)
    x, weights = torch.randn(2, 3, 8, 8), torch.randn(3 * 8 * 8, 4)

    def model(images):
        return images.flatten(1) @ weights

    padded = nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
    views = {x: 0.25, x.flip(-1): 0.25}
    for corner in (padded[..., :8, :8], padded[..., 2:, 2:]):
        views |= {corner: 0.125, corner.flip(-1): 0.125}
    expected = sum(weight * model(view) for view, weight in views.items())
    assert torch.allclose(tta_logits(model, x), expected, atol=1e-5)
    assert torch.allclose(tta_logits(model, x, plain=model(x)), expected, atol=1e-5)


def test_tta_of_fewer_views():
    torch.manual_seed(0)
    x, weights = torch.randn(2, 3, 8, 8), torch.randn(3 * 8 * 8, 4)

    def model(images):
        return images.flatten(1) @ weights

    padded = nn.functional.pad(x, (1, 1, 1, 1), mode="reflect")
    shifted = (model(padded[..., :8, :8]) + model(padded[..., 2:, 2:])) / 2
    expected = {(): model(x), ("mirror",): (model(x) + model(x.flip(-1))) / 2, ("shift",): (model(x) + shifted) / 2}
    for views, logits in expected.items():
        assert torch.allclose(tta_logits(model, x, views), logits, atol=1e-5)
    assert [n_views(views) for views in (*expected, ("mirror", "shift"))] == [1, 2, 3, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_batch_norm_but_for_the_gradient_of_constant_channels(dtype):
    torch.manual_seed(0)
    x = (torch.randn(16, 6, 5, 5) * torch.tensor([1, 1, 1, 1e-4, 0, 0])[:, None, None] + torch.arange(6)[:, None, None]).to(
        dtype
    )
    gradient = torch.randn_like(x)
    norms = [Norm(6, eps=1e-12, momentum=0.4), nn.BatchNorm2d(6, eps=1e-12, momentum=0.4)]
    gradients = []
    for norm in norms:
        for _ in range(3):  # its running statistics move away from where they begin
            images = x.clone().requires_grad_()
            out = norm(images)
            out.backward(gradient)
        gradients.append(images.grad)
    assert all(map(torch.equal, norms[0].state_dict().values(), norms[1].state_dict().values()))
    assert torch.equal(norms[0].bias.grad, norms[1].bias.grad)
    ours, theirs = gradients
    assert torch.equal(ours[:, :3], theirs[:, :3]) and ours[:, :3].abs().amax(dim=(0, 2, 3)).min() > 0
    assert not ours[:, 3:].any() and theirs[:, 3:].abs().max() > 1e3


def test_whitening_leaves_out_what_does_not_vary():
    torch.manual_seed(0)
    grey = nn.functional.interpolate(torch.randn(300, 1, 8, 8), size=32, mode="bicubic").repeat(1, 3, 1, 1)
    model = WhitenedNet(10)
    model.init_whitening(grey)
    with torch.inference_mode():
        assert model.stem(grey).var(dim=(0, 2, 3)).min() > 0.5
