"""Exercises in deriving gradients, marked by `manualprop.verify`: they say how a gradient is wrong."""

from manualprop._practice._mark import Mark as Mark
from manualprop._practice._practice import practice as practice

__all__ = ["Mark", "practice"]
