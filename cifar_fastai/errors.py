"""The mistakes a user can make or meet, each with the exit code the command line gives it.

Whatever is raised from here is shown as its message alone, so a message names the thing and the way out.
"""


class UserError(Exception):
    """Wrong usage or input."""

    exit_code = 2


class DataError(UserError):
    """Data that is missing, damaged or not to be had."""

    exit_code = 3


class TrainingDiverged(UserError):
    """The loss became NaN or infinite."""

    exit_code = 4


class ExportError(UserError):
    """An export that is missing, damaged or not trusted."""

    exit_code = 5


class ExportWarning(UserWarning):
    """An export works, but not exactly as where it was made."""


class TrackingWarning(UserWarning):
    """A run goes on without being logged to a tracker that it should be logged to."""
