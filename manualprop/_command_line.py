"""What the commands share that take a user's model: the parser, the model by its name, made-up inputs."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:  # --help answers without torch
    from torch import Tensor
    from torch.nn import Module


class Mistake(Exception):
    """Of the user: its text is one line for them."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are mistakes."""

    def error(self, message: str) -> NoReturn:
        """Raise the complaint."""
        raise Mistake(message)


def named_model(where: str) -> Module:
    """The model that MODULE:NAME names, or makes; modules of the working directory are found."""
    import torch

    home, colon, name = where.partition(":")
    if not (home and colon and name):
        raise Mistake(f"the model must be given as MODULE:NAME, such as mymodule:build. Got {where!r}.")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(home)
    except Exception as error:  # the module is the user's: whatever it raises
        raise Mistake(f"the module {home!r} must be importable. {told(error)}") from error
    finally:
        sys.path.remove(os.getcwd())
    for part in name.split("."):
        if not hasattr(found, part):
            similar = difflib.get_close_matches(part, dir(found), n=1)
            hint = f" Did you mean {similar[0]!r}?" if similar else ""
            raise Mistake(f"{home} must have an attribute {name!r}, which it has not.{hint}")
        found = getattr(found, part)
    if callable(found) and not isinstance(found, torch.nn.Module):
        try:
            found = found()
        except Exception as error:  # so is the function
            raise Mistake(
                f"{where} must make a model when called without arguments. {told(error)}"
            ) from error
    if not isinstance(found, torch.nn.Module):
        raise Mistake(f"{where} must be, or return, a torch.nn.Module. Got {type(found).__name__}.")
    return found


def made_up(text: str) -> Tensor:
    """A made-up tensor of a description such as 32x128:long:1000."""
    import torch

    parts = re.fullmatch(r"(\d+(?:x\d+)*)(?::(\w+))?(?::(\d+))?", text)
    if parts is None:
        raise Mistake(f"an input must look like 32x128 or 32x128:long:1000. Got {text!r}.")
    shape = [int(size) for size in parts[1].split("x")]
    dtype = getattr(torch, parts[2] or "float32", None)
    if not isinstance(dtype, torch.dtype):
        raise Mistake(f"the dtype of an input must be one of torch, such as bfloat16. Got {parts[2]!r}.")
    if dtype.is_floating_point or dtype.is_complex:
        if parts[3]:
            raise Mistake(f"only inputs of integers have a bound. Got {text!r}.")
        return torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else None).to(dtype)
    bound = int(parts[3] or 2)
    if bound == 0:
        raise Mistake(f"the bound of integers must be positive: they are from 0 to BOUND - 1. Got {text!r}.")
    return torch.randint(bound, shape).to(dtype)


def told(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"It raised {type(error).__name__}{': ' * bool(text)}{text}"
