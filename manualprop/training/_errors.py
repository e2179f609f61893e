"""Errors that are the user's to mend: the command line prints their text alone, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Base of the errors whose text says what must hold, what was given and what to do."""


class InputValueError(UserError, ValueError):
    """A value out of its range, or data that does not fit the model."""


class InputTypeError(UserError, TypeError):
    """Data of a type that cannot be trained on."""


class NonFiniteLossError(UserError, FloatingPointError):
    """The loss became infinite or nan; the weights are those before the update that it would have made."""


class RunDirectoryError(UserError, FileExistsError):
    """The run directory is taken, busy, or holds nothing to resume."""
