"""Flat TOML files, read with errors that name the file and the line, and written."""

import json
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from cifar_fastai.errors import UserError, first_line

LONGEST = 100_000  # bytes


def read_toml(path: Path) -> dict:
    """What stands in a TOML file. Raises UserError if it cannot be read or breaks TOML's grammar."""
    try:
        if not (path.is_file() or path.is_dir()) and path.exists():  # a pipe or a device may never end
            raise UserError(f"{path} cannot be read: it is no regular file.")
        with path.open("rb") as file:
            data = file.read(LONGEST + 1)
        if len(data) > LONGEST:
            raise UserError(f"{path} is no recipe: it is longer than {LONGEST // 1000} kB.")
        return tomllib.loads(data.decode("utf-8-sig"))  # a mark that some editors put first is let pass
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start + 1}).") from None
    except (ValueError, RecursionError) as error:  # the message has the line and the column
        raise UserError(f"{path} is not TOML: {first_line(error)}. A line reads `field = value`, text in quotes.") from None


def to_toml(values: dict) -> str:
    """A line for each value: text, numbers, truth values and lists of them, which TOML writes as JSON does."""
    lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())
    return "".join(lines).replace("\x7f", "\\u007f")  # the one character that JSON leaves alone and TOML forbids
