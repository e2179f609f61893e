"""What is wrong with a network, in words: each finding with its evidence and with what usually helps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from manualprop._backprop import data_at_fault
from manualprop._explain._numbers import dead, rms, saturated, statistics
from manualprop._explain._observe import AFFINE, Layer, Observation
from manualprop._explain._steps import ratio

VANISHES = 1e-3  # of the gradient at the first layer to that at the last
DROPS = 0.3  # of the gradient from one layer to the one before, where vanishing is said to begin
DEAD, SATURATED = 0.25, 0.3  # shares from which on they are told
TOO_LARGE, TOO_SMALL = 0.3, 1e-6  # of the update to its weight
IMBALANCED, FEW = 10, 20  # of the largest class to the smallest; examples below which no class is judged


@dataclass(frozen=True)
class Finding:
    """What is wrong.

    Args:
        name: of the trouble, in a few words.
        where: the layer, or "data", "loss".
        evidence: the numbers that show it.
        helps: what usually helps.
    """

    name: str
    where: str
    evidence: str
    helps: str


def diagnose(seen: Observation, loss: Module, x: Tensor, target: Tensor) -> tuple[Finding, ...]:
    """Everything that is wrong with a step, the most basic first.

    Args:
        seen: the step.
        loss: of the model.
        x: the inputs of all examples, of which the step may have seen some.
        target: their targets.
    """
    return (
        *_loss_cannot_fall(seen, loss),
        *_unscaled(x),
        *_imbalance(seen, target),
        *_symmetry(seen),
        *_vanishing(seen),
        *_flat_units(seen),
        *_update_size(seen),
    )


def _loss_cannot_fall(seen: Observation, loss: Module) -> Iterator[Finding]:
    ignored = getattr(loss, "ignore_index", None)
    if (
        isinstance(ignored, int)
        and not seen.target.is_floating_point()
        and bool((seen.target == ignored).all())
    ):
        yield Finding(
            "the loss cannot fall: all targets are ignored", "data",
            f"each of the {seen.target.numel()} targets is {ignored}, the loss's ignore_index",
            "look at how the targets are made; pad with ignore_index, but keep the real ones",
        )  # fmt: skip
        return
    if not torch.tensor(seen.loss).isfinite():
        advice = data_at_fault(seen.layers[0].x if seen.layers else seen.output, seen.target, loss)
        yield Finding(
            "the loss is not finite", "loss", f"the loss is {seen.loss}",
            advice or "a smaller learning rate; scaled inputs; a loss that takes logits in place of probabilities",
        )  # fmt: skip
        return
    rows = seen.output.flatten(1) if seen.output.dim() > 1 else seen.output.reshape(-1, 1)
    differ = len(seen.target) > 1 and bool((seen.target != seen.target[:1]).any())
    if differ and bool((rows == rows[:1]).all()):
        yield Finding(
            "the loss cannot fall below that of a constant: the output is the same for every example", "output",
            f"all {len(rows)} rows of the output are equal, and the targets differ",
            "look for a layer that loses its input: dead units, weights of 0, a factor of 0",
        )  # fmt: skip
    if all(rms(w.gradient) == 0 for w in seen.weights() if w.gradient is not None):
        yield Finding(
            "the loss cannot fall: every gradient is 0", "loss",
            "the gradient of each parameter is exactly 0",
            "look for dead or saturated units, for a detach, and for a loss that does not depend on the output",
        )  # fmt: skip


def _unscaled(x: Tensor) -> Iterator[Finding]:
    if not x.is_floating_point() or x.dim() != 2 or len(x) < 2:
        return
    all_of_it = statistics(x)
    spreads = x.double().std(0, correction=0)
    spreads = spreads[spreads > 0]
    uneven = spreads.numel() > 1 and (spreads.max() / spreads.median()).item() > 100
    centre = abs(all_of_it.mean)
    if uneven or all_of_it.spread > 10 or centre > 5 * max(all_of_it.spread, 1.0):
        evidence = f"mean {all_of_it.mean:.3g}, spread {all_of_it.spread:.3g}"
        if uneven:
            evidence += f"; the spread of the columns goes from {spreads.min().item():.2g} to {spreads.max().item():.3g}"
        yield Finding(
            "the inputs are not scaled", "data", evidence,
            "shift each column by its mean and divide it by its spread, both of the training examples",
        )  # fmt: skip


def _imbalance(seen: Observation, target: Tensor) -> Iterator[Finding]:
    if target.is_floating_point() or target.dim() != 1 or len(target) < FEW or seen.output.dim() != 2:
        return
    classes, counts = target[target >= 0].unique(return_counts=True)
    if len(classes) < 2 or counts.max() < IMBALANCED * counts.min():
        return
    most, least = int(classes[counts.argmax()]), int(classes[counts.argmin()])
    yield Finding(
        "the classes are not balanced", "data",
        f"class {most} has {int(counts.max())} of {len(target)} examples, class {least} has {int(counts.min())}",
        "class weights in the loss, or drawing rare classes more often; judge by more than the accuracy",
    )  # fmt: skip


def _symmetry(seen: Observation) -> Iterator[Finding]:
    affine = [layer for layer in seen.layers if layer.kind == AFFINE]
    for layer in affine[:-1]:  # the units of the last one differ by their targets
        W = layer.weights[0].value
        if len(W) > 1 and bool((W == W[:1]).all()):
            zero = bool((W == 0).all())
            yield Finding(
                "the units are copies of each other", layer.path,
                f"all {len(W)} rows of {layer.weights[0].name} are {'0' if zero else 'equal'}, so their gradients are, too",
                "initialise the weights at random: nn.Linear.reset_parameters; biases may be 0",
            )  # fmt: skip


def _vanishing(seen: Observation) -> Iterator[Finding]:
    flow = [(layer, rms(layer.g)) for layer in seen.layers if layer.weights and layer.g is not None]
    if len(flow) < 2 or not flow[-1][1] or not torch.tensor([size for _, size in flow]).isfinite().all():
        return
    (first, smallest), (last, arriving) = flow[0], flow[-1]
    share = smallest / arriving
    if VANISHES < share < 1 / VANISHES:
        return
    vanishes = share <= VANISHES
    begins = last
    for (before, size), (_, after) in reversed(list(itertools.pairwise(flow))):
        change = size / after if after else 0.0
        if change < DROPS if vanishes else change > 1 / DROPS:
            begins = before
            break
    yield Finding(
        f"the gradients {'vanish' if vanishes else 'explode'}", begins.path,
        f"the gradient that reaches {first.path} is {share:.2g} times that at {last.path} (root mean square "
        f"{smallest:.2g} and {arriving:.2g}); it begins at {begins.path}",
        "ReLU or GELU in place of sigmoid, normalisation, residual connections, initial weights scaled by 1/sqrt(inputs)"
        if vanishes
        else "smaller initial weights, normalisation, clip_gradient_norm in the descent",
    )  # fmt: skip


def _flat_units(seen: Observation) -> Iterator[Finding]:
    for layer in seen.layers:
        share = dead(layer) if _examples(layer) >= 8 else None
        if share is not None and share >= DEAD:
            yield Finding(
                "units are dead", layer.path,
                f"{100 * share:.0f} % of the units are 0 in all {_examples(layer)} examples, so no gradient passes them",
                "a smaller learning rate, smaller negative biases, LeakyReLU or GELU in place of ReLU",
            )  # fmt: skip
        share = saturated(layer)
        if share is not None and share >= SATURATED:
            yield Finding(
                "units are saturated", layer.path,
                f"at {100 * share:.0f} % of the numbers the slope is under a fiftieth of the steepest",
                "smaller initial weights, scaled inputs, normalisation before the activation, ReLU in its place",
            )  # fmt: skip


def _examples(layer: Layer) -> int:
    return layer.y.shape[:-1].numel() if layer.y.dim() > 1 else 1


def _update_size(seen: Observation) -> Iterator[Finding]:
    shares = {w.name: ratio(w) or 0.0 for w in seen.weights() if w.value.dim() > 1}
    large = {name: share for name, share in shares.items() if share > TOO_LARGE}
    small = {name: share for name, share in shares.items() if 0 < share < TOO_SMALL}
    for found, size, helps in (
        (large, "large", "a smaller learning rate, or clip_gradient_norm in the descent"),
        (small, "small", "a larger learning rate; if gradients vanish, mend that first"),
    ):
        if found:
            told = ", ".join(f"{share:.2g} in {name}" for name, share in found.items())
            yield Finding(
                f"the update is much too {size}", next(iter(found)),
                f"against its weight (root mean square) it is {told}; about 0.001 to 0.01 is usual", helps,
            )  # fmt: skip
