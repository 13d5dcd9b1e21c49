"""Classifying pictures with an export, without fastai's per-call set-up."""

import os
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from cifar_fastai.artifacts import Export, load_export
from cifar_fastai.images import decode_image, fit_image
from cifar_fastai.models import tta_logits


class Classifier:
    """Answers what is in a picture: `Classifier("exports/cifar10").predict("cat.png")`."""

    def __init__(self, export: str | os.PathLike | Export):
        """export: a folder, checked as `load_export` does, or one that is loaded. Raises ExportError."""
        self.export = export if isinstance(export, Export) else load_export(export)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.export.classes

    def predict(self, image, tta: bool = False) -> dict[str, float]:
        """{class: confidence}, most confident first, confidences summing to 1. Raises BadImage.

        image: whatever `decode_image` takes. tta: average over six views of the picture.
        """
        return self.predict_batch([image], tta)[0]

    def predict_batch(self, images: Iterable, tta: bool = False) -> list[dict[str, float]]:
        """As `predict`, for several images at once."""
        batch = [self._tensor(image) for image in images]
        if not batch:
            return []
        network = (lambda x: tta_logits(self.export.model, x)) if tta else None
        answers = []
        for row in self.export.probabilities(torch.stack(batch), network).tolist():
            ranked = sorted(zip(self.classes, row, strict=True), key=lambda pair: -pair[1])
            answers.append(dict(ranked))
        return answers

    def _tensor(self, image) -> Tensor:
        picture = fit_image(decode_image(image), self.export.size)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
