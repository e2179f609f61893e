"""The ten steps of an update, each with the layers that take it, their formulas and their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Module

from manualprop import functions as rules
from manualprop._backprop._trace import derivation, headline
from manualprop._explain import _formulas as formulas
from manualprop._explain import _windows as windows
from manualprop._explain._numbers import Links, dead, passes_on, rms, saturated
from manualprop._explain._observe import ACTIVATION, AFFINE, OTHER, Layer, Observation, Weight
from manualprop.descent import Descent

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Shown:
    """A tensor that a block shows: its key in the numbers, its letters, and how each number was made.

    ``made`` names a sum that the page writes out, with the keys of what goes into it.
    """

    key: str
    symbol: str
    what: str
    made: dict[str, Any]


@dataclass(frozen=True)
class Block:
    """What one layer does in a step.

    Args:
        layer: its path, or "loss".
        kind: its class.
        place: in the order of the layers; -1 for the loss and for parameters outside of layers.
        formula: words, and mathematics between dollar signs.
        line: the same in plain letters, as the rule's docstring has it.
        source: what computes it.
        derivation: of the rule, line by line.
        shown: the tensors, what the step makes first.
        by_hand: whether it is this package's formula, of a gradient.
        remarks: what its numbers tell.
        why: the reason of a formula that surprises; mathematics between dollar signs.
    """

    layer: str
    kind: str
    place: int
    formula: str
    line: str
    source: str
    derivation: str
    shown: tuple[Shown, ...]
    by_hand: bool = True
    remarks: tuple[str, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Step:
    """One of the ten steps.

    Args:
        number: 1 to 10.
        direction: "forward" or "backward".
        title: its name.
        text: what it does, in a sentence or two.
        blocks: in the order of the work.
    """

    number: int
    direction: str
    title: str
    text: str
    blocks: tuple[Block, ...]


TITLES: dict[int, tuple[str, str, str]] = {
    1: (FORWARD, "Initialise", "The weights and biases as they stand before this update."),
    2: (
        FORWARD,
        "Multiply by the weights, add the biases",
        "Each unit multiplies every input by a weight of its own, adds the products up, and adds its bias. "
        "The result is called the pre-activation.",
    ),
    3: (
        FORWARD,
        "Activate",
        "A function of one number bends each pre-activation. Without it, all layers together would be one linear layer.",
    ),
    4: (
        FORWARD,
        "Repeat",
        "The outputs of a layer are the inputs of the next one, up to the output of the network.",
    ),
    5: (FORWARD, "Loss", "One number says how wrong the output is. The update is to make it smaller."),
    6: (
        BACKWARD,
        "Gradient of the loss with respect to the output",
        "Backward propagation starts here: how much the loss grows for each unit of growth of an output.",
    ),
    7: (
        BACKWARD,
        "Gradient with respect to the pre-activation",
        "The chain rule through the activation: the gradient that arrives, times the slope of the activation there.",
    ),
    8: (
        BACKWARD,
        "Gradients of the weights and biases",
        "A weight is charged with the gradient at its output times the input that it multiplied, summed over the examples.",
    ),
    9: (
        BACKWARD,
        "Chain rule to the layer before",
        "An input is charged, through every weight that it met, with the gradient at the other end. "
        "Then steps 7 and 8 repeat in the layer before.",
    ),
    10: (
        BACKWARD,
        "Update",
        "Each weight takes a step against its gradient. The step is the gradient times the learning rate.",
    ),
}


FORWARD_WHY: dict[Any, str] = {
    rules.Convolution: "Each number of $y$ is the sum of one window of $x$, with the weights of its channel; the windows of "
    "all positions have the same weights.",
    rules.TransposedConvolution: "Each number of $y$ is spread over a window of $x$, with the weights of its channel; the windows "
    "of all positions have the same weights. A convolution goes from $x$ to $y$, and this one back: hence the letters.",
}
_OF_MAXIMA = (
    "The place that was chosen has the slope 1, and the others of its window 0. So each $g$ goes to one place as it is, and "
    "a place that several windows chose gets the sum."
)
_OF_MEANS = (
    "Every number of a window has the same share in the mean. So each $g$ is spread evenly over its window."
)
BACKWARD_WHY: dict[Any, str] = dict.fromkeys(windows.MAXIMA, _OF_MAXIMA) | dict.fromkeys(
    windows.MEANS, _OF_MEANS
)


def steps(seen: Observation, linked: Links, loss: Module, descent: Descent) -> tuple[Step, ...]:
    """The ten steps of what was observed.

    Args:
        seen: the step that was observed.
        linked: whose output each layer is given.
        loss: of the model.
        descent: that makes the update.
    """
    writer = _Writer(seen, linked, loss, descent)
    return tuple(Step(n, *TITLES[n], tuple(blocks)) for n, blocks in writer.blocks().items())


class _Writer:
    def __init__(self, seen: Observation, linked: Links, loss: Module, descent: Descent) -> None:
        self.seen, self.linked, self.loss, self.descent = seen, linked, loss, descent
        name = type(loss).__name__.removesuffix("Loss")
        self.loss_rule = getattr(rules, name, None)
        self.loss_by_hand = type(loss).__module__.startswith("manualprop.nn.")

    def blocks(self) -> dict[int, list[Block]]:
        found: dict[int, list[Block]] = {n: [] for n in TITLES}
        layers = self.seen.layers
        multiplies = next((i for i, layer in enumerate(layers) if _multiplies(layer)), -1)
        activates = next((i for i, layer in enumerate(layers) if layer.kind == ACTIVATION), -1)
        for i, layer in enumerate(layers):
            found[1] += self._parameters(i, layer)
            step = 2 if i == multiplies else 3 if i == activates else 4
            if step == 4 and layer.kind == OTHER and i < max(multiplies, activates):
                step = 2 if layer.weights or i < multiplies else 3
            found[step].append(self._forward(i, layer))
        found[1] += [_initial(-1, w.name, "Parameter", [w]) for w in self.seen.loose]
        found[5].append(self._loss())
        found[6].append(self._output_gradient())
        for i, layer in reversed(list(enumerate(layers))):
            found[7] += self._slope(i, layer)
            found[8] += self._weight_gradients(i, layer)
            found[9] += self._input_gradient(i, layer)
        for i, layer in enumerate(layers):
            found[10] += self._update(i, layer)
        found[10] += [
            self._updated(-1, w.name, "Parameter", [w]) for w in self.seen.loose if w.change is not None
        ]
        return found

    # ----- forwards -----

    def _parameters(self, i: int, layer: Layer) -> list[Block]:
        return [_initial(i, layer.path, layer.name, layer.weights)] if layer.weights else []

    def _forward(self, i: int, layer: Layer) -> Block:
        title = formulas.without_roles(headline(layer.rule))
        source = "the layer's own forward" if layer.rule is None else f"functions.{layer.rule.__name__}"
        if layer.rule is not None:
            source += ".f" if hasattr(layer.rule, "f") else ".forward"
        elif passes_on(layer):
            title = "$y = x$" if layer.x.shape == layer.y.shape else "$y = x$, in another shape"
        of_x, of_y = _letters(layer)
        shown = [Shown(f"y:{i}", of_y, f"output of {layer.path}", self._made(i, layer))]
        if layer.rule in windows.MAXIMA and windows.window_options(layer):
            shown.append(
                Shown(f"i:{i}", "i", f"places of the maxima in the input of {layer.path}", {"kind": "place"})
            )
        x = self.linked.inputs[i]
        if x.startswith("x"):
            shown.append(Shown(x, of_x, f"input of {layer.path}", {"kind": "input"}))
        return Block(
            layer.path, layer.name, i, title, formulas.plain(title), source,
            derivation(layer.rule), tuple(shown), remarks=(*_told(layer), *_health(layer)),
            why=FORWARD_WHY.get(layer.rule, ""),
        )  # fmt: skip

    def _made(self, i: int, layer: Layer) -> dict[str, Any]:
        x = self.linked.inputs[i]
        if layer.kind == AFFINE and layer.x.dim() <= 3:
            weight, *bias = [f"p:{w.name}" for w in layer.weights]
            return {"kind": "affine", "x": x, "W": weight, "b": bias[0] if bias else ""}
        if layer.kind == ACTIVATION:
            return {"kind": "activation", "x": x, "layer": i}
        if layer.rule is None and passes_on(layer):
            return {"kind": "moved", "from": x, "letter": "x"}
        return windows.of_output(i, layer, x) or {"kind": "layer", "name": layer.name}

    def _loss(self) -> Block:
        title = headline(self.loss_rule)
        name = type(self.loss).__name__
        source = (
            f"functions.{name.removesuffix('Loss')}.forward" if self.loss_rule else "the loss's own forward"
        )
        shown = [Shown("output", "x", "output of the network", {"kind": "same"})]
        if self.seen.losses is not None:
            shown.insert(0, Shown("loss:l", "l", "loss of each example", {"kind": "loss"}))
        shown.append(Shown("target", "t", "targets", {"kind": "input"}))
        how = f" over {self.seen.divisor:g}" if self.seen.divisor else ""
        remark = f"L = {self.seen.loss:.6g}, the {getattr(self.loss, 'reduction', 'value')}{how}"
        return Block(
            "loss", name, -1, title, formulas.plain(title), source,
            derivation(self.loss_rule), tuple(shown), remarks=(remark,),
        )  # fmt: skip

    # ----- backwards -----

    def _output_gradient(self) -> Block:
        line = formulas.derived(self.loss_rule, "dl/dx")
        name = type(self.loss).__name__
        rule = name.removesuffix("Loss")
        has_own = self.loss_rule is not None and hasattr(self.loss_rule, "output_gradient")
        source = f"functions.{rule}.output_gradient" if has_own else f"functions.{rule}.backward"
        shown = (Shown("loss:g", "g", "dL/dx of the output", {"kind": "loss_gradient"}),)
        return Block(
            "loss", name, -1, _typeset(line), line, source if self.loss_by_hand else "torch's autograd",
            derivation(self.loss_rule), shown, self.loss_by_hand, self._divided(), self._why(),
        )  # fmt: skip

    def _divided(self) -> tuple[str, ...]:
        """What the mean does to the gradient of one example."""
        if not self.seen.divisor or self.seen.divisor == 1 or getattr(self.loss, "reduction", "") == "sum":
            return ()
        return (f"L is the mean over {self.seen.divisor:g}, so g is that divided by {self.seen.divisor:g}",)

    def _why(self) -> str:
        """Why the gradient of softmax and cross-entropy is p - onehot(t)."""
        if not isinstance(self.loss_rule, type) or self.loss_rule.__name__ != "CrossEntropy":
            return ""
        return (
            r"Why $p - y$, with $y$ 1 at the target and 0 elsewhere: $\log p_t = x_t - \log \sum_k e^{x_k}$. The derivative "
            r"of $\log \sum_k e^{x_k}$ with respect to $x_k$ is $e^{x_k} / \sum_j e^{x_j} = p_k$, so that of the loss $-\log p_t$ "
            r"is $p_k - 1$ for the target and $p_k$ for every other class. The exponential of the softmax and the logarithm of "
            r"the loss have cancelled."
        )

    def _slope(self, i: int, layer: Layer) -> list[Block]:
        if layer.g is None or layer.dx is None or layer.weights:
            return []
        x, y = self.linked.inputs[i], f"y:{i}"
        line = "dL/dx = g y'" if layer.kind == ACTIVATION else formulas.derived(layer.rule, "dL/dx")
        slope = formulas.derived(layer.rule, "y'" if layer.kind == ACTIVATION else "M")
        line += f",  {slope}" if slope and line else ""
        saves = getattr(layer.rule, "saves", "input")
        made = {"kind": "slope", "g": f"g:{i}", "s": y if saves == "output" else x, "layer": i}
        if layer.kind != ACTIVATION:
            made = self._handed_back(i, layer)
        name = "" if layer.rule is None else f"functions.{layer.rule.__name__}"
        source = (
            f"{name}.chain.product, with {name}.df"
            if layer.kind == ACTIVATION
            else f"{name or layer.name}.backward"
        )
        if made["kind"] == "moved":
            line, source = "dL/dx = g", "torch's reshape"
        return [
            Block(
                layer.path, layer.name, i, _typeset(line), line, source if layer.by_hand else "torch's autograd",
                derivation(layer.rule),
                (Shown(self.linked.returns[i], "dL/dx", f"gradient of the input of {layer.path}", made),
                 Shown(f"g:{i}", "g", f"gradient of the output of {layer.path}", {"kind": "same"})),
                layer.by_hand, _flow(layer), BACKWARD_WHY.get(layer.rule, ""),
            )
        ]  # fmt: skip

    def _handed_back(self, i: int, layer: Layer) -> dict[str, Any]:
        """How dL/dx of a layer was made that is neither linear nor an activation."""
        if layer.rule is None and passes_on(layer) and layer.g is not None and layer.dx is not None:
            if _alike(layer.g, layer.dx):
                return {"kind": "moved", "from": f"g:{i}", "letter": "g"}
        made = windows.of_input_gradient(i, layer, self.linked.inputs[i])
        if made is None:
            return {"kind": "layer", "name": layer.name}
        own = windows.own_input_gradient(layer)
        # Autograd adds up what all users of a tensor hand back: the page tells what comes from others.
        return {**made, "shared": own is not None and layer.dx is not None and not _alike(own, layer.dx)}

    def _weight_gradients(self, i: int, layer: Layer) -> list[Block]:
        learning = [w for w in layer.weights if w.gradient is not None]
        if not learning:
            return []
        affine = layer.kind == AFFINE
        line = "; ".join(filter(None, (formulas.derived(layer.rule, left) for left in ("dL/dW", "dL/db"))))
        shown = []
        for w in learning:
            made: dict[str, Any] = {"kind": "layer", "name": layer.name}
            if affine and layer.x.dim() <= 3 and layer.g is not None:
                made = {"kind": "bias_gradient", "g": f"g:{i}"}
                if w.value.dim() == 2:
                    made = {"kind": "weight_gradient", "g": f"g:{i}", "x": self.linked.inputs[i]}
            elif layer.g is not None:
                is_bias = w.value.dim() == 1
                made = windows.of_weight_gradient(i, layer, self.linked.inputs[i], is_bias) or made
            shown.append(Shown(f"d:{w.name}", f"d{_letter(w)}", f"gradient of {w.name}", made))
        name = "" if layer.rule is None else f"functions.{layer.rule.__name__}"
        source = (
            f"{name}.weight_gradient, {name}.bias_gradient" if affine else f"{name or layer.name}.backward"
        )
        return [
            Block(
                layer.path, layer.name, i, _typeset(line), line, source if layer.by_hand else "torch's autograd",
                derivation(layer.rule), tuple(shown), layer.by_hand,
            )
        ]  # fmt: skip

    def _input_gradient(self, i: int, layer: Layer) -> list[Block]:
        if layer.g is None or layer.dx is None or not layer.weights:  # without g, other layers made dx
            return []
        left = f"dL/d{_letters(layer)[0]}"
        line = formulas.derived(layer.rule, left)
        made = self._handed_back(i, layer)
        if layer.kind == AFFINE and layer.x.dim() <= 3:
            made = {"kind": "input_gradient", "g": f"g:{i}", "W": f"p:{layer.weights[0].name}"}
            own = rules.Linear.input_gradient(layer.g, layer.weights[0].value)
            # Autograd adds up what all users of a tensor hand back: the page tells what comes from others.
            made["shared"] = not _alike(own, layer.dx)
        name = "" if layer.rule is None else f"functions.{layer.rule.__name__}"
        source = f"{name}.input_gradient" if layer.kind == AFFINE else f"{name or layer.name}.backward"
        return [
            Block(
                layer.path, layer.name, i, _typeset(line), line, source if layer.by_hand else "torch's autograd",
                derivation(layer.rule),
                (Shown(self.linked.returns[i], left, f"gradient of the input of {layer.path}", made),),
                layer.by_hand, _flow(layer),
            )
        ]  # fmt: skip

    # ----- the update -----

    def _update(self, i: int, layer: Layer) -> list[Block]:
        learning = [w for w in layer.weights if w.change is not None]
        return [self._updated(i, layer.path, layer.name, learning)] if learning else []

    def _updated(self, i: int, path: str, kind: str, learning: list[Weight]) -> Block:
        shown = tuple(
            Shown(
                f"u:{w.name}", f"Δ{_letter(w)}", f"what the update adds to {w.name}",
                {"kind": "update", "value": f"p:{w.name}", "gradient": f"d:{w.name}"},
            )
            for w in learning
        )  # fmt: skip
        ratios = [f"{w.name.rpartition('.')[2]}: {ratio(w):.2g}" for w in learning if ratio(w) is not None]
        remarks = (f"update to weight, root mean square: {', '.join(ratios)}",) if ratios else ()
        formula = formulas.update_formula()
        return Block(
            path,
            kind,
            i,
            formula,
            formulas.plain(formula),
            f"{type(self.descent).__name__}: {rule_of(self.descent)}",
            "",
            shown,
            True,
            remarks,
        )


def rule_of(descent: Descent) -> str:
    """What makes the update, in words."""
    if descent.optimizer is not None:
        made: Any = descent.optimizer
        return f"{getattr(made, '__name__', None) or getattr(getattr(made, 'func', made), '__name__', 'optimizer')}"
    extras = [f"momentum {descent.momentum:g}"] if descent.momentum else []
    extras += [f"weight decay {descent.weight_decay:g}"] if descent.weight_decay else []
    return ", ".join([f"learning rate {descent.learning_rate:g}", *extras])


def ratio(weight: Weight) -> float | None:
    """The size of the update against that of the weight; None for a weight that is all zeros."""
    size = rms(weight.value)
    return rms(weight.change) / size if size and weight.change is not None else None


def _initial(i: int, path: str, kind: str, weights: list[Weight]) -> Block:
    affine = kind in ("Linear", "Conv1d", "Conv2d", "Conv3d") and bool(weights)
    index = "oi" if kind == "Linear" else "ock"
    fan = weights[0].value[:1].numel() if affine and weights[0].value.dim() > 1 else 0
    formula = (
        rf"at first, $W_{{{index}}}$ and $b_o$ uniform between $\pm 1 / \sqrt{{\text{{inputs}}}}$"
        if affine
        else ""
    )
    line = f"at first, W_{index} and b_o uniform between ±1/√inputs, here ±{fan**-0.5:.3g}" if fan else ""
    shown = tuple(Shown(f"p:{w.name}", _letter(w), w.name, {"kind": "weight"}) for w in weights)
    source = f"nn.{kind}.reset_parameters (torch's)" if i >= 0 else "the model's own"
    return Block(path, kind, i, formula, line, source, "", shown)


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal but for rounding; what is not finite counts as equal."""
    difference = rms(a.reshape(b.shape) - b)
    return not difference > 1e-3 * rms(a)


def _letters(layer: Layer) -> tuple[str, str]:
    """Of the input and the output: in the family of convolutions a transposed one goes from y to x."""
    return ("y", "x") if layer.rule in windows.TRANSPOSED else ("x", "y")


def _letter(weight: Weight) -> str:
    return {"weight": "W", "bias": "b"}.get(weight.name.rpartition(".")[2], weight.name.rpartition(".")[2])


def _typeset(line: str) -> str:
    return ", ".join(f"${formulas.latex(part)}$" for part in line.replace(";", ", ").split(",  ") if part)


def _multiplies(layer: Layer) -> bool:
    """Whether a layer multiplies its input by weights: a linear layer, a convolution."""
    return layer.kind == AFFINE or layer.rule in (rules.Convolution, rules.TransposedConvolution)


def _told(layer: Layer) -> tuple[str, ...]:
    """The options of a layer that its formula has letters for."""
    told = windows.told_options(layer)
    return (told,) if told else ()


def _health(layer: Layer) -> tuple[str, ...]:
    found = []
    share = dead(layer)
    if share is not None:
        found.append(f"{100 * share:.0f} % of the units are dead (0 in every example of the batch)")
    share = saturated(layer)
    if share is not None:
        found.append(f"{100 * share:.0f} % of the numbers are saturated (slope under 1/50 of the steepest)")
    return tuple(found)


def _flow(layer: Layer) -> tuple[str, ...]:
    arriving, leaving = rms(layer.g), rms(layer.dx)
    return (
        (f"root mean square of what arrives: {arriving:.3g}; of what goes on: {leaving:.3g}",)
        if arriving
        else ()
    )
