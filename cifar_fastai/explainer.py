"""Where in a picture an export finds the evidence for a class, drawn over that picture."""

import copy
import threading

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cifar_fastai.images import fit_image
from cifar_fastai.inference import Classifier

SIDE = 320  # pixels of an overlay


class Explainer:
    """Draws Grad-CAM over pictures, for callers in several threads.

    They take turns on a copy of the classifier's network: Grad-CAM listens to what passes through a network, and would take
    the picture of anybody else for its own.
    """

    def __init__(self, classifier: Classifier):
        self.classifier = classifier
        self._model = copy.deepcopy(classifier.export.model)
        self._lock = threading.Lock()

    def overlay(self, image: Tensor, picture: Image.Image, label: str) -> Image.Image:
        """The square that the network sees of an RGB picture, SIDE x SIDE pixels, with what speaks for class `label` in
        colour. image: what `Classifier.tensor` gives for it. Raises ValueError if there is no such class."""
        from cifar_fastai.explain import grad_cam, overlay

        x = self.classifier.export.normalized(image[None])
        number = torch.tensor([self.classifier.classes.index(label)])
        with self._lock:
            heat = grad_cam(self._model, x, number)
        return Image.fromarray(overlay(np.asarray(fit_image(picture, SIDE))[None], heat)[0])
