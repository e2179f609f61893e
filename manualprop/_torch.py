"""The versions of torch that this package is tested with, and one warning for any other."""

from __future__ import annotations

import re
import warnings

import torch

# The range of pyproject.toml: from the first on, below the second. docs/versions.md has what passes on each.
FIRST, BEYOND = (2, 13), (2, 15)


def warn_if_untested(version: str) -> None:
    """Warn of a version outside of the range. Parts of torch that this package calls are private, and change."""
    release = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if FIRST <= release < BEYOND:
        return
    first, beyond = (".".join(map(str, bound)) for bound in (FIRST, BEYOND))
    warnings.warn(
        f"manualprop is tested with torch {first} and later, below {beyond}. This is torch {version}: some of it may "
        f"fail. Check your model with manualprop.swap(model, check=inputs), or: pip install 'torch>={first},<{beyond}'",
        stacklevel=2,
    )


warn_if_untested(torch.__version__)
