"""Grad-CAM against its definition, worked out here with hooks and autograd."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from cifar_fastai import Classifier
from cifar_fastai.artifacts import normalize
from cifar_fastai.explain import grad_cam, overlay
from cifar_fastai.explainer import SIDE, Explainer
from cifar_fastai.images import fit_image
from cifar_fastai.models import MODELS, create_model
from cifar_fastai.pretrained import create_architecture

ARCHITECTURES = ("resnet18", "squeezenet1_1", "mobilenet_v2", "shufflenet_v2_x0_5")


@pytest.mark.parametrize("name", (*MODELS, *ARCHITECTURES))
@pytest.mark.parametrize("size", [32, 48])
def test_grad_cam_is_what_the_paper_says(name, size):
    torch.manual_seed(0)
    create = create_architecture if name in ARCHITECTURES else create_model
    model = create(name, 5, 2 * size if name in ARCHITECTURES else size).eval()
    x, classes = torch.randn(3, 3, size, size), torch.tensor([4, 0, 2])
    kept = []
    handle = model.last_maps.register_forward_hook(lambda _, __, maps: (maps.retain_grad(), kept.append(maps))[0])
    logits = model(x)
    logits[torch.arange(3), classes].sum().backward()
    handle.remove()
    (maps,) = kept
    weights = maps.grad.mean(dim=(2, 3), keepdim=True)
    expected = F.interpolate((weights * maps).sum(dim=1, keepdim=True).relu(), size=(size, size), mode="bilinear")[:, 0]
    expected = expected / expected.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    heat = grad_cam(model, x, classes)
    assert heat.shape == (3, size, size) and torch.allclose(heat, expected, atol=1e-5)


def test_it_works_where_gradients_are_off_and_leaves_none_behind():
    model = create_model("small", n_classes=2)
    with torch.no_grad():
        heat = grad_cam(model, torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    assert heat.isfinite().all() and not heat.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_evidence_is_no_heat():
    model = create_model("base", n_classes=2)
    torch.nn.init.zeros_(model.head.weight)
    assert (grad_cam(model, torch.randn(1, 3, 32, 32), torch.tensor([0])) == 0).all()


def test_the_overlay_shows_the_heat_and_the_picture():
    images = np.zeros((1, 64, 64, 3), np.uint8)
    images[:, :, 32:] = 200  # the right half is lighter
    heat = torch.zeros(1, 32, 32)
    heat[:, 24:] = 1  # the lower quarter is hot
    laid = overlay(images, heat)[0].astype(int)
    assert laid.shape == (64, 64, 3)
    assert (laid[10, 50] - laid[10, 10] == 90).all(), "cold: 45 % of the picture's gray"
    assert laid[60, 10, 0] > 100 > laid[10, 10].max(), "hot: bright"


# --- over the pictures of an export ------------------------------------------------------------------------------


def test_overlays_of_an_export_for_many_callers_at_once(digits_run):
    """Each gets the overlay of its own picture and class, while the classifier answers others with the same network."""
    classifier = Classifier(digits_run.export)
    explainer = Explainer(classifier)
    chance = np.random.default_rng(1)
    pictures = [Image.fromarray(chance.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(24)]
    labels = [classifier.classes[number % 10] for number in range(len(pictures))]

    def expected(picture, label):
        image = classifier.tensor(picture)
        x = normalize(image[None], classifier.export.config["mean"], classifier.export.config["std"])
        heat = grad_cam(classifier.export.model, x, torch.tensor([classifier.classes.index(label)]))
        return overlay(np.asarray(fit_image(picture, SIDE))[None], heat)[0]

    alone = [expected(picture, label) for picture, label in zip(pictures, labels, strict=True)]

    def draw(number):
        classifier.predict(pictures[-number])
        return np.asarray(explainer.overlay(classifier.tensor(pictures[number]), pictures[number], labels[number]))

    with ThreadPoolExecutor(8) as threads:
        drawn = list(threads.map(draw, range(len(pictures))))
    assert all(np.array_equal(one, other) for one, other in zip(alone, drawn, strict=True))
    assert len({image.tobytes() for image in drawn}) == len(drawn)
    with pytest.raises(ValueError, match="not in tuple"):
        explainer.overlay(classifier.tensor(pictures[0]), pictures[0], "unicorn")
