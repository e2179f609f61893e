"""Activations: each subclasses its torch twin, if there is one, and replaces only ``forward``."""

from torch import Tensor, nn

from manualprop import functional as F

__all__ = [
    "CELU",
    "ELU",
    "GELU",
    "SELU",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LogSigmoid",
    "LogSoftmax",
    "Mish",
    "ReLU",
    "ReLU6",
    "ReLUSquared",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softmax2d",
    "Softmin",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Tanh",
    "Tanhshrink",
    "Threshold",
]


class CELU(nn.CELU):
    """:class:`torch.nn.CELU` by :class:`manualprop.functions.CELU`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.celu(input, self.alpha, self.inplace)


class ELU(nn.ELU):
    """:class:`torch.nn.ELU` by :class:`manualprop.functions.ELU`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.elu(input, self.alpha, self.inplace)


class GELU(nn.GELU):
    """:class:`torch.nn.GELU` by :class:`manualprop.functions.GELU`, or ``GELUTanh``."""

    def forward(self, input: Tensor) -> Tensor:
        return F.gelu(input, self.approximate)


class Hardshrink(nn.Hardshrink):
    """:class:`torch.nn.Hardshrink` by :class:`manualprop.functions.Hardshrink`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.hardshrink(input, self.lambd)


class Hardsigmoid(nn.Hardsigmoid):
    """:class:`torch.nn.Hardsigmoid` by :class:`manualprop.functions.Hardsigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.hardsigmoid(input, self.inplace)


class Hardswish(nn.Hardswish):
    """:class:`torch.nn.Hardswish` by :class:`manualprop.functions.Hardswish`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.hardswish(input, self.inplace)


class Hardtanh(nn.Hardtanh):
    """:class:`torch.nn.Hardtanh` by :class:`manualprop.functions.Hardtanh`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.hardtanh(input, self.min_val, self.max_val, self.inplace)


class LeakyReLU(nn.LeakyReLU):
    """:class:`torch.nn.LeakyReLU` by :class:`manualprop.functions.LeakyReLU`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.leaky_relu(input, self.negative_slope, self.inplace)


class LogSigmoid(nn.LogSigmoid):
    """:class:`torch.nn.LogSigmoid` by :class:`manualprop.functions.LogSigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.logsigmoid(input)


class LogSoftmax(nn.LogSoftmax):
    """:class:`torch.nn.LogSoftmax` by :class:`manualprop.functions.LogSoftmax`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.log_softmax(input, self.dim, _stacklevel=5)


class Mish(nn.Mish):
    """:class:`torch.nn.Mish` by :class:`manualprop.functions.Mish`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.mish(input, self.inplace)


class ReLU(nn.ReLU):
    """:class:`torch.nn.ReLU` by :class:`manualprop.functions.ReLU`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(input, self.inplace)


class ReLU6(nn.ReLU6):
    """:class:`torch.nn.ReLU6` by :class:`manualprop.functions.ReLU6`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu6(input, self.inplace)


class ReLUSquared(nn.Module):
    """The square of ReLU, by :func:`manualprop.functional.relu_squared`; torch.nn has no such layer.

    Args:
        inplace: whether the result is written over the input.

    Shape:
        any -> the same
    """

    __constants__ = ("inplace",)

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.inplace = inplace

    def forward(self, input: Tensor) -> Tensor:
        return F.relu_squared(input, self.inplace)

    def extra_repr(self) -> str:
        return "inplace=True" if self.inplace else ""


class SELU(nn.SELU):
    """:class:`torch.nn.SELU` by :class:`manualprop.functions.SELU`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.selu(input, self.inplace)


class Sigmoid(nn.Sigmoid):
    """:class:`torch.nn.Sigmoid` by :class:`manualprop.functions.Sigmoid`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.sigmoid(input)


class SiLU(nn.SiLU):
    """:class:`torch.nn.SiLU` by :class:`manualprop.functions.SiLU`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(input, self.inplace)


class Softmax(nn.Softmax):
    """:class:`torch.nn.Softmax` by :class:`manualprop.functions.Softmax`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softmax(input, self.dim, _stacklevel=5)


class Softmax2d(nn.Softmax2d):
    """:class:`torch.nn.Softmax2d` by :class:`manualprop.functions.Softmax`, over the channels."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() not in (3, 4):
            raise ValueError(f"Softmax2d: expected input to be 3D or 4D, got {input.dim()}D instead")
        return F.softmax(input, -3, _stacklevel=5)


class Softmin(nn.Softmin):
    """:class:`torch.nn.Softmin` by :class:`manualprop.functions.Softmax`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softmin(input, self.dim, _stacklevel=5)


class Softplus(nn.Softplus):
    """:class:`torch.nn.Softplus` by :class:`manualprop.functions.Softplus`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softplus(input, self.beta, self.threshold)


class Softshrink(nn.Softshrink):
    """:class:`torch.nn.Softshrink` by :class:`manualprop.functions.Softshrink`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softshrink(input, self.lambd)


class Softsign(nn.Softsign):
    """:class:`torch.nn.Softsign` by :class:`manualprop.functions.Softsign`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.softsign(input)


class Tanh(nn.Tanh):
    """:class:`torch.nn.Tanh` by :class:`manualprop.functions.Tanh`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.tanh(input)


class Tanhshrink(nn.Tanhshrink):
    """:class:`torch.nn.Tanhshrink` by :class:`manualprop.functions.Tanhshrink`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.tanhshrink(input)


class Threshold(nn.Threshold):
    """:class:`torch.nn.Threshold` by :class:`manualprop.functions.Threshold`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.threshold(input, self.threshold, self.value, self.inplace)
