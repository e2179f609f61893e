"""Whether a layer must really be called, because a hook or its own ``forward`` would run."""

from torch import nn
from torch.nn.modules import module as all_modules

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_heard(part: nn.Module) -> bool:
    """Whether a call of ``part`` does more than its class says: it has hooks or its own ``forward``.

    A hook with the attribute ``only_watches`` does not count, so a receipt does not change what it measures.
    """
    if "forward" in part.__dict__ or any(getattr(all_modules, f"_global{name}") for name in HOOKS):
        return True
    return any(
        not getattr(hook, "only_watches", False) for name in HOOKS for hook in getattr(part, name).values()
    )
