"""Who would notice that a layer is not called."""

from torch import nn
from torch.nn.modules import module as all_modules

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def is_heard(part: nn.Module) -> bool:
    """Whether calling ``part`` would do more than its class says: hooks, or a ``forward`` of its own.

    A hook with the attribute ``only_watches`` does not count: a receipt measures the model as it runs without it.
    """
    if "forward" in part.__dict__ or any(getattr(all_modules, f"_global{name}") for name in HOOKS):
        return True
    return any(
        not getattr(hook, "only_watches", False) for name in HOOKS for hook in getattr(part, name).values()
    )
