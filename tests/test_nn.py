"""The modules: torch's twins in everything but the gradient's origin"""

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import manualprop
from manualprop._swap import TWINS

pytestmark = pytest.mark.quick

ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "Linear": (3, 2),
    "Bilinear": (3, 2, 4),
    "LazyLinear": (4,),
    "Threshold": (0.1, 20.0),
    "LayerNorm": (3,),
    "RMSNorm": (3,),
    "GroupNorm": (1, 3),
    "Embedding": (5, 3),
    **{f"{n}Pool{d}d": (2,) for n in ("Max", "AdaptiveMax") for d in (1, 2, 3)},
    **{f"LPPool{d}d": (2, 3) for d in (1, 2, 3)},
    **{f"MaxUnpool{d}d": (2,) for d in (1, 2, 3)},
    **{f"FractionalMaxPool{d}d": (2, 3) for d in (2, 3)},
    "LinearCrossEntropyLoss": (3, 4),
    **{f"{kind}{d}d": (3, 2, 2) for kind in ("Conv", "ConvTranspose") for d in (1, 2, 3)},
    **{f"Lazy{kind}{d}d": (2, 2) for kind in ("Conv", "ConvTranspose") for d in (1, 2, 3)},
    **{f"BatchNorm{d}d": (3,) for d in (1, 2, 3)},
    **{f"InstanceNorm{d}d": (3,) for d in (1, 2, 3)},
    **{
        f"{kind}Pad{d}d": (1,)
        for kind in ("Circular", "Reflection", "Replication", "Zero")
        for d in (1, 2, 3)
    },
    **{f"ConstantPad{d}d": (1, 0.5) for d in (1, 2, 3)},
    "Unflatten": (1, (3, 1)),
    "LocalResponseNorm": (2,),
    "PixelShuffle": (2,),
    "PixelUnshuffle": (2,),
    **{f"AvgPool{d}d": (2,) for d in (1, 2, 3)},
    **{f"AdaptiveAvgPool{d}d": (2,) for d in (1, 2, 3)},
}
PAIRS = [pytest.param(torchs, ours, id=ours.__name__) for torchs, ours in TWINS.items()]


def make(cls: type[nn.Module], **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return cls(*ARGUMENTS.get(cls.__name__, ()), **kwargs)


@pytest.mark.filterwarnings("ignore:.*NLLLoss2d.*:FutureWarning", "ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(("torchs", "ours"), PAIRS)
def test_is_the_twin_of_torchs(torchs: type[nn.Module], ours: type[nn.Module]) -> None:
    assert ours.__name__ == torchs.__name__ and issubclass(ours, torchs)
    assert inspect.signature(ours) == inspect.signature(torchs)
    theirs, mine = make(torchs), make(ours)
    assert repr(theirs) == repr(mine)
    assert list(theirs.state_dict()) == list(mine.state_dict())
    if torch.nn.parameter.is_lazy(next(mine.parameters(), None)):
        return
    for a, b in zip(theirs.state_dict().values(), mine.state_dict().values(), strict=True):
        assert torch.equal(a, b), "not initialised as torch's"
    for clone in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), saved_and_loaded(mine)):
        assert type(clone) is ours and repr(clone) == repr(mine)
        assert all(torch.equal(a, b) for a, b in zip(clone.parameters(), mine.parameters(), strict=True))


def saved_and_loaded(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert isinstance(loaded, nn.Module)
    return loaded


def test_device_and_dtype_arguments() -> None:
    layer = manualprop.nn.Linear(3, 2, bias=False, device="meta", dtype=torch.float16)
    assert layer.weight.is_meta and layer.weight.dtype == torch.float16 and layer.bias is None
    assert layer(torch.empty(4, 3, device="meta", dtype=torch.float16)).shape == (4, 2)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [
        ("LazyLinear", (4,), (5, 3)),
        ("LazyBatchNorm1d", (), (5, 3)),
        ("LazyBatchNorm2d", (), (5, 3, 2, 2)),
        ("LazyBatchNorm3d", (), (5, 3, 2, 1, 2)),
        *((f"LazyConv{d}d", (4, 2), (5, 3, *[3] * d)) for d in (1, 2, 3)),
        *((f"LazyConvTranspose{d}d", (4, 2), (5, 3, *[2] * d)) for d in (1, 2, 3)),
    ],
)
def test_a_lazy_layer_becomes_ours(name: str, arguments: tuple[int, ...], shape: tuple[int, ...]) -> None:
    layer = getattr(manualprop.nn, name)(*arguments)
    x = torch.ones(shape, requires_grad=True)
    rule = type(layer(x).grad_fn).__name__
    assert type(layer) is getattr(manualprop.nn, name.removeprefix("Lazy"))
    of_ours = [f"{rule}Backward" for rule in ("Linear", "BatchNorm", "Convolution", "TransposedConvolution")]
    assert type(layer(x).grad_fn).__name__ == rule and rule in of_ours, rule
    (swapped,) = manualprop.swap(nn.Sequential(getattr(nn, name)(*arguments))).model
    swapped(x)
    assert type(swapped) is type(layer)


INPLACE = [
    pytest.param(cls, id=cls.__name__)
    for cls in TWINS.values()
    if "inplace" in inspect.signature(cls).parameters
    and "Alpha" not in cls.__name__  # torch's alpha dropouts take the argument and do not heed it
]


@pytest.mark.parametrize("cls", INPLACE)
def test_inplace_is_torchs(cls: type[nn.Module]) -> None:
    """Returns its very input, overwritten, with the right gradient; refuses a leaf that needs one."""
    torchs = cls.__bases__[0]
    found = {}
    shape = (1, 3, 4) if cls.__name__.endswith("1d") else (1, 3, 2, 2)
    for kind in (cls, torchs):
        x = torch.linspace(-2.9, 3.1, 12, dtype=torch.float64).reshape(shape).requires_grad_()
        hidden = x * 1
        torch.manual_seed(2)
        y = make(kind, inplace=True)(hidden)
        assert y is hidden, kind
        found[kind] = (y.detach().clone(), torch.autograd.grad(y.pow(2).sum(), x)[0])
    torch.testing.assert_close(found[cls], found[torchs])
    for kind in (cls, torchs):
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            make(kind, inplace=True)(torch.ones(shape, requires_grad=True))


def test_relu_squared() -> None:
    """Ours alone: torch has no such layer."""
    layer, written_over = manualprop.nn.ReLUSquared(), manualprop.nn.ReLUSquared(inplace=True)
    assert repr(layer) == "ReLUSquared()" and repr(written_over) == "ReLUSquared(inplace=True)"
    for clone in (copy.deepcopy(written_over), pickle.loads(pickle.dumps(written_over))):
        assert type(clone) is manualprop.nn.ReLUSquared and clone.inplace
    x = torch.linspace(-2, 3, 6, requires_grad=True)
    hidden = x * 1
    assert torch.equal(layer(x), x.relu().square()) and written_over(hidden) is hidden
    torch.testing.assert_close(torch.autograd.grad(hidden.sum(), x)[0], 2 * x.relu())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_relu_squared_where_its_square_leaves_the_precision(dtype: torch.dtype) -> None:
    x = torch.tensor([1e-4, 300.0], dtype=dtype, requires_grad=True)
    (slope,) = torch.autograd.grad(manualprop.functional.relu_squared(x).sum(), x, create_graph=True)
    torch.testing.assert_close(slope, 2 * x)
    assert torch.autograd.grad(slope.sum(), x)[0].tolist() == [2, 2]


def torch_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 4), nn.LeakyReLU(0.2), nn.Sequential(nn.Linear(4, 4), nn.GELU("tanh")), nn.Linear(4, 2)
    ).double()


@pytest.mark.parametrize(
    ("misuse", "kind", "text"),
    [
        (lambda F: F.relu(3.0), TypeError, "must be Tensor"),
        *(
            (misuse, TypeError, "[Tt]ensor|conv2d")
            for misuse in (
                lambda F: F.conv2d(None, torch.ones(1, 1, 1, 1)),
                lambda F: F.conv_transpose1d([1.0], torch.ones(1, 1, 1)),
                lambda F: F.max_pool2d([1.0], 2),
                lambda F: F.layer_norm([1.0], (1,)),
                lambda F: F.rms_norm(None, (1,)),
                lambda F: F.dropout([1.0]),
            )
        ),
        (lambda F: F.adaptive_avg_pool2d(torch.ones(3, 4), 2), RuntimeError, r"[Gg]ot \[3, 4\]"),
        (lambda F: F.adaptive_avg_pool3d(torch.ones(3, 4), 2), RuntimeError, r"[Gg]ot \[3, 4\]"),
        (lambda F: F.adaptive_avg_pool2d(torch.ones(3, 4), (2, 2)), ValueError, "at least 3"),
        (lambda F: F.linear(torch.ones(2, 3), torch.ones(4, 5)), RuntimeError, "cannot be multiplied"),
        (lambda F: F.linear(torch.ones(2, 3), torch.ones(4, 3, dtype=torch.float64)), RuntimeError, "dtype"),
        (lambda F: F.gelu(torch.ones(2), approximate="sigmoid"), RuntimeError, "approximate"),
        (lambda F: F.softshrink(torch.ones(2), -1.0), RuntimeError, "lambda must be"),
        (lambda F: F.mse_loss(torch.ones(2), torch.ones(2), reduction="avg"), ValueError, "avg"),
        (lambda F: F.cross_entropy(torch.ones(2, 3), torch.tensor([0, 3])), IndexError, "out of bounds"),
        (lambda F: F.cross_entropy(torch.ones(2, 3), torch.zeros(3).long()), ValueError, "batch_size"),
        (
            lambda F: F.cross_entropy(torch.ones(2, 3), torch.ones(2, 3).long()),
            RuntimeError,
            "floating point",
        ),
        (
            lambda F: F.cross_entropy(torch.ones(2, 3), torch.tensor([0, 1]), torch.ones(2)),
            RuntimeError,
            "weight",
        ),
        (
            lambda F: F.cross_entropy(torch.ones(2, 3), torch.tensor([0, 1]), label_smoothing=2.0),
            RuntimeError,
            "label_smoothing",
        ),
        (
            lambda F: F.cross_entropy(torch.ones(2, 3), torch.ones(2, 3), label_smoothing=2.0),
            RuntimeError,
            "label_smoothing",
        ),
        (lambda F: F.softmax(torch.ones(2), dim=3), IndexError, "Dimension out of range"),
    ],
)
def test_misuse_raises_what_torch_raises(misuse: Any, kind: type[Exception], text: str) -> None:
    for module in (torch.nn.functional, manualprop.functional):
        with pytest.raises(kind, match=text):
            misuse(module)


def test_what_the_rules_are_not_derived_for_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Tanh: inputs must be real.*Got torch.complex64"):
        manualprop.functional.tanh(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"softplus: beta must be positive. Got beta=-1.0"):
        manualprop.functional.softplus(torch.ones(2), beta=-1.0)


def test_implicit_dim_warns_as_torch_does() -> None:
    for module in (nn.Softmax(), manualprop.nn.Softmax()):
        with pytest.warns(UserWarning, match="Implicit dimension choice for softmax") as caught:
            module(torch.ones(2, 3))
        assert caught[0].filename == __file__ or "module.py" in caught[0].filename


def test_integer_inputs() -> None:
    """As torch: a float for tanh, an integer for relu."""
    x = torch.tensor([-1, 0, 2])
    assert torch.equal(manualprop.functional.tanh(x), torch.tanh(x))
    assert torch.equal(manualprop.functional.relu(x), torch.relu(x))


def test_a_swapped_model_trains() -> None:
    model = manualprop.swap(torch_model()).model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(30):
        loss = manualprop.functional.mse_loss(model(x), x[:, :2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("name", ["relu", "tanh", "gelu", "elu"])
def test_an_elementwise_function_takes_a_jagged_tensor(name: str) -> None:
    gradients = []
    for functional in (manualprop.functional, torch.nn.functional):
        x = jagged()
        y = getattr(functional, name)(x)
        (y + x).values().square().sum().backward()  # of one raggedness: they add
        assert x.grad is not None and x.grad.is_nested
        gradients.append(x.grad.values())
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize(
    "layer", [manualprop.nn.Linear(4, 2), manualprop.nn.Softmax(-1), manualprop.nn.LayerNorm(4)]
)
def test_a_gradient_of_a_nested_tensor_is_refused_by_any_other_layer(layer: nn.Module) -> None:
    with pytest.raises(NotImplementedError, match=r"without ragged axes.*values\(\)"):
        layer(jagged())
    padded = torch.nested.to_padded_tensor(jagged(), 0.0)
    layer(padded).sum().backward()


def jagged() -> torch.Tensor:
    rows = [torch.linspace(-2, 2, 8).view(2, 4), torch.linspace(-1, 3, 12).view(3, 4)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 1e6, -1e6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_threshold_is_not_rounded_to_half_precision(threshold: float, dtype: torch.dtype) -> None:
    """torch compares with the number given: the half-precision number next to 0.3 is above it, that next to 0.1 below."""
    found = []
    for module in (manualprop.functional, torch.nn.functional):
        x = torch.tensor([threshold, 0.0, 1.0, -1.0]).clamp(-6e4, 6e4).to(dtype).requires_grad_()
        found.append(torch.autograd.grad(module.threshold(x, threshold, 2.0).sum(), x)[0])
    assert torch.equal(*found)
