"""Convolutions with the names, signatures and defaults of :mod:`torch.nn.functional`."""

from collections.abc import Sequence

from torch import Tensor

from manualprop import functions as rules
from manualprop.functional._checks import check_tensor, whole_number
from manualprop.functional.linear import _autocast_low

__all__ = ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]

Numbers = int | Sequence[int]  # one for all axes, or one for each
Sizes = tuple[int, ...]


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """Like :func:`torch.nn.functional.conv1d`, by :class:`manualprop.functions.Convolution`.

    Args:
        stride: step of the kernel, at least 1.
        padding: zeros on both sides, at least 0; or ``"valid"`` for 0, ``"same"`` for an output as long as the input.
        dilation: distance of the entries of the kernel in the input, at least 1.
        groups: into how many parts the channels are divided.

    Shape:
        ``input`` (N, C, X) or (C, X), ``weight`` (O, C / groups, K), ``bias`` (O,) or None -> (N, O, Q) or (O, Q)
    """
    return _convolution("conv1d", 1, input, weight, bias, stride, padding, dilation, groups)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """Like :func:`torch.nn.functional.conv2d`; :func:`conv1d` with two axes of positions."""
    return _convolution("conv2d", 2, input, weight, bias, stride, padding, dilation, groups)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers | str = 0,
    dilation: Numbers = 1,
    groups: int = 1,
) -> Tensor:
    """Like :func:`torch.nn.functional.conv3d`; :func:`conv1d` with three axes of positions."""
    return _convolution("conv3d", 3, input, weight, bias, stride, padding, dilation, groups)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
) -> Tensor:
    """Like :func:`torch.nn.functional.conv_transpose1d`, by :class:`manualprop.functions.TransposedConvolution`.

    Args:
        stride: step of the kernel in the output, at least 1.
        padding: entries cut from both sides of the output.
        output_padding: entries added behind the output, fewer than ``stride`` or ``dilation``.
        groups: into how many parts the channels are divided.
        dilation: distance of the entries of the kernel in the output, at least 1.

    Shape:
        ``input`` (N, O, Q) or (O, Q), ``weight`` (O, C / groups, K), ``bias`` (C,) or None -> (N, C, X) or (C, X)
    """
    return _transposed(
        "conv_transpose1d", 1, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
) -> Tensor:
    """Like :func:`torch.nn.functional.conv_transpose2d`; :func:`conv_transpose1d` with two axes of positions."""
    return _transposed(
        "conv_transpose2d", 2, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Numbers = 1,
    padding: Numbers = 0,
    output_padding: Numbers = 0,
    groups: int = 1,
    dilation: Numbers = 1,
) -> Tensor:
    """Like :func:`torch.nn.functional.conv_transpose3d`; :func:`conv_transpose1d` with three axes of positions."""
    return _transposed(
        "conv_transpose3d", 3, input, weight, bias, stride, padding, output_padding, groups, dilation
    )


def _convolution(
    name: str,
    axes: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Numbers,
    padding: Numbers | str,
    dilation: Numbers,
    groups: int,
) -> Tensor:
    batched = _is_batched(name, axes, input, weight)
    x = input if batched else input.unsqueeze(0)
    s, p, d, Q = _options(name, axes, x.shape[2:], weight.shape[2:], stride, padding, dilation)
    x, weight, bias = _autocast_low(x, weight, bias)
    y: Tensor = rules.Convolution.apply(x, weight, bias, s, p, d, _groups(name, groups), Q)
    return y if batched else y.squeeze(0)


def _options(
    name: str, axes: int, X: Sizes, K: Sizes, stride: Numbers, padding: Numbers | str, dilation: Numbers
) -> tuple[Sizes, Sizes, Sizes, Sizes | None]:
    """s, p, d and Q of :class:`manualprop.functions.Convolution`."""
    s, d = _numbers(name, "stride", axes, stride), _numbers(name, "dilation", axes, dilation)
    if isinstance(padding, str):
        p, Q = _named_padding(name, padding, X, K, s, d)
        return s, p, d, Q
    return s, _numbers(name, "padding", axes, padding), d, None


def _transposed(
    name: str,
    axes: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Numbers,
    padding: Numbers,
    output_padding: Numbers,
    groups: int,
    dilation: Numbers,
) -> Tensor:
    batched = _is_batched(name, axes, input, weight)
    given = {"stride": stride, "padding": padding, "output_padding": output_padding, "dilation": dilation}
    s, p, behind, d = (_numbers(name, what, axes, value) for what, value in given.items())
    if min(behind) < 0:
        raise RuntimeError(f"{name}: output_padding must not be negative. Got {output_padding}.")
    y = input if batched else input.unsqueeze(0)
    y, weight, bias = _autocast_low(y, weight, bias)
    sizes = zip(s, y.shape[2:], p, d, weight.shape[2:], behind, strict=True)
    X = tuple(s * (q - 1) - 2 * p + d * (k - 1) + 1 + more for s, q, p, d, k, more in sizes)
    x: Tensor = rules.TransposedConvolution.apply(y, weight, bias, s, p, d, _groups(name, groups), X)
    return x if batched else x.squeeze(0)


def _is_batched(name: str, axes: int, input: Tensor, weight: Tensor) -> bool:
    check_tensor(name, input)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: weight must be a Tensor. Got {type(weight).__name__}.")
    if input.dim() not in (axes + 1, axes + 2):
        raise RuntimeError(
            f"{name}: input must be {axes + 1}D (unbatched) or {axes + 2}D (batched). Got {list(input.shape)}."
        )
    if weight.dim() != axes + 2:
        raise RuntimeError(
            f"{name}: weight must have {axes + 2} axes, two of channels and {axes} of positions. "
            f"Got {list(weight.shape)}."
        )
    if weight.shape[1] == 0:  # torch's convolution then loses the channels of the output too
        raise RuntimeError(f"{name}: weight must have channels. Got {list(weight.shape)}.")
    return input.dim() == axes + 2


def _numbers(name: str, what: str, axes: int, value: Numbers) -> Sizes:
    """One number for each axis."""
    if isinstance(value, str):
        raise TypeError(f"{name}: {what} must be numbers, not a str. Got {value!r}.")
    numbers = tuple(map(whole_number, value if isinstance(value, list | tuple) else (value,)))
    if any(number is None for number in numbers):
        raise TypeError(f"{name}: {what} must be whole numbers. Got {value!r}.")
    if len(numbers) not in (1, axes):
        raise RuntimeError(f"{name}: {what} must be one number, or {axes}. Got {list(numbers)}.")
    return numbers if len(numbers) == axes else numbers * axes


def _groups(name: str, groups: int) -> int:
    """How many groups, as a Python number."""
    number: int | None = whole_number(groups)
    if number is None:
        raise TypeError(f"{name}: groups must be a whole number. Got {groups!r}.")
    return number


def _named_padding(
    name: str, padding: str, X: Sizes, K: Sizes, s: Sizes, d: Sizes
) -> tuple[Sizes, Sizes | None]:
    """The padding in front of each axis, and the size of the output; None for what numbers give."""
    if padding == "valid":
        return (0,) * len(K), None
    if padding != "same":
        raise RuntimeError(f"{name}: padding must be numbers, 'valid' or 'same'. Got {padding!r}.")
    if any(step != 1 for step in s):
        raise RuntimeError(
            f"{name}: padding='same' must have stride 1. Got {list(s)}. Use numbers of padding."
        )
    added = [d * (k - 1) for d, k in zip(d, K, strict=True)]
    p = tuple(n // 2 for n in added)
    return p, None if all(n % 2 == 0 for n in added) else tuple(X)
