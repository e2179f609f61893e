"""Every private name of torch that this package uses, a line each, and one warning for a version that is not tested.

Beside each name: what it is for, and the versions it was seen in.  A private name may change with any version.  What differs between versions is settled here, and nowhere else.  Attributes of
torch's objects that are private too: ``Tensor._base``, ``._is_view()``, ``._backward_hooks`` and ``._post_accumulate_grad_hooks``, ``UntypedStorage._cdata`` (2.11 to 2.14);
``Optimizer._optimizer_step_pre_hooks``, ``._optimizer_step_post_hooks`` and ``._opt_called`` (2.11 to 2.14);
``Module._forward_hooks``, ``._forward_pre_hooks``, ``._backward_hooks`` and ``._backward_pre_hooks`` (2.11 to 2.14);
``_ConvNd._conv_forward``, ``._reversed_padding_repeated_twice`` and ``_ConvTransposeNd._output_padding`` (2.13).
"""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

# The range of pyproject.toml: from the first on, below the second. docs/versions.md has what passes on each.
FIRST, BEYOND = (2, 13), (2, 15)


def warn_if_untested(version: str) -> None:
    """Warn of a version outside of the range. Parts of torch that this package calls are private, and change."""
    release = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if FIRST <= release < BEYOND:
        return
    first, beyond = (".".join(map(str, bound)) for bound in (FIRST, BEYOND))
    warnings.warn(
        f"manualprop is tested with torch {first} and later, below {beyond}. This is torch {version}: some of it may "
        f"fail. Check your model with manualprop.swap(model, check=inputs), or: pip install 'torch>={first},<{beyond}'",
        stacklevel=2,
    )


warn_if_untested(torch.__version__)  # before a name that it may lack

# Whether a torch.func transform (vmap, grad, jvp, ...) encloses this call.  2.11 to 2.14
from torch._C import _are_functorch_transforms_active as transforms_active

# What a class has as its __torch_function__ if it overrides nothing.  2.11 to 2.14
from torch._C import _disabled_torch_function_impl as no_torch_function

# torch.inference_mode(True) at half the price.  2.11 to 2.14
from torch._C import _InferenceMode as InferenceMode

# Whether autocast is on for any device: one call instead of one for each.  2.11 to 2.14
from torch._C import _is_any_autocast_enabled as any_autocast

# False within torch.overrides.DisableTorchFunction.  2.11 to 2.14
from torch._C import _is_torch_function_enabled as torch_function_enabled

# vmap's wrapper: put on, taken off, and asked for.  2.11 to 2.14
from torch._C._functorch import _add_batch_dim as add_batch_dim
from torch._C._functorch import get_unwrapped as get_unwrapped
from torch._C._functorch import is_batchedtensor as is_batchedtensor
from torch._C._functorch import maybe_get_bdim as maybe_get_bdim
from torch._C._functorch import maybe_get_level as maybe_get_level

# The wrapper of the older vmap, by which autograd.grad(is_grads_batched=True) works.  2.11 to 2.14
from torch._C._functorch import is_legacy_batchedtensor as is_legacy_batchedtensor

# The tensor itself, where its transform has ended.  2.11 to 2.14
from torch._C._functorch import unwrap_if_dead as unwrap_if_dead

# torch.autograd.grad without its checks of the arguments, which take as long as a small backward.  2.11 to 2.14
from torch.autograd.graph import _engine_run_backward as run_backward

# Forward mode on within a Function's jvp, where torch turns it off.  2.11 to 2.14
from torch.autograd.forward_ad import _set_fwd_grad_enabled as forward_mode

# The names of the reductions as torch.nn.functional reads them, with its errors and warnings.  2.11 to 2.14
from torch.nn import _reduction as reductions

# Hooks of every module.  2.11 to 2.14
from torch.nn.modules.module import _global_backward_hooks as backward_hooks
from torch.nn.modules.module import _global_backward_pre_hooks as backward_pre_hooks
from torch.nn.modules.module import _global_forward_hooks as forward_hooks
from torch.nn.modules.module import _global_forward_pre_hooks as forward_pre_hooks

# Hooks of every optimizer's step.  2.11 to 2.14
from torch.optim.optimizer import _global_optimizer_post_hooks as optimizer_post_hooks
from torch.optim.optimizer import _global_optimizer_pre_hooks as optimizer_pre_hooks

# Sees every operation.  2.11 to 2.14
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

# Within, no mode sees anything.  2.11 to 2.14
from torch.utils._python_dispatch import _disable_current_modes as without_modes

# Whether a tensor is of a subclass that holds other tensors.  2.11 to 2.14
from torch.utils._python_dispatch import is_traceable_wrapper_subclass as is_wrapper

# What lies within tuples, lists and dicts.  2.11 to 2.14
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map

# The primal of a dual number.  2.11 to 2.14
unpack_dual: Callable[..., Any] = torch._VF._unpack_dual

# What torch.nn.functional.cross_entropy and nll_loss call; their stubs name other types.  2.11 to 2.14
cross_entropy_loss: Callable[..., Any] = torch._C._nn.cross_entropy_loss
nll_loss: Callable[..., Any] = torch._C._nn.nll_loss_nd

# Batch norm, with the statistics that its backward needs.  2.11 to 2.14
batch_norm_with_statistics: Callable[..., Any] = torch._batch_norm_impl_index

# A tensor that shares the memory of another without being its view.  2.11 to 2.14
unsafe_view: Callable[..., Any] = torch.ops.aten._unsafe_view

# x W^T by oneDNN, in float32; None where torch is built without it.  A W with gaps takes a thousand times as long.  2.13
_by_onednn: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
product_of_rows: Callable[[torch.Tensor, torch.Tensor], Any] | None = (
    None if _by_onednn is None else lambda x, W: _by_onednn(x, W.contiguous(), None, "none", [], "")
)


class Missing(torch.nn.Module):
    """Stands for a module that this version of torch lacks, so that all others can be imported."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            f"{type(self).__name__}: torch 2.13 or newer is needed. This is torch {torch.__version__}"
        )


# Public, from 2.13 on.
if TYPE_CHECKING:
    from torch.nn import LinearCrossEntropyLoss as LinearCrossEntropyLoss
else:
    LinearCrossEntropyLoss = getattr(torch.nn, "LinearCrossEntropyLoss", Missing)

# The module of the compiler's front end, whose import takes seconds.  2.11 to 2.14
DYNAMO = "torch._dynamo"


def forward_level() -> int:
    """The number of the level of forward mode, below 0 outside.  2.11 to 2.14"""
    return forward_ad._current_level


def mark_dynamic(t: torch.Tensor, axis: int) -> None:
    """Let a compiled function take any length of an axis, if it can.  2.11 to 2.14"""
    torch._dynamo.maybe_mark_dynamic(t, axis)


def _schema_of_aten(name: str) -> Any:
    """The schema of torch.name, or None.  2.11 to 2.14"""
    packet = getattr(torch.ops.aten, name, None)
    for overload in packet.overloads() if packet is not None else ():
        schema = getattr(packet, overload)._schema
        if "out" not in overload and "Dimname" not in str(schema):
            return schema
    return None


def arguments_of_aten(name: str) -> list[tuple[str, bool]]:
    """The arguments of torch.name, and whether each must be given; nothing if there is no such operator."""
    schema = _schema_of_aten(name)
    return [] if schema is None else [(a.name, not a.has_default_value()) for a in schema.arguments]


def results_of_aten(name: str) -> int:
    """How many results torch.name has; 0 if there is no such operator."""
    schema = _schema_of_aten(name)
    return 0 if schema is None else len(schema.returns)


def taken_apart(function: Callable[..., Any], samples: list[torch.Tensor]) -> torch.fx.GraphModule:
    """A function traced into elementary operations: silu is a product, a quotient, a sum and an exponential.  2.13"""
    from torch._decomp import decomposition_table  # these two take most of a second to import
    from torch.fx.experimental.proxy_tensor import make_fx

    table: Any = decomposition_table
    traced: torch.fx.GraphModule = make_fx(lambda *given: function(*given), decomposition_table=table)(
        *samples
    )
    return traced


def inductor(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A graph, compiled.  2.11 to 2.14"""
    from torch._inductor import compile  # seconds to import

    compiled: Callable[..., Any] = compile(graph, inputs)
    return compiled


def scan(
    step: torch.fx.GraphModule,
    carry: list[torch.Tensor],
    given: list[torch.Tensor],
    fixed: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """(carry, given[k], fixed) -> (carry, made[k]) for each k: the last carry, and all that was made, stacked.  2.13 to 2.14"""
    import torch._higher_order_ops.scan as _  # defines the operator

    found: list[torch.Tensor] = torch.ops.higher_order.scan(step, carry, given, tuple(fixed))
    return found


def with_any_length(
    before: Sequence[torch.Tensor], elements: Sequence[torch.Tensor], after: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Tensors without data: stacks of any number of ``elements``, between others.  2.13 to 2.14"""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode: Any = FakeTensorMode(shape_env=ShapeEnv(specialize_zero_one=False), allow_non_fake_inputs=True)
    stacks = [torch.stack([element] * 3) for element in elements]
    lengths = [[DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * element.dim() for element in elements]
    context: Any = StatelessSymbolicContext
    return [
        *(mode.from_tensor(t, static_shapes=True) for t in before),
        *(
            mode.from_tensor(t, symbolic_context=context(dynamic_sizes=d))
            for t, d in zip(stacks, lengths, strict=True)
        ),
        *(mode.from_tensor(t, static_shapes=True) for t in after),
    ]


def compiled_ahead(graph: torch.fx.GraphModule, inputs: Sequence[torch.Tensor], package: Path) -> Path:
    """A graph, compiled into a package.  2.13 to 2.14"""
    from torch._inductor import aot_compile  # seconds to import
    from torch._inductor.package.package import package_aoti

    options = {
        "aot_inductor.package": True,
        "max_autotune_gemm": True,
        "max_autotune_gemm_backends": "ATEN,CPP",
        "epilogue_fusion": False,  # fails for a product that is read twice
    }
    with warnings.catch_warnings(), torch.no_grad(), _micro_kernels():
        warnings.simplefilter("ignore")  # of torch's own use of what it has deprecated
        parts: Any = aot_compile(graph, tuple(inputs), options=options)
        package_aoti(str(package), parts)
        return package


@contextlib.contextmanager
def _micro_kernels() -> Iterator[None]:
    """Inside, inductor takes its own micro-kernel for a product where it has one, without measuring.  2.13

    gcc must not make a call of memset of the loop that clears a micro-kernel's sums: they would live in memory.
    """
    from torch._inductor import cpp_builder, select_algorithm

    builder: Any = cpp_builder

    def first(choices: list[Any]) -> list[Any]:
        library = select_algorithm.ExternKernelCaller
        return [c for c in choices if not isinstance(c, library)][:1] or choices[:1]

    def flags(compiler: str, *given: Any, **named: Any) -> tuple[list[str], list[str]]:
        compiling, linking = before(compiler, *given, **named)
        own = ["fno-tree-loop-distribute-patterns"] if builder._is_gcc(compiler) else []
        return [*compiling, *own], linking

    before = builder._get_optimization_cflags
    chosen = select_algorithm.get_algorithm_selector_cache().preprocessing_fns
    chosen.append(first)
    builder._get_optimization_cflags = flags
    try:
        yield
    finally:
        builder._get_optimization_cflags = before
        chosen.remove(first)


def load_program(package: Path) -> Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]:
    """A package as a function.  ``torch._inductor.aoti_load_package`` adds a tree of arguments.  2.13 to 2.14"""
    from torch._C._aoti import AOTIModelPackageLoader

    run: Callable[[Any], list[torch.Tensor]] = AOTIModelPackageLoader(
        str(package), "model", True, 1, -1
    ).boxed_run
    return lambda inputs: run([*inputs])


def leave_to_python(function: Callable[..., Any]) -> None:
    """Keep the compiler from a function's own frame, as ``torch._dynamo`` does itself; no import of it.  2.11 to 2.14"""
    frames = torch._C._dynamo.eval_frame
    strategy = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
    frames.set_code_exec_strategy(function.__code__, strategy)
