"""``swap`` and ``unswap``: only the class of a layer changes."""

from collections.abc import Callable, Container, Iterator
from typing import Any

from torch import nn

from manualprop._swap._calls import WITHOUT_RULE, calls_in_forward
from manualprop._swap._changes import Change, apply, revert
from manualprop._swap._check import prove
from manualprop._swap._functions import COUNTERPARTS, FORWARD, Forward, own_forward, running_ours, switches
from manualprop._swap._fuse import PROGRAM, fused_from, fusion
from manualprop._swap._report import Model, Report, Row
from manualprop._swap._select import Selection, selected
from manualprop._swap._twins import CONTAINERS, bare_functions, is_rebound, no_twin, original, title, twin


def swap(
    model: Model,
    *,
    only: Selection = None,
    skip: Selection = None,
    check: Any = None,
    fuse: bool = False,
    functions: bool = False,
) -> Report[Model]:
    """Give every layer of ``model`` the class of its hand-derived twin in :mod:`manualprop.nn`.

    Only the class changes, in place.  Parameters, buffers, hooks, names, tied weights and training mode stay,
    and so does everything that refers to a layer or a parameter, such as an optimizer.  Subclasses of torch
    layers, parametrized layers and layers without a twin are left as they are, and listed with the reason.  A
    model that is itself such a layer is swapped too.  Swapping twice is the same as swapping once.

    Args:
        model: any module.
        only: the layers to swap: a class of modules (instances of subclasses count), a name pattern (as in a
            shell: ``"encoder.*.mlp"``; a module that matches includes everything inside it), a function of a
            path and a module, or several of these (one match is enough).  None: all.
        skip: the layers not to swap, in the same terms.
        check: inputs on which to compare the model before and after: a tensor, a tuple of positional
            arguments, or a dict of keyword arguments.  See below.
        fuse: whether neighbours among the swapped layers run as one block if that keeps less for backward.
            This applies to every :class:`torch.nn.Sequential`, which becomes a
            :class:`manualprop.nn.FusedSequential`, and likewise every :class:`manualprop.nn.Residual`; and to MLPs (like
            those of GPT-2, Llama, ViT and T5), the layers of BERT and of torch's transformer, and modules of batch
            norms and convolutions, which get a subclass of their class.  Layers, paths, ``state_dict``, shared weights
            and hooks stay in place.
        functions: whether torch's functions that a ``forward`` calls (``F.relu(x)``, ``torch.relu(x)``, ``x.relu()``)
            run our rules too, in the modules that ``only`` and ``skip`` select.  These modules get an attribute
            ``forward`` that calls the forward of their class in a torch-function mode.

    Returns:
        a :class:`Report`, which prints as a table: path, from, to, why not.  It also has ``model``, and the functions
        that forwards call directly: ``functions`` run our rules, ``calls`` torch's.

    Raises:
        TypeError: if ``model`` is not a module, or ``only`` or ``skip`` is none of the above.
        ValueError: if a pattern matches no module, or if the model cannot be compared: it has uninitialised
            parameters, returns no floating tensor, or gives another result the second time.
        RuntimeError: if the swapped model differs; the error names the first layer (in the order of
            execution) that makes it differ.  The model is then as it was.

    The check runs forward and backward passes of the model in its current mode, each with the same random
    numbers and on copies of the parameters and buffers.  It leaves no trace: gradients, running statistics
    and random state stay as they were.  It compares all floating outputs, a loss (a fixed random projection
    of the outputs), the gradient of the loss for every parameter and floating input, and the buffers after
    the pass, such as running statistics.

    The limit of a difference is measured.  A tensor may be off for two reasons: rounding, and a wrong
    formula.  The model before the swap runs in its own precision and again in float64 (there every
    intermediate result is kept in float64, also where the model asks for float32).  Their difference e is
    what rounding does to that tensor in that model.  One unit of rounding is then u = e + a eps s, where s is
    the tensor's largest value, eps belongs to the model's precision, and a is the median of e / (eps s) over
    all tensors: so a tensor for which torch was lucky gets the usual limit of this model.  Parameters of one
    layer share e and s.  The swapped model must be within 4 u of the float64 run in its own precision,
    **and** within 4 u (2e-16 / eps) of it when it runs in float64 itself.  There rounding shrinks a billion
    times; the error of a wrong formula does not.  So an error of 1e-9 is found even in a bfloat16 model.  A
    float64 model is compared only in float64; e then comes from a run in float32.  At the end the bytes kept
    for backward are measured, before and after: the report names the layers that keep more.
    """
    _check_model("swap", model)
    paths = _paths(model)
    running = running_ours(model)
    wanted = running | _chosen(only, skip, paths) if functions else running
    rows, changes = _plan(model, only, skip, twin, wanted)
    if fuse:
        apply(changes)
        try:
            more_rows, more_changes = _fusions(model, skip)
        finally:
            revert(changes)
        rows, changes = rows + more_rows, changes + more_changes
    if functions:
        changes = changes + _switched(model, paths, wanted)
    proved = None
    if check is None:
        apply(changes)
    else:
        proved = prove(model, changes, check)
    return Report(model, rows, proved, *_called(model))


def unswap(model: Model, *, only: Selection = None, skip: Selection = None) -> Report[Model]:
    """Undo :func:`swap`, in place: every layer of :mod:`manualprop.nn` gets the class of its torch twin.

    Args:
        model: any module, swapped or built from :mod:`manualprop.nn`.
        only: the layers to change back, as for :func:`swap`.
        skip: the layers to leave, in the same terms.

    Raises:
        TypeError: if ``model`` is not a module, or ``only`` or ``skip`` is none of the above.
        ValueError: if a pattern matches no module.
    """
    _check_model("unswap", model)
    rows, changes = _plan(model, only, skip, original)
    paths = _paths(model)
    chosen = _chosen(only, skip, paths)
    more_rows, fused = _unfusions(model, chosen)
    apply(changes)
    revert(fused)
    apply(_switched(model, paths, running_ours(model) - chosen))
    return Report(model, rows + more_rows)


Classes = Callable[[type[nn.Module]], type[nn.Module] | None]


def _paths(model: nn.Module) -> dict[nn.Module, list[str]]:
    """{module: all its paths}."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    return paths


def _chosen(only: Selection, skip: Selection, paths: dict[nn.Module, list[str]]) -> set[nn.Module]:
    return selected(only, "only", paths, True) - selected(skip, "skip", paths, False)


def _plan(
    model: nn.Module,
    only: Selection,
    skip: Selection,
    classes: Classes,
    on: Container[nn.Module] = (),
) -> tuple[tuple[Row, ...], list[Change]]:
    """The rows of the report, and the changes to make; ``on``: where torch's functions are to run our rules."""
    paths = _paths(model)
    chosen = _chosen(only, skip, paths)
    rows, changes = [], []
    for module, (path, *_) in paths.items():
        row, after = _judged(path, module, module in chosen, classes)
        if row is not None:
            rows.append(row)
        if after is not None:
            changes.append(Change(path, module, type(module), after))
        if classes is twin and twin(type(module)) is None:
            rows.extend(_function_rows(path, module, module in on))
    return tuple(rows), changes


def _fusions(model: nn.Module, skip: Selection) -> tuple[tuple[Row, ...], list[Change]]:
    """The rows and changes that fuse containers and MLPs, after their layers are swapped."""
    rows, changes = [], []
    kept = selected(skip, "skip", _paths(model), False)
    for path, module in model.named_modules():
        if module in kept or is_rebound(module):
            continue
        found = fusion(module, kept)
        if found is None:
            continue
        before = title(type(module))
        if isinstance(found, str):
            rows.append(Row(path, before, None, found))
        else:
            rows.append(Row(path, before, f"{title(found.after)}: {found.runs}", ""))
            changes.append(Change(path, module, type(module), found.after, True, found.attributes))
    return tuple(rows), changes


def _unfusions(model: nn.Module, chosen: set[nn.Module]) -> tuple[tuple[Row, ...], list[Change]]:
    """The rows and changes that undo fused classes."""
    rows, changes = [], []
    for path, module in model.named_modules():
        before, unfused = type(module), fused_from(type(module))
        if unfused is not None and module in chosen:
            rows.append(Row(path, title(before), title(unfused), ""))
            changes.append(Change(path, module, unfused, before, True, {PROGRAM: None}))
    return tuple(rows), changes


def _switched(
    model: nn.Module, paths: dict[nn.Module, list[str]], chosen: Container[nn.Module]
) -> list[Change]:
    """The changes after which torch's functions run our rules in the forward of the chosen modules alone."""

    def is_plain(module: nn.Module) -> bool:
        cls = type(module)
        is_torchs_leaf = cls.__module__.startswith("torch.nn.") and next(module.children(), None) is None
        return is_torchs_leaf or title(cls).startswith("manualprop") or isinstance(module, CONTAINERS)

    wanted = switches(model, chosen, is_plain)
    changes = []
    for module, (path, *_) in paths.items():
        old, on = own_forward(module), wanted.get(module)
        if on != (None if old is None else old.on):
            new = {} if on is None else {FORWARD: Forward(module, on)}
            replaced = {} if old is None else {FORWARD: old}
            cls = type(module)
            changes.append(Change(path, module, cls, cls, attributes=new, replaced=replaced))
    return changes


def _called(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The functions that forwards call directly: that run torch's rules, that run ours, and that have none here."""
    running = running_ours(model)
    ours = {call for call, its in calls_in_forward(running).items() if COUNTERPARTS.keys() >= set(its)}
    others = calls_in_forward(module for module in model.modules() if module not in running)
    every = calls_in_forward(model.modules())
    without = tuple(call for call in every if call.partition(" in ")[0] in WITHOUT_RULE)
    torchs = [call for call in every if (call in others or call not in ours) and call not in without]
    return tuple(torchs), tuple(call for call in every if call in ours), without


def _judged(
    path: str, module: nn.Module, chosen: bool, classes: Classes
) -> tuple[Row | None, type[nn.Module] | None]:
    """The row of one module if it is a layer, and its new class if that is another."""
    before, after = title(type(module)), classes(type(module))
    if after is None:
        reason = no_twin(module)
        nothing_to_take_back = classes is original and not any(map(original, type(module).__mro__))
        # Part of a parametrized layer, which has its own row.
        within = ".parametrizations." in f".{path}."
        if reason is None or nothing_to_take_back or within:
            return None, None
        return Row(path, before, None, reason), None
    if is_rebound(module):
        return Row(path, before, None, "its forward is replaced on the instance"), None
    if not chosen:
        return Row(path, before, None, "not selected"), None
    return Row(path, before, title(after), ""), after


def _function_rows(path: str, module: nn.Module, on: bool) -> Iterator[Row]:
    for name, function in bare_functions(module):
        full = f"{path}.{name}" if path else name
        before = f"function {function.__name__}"
        if on and function in COUNTERPARTS:
            yield Row(full, before, f"manualprop.functional.{function.__name__}, in forward", "")
        else:
            yield Row(full, before, None, "a function, not a layer: build the model with a layer")


def _check_model(name: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model must be a torch.nn.Module. Got {type(model).__name__}.")
