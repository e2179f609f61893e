"""The checker's own random numbers.  They never equal those of a user who seeds torch's generator."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator(*key: int | str) -> torch.Generator:
    """A generator for one purpose: the same for the same key, with a seed that no one writes by hand."""
    digest = hashlib.blake2b(repr(("manualprop.verify", *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def normal(shape: Sequence[int], source: torch.Generator) -> Tensor:
    """Standard normal numbers in float64, by the inverse of the distribution.

    torch.randn would give a user's numbers if the seed were the same; this does not.
    """
    uniform = torch.rand(tuple(shape), generator=source, dtype=torch.float64)
    drawn: Tensor = torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12))
    return drawn


def normals(shapes: Sequence[Sequence[int]], key: tuple[int | str, ...]) -> list[Tensor]:
    """Standard normal numbers in several shapes, the same for the same shapes and key."""
    source = generator(*key)
    return [normal(shape, source) for shape in shapes]


# The same numbers are asked for hundreds of times: only read them.
normals_again = functools.lru_cache(maxsize=256)(normals)
