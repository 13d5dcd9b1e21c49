"""The mistakes a user can make or meet, each with the exit code the command line gives it.

Whatever is raised from here is shown as its message alone, so a message names the thing and the way out.
"""

LONGEST_SHOWN = 60  # characters of what a file holds, in an error


class UserError(Exception):
    """Wrong usage or input."""

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message  # fastai rewrites the `args` of whatever a callback raises

    def __str__(self):
        return self.message


class DataError(UserError):
    """Data that is missing, damaged or not to be had."""

    exit_code = 3


class TrainingDiverged(UserError):
    """The loss became NaN or infinite."""

    exit_code = 4


class ProcessLost(UserError):
    """One of several processes that train together has ended."""


class ExportError(UserError):
    """An export that is missing, damaged or not trusted."""

    exit_code = 5


class ExportWarning(UserWarning):
    """An export works, but not exactly as where it was made."""


class DataWarning(UserWarning):
    """Other data is used than was hoped for."""


class Interrupted(KeyboardInterrupt):
    """A signal to stop came, and what was done is saved. No Exception, so that nothing on the way takes it for one."""

    def __init__(self, signal_number: int, words: str):
        super().__init__(words)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


class TrackingWarning(UserWarning):
    """A run goes on without being logged to a tracker that it should be logged to."""


def shown(value) -> str:
    """A value from somebody else's file, fit for a line of an error: short, and nothing in it rules a terminal."""
    if isinstance(value, dict | list):
        return "a list" if isinstance(value, list) else "an object"
    words = repr(value[: LONGEST_SHOWN + 1] if isinstance(value, str) else value)
    return words if len(words) <= LONGEST_SHOWN + 2 else f"{words[:LONGEST_SHOWN]}…"


def first_line(error) -> str:
    """What an error says, in one line of some length; its kind if it says nothing."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
