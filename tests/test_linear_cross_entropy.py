"""Linear layer and cross-entropy in one: equal to the two, in chunks, to the third derivative; logits never whole."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_head
import pytest
import torch
import torch.nn.functional as torch_F
from cases import real
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap
from torch.nn import LinearCrossEntropyOptions as Options
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import manualprop
from manualprop import functional as F
from manualprop import nn
from manualprop.functions._execution import _formula

N, D, C, K = 7, 3, 4, 2
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
CHUNKS = Options(batch_chunk_size=2, allow_retain_graph=True)  # 2, 2, 2 and 1 rows; logits computed again
ONCE = Options(batch_chunk_size=2)


def indices(*shape: int) -> Tensor:
    t = torch.randint(C, shape or (N,), generator=torch.Generator().manual_seed(1))
    t.view(-1)[2] = 1
    return t


def probabilities(*shape: int, grad: bool = True) -> Tensor:
    return real(*(shape or (N, C)), low=0.05, high=0.9, seed=4, grad=grad)


WEIGHT = torch.linspace(0.3, 1.9, C, dtype=torch.float64)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight": {"weight": WEIGHT},
    "smoothing": {"label_smoothing": 0.2},
    "all": {"weight": WEIGHT, "label_smoothing": 0.2},
}


def inputs(kind: str, bias: bool = True, positions: int = 0) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    """x, W and b, the target, and what goes with it."""
    middle = (positions,) * bool(positions)
    x, W, b = real(N, D), real(C, *middle, D, seed=1), real(C, *middle, seed=2)
    target = probabilities(N, C, *middle) if kind == "probabilities" else indices(N, *middle)
    return [x, W, *([b] if bias else [])], target, {"ignore_index": 1} if kind == "ignored" else {}


def ours(target: Tensor, **options: Any) -> Callable[..., Tensor]:
    def f(x: Tensor, W: Tensor, b: Tensor | None = None, t: Tensor = target) -> Tensor:
        return F.linear_cross_entropy(x, W, t, linear_bias=b, **options)

    return f


def composed(target: Tensor, **options: Any) -> Callable[..., Tensor]:
    """torch's two functions, one after the other."""
    options.pop("options", None)

    def f(x: Tensor, W: Tensor, b: Tensor | None = None, t: Tensor = target) -> Tensor:
        z = torch_F.linear(x, W.flatten(0, -2), None if b is None else b.flatten())
        return torch_F.cross_entropy(z.unflatten(1, W.shape[:-1]), t, **options)

    return f


def derivatives(f: Callable[..., Tensor], tensors: list[Tensor], order: int) -> list[Tensor]:
    """The value and all derivatives up to an order, each of a sum of the former without symmetry."""
    y = f(*tensors)
    found = [y]
    for _ in range(order):
        total = sum(((d * direction(d)).sum() for d in found[-len(tensors) :]), y.new_zeros(()))
        found += torch.autograd.grad(total, tensors, create_graph=True)
    return found


def direction(x: Tensor) -> Tensor:
    return torch.linspace(0.3, 1.7, max(x.numel(), 1), dtype=x.dtype)[: x.numel()].reshape(x.shape)


@pytest.fixture(params=[True, False], ids=["small blocks", "whole blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(_formula, "LARGE", 0)
        monkeypatch.setattr(_formula, "CHUNK", C)  # a row at a time
        monkeypatch.setattr(_formula, "STEPS", 1)


# ----- equal to the composition -----


@pytest.mark.parametrize("positions", [0, K], ids=["one loss", "K losses"])
@pytest.mark.parametrize("kind", ["indices", "ignored", "probabilities"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_equals_the_composition(
    reduction: str, options: str, kind: str, positions: int, blocks: None
) -> None:
    """Value, first, second and third derivative of x, W, b and class probabilities, to float64's rounding."""
    tensors, target, more = inputs(kind, positions=positions)
    arguments = {**OPTIONS[options], **more, "reduction": reduction}
    if target.requires_grad:
        tensors.append(target)
    found = derivatives(ours(target, **arguments, options=CHUNKS), tensors, 3)
    torch.testing.assert_close(found, derivatives(composed(target, **arguments), tensors, 3), **CLOSE)


@pytest.mark.parametrize("kind", ["indices", "ignored", "probabilities"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_gradient_made_in_the_forward_pass(reduction: str, options: str, kind: str, blocks: None) -> None:
    for bias, positions in itertools.product((True, False), (0, K)):
        tensors, target, more = inputs(kind, bias, positions)
        arguments = {**OPTIONS[options], **more, "reduction": reduction}
        target = target.detach()
        y = ours(target, **arguments, options=ONCE)(*tensors)
        assert type(y.grad_fn).__name__ == "LinearCrossEntropyOnceBackward"
        expected = derivatives(composed(target, **arguments), tensors, 1)
        found = [y, *torch.autograd.grad(y, tensors, torch.tensor(0.3, dtype=y.dtype))]
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("options", [None, CHUNKS, ONCE], ids=["default", "chunks", "once"])
def test_frozen_weight_frozen_input_and_a_weight_that_is_used_twice(options: Any) -> None:
    tensors, target, _ = inputs("indices")
    whole = derivatives(composed(target), tensors, 1)[1:]
    for wanted in itertools.product((True, False), repeat=3):
        leaves = [t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)]
        y = ours(target, options=options)(*leaves)
        assert y.requires_grad == any(wanted)
        if any(wanted):
            (y * 0.3).backward()
        for leaf, expected, w in zip(leaves, whole, wanted, strict=True):
            assert (leaf.grad is not None) == w
            if w:
                torch.testing.assert_close(leaf.grad, expected, **CLOSE)
    embedding = real(C, D, seed=1)
    tied = ours(target, options=options)(embedding[target], embedding)
    torch.testing.assert_close(
        torch.autograd.grad(tied, embedding),
        torch.autograd.grad(composed(target)(embedding[target], embedding), embedding),
        **CLOSE,
    )


@pytest.mark.parametrize("options", [None, CHUNKS, ONCE], ids=["default", "chunks", "once"])
def test_nothing_that_counts(options: Any) -> None:
    """All targets ignored, or no row at all: torch's values, and gradients of 0."""
    tensors, target, _ = inputs("indices")
    for t, rows in ((torch.full_like(target, 2), N), (target[:0], 0)):
        leaves = [tensors[0][:rows].detach().requires_grad_(), *tensors[1:]]
        for reduction in ("mean", "sum"):
            arguments = {"ignore_index": 2, "reduction": reduction}
            y = ours(t, **arguments, options=options)(*leaves)
            torch.testing.assert_close(y, composed(t, **arguments)(*leaves), equal_nan=True)
            found = torch.autograd.grad(y, leaves)
            assert all(torch.equal(d, torch.zeros_like(a)) for d, a in zip(found, leaves, strict=True))


def test_a_row_that_is_ignored_may_hold_anything() -> None:
    tensors, target, _ = inputs("ignored")
    x = tensors[0].detach().index_fill(0, (target == 1).nonzero()[0], torch.nan)
    y = ours(target, ignore_index=1)(x, *tensors[1:])
    torch.testing.assert_close(y, composed(target, ignore_index=1)(x, *tensors[1:]))
    assert y.isfinite()


def test_class_weights_that_are_trained() -> None:
    """With class probabilities the loss is differentiable in them, in torch too; with class indices both refuse."""
    (x, W, _), target, _ = inputs("probabilities")
    weight = WEIGHT.clone().requires_grad_()
    arguments = {"weight": weight, "label_smoothing": 0.1}
    wanted = x, W, weight, target
    found, expected = (torch.autograd.grad(f(target, **arguments)(x, W), wanted) for f in (ours, composed))
    torch.testing.assert_close(found, expected, **CLOSE)
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'"):
        ours(indices(), weight=weight)(x, W)


# ----- every transform, of every mode -----


@pytest.mark.parametrize("options", [None, CHUNKS, ONCE], ids=["default", "chunks", "once"])
@pytest.mark.parametrize("kind", ["ignored", "probabilities"])
def test_transforms(kind: str, options: Any) -> None:
    """func.grad, jvp, hessian, per-sample gradients and batched weights: in the mode that serves once too."""
    tensors, target, more = inputs(kind)
    target = target.detach()
    x, W, b = (t.detach() for t in tensors)
    mine, torchs = ours(target, **more, options=options), composed(target, **more)
    pairs = [
        (lambda f: grad(f, (0, 1, 2))(x, W, b)),
        (lambda f: jvp(f, (x, W, b), tuple(map(direction, (x, W, b))))),
        (lambda f: hessian(f, (0, 1))(x, W, b)),
        (lambda f: vmap(grad(f, 1), (0, None, 0))(torch.stack([x, 2 * x]), W, torch.stack([b, -b]))),
        (lambda f: vmap(f, (None, 0, None))(x, torch.stack([W, -W]), b)),
    ]
    for route in pairs:
        torch.testing.assert_close(route(mine), route(torchs), **CLOSE)
    several = torch.stack([target, target.flip(0)])
    torch.testing.assert_close(
        vmap(lambda t: grad(mine)(x, W, b, t))(several),
        vmap(lambda t: grad(torchs)(x, W, b, t))(several),
        **CLOSE,
    )


@pytest.mark.parametrize("options", [CHUNKS, ONCE], ids=["chunks", "once"])
def test_compiled(options: Any) -> None:
    tensors, target, more = inputs("ignored")
    mine = ours(target, **more, options=options)
    torch._dynamo.reset()
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        derivatives(compiled, tensors, 1), derivatives(composed(target, **more), tensors, 1), **CLOSE
    )
    x, W, b = (t.detach() for t in tensors)
    for route in (
        lambda: grad(mine, 1)(x, W, b),
        lambda: jvp(lambda z: mine(z, W, b), (x,), (direction(x),)),
        lambda: vmap(grad(lambda z: mine(z, W, b)))(torch.stack([x, -x])),
    ):
        torch._dynamo.reset()
        torch.testing.assert_close(
            torch.compile(route, fullgraph=True, backend="aot_eager")(), route(), **CLOSE
        )


def test_torchs_own_chunks_keep_none_of_this() -> None:
    """What the comparison on the page of limits says of torch 2.13."""
    (x, W, _), target, _ = inputs("indices")

    def torchs(x: Tensor) -> Tensor:
        return torch_F.linear_cross_entropy(x, W, target, options=CHUNKS)

    def mine(x: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, W, target, options=CHUNKS)

    right = composed(target)
    t = direction(x)
    assert jvp(mine, (x,), (t,))[1] != 0 and jvp(torchs, (x,), (t,))[1] == 0
    with pytest.raises(RuntimeError):
        grad(torchs)(x.detach())
    (first,) = torch.autograd.grad(torchs(x), x, create_graph=True)
    second = [
        torch.autograd.grad(derivatives(f, [x], 1)[1].pow(2).sum(), x)[0]
        for f in (mine, lambda z: right(z, W))
    ]
    torch.testing.assert_close(second[0], second[1], **CLOSE)
    assert not first.requires_grad or not torch.allclose(
        torch.autograd.grad(first.pow(2).sum(), x)[0], second[0]
    )


# ----- the mode that serves once -----


def test_a_second_use_raises() -> None:
    tensors, target, _ = inputs("indices")
    y = ours(target, options=ONCE)(*tensors)
    torch.autograd.grad(y, tensors, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"one backward pass.*Got a second pass.*allow_retain_graph=True"):
        torch.autograd.grad(y, tensors)
    with pytest.raises(RuntimeError, match=r"Got create_graph=True. Leave out options"):
        torch.autograd.grad(ours(target, options=ONCE)(*tensors), tensors, create_graph=True)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"jvp"):
        dual = torch.autograd.forward_ad.make_dual(tensors[0].detach(), tensors[0].detach())
        ours(target, options=ONCE)(dual, *tensors[1:])


def test_without_a_gradient_nothing_is_made_in_the_forward_pass() -> None:
    tensors, target, _ = inputs("indices")
    with torch.no_grad():
        assert not ours(target, options=ONCE)(*tensors).requires_grad
    for options in ({"reduction": "none"}, {}):
        y = ours(target, **options, options=ONCE if options else CHUNKS)(*tensors)
        torch.autograd.grad(y.sum(), tensors, create_graph=True)


def test_bytes_kept() -> None:
    """x, W, b and t, all alive anyway, and a log-sum-exp for each row; or the gradient itself."""
    x, W, target = torch.randn(N, D, requires_grad=True), torch.randn(C, D, requires_grad=True), indices()

    class Head(torch.nn.Module):
        def forward(self, *inputs: Tensor, options: Any = None) -> Tensor:
            return F.linear_cross_entropy(*inputs, reduction="sum", options=options)

    default = manualprop.receipt(Head(), x, W, target)
    assert (default.kept, default.inputs) == (8 * N, 4 * N * D + 4 * C * D + 8 * N)
    once = manualprop.receipt(Head(), x, W, target, options=ONCE)
    assert (once.kept, once.inputs) == (4 * (N + C) * D, 0)


# ----- memory -----


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [t.untyped_storage() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.found = max([self.found, *(s.nbytes() for s in made if s._cdata not in given)])
        return result


ROUTES: dict[str, Callable[..., Any]] = {
    "backward": lambda f, x, W: torch.autograd.grad(f(x, W), (x, W)),
    "double backward": lambda f, x, W: (
        derivatives(f, [x, W], 2)
        and torch.autograd.grad(
            sum(d.pow(2).sum() for d in torch.autograd.grad(f(x, W), (x, W), create_graph=True)), (x, W)
        )
    ),
    "func.grad": lambda f, x, W: grad(f, (0, 1))(x.detach(), W.detach()),
    "jvp": lambda f, x, W: jvp(f, (x.detach(), W.detach()), (x.detach(), W.detach())),
    "jvp(grad)": lambda f, x, W: jvp(grad(f), (x.detach(), W.detach()), (x.detach(), W.detach())),
}


ROUTES_AND_KINDS = [
    (route, kind)
    for route in ROUTES
    for kind in ("indices", "smoothed", "probabilities")
    # torch makes a tangent of zeros for class probabilities, which are as large as the logits themselves.
    if not (kind == "probabilities" and "jvp" in route)
]


@pytest.mark.parametrize(("route", "kind"), ROUTES_AND_KINDS)
def test_the_logits_are_never_whole(route: str, kind: str) -> None:
    """On no route is a tensor made that is larger than the logits of a chunk; torch's two functions make the whole."""
    rows, chunk, classes = 64, 8, 128
    x, W = real(rows, D), real(classes, D, seed=1)
    t = torch.arange(rows) if kind != "probabilities" else torch.full((rows, classes), 1 / classes).double()
    arguments = {"label_smoothing": 0.1} if kind == "smoothed" else {}
    options = Options(batch_chunk_size=chunk, allow_retain_graph=True)
    for f, whole in ((ours(t, **arguments, options=options), False), (composed(t, **arguments), True)):
        with Largest() as largest:
            ROUTES[route](f, x, W)
        assert largest.found >= 8 * rows * classes if whole else largest.found <= 8 * chunk * classes


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux' /proc")
@pytest.mark.parametrize("name", [name for name, c in bench_head.CANDIDATES.items() if c.memory is not None])
def test_the_peak_is_a_sixth_of_torchs(name: str) -> None:
    ours, torchs = (bench_head.peak_memory(n, bench_head.PROMISED) for n in (name, "torch"))
    assert ours is not None and torchs is not None and ours <= torchs / 6


def test_chunks_are_as_large_as_asked() -> None:
    tensors, target, _ = inputs("indices")
    sizes: list[int] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                sizes.append(args[-2].shape[0])
            return func(*args, **(kwargs or {}))

    for options, expected in (
        (None, [N]),
        (CHUNKS, [2, 2, 2, 1]),
        (Options(batch_chunk_size=3, allow_retain_graph=True), [3, 3, 1]),
        (Options(chunking_method="aspect_ratio", allow_retain_graph=True), [4, 3]),
    ):
        sizes.clear()
        with Products(), torch.no_grad():
            ours(target, options=options)(*tensors)
        assert sizes == expected


# ----- precision -----


@pytest.mark.parametrize("options", [CHUNKS, ONCE], ids=["chunks", "once"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunks_are_summed_in_float32(dtype: torch.dtype, options: Any) -> None:
    """2048 times the same row, two at a time: a half-precision sum would stand still long before the end."""
    x = torch.full((2048, D), 0.5, dtype=dtype)
    W = real(C, D).detach().to(dtype).requires_grad_()
    target = torch.zeros(2048, dtype=torch.long)
    found, expected = (
        torch.autograd.grad(f(target, reduction="sum", options=options)(x.to(v.dtype), v), v)[0].double()
        for f, v in ((ours, W), (composed, W.detach().double().requires_grad_()))
    )
    torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("options", [CHUNKS, ONCE], ids=["chunks", "once"])
def test_large_logits_lose_no_digits(options: Any) -> None:
    """Softmax does not see what all logits have in common; nor may what is saved of them."""
    tensors, target, _ = inputs("indices")
    x, W, b = (t.detach().float().requires_grad_() for t in tensors)
    offset = (b.detach() * 64).round() / 64 + 2048  # exact in float32, like the sums with it
    coarse = [(t.detach() * 8).round() / 8 for t in (x, W)]
    leaves = [t.requires_grad_() for t in (*coarse, offset)]
    y = ours(target, options=options)(*leaves)
    doubled = [t.detach().double().requires_grad_() for t in leaves]
    expected = derivatives(composed(target), doubled, 1)
    found = [y, *torch.autograd.grad(y, leaves, torch.tensor(0.3))]
    for a, c in zip(found, expected, strict=True):
        assert (a.double() - c).abs().max() <= 4 * torch.finfo(torch.float32).eps * c.abs().max()


def test_autocast_leaves_the_sums_alone() -> None:
    """Forward and a first and a second backward inside of the region, in every mode."""
    tensors, target, _ = inputs("indices")
    leaves = [t.detach().float().requires_grad_() for t in tensors]
    exact = derivatives(composed(target), tensors, 2)
    for options in (CHUNKS, ONCE):
        with torch.autocast("cpu", torch.bfloat16):
            y = ours(target, options=options)(*leaves)
            assert y.dtype == torch.float32
            found = torch.autograd.grad(y, leaves, torch.tensor(0.3), create_graph=options is CHUNKS)
            torch.testing.assert_close([d.double() for d in found], exact[1:4], rtol=0.05, atol=0.02)
            if options is CHUNKS:
                total = sum((d * direction(d)).sum() for d in found)
                second = torch.autograd.grad(total, leaves)
                torch.testing.assert_close([d.double() for d in second], exact[4:], rtol=0.1, atol=0.05)


# ----- the module, and misuse -----


def test_the_module_and_its_short_name() -> None:
    torch.manual_seed(0)
    head = nn.LinearCrossEntropy(D, C, bias=True, label_smoothing=0.1).double()
    assert type(head) is nn.LinearCrossEntropyLoss and isinstance(head, torch.nn.LinearCrossEntropyLoss)
    theirs = torch.nn.LinearCrossEntropyLoss(D, C, bias=True, label_smoothing=0.1).double()
    theirs.load_state_dict(head.state_dict())
    x, t = real(N, D), indices()
    expected = [theirs(x, t), *torch.autograd.grad(theirs(x, t), (x, *theirs.parameters()))]
    torch.testing.assert_close(
        [head(x, t), *torch.autograd.grad(head(x, t), (x, *head.parameters()))], expected, **CLOSE
    )
    manualprop.swap(theirs)
    assert type(theirs) is nn.LinearCrossEntropyLoss and type(theirs.linear) is nn.Linear


@pytest.mark.parametrize(
    ("misuse", "kind", "text"),
    [
        (lambda f: f(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 4])), IndexError, "out of bounds"),
        (lambda f: f(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(3).long()), ValueError, "batch_size"),
        (lambda f: f(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(1).long()), ValueError, "batch_size"),
        (lambda f: f(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2).int()), RuntimeError, "Long"),
        (
            lambda f: f(torch.ones(2, 3), torch.ones(4, 3, 1), torch.zeros(2).long()),
            RuntimeError,
            "in_features",
        ),
        (
            lambda f: f(torch.ones(2, 3), torch.ones(4, 3).double(), torch.zeros(2).long()),
            RuntimeError,
            "dtype",
        ),
        (
            lambda f: f(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2).long(), weight=torch.ones(3)),
            RuntimeError,
            "weight tensor should be defined",
        ),
        (
            lambda f: f(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2).long(), label_smoothing=2.0),
            RuntimeError,
            "label_smoothing must be between",
        ),
        (
            lambda f: f(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2).long(), reduction="avg"),
            ValueError,
            "avg",
        ),
        (
            lambda f: f(torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 4), ignore_index=1),
            RuntimeError,
            "ignore_index cannot be specified",
        ),
    ],
)
def test_misuse_raises_what_torch_raises(misuse: Any, kind: type[Exception], text: str) -> None:
    for f in (torch_F.linear_cross_entropy, F.linear_cross_entropy):
        with pytest.raises(kind, match=text):
            misuse(f)


def test_a_target_of_another_shape_is_refused() -> None:
    with pytest.raises(
        RuntimeError, match=r"target must have the shape \(2,\) for class indices, or \(2, 4\)"
    ):
        F.linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(2, 1).long())
    with pytest.raises(TypeError, match="inputs must be real"):
        F.linear_cross_entropy(torch.ones(2, 3) * 1j, torch.ones(4, 3), torch.zeros(2).long())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_gradient_made_in_forward_is_as_good_as_torchs(dtype: torch.dtype, reduction: str) -> None:
    """Over many draws, its mean error against float64 is at most twice torch's."""

    def gradients(
        function: Any, x: Tensor, W: Tensor, t: Tensor, options: Options | None
    ) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_(), W.clone().requires_grad_()]
        loss = function(*leaves, t, reduction=reduction, options=options)
        return torch.autograd.grad(loss, leaves)

    generator = torch.Generator().manual_seed(1)
    errors = torch.zeros(2, 2, dtype=torch.float64)  # (ours, torch's) (dx, dW)
    for _ in range(100):
        x, W = (torch.randn(n, 32, generator=generator).to(dtype) for n in (15, 50))
        t = torch.randint(50, (15,), generator=generator)
        exact = gradients(torch_F.linear_cross_entropy, x.double(), W.double(), t, None)
        for i, function in enumerate((F.linear_cross_entropy, torch_F.linear_cross_entropy)):
            for j, d in enumerate(gradients(function, x, W, t, Options())):
                errors[i, j] += (d.double() - exact[j]).abs().max() / exact[j].abs().max()
    assert (errors[0] <= 2 * errors[1]).all(), errors[0] / errors[1]
