"""The page of ``explain`` for convolutions and pools, in a real browser: each number with the window that made it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from explained_pages import HAS_BROWSER, Page, browser
from test_explain_windows import convnet, explained, images
from torch import Tensor
from torch import nn as torch_nn

import manualprop
from manualprop import nn
from manualprop._explain import Explanation
from manualprop._explain._numbers import as_table
from manualprop._explain._tables import tables
from manualprop.descent import Batch

pytestmark = pytest.mark.skipif(not HAS_BROWSER, reason="Chromium is missing: python3 scripts/run.py browser")

__all__ = ["browser"]  # a fixture

SUMS = {
    "convolution",
    "convolution_input",
    "convolution_weight",
    "convolution_bias",
    "chosen",
    "mean",
    "mean_input",
}


@pytest.fixture(scope="module")
def page(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Page:
    e = explained(convnet(), (6, 2, 9, 10), updates=2)
    return opened(browser, e, tmp_path_factory.mktemp("page") / "page.html")


def opened(browser: Any, e: Explanation, path: Any, width: int = 1440) -> Page:
    e.save(path)
    found = Page(browser, e, path)
    found.look(width)
    return found


def test_any_number_shows_the_window_that_made_it(page: Page) -> None:
    seen = set()
    for key, kind in page.run("return DATA.grids.map(({ key, made }) => [key, made.kind])"):
        if kind not in {*SUMS, "maximum", "place", "moved"}:
            continue
        whole = as_table(key, page.explanation.numbers[key])
        for flat in {0, whole.numel() // 3, whole.numel() // 2 + 1, whole.numel() - 1}:
            row, col = divmod(flat, whole.shape[1])
            found, value = page.cell(key, row, col, kind), whole[row, col].item()
            assert found["shown"] == pytest.approx(value, rel=1e-6, abs=1e-9), (key, kind)
            if kind in SUMS:
                assert found["whole"] and found["sum"] == pytest.approx(value, rel=1e-4, abs=1e-6), (
                    key,
                    kind,
                )
                seen.add(kind)
    assert seen == SUMS
    assert page.browser.get_log("browser") == []


def test_the_sums_name_their_places(page: Page) -> None:
    e = page.explanation
    total = "return document.querySelector('#sum-body .total').innerText"
    page.cell("y:0", 1, 2 * 90 + 11)  # channel 2, of the second group, in a place of its own
    assert page.run(total).startswith(
        "y[1,2,1,1] = Σ W[2,c,k] x[1,1+c,i] + b[2], over a window of 9 places in 1 channel ="
    )
    c, q = 1, (2, 3)
    place = int(e.numbers["i:2"][(0, c, *q)])
    found = page.cell("y:2", 0, c * 16 + q[0] * 4 + q[1])
    assert page.run(total).startswith(
        f"y[0,1,2,3] = x[0,1,{place // 10},{place % 10}], the largest of 9 numbers"
    )
    assert f"at place {place} of its image" in found["text"]
    assert page.run("return document.querySelectorAll('#sum-body b').length") == 1
    nothing = int((e.numbers["g:1"][0, 0].flatten() == 0).nonzero()[0])
    assert "so it gets nothing" in page.cell("g:1", 0, nothing, "chosen")["text"]
    assert page.cell("d:0.weight", 1, 4)["terms"] == 4 * 90 and page.cell("d:0.bias", 0, 1)["terms"] == 4
    page.cell("u:3.weight", 2, 7)
    assert page.run(total).startswith("W[2,1,0,1] ← W[2,1,0,1]"), "a weight has a number for each axis"
    assert "x[1,3,0,0] in another shape" in page.cell("y:8", 1, 3)["text"]


def test_an_image_has_a_tile_for_each_channel(page: Page) -> None:
    images_of = page.run("return Object.fromEntries(GRIDS.map((g) => [g.grid.key, [g.image, g.channels]]))")
    assert images_of["x"] == [[9, 10], 2] and images_of["y:0"] == [[9, 10], 4]
    assert images_of["p:3.weight"] == [[3, 2], 4] and images_of["y:8"] == [None, 1]
    same = page.run(
        """const g = GRIDS.find((g) => g.grid.key === 'y:0'); g.draw(); const lost = [];
        for (let r = 0; r < g.numbers.rows; r++) for (let c = 0; c < g.numbers.cols; c += 7) {
          const [x, y, w, h] = g.place(r, c), found = g.under(x + w / 2, y + h / 2);
          if (String(found) !== String([r, c])) lost.push([r, c, found]); }
        return lost"""
    )
    assert same == [], "the pointer finds the number that is drawn there"


@pytest.mark.parametrize("width", [360, 1440])
def test_the_layout_holds(page: Page, width: int) -> None:
    page.look(width)
    page.cell("y:3", 0, 0)
    wide, window = page.run("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window == width
    assert (
        page.run(
            "return [...document.querySelectorAll('.remark')].filter((e) => e.textContent.startsWith('dW[')).length"
        )
        == 2
    )
    page.look(1440)


def test_the_slider_works_the_numbers_out_anew(page: Page) -> None:
    told = "return [...document.querySelectorAll('.remark')].map((e) => e.textContent).find((t) => t.startsWith('y['))"
    before = page.run(told)
    page.run(
        "const e = document.getElementById('frame'); e.value = 2; e.dispatchEvent(new Event('input', { bubbles: true }))"
    )
    after = page.run(told)
    assert before.partition(" = ")[0] == after.partition(" = ")[0] and before != after
    page.look(1440)


def test_a_large_image_is_shown_whole_for_fewer_examples(browser: Any, tmp_path: Any) -> None:
    x, target = images(24, 1, 28, 28)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(216, 3)
    ).double()
    e = manualprop.explain(model, nn.CrossEntropyLoss(), x, target, Batch(learning_rate=0.1), updates=0)
    packed, _ = tables(e)
    assert 0 < packed["y:0"]["rows"] < 24 and packed["y:0"]["cols"] == 6 * 24 * 24
    page = opened(browser, e, tmp_path / "large.html")
    found = page.cell("y:0", 0, 100)
    assert found["whole"] and found["sum"] == pytest.approx(e.numbers["y:0"][0, 0, 4, 4].item(), rel=1e-4)
    found = page.cell("d:0.weight", 0, 0)
    assert not found["whole"] and "not on this page" in found["text"]
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_a_transposed_convolution_shows_its_sums_in_the_letters_of_its_rule(
    browser: Any, tmp_path: Any
) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 1), nn.ConvTranspose2d(4, 6, (3, 2), 2, (1, 0), (1, 0), 2, dilation=(1, 2))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 56, 3)).double()
    page = opened(browser, explained(model, (5, 1, 4, 3)), tmp_path / "transposed.html")
    kinds = {
        "transposed": "x",
        "transposed_input": "dL/dy",
        "transposed_weight": "dW",
        "convolution_bias": "db",
    }
    for key, kind, symbol in page.run(
        "return DATA.grids.map(({ key, made, symbol }) => [key, made.kind, symbol])"
    ):
        if kinds.get(kind) != symbol or key in ("d:0.bias",):
            continue
        whole = as_table(key, page.explanation.numbers[key])
        for flat in {0, whole.numel() // 3, whole.numel() - 1}:
            row, col = divmod(flat, whole.shape[1])
            found = page.cell(key, row, col, kind)
            assert found["whole"], (key, kind)
            assert found["sum"] == pytest.approx(whole[row, col].item(), rel=1e-4, abs=1e-6), (key, kind)
        kinds.pop(kind)
    assert kinds == {}
    page.cell("y:1", 2, 5 * 56)
    assert "x[2,5,0,0] = Σ y[2,2+o,q] W[2+o,2,k] + b[5], over 2 channels and 1 place" in page.run(
        "return document.querySelector('#sum-body .total').innerText"
    )


def test_pictures_keep_their_place_before_they_are_drawn(page: Page) -> None:
    """Or a jump to a step would end elsewhere; and a number in a tall picture scrolls into sight."""
    page.look(360)
    heights = "return GRIDS.map((g) => g.element.offsetHeight)"
    before = page.run(heights)
    page.run("GRIDS.forEach((g) => g.draw())")
    assert page.run(heights) == before
    g = page.run(
        """const g = GRIDS.find((g) => g.grid.key === 'y:0'); g.go(g.numbers.rows - 1, g.numbers.cols - 1, true);
        const [, y] = g.place(g.row, g.col); return [y, g.body.scrollTop, g.body.clientHeight]"""
    )
    assert g[1] <= g[0] < g[1] + g[2]
    page.look(1440)


# ----- the nudge -----


class Masked(torch_nn.Module):
    """Dropout that draws what it drew on the page."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask.double()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.mask


def normed(classes: int = 3) -> torch_nn.Module:
    """Every layer of a convnet that the page computes anew, as an encoder and a decoder, with groups and strides."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (2, 7, 6)),
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2, bias=False),
        nn.BatchNorm2d(4),
        nn.SiLU(),
        nn.MaxPool2d(2, 1, padding=1),
        nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=(1, 0), output_padding=(1, 0), groups=2, dilation=(1, 2)),
        nn.BatchNorm2d(6, affine=False, track_running_stats=False),
        nn.ReLU(),
        nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False, padding=1),
        nn.AdaptiveAvgPool2d((3, 2)),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(36, classes),
    )  # fmt: skip


def of_one_axis() -> torch_nn.Module:
    torch.manual_seed(0)
    layers = (
        nn.Conv1d(2, 3, 3, padding="same"),
        nn.BatchNorm1d(3),
        nn.Tanh(),
        nn.AdaptiveMaxPool1d(4),
        nn.Flatten(),
    )
    model = nn.Sequential(*layers, torch_nn.Dropout(0.4), nn.Linear(12, 3))
    model(torch.randn(8, 2, 9))  # running statistics of its own
    return model


@pytest.mark.parametrize(
    ("model", "shape", "is_training"),
    [
        (normed, (6, 84), True),
        pytest.param(of_one_axis, (5, 2, 9), True, marks=pytest.mark.slow),
        pytest.param(of_one_axis, (5, 2, 9), False, marks=pytest.mark.slow),
    ],
)
def test_a_nudge_of_any_weight_moves_the_loss_as_in_torch(
    model: Any, shape: tuple[int, ...], is_training: bool, browser: Any, tmp_path: Any
) -> None:
    built = model().train(is_training)
    torch.manual_seed(1)
    x, target = torch.randn(shape), torch.randint(3, (shape[0],))
    e = manualprop.explain(built, nn.CrossEntropyLoss(), x, target, Batch(learning_rate=0.1), updates=0)
    page = opened(browser, e, tmp_path / "nudged.html")
    again = copy.deepcopy(built).double()
    for i, layer in enumerate(built):
        if isinstance(layer, torch_nn.Dropout) and is_training:
            again[i] = Masked(e.numbers[f"m:{i}"])
    x, target = e.numbers["x"].double(), e.numbers["target"]
    weights = [w.name for w in e.observation.weights() if w.name.endswith("weight")]
    assert page.run("return DATA.nudged.map((i) => DATA.layers[i].W)") == [f"p:{name}" for name in weights]
    for name in weights:
        W = dict(again.named_parameters())[name]
        rows = W.reshape(1, -1) if W.dim() == 1 else W.reshape(len(W), -1)
        row, col = len(rows) - 1, rows.shape[1] // 2
        page.run("nudgeThis(...arguments)", f"p:{name}", row, col)
        got = {
            n: float(page.run("return document.getElementById(arguments[0]).value", n))
            for n in ("predicted", "recomputed")
        }
        delta = 0.4 * page.run("return nudgeScale(arguments[0])", f"p:{name}")
        with torch.no_grad():
            before = F.cross_entropy(again(x), target)
            rows[row, col] += delta
            after = F.cross_entropy(again(x), target)
            rows[row, col] -= delta
        assert got["recomputed"] == pytest.approx((after - before).item(), rel=1e-4, abs=1e-7), name
        gradient = e.numbers[f"d:{name}"].reshape(rows.shape)[row, col].item()
        assert got["predicted"] == pytest.approx(delta * gradient, rel=1e-5, abs=1e-9)
    assert page.browser.get_log("browser") == []


@pytest.mark.slow
def test_what_the_page_does_not_compute_is_told(browser: Any, tmp_path: Any) -> None:
    x, target = images(4, 1, 5, 5)
    for layer in (nn.LPPool2d(2, 2), nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")):
        model = nn.Sequential(nn.Conv2d(1, 1, 1), layer, nn.Flatten(), nn.LazyLinear(3)).double()
        model(x)
        e = manualprop.explain(model, nn.CrossEntropyLoss(), x, target, updates=0)
        page = opened(browser, e, tmp_path / "refused.html")
        text = f"1 ({type(layer).__name__}) is not a layer that the page computes."
        assert text in page.element("nudge").text
