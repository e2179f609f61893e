"""Measures what a model keeps for its backward pass, layer by layer, by hooks on every saved tensor."""

from __future__ import annotations

import json
import random
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.parameter import is_lazy

from manualprop import _torch as _torch  # warns of an untested version
from manualprop._torch import is_wrapper, tree_leaves

if TYPE_CHECKING:
    from rich.table import Table

ROOT = "(model)"  # stands for the empty path of the model itself
BARS = 40  # the most layers in a picture
BEFORE, AFTER = "#E69F00", "#0072B2"  # Okabe and Ito's orange and blue


class LayerReceipt(NamedTuple):
    """What the calls of one module keep.  A storage is counted once, in bytes, at the first layer that saved it.

    - ``path``        its path in the model, as in ``named_modules``; empty for the model itself.
    - ``kind``        its class.
    - ``calls``       the number of calls of its forward.
    - ``kept``        bytes of storages made in forward: activations, masks, statistics, cast weights.
    - ``shared``      bytes of storages already counted at an earlier layer.
    - ``inputs``      bytes of the model's own inputs, which are alive outside anyway.
    - ``parameters``  bytes of the storages of parameters and buffers, which are alive anyway too.
    """

    path: str
    kind: str
    calls: int
    kept: int
    shared: int
    inputs: int
    parameters: int


class _Report:
    """A table that prints itself, and with rich if rich prints it."""

    def table(self) -> tuple[str, list[str], list[list[str]]]:
        """Title, header and rows; the last row is the total."""
        raise NotImplementedError

    def __str__(self) -> str:
        title, header, rows = self.table()
        columns = list(zip(header, *rows, strict=True))
        widths = [max(map(len, column)) for column in columns]
        rights = [column[-1][:1].isdigit() for column in columns]
        ruled = [header, ["-" * width for width in widths], *rows[:-1], ["-" * w for w in widths], rows[-1]]
        lines = [
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(row, widths, rights, strict=True)
            ).rstrip()
            for row in ruled
        ]
        return "\n".join([title, "", *lines])

    def __rich__(self) -> Table:
        from rich.table import Table

        title, header, rows = self.table()
        table = Table(title=title, show_footer=True)
        for name, total in zip(header, rows[-1], strict=True):
            number = total[:1].isdigit()
            table.add_column(
                name, total, justify="right" if number else "left", no_wrap=number, overflow="fold"
            )
        for row in rows[:-1]:
            table.add_row(*row)
        return table


class Receipt(_Report):
    """The result of :func:`receipt`.  ``print`` shows it as a table.

    - ``layers``      a :class:`LayerReceipt` for each called module, in the order of the first calls; a
                      container that saved nothing itself is left out.
    - ``kept``        bytes kept for backward, without parameters and inputs.
    - ``inputs``      bytes of the model's inputs that backward needs.
    - ``parameters``  bytes of parameters and buffers that backward needs.
    """

    def __init__(self, layers: Sequence[LayerReceipt]) -> None:
        self.layers = tuple(layers)
        self.kept = sum(layer.kept for layer in layers)
        self.inputs = sum(layer.inputs for layer in layers)
        self.parameters = sum(layer.parameters for layer in layers)

    def beside(self, after: Receipt) -> Comparison:
        """This receipt and a later one of the same model, side by side: for example around a swap."""
        return Comparison(self, after)

    def table(self) -> tuple[str, list[str], list[list[str]]]:
        """Title, header and rows; the last row is the total."""
        title = (
            f"kept for backward: {_size(self.kept)}, besides {_size(self.parameters)} of parameters "
            f"and {_size(self.inputs)} of inputs"
        )
        rows = [
            [layer.path or ROOT, layer.kind, str(layer.calls), *map(_size, layer[3:])]
            for layer in self.layers
        ]
        calls = sum(layer.calls for layer in self.layers)
        shared = sum(layer.shared for layer in self.layers)
        sizes = map(_size, (self.kept, shared, self.inputs, self.parameters))
        header = ["layer", "class", "calls", "kept", "shared", "inputs", "parameters"]
        return title, header, [*rows, ["total", "", str(calls), *sizes]]

    def as_dict(self) -> dict[str, Any]:
        """Plain data: the totals, and a dictionary for each layer; all sizes in bytes."""
        totals = {"kept": self.kept, "inputs": self.inputs, "parameters": self.parameters}
        return totals | {"layers": [layer._asdict() for layer in self.layers]}

    def to_json(self) -> str:
        """:meth:`as_dict` as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def save_png(self, path: str | Path) -> None:
        """Draw a bar for each layer that keeps something; of many only the largest.  Needs matplotlib.

        Args:
            path: the file of the picture; its folder is made if it does not exist.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        bars = {_label(layer): (layer.kept,) for layer in self.layers}
        _draw(Path(path), bars, [(f"{_size(self.kept)} in all", AFTER)])


class Comparison(_Report):
    """Two receipts of one model, layer by layer: ``before`` and ``after``.  ``print`` shows it as a table."""

    def __init__(self, before: Receipt, after: Receipt) -> None:
        self.before, self.after = before, after

    def pairs(self) -> dict[str, tuple[LayerReceipt, LayerReceipt]]:
        """For each path the layer before and after; a missing layer has no class and no calls."""
        before, after = ({layer.path: layer for layer in side.layers} for side in (self.before, self.after))
        none = {path: LayerReceipt(path, "", 0, 0, 0, 0, 0) for path in before | after}
        return {path: (before.get(path, none[path]), after.get(path, none[path])) for path in none}

    def table(self) -> tuple[str, list[str], list[list[str]]]:
        """Title, header and rows; the last row is the total."""
        old, new = self.before.kept, self.after.kept
        title = f"kept for backward: {_size(old)} before, {_size(new)} after"
        rows = [
            [path or ROOT, a.kind, _size(a.kept), b.kind, _size(b.kept), _change(a.kept, b.kept)]
            for path, (a, b) in self.pairs().items()
        ]
        header = ["layer", "before", "kept", "after", "kept", "change"]
        return title, header, [*rows, ["total", "", _size(old), "", _size(new), _change(old, new)]]

    def as_dict(self) -> dict[str, Any]:
        """Plain data: both receipts."""
        return {"before": self.before.as_dict(), "after": self.after.as_dict()}

    def to_json(self) -> str:
        """:meth:`as_dict` as JSON."""
        return json.dumps(self.as_dict(), indent=2)

    def save_png(self, path: str | Path) -> None:
        """Draw two bars for each layer that keeps something; of many only the largest.  Needs matplotlib.

        Args:
            path: the file of the picture; its folder is made if it does not exist.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        bars = {
            _label(max(a, b, key=lambda side: side.calls)): (a.kept, b.kept) for a, b in self.pairs().values()
        }
        legend = [
            (f"before, {_size(self.before.kept)}", BEFORE),
            (f"after, {_size(self.after.kept)}", AFTER),
        ]
        _draw(Path(path), bars, legend)


def receipt(model: torch.nn.Module, /, *inputs: Any, **kwargs: Any) -> Receipt:
    """Measure what one forward pass of a model keeps for the backward pass, layer by layer.

    The model runs once as it is, in its current mode, with gradients enabled.  Each tensor that autograd
    saves and still holds at the end counts once, with the bytes of its storage, for the innermost module that
    was running.  A tensor computed outside any submodule counts for the module whose forward computes it.
    Generators, buffers, gradients, hooks and modes are restored afterwards.

    Two things are not seen: tensors that a custom function stores on its context instead of saving them, and
    tensors that a compiled or a checkpointed region packs with its own hooks.

    Args:
        model: any module.  On the meta device nothing is computed or allocated, and the bytes are the same.
        inputs, kwargs: the arguments of the model's call.  If a floating-point input requires a gradient, the
            first layer also keeps what that gradient needs.

    Returns:
        A :class:`Receipt`; print it, or write it as JSON or as a picture.

    Raises:
        TypeError: if ``model`` is not a module.
        ValueError: if a layer of the model is lazy and has not seen an input yet.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"receipt: model must be a torch.nn.Module. Got {type(model).__name__}.")
    _refuse_lazy(model)
    with _as_found(model):
        given = [leaf for leaf in tree_leaves((inputs, kwargs)) if isinstance(leaf, Tensor)]
        origin = {key: "inputs" for t in given for key in _bytes(t)}
        origin |= {key: "parameters" for t in _own_tensors(model) for key in _bytes(t)}
        watch = _Watch(model)
        with watch, torch.inference_mode(False), torch.enable_grad():
            output = model(*inputs, **kwargs)
        layers = watch.layers(origin)
        del output  # not before: it holds the graph with the kept tensors
    return Receipt(layers)


# ----- measuring -----


class _Saved:
    """A tensor that autograd has saved; it lives as long as autograd holds it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Watch:
    """A context for one call of the model: records what is saved, and which module is running."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._modules, self._undo = dict(_walked("", model, set())), ExitStack()
        self._running: list[str] = [""]
        self._calls = {"": 1}  # in the order of the first calls
        self._saved: list[tuple[str, weakref.ref[_Saved]]] = []

    def __enter__(self) -> None:
        for path, module in self._modules.items():
            if not path:  # the model itself gets everything outside its submodules
                continue
            enter, leave = self._hooks(path)
            for hook in (enter, leave):  # a block need not call its parts because of these
                setattr(hook, "only_watches", True)  # noqa: B010
            # The first and the last of the module's hooks: what its other hooks save counts for the module.
            self._undo.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            self._undo.callback(module.register_forward_hook(leave, always_call=True).remove)
        self._undo.enter_context(saved_tensors_hooks(self._pack, lambda saved: saved.tensor))

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _hooks(self, path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(*_: Any) -> None:
            self._calls[path] = self._calls.get(path, 0) + 1
            self._running.append(path)

        def leave(*_: Any) -> None:
            self._running.pop()

        return enter, leave

    def _pack(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor.detach())  # not detached, an output would hold the graph that holds it
        self._saved.append((self._running[-1], weakref.ref(saved)))
        return saved

    def layers(self, origin: dict[int, str]) -> list[LayerReceipt]:
        """What is still held, storage by storage; ``origin`` says which belong to inputs and parameters."""
        found = {path: dict.fromkeys(("kept", "shared", "inputs", "parameters"), 0) for path in self._calls}
        charged: dict[int, set[str]] = {}
        for path, reference in self._saved:
            saved = reference()
            if saved is None:  # its graph was freed
                continue
            for key, size in _bytes(saved.tensor).items():
                layers = charged.setdefault(key, set())
                if path not in layers:
                    found[path]["shared" if layers else origin.get(key, "kept")] += size
                layers.add(path)
        containers = {path.rpartition(".")[0] for path in self._modules if path}
        return [
            LayerReceipt(path, _kind(self._modules[path]), self._calls[path], **sizes)
            for path, sizes in found.items()
            if any(sizes.values()) or path not in containers
        ]


def _bytes(t: Tensor) -> dict[int, int]:
    """The bytes of each whole storage of a tensor, even if the tensor is a small view of it."""
    if is_wrapper(t):
        parts = [getattr(t, name) for name in t.__tensor_flatten__()[0]]
    elif t.layout == torch.sparse_coo:
        parts = [t._indices(), t._values()]
    else:
        storage = t.untyped_storage()
        return {storage._cdata: storage.nbytes()}  # the address of its data is 0 on the meta device
    return {key: size for part in parts for key, size in _bytes(part).items()}


def _walked(
    path: str, module: torch.nn.Module, seen: set[torch.nn.Module]
) -> Iterator[tuple[str, torch.nn.Module]]:
    """``named_modules``, without the inside of compiled modules (they run as one) and scripted ones."""
    seen.add(module)
    yield path, module
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        return
    for name, child in module.named_children():
        if child not in seen and not isinstance(child, torch.jit.ScriptModule):
            yield from _walked(f"{path}.{name}" if path else name, child, seen)


def _own_tensors(model: torch.nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _refuse_lazy(model: torch.nn.Module) -> None:
    for path, module in model.named_modules():
        if any(map(is_lazy, (*module.parameters(recurse=False), *module.buffers(recurse=False)))):
            raise ValueError(
                f"receipt: layers must know their shapes. Got the lazy {type(module).__name__} at {path or ROOT}. "
                "Run the model once, as in model(inputs)."
            )


@contextmanager
def _as_found(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the buffers are copies and the generators may advance; afterwards all are restored."""
    held = [(m._buffers, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    copies = {id(b): b.detach().clone() for _, _, b in held}
    cuda = {t.device for t in _own_tensors(model) if t.device.type == "cuda"}
    python, numpy = random.getstate(), sys.modules.get("numpy")
    numpys = None if numpy is None else numpy.random.get_state()
    try:
        for buffers, name, b in held:
            buffers[name] = copies[id(b)]
        with torch.random.fork_rng(cuda):
            yield
    finally:
        for buffers, name, b in held:
            buffers[name] = b
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(numpys)


# ----- showing -----


def _kind(module: torch.nn.Module) -> str:
    """The name of the class; with its package for torch's classes and ours, which have the same names."""
    kind = type(module)
    for package in ("torch.nn", "manualprop.nn"):
        if kind.__module__.startswith(package):
            return f"{package.replace('torch.', '')}.{kind.__qualname__}"
    return kind.__qualname__


def _label(layer: LayerReceipt) -> str:
    return f"{layer.path or ROOT}  {layer.kind.rpartition('.')[2]}"


def _size(count: int) -> str:
    unit, factor = _unit(count)
    if factor == 1:
        return f"{count} B" if count else "0"
    return f"{count / factor:.2f} {unit}"


def _unit(count: int) -> tuple[str, float]:
    return next((u for u in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if count >= u[1]), ("B", 1.0))


def _change(before: int, after: int) -> str:
    if before == after:
        return "="
    return f"{after / before - 1:+.0%}" if before else f"+{_size(after)}"


def _draw(path: Path, bars: Mapping[str, tuple[int, ...]], legend: list[tuple[str, str]]) -> None:
    """Horizontal bars, one group for each layer, in the order of the layers."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "a picture needs matplotlib, which is not installed. Get it with: pip install matplotlib"
        ) from error
    bars, rest = _largest(bars)
    unit, factor = _unit(max((size for sizes in bars.values() for size in sizes), default=0))
    height = 0.8 / len(legend)
    figure = Figure(figsize=(8, 1.6 + 0.28 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for side, (label, colour) in enumerate(legend):
        places = [i + (side - (len(legend) - 1) / 2) * height for i in range(len(bars))]
        drawn = axes.barh(places, [sizes[side] / factor for sizes in bars.values()], height, label=label)
        for bar in drawn:
            bar.set_facecolor(colour)
        axes.bar_label(drawn, [_size(sizes[side]) for sizes in bars.values()], padding=3, fontsize=7)
    axes.set_yticks(range(len(bars)), list(bars), fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.14, y=0.02)
    axes.set_xlabel(f"kept for backward, {unit}{rest}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": "manualprop"})


def _largest(bars: Mapping[str, tuple[int, ...]]) -> tuple[Mapping[str, tuple[int, ...]], str]:
    """The layers that keep most, in their order, without those that keep nothing; a remark on the rest."""
    bars = {path: sizes for path, sizes in bars.items() if any(sizes)}
    chosen = sorted(bars, key=lambda path: -max(bars[path]))[:BARS]
    rest = [path for path in bars if path not in chosen]
    if not rest:
        return bars, ""
    left = " and ".join(_size(sum(sizes)) for sizes in zip(*(bars[path] for path in rest), strict=True))
    return {p: bars[p] for p in bars if p in chosen}, f" (not drawn: {len(rest)} layers of {left})"
