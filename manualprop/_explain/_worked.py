"""One number of a convolution or pool worked out: the terms of its sum, with the numbers that they are made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manualprop._explain._steps import Shown
from manualprop._explain._windows import Options, mean_divisor, window

Numbers = Mapping[str, Tensor]
Place = tuple[int, ...]
TOLD = 4  # terms that are told; of the others there is the sum


@dataclass(frozen=True)
class Term:
    """A term: what it is, as "W[0,0,1,1] x[0,0,3,4]", the numbers that it multiplies, and the product."""

    label: str
    factors: tuple[float, ...]
    value: float


@dataclass(frozen=True)
class Worked:
    """A number and the terms that it is made of.

    Args:
        entry: which number, as "y[0,1,4,4]".
        rule: what it is, in letters.
        value: the number.
        over: what the sum goes over.
        terms: the largest ones.
        left: how many other terms there are.
        rest: what those amount to.
    """

    entry: str
    rule: str
    value: float
    over: str
    terms: tuple[Term, ...]
    left: int = 0
    rest: float = 0.0

    def text(self) -> str:
        """In lines: the number, then a line for each term."""
        lines = [f"{self.entry} = {self.rule} = {self.value:.4g}, {self.over}"]
        for term in self.terms:
            product = " × ".join(f"{f:.3g}" for f in term.factors)
            lines.append(
                f"  {term.label} = {product}" + (f" = {term.value:.3g}" if len(term.factors) > 1 else "")
            )
        if self.left:
            lines.append(f"  {_many(self.left, 'other term')} = {self.rest:.3g}")
        return "\n".join(lines)


def worked(shown: Shown, numbers: Numbers, example: int = 0) -> Worked | None:
    """One number of a tensor worked out; None where the way to it is not one of these.

    Args:
        shown: the tensor.
        numbers: all tensors, by key.
        example: of the batch; a gradient of weights has all of them.
    """
    maker = MAKERS.get(shown.made["kind"])
    return maker(shown, numbers, example) if maker and numbers[shown.key].numel() else None


# ----- convolutions: sums over products of W, x and g -----


def _output(shown: Shown, numbers: Numbers, n: int) -> Worked:
    made, y = shown.made, numbers[shown.key]
    q, o = _middle(y), 0
    terms = _gathered(made, numbers, "x", (n, o, *q), y)
    rule, over = f"Σ W[{o},c,k] x[{n},c,i]", f"over {_many(len(terms), 'number')}"
    return _with_bias(f"y{_index((n, o, *q))}", rule, y[(n, o, *q)].item(), over, terms, numbers, made, o)


def _transposed(shown: Shown, numbers: Numbers, n: int) -> Worked:
    made, x = shown.made, numbers[shown.key]
    i, c = _middle(x), 0
    terms, over = _spread(made, numbers, "x", "y", (n, c, *i), x)
    rule = f"Σ y[{n},o,q] W[o,{c},k]"
    return _with_bias(f"x{_index((n, c, *i))}", rule, x[(n, c, *i)].item(), over, terms, numbers, made, c)


def _input_gradient(shown: Shown, numbers: Numbers, n: int) -> Worked:
    made, dx = shown.made, numbers[shown.key]
    i, c = _middle(dx), 0
    terms, over = _spread(made, numbers, "g", "g", (n, c, *i), dx)
    entry, rule = f"dL/dx{_index((n, c, *i))}", f"Σ g[{n},o,q] W[o,{c},k]"
    return _told(entry, rule, dx[(n, c, *i)].item(), over, terms, shared=made["shared"])


def _transposed_input(shown: Shown, numbers: Numbers, n: int) -> Worked:
    made, dy = shown.made, numbers[shown.key]
    q, o = _middle(dy), 0
    terms = _gathered(made, numbers, "g", (n, o, *q), dy)
    entry, rule = f"dL/dy{_index((n, o, *q))}", f"Σ W[{o},c,k] g[{n},c,i]"
    over = f"over {_many(len(terms), 'number')}"
    return _told(entry, rule, dy[(n, o, *q)].item(), over, terms, shared=made["shared"])


def _gathered(made: Options, numbers: Numbers, letter: str, at: Place, y: Tensor) -> list[Term]:
    """The terms of a sum over a window: W[o,c,k] x[n,c,i], or g in the place of x; ``at`` is (n, o, q), o in group 0."""
    x, W, (n, o, *q) = numbers[made[letter]], numbers[made["W"]], at
    pairs = [window(made, a, q[a], x.shape[2 + a], y.shape[2 + a]) for a in range(len(q))]
    return [
        _product(("W", (o, c, *(k for k, _ in met))), W, (letter, (n, c, *(i for _, i in met))), x)
        for c in range(W.shape[1])
        for met in itertools.product(*pairs)
    ]


def _spread(
    made: Options, numbers: Numbers, key: str, letter: str, at: Place, x: Tensor
) -> tuple[list[Term], str]:
    """The terms g[n,o,q] W[o,c,k], or y in the place of g, and what they go over; ``at`` is (n, c, i), c in group 0."""
    g, W, (n, c, *i) = numbers[made[key]], numbers[made["W"]], at
    pairs = [
        [(q, k) for q in range(g.shape[2 + a]) for k, j in window(made, a, q, x.shape[2 + a], g.shape[2 + a]) if j == i[a]]
        for a in range(len(i))
    ]  # fmt: skip
    terms = [
        _product((letter, (n, o, *(q for q, _ in met))), g, ("W", (o, c, *(k for _, k in met))), W)
        for o in range(len(W) // made["groups"])
        for met in itertools.product(*pairs)
    ]
    places = math.prod(map(len, pairs))
    return terms, f"over {_many(len(terms) // max(1, places), 'channel')}, {_many(places, 'place')}"


def _with_bias(
    entry: str,
    rule: str,
    value: float,
    over: str,
    terms: list[Term],
    numbers: Numbers,
    made: Options,
    at: int,
) -> Worked:
    if not made["b"]:
        return _told(entry, rule, value, over, terms)
    b = numbers[made["b"]][at].item()
    return _told(entry, f"b[{at}] + {rule}", value, over, terms, (Term(f"b[{at}]", (b,), b),))


def _weight_gradient(shown: Shown, numbers: Numbers, _: int) -> Worked:
    made, dW = shown.made, numbers[shown.key]
    return _correlated(made, ("g", numbers[made["g"]]), ("x", numbers[made["x"]]), dW)


def _transposed_weight(shown: Shown, numbers: Numbers, _: int) -> Worked:
    made, dW = shown.made, numbers[shown.key]
    return _correlated(made, ("y", numbers[made["x"]]), ("g", numbers[made["g"]]), dW)


def _correlated(made: Options, of_o: tuple[str, Tensor], of_c: tuple[str, Tensor], dW: Tensor) -> Worked:
    """Of all examples and places, g[n,o,q] x[n,c,i], or y and g in their places."""
    (first, g), (second, x), k = of_o, of_c, _middle(dW)
    pairs = [
        [(q, i) for q in range(g.shape[2 + a]) for j, i in window(made, a, q, x.shape[2 + a], g.shape[2 + a]) if j == k[a]]
        for a in range(len(k))
    ]  # fmt: skip
    at = list(itertools.product(*pairs))
    of_g, of_x = g[:, 0], x[:, 0]
    for a, met in enumerate(pairs):
        qs, places = (torch.tensor([pair[side] for pair in met], dtype=torch.long) for side in (0, 1))
        of_g, of_x = of_g.index_select(1 + a, qs), of_x.index_select(1 + a, places)
    products = (of_g * of_x).reshape(len(g), -1)
    largest = products.reshape(-1).abs().topk(min(TOLD, products.numel())).indices.tolist()
    terms = [
        _product((first, (n, 0, *(q for q, _ in at[p]))), g, (second, (n, 0, *(i for _, i in at[p]))), x)
        for n, p in (divmod(flat, len(at)) for flat in largest)
    ]
    over = f"over {_many(len(g), 'example')}, {_many(len(at), 'place')}"
    left = products.numel() - len(terms)
    rest = products.sum().item() - sum(term.value for term in terms)
    value, rest = dW[(0, 0, *k)].item(), rest if left else 0.0
    rule = f"Σ {first}[n,0,q] {second}[n,0,i]"
    return Worked(f"dW{_index((0, 0, *k))}", rule, value, over, tuple(terms), left, rest)


# ----- pools -----


def _maximum(shown: Shown, numbers: Numbers, n: int) -> Worked:
    made, y, x = shown.made, numbers[shown.key], numbers[shown.made["x"]]
    c, *q = _place(
        int(y[n].argmax()), y.shape[1:]
    )  # the largest of all: its window has something to choose from
    chosen = _place(int(numbers[made["i"]][(n, c, *q)]), x.shape[2:])
    window_of = [(n, c, *at) for at in _window_of(made, tuple(q), x, y)]
    terms = [Term(f"x{_index(at)}", (x[at].item(),), x[at].item()) for at in window_of]
    terms.sort(key=lambda term: -term.value)
    rule, over = f"x{_index((n, c, *chosen))}", f"the largest of {_many(len(terms), 'number')}"
    return Worked(f"y{_index((n, c, *q))}", rule, y[(n, c, *q)].item(), over, tuple(terms[:TOLD]))


def _chosen(shown: Shown, numbers: Numbers, n: int) -> Worked:
    made, dx = shown.made, numbers[shown.key]
    g, places = numbers[made["g"]], numbers[made["i"]]
    flat = places[n].flatten(1)
    counts = flat.new_zeros(dx[n].flatten(1).shape).scatter_add_(1, flat, torch.ones_like(flat))
    most = (counts == counts.max()) * dx[n].flatten(1).abs().nan_to_num()
    c, place = _place(
        int((most + (counts == counts.max())).argmax()), counts.shape
    )  # chosen by the most windows
    at = (n, c, *_place(place, dx.shape[2:]))
    windows = [(n, c, *q) for q in (places[n, c] == place).nonzero().tolist()]
    terms = [Term(f"g{_index(q)}", (g[q].item(),), g[q].item()) for q in windows]
    return _told(
        f"dL/dx{_index(at)}",
        f"Σ g[{n},{c},q]",
        dx[at].item(),
        "over the windows that chose it",
        terms,
        shared=made["shared"],
    )


def _mean(shown: Shown, numbers: Numbers, n: int) -> Worked:
    made, y, x = shown.made, numbers[shown.key], numbers[shown.made["x"]]
    q = _middle(y)
    d = mean_divisor(made, q, tuple(x.shape[2:]), tuple(y.shape[2:]))
    terms = [_share(("x", (n, 0, *at)), x, d) for at in _window_of(made, q, x, y)]
    over = f"over {_many(len(terms), 'number')}"
    return _told(f"y{_index((n, 0, *q))}", f"Σ x[{n},0,i] / {d}", y[(n, 0, *q)].item(), over, terms)


def _mean_input(shown: Shown, numbers: Numbers, n: int) -> Worked:
    made, dx, g = shown.made, numbers[shown.key], numbers[shown.made["g"]]
    i = _middle(dx)
    sizes = tuple(dx.shape[2:]), tuple(g.shape[2:])
    windows = [
        [
            q
            for q in range(sizes[1][a])
            if i[a] in [j for _, j in window(made, a, q, sizes[0][a], sizes[1][a])]
        ]
        for a in range(len(i))
    ]
    terms = [_share(("g", (n, 0, *q)), g, mean_divisor(made, q, *sizes)) for q in itertools.product(*windows)]
    over = "over the windows that cover it"
    return _told(
        f"dL/dx{_index((n, 0, *i))}",
        f"Σ g[{n},0,q] / d",
        dx[(n, 0, *i)].item(),
        over,
        terms,
        shared=made["shared"],
    )


MAKERS: Mapping[str, Callable[[Shown, Numbers, int], Worked]] = {
    "convolution": _output,
    "convolution_input": _input_gradient,
    "convolution_weight": _weight_gradient,
    "transposed": _transposed,
    "transposed_input": _transposed_input,
    "transposed_weight": _transposed_weight,
    "maximum": _maximum,
    "chosen": _chosen,
    "mean": _mean,
    "mean_input": _mean_input,
}


# ----- parts -----


def _middle(t: Tensor) -> Place:
    """The place in the middle of the axes of positions, where a window lies within the input."""
    return tuple(size // 2 for size in t.shape[2:])


def _place(flat: int, size: Sequence[int]) -> Place:
    """A place that counts along all axes, as one number for each."""
    return tuple(int(k) for k in torch.unravel_index(torch.tensor(flat), tuple(size)))


def _window_of(made: Options, q: Place, x: Tensor, y: Tensor) -> list[Place]:
    """The places of the input that window q covers."""
    axes = [window(made, a, q[a], x.shape[2 + a], y.shape[2 + a]) for a in range(len(q))]
    return [tuple(i for _, i in at) for at in itertools.product(*axes)]


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _index(at: Place) -> str:
    return f"[{','.join(map(str, at))}]"


def _product(a: tuple[str, Place], of_a: Tensor, b: tuple[str, Place], of_b: Tensor) -> Term:
    left, right = of_a[a[1]].item(), of_b[b[1]].item()
    return Term(f"{a[0]}{_index(a[1])} {b[0]}{_index(b[1])}", (left, right), left * right)


def _share(a: tuple[str, Place], of_a: Tensor, d: int) -> Term:
    number = of_a[a[1]].item()
    return Term(f"{a[0]}{_index(a[1])} / {d}", (number / d,), number / d)


def _told(
    entry: str,
    rule: str,
    value: float,
    over: str,
    terms: list[Term],
    first: tuple[Term, ...] = (),
    shared: bool = False,
) -> Worked:
    """With the largest terms, and of the others their number and their sum.

    Args:
        entry: as in :class:`Worked`, like the next three.
        rule: likewise.
        value: likewise.
        over: likewise.
        terms: all of them.
        first: terms that are told in any case, before the others.
        shared: whether other layers have added to the number.
    """
    terms = sorted(terms, key=lambda term: -abs(term.value))
    rest = terms[TOLD:]
    if shared:
        others = value - sum(term.value for term in terms)
        first = (*first, Term("from other layers that take x", (others,), others))
    amount = sum(term.value for term in rest)
    return Worked(entry, rule, value, over, (*first, *terms[:TOLD]), len(rest), amount)
