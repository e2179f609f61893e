"""``explain``: the ten steps of an update with the numbers of a real batch, as text, figure, JSON and page."""

from __future__ import annotations

import copy
import html
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy

from manualprop._explain._diagnosis import diagnose
from manualprop._explain._explained import Explained
from manualprop._explain._numbers import links, numbers, statistics
from manualprop._explain._observe import Observation, Trainee
from manualprop._explain._steps import rule_of, steps
from manualprop._explain._training import (
    UPDATES,
    Slice,
    batches,
    fitted,
    record_training,
    three_descents,
)
from manualprop._explain._worked import worked
from manualprop.descent import Descent, MiniBatch

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType

LISTED = 4096  # numbers of a tensor that the JSON lists; of a larger one it has the statistics


class Explanation(Explained):
    """An update of a model, step by step.  ``print`` shows it; a notebook shows its page.

    Its attributes are those of :class:`Explained`: among them ``steps``, ``findings``, ``notes`` and ``numbers``, all
    tensors by key.
    """

    def render(self, *, layer: str | None = None, example: int = 0, verbose: bool = False) -> RenderableType:
        """Return what :mod:`rich` prints.

        Args:
            layer: show this one alone, by its path.
            example: of the batch, whose numbers are shown.
            verbose: show derivations, more numbers, and every layer's inputs.

        Raises:
            ValueError: for a layer or an example that is not there.
        """
        terminal = _needing("manualprop._explain._terminal", "rich")
        rendered: RenderableType = terminal.rendered(self, layer, example, verbose)
        return rendered

    def __rich__(self) -> RenderableType:
        return self.render()

    def __repr__(self) -> str:
        return f"<Explanation of {self.title}: print it, or save it as a page>"

    def __str__(self) -> str:
        terminal = _needing("manualprop._explain._terminal", "rich")
        text: str = terminal.text(self)
        return text

    def to_json(self) -> str:
        """Return everything but the recorded updates' tensors, as JSON; tensors of up to 4,096 numbers are listed."""
        seen = self.observation
        found = {
            "title": self.title,
            "loss": {"class": type(self.loss).__name__, "value": _finite(seen.loss)},
            "descent": {"class": type(self.descent).__name__, "update": rule_of(self.descent)},
            "examples": self.examples,
            "rows": self.rows.tolist(),
            "by_hand": self.by_hand,
            "notes": list(self.notes),
            "steps": [asdict(step) for step in self.steps],
            "worked": self._worked(),
            "numbers": {key: _listed(t) for key, t in self.numbers.items()},
            "diagnosis": [asdict(finding) for finding in self.findings],
            "updates": {
                "losses": [_finite(loss) for loss in self.recording.losses],
                "observed": [
                    {"update": at, "loss": _finite(frame.loss)}
                    for at, frame in zip(self.recording.at, self.recording.frames, strict=True)
                ],
                "stopped": self.recording.stopped,
            },
            "descents": self.descents if isinstance(self.descents, str) else _sliced(self.descents),
        }
        return json.dumps(found, indent=1, allow_nan=False)

    def _worked(self) -> list[dict[str, Any]]:
        """The sums that are worked out, each with the layer and the key of the tensor."""
        found = []
        for block in (block for step in self.steps for block in step.blocks):
            for shown in block.shown:
                one = worked(shown, self.numbers)
                if one is not None:
                    found.append({"layer": block.layer, "key": shown.key, **_finite_within(asdict(one))})
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page: one file that needs no network.

        Args:
            path: of the file.

        Raises:
            OSError: when it cannot be written there.
        """
        text = self._page()
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise type(error)(
                f"explain: the page must go to a folder that is there and can be written to. Got {os.fspath(path)!r}: "
                f"{error.strerror or error}."
            ) from error

    def _page(self) -> str:
        page = _needing("manualprop._explain._page", "latex2mathml")
        text: str = page.page(self)
        return text

    def _repr_html_(self) -> str:
        frame = '<iframe style="width:100%;height:85vh;border:1px solid #8888" title="explanation" srcdoc="{}"></iframe>'
        return frame.format(html.escape(self._page(), quote=True))

    def figure(self) -> Figure:
        """Return a matplotlib figure: activations and gradients, the loss over the updates, the three descents."""
        drawn: Figure = _needing("manualprop._explain._figure", "matplotlib").figure(self)
        return drawn


def _needing(home: str, package: str) -> Any:
    """A module of ours that needs a package of the extra."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f'explain needs {package}, which is not installed. Get it with: pip install "manualprop[explain]"'
        ) from error
    return importlib.import_module(home)


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def _finite_within(found: dict[str, Any]) -> dict[str, Any]:
    """A worked sum without numbers that JSON has not."""
    terms = [
        {**term, "factors": _nested(list(term["factors"])), "value": _finite(term["value"])}
        for term in found["terms"]
    ]
    return {**found, "value": _finite(found["value"]), "rest": _finite(found["rest"]), "terms": terms}


def _listed(t: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {"shape": list(t.shape)}
    found |= {name: _finite(value) for name, value in asdict(statistics(t)).items()}
    if t.numel() <= LISTED:
        found["values"] = _nested(t.tolist())
    return found


def _nested(values: Any) -> Any:
    if isinstance(values, list):
        return [_nested(value) for value in values]
    return _finite(values) if isinstance(values, float) else values


def _sliced(found: Slice) -> dict[str, Any]:
    return asdict(found) | {"grid": _nested(found.grid.tolist())}


# ----- from a model to its explanation -----


def explain(
    model: Module,
    loss: Module,
    x: Tensor,
    target: Tensor,
    descent: Descent | None = None,
    *,
    title: str = "",
    image: tuple[int, int] | None = None,
    seed: int = 0,
    updates: int = UPDATES,
    history: Sequence[Mapping[str, Any]] = (),
) -> Explanation:
    """Explain the next update of a model, step by step, with its real numbers.

    The model is not changed: a copy is trained.  Where :class:`manualprop.Backprop` can run it, every number comes
    from the hand-derived formulas; otherwise from autograd, and the explanation says which gradients are not by hand.

    Args:
        model: any that returns one tensor.
        loss: a module, called on (output, target), that returns one number.
        x: inputs, one example per row.
        target: theirs.
        descent: chooses the examples of the update, and makes it; MiniBatch of up to 32 with learning rate 0.1 by default.
        title: what is explained; the class of the model by default.
        image: height and width of an example, to draw it.
        seed: of the order of the examples, and of dropout.
        updates: to be recorded after the explained one, at least 0; fewer where they take more than two seconds.
        history: rows of a run's history, which the page draws.

    Raises:
        TypeError: for a model, a loss, tensors or a descent that are none, and a model that returns something else than a tensor.
        ValueError: for a model that cannot take the inputs, or a loss that cannot take the target.
    """
    _check(model, loss, x, target, descent)
    # On the processor: torch's random numbers there can be put back.
    model, loss, x, target = (
        copy.deepcopy(model).cpu(),
        copy.deepcopy(loss).cpu(),
        x.detach().cpu(),
        target.detach().cpu(),
    )
    n = len(x)
    if descent is None:
        descent = MiniBatch(batch_size=min(32, n), learning_rate=0.1)
    descent = fitted(descent, n)
    trainee = Trainee(model, loss, descent, seed)
    rows = next(batches(descent, n, seed))
    trainee.rehearse(x[rows], target[rows])
    recording = record_training(trainee, x, target, rows, seed, updates)
    seen = recording.frames[0]
    linked = links(seen)
    return Explanation(
        title=title or type(model).__name__,
        loss=loss,
        descent=descent,
        examples=n,
        rows=rows,
        steps=steps(seen, linked, loss, descent),
        findings=diagnose(seen, loss, x, target),
        notes=tuple(_notes(trainee, seen, loss)),
        numbers=numbers(seen, linked),
        links=linked,
        recording=recording,
        descents=three_descents(model, loss, descent, x, target, seed)
        if updates
        else "No update was asked for.",
        image=image or _image(x),
        history=history,
    )


def _check(model: Any, loss: Any, x: Any, target: Any, descent: Any) -> None:
    for name, value, kind in (
        ("model", model, Module),
        ("loss", loss, Module),
        ("x", x, Tensor),
        ("target", target, Tensor),
    ):
        if not isinstance(value, kind):
            raise TypeError(f"explain: {name} must be a torch {kind.__name__}. Got {type(value).__name__}.")
    if descent is not None and not isinstance(descent, Descent):
        raise TypeError(
            f"explain: descent must be one of manualprop.descent. Got {descent!r}; give one with its learning rate, "
            "such as MiniBatch(learning_rate=0.1)."
        )
    if not x.dim() or not target.dim() or len(x) != len(target) or not len(x):
        raise ValueError(
            "explain: x and target must have one row for each example, and as many of them. Got "
            f"{tuple(x.shape)} and {tuple(target.shape)}."
        )
    if any(map(is_lazy, model.parameters())):
        raise ValueError(
            "explain: lazy layers must know their sizes. Got some that do not; call the model once before."
        )
    if getattr(loss, "reduction", None) == "none":
        raise ValueError("explain: the loss must be one number. Got reduction='none'; use 'mean' or 'sum'.")


def _image(x: Tensor) -> tuple[int, int] | None:
    """Height and width of the inputs, where their shape says that they are images of one channel."""
    return (x.shape[2], x.shape[3]) if x.dim() == 4 and x.shape[1] == 1 else None


def _notes(trainee: Trainee, seen: Observation, loss: Module) -> list[str]:
    found = []
    if trainee.why:
        found.append(f"Autograd ran this model: {trainee.why}")
    others = [f"{layer.path} ({layer.name})" for layer in seen.layers if not layer.by_hand]
    if not type(loss).__module__.startswith("manualprop.nn."):
        others.append(f"the loss ({type(loss).__name__})")
    if others:
        found.append(f"Not by hand are the gradients of {', '.join(others)}: they are torch's own.")
    if seen.loose:
        names = ", ".join(weight.name for weight in seen.loose)
        found.append(f"These parameters belong to no layer that was called: {names}.")
    if not trainee.model.training:
        found.append("The model is in evaluation mode: dropout and the like are off.")
    momentum = trainee.descent.optimizer is not None or trainee.descent.momentum
    if momentum:
        found.append("The optimizer starts anew: it remembers no earlier update.")
    return found
