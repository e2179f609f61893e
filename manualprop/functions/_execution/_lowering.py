"""Faster forms of the steps of a formula, for a program in eager mode.  Each is the same mathematics.

===============================  =======================================================================
``a + k b c``                    ``addcmul(a, b, c, value=k)``: one pass, one rounding
``a + k b``                      ``add(a, b, alpha=k)``
``indicator(x > c)``             the comparison written into numbers: ATen vectorises a comparison only into
                                 its own dtype; through booleans it is 4 to 7 times as slow
``indicator(p & q)``             the product of the two indicators
``k x l``                        ``k l x``: numbers are multiplied once
``decay(x)``                     ``exp2(x / log 2)``: ATen vectorises exp2 everywhere, exp only with MKL
``chosen(1[x /= c], g)``         a product of the bits of g with integers 0 and 1
``chosen(slope, g)``             the product; zeros are filled in only if it contains a NaN
``1 a``                          ``a``
``less_on_class(b, r, t)``         -r added to b at the class t
``on_class(r, t, b)``             r written into zeros at the class t
``(a * w).sum(-1)``              ``mv(a, w)`` for rows a (N, D) and one vector w (D,); likewise along the first axis
===============================  =======================================================================
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor, fx

from manualprop.functions._execution import _words

LOG2_E = 1 / math.log(2)
Node = Any  # a torch.fx node: its arguments are typed as a union of twenty types
PRODUCTS = frozenset({torch.mul, torch.neg, torch.div})
COMPARISONS = frozenset({torch.gt, torch.ge, torch.lt, torch.le, torch.eq, torch.ne})


def lowered(graph: fx.Graph) -> None:
    """Replace the steps of a traced formula by faster forms, in place."""
    for lower in (
        _ones,
        _choices,
        _indicators,
        _exponentials,
        _on_classes,
        _weighted_sums,
        _sums_of_products,
        _numbers,
    ):
        for node in list(graph.nodes):
            if node.op == "call_function":
                with graph.inserting_before(node):
                    lower(graph, node)
        graph.eliminate_dead_code()


def _replace(node: Node, new: Node) -> None:
    new.meta = node.meta | new.meta
    node.replace_all_uses_with(new)


def _ones(graph: fx.Graph, node: Node) -> None:
    """Replace 1 a by a: some formulas have a factor that is 1 without weights."""
    if node.target is torch.mul:
        a, b = node.args
        for factor, other in ((a, b), (b, a)):
            if isinstance(factor, int | float) and factor == 1:
                node.replace_all_uses_with(other)
                return


# ----- indicators -----


def _indicators(graph: fx.Graph, node: Node) -> None:
    if node.target is not _words.indicator:
        return
    condition, like = node.args
    number = _as_number(graph, condition, like)
    if number is not None:
        _replace(node, number)


def _as_number(graph: fx.Graph, condition: Any, like: Node) -> Node | None:
    if condition.target is torch.bitwise_and or getattr(condition.target, "__name__", "") == "and_":
        sides = [_as_number(graph, side, like) for side in condition.args]
        if None in sides:
            return None
        product = graph.call_function(torch.mul, tuple(sides))
        product.meta = dict(like.meta)
        return product
    x = condition.args[0] if condition.target in COMPARISONS else None
    if not isinstance(x, fx.Node) or x.meta["value"].dtype != like.meta["value"].dtype:
        return None
    number = graph.call_function(condition.target, condition.args)
    made = torch.empty_like(like.meta["value"])  # numbers; the comparison alone would give booleans
    number.meta = {"known": made, "value": made}
    return number


# ----- exponentials -----


def _exponentials(graph: fx.Graph, node: Node) -> None:
    if node.target is _words.decay:
        (x,) = node.args
        scaled = graph.call_function(torch.mul, (x, LOG2_E))
        scaled.meta = dict(node.meta)
        _replace(node, graph.call_function(torch.exp2, (scaled,)))


# ----- classes -----


def _on_classes(graph: fx.Graph, node: Node) -> None:
    if node.target is _words.on_class and isinstance(node.args[0], fx.Node):
        _replace(node, _known(graph.call_function(put_on_class, node.args), node))
    if node.target is not _words.less_on_class:
        return
    b, r, t = node.args
    if isinstance(r, fx.Node):
        minus_r = r.args[0] if r.target is torch.neg else graph.call_function(torch.neg, (r,))
        _replace(node, graph.call_function(torch.scatter_add, (b, 1, t, minus_r)))
    else:
        _replace(node, graph.call_function(torch.scatter, (b, 1, t, -float(r)), {"reduce": "add"}))


def put_on_class(r: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """r 1[c = t], written into zeros.  Half precision as integers: ATen's scatter would convert to float."""
    d, r = torch.zeros_like(like), r.to(like.dtype).expand_as(t)
    if d.itemsize > 2:
        return d.scatter_(1, t, r)
    d.view(torch.int16).scatter_(1, t, r.contiguous().view(torch.int16))
    return d


# ----- sums -----


def _weighted_sums(graph: fx.Graph, node: Node) -> None:
    product, *axes = node.args
    if node.target is not torch.sum or len(axes) != 1 or product.target is not torch.mul:
        return
    a, w = product.args
    if not (isinstance(a, fx.Node) and isinstance(w, fx.Node)):
        return
    if a.meta["value"].shape != product.meta["value"].shape:
        a, w = w, a
    axis = axes[0][0] if isinstance(axes[0], tuple) and len(axes[0]) == 1 else axes[0]
    if a.meta["value"].dim() != 2:
        return
    (N, D), weights = a.meta["value"].shape, w.meta["value"].shape
    if axis in (1, -1) and weights == (D,):
        total = graph.call_function(torch.mv, (a, w))
    elif axis in (0, -2) and weights == (N, 1):
        w = graph.call_function(torch.squeeze, (w, 1))
        total = graph.call_function(torch.mv, (graph.call_function(torch.t, (a,)), w))
    else:
        return
    if node.kwargs.get("keepdim"):
        total = graph.call_function(torch.unsqueeze, (total, axis))
    _replace(node, total)


# ----- sums and products -----


def _sums_of_products(graph: fx.Graph, node: Node) -> None:
    if node.target not in (torch.add, torch.sub) or node.kwargs:
        return
    sign = -1 if node.target is torch.sub else 1
    a, b = node.args
    orders = [(a, b)] if sign < 0 else [(a, b), (b, a)]
    for base, other in orders:
        found = _product(other)
        if found is None:
            continue
        k, factors = found
        if (
            k == 0 and len(factors) == 1 and "known" in factors[0].meta
        ):  # 0 times an indicator is 0: it is finite
            node.replace_all_uses_with(base)
            return
        if len(factors) == 2:
            scale: dict[str, Any] = {} if sign * k == 1 else {"value": sign * k}
            new = graph.call_function(torch.addcmul, (base, *factors), scale)
        elif k != 1 and isinstance(base, (fx.Node, float, int)):
            new = graph.call_function(torch.add, (base, *factors), {"alpha": sign * k})
        else:
            continue
        _replace(node, new)
        return


def _product(node: Any) -> tuple[float, list[Node]] | None:
    """A number and one or two factors whose product is the node; None if the node is used more than once."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return None
    k, factors = _factors(node, True)
    return (k, factors) if 1 <= len(factors) <= 2 and factors != [node] else None


def _factors(node: Node, top: bool, any_divisor: bool = False) -> tuple[float, list[Node]]:
    """A number and the tensors whose product is the node.

    A division becomes a product only for a power of 2, whose inverse is exact.  Other divisions stay: a mean
    is often subtracted from its own elements, and a rounded inverse would show there.
    """
    if node.op == "call_function" and not node.kwargs and (top or len(node.users) == 1):
        if node.target is torch.neg:
            k, factors = _factors(node.args[0], False)
            return -k, factors
        if node.target is torch.div and isinstance(node.args[1], int | float):
            if any_divisor or abs(math.frexp(node.args[1])[0]) == 0.5:
                k, factors = _factors(node.args[0], False)
                return k / node.args[1], factors
        if node.target is torch.mul:
            k, factors = 1.0, []
            for side in node.args:
                if isinstance(side, int | float):
                    k *= side
                else:
                    more, found = _factors(side, False)
                    k, factors = k * more, factors + found
            if len(factors) <= 2:
                return k, factors
            return 1.0, list(node.args) if len(node.all_input_nodes) == 2 else [node]
    return 1.0, [node]


def _numbers(graph: fx.Graph, node: Node) -> None:
    if node.target not in PRODUCTS or any(user.target in PRODUCTS for user in node.users):
        return
    k, factors = _factors(node, True)
    inner = [a for a in node.all_input_nodes if a.target in PRODUCTS and len(a.users) == 1]
    if k == 1 or not inner or not 1 <= len(factors) <= 2:
        return
    product = factors[0] if len(factors) == 1 else graph.call_function(torch.mul, tuple(factors))
    product.meta = node.meta | product.meta
    _replace(node, graph.call_function(torch.mul, (product, k)))


# ----- choices -----

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # the integer type for the bytes of a float
FEW = 2**13  # below this many elements torch.where is as fast as a product


def where_not(x: Tensor, g: Tensor, bound: float, out: Tensor | None = None) -> Tensor:
    """``g`` where ``x`` is not ``bound``, else 0.  A NaN never equals the bound.

    ``x`` may be bytes 0 and 1; ``out`` may be ``x``.  The bits of g are multiplied by integers 0 and 1:
    torch.where and masked_fill take 4 to 40 times as long.
    """
    if x.numel() < FEW or not x.is_cpu:
        zero, differs = kept_number(0.0, g.dtype, g.dtype), x != bound if bound else x.bool()
        return torch.where(differs, g, zero) if out is None else torch.where(differs, g, zero, out=out)
    integers = BITS[g.itemsize]
    out = torch.empty_like(x, dtype=g.dtype) if out is None else out
    k = out.view(integers)
    if x.dtype == torch.uint8:
        k.copy_(x).mul_(g.view(integers))
        return out
    if bound == 0:
        x = torch.add(x, kept_number(0.0, x.dtype, x.dtype), out=out)  # -0 has other bits than 0; -0 + 0 is 0
    torch.ne(x.view(integers), kept_number(bound, x.dtype, integers), out=k)
    k.mul_(g.view(integers))
    return out


@functools.lru_cache(maxsize=256)
def kept_number(value: float, dtype: torch.dtype, view: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # the tensor is cached and outlives inference mode
        return torch.tensor(value, dtype=dtype, device="cpu").view(view)


def multiplied_or_chosen(slope: Tensor, g: Tensor, out: Tensor | None = None) -> Tensor:
    """:func:`chosen` as a product; zeros are filled in only if the product contains a NaN."""
    dx = torch.mul(slope, g, out=out)
    return dx.masked_fill_(slope == 0, 0) if math.isnan(dx.sum().item()) else dx


def _choices(graph: fx.Graph, node: Node) -> None:
    if node.target is not _words.chosen:
        return
    slope, g = node.args
    k, factors = _factors(slope, False, any_divisor=True)
    differs = _difference(graph, factors[0]) if len(factors) == 1 else None
    if differs is not None:
        x, bound = differs
        dx = _known(graph.call_function(where_not, (x, g, bound)), node)
        dx = dx if k == 1 else graph.call_function(torch.mul, (dx, k))
    else:
        dx = _known(graph.call_function(multiplied_or_chosen, (slope, g)), node)
    _replace(node, dx)


def _difference(graph: fx.Graph, indicator: Node) -> tuple[Node, float] | None:
    """x and c if the indicator is 1[x /= c], else None."""
    if indicator.target is _words.inside:
        y, a, b = indicator.args
        return graph.call_function(torch.threshold, (y, a, b)), b
    if indicator.target is not _words.indicator:
        return None
    condition = indicator.args[0]
    if condition.meta["value"].dtype == torch.uint8:
        return condition, 0
    if condition.target is torch.ne:
        x, bound = indicator.args[0].args
        return (x, bound) if isinstance(bound, int | float) else None
    return None


def _known(new: Node, like: Node) -> Node:
    """Give a node its sample value.  Its function reads numbers or memory, so it cannot run on samples."""
    new.meta["known"] = torch.empty_like(like.meta["value"])
    return new
