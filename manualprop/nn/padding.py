"""Padding: each subclasses its torch twin and replaces only ``forward``."""

from torch import Tensor, nn

from manualprop import functional as F

__all__ = [
    f"{kind}Pad{d}d"
    for kind in ("Circular", "Constant", "Reflection", "Replication", "Zero")
    for d in (1, 2, 3)
]


class CircularPad1d(nn.CircularPad1d):
    """:class:`torch.nn.CircularPad1d` by :class:`manualprop.functions.CircularPad`."""

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return F.pad(input, self.padding, "circular")


class CircularPad2d(nn.CircularPad2d):
    """:class:`torch.nn.CircularPad2d` by :class:`manualprop.functions.CircularPad`."""

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return F.pad(input, self.padding, "circular")


class CircularPad3d(nn.CircularPad3d):
    """:class:`torch.nn.CircularPad3d` by :class:`manualprop.functions.CircularPad`."""

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        return F.pad(input, self.padding, "circular")


class ConstantPad1d(nn.ConstantPad1d):
    """:class:`torch.nn.ConstantPad1d` by :class:`manualprop.functions.ConstantPad`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.pad(input, self.padding, "constant", self.value)


class ConstantPad2d(nn.ConstantPad2d):
    """:class:`torch.nn.ConstantPad2d` by :class:`manualprop.functions.ConstantPad`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.pad(input, self.padding, "constant", self.value)


class ConstantPad3d(nn.ConstantPad3d):
    """:class:`torch.nn.ConstantPad3d` by :class:`manualprop.functions.ConstantPad`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.pad(input, self.padding, "constant", self.value)


class ReflectionPad1d(nn.ReflectionPad1d):
    """:class:`torch.nn.ReflectionPad1d` by :class:`manualprop.functions.ReflectionPad`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.pad(input, self.padding, "reflect")


class ReflectionPad2d(nn.ReflectionPad2d):
    """:class:`torch.nn.ReflectionPad2d` by :class:`manualprop.functions.ReflectionPad`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.pad(input, self.padding, "reflect")


class ReflectionPad3d(nn.ReflectionPad3d):
    """:class:`torch.nn.ReflectionPad3d` by :class:`manualprop.functions.ReflectionPad`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.pad(input, self.padding, "reflect")


class ReplicationPad1d(nn.ReplicationPad1d):
    """:class:`torch.nn.ReplicationPad1d` by :class:`manualprop.functions.ReplicationPad`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.pad(input, self.padding, "replicate")


class ReplicationPad2d(nn.ReplicationPad2d):
    """:class:`torch.nn.ReplicationPad2d` by :class:`manualprop.functions.ReplicationPad`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.pad(input, self.padding, "replicate")


class ReplicationPad3d(nn.ReplicationPad3d):
    """:class:`torch.nn.ReplicationPad3d` by :class:`manualprop.functions.ReplicationPad`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.pad(input, self.padding, "replicate")


class ZeroPad1d(nn.ZeroPad1d):
    """:class:`torch.nn.ZeroPad1d` by :class:`manualprop.functions.ConstantPad`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.pad(input, self.padding, "constant", self.value)


class ZeroPad2d(nn.ZeroPad2d):
    """:class:`torch.nn.ZeroPad2d` by :class:`manualprop.functions.ConstantPad`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.pad(input, self.padding, "constant", self.value)


class ZeroPad3d(nn.ZeroPad3d):
    """:class:`torch.nn.ZeroPad3d` by :class:`manualprop.functions.ConstantPad`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.pad(input, self.padding, "constant", self.value)
