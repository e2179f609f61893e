"""``explain``: the numbers are those of the formulas, the steps name what computes them, the diagnosis sees what is planted."""

from __future__ import annotations

import ast
import io
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn as torch_nn

import manualprop
from manualprop import Backprop, functions, nn
from manualprop._backprop import _trace
from manualprop._explain import Explanation, _formulas, _javascript, _terminal, _training
from manualprop._explain._observe import Trainee
from manualprop._explain._steps import TITLES
from manualprop.descent import Batch, Descent, MiniBatch, Stochastic


def example(classes: int = 3, n: int = 12, features: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, features, dtype=torch.float64), torch.randint(classes, (n,))


def network(
    activation: type[torch_nn.Module] = nn.Tanh, features: int = 5, classes: int = 3
) -> torch_nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, 6), activation(), nn.Linear(6, classes)).double()


def explained(
    model: torch_nn.Module | None = None,
    loss: torch_nn.Module | None = None,
    descent: Descent | None = None,
    **options: Any,
) -> Explanation:
    x, target = example()
    options = {"updates": 0} | options
    return manualprop.explain(
        model or network(), loss or nn.CrossEntropyLoss(), x, target, descent, **options
    )


@pytest.fixture(scope="module")
def full() -> Explanation:
    """With recorded updates and the three descents, which take most of the time."""
    return explained(updates=4)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


# ----- the numbers -----


@pytest.mark.parametrize("kind", [nn.Tanh, nn.ReLU, nn.GELU, nn.Softplus])
def test_the_numbers_are_autograds(kind: type[torch_nn.Module]) -> None:
    model = network(kind)
    found = explained(model, descent=MiniBatch(batch_size=12, learning_rate=0.3))
    x, target = (t[found.rows] for t in example())
    z = model[0](x)
    a = model[1](z)
    out = model[2](a)
    for t in (z, a, out):
        t.retain_grad()
    loss = torch.nn.functional.cross_entropy(out, target)
    loss.backward()
    numbers = found.numbers
    for key, t in (("y:0", z), ("y:1", a), ("y:2", out), ("output", out), ("x", x), ("target", target)):
        close(numbers[key], t.detach())
    for key, t in (("g:0", z), ("g:1", a), ("g:2", out), ("loss:g", out)):
        assert t.grad is not None
        close(numbers[key], t.grad)
    for name, p in model.named_parameters():
        assert p.grad is not None
        close(numbers[f"p:{name}"], p.detach())
        close(numbers[f"d:{name}"], p.grad)
        close(numbers[f"u:{name}"], -0.3 * p.grad)
    assert found.observation.loss == pytest.approx(loss.item(), rel=1e-12) and found.by_hand


def test_the_numbers_come_from_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Formulas that are tripled on purpose come out tripled."""
    right = explained()
    of_weight = functions.Linear.weight_gradient
    monkeypatch.setattr(functions.Linear, "weight_gradient", staticmethod(lambda g, x: 3 * of_weight(g, x)))
    monkeypatch.setattr(functions.Tanh, "f", staticmethod(lambda x: 3 * torch.tanh(x)))
    wrong = explained()
    close(wrong.numbers["y:1"], 3 * right.numbers["y:1"])
    weight = functions.Linear.input_gradient(wrong.numbers["g:2"].mT, wrong.numbers["y:1"])
    close(wrong.numbers["d:2.weight"], 3 * weight)


def test_the_model_and_the_generator_are_left_alone() -> None:
    x, target = example()
    model = torch_nn.Sequential(
        nn.Linear(5, 6), torch_nn.BatchNorm1d(6), torch_nn.Dropout(0.5), nn.Linear(6, 3)
    ).double()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    manualprop.explain(model, nn.CrossEntropyLoss(), x, target, updates=3)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_dropout_draws_one_mask_for_the_step_and_its_update() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), torch_nn.Dropout(0.5), nn.Linear(40, 3)).double()
    found = explained(model, descent=MiniBatch(batch_size=12, learning_rate=0.5))
    zeros = (found.numbers["y:2"] == 0).double().mean().item()
    assert 0.4 < zeros < 0.6
    close(found.numbers["u:3.weight"], -0.5 * found.numbers["d:3.weight"])
    assert not found.observation.layers[1].g.equal(found.observation.layers[2].g)  # type: ignore[union-attr,arg-type]


def test_a_layer_that_is_refused_at_the_sight_of_data_runs_under_autograd() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Softmin(dim=-1)).double()
    found = explained(model, updates=2)
    assert "layer '1' (Softmin) cannot be run without a tape" in found.notes[0] and found.by_hand
    assert not isinstance(found.descents, str) and all(path.points for path in found.descents.paths)


class Own(torch_nn.Module):
    """A forward of its own, with a branch, a parameter outside of layers, and a layer that writes over its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.last = nn.Linear(5, 6), torch_nn.ReLU(inplace=True), torch_nn.Linear(6, 3)
        self.scale = torch_nn.Parameter(torch.full((6,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        y: Tensor = self.last(self.scale * (self.relu(z.clone()) + z))
        return y


def test_any_other_model_runs_under_autograd_and_says_what_is_not_by_hand() -> None:
    model = Own().double()
    found = explained(model, descent=Batch(learning_rate=0.1))
    x, target = example()
    torch.nn.functional.cross_entropy(model(x[found.rows]), target[found.rows]).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None
        close(found.numbers[f"d:{name}"], p.grad)
        close(found.numbers[f"u:{name}"], -0.1 * p.grad)
    text = " ".join(found.notes)
    assert "Autograd ran this model" in text and "they are torch's own" in text and not found.by_hand
    assert re.search(r"Not by hand are the gradients of relu \(ReLU\), last \(Linear\):", text)
    assert "no layer that was called: scale" in text
    hand = {block.layer: block.by_hand for step in found.steps if step.number == 8 for block in step.blocks}
    assert hand == {"last": False, "first": True}
    relu = next(layer for layer in found.observation.layers if layer.path == "relu")
    close(relu.y, relu.x.clamp(min=0))  # x as it was before it was written over


def test_a_layer_whose_input_others_take_says_so() -> None:
    class Twice(torch_nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(x)
            z: Tensor = self.b(y) + self.c(y)
            return z

    shared = [block.shown[0].made["shared"] for block in explained(Twice().double()).steps[8].blocks]
    alone = [block.shown[0].made["shared"] for block in explained().steps[8].blocks]
    assert shared == [True, True] and alone == [False]


# ----- the steps -----


def test_the_ten_steps_in_order() -> None:
    found = explained()
    assert [step.number for step in found.steps] == list(range(1, 11)) == list(TITLES)
    assert [[block.layer for block in step.blocks] for step in found.steps] == [
        ["0", "2"], ["0"], ["1"], ["2"], ["loss"], ["loss"], ["1"], ["2", "0"], ["2"], ["0", "2"],
    ]  # fmt: skip
    assert [step.direction for step in found.steps] == ["forward"] * 5 + ["backward"] * 5
    for block in (block for step in found.steps for block in step.blocks):
        assert block.shown and all(shown.key in found.numbers for shown in block.shown), block.layer
        others = [
            v for shown in block.shown for v in shown.made.values() if isinstance(v, str) and v[1:2] == ":"
        ]
        assert all(key in found.numbers for key in others)


@pytest.mark.parametrize(
    "model",
    [
        network(),
        network(nn.GELU),
        nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 3)).double(),
    ],
)
def test_formulas_and_sources_are_those_of_the_rules(model: torch_nn.Module) -> None:
    seen = 0
    for block in (block for step in explained(model).steps for block in step.blocks):
        for path in re.findall(r"functions((?:\.\w+)+)", block.source):
            thing: Any = functions
            for name in path.strip(".").split("."):
                thing = getattr(thing, name)
                seen += 1
        rule = getattr(functions, block.kind.removesuffix("Loss"), None)
        if block.line and block.derivation and not block.line.startswith(("d", "at")):
            assert block.formula == _trace.headline(rule)
    assert seen > 10


def test_a_formula_is_found_in_the_derivation() -> None:
    assert _formulas.derived(functions.Linear, "dL/dW") == "dL/dW_oi = sum_n g_no x_ni"
    assert _formulas.derived(functions.Tanh, "y'") == "y' = 1 - y^2"
    assert _formulas.derived(functions.CrossEntropy, "dl/dx") == "dl/dx_k = M p_k - m_k"
    assert _formulas.derived(functions.NLL, "dl/dx") == "dl/dx_c = -w_t 1[c = t]"
    assert _formulas.derived(functions.Softplus, "y'") == "y' = 1 - e^{-beta y}"
    assert _formulas.derived(functions.MultiLabelMargin, "dl/dx") == ""  # which goes over two lines
    assert _formulas.derived(functions.Tanh, "dL/dW") == "" == _formulas.derived(None, "y'")
    text = _formulas.latex("dL/dW_oi = sum_n g_no x_ni")
    assert text.split() == r"\frac{\partial L }{\partial W_{oi} } = \sum_{n} g_{no} x_{ni}".split()
    assert (
        _formulas.plain(_trace.headline(functions.Linear))
        == "y = x Wᵀ + b, that is y_no = Σ_i x_ni W_oi + b_o"
    )


def test_every_rule_has_a_headline_in_plain_letters_and_in_mathml() -> None:
    convert = pytest.importorskip("latex2mathml.converter").convert
    rules = [r for r in vars(functions).values() if isinstance(r, type) and issubclass(r, functions.Rule)]
    headed = [rule for rule in rules if "$" in _trace.headline(rule)]
    assert len(headed) > 60
    for rule in headed:
        assert not re.search(r"[\\${}]", _formulas.plain(_trace.headline(rule))), rule
        for is_math, piece in _formulas.pieces(_trace.headline(rule)):
            assert not is_math or convert(piece).startswith("<math")
        for left in ("y'", "dL/dx", "dl/dx"):
            line = _formulas.derived(rule, left)
            assert not line or convert(_formulas.latex(line)).startswith("<math")


X, T = example(n=40)
MINI = MiniBatch(batch_size=40, learning_rate=0.1)


# ----- the updates that follow -----


def test_the_recorded_updates_are_those_of_training() -> None:
    x, target = example()
    descent = MiniBatch(batch_size=5, learning_rate=0.2, momentum=0.9)
    found = manualprop.explain(network(), nn.CrossEntropyLoss(), x, target, descent, updates=9, seed=3)
    model = network()
    step = Backprop(model, nn.CrossEntropyLoss(), descent)
    rows = itertools.chain.from_iterable(descent.updates(12, seed=3, epoch=k) for k in itertools.count())
    states, losses = [], []
    for (chosen,) in itertools.islice(rows, 10):
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
        losses.append(step(x[chosen], target[chosen]))
    assert found.recording.at[0] == 0 and found.recording.at[-1] == 9 and len(found.recording.at) > 5
    assert list(found.recording.losses) == pytest.approx(losses[:9], rel=1e-12)
    for update, frame in zip(found.recording.at, found.recording.frames, strict=True):
        for weight in frame.weights():
            close(weight.value, states[update][weight.name])


def test_a_run_that_diverges_is_shown_up_to_there() -> None:
    x, target = torch.randn(8, 4), torch.randn(8, 1)
    model = nn.Sequential(nn.Linear(4, 1))
    found = manualprop.explain(model, nn.MSELoss(), x, target, Batch(learning_rate=1e6), updates=200)
    assert "must stay finite" in found.recording.stopped and len(found.recording.losses) < 200
    json.loads(found.to_json())


def test_the_three_descents_are_real_paths_on_the_real_loss() -> None:
    x, target = example(n=24)
    model, loss = network(), nn.CrossEntropyLoss()
    found = _training.three_descents(model, loss, MiniBatch(batch_size=4, learning_rate=0.2), x, target, 0)
    assert not isinstance(found, str)
    assert [(path.name, path.examples) for path in found.paths] == [
        ("Batch", 24),
        ("MiniBatch", 4),
        ("Stochastic", 1),
    ]
    batch, mini, single = (path.noise for path in found.paths)
    assert batch == 0 < mini < single
    assert all(path.points[0] == pytest.approx((0, 0)) for path in found.paths)
    # Batch descent is gradient descent: its path, made by hand, has the length that the plane shows.
    weights, _ = _training._run(model, loss, Batch(learning_rate=0.2), x, target, 0, 3)
    assert isinstance(weights, Tensor)
    trainee = Trainee(model, loss, Batch(learning_rate=0.2))
    by_hand = weights[0].clone()
    torch_nn.utils.vector_to_parameters(by_hand, trainee.model.parameters())
    for _ in range(3):
        gradient = trainee.gradient(x, target)
        by_hand = by_hand - 0.2 * gradient
        torch_nn.utils.vector_to_parameters(by_hand.clone(), trainee.model.parameters())
    close(weights[1], by_hand)
    basis, share = _training._plane((weights - weights[0]).double())
    close(basis @ basis.T, torch.eye(2, dtype=torch.float64))
    assert 0.9 < share <= 1
    place = _training._on(basis, weights - weights[0])[-1]
    grid = _training._grid(model, loss, x, target, weights[0], basis, (0.0, place[0]), (0.0, place[1]), 0)
    assert grid[0, 0].item() == pytest.approx(loss(model(x), target).item())
    trainee.update(x, target)
    assert grid[1, 1] < grid[0, 0]


def test_a_path_that_leaps_leaves_the_picture_to_the_others() -> None:
    near, far = ((0.0, 0.0), (1.0, 0.0)), ((0.0, 0.0), (2.0, 0.0), (50.0, 0.0))
    assert _training._in_sight([near, near, far]) == [*near, *near, *far[:2]]
    assert _training._in_sight([near]) == list(near)


def test_descents_that_cannot_run_say_why() -> None:
    x, target = example()
    model = torch_nn.Sequential(nn.Linear(5, 6), torch_nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    found = _training.three_descents(model, nn.CrossEntropyLoss(), MINI, x, target, 0)
    assert not isinstance(found, str)
    assert "more than 1 value per channel" in found.paths[2].refused and not found.paths[2].points
    one = _training.three_descents(network(), nn.CrossEntropyLoss(), MINI, x[:1], target[:1], 0)
    assert isinstance(one, str) and "several examples" in one


# ----- JSON, text, figure -----


def test_json_holds_the_numbers(full: Explanation) -> None:
    found = full
    data = json.loads(found.to_json())
    assert [step["title"] for step in data["steps"]] == [TITLES[k][1] for k in range(1, 11)]
    for key, entry in data["numbers"].items():
        close(torch.tensor(entry["values"], dtype=found.numbers[key].dtype), found.numbers[key])
    assert data["updates"]["losses"] == list(found.recording.losses)
    assert data["by_hand"] is True and len(data["descents"]["paths"]) == 3


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_shows_the_steps_in_order(full: Explanation, width: int) -> None:
    text = _terminal.text(full, width)
    places = [text.index(f"{number:>2}  {title}") for number, (_, title, _) in TITLES.items()]
    assert places == sorted(places)
    assert max(map(len, text.splitlines())) <= width
    for words in (
        "norm",
        "spread",
        "6×5",
        "% of the numbers are saturated",
        "update to weight",
        "Diagnosis",
        "Stochastic",
    ):
        assert words in text
    assert f"{full.numbers['y:0'][0, 0].item():.3g}" in text


def shown(found: Explanation, **options: Any) -> str:
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO(), color_system=None)
    console.print(found.render(**options))
    return console.export_text()


def test_layer_example_and_verbose() -> None:
    found = explained()
    layer = shown(found, layer="1")
    assert "Activate" in layer and "Initialise" not in layer and " 5  Loss" not in layer
    value = found.numbers["y:0"][2, 0].item()
    assert f"{value:.3g}" in shown(found, layer="0", example=2)
    assert f"{value:.3g}" not in shown(found, layer="0", example=1)
    assert "quotient rule" not in shown(found) and "quotient rule" in shown(found, verbose=True)
    with pytest.raises(ValueError, match=r"layer must be one of 0, 2, 1, loss. Got 'x'"):
        found.render(layer="x")
    with pytest.raises(ValueError, match=r"example must be from 0 to 11, one of the update\. Got 12"):
        found.render(example=12)


def test_its_repr_is_short(full: Explanation) -> None:
    assert repr(full) == "<Explanation of Sequential: print it, or save it as a page>"


def test_the_figure_shows_layers_losses_and_paths(full: Explanation) -> None:
    drawn = full.figure()
    titles = [axis.get_title() for axis in drawn.axes]
    assert {"input", "0 (Linear)", "gradient at 2", "loss over the updates"} <= set(titles)
    assert sum("noise" in title for title in titles) == 3


# ----- JavaScript -----


def test_a_formula_is_printed_from_its_trace() -> None:
    assert _javascript.of_numbers(functions.Tanh.f) == "(x) => { const v0 = Math.tanh(x); return v0; }"
    text = _javascript.of_numbers(functions.SiLU.f)  # taken apart: torch's silu is no word of JavaScript
    assert "Math.exp" in text and "silu" not in text
    assert _javascript.of_numbers(lambda x: 3 * torch.tanh(x)) != _javascript.of_numbers(functions.Tanh.f)
    assert _javascript.number(-math.inf) == "(-Infinity)" and _javascript.number(True) == "true"
    for formula in (lambda x: torch.special.i0(x), lambda x: x * 2 if x.sum() > 0 else x):
        with pytest.raises(_javascript.NotPrintable):
            _javascript.of_numbers(formula)


# ----- bad input -----

LOSS = nn.CrossEntropyLoss()
BAD: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "no model": ((len, LOSS, X, T), TypeError, "model must be a torch Module. Got builtin_function_or_method"),
    "no loss": ((network(), len, X, T), TypeError, "loss must be a torch Module"),
    "no tensor": ((network(), LOSS, [1.0], T), TypeError, "x must be a torch Tensor. Got list"),
    "no descent": ((network(), LOSS, X, T, 0.1), TypeError, "descent must be one of manualprop.descent. Got 0.1"),
    "rows": ((network(), LOSS, X, T[:3]), ValueError, r"as many of them. Got \(40, 5\) and \(3,\)"),
    "empty": ((network(), LOSS, X[:0], T[:0]), ValueError, "one row for each example"),
    "width": ((network(), LOSS, X[:, :4], T), ValueError, r"the model must take inputs of shape \(32, 4\), float64. It raised"),
    "target": ((network(), LOSS, X, T + 5), ValueError, r"the loss must take an output of shape \(32, 3\), float64 and targets"),
    "kind": ((network(), nn.MSELoss(), X, T), ValueError, "must be given an output and a target of one shape"),
    "none": ((network(), nn.CrossEntropyLoss(reduction="none"), X, T), ValueError, "Got reduction='none'; use 'mean'"),
    "frozen": ((network().requires_grad_(False), LOSS, X, T), ValueError, "must have a parameter that requires a gradient"),
    "lazy": ((torch_nn.LazyLinear(3), LOSS, X, T), ValueError, "lazy layers must know their sizes"),
    "tuple": ((torch_nn.LSTM(5, 3).double(), LOSS, X, T), TypeError, "must return one tensor. Got tuple"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_refused_in_one_line(bad: str) -> None:
    arguments, kind, text = BAD[bad]
    with pytest.raises(kind, match=text) as raised:
        manualprop.explain(*arguments)
    assert "\n" not in str(raised.value)


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(
        OSError, match=r"must go to a folder that is there and can be written to. Got '.*no/page.html'"
    ):
        explained().save(tmp_path / "no" / "page.html")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("latex2mathml"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr("importlib.import_module", lambda name: without(name))
    with pytest.raises(ImportError, match=r'explain needs latex2mathml.*pip install "manualprop\[explain\]"'):
        explained()._repr_html_()


# ----- what it imports -----

MAY_BE_IMPORTED = {"_terminal.py": {"rich"}, "_figure.py": {"matplotlib"}, "_page.py": {"latex2mathml"}}


def test_it_imports_neither_training_nor_lightning() -> None:
    import sys

    folder = Path(manualprop.__file__).parent / "_explain"
    files = sorted(folder.glob("*.py"))
    assert len(files) > 8
    for path in files:
        tree = ast.parse(path.read_text())
        lazy = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ]
        skipped = {id(inner) for node in lazy for inner in ast.walk(node)}
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names if id(node) not in skipped else []:
                top = name.partition(".")[0]
                known = {"torch", "manualprop"} | MAY_BE_IMPORTED.get(path.name, set())
                assert top in known or top in sys.stdlib_module_names, f"{path.name} imports {name}"
                assert not name.startswith("manualprop.training")


def test_descents_of_every_kind_choose_their_examples() -> None:
    x, target = example()
    for descent, count in (
        (Batch(learning_rate=0.1), 12),
        (Stochastic(learning_rate=0.1), 1),
        (MINI, 12),
        (None, 12),
    ):
        found = manualprop.explain(network(), nn.CrossEntropyLoss(), x, target, descent, updates=0)
        assert len(found.rows) == count == len(found.numbers["x"])
