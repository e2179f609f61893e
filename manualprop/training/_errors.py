"""Errors that the user can fix: the command line prints only their text, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Base of the errors whose text says what must hold, what was given and what to do.

    Attributes:
        status: exit status of the command: 2 for a mistake in the command, 1 for a failure while it runs.
    """

    status = 2


class InputValueError(UserError, ValueError):
    """A value out of its range, or data that does not fit the model."""


class InputTypeError(UserError, TypeError):
    """Data of a type that cannot be used for training."""


class DivergedError(UserError, FloatingPointError):
    """The loss left the range in which a network learns."""

    status = 1


class NonFiniteLossError(DivergedError):
    """The loss became infinite or nan; this update was not made, and the weights are unchanged."""


class RunDirectoryError(UserError, FileExistsError):
    """The run directory has results, is in use, or has nothing to resume."""


class StorageError(UserError, OSError):
    """A file could not be written; an older file with its name is unchanged."""

    status = 1


class UnwritableError(StorageError):
    """The run directory cannot be written to at all."""

    status = 2
