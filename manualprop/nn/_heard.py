"""Whether a layer must really be called, because a hook or its own ``forward`` would run."""

from torch import nn

from manualprop import _torch

# Dictionaries that torch fills.  Looking up all hooks by name at every call took longer than a small layer.
OF_ALL_MODULES = (
    _torch.forward_pre_hooks,
    _torch.forward_hooks,
    _torch.backward_pre_hooks,
    _torch.backward_hooks,
)


def is_heard(part: nn.Module) -> bool:
    """Whether a call of ``part`` does more than its class says: it has hooks or its own ``forward``.

    A hook with the attribute ``only_watches`` does not count, so a receipt does not change what it measures.
    """
    return "forward" in part.__dict__ or has_hooks(part)


def has_hooks(part: nn.Module) -> bool:
    """Whether a call of ``part`` runs hooks, of its own or of all modules, that do not only watch."""
    if any(OF_ALL_MODULES):
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
