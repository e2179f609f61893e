"""What the command line makes of its arguments before they are parsed, and of the parser's complaints."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from manualprop.training.run_directory import RunDirectory

DESCRIPTION = "Hand-derived backpropagation: train by batch, stochastic or mini-batch gradient descent."


def with_saved_config(arguments: Sequence[str]) -> list[str]:
    return list(arguments)


def explain(error: argparse.ArgumentError, replaced: Mapping[str, str]) -> str:
    return str(error)
