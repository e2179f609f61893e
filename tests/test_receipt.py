"""The receipt: what it counts, where, how often; what it leaves alone; the command."""

import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from cases import CASES, IN_PLACE, Case
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import manualprop
from manualprop import _command
from manualprop._receipt import BARS, LayerReceipt, Receipt, receipt
from manualprop.functions import Rule

FLOAT = 4  # bytes
N, I, H = 8, 16, 32


class Calling(nn.Module):
    """A module of a function."""

    def __init__(self, f: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.f, self.parts = f, nn.ModuleList(parts)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        return self.f(*self.parts, *inputs, **kwargs)


def by_path(report: Receipt) -> dict[str, LayerReceipt]:
    return {layer.path: layer for layer in report.layers}


def x(grad: bool = False) -> Tensor:
    return torch.linspace(-1, 1, N * I).reshape(N, I).requires_grad_(grad)


# ----- what is counted -----


def test_each_layer_is_charged_with_what_it_saved_first() -> None:
    model = nn.Sequential(nn.Linear(I, H), nn.Tanh(), nn.Linear(H, I), nn.GELU())
    report = receipt(model, x())
    hidden, weight = N * H * FLOAT, H * I * FLOAT
    assert [tuple(layer) for layer in report.layers] == [
        ("0", "nn.Linear", 1, 0, 0, N * I * FLOAT, 0),  # the input, for its dW
        ("1", "nn.Tanh", 1, hidden, 0, 0, 0),
        ("2", "nn.Linear", 1, 0, hidden, 0, weight),  # Tanh's output again, and W for its dx
        ("3", "nn.GELU", 1, N * I * FLOAT, 0, 0, 0),
    ]
    assert (report.kept, report.inputs, report.parameters) == (hidden + N * I * FLOAT, N * I * FLOAT, weight)


def test_views_and_expanded_tensors_count_their_storage_once() -> None:
    def f(z: Tensor) -> Tensor:
        y = z * 1  # (N, I), of which nothing is saved yet
        return y[:, :2].sin() + y.t()[:2].t().cos() + (y[:, :1].expand(N, 2) ** 3)

    assert receipt(Calling(f), x(True)).kept == N * I * FLOAT


def test_a_module_that_is_called_twice_is_one_layer() -> None:
    tanh = nn.Tanh()
    assert by_path(receipt(nn.Sequential(nn.Linear(I, I), tanh, tanh), x()))["1"] == LayerReceipt(
        "1", "nn.Tanh", 2, 2 * N * I * FLOAT, 0, 0, 0
    )


def test_what_no_submodule_computes_is_the_parents() -> None:
    inner = Calling(lambda tanh, z: tanh(z).exp(), nn.Tanh())
    report = by_path(receipt(Calling(lambda part, z: part(z).sin() * 2, inner), x(True)))
    assert report["parts.0.parts.0"].kept == N * I * FLOAT
    assert report["parts.0"].kept == N * I * FLOAT, "exp, in the forward of the inner module"
    assert report[""].kept == 0 and report[""].shared == N * I * FLOAT, (
        "sin, of the same storage as exp's output"
    )


def test_tied_and_cast_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(5, I), nn.Linear(I, 5, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, t: Tensor) -> Tensor:
            y: Tensor = self.out(self.embed(t))
            return y

    t = torch.zeros(N, dtype=torch.long)
    report = receipt(Tied(), t)
    assert (report.parameters, report.inputs) == (5 * I * FLOAT, N * 8)
    with torch.autocast("cpu", torch.bfloat16):
        cast = receipt(Tied(), t)
    assert cast.parameters == 0 and by_path(cast)["out"].kept == 5 * I * 2 + N * I * 2, "W and x in bfloat16"


def test_buffers_count_as_parameters() -> None:
    report = receipt(nn.Sequential(nn.Linear(I, I), nn.BatchNorm1d(I)).eval(), x())
    assert by_path(report)["1"].parameters == 3 * I * FLOAT, "weight, running mean and variance"


def test_what_is_dropped_on_the_way_is_not_kept() -> None:
    """Some allocators hand a freed address out again at once: it is another storage."""

    def f(z: Tensor) -> Tensor:
        for _ in range(3):
            z.exp().sin().detach()
        return z.sin()

    report = receipt(Calling(f), x(True))
    assert (report.kept, report.inputs) == (0, N * I * FLOAT)


def test_inputs_in_containers_and_by_name() -> None:
    f = Calling(lambda pair, *, scale: (pair["a"] * scale).sin())
    report = receipt(f, {"a": x(True)}, scale=torch.ones(I))
    assert (report.kept, report.inputs) == (N * I * FLOAT, I * FLOAT)


def test_frozen_model_and_no_grad() -> None:
    model = nn.Sequential(nn.Linear(I, H), nn.Tanh())
    with torch.no_grad():
        assert receipt(model, x()).kept == N * H * FLOAT, "as if it were trained"
    given = x()
    with torch.inference_mode():
        assert receipt(model, given).kept == N * H * FLOAT
    assert receipt(model.requires_grad_(False), x()).kept == 0


def test_checkpointing_keeps_less() -> None:
    model = nn.Sequential(nn.Linear(I, H), nn.Tanh(), nn.Linear(H, H), nn.Tanh(), nn.Linear(H, I))
    whole = receipt(model, x(True))
    for reentrant in (False, True):
        f = Calling(lambda part, z, r=reentrant: checkpoint(part, z, use_reentrant=r), model)
        report = receipt(f, x(True))
        assert (report.kept, report.inputs) == (0, N * I * FLOAT) and whole.kept == 2 * N * H * FLOAT


def test_on_the_meta_device_the_bytes_are_the_same() -> None:
    def report() -> Receipt:
        torch.manual_seed(0)
        return receipt(nn.TransformerEncoderLayer(I, 2, H), torch.randn(N, 2, I))

    with torch.device("meta"):
        meta = report()
    # Attention's kernels differ between devices, and what they keep with them; all layers besides are as on the CPU.
    real = by_path(report())
    assert {p: v for p, v in by_path(meta).items() if p} == {p: v for p, v in real.items() if p}


def test_compiled_and_scripted_parts_run_as_one() -> None:
    inner = nn.Sequential(nn.Linear(I, H), nn.Tanh(), nn.Linear(H, I))
    compiled = torch.compile(inner, backend="aot_eager")
    report = receipt(nn.Sequential(compiled, nn.Tanh()), x())
    assert [layer.path for layer in report.layers] == ["0", "1"]
    assert by_path(report)["0"].kept >= N * H * FLOAT
    with pytest.warns((DeprecationWarning, FutureWarning), match="script"):
        scripted = torch.jit.script(nn.Sequential(nn.Linear(I, H), nn.BatchNorm1d(H)))
    assert receipt(nn.Sequential(scripted), x()).kept >= N * H * FLOAT
    assert scripted[1].num_batches_tracked == 0


def test_sparse_tensors() -> None:
    matrix = torch.eye(N).to_sparse()
    report = receipt(Calling(lambda z: torch.sparse.mm(matrix, z)), x(True))
    assert report.kept == N * FLOAT + 2 * N * 8


# ----- what is left alone -----


def test_all_is_as_it_was() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(I, H), nn.BatchNorm1d(H), nn.Dropout(), nn.Linear(H, 2))
    model[3].eval()
    seen = []
    handle = model[0].register_forward_hook(lambda *_: seen.append(1))
    model(x()).sum().backward()
    grads = [p.grad for p in model.parameters()]
    values = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    buffers = [(b, b._version, b.clone()) for b in model.buffers()]
    hooks = [
        {k: dict(v) for k, v in vars(m).items() if "hooks" in k and v is not None} for m in model.modules()
    ]
    modes = [m.training for m in model.modules()]
    model.append(Calling(lambda z: z * random.random() * numpy.random.rand()))
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    receipt(model, x())
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert states[2] == numpy.random.get_state()[1].tolist()
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(p.grad, v) for p, v in zip(model.parameters(), values, strict=True))
    for b, (old, version, value) in zip(model.buffers(), buffers, strict=True):
        assert b is old and b._version == version and torch.equal(b, value)
    del model[4]
    assert hooks == [
        {k: dict(v) for k, v in vars(m).items() if "hooks" in k and v is not None} for m in model.modules()
    ]
    assert modes == [m.training for m in model.modules()] and len(seen) == 2
    handle.remove()


def test_a_failing_forward_leaves_no_trace() -> None:
    def f(tanh: nn.Module, norm: nn.Module, z: Tensor) -> Tensor:
        norm(tanh(z))
        raise ZeroDivisionError

    model = Calling(f, nn.Tanh(), nn.BatchNorm1d(I))
    with pytest.raises(ZeroDivisionError):
        receipt(model, x(True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.parts[1].num_batches_tracked == 0


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_misuse() -> None:
    with pytest.raises(TypeError, match=r"receipt: model must be a torch.nn.Module. Got function"):
        receipt(x, 1)  # type: ignore[arg-type]
    lazy = nn.Sequential(nn.Tanh(), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"Got the lazy LazyLinear at 1. Run the model once"):
        receipt(lazy, x())


# ----- every rule -----


@pytest.mark.parametrize("case", [pytest.param(c, id=str(c)) for c in CASES + IN_PLACE])
def test_every_row_keeps_what_it_declares(case: Case) -> None:
    """No argument but the declared ones; the output only where declared; of all else, at most ``keeps_new``."""
    arguments = case.made()
    declared = [k for k in case.keeps if isinstance(k, int)]

    def f(*those: Any) -> Tensor:
        every = list(arguments)
        for k, argument in zip(declared, those, strict=True):
            every[k] = argument
        y: Tensor = case(*every)
        return y

    with torch.no_grad():
        output = case(*arguments)
    room = case.keeps_new + ("output" in case.keeps) * output.untyped_storage().nbytes()
    room += sum(v.untyped_storage().nbytes() for v in case.kwargs.values() if isinstance(v, Tensor))
    assert receipt(Calling(f), *(arguments[k] for k in declared)).kept <= room


def test_a_rule_that_keeps_more_than_it_declares_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Greedy(manualprop.functions.Tanh):
        pass

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[0].clone())

    Greedy.setup_context = staticmethod(setup_context)  # type: ignore[method-assign]
    assert issubclass(Greedy, Rule)
    monkeypatch.setattr(manualprop.functions, "Tanh", Greedy)
    with pytest.raises(AssertionError):
        test_every_row_keeps_what_it_declares(next(c for c in CASES if c.name == "tanh"))


# ----- showing -----


def before_and_after() -> tuple[Receipt, Receipt]:
    model = nn.Sequential(nn.Linear(I, H), nn.Softsign(), nn.Linear(H, 2))
    before = receipt(model, x())
    manualprop.swap(model)
    return before, receipt(model, x())


def test_the_table_needs_torch_alone() -> None:
    before, after = before_and_after()
    text = str(before)
    assert (
        text.splitlines()[0] == "kept for backward: 3.07 kB, besides 256 B of parameters and 512 B of inputs"
    )
    assert "1      nn.Softsign      1  2.05 kB" in text
    side_by_side = str(before.beside(after))
    assert side_by_side.splitlines()[0] == "kept for backward: 3.07 kB before, 1.02 kB after"
    assert "manualprop.nn.Softsign  1.02 kB  -50%" in side_by_side
    script = """
import sys
class Missing:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("rich", "matplotlib", "numpy", "lightning"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import torch, manualprop
report = manualprop.receipt(torch.nn.Tanh(), torch.ones(2, requires_grad=True))
print(report)
try: report.save_png("no.png")
except ImportError as error: print(error)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "nn.Tanh      1   8 B" in done.stdout and "pip install matplotlib" in done.stdout


def test_rich_shows_the_same_cells() -> None:
    from rich.console import Console

    before, after = before_and_after()
    for report in (before, before.beside(after)):
        console = Console(width=140, file=io.StringIO(), record=True)
        console.print(report)
        shown = " ".join(console.export_text().split())
        title, header, rows = report.table()
        assert all(cell in shown for cell in (title, *header, *(c for row in rows for c in row)))


def test_json_adds_up() -> None:
    before, after = before_and_after()
    found = json.loads(before.beside(after).to_json())
    assert found == {"before": json.loads(before.to_json()), "after": json.loads(after.to_json())}
    for side in found.values():
        assert side["kept"] == sum(layer["kept"] for layer in side["layers"])
    assert found["after"]["layers"][1] == {
        "path": "1", "kind": "manualprop.nn.Softsign", "calls": 1,
        "kept": N * H * FLOAT, "shared": 0, "inputs": 0, "parameters": 0,
    }  # fmt: skip


def test_layers_that_one_side_alone_has() -> None:
    model = nn.Sequential(nn.Linear(I, H), nn.Dropout(), nn.GELU())
    before = receipt(model, x())
    model[1] = nn.Sequential(nn.Tanh())
    after = receipt(model, x())
    rows = {row[0]: row[1:] for row in before.beside(after).table()[2]}
    assert rows["1"] == ["nn.Dropout", "1.02 kB", "", "0", "-100%"]
    assert rows["1.0"] == ["", "0", "nn.Tanh", "1.02 kB", "+1.02 kB"]


def test_pictures(tmp_path: Path) -> None:
    before, after = before_and_after()
    before.save_png(tmp_path / "new" / "one.png")
    before.beside(after).save_png(str(tmp_path / "two.png"))
    many = receipt(nn.Sequential(nn.Linear(I, H), *(nn.Tanh() for _ in range(BARS + 9))), x())
    many.save_png(tmp_path / "many.png")
    heights = []
    for name in ("new/one.png", "two.png", "many.png"):
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        heights.append(int.from_bytes(data[20:24]))
    assert heights[0] == heights[1] < heights[2] < 2000


# ----- the command -----

MODULE = """
import torch

def build():
    return torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 4), torch.nn.Tanh())

class Masked(torch.nn.Module):
    def forward(self, x, mask):
        return (x.requires_grad_() * mask).sin()

masked, number = Masked(), 3
def fails(): raise RuntimeError("no\\nweights")
def returns_none(): pass
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    monkeypatch.chdir(tmp_path)
    name = f"users_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / f"broken_{name}.py").write_text("import nowhere_at_all\n")
    return name


def test_the_command(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["receipt", f"{module}:build", "--input", "32x5:long:50"]
    path, state = list(sys.path), torch.get_rng_state()
    assert _command.main(words) == 0
    assert (
        "kept for backward: 7.68 kB, besides 128 B of parameters and 1.28 kB of inputs"
        in capsys.readouterr().out
    )
    assert _command.main([*words, "--swap", "--png", "kept.png"]) == 0
    assert "manualprop.nn.Tanh" in capsys.readouterr().out and Path("kept.png").exists()
    assert _command.main([*words, "--swap", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["before"]["kept"] == 7680
    assert (
        _command.main(["receipt", f"{module}:masked", "--input", "4x4:double", "--input", "mask=4x4:bool"])
        == 0
    )
    assert "(model) Masked 1 128 B 0 16 B 0" in " ".join(capsys.readouterr().out.split())
    assert sys.path == path
    torch.set_rng_state(state)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nosuch:build"], "the module 'nosuch' must be importable. It raised ModuleNotFoundError: No module named 'nosuch'"),
        (["broken_MODULE:build"], "It raised ModuleNotFoundError: No module named 'nowhere_at_all'"),
        (["MODULE"], "must be given as MODULE:NAME, such as mymodule:build. Got 'MODULE'."),
        (["MODULE:biuld"], "MODULE must have an attribute 'biuld', which it has not. Did you mean 'build'?"),
        (["MODULE:number"], "must be, or return, a torch.nn.Module. Got int."),
        (["MODULE:returns_none"], "must be, or return, a torch.nn.Module. Got NoneType."),
        (["MODULE:fails"], "must make a model when called without arguments. It raised RuntimeError: no weights"),
        (["MODULE:build"], "the model must take the inputs. Given were none: give them by --input. It raised TypeError"),
        (["MODULE:build", "--input", "32x5"], "the model must take the inputs. Given were (32, 5). It raised RuntimeError"),
        (["MODULE:masked", "--input", "2", "--input", "maks=2"], "Given were (2,), maks (2,). It raised TypeError"),
        (["MODULE:build", "--input", "32xx5"], "an input must look like 32x128 or 32x128:long:1000. Got '32xx5'."),
        (["MODULE:build", "--input", "3:ling"], "the dtype of an input must be one of torch, such as bfloat16. Got 'ling'."),
        (["MODULE:build", "--input", "3:float:4"], "only inputs of integers have a bound. Got '3:float:4'."),
        (["MODULE:build", "--input", "3:long:0"], "the bound of integers must be positive"),
        (["MODULE:build", "--input", "3:long:4", "--png", "."], "the picture cannot be written. It raised IsADirectoryError"),
        (["MODULE:build", "--imput", "3"], "unrecognized arguments: --imput 3"),
        ([], "the following arguments are required: MODULE:NAME"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_line(
    words: list[str], text: str, module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _command.main(["receipt", *(word.replace("MODULE", module) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("manualprop: receipt: ") and err.count("\n") == 1, err
    assert text.replace("MODULE:NAME", "M:N").replace("MODULE", module).replace("M:N", "MODULE:NAME") in err


def test_help_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        _command.main(["receipt", "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    assert shown.startswith("usage: manualprop receipt") and "32x128:long:1000" in shown
