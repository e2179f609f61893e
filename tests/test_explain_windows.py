"""``explain`` of convolutions and pools: the numbers worked out are those of the tensors, and their terms add up."""

from __future__ import annotations

import io
import json
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch import nn as torch_nn

import manualprop
from manualprop import functions, nn
from manualprop._backprop import Backprop
from manualprop._explain import Explanation, _formulas, _terminal
from manualprop._explain._numbers import dead
from manualprop._explain._steps import Shown
from manualprop._explain._windows import chosen_places, told_options
from manualprop._explain._worked import Worked, worked
from manualprop.descent import Batch, MiniBatch

DESCENT = MiniBatch(batch_size=4, learning_rate=0.1)


def images(*shape: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64), torch.randint(classes, (shape[0],))


def convnet() -> torch_nn.Module:
    """Groups, a stride, paddings, a dilation, windows that overlap, and every pool."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2), bias=False),
        nn.Tanh(),
        nn.AvgPool2d(2, 1, padding=1, count_include_pad=False),
        nn.AdaptiveAvgPool2d((2, 2)),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    ).double()


def explained(model: torch_nn.Module, shape: tuple[int, ...], **options: Any) -> Explanation:
    x, target = images(*shape)
    given = {"descent": DESCENT, "updates": 0} | options
    return manualprop.explain(model, nn.CrossEntropyLoss(), x, target, **given)


@pytest.fixture(scope="module")
def full() -> Explanation:
    return explained(convnet(), (6, 2, 9, 10))


def sums(e: Explanation, example: int = 0) -> list[tuple[Shown, Worked]]:
    every = [shown for step in e.steps for block in step.blocks for shown in block.shown]
    found = [(shown, worked(shown, e.numbers, example)) for shown in every]
    return [(shown, one) for shown, one in found if one is not None]


def entry(text: str) -> tuple[int, ...]:
    """The index in a name such as "y[0,1,2,3]"."""
    return tuple(map(int, text.partition("[")[2].rstrip("]").split(",")))


# ----- the numbers -----


def test_the_numbers_are_autograds(full: Explanation) -> None:
    model = convnet()
    x, target = (t[full.rows] for t in images(6, 2, 9, 10))
    made, t = [], x
    for layer in model:  # type: ignore[attr-defined]
        t = layer(t)
        t.retain_grad()
        made.append(t)
    F.cross_entropy(t, target).backward()
    for i, y in enumerate(made):
        torch.testing.assert_close(full.numbers[f"y:{i}"], y.detach(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(full.numbers[f"g:{i}"], y.grad, rtol=1e-12, atol=1e-14)
    for name, p in model.named_parameters():
        torch.testing.assert_close(full.numbers[f"d:{name}"], p.grad, rtol=1e-12, atol=1e-14)
    assert full.by_hand


def test_the_places_are_torchs(full: Explanation) -> None:
    _, places = F.max_pool2d(full.numbers["y:1"], 3, 2, return_indices=True)
    assert torch.equal(full.numbers["i:2"], places)
    _, places = F.adaptive_max_pool2d(full.numbers["y:6"], 1, return_indices=True)
    assert torch.equal(full.numbers["i:7"], places)


# ----- one number worked out -----

ONE_AXIS = nn.Sequential(
    nn.Conv1d(2, 3, 3, padding="same", dilation=2), nn.ReLU(), nn.MaxPool1d(3, 1, padding=1), nn.AvgPool1d(2, ceil_mode=True),
    nn.Flatten(), nn.LazyLinear(3),
)  # fmt: skip
THREE_AXES = nn.Sequential(
    nn.Conv3d(1, 2, 2, padding=1), nn.GELU(), nn.MaxPool3d(2, ceil_mode=True), nn.Conv3d(2, 2, 1),
    nn.AvgPool3d(2, 1, padding=1, divisor_override=5), nn.Flatten(), nn.LazyLinear(3),
)  # fmt: skip
TORCHS = torch_nn.Sequential(
    torch_nn.Conv2d(1, 2, 3), torch_nn.ReLU(), torch_nn.MaxPool2d(2), torch_nn.AdaptiveAvgPool2d(2), torch_nn.Flatten(),
    torch_nn.Linear(8, 3),
)  # fmt: skip
DECODER = nn.Sequential(
    nn.ConvTranspose2d(1, 4, 2), nn.Tanh(), nn.ConvTranspose2d(4, 6, (3, 2), 2, (1, 0), (1, 0), 2, dilation=(1, 2)), nn.AvgPool2d(3),
    nn.Flatten(), nn.LazyLinear(3),
)  # fmt: skip
KINDS = {"convolution", "convolution_input", "convolution_weight", "maximum", "chosen", "mean", "mean_input"}


@pytest.mark.parametrize(
    ("model", "shape", "kinds"),
    [
        pytest.param(convnet(), (6, 2, 9, 10), KINDS, id="two axes"),
        pytest.param(ONE_AXIS, (5, 2, 9), KINDS - {"convolution_input"}, id="one axis"),
        pytest.param(THREE_AXES, (4, 1, 4, 5, 4), KINDS, id="three axes"),
        pytest.param(
            DECODER,
            (4, 1, 4, 3),
            {"transposed", "transposed_input", "transposed_weight", "mean", "mean_input"},
            id="transposed",
        ),
        pytest.param(TORCHS, (4, 1, 7, 7), KINDS - {"convolution_input"}, id="torch's"),
    ],
)
def test_the_terms_are_the_tensors_numbers_and_add_up(
    model: torch_nn.Module, shape: tuple[int, ...], kinds: set[str]
) -> None:
    model.double()(images(*shape)[0])  # which tells lazy layers their sizes
    e = explained(model, shape)
    seen = set()
    for example in (0, 3):
        for shown, one in sums(e, example):
            made = shown.made
            seen.add(made["kind"])
            assert one.value == e.numbers[shown.key][entry(one.entry)].item()
            if made["kind"] not in ("convolution_weight", "transposed_weight"):
                assert entry(one.entry)[0] == example
            if made["kind"] == "maximum":
                assert one.value == one.terms[0].value == max(term.value for term in one.terms)
            else:
                total = sum(term.value for term in one.terms) + one.rest
                assert total == pytest.approx(one.value, rel=1e-9, abs=1e-12), (shown.key, one)
            for term in one.terms:
                assert term.value == pytest.approx(math.prod(term.factors), rel=1e-12)
                for letter, index in re.findall(r"([Wxygb])\[([\d,]+)\]", term.label):
                    number = e.numbers[made[letter.replace("y", "x")]][
                        tuple(map(int, index.split(",")))
                    ].item()
                    over = int((re.search(r"/ (\d+)", term.label) or [0, 1])[1])
                    assert any(number / over == pytest.approx(factor) for factor in term.factors)
    assert seen == kinds


def test_a_formula_that_is_wrong_does_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The value is the formula's, the terms are the numbers that it should be made of."""
    right = functions.Convolution.forward
    monkeypatch.setattr(functions.Convolution, "forward", staticmethod(lambda *given: 3 * right(*given)))
    _, one = sums(explained(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten()).double(), (4, 1, 3, 3)))[0]
    assert one.value == pytest.approx(3 * (sum(term.value for term in one.terms) + one.rest))


def test_what_other_layers_add_is_told() -> None:
    class Twice(torch_nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3), nn.AvgPool2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return torch.cat([self.b(y), self.c(y)], 1).mean((2, 3))

    found = sums(explained(Twice().double(), (4, 1, 5, 5)))
    shared = [one for shown, one in found if shown.made.get("shared")]
    assert len(shared) == 2
    for one in shared:
        assert one.terms[0].label == "from other layers that take x" and one.terms[0].value != 0
        assert sum(term.value for term in one.terms) + one.rest == pytest.approx(one.value)


def test_a_layer_whose_output_nobody_uses_hands_nothing_back() -> None:
    class Unused(torch_nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
            self.linear, self.conv = nn.Linear(4, 4), nn.Conv1d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            self.linear(y), self.conv(y.unsqueeze(1))
            return self.last(y)

    e = explained(Unused().double(), (5, 4))
    assert [block.layer for block in e.steps[8].blocks] == ["last"]
    assert "Chain rule" in str(e)
    assert not e.numbers["d:conv.weight"].any()


OTHERS = {
    "padding in circles": nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"),
    "norms": nn.LPPool2d(2, 2),
    "at random": nn.FractionalMaxPool2d(2, output_size=2),
}


@pytest.mark.parametrize("layer", OTHERS.values(), ids=OTHERS)
def test_other_layers_show_their_formula_alone(layer: torch_nn.Module) -> None:
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
    model(images(4, 1, 5, 5)[0])
    e = explained(model, (4, 1, 5, 5))
    assert sums(e) == [] and told_options(e.observation.layers[0]) == "" and e.by_hand
    assert chosen_places(e.observation.layers[0]) is None
    text = _terminal.text(e, 80)
    assert "_o" in text and not re.search(r"[\\{}$]|[Bb]ig", text.partition(" 5  Loss")[0])


def test_flatten_moves_its_numbers(full: Explanation) -> None:
    blocks = [block for step in full.steps for block in step.blocks if block.kind == "Flatten"]
    assert [(block.line, block.shown[0].made["kind"]) for block in blocks] == [
        ("y = x, in another shape", "moved"),
        ("dL/dx = g", "moved"),
    ]


# ----- the steps and their views -----


def test_a_convolution_multiplies_and_a_pool_follows(full: Explanation) -> None:
    layers = [[block.layer for block in step.blocks] for step in full.steps]
    assert layers[1] == ["0"] and layers[2] == ["1"] and layers[3] == [str(i) for i in range(2, 10)]
    assert layers[6] == ["8", "7", "6", "5", "4", "2", "1"]
    assert layers[7] == ["9", "3", "0"] and layers[8] == ["9", "3"]
    flat = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    order = [[block.layer for block in step.blocks] for step in explained(flat, (4, 1, 2, 2)).steps[1:4]]
    assert order == [["0", "1"], ["2"], ["3"]], "what comes before the weights is shown before them"


def test_the_formulas_are_those_of_the_rules() -> None:
    derived, convolution = _formulas.derived, functions.Convolution
    assert derived(convolution, "dL/db") == "dL/db[o] = sum_{n,q} g[n,o,q]"
    line = derived(convolution, "dL/dx")
    assert line == "dL/dx[n,c,i] = sum_{o,q,k} g[n,o,q] W[o,c,k] over s q + d k - p = i"
    assert r"\frac{\partial L }{\partial x_{nci} } = \sum_{o,q,k} " in _formulas.latex(line)
    assert "g_{noq} " in _formulas.latex(line) and r"\text{ over }" in _formulas.latex(line)
    assert derived(functions.PReLU, "dL/dW").endswith("over every element of channel c")
    assert derived(functions.ReflectionPad, "dL/dx") == "dL/dx_j = sum_i g_i 1[j = r(i - a)]", (
        "not a part of a sum"
    )
    assert "g _{j+a}" in _formulas.latex(derived(functions.ConstantPad, "dL/dx"))
    assert _formulas.plain(r"$\frac1d \Big(x\Big)$") == "1/d (x)"


@pytest.mark.parametrize("example", [0, 2])
def test_the_terminal_works_a_number_of_each_out(full: Explanation, example: int) -> None:
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO(), color_system=None)
    console.print(full.render(example=example))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for _, one in sums(full, example):
        # " ".join: a long line is folded
        assert " ".join(one.text().split()) in " ".join(text.split())
    assert "here k has 3×2 places, s = 2, p = 1×0, d = 1×2" in text and "2 groups of channels" in text
    assert re.search(r"^ +i  4×4×4×4 {10,}\d+ ", text, re.M), "places have neither norm nor spread"


def test_json_holds_what_is_worked_out(full: Explanation) -> None:
    data = json.loads(full.to_json())["worked"]
    assert [(one["key"], one["entry"], one["value"]) for one in data] == [
        (shown.key, one.entry, one.value) for shown, one in sums(full)
    ]
    assert data[0]["layer"] == "0" and data[0]["terms"][0]["label"] == "b[0]"
    x, target = images(4, 1, 4, 4)
    model = nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten()).double()
    broken = manualprop.explain(
        model, nn.CrossEntropyLoss(), x / 0, target, Batch(learning_rate=0.1), updates=0
    )
    assert json.loads(broken.to_json())["worked"][0]["value"] is None


def test_the_figure_shows_channels_and_the_places_that_were_chosen(full: Explanation) -> None:
    axes = {axis.get_title(): axis for axis in full.figure().axes}
    picture = axes["1 (ReLU)"].images[0].get_array()
    assert picture.shape == (2 * 9 + 1, 2 * 10 + 1)  # four channels, two by two
    chosen, line = full.numbers["i:2"][0], axes["1 (ReLU)"].lines[0]
    assert len(line.get_xdata()) == chosen.numel()
    for c, place, across, down in zip(
        torch.arange(4).repeat_interleave(16).tolist(), chosen.flatten().tolist(), line.get_xdata(), line.get_ydata(), strict=True
    ):  # fmt: skip
        assert picture[down, across] == full.numbers["y:1"][0, c].flatten()[place]
    assert not axes["2 (MaxPool2d)"].lines


def test_a_channel_is_dead_if_it_is_0_everywhere() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.tensor([1.0, -1.0, 1.0, 1.0]))
    e = explained(model.double(), (4, 1, 3, 3))
    assert dead(e.observation.layers[1]) == 0.25


def test_a_trace_names_the_rules_of_convolutions_and_pools() -> None:
    """Not "dx = g", as for layers without a rule."""
    x, target = images(6, 2, 9, 10)
    records = list(Backprop(convnet(), nn.CrossEntropyLoss(), DESCENT).trace(x, target))
    of = {(record.layer, record.direction): record.formula for record in records}
    assert "y_{noq}" in of["Conv2d", "forward"] and "dL/dW[o,c,k]" in of["Conv2d", "backward"]
    assert "1[i(o) = j] g_o" in of["MaxPool2d", "backward"] and "M_ij" in of["AvgPool2d", "backward"]
    assert of["Flatten", "backward"] == "dx = g, in the shape of x"
