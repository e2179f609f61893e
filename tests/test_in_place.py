"""The in-place forms: what they keep, and that they meet views, leaves and second uses as torch's do."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as torch_F
from cases import IN_PLACE, Case
from routes import compiled
from torch import Tensor, nn

import manualprop
from manualprop._receipt import receipt
from manualprop._swap import TWINS

Form = Callable[[Tensor], Tensor]
TORCHS = [case for case in IN_PLACE if hasattr(torch_F, case.name)]
ROWS = [pytest.param(case, id=str(case)) for case in TORCHS]
ONE_OF_EACH = [pytest.param(case, id=name) for name, case in {c.name: c for c in reversed(TORCHS)}.items()]
ALPHA = "Alpha"  # torch's alpha dropouts take the argument and do not heed it
MODULES = [
    pytest.param(cls, id=cls.__name__)
    for cls in TWINS.values()
    if "inplace" in inspect.signature(cls).parameters and ALPHA not in cls.__name__
]
ARGUMENTS = {"Threshold": (0.1, 20.0)}


def forms(case: Case) -> tuple[Form, Form]:
    """Ours and torch's, which write over what they are given."""

    def form(function: Any) -> Form:
        def call(x: Tensor) -> Tensor:
            torch.manual_seed(5)
            y: Tensor = function(x, **case.kwargs)
            return y

        return call

    return form(getattr(manualprop.functional, case.name)), form(getattr(torch_F, case.name))


class Called(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x)


# ----- what is kept -----


def channels(x: Tensor) -> int:
    return x.shape[0 if x.dim() == 2 else 1]


NEIGHBOURS: dict[str, Callable[[Tensor], list[nn.Module]]] = {
    "alone": lambda x: [Called(lambda z: z * 1), nn.Identity()],
    "linear": lambda x: [nn.Linear(x.shape[-1], x.shape[-1]), nn.Linear(x.shape[-1], x.shape[-1])],
    "convolution": lambda x: [
        getattr(nn, f"Conv{max(1, x.dim() - 2)}d")(channels(x), channels(x), 1) for _ in range(2)
    ],
    "batch norm": lambda x: [getattr(nn, f"BatchNorm{max(1, x.dim() - 2)}d")(x.shape[1]) for _ in range(2)],
}


def kept_between(form: nn.Module, neighbours: Callable[[Tensor], list[nn.Module]], x: Tensor) -> int:
    before, after = neighbours(x)
    return receipt(nn.Sequential(before, form, after), x).kept


def torch_differentiates(form: Form, x: Tensor) -> bool:
    """torch's in-place elu, celu and leaky_relu keep their output, from which a negative slope cannot be told."""
    try:
        form(x * 1).sum().backward()
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("neighbours", NEIGHBOURS)
@pytest.mark.parametrize("case", ROWS)
def test_keeps_no_more_than_torchs(case: Case, neighbours: str) -> None:
    (x,) = case.made(torch.float32)
    ours, torchs = forms(case)
    if torch_differentiates(torchs, x):
        kept = [kept_between(Called(form), NEIGHBOURS[neighbours], x) for form in (ours, torchs)]
        assert kept[0] <= kept[1], kept


@pytest.mark.parametrize("cls", MODULES)
def test_modules_keep_no_more_than_torchs(cls: type[nn.Module]) -> None:
    given = ARGUMENTS.get(cls.__name__, ())
    x = torch.linspace(-2.9, 3.1, 12).reshape((1, 3, 4) if cls.__name__.endswith("1d") else (1, 3, 2, 2))
    for neighbours in NEIGHBOURS.values():
        kept = [kept_between(c(*given, inplace=True), neighbours, x) for c in (cls, cls.__bases__[0])]
        assert kept[0] <= kept[1], kept


def test_the_commonest_convolutional_model_keeps_no_more_when_swapped() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)]
    model, x = nn.Sequential(*layers, nn.Conv2d(8, 8, 3)), torch.randn(2, 8, 16, 16)
    before = receipt(model, x).kept
    manualprop.swap(model, check=x)
    assert type(model[2]) is manualprop.nn.ReLU
    assert receipt(model, x).kept <= before


# ----- meeting the rest of autograd -----


def outcome(situation: Callable[[Form, Tensor], Any], form: Form, x: Tensor) -> Any:
    """What comes out; or what is raised, and what is left in ``x`` then; or None for what torch has not."""
    try:
        return situation(form, x)
    except RuntimeError as error:
        missing = "not implemented" in str(error) or "forward AD" in str(error)
        return None if missing else (type(error), x.detach().clone())


def second_use(form: Form, x: Tensor) -> Any:
    hidden = x * 1
    used = hidden.sin()
    form(hidden)
    used.sum().backward()


def leaf(form: Form, x: Tensor) -> Any:
    form(x)


def view_of_a_leaf(form: Form, x: Tensor) -> Any:
    form(x[:])


def view_made_without_gradients(form: Form, x: Tensor) -> Any:
    hidden = x * 1
    with torch.no_grad():
        view = hidden[:]
    form(view)


def one_of_several_views(form: Form, x: Tensor) -> Any:
    form((x * 1).unbind(0)[1])


def without_gradients(form: Form, x: Tensor) -> Any:
    with torch.no_grad():
        return form(x), x.detach().clone(), x.is_leaf


def version(form: Form, x: Tensor) -> Any:
    hidden = x * 1
    before = hidden._version
    assert form(hidden) is hidden
    return hidden._version > before


def retained(form: Form, x: Tensor) -> Any:
    hidden, heard = x * 1, []
    hidden.register_hook(heard.append)
    form(hidden)
    hidden.retain_grad()
    (hidden * hidden).sum().backward()
    return hidden.grad, heard, x.grad


def of_a_view(take: Callable[[Tensor], Tensor]) -> Callable[[Form, Tensor], Any]:
    """Values, first and second derivatives, of the view and of what it shows."""

    def situation(form: Form, x: Tensor) -> Any:
        hidden = x * 1
        view = take(hidden)
        y = form(view)
        g = torch.linspace(0.3, 1.7, x.numel(), dtype=x.dtype).view(x.shape)
        (dx,) = torch.autograd.grad((hidden * g).sum() + y.pow(2).sum(), x, create_graph=True)
        return y, hidden, dx, torch.autograd.grad(dx.pow(2).sum(), x)

    return situation


def forward_mode(take: Callable[[Tensor], Tensor]) -> Callable[[Form, Tensor], Any]:
    def situation(form: Form, x: Tensor) -> Any:
        g = torch.linspace(0.3, 1.7, x.numel(), dtype=x.dtype).view(x.shape)
        with forward_ad.dual_level():
            hidden = forward_ad.make_dual(x * 1, g)
            y = form(take(hidden))
            return [forward_ad.unpack_dual(t).tangent.detach().clone() for t in (hidden, y)]  # type: ignore[union-attr]

    return situation


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda h: h,
    "flat view": lambda h: h.view_as(h),
    "transposed": lambda h: h.transpose(0, 1).transpose(0, 1),
    "part": lambda h: h[1:],
}
SITUATIONS: dict[str, Callable[[Form, Tensor], Any]] = {
    s.__name__: s
    for s in (
        second_use,
        leaf,
        view_of_a_leaf,
        view_made_without_gradients,
        without_gradients,
        version,
        retained,
    )
} | {f"{kind}, {name}": make(take) for kind, make in (("reverse", of_a_view), ("forward", forward_mode)) for name, take in VIEWS.items()}  # fmt: skip


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_does_what_torchs_does(case: Case, situation: str) -> None:
    ours, torchs = (outcome(SITUATIONS[situation], form, case.made()[0]) for form in forms(case))
    if raised(torchs):
        assert raised(ours) and ours[0] is torchs[0]
        assert torch.equal(ours[1], torchs[1]), "written to before it was refused"
    elif torchs is not None or situation == "second_use":
        torch.testing.assert_close(ours, torchs, rtol=1e-7, atol=1e-7)


def raised(found: Any) -> bool:
    return isinstance(found, tuple) and isinstance(found[0], type)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(2, 3, 2),
        nn.ConvTranspose1d(2, 3, 2),
        nn.BatchNorm1d(2).eval(),
        nn.GroupNorm(2, 2),
        nn.Linear(4, 3),
        nn.MaxPool1d(2),
        nn.Upsample(scale_factor=2),
        nn.GELU(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_the_result_of_a_layer_under_vmap_may_be_written_over(layer: nn.Module) -> None:
    """The batch axis makes it a view, and autograd refuses to write into a view that a Function returned."""
    found = []
    for model in (nn.Sequential(layer, nn.ReLU(inplace=True)), nn.Sequential(layer, nn.ReLU(inplace=True))):
        x = torch.linspace(-1, 1, 48, dtype=torch.float64).view(2, 3, 2, 4).requires_grad_()
        y = torch.vmap(model.double(), in_dims=1, out_dims=1)(x)
        y.square().sum().backward()
        found.append((y, x.grad))
        manualprop.swap(layer)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_one_of_several_views_is_refused_as_torch_refuses_it(case: Case) -> None:
    if case.made()[0].dim() > 2:  # of fewer axes, the dropouts of channels refuse it themselves
        return
    found = [outcome(one_of_several_views, form, case.made()[0]) for form in forms(case)]
    assert raised(found[0]) and found[0][0] is found[1][0]


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_one_number_in_several_places_is_refused(case: Case) -> None:
    """As by torch, but for its threshold, which writes there."""
    (x,) = case.made()
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        forms(case)[0]((x[:1] * 1).expand(x.shape))


# ----- compiled -----


@pytest.mark.parametrize("cls", MODULES)
def test_compiles_within_a_swapped_model(cls: type[nn.Module]) -> None:
    torchs = cls.__bases__[0]
    torch.manual_seed(0)
    x = torch.linspace(-2.9, 3.1, 12, dtype=torch.float64).reshape(1, 3, 4)
    x = x if cls.__name__.endswith("1d") else x.reshape(1, 3, 2, 2)
    size, given = x.shape[-1], ARGUMENTS.get(cls.__name__, ())
    model = nn.Sequential(nn.Linear(size, size), torchs(*given, inplace=True), nn.Linear(size, size)).double()
    found = []
    for make in (lambda m: m, manualprop.swap, compiled):
        made = make(model)
        run = model if isinstance(made, manualprop._swap.Report) else made
        torch._dynamo.reset()
        torch.manual_seed(3)
        model.zero_grad()
        y = run(x)
        y.pow(2).sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert type(model[1]).__module__.startswith("manualprop") and len(found[0]) == 5
    torch.testing.assert_close(found[1], found[0], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found[2], found[1], rtol=1e-12, atol=1e-13)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:`torch.jit")  # inductor's own
@pytest.mark.parametrize("name", ["relu", "silu", "threshold", "dropout"])
def test_inductor_gives_the_same(name: str) -> None:
    case = next(c for c in IN_PLACE if c.name == name)

    def f(x: Tensor) -> Tensor:
        hidden = x * 2
        y: Tensor = getattr(manualprop.functional, name)(hidden, **case.kwargs)
        return hidden * y

    found = []
    for function in (f, torch.compile(f, fullgraph=True)):
        torch._dynamo.reset()
        (x,) = case.made()
        torch.manual_seed(5)
        y = function(x)
        found.append((y.detach(), torch.autograd.grad(y.sum(), x)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-13)
