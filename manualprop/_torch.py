"""The versions of torch that this package is tested with, one warning for any other, and a private name of torch."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

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


def leave_to_python(function: Callable[..., Any]) -> None:
    """Keep ``torch.compile`` from compiling the frames of a function; what it calls is compiled as ever.

    As ``torch._dynamo.eval_frame.skip_code``, without the import of the compiler. Seen in 2.11 to 2.14.
    """
    frames = torch._C._dynamo.eval_frame
    strategy = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
    frames.set_code_exec_strategy(function.__code__, strategy)
