"""Names of classes: what counts as the same name, and which names an export can hold and anybody can be shown."""

import unicodedata

MAX_NAME = 255  # letters
MAX_CLASSES = 1_500  # as many as an export can hold the confusion matrix of
RULERS = frozenset(
    {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
)  # change the order of what is around them


def label_of(name: str) -> str:
    """The class that a folder of this name stands for: its text, however its accents are stored."""
    return unicodedata.normalize("NFC", name).strip()


def is_label(value) -> bool:
    """Whether it is text fit to be shown on a line: control characters could rule a terminal."""
    return type(value) is str and 0 < len(value) <= MAX_NAME and not any(map(_rules, value))


def printable(text: str) -> str:
    """`text`, with what is no UTF-8 in it, or could rule a terminal, written as an escape."""
    return "".join(_escape(letter) if _rules(letter) else letter for letter in text)


def _rules(letter: str) -> bool:
    return unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(letter) in RULERS


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode()
