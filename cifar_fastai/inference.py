"""Classifying pictures with an export, without fastai's per-call set-up."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cifar_fastai.artifacts import Export, load_export
from cifar_fastai.images import decode_image, fit_image
from cifar_fastai.models import tta_logits

MAX_BATCH = 64  # images computed at once: more are no faster, and take memory
UNSURE_BELOW = 0.5  # confidence; it is calibrated, so below this an answer is wrong more often than right


@dataclass(frozen=True)
class Verdict:
    """What the network says of one picture, and what there is to say against it."""

    confidences: dict[str, float]  # class → confidence, most confident first, summing to 1
    unfamiliar: bool  # unlike the training images

    @property
    def unsure(self) -> bool:
        return next(iter(self.confidences.values())) < UNSURE_BELOW

    @property
    def warnings(self) -> list[str]:
        """Remarks fit to show anybody, as `decode_image` has them about a picture."""
        none = f"unlike the training images: this may be none of the {len(self.confidences)} classes"
        wrong = "low confidence: the answer is more likely wrong than right"
        return [none] * self.unfamiliar + [wrong] * self.unsure


class Classifier:
    """Answers what is in a picture: `Classifier("exports/cifar10").predict("cat.png")`."""

    def __init__(self, export: str | os.PathLike | Export, expect_digest: str | None = None):
        """export: a folder, checked, against expect_digest too, as `load_export` does; or one that is loaded. Raises
        ExportError."""
        self.export = export if isinstance(export, Export) else load_export(export, expect_digest)
        self.expect_digest = expect_digest

    @property
    def classes(self) -> tuple[str, ...]:
        return self.export.classes

    def predict(self, image, tta: bool = False) -> dict[str, float]:
        """{class: confidence}, most confident first, confidences summing to 1. Raises BadImage.

        image: whatever `decode_image` takes. tta: average over the views of the picture that the network's training allows.
        """
        return self.predict_batch([image], tta)[0]

    def predict_batch(self, images: Iterable, tta: bool = False) -> list[dict[str, float]]:
        """As `predict`, for several images at once."""
        images, answers = iter(images), []
        while batch := [self.tensor(decode_image(image)) for image in islice(images, MAX_BATCH)]:
            answers += self.answers(torch.stack(batch), tta)
        return answers

    def tensor(self, picture: Image.Image) -> Tensor:
        """What the network sees of an RGB picture: uint8 (3, size, size)."""
        return torch.from_numpy(np.array(fit_image(picture, self.export.size))).permute(2, 0, 1)

    def answers(self, images: Tensor, tta: bool = False) -> list[dict[str, float]]:
        """As `predict`, from a batch of what `tensor` returns."""
        if not tta:
            return [verdict.confidences for verdict in self.verdicts(images)]
        views = self.export.config["tta_views"]
        probabilities = self.export.probabilities(images, lambda x: tta_logits(self.export.model, x, views))
        return [self._ranked(row) for row in probabilities.tolist()]

    def verdicts(self, images: Tensor) -> list[Verdict]:
        """As `answers`, with the doubts."""
        probabilities, unfamiliar = self.export.judge(images)
        rows = zip(probabilities.tolist(), unfamiliar.tolist(), strict=True)
        return [Verdict(self._ranked(row), strange) for row, strange in rows]

    def _ranked(self, row: list[float]) -> dict[str, float]:
        return dict(sorted(zip(self.classes, row, strict=True), key=lambda pair: -pair[1]))
