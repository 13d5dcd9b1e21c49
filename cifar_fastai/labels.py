"""Names of classes: what counts as the same name, and which names an export can hold and anybody can be shown."""

import unicodedata

from cifar_fastai.terminal import printable

MAX_NAME = 255  # letters
MAX_CLASSES = 1_500  # as many as an export can hold the confusion matrix of


def label_of(name: str) -> str:
    """The class that a folder of this name stands for: its text, however its accents are stored."""
    return unicodedata.normalize("NFC", name).strip()


def is_label(value) -> bool:
    """Whether it is text fit to be shown on a line: control characters could rule a terminal."""
    return type(value) is str and 0 < len(value) <= MAX_NAME and printable(value) == value
