"""Errors that end a command, each with the exit code that scripts can rely on.

A message states the rule, the value that broke it, and the remedy, in this order.
"""


class LrmcError(Exception):
    """Base of every error that a command reports without a traceback."""

    exit_code = 1


class ConfigError(LrmcError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""

    exit_code = 2


class IncompleteArtifactError(LrmcError):
    """An input is missing, or the stage that makes it has not finished."""

    exit_code = 3


class DataError(LrmcError, ValueError):
    """An input is corrupt, or two inputs contradict each other."""

    exit_code = 4


class DirectoryInUseError(LrmcError):
    """Another process is working in the same output directory."""

    exit_code = 5


class ResourceError(LrmcError):
    """The machine or the cluster cannot give what was asked for."""

    exit_code = 6


class DiskError(LrmcError):
    """Reading or writing failed: disk full, read-only, or no permission."""

    exit_code = 7


class EvaluationError(LrmcError):
    """A model could not be scored; the message says why."""


class TrainingError(LrmcError):
    """Training failed for good; the message says why."""


class DivergedError(LrmcError):
    """Training ended with a loss far above that of the model it began with; there is no model."""

    exit_code = 8


class ObjectiveError(LrmcError):
    """A trial's score is not a finite number, so it has failed and must not be compared."""


def first_line(error: Exception) -> str:
    """The first line of an error's message; its class where there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
