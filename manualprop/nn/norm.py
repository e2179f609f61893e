"""Normalisations: each subclasses its torch twin and replaces only ``forward``.

The instance norms replace ``_apply_instance_norm``; torch's ``forward`` calls it after its checks.
"""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from manualprop import functional as F

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "RMSNorm",
]


class LayerNorm(nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` by :class:`manualprop.functions.LayerNorm`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """:class:`torch.nn.RMSNorm` by :class:`manualprop.functions.RMSNorm`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class GroupNorm(nn.GroupNorm):
    """:class:`torch.nn.GroupNorm` by :class:`manualprop.functions.GroupNorm`."""

    def forward(self, input: Tensor) -> Tensor:
        return F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


Statistics = tuple[Tensor | None, Tensor | None, bool, float]


def _statistics(module: _BatchNorm, input: Tensor) -> Statistics:
    """The first steps of torch's batch norms in ``forward``: count the batch, choose the statistics.

    Returns:
        Running mean and variance, whether to normalise by the batch, and the momentum.
    """
    module._check_input_dim(input)
    momentum = 0.0 if module.momentum is None else module.momentum
    if module.training and module.track_running_stats and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:  # cumulative moving average
            momentum = 1.0 / float(module.num_batches_tracked)
    use_buffers = not module.training or module.track_running_stats
    mean, var = (module.running_mean, module.running_var) if use_buffers else (None, None)
    by_batch = module.training or (module.running_mean is None and module.running_var is None)
    return mean, var, by_batch, momentum


def _batch_norm(module: _BatchNorm, input: Tensor) -> Tensor:
    mean, var, by_batch, momentum = _statistics(module, input)
    return F.batch_norm(input, mean, var, module.weight, module.bias, by_batch, momentum, module.eps)


class BatchNorm1d(nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` by :class:`manualprop.functions.BatchNorm`, or ``BatchNormEvaluation``."""

    def forward(self, input: Tensor) -> Tensor:
        return _batch_norm(self, input)


class BatchNorm2d(nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` by :class:`manualprop.functions.BatchNorm`, or ``BatchNormEvaluation``."""

    def forward(self, input: Tensor) -> Tensor:
        return _batch_norm(self, input)


class BatchNorm3d(nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` by :class:`manualprop.functions.BatchNorm`, or ``BatchNormEvaluation``."""

    def forward(self, input: Tensor) -> Tensor:
        return _batch_norm(self, input)


class LazyBatchNorm1d(nn.LazyBatchNorm1d):
    """:class:`torch.nn.LazyBatchNorm1d`; it becomes :class:`BatchNorm1d` at its first input."""

    cls_to_become = BatchNorm1d

    def forward(self, input: Tensor) -> Tensor:
        return _batch_norm(self, input)


class LazyBatchNorm2d(nn.LazyBatchNorm2d):
    """:class:`torch.nn.LazyBatchNorm2d`; it becomes :class:`BatchNorm2d` at its first input."""

    cls_to_become = BatchNorm2d

    def forward(self, input: Tensor) -> Tensor:
        return _batch_norm(self, input)


class LazyBatchNorm3d(nn.LazyBatchNorm3d):
    """:class:`torch.nn.LazyBatchNorm3d`; it becomes :class:`BatchNorm3d` at its first input."""

    cls_to_become = BatchNorm3d

    def forward(self, input: Tensor) -> Tensor:
        return _batch_norm(self, input)


def _instance_norm(module: _InstanceNorm, input: Tensor) -> Tensor:
    return F.instance_norm(
        input,
        module.running_mean,
        module.running_var,
        module.weight,
        module.bias,
        module.training or not module.track_running_stats,
        module.momentum if module.momentum is not None else 0.0,
        module.eps,
    )


class InstanceNorm1d(nn.InstanceNorm1d):
    """:class:`torch.nn.InstanceNorm1d` by :class:`manualprop.functions.BatchNorm`, or ``BatchNormEvaluation``."""

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return _instance_norm(self, input)


class InstanceNorm2d(nn.InstanceNorm2d):
    """:class:`torch.nn.InstanceNorm2d` by :class:`manualprop.functions.BatchNorm`, or ``BatchNormEvaluation``."""

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return _instance_norm(self, input)


class InstanceNorm3d(nn.InstanceNorm3d):
    """:class:`torch.nn.InstanceNorm3d` by :class:`manualprop.functions.BatchNorm`, or ``BatchNormEvaluation``."""

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return _instance_norm(self, input)
