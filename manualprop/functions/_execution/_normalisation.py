"""ATen's kernels of the norms: the value, the mean m and r = 1 / sqrt(variance + eps).

The kernels treat half precision in different ways.  Here m and r are always float32 for half-precision input.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from manualprop._torch import batch_norm_with_statistics, transforms_active
from manualprop.functions._execution._formula import HALF, watched

Normalised = tuple[Tensor, Tensor, Tensor]


def layer_norm(x: Tensor, shape: Sequence[int], W: Tensor | None, b: Tensor | None, eps: float) -> Normalised:
    """y, m and r over the last axes; ``shape`` is their shape."""
    if x.dtype not in HALF:
        return torch.native_layer_norm(x, shape, W, b, eps)
    if torch.compiler.is_compiling():  # inductor's returns the mean in half precision
        m, r = mean_and_scale(x, range(-len(shape), 0), eps)
        return _affine((x.float() - m) * r, W, b).to(x.dtype), m, r
    return torch.native_layer_norm(x, shape, *_lifted(x, shape, W, b), eps)


def group_norm(x: Tensor, G: int, W: Tensor | None, b: Tensor | None, eps: float) -> Normalised:
    """y, and m and r (N, G), over the channels of each of G groups."""
    N, C, L = x.shape[0], x.shape[1], x.shape[2:].numel()
    if x.dtype in HALF and torch.compiler.is_compiling():  # inductor's returns the mean in half precision
        groups = x.reshape(N, G, C // G, L)
        m, r = mean_and_scale(groups, (2, 3), eps)
        W, b = (None if t is None else t.view(G, -1, 1) for t in (W, b))
        y = _affine((groups.float() - m) * r, W, b)
        return y.to(x.dtype).view(x.shape), m.view(N, G), r.view(N, G)
    W, b = (None if t is None else t.contiguous() for t in _lifted(x, (C,), W, b))
    y, m, r = torch.native_group_norm(_dense(x), W, b, N, C, L, G, eps)
    if m.dtype in HALF:
        m, r = mean_and_scale(x.reshape(N, G, C // G * L), (2,), eps)
    return y, m.reshape(N, G), r.reshape(N, G)


def batch_norm(
    x: Tensor,
    W: Tensor | None,
    b: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> Normalised:
    """y, and m and r (C,), over the batch; the running statistics are updated in place."""
    fast = torch.backends.cudnn.enabled
    y, m, r, *_ = batch_norm_with_statistics(x, W, b, running_mean, running_var, True, momentum, eps, fast)
    if x.numel() == 0 or m.dtype in HALF:
        m, r = mean_and_scale(x, (0, *range(2, x.dim())), eps)
    if x.numel() == 0:  # the mean of nothing is NaN, and would reach second derivatives
        m, r = torch.zeros_like(m), torch.zeros_like(r)
    return y, m.reshape(-1), r.reshape(-1)


def evaluated(
    x: Tensor, W: Tensor | None, b: Tensor | None, m: Tensor | None, v: Tensor | None, eps: float
) -> Tensor:
    """y of a batch norm in evaluation, for a constant mean m and variance v."""
    return torch.batch_norm(x, W, b, m, v, False, 0.0, eps, torch.backends.cudnn.enabled)


Affine = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def in_one_pass(plain: Affine) -> Affine:
    """``plain(x, m, r, W, b)``, which is W r (x - m) + b, by ATen's kernel for evaluation if it fits.

    The kernel takes a quarter of the time, and computes what forward computed, bit for bit but for the last of r.
    """

    @functools.wraps(plain)
    def fast(x: Tensor, m: Tensor, r: Tensor, W: Tensor | None, b: Tensor | None) -> Tensor:
        tensors = (x, m, r, W, b)
        one_dtype = all(t is None or t.dtype == x.dtype for t in tensors) and x.dtype not in HALF
        if watched(tensors) or not one_dtype or x.numel() == 0:
            return plain(*tensors)
        return evaluated(x, W, b, m.view(-1), r.view(-1).pow(-2), 0.0)

    return fast


def rms_norm(x: Tensor, axes: int, W: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """y, and r over the last ``axes`` axes, without a mean, from the same small operations as in ATen."""
    full = x.float() if x.dtype in HALF else x
    r = (full.square().mean(tuple(range(-axes, 0)), keepdim=True) + eps).rsqrt()
    y = full * r
    if W is not None:
        y = y * (W.float() if W.dtype in HALF else W)
    return y.to(x.dtype), r


def mean_and_scale(x: Tensor, axes: Sequence[int], eps: float) -> tuple[Tensor, Tensor]:
    """m and r over ``axes``, in full precision."""
    x = x.float() if x.dtype in HALF else x
    if x.numel() == 0:  # the mean of nothing is NaN; var_mean would warn
        mean = x.mean(tuple(axes), keepdim=True)
        return mean, mean
    variance, mean = torch.var_mean(x, tuple(axes), correction=0, keepdim=True)
    return mean, (variance + eps).rsqrt()


def _lifted(
    x: Tensor, shape: Sequence[int], W: Tensor | None, b: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """W and b, in float32 if x is in half precision on the CPU: ATen then returns m and r in float32 too."""
    if x.dtype not in HALF or not x.is_cpu:
        return W, b
    W = torch.ones(shape) if W is None else W.float()
    return W, None if b is None else b.float()


def _affine(z: Tensor, W: Tensor | None, b: Tensor | None) -> Tensor:
    y = z if W is None else z * W
    return y if b is None else y + b


def _dense(x: Tensor) -> Tensor:
    """``x`` contiguous, or channels-last if it is so already: ATen's group norm takes no other layout."""
    transformed = transforms_active()
    if x.dim() == 4 and not transformed and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()
