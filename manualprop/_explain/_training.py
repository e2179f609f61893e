"""The updates that follow: recorded for the slider, and by each of the three descents on a slice of the loss."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from manualprop._explain._observe import Observation, Trainee
from manualprop.descent import Batch, Descent, MiniBatch, Stochastic

UPDATES, FRAMES = 200, 10  # recorded for the slider, at most
HELD = 3 * 10**7  # numbers held for it, at most
SECONDS = 2.0  # of processor time for it, after which no further update is made

EXAMPLES, STEPS, POINTS = (
    512,
    120,
    41,
)  # of the slice: examples of the loss, updates, and those that are drawn
WEIGHTS = 4 * 10**7  # numbers held for it, at most
GRID = 25  # points of the slice along each side
FAR = 2.5  # times the reach of the middle path, from where on a path leaves the picture
DRAWS = 24  # gradients of which the noise is measured


# ----- which examples an update sees -----


def fitted(descent: Descent, n: int) -> Descent:
    """The descent, with batches no larger than there are examples."""
    if isinstance(descent, MiniBatch) and descent.batch_size > n:
        return dataclasses.replace(descent, batch_size=n)
    return descent


def batches(descent: Descent, n: int, seed: int) -> Iterator[Tensor]:
    """The rows of one update after the other, epoch after epoch."""
    for epoch in itertools.count():
        for pieces in descent.updates(n, seed=seed, epoch=epoch):
            yield torch.cat(pieces)


# ----- the slider -----


@dataclass(frozen=True)
class Recording:
    """Training from the explained update on.

    Args:
        losses: of each update, on its own examples, before it.
        at: updates before which the explained examples were observed again; the first is 0.
        frames: what was observed then.
        stopped: why it ended early; "" where it did not.
    """

    losses: tuple[float, ...]
    at: tuple[int, ...]
    frames: tuple[Observation, ...]
    stopped: str


def record_training(
    trainee: Trainee, x: Tensor, target: Tensor, rows: Tensor, seed: int, updates: int
) -> Recording:
    """Observe the examples ``rows`` now and after more and more updates.

    Args:
        trainee: is trained.
        x: the inputs of all examples.
        target: their targets.
        rows: the examples of the first update, which are observed.
        seed: of the order of the examples.
        updates: to be made, at most.
    """
    first = trainee.observe(x[rows], target[rows])
    held = sum(3 * w.value.numel() for w in first.weights()) + sum(
        3 * layer.y.numel() for layer in first.layers
    )
    wanted = _spread(updates, max(1, min(FRAMES, HELD // max(1, held))))
    losses: list[float] = []
    at, frames, stopped = [0], [first], ""
    until = time.process_time() + SECONDS
    for number, chosen in enumerate(batches(trainee.descent, len(x), seed)):
        if number and number in wanted:
            at.append(number)
            frames.append(trainee.observe(x[rows], target[rows]))
        if number >= updates or time.process_time() > until:
            break
        try:
            losses.append(trainee.update(x[chosen], target[chosen]))
        except FloatingPointError as error:
            stopped = " ".join(str(error).removeprefix("Backprop: ").split())
            break
        if not math.isfinite(losses[-1]):
            losses.pop()
            stopped = "the loss must stay finite, and did not"
            break
    return Recording(tuple(losses), tuple(at), tuple(frames), stopped)


def _spread(updates: int, count: int) -> list[int]:
    """Update numbers from 0 on, ever further apart."""
    if count < 2 or updates < 1:
        return [0]
    found = {0, *(round((updates + 1) ** (k / (count - 1)) - 1) for k in range(count))}
    return sorted(found)


# ----- the three descents -----


Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Path:
    """One descent on the slice.

    Args:
        name: of the descent.
        examples: that an update sees.
        points: coordinates on the slice, of the start and after every so many updates.
        noise: the size of the scatter of its gradients at the start, against the gradient of all examples.
        refused: why it was not run; "" where it was.
    """

    name: str
    examples: int
    points: Points
    noise: float
    refused: str = ""


@dataclass(frozen=True)
class Slice:
    """The loss on a plane through the weights, and the paths of the three descents on it.

    Args:
        paths: batch, mini-batch and stochastic descent.
        grid: the loss, a row for each coordinate of ``down``.
        across: coordinates along the first direction.
        down: along the second.
        rate: learning rate of all three, plain gradient descent.
        examples: of the loss.
        updates: of each path.
        share: of the paths' movement that lies in the plane.
    """

    paths: tuple[Path, ...]
    grid: Tensor
    across: tuple[float, ...]
    down: tuple[float, ...]
    rate: float
    examples: int
    updates: int
    share: float


def three_descents(
    model: Module, loss: Module, descent: Descent, x: Tensor, target: Tensor, seed: int
) -> Slice | str:
    """Run the three descents from the weights of the model, and evaluate the loss on the plane of their paths.

    Returns:
        What was found, or why nothing was.
    """
    n = min(len(x), EXAMPLES)
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n].sort().values
    x, target = x[rows], target[rows]
    learning = [p for p in model.parameters() if p.requires_grad]
    kept = min(POINTS, WEIGHTS // (3 * sum(p.numel() for p in learning)))
    why_not = _why_not(n, kept, learning)
    if why_not:
        return why_not
    every = -(-STEPS // (kept - 1))
    kinds = _three(descent, n)
    runs = [_run(model, loss, kind, x, target, seed, every) for kind in kinds]
    start = _vector(model)
    moved = [(run[0] - start).double() for run in runs if isinstance(run[0], Tensor)]
    # Each at its own scale: a descent that leaps about would leave no room for the others.
    moved = [path / path.norm(dim=1).max() for path in moved if bool(path.any())]
    if not moved:
        return "The paths are not drawn: no descent moved the weights."
    basis, share = _plane(torch.cat(moved))
    paths = tuple(
        _path(kind, n, points if isinstance(points, str) else _on(basis, points - start), noise)
        for kind, (points, noise) in zip(kinds, runs, strict=True)
    )
    in_sight = _in_sight([path.points for path in paths if path.points])
    across, down = (_range([point[k] for point in in_sight]) for k in (0, 1))
    grid = _grid(model, loss, x, target, start, basis, across, down, seed)
    rate = kinds[0].learning_rate
    assert rate is not None
    return Slice(paths, grid, across, down, rate, n, every * (kept - 1), share)


def _why_not(n: int, kept: int, learning: list[Parameter]) -> str:
    """Why no paths are drawn; "" where they are."""
    if n < 2:
        return "The three descents differ only where there are several examples. Here is one."
    if len({p.dtype for p in learning}) > 1:
        return "The paths are not drawn: the weights are of several dtypes."
    if kept < 5:
        return f"The paths are not drawn: {sum(p.numel() for p in learning):,} weights would fill the memory."
    return ""


def _three(descent: Descent, n: int) -> list[Descent]:
    """Batch, mini-batch and stochastic descent with the learning rate of a descent, and no more of it."""
    rate = 0.1 if descent.learning_rate is None else descent.learning_rate
    some = descent.batch_size if isinstance(descent, MiniBatch) else 32
    return [
        Batch(learning_rate=rate),
        MiniBatch(learning_rate=rate, batch_size=min(some, max(1, n // 4))),
        Stochastic(learning_rate=rate),
    ]


def _path(descent: Descent, n: int, points: Points | str, noise: float) -> Path:
    refused = points if isinstance(points, str) else ""
    return Path(
        type(descent).__name__, _seen(descent, n), () if isinstance(points, str) else points, noise, refused
    )


def _seen(descent: Descent, n: int) -> int:
    return n if isinstance(descent, Batch) else descent.batch_size if isinstance(descent, MiniBatch) else 1


def _vector(model: Module) -> Tensor:
    return parameters_to_vector([p.detach() for p in model.parameters() if p.requires_grad]).clone()


def _run(
    model: Module, loss: Module, descent: Descent, x: Tensor, target: Tensor, seed: int, every: int
) -> tuple[Tensor | str, float]:
    """Every so many weights of a path, and the noise of its gradients; in place of the weights, why there are none."""
    trainee = Trainee(model, loss, descent, seed)
    points, noise = [_vector(trainee.model)], 0.0
    try:
        trainee.settle(x, target)
        noise = _noise(trainee, x, target, seed)
        for number, chosen in enumerate(itertools.islice(batches(descent, len(x), seed), STEPS), start=1):
            if not math.isfinite(trainee.update(x[chosen], target[chosen])):
                break
            if number % every == 0:
                points.append(_vector(trainee.model))
    except FloatingPointError:  # it left the map: what came before is shown
        pass
    except (ValueError, RuntimeError, TypeError) as error:
        return " ".join(str(error).split()), 0.0
    finite = [point for point in points if bool(point.isfinite().all())]
    return torch.stack(finite), noise


def _noise(trainee: Trainee, x: Tensor, target: Tensor, seed: int) -> float:
    """The scatter of the gradients of single updates about that of all examples, relative to the latter."""
    if isinstance(trainee.descent, Batch):
        return 0.0
    whole = trainee.gradient(x, target)
    drawn = itertools.islice(batches(trainee.descent, len(x), seed), DRAWS)
    squares = [
        (trainee.gradient(x[rows], target[rows]) - whole).double().square().sum().item() for rows in drawn
    ]
    size = whole.double().norm().item()
    return math.sqrt(sum(squares) / len(squares)) / size if size else 0.0


def _plane(moved: Tensor) -> tuple[Tensor, float]:
    """Two orthonormal directions in which most of the movement lies (principal components), and its share."""
    values, vectors = torch.linalg.eigh(moved @ moved.T)  # small: a row for each point
    basis = []
    for k in (-1, -2):
        if len(values) >= -k and values[k] > 1e-12 * values[-1]:
            basis.append(moved.T @ vectors[:, k] / values[k].sqrt())
    if len(basis) < 2:  # a straight path: any direction across it
        other = torch.randn(moved.shape[1], generator=torch.Generator().manual_seed(0), dtype=moved.dtype)
        other -= basis[0] * (basis[0] @ other)
        basis.append(other / other.norm().clamp(min=1e-300))
    share = (values[-2:].sum() / values.sum()).item()
    return torch.stack(basis), min(1.0, share)


def _on(basis: Tensor, moved: Tensor) -> Points:
    return tuple((a, b) for a, b in (moved.double() @ basis.T).tolist())


def _in_sight(paths: list[Points]) -> list[tuple[float, float]]:
    """The points that the picture holds: all but those far beyond the reach of the middle one of the paths."""
    reach = sorted(max(math.hypot(*point) for point in path) for path in paths)
    limit = FAR * reach[len(reach) // 2]
    return [point for path in paths for point in path if math.hypot(*point) <= limit]


def _range(values: list[float]) -> tuple[float, ...]:
    low, high = min(values), max(values)
    room = 0.2 * (high - low) or 1.0
    return tuple(torch.linspace(low - room, high + room, GRID, dtype=torch.float64).tolist())


def _grid(
    model: Module,
    loss: Module,
    x: Tensor,
    target: Tensor,
    start: Tensor,
    basis: Tensor,
    across: tuple[float, ...],
    down: tuple[float, ...],
    seed: int,
) -> Tensor:
    trainee = Trainee(model, loss, Batch(learning_rate=1.0), seed)
    learning = [p for p in trainee.model.parameters() if p.requires_grad]
    found = torch.empty(len(down), len(across), dtype=torch.float64)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for (i, b), (j, a) in itertools.product(enumerate(down), enumerate(across)):
            place = start.double() + a * basis[0] + b * basis[1]
            vector_to_parameters(place.to(start.dtype), learning)
            torch.manual_seed(seed)  # random layers draw the same everywhere
            found[i, j] = trainee.loss(trainee.model(x), target)
    return found
