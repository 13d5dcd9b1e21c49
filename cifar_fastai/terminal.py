"""What is printed and where it goes: lines of progress, times in words, bars, text of users made harmless, and standard
streams that outlast whoever reads them."""

import errno
import io
import os
import re
import select
import sys
from collections.abc import Callable

# What rules a terminal, ends a line or turns the order of letters round; and surrogates, which no encoding has.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that spreadsheets compute
MARKDOWN = re.compile(r"[\\`*\[\]<>|#&~$!]|(?<![^\W_])_|_(?![^\W_])")  # what means something in the middle of a line


# --- words ---------------------------------------------------------------------------------------------------------


def say(what: str, words) -> None:
    """A line of progress: what it is about, and the words."""
    print(f"{what:<8} {printable(words)}", flush=True)


def warn(words) -> None:
    """A line on standard error of what went wrong and ends nothing."""
    print(f"warning: {printable(words)}", file=sys.stderr)


def in_words(seconds: float) -> str:
    """A time in the unit that suits it: "40 seconds", "59 minutes", "3.5 hours"."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def printable(text) -> str:
    """Text of users as it can stand on a line: control characters, line breaks, changes of direction and lone surrogates as
    escapes."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def cell(text: str) -> str:
    """Text of users for a table that is opened in a spreadsheet: what would be a formula there begins with an apostrophe."""
    return f"'{text}" if text.startswith(FORMULA) else text


def markdown(text: str) -> str:
    """Text of users for a line, or a cell of a table, of Markdown."""
    return MARKDOWN.sub(r"\\\g<0>", printable(text))


def shortened(text: str, length: int) -> str:
    """The same, printable, in that many characters at most."""
    text = printable(text)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def progress_bar(stream, *columns):
    """A rich.progress.Progress on a terminal, gone when it is over: description, bar, `columns` and time left. Text is no
    markup in it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *columns,
        TimeRemainingColumn(),
        TextColumn("left"),
        console=Console(file=stream, markup=False, emoji=False, highlight=False),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # to stand above the bar, where both are seen
    )


# --- standard streams ----------------------------------------------------------------------------------------------


class _Lasting(io.RawIOBase):
    """A file to write to that takes everything: what cannot be written is dropped, and the first reason kept.

    stream: the one whose file it is, None if that is closed. number: of its descriptor. tell: gets the first reason.
    """

    def __init__(self, stream: io.TextIOWrapper | None, number: int):
        self.stream, self.number = stream, number  # kept, for with the stream its file would be closed
        self.raw = stream and getattr(stream.buffer, "raw", stream.buffer)  # the latter under `python -u`
        self.trouble: OSError | None = None
        self.tell: Callable[[OSError], None] | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.raw.fileno() if self.raw else self.number

    def isatty(self) -> bool:
        return self.raw is not None and self.raw.isatty()

    def write(self, data) -> int:
        try:
            return self._write(data)
        except OSError as error:
            if self.trouble is None:
                self.trouble = error
                if self.tell:
                    self.tell(error)
            return len(data)

    def _write(self, data) -> int:
        if self.raw is None:
            raise OSError(errno.EBADF, "it is closed")
        while (n := self.raw.write(data)) is None:  # it does not block, and is full
            select.select((), (self.raw,), ())
        return n


def lasting(stream: io.TextIOWrapper | None, number: int) -> io.TextIOWrapper:
    """A standard stream as `keep_streams` makes it. stream: what it replaces; None if its descriptor `number` is closed."""
    file = io.BufferedWriter(_Lasting(stream, number))
    if stream is None:
        return io.TextIOWrapper(file, "utf-8", "backslashreplace", line_buffering=True)
    stream.flush()
    how = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
    return io.TextIOWrapper(file, stream.encoding, "backslashreplace", **how)


def keep_streams() -> None:
    """Have the process outlast its standard streams.

    Whoever reads them may leave, a disk may be full, a terminal hang up, an encoding lack a character: print never raises,
    and `trouble` tells. A descriptor that is closed would be given to the next file that is opened, and what a library
    prints would end in that: the null device takes its place. Streams that are not the process's own stay as they are.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115  for as long as the process lives
    if sys.stdout is sys.__stdout__:
        sys.stdout = lasting(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = lasting(sys.stderr, 2)


def trouble(stream) -> OSError | None:
    """Why something could not be written to a stream that `keep_streams` made."""
    return getattr(_raw(stream), "trouble", None)


def tell_of_trouble() -> None:
    """Say on standard error, at once, when standard output can no longer be written."""
    if isinstance(raw := _raw(sys.stdout), _Lasting):
        raw.tell = _tell


def _tell(error: OSError) -> None:
    words = "standard output can no longer be written"
    print(f"warning: {words} ({error.strerror}); the work goes on without it.", file=sys.stderr)


def _raw(stream):
    return getattr(getattr(stream, "buffer", None), "raw", None)
