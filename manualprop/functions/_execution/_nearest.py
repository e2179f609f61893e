"""Which element torch's nearest interpolation takes: its kernels round i n / o in ways of their own.

Where i n / o is an integer but for rounding, the kernels of contiguous and of channels-last tensors, in float32 and float64,
take different neighbours.  So the elements are read from the kernel, by interpolating the numbers 0, 1, 2, ...
"""

import ctypes
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manualprop._torch import transforms_active, without_modes
from manualprop.functions._execution._axes import memory_format
from manualprop.functions._execution._formula import HALF


@dataclass(frozen=True)
class Kernel:  # no tuple: torch.func would take it apart
    """What decides which of torch's kernels interpolates a tensor, and how it rounds."""

    device: str
    dtype: torch.dtype
    layout: torch.memory_format
    channels: int
    axes: int

    @staticmethod
    def of(x: Tensor) -> "Kernel":
        dtype = torch.float32 if x.dtype in HALF or not x.is_floating_point() else x.dtype
        # Compiled code does not read the kernel, and its number of channels may vary.
        channels = 0 if torch.compiler.is_compiling() else x.shape[1]
        return Kernel(x.device.type, dtype, memory_format(x), channels, x.dim() - 2)


def nearest_elements(n: int, o: int, scale: float | None, exact: bool, kernel: Kernel) -> tuple[int, ...]:
    """For each output element, the input element that it copies."""
    if torch.compiler.is_compiling() or kernel.device not in ("cpu", "cuda"):
        return _as_compiled(n, o, scale, exact)
    return _read(n, o, scale, exact, kernel)


def copies(x: Tensor, size: Any, scales: Any, exact: bool, kernel: Kernel) -> Tensor:
    """The interpolated tensor; element by element under vmap, which has no rule for the kernel of ``nearest-exact``."""
    if not (exact and transforms_active()):
        return F.interpolate(x, size, scales, "nearest-exact" if exact else "nearest")
    for axis in range(2, x.dim()):
        n, scale = x.shape[axis], None if scales is None else scales[axis - 2]
        o = size[axis - 2] if scale is None else math.floor(n * scale)
        taken = nearest_elements(n, o, scale, exact, kernel)
        x = x.index_select(axis, torch.tensor(taken, device=x.device))
    return x


@functools.lru_cache(maxsize=512)
def _read(n: int, o: int, scale: float | None, exact: bool, kernel: Kernel) -> tuple[int, ...]:
    ones = [1] * (kernel.axes - 1)
    with without_modes(), torch.no_grad():
        numbers = torch.arange(n, dtype=kernel.dtype, device=kernel.device)
        x = numbers.expand(1, kernel.channels, *ones, n).contiguous(memory_format=kernel.layout)
        mode = "nearest-exact" if exact else "nearest"
        if scale is None:
            y = F.interpolate(x, size=[*ones, o], mode=mode)
        else:
            y = F.interpolate(x, scale_factor=[*[1.0 for _ in ones], scale], mode=mode)
        return tuple(int(j) for j in y.reshape(kernel.channels, o)[0].tolist())


def _as_compiled(n: int, o: int, scale: float | None, exact: bool) -> tuple[int, ...]:
    """As the compiler's decomposition: in float32."""
    q = _single(n / o if scale is None else 1 / scale)
    half = 0.5 if exact else 0.0
    return tuple(min(math.floor(_single((i + half) * q)), n - 1) for i in range(o))


def _single(number: float) -> float:
    """``number``, rounded to float32."""
    return ctypes.c_float(number).value
