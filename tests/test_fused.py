"""The blocks as modules: what they keep, whose parameters they use, what they refuse; numbers packed into bits."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as torch_F
from cases import real
from routes import FORWARD, REVERSE
from test_routes import tripled
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import manualprop
from manualprop import functional as F
from manualprop import functions as rules
from manualprop import nn as ours
from manualprop.functions._execution._bits import keep_bits, kept_bytes, pack, unpack
from manualprop.nn.fused import batch_norm_activation_conv

N, I, H = 6, 3, 5

# ----- bits -----


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1001])
def test_packing_and_back(count: int) -> None:
    k = torch.randint(2, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    bits = pack(k)
    assert bits.numel() == (count + 7) // 8 and bits.dtype == torch.uint8
    assert torch.equal(unpack(bits, k.shape), k)


def test_transforms_pack_the_same_bits() -> None:
    """Inside of vmap and of the compiler there are no integers of eight bytes to read them as."""
    k = torch.randint(2, (3, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([pack(row) for row in k])
    assert torch.equal(torch.vmap(pack)(k), expected)
    assert torch.equal(torch.vmap(lambda b: unpack(b, torch.Size([20])))(expected), k)
    compiled = torch.compile(pack, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(k[0]), expected[0])


@pytest.mark.parametrize("change", [lambda k: k, lambda k: k.to(memory_format=torch.channels_last)])
def test_bits_come_back_in_the_order_of_memory(change: Callable[[Tensor], Tensor]) -> None:
    class Context:
        pass

    ctx = Context()
    k = change(torch.randint(2, (2, 3, 4, 5), dtype=torch.uint8))
    back = kept_bytes(ctx, keep_bits(ctx, k)).float() / 0.5
    assert torch.equal(back, 2 * k.float()) and back.stride() == k.stride()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own, on import
@pytest.mark.parametrize("layer", [ours.Dropout(0.5), ours.AlphaDropout(0.5), ours.PackedReLU()], ids=repr)
def test_a_bit_in_eager_mode_a_byte_compiled(layer: torch.nn.Module) -> None:
    """Compiled kernels read bytes; torch's own, compiled, keep one for each element too."""
    x = torch.randn(16, 24, requires_grad=True)
    for run, bytes_kept in (
        (layer, x.numel() // 8),
        (torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition"), x.numel()),
    ):
        sizes: list[int] = []
        with saved_tensors_hooks(lambda t, s=sizes: s.append(t.untyped_storage().nbytes()) or t, lambda t: t):
            y = run(x)
        assert sum(sizes) == bytes_kept
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(dx != 0, y != y.flatten().mode().values)  # half of the outputs are one number


# ----- the rules -----

W, V = real(I, I, low=-0.8, high=0.9, seed=1, grad=False), real(I, I, low=-0.7, high=0.9, seed=2, grad=False)
X = torch.linspace(-0.9, 0.8, 4 * I, dtype=torch.float64).reshape(4, I)
K = real(I, 2, 2, low=-0.8, high=0.9, seed=1, grad=False)
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "LinearActivation": lambda x: F.linear_activation(x, W, keep="input"),
    "ActivationLinear": lambda x: F.activation_linear(x, W),
    "MLP": lambda x: F.mlp(x, W, None, V, None, keep="input"),
    "GatedLinear": lambda x: F.gated_linear(x, X.flip(0), V),
    "GatedMLP": lambda x: F.gated_mlp(x, W, V, W.t(), keep="input"),
    "PackedReLU": F.packed_relu,
    "LayerNormLinear": lambda x: F.layer_norm_linear(x + X.flip(1) ** 2, None, None, W),
    "RMSNormLinear": lambda x: F.rms_norm_linear(x, None, W),
    "BatchNormActivationConvolution": lambda x: normed(x, None, None, training=True),
    "BatchNormEvaluationActivationConvolution": lambda x: normed(x, X[:1, 0].expand(2), X[-1:, 2].expand(2)),
}


def normed(x: Tensor, *running: Tensor | None, training: bool = False) -> Tensor:
    x = (x + X.flip(1) ** 2).reshape(2, 2, I)
    return F.batch_norm_activation_conv(x, *running, None, None, K, activation="silu", training=training)


@pytest.mark.parametrize("name", FORMS)
def test_every_route_runs_the_hand_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule tripled on purpose comes out tripled."""
    right = {route: run(FORMS[name], X) for route, run in (REVERSE | FORWARD).items()}
    monkeypatch.setattr(rules, name, tripled(getattr(rules, name)))
    for route, run in (REVERSE | FORWARD).items():
        assert right[route].abs().max() > 0.01
        torch.testing.assert_close(run(FORMS[name], X), 3 * right[route], msg=lambda m, r=route: f"{r}: {m}")


def test_relu_dropout_from_its_output_is_relu_then_dropout() -> None:
    x = torch.tensor([-1.0, 0.0, 1e-45, 1e-30, 3.0, torch.inf], requires_grad=True)
    for seed in range(5):
        found = []
        for f in (
            lambda z: F.relu_dropout(z, 0.4),
            lambda z: torch_F.dropout(torch.relu(z), 0.4),
        ):
            torch.manual_seed(seed)
            y = f(x)
            found += [y, torch.autograd.grad(y, x, torch.ones_like(x))[0]]
        torch.testing.assert_close(found[0], found[2], equal_nan=True)
        known = found[0].isfinite()  # a dropped infinity is NaN, here and there
        torch.testing.assert_close(found[1][known], found[3][known])


@pytest.mark.parametrize("weight", [0.0, 1e-30])
def test_norm_linear_is_right_where_the_weight_vanishes(weight: float) -> None:
    """From the output of the norm, x could not be found again."""
    x, w = real(N, I), torch.full((I,), weight, dtype=torch.float64, requires_grad=True)
    c, linear = real(I, seed=3), real(H, I, seed=1)
    pairs = (
        (
            lambda: F.layer_norm_linear(x, w, c, linear),
            lambda: torch_F.linear(torch_F.layer_norm(x, (I,), w, c), linear),
        ),
        (
            lambda: F.rms_norm_linear(x, w, linear),
            lambda: torch_F.linear(torch_F.rms_norm(x, (I,), w), linear),
        ),
    )
    for mine, torchs in pairs:
        wanted = [x, w, linear]
        expected = torch.autograd.grad(torchs().pow(2).sum(), wanted)
        assert expected[1].abs().max() > 0.01 or c is None or mine is pairs[1][0]
        torch.testing.assert_close(torch.autograd.grad(mine().pow(2).sum(), wanted), expected)


def saved(run: Callable[[], Tensor]) -> set[int]:
    found = set()

    def hold(t: Tensor) -> Tensor:
        found.add(t.untyped_storage().data_ptr())
        return t

    with saved_tensors_hooks(hold, lambda t: t):
        y = run()
    del y
    return found


def test_nothing_is_saved_that_nobody_needs() -> None:
    def pointer(t: Tensor) -> int:
        return t.untyped_storage().data_ptr()

    u, a, weight = real(N, H), real(N, H, seed=2), real(4, H, seed=1)
    assert saved(lambda: F.activation_linear(u, weight.detach())) == {pointer(u), pointer(weight)}
    assert saved(lambda: F.activation_linear(u.detach(), weight)) == {pointer(u)}
    bias = real(4, seed=4)
    assert saved(lambda: F.activation_linear(u.detach(), weight.detach(), bias)) == set()
    assert saved(lambda: F.gated_linear(u.detach(), a, weight.detach())) == {pointer(u), pointer(weight)}
    assert saved(lambda: F.gated_linear(u.detach(), a.detach(), weight)) == {pointer(u), pointer(a)}


@pytest.mark.parametrize("shape", [(0, I), (2, 0, I)])
@pytest.mark.parametrize(
    "make",
    [
        lambda: ours.MLP(I, H, 2, dropout=0.5),
        lambda: ours.MLP(I, H, 2, keep="input"),
        lambda: ours.LinearActivation(I, H, keep="input"),
        lambda: ours.ActivationLinear(I, H, dropout=0.5),
        lambda: ours.GatedMLP(I, H, 2),
        lambda: ours.GatedMLP(I, H, 2, keep="input"),
        lambda: ours.ReLUDropout(),
        lambda: ours.PackedReLU(),
        lambda: ours.LayerNormLinear(I, H),
        lambda: ours.RMSNormLinear(I, H),
    ],
)
def test_no_rows(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    block, x = make(), torch.zeros(shape, requires_grad=True)
    block(x).sum().backward()
    assert x.grad is not None and x.grad.shape == shape
    assert all(p.grad is not None and not p.grad.any() for p in block.parameters())


@pytest.mark.parametrize("weight", [0.0, 1e-30])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_conv_is_right_where_the_weight_vanishes(weight: float, training: bool) -> None:
    """From the output of the norm, x could not be found again, nor from that of ReLU."""
    x, w, c = (
        real(2, I, 4),
        torch.full((I,), weight, dtype=torch.float64, requires_grad=True),
        real(I, seed=3),
    )
    kernel, wanted = real(2, I, 2, seed=1), []
    running = torch.zeros(I).double(), torch.ones(I).double()
    y = F.batch_norm_activation_conv(x, *running, w, c, kernel, training=training)
    h = torch.relu(torch_F.batch_norm(x, running[0] * 0, running[1] * 0 + 1, w, c, training=training))
    for value in (y, torch_F.conv1d(h, kernel)):
        wanted.append(torch.autograd.grad(value.pow(2).sum(), [x, w, c, kernel]))
    assert wanted[1][1].abs().max() > 0.01
    torch.testing.assert_close(*wanted)


# ----- the modules -----


class Gated(nn.Module):
    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch_F.silu(self.gate(x)) * self.up(x))
        return y


def composed(block: Any) -> nn.Module:
    """torch's layers in a row, with the parameters of the block."""
    if isinstance(block, ours.MLP):
        return nn.Sequential(block.linear1, nn.GELU(), nn.Dropout(block.dropout), block.linear2)
    if isinstance(block, ours.GatedMLP):
        return Gated(block.gate_proj, block.up_proj, block.down_proj)
    if isinstance(block, (ours.LayerNormLinear, ours.RMSNormLinear)):
        return nn.Sequential(block.norm, block.linear)
    bare = nn.Linear(block.in_features, block.out_features)
    bare.weight, bare.bias = block.weight, block.bias
    return nn.Sequential(bare, nn.GELU()) if hasattr(block, "keep") else nn.Sequential(nn.GELU(), bare)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: ours.MLP(I, H, I),
    "MLP, dropout": lambda: ours.MLP(I, H, I, dropout=0.4),
    "MLP, keep input": lambda: ours.MLP(I, H, I, dropout=0.4, keep="input"),
    "LinearActivation": lambda: ours.LinearActivation(I, I),
    "LinearActivation, keep input": lambda: ours.LinearActivation(I, I, keep="input"),
    "ActivationLinear": lambda: ours.ActivationLinear(I, I),
    "GatedMLP": lambda: ours.GatedMLP(I, H, I, bias=True),
    "GatedMLP, keep input": lambda: ours.GatedMLP(I, H, I, keep="input"),
    "LayerNormLinear": lambda: ours.LayerNormLinear(I, I),
    "RMSNormLinear": lambda: ours.RMSNormLinear(I, I),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_its_layers_in_a_row(name: str, training: bool) -> None:
    """To rounding in value, first and second derivative; with the same seed it drops the same."""
    torch.manual_seed(0)
    block = BLOCKS[name]().double().train(training)
    results = []
    parts = composed(copy.deepcopy(block)).train(training)
    manualprop.unswap(parts)
    for module in (block, parts):
        x = real(2, N, I, low=-1.3, high=1.4)
        wanted = [x, *(p for _, p in sorted(module.named_parameters()))]
        torch.manual_seed(7)
        y = module(x)
        first = torch.autograd.grad(y.pow(3).sum(), wanted, create_graph=True)
        second = torch.autograd.grad(sum(d.pow(2).sum() for d in first), wanted)
        results.append([y, *sorted_by_shape(first), *sorted_by_shape(second)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-11)


def sorted_by_shape(tensors: Any) -> list[Tensor]:
    """In an order that does not depend on the names of parameters."""
    return sorted(tensors, key=lambda t: (tuple(t.shape), t.detach().abs().sum().item()))


@pytest.mark.parametrize("name", BLOCKS)
def test_copies_and_repr(name: str) -> None:
    block = BLOCKS[name]().eval()
    x = torch.linspace(-1, 1, N * I).reshape(N, I)
    for clone in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert repr(clone) == repr(block) and torch.equal(clone(x), block(x))
        clone.load_state_dict(block.state_dict())
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))


def test_state_dict_of_a_linear_layer() -> None:
    for block in (ours.LinearActivation(I, H), ours.ActivationLinear(I, H)):
        block.load_state_dict(nn.Linear(I, H).state_dict())
        assert isinstance(block, nn.Linear)


class Adapter(nn.Linear):
    """A linear layer with something of its own, as adapters have."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: ours.MLP(I, H, I), "linear1"),
        (lambda: ours.MLP(I, H, I), "linear2"),
        (lambda: ours.GatedMLP(I, H, I), "gate_proj"),
        (lambda: ours.GatedMLP(I, H, I), "down_proj"),
        (lambda: ours.LayerNormLinear(I, H), "linear"),
        (lambda: ours.RMSNormLinear(I, H), "linear"),
    ],
)
def test_whatever_stands_in_for_a_layer_is_called(make: Callable[[], nn.Module], part: str) -> None:
    """A subclass or a hook changes what a layer does, and the block with it."""
    x = torch.linspace(-1, 1, N * I).reshape(N, I)
    block = make()
    before, doubled = block(x), copy.deepcopy(block)
    old = getattr(doubled, part)
    adapter = Adapter(old.in_features, old.out_features, old.bias is not None)
    adapter.load_state_dict(old.state_dict())
    setattr(doubled, part, adapter)
    getattr(block, part).register_forward_hook(lambda module, inputs, output: 2 * output)
    torch.testing.assert_close(block(x), doubled(x))
    assert not torch.allclose(block(x), before)


def test_existing_layers_are_shared() -> None:
    first, second = nn.Linear(I, H), nn.Linear(H, I)
    block = ours.MLP(I, H, I, keep="input")
    block.linear1, block.linear2 = first, second
    x = torch.linspace(-1, 1, N * I).reshape(N, I)
    torch.testing.assert_close(block(x), second(torch_F.gelu(first(x))))
    block(x).sum().backward()
    assert first.weight.grad is not None and second.weight.grad is not None


def test_packed_relu_in_place() -> None:
    x = torch.linspace(-1, 1, 10, requires_grad=True)
    hidden = x * 1
    y = ours.PackedReLU(inplace=True)(hidden)
    assert y is hidden and torch.equal(y, torch.relu(x))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], (x > 0).float())


@pytest.mark.parametrize(
    ("misuse", "kind", "text"),
    [
        (lambda: ours.MLP(I, H, I, activation="geglu"), ValueError, r"MLP: activation must be one of 'gelu'.*'geglu'"),
        (lambda: ours.GatedMLP(I, H, I, keep="all"), ValueError, r"keep must be one of 'pre-activation', 'input'. Got 'all'"),
        (lambda: ours.MLP(I, H, I, dropout=1.5), ValueError, r"in \[0, 1\]. Got 1.5"),
        (lambda: F.relu_dropout(torch.ones(2), -0.1), ValueError, "between 0 and 1"),
        (lambda: F.mlp(torch.ones(2, I), torch.ones(H, I + 1), None, torch.ones(I, H), None), RuntimeError, "cannot be multiplied"),
        (lambda: F.activation_linear(torch.ones(2, I), torch.ones(H, I + 1)), RuntimeError, r"last axis of input.*\(2, 3\) and \(5, 4\)"),
        (lambda: F.layer_norm_linear(torch.ones(2, I).double(), None, None, torch.ones(H, I)), RuntimeError, "one dtype. Got torch.float64 and torch.float32"),
        (lambda: F.gated_linear(torch.ones(2, I), torch.ones(1, I), torch.ones(H, I)), ValueError, "gate and up must have one shape"),
        (lambda: F.mlp(torch.ones(2, I) * 1j, torch.ones(H, I), None, torch.ones(I, H), None), TypeError, "mlp: inputs must be real"),
    ],
)  # fmt: skip
def test_misuse(misuse: Callable[[], object], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        misuse()


@pytest.mark.parametrize("name", ["LayerNormLinear", "RMSNormLinear", "MLP", "GatedMLP"])
def test_half_precision_gradients_have_the_dtypes_of_what_they_belong_to(name: str) -> None:
    """Under autocast weights are float32 and products are not."""
    block, x = BLOCKS[name](), torch.randn(N, I, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.bfloat16
    y.float().pow(2).sum().backward()
    for t in (x, *block.parameters()):
        assert t.grad is not None and t.grad.dtype == t.dtype and t.grad.isfinite().all()


@pytest.mark.parametrize("name", [*BLOCKS, "ReLUDropout"])
def test_the_tape_free_step_runs_a_block_or_refuses_it(name: str) -> None:
    """It runs a block that is one rule, with autograd's gradients, and refuses one of several by its name."""
    torch.manual_seed(0)
    block = ours.ReLUDropout(0.4) if name == "ReLUDropout" else BLOCKS[name]()
    model = ours.Sequential(ours.Linear(I, I), block, ours.Linear(I, 2)).double()
    x, t = real(N, I, grad=False), torch.tensor([0, 1, 1, 0, 0, 1])
    step = manualprop.Backprop(model, ours.CrossEntropyLoss(), manualprop.descent.Batch(learning_rate=0.1))
    several = {"MLP", "MLP, dropout", "LinearActivation", "GatedMLP"}
    if name in several:
        with pytest.raises(
            TypeError, match=rf"layer '1' \({type(block).__name__}\) cannot be run without a tape"
        ):
            step.gradients(x, t)
        return
    torch.manual_seed(7)
    found = step.gradients(x, t)
    torch.manual_seed(7)
    torch_F.cross_entropy(model(x), t).backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad)


def test_a_receipt_measures_the_block_and_not_its_parts() -> None:
    x = torch.ones(N, I, requires_grad=True)
    assert manualprop.receipt(ours.MLP(I, H, I), x).kept == N * H * 4
    assert manualprop.receipt(ours.GatedMLP(I, H, I), x).kept == 2 * N * H * 4


# ----- batch norm, activation and convolution -----

NORMED: dict[int, tuple[Callable[..., Any], dict[str, Any], type[nn.Module]]] = {
    1: (ours.BatchNormActivationConv1d, {"padding": "same", "activation": "silu", "affine": False}, nn.SiLU),
    2: (ours.BatchNormActivationConv2d, {"stride": 2, "padding": 1, "momentum": None}, nn.ReLU),
    3: (ours.BatchNormActivationConv3d, {"groups": 2, "bias": False, "activation": "gelu"}, nn.GELU),
}


def normed_block(axes: int, **options: Any) -> tuple[Any, nn.Sequential, Tensor]:
    """The block, its layers in a row by torch, and an input."""
    torch.manual_seed(0)
    make, its, activation = NORMED[axes]
    block = make(4, 2, 2 if axes > 1 else 3, **its | options).double()
    parts = copy.deepcopy(block)
    manualprop.unswap(parts)
    return block, nn.Sequential(parts.norm, activation(), parts.conv), real(2, 4, *[3] * axes)


@pytest.mark.parametrize("axes", NORMED)
def test_a_normed_block_is_its_layers_in_a_row(axes: int) -> None:
    """In training, where the running statistics move, and then in evaluation by these."""
    block, parts, x = normed_block(axes)
    for training in (True, True, False):
        found = []
        for module in (block.train(training), parts.train(training)):
            wanted = [x, *module.parameters()]
            y = module(x)
            first = torch.autograd.grad(y.pow(3).sum(), wanted, create_graph=True)
            found.append([y, *first, *torch.autograd.grad(sum(d.pow(2).sum() for d in first), wanted)])
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close([*block.buffers()], [*parts.buffers()])
    for clone in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert repr(clone) == repr(block) and torch.equal(clone(x), block(x))


def test_a_normed_block_keeps_the_input_of_the_norm_alone() -> None:
    block, parts, x = normed_block(2)
    sizes = [manualprop.receipt(module, x).kept for module in (block, parts)]
    assert sizes == [2 * 4 * 8, 2 * 4 * 8 + x.nbytes]  # the statistics; torch keeps the activation too


@pytest.mark.parametrize("part", ["norm", "conv"])
def test_a_normed_block_calls_whoever_stands_in_for_a_part(part: str) -> None:
    block, _, x = normed_block(2)
    before = block.eval()(x)
    heard: list[int] = []
    handle = getattr(block, part).register_forward_hook(lambda *_: heard.append(1))
    torch.testing.assert_close(block(x), before)
    handle.remove()
    assert heard == [1]
    block.conv = ours.Conv2d(4, 2, 2, padding=1, padding_mode="circular").double()
    torch.testing.assert_close(block(x), block.conv(torch.relu(block.norm(x))))


def test_a_normed_block_without_a_tape_and_under_autocast() -> None:
    block, _, _ = normed_block(2, affine=True)
    model = ours.Sequential(
        ours.Linear(I, 16), ours.Unflatten(1, (4, 2, 2)), block, ours.Flatten(), ours.Linear(8, 2)
    )
    x, t = real(N, I, grad=False), torch.tensor([0, 1, 1, 0, 0, 1])
    plan = manualprop.descent.Batch(learning_rate=0.1)
    found = manualprop.Backprop(model.double(), ours.CrossEntropyLoss(), plan).gradients(x, t)
    torch_F.cross_entropy(model(x), t).backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad)
    block = block.float()
    x = torch.randn(2, 4, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
    assert y.dtype == torch.bfloat16
    for d, of in zip(
        torch.autograd.grad(y.float().sum(), [x, *block.parameters()]), [x, *block.parameters()], strict=True
    ):
        assert d.dtype == of.dtype and d.isfinite().all()


def test_the_activation_is_an_output_with_a_gradient_of_its_own() -> None:
    """A skip connection uses it; the numbers are those of the layers in a row, where either output is used."""
    block, parts, x = normed_block(2, affine=True)
    weight = real(2, 4, 3, 3, seed=5, grad=False)
    for use in (
        lambda y, h: y.pow(2).sum(),
        lambda y, h: (h * weight).sum(),
        lambda y, h: y.sum() * (h * weight).sum(),
    ):
        h = parts[1](parts[0](x))
        in_a_row = torch.autograd.grad(use(parts[2](h), h), [x, parts[0].weight])
        y, activation = batch_norm_activation_conv(block.norm, "relu", block.conv, x)
        as_one = torch.autograd.grad(use(y, activation), [x, block.norm.weight])
        torch.testing.assert_close(as_one, in_a_row, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("misuse", "kind", "text"),
    [
        (lambda: ours.BatchNormActivationConv2d(3, 2, 1, activation="swish"), ValueError, "BatchNormActivationConv2d: activation must be"),
        (lambda: normed_block(2)[0](torch.ones(2, 4, 3).double()), ValueError, "expected 4D input"),
        (lambda: normed_block(2)[0](torch.ones(1, 4, 1, 1).double()), ValueError, "more than 1 value per channel"),
        (lambda: normed_block(2)[0](torch.ones(2, 5, 3, 3).double()), RuntimeError, "should contain 5 elements"),
        (lambda: F.batch_norm_activation_conv(torch.ones(2, 4, 3), None, None, None, None, torch.ones(1, 4, 1).double(), training=True), RuntimeError, "one dtype. Got torch.float32"),
        (lambda: F.batch_norm_activation_conv(torch.ones(4, 3), None, None, None, None, torch.ones(1, 4, 1), training=True), RuntimeError, "must have a batch"),
        (lambda: F.batch_norm_activation_conv(torch.ones(2, 4, 3), None, None, None, None, torch.ones(1, 4, 1), training=True, eps=0.0), ValueError, "eps must be positive"),
        (lambda: F.batch_norm_activation_conv(torch.ones(2, 4, 3), None, None, None, None, torch.ones(1, 4, 1)), RuntimeError, "running_mean must be defined"),
    ],
)  # fmt: skip
def test_misuse_of_a_normed_block(misuse: Callable[[], object], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        misuse()
