"""Who would notice that a layer is not called."""

from torch import nn

from manualprop import _torch

# Dictionaries that torch fills: to look up all hooks by name at every call took longer than a small layer.
OF_ALL_MODULES = (
    _torch.forward_pre_hooks,
    _torch.forward_hooks,
    _torch.backward_pre_hooks,
    _torch.backward_hooks,
)


def is_heard(part: nn.Module) -> bool:
    """Whether calling ``part`` would do more than its class says: hooks, or a ``forward`` of its own.

    A hook with the attribute ``only_watches`` does not count: a receipt measures the model as it runs without it.
    """
    if "forward" in part.__dict__ or any(OF_ALL_MODULES):
        return True
    for hooks in (
        part._forward_pre_hooks,
        part._forward_hooks,
        part._backward_pre_hooks,
        part._backward_hooks,
    ):
        if hooks and not all(getattr(hook, "only_watches", False) for hook in hooks.values()):
            return True
    return False
