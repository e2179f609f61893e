"""The page of ``explain`` for convolutions and pools, in a real browser: each number with the window that made it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from explained_pages import HAS_BROWSER, Page, browser
from test_explain_windows import convnet, explained, images

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
