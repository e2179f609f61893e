"""The page of ``explain`` in a real browser: numbers, sums, slider, nudge, keyboard, layout, contrast, silence.

All of it runs in one headless Chromium, and is skipped where there is none.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from explained_pages import CHROMIUM, DRIVER, HAS_BROWSER, Page, browser
from torch import Tensor
from torch import nn as torch_nn

import manualprop
from manualprop import nn
from manualprop._backprop._stages import Activation, build
from manualprop._explain import Explanation, _javascript
from manualprop._explain._numbers import as_table
from manualprop._explain._tables import loss_of_each
from manualprop.descent import Batch, MiniBatch

pytestmark = pytest.mark.skipif(not HAS_BROWSER, reason="Chromium is missing: python3 scripts/run.py browser")
SIZE_LIMIT = 2 * 10**6


__all__ = ["browser"]  # a fixture


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(40, 64), torch.randint(6, (40,))


@pytest.fixture(scope="module")
def explanation() -> Explanation:
    x, target = data()
    model = nn.Sequential(nn.Linear(64, 20), nn.GELU(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 6))
    descent = MiniBatch(batch_size=16, learning_rate=0.3, momentum=0.5)
    row = {"epoch": 1, "train_loss": 2.0, "val_loss": 2.1}
    history = [row, row | {"epoch": 2, "train_loss": 1.5}]
    return manualprop.explain(
        model,
        nn.CrossEntropyLoss(),
        x,
        target,
        descent,
        updates=30,
        image=(8, 8),
        title="A </title> & b",
        history=history,
    )


@pytest.fixture(scope="module")
def opened(browser: Any, explanation: Explanation, tmp_path_factory: pytest.TempPathFactory) -> Page:
    path = tmp_path_factory.mktemp("page") / "page.html"
    explanation.save(path)
    return Page(browser, explanation, path)


@pytest.fixture
def page(opened: Page) -> Iterator[Page]:
    opened.look(1440)
    yield opened
    messages = opened.browser.get_log("browser")
    assert messages == [], "the console is silent"


# ----- one file, which is silent -----


def test_it_asks_no_network(page: Page) -> None:
    page.browser.get_log("performance")
    page.look(1440)
    page.run(
        "document.querySelectorAll('canvas').forEach((c) => c.focus()); document.getElementById('play').click()"
    )
    events = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert page.path.as_uri() in urls
    assert [url for url in urls if url != page.path.as_uri() and not url.startswith("data:")] == []
    text = page.path.read_text()
    assert "default-src 'none'" in text
    assert not re.findall(r"https?:(?!//www\.w3\.org/1998/Math/MathML)|@import|url\(", text)
    assert len(text.encode()) < SIZE_LIMIT


def test_a_title_is_text(page: Page) -> None:
    assert page.browser.title == "A </title> & b: an update, step by step"
    assert page.run("return document.querySelector('h1').textContent") == page.browser.title


# ----- the numbers -----


def test_the_numbers_are_the_tensors(page: Page) -> None:
    e = page.explanation
    found = page.run(
        "return Object.fromEntries(Object.entries(TABLES).map(([k, t]) => [k, Array.from(t.array(0))]))"
    )
    shown = {shown.key for step in e.steps for block in step.blocks for shown in block.shown}
    assert shown <= set(found) and len(shown) > 25
    for key, values in found.items():
        wanted = as_table(key, e.numbers[key]).float().reshape(-1)
        assert torch.equal(torch.tensor(values), wanted), key


def test_small_tensors_are_numbers_in_a_table(page: Page) -> None:
    values = page.run(
        """const grid = GRIDS.find((g) => g.small && g.grid.key === 'd:4.bias'); grid.draw();
        return [...grid.target.querySelectorAll('data')].map((d) => Number(d.value))"""
    )
    assert torch.equal(torch.tensor(values), page.explanation.numbers["d:4.bias"])


def test_any_number_shows_the_sum_that_made_it(page: Page) -> None:
    seen: set[str] = set()
    grids = page.run("return DATA.grids.map(({ key, made }) => [key, made.kind])")
    for key, kind in grids:
        whole = as_table(key, page.explanation.numbers[key])
        for row, col in ((0, 0), (len(whole) - 1, whole.shape[1] - 1)):
            found = page.cell(key, row, col, kind)
            value = whole[row, col].item()
            if kind == "update":
                value += as_table(key, page.explanation.numbers[key.replace("u:", "p:")])[row, col].item()
            assert found["shown"] == pytest.approx(value, rel=1e-6, abs=1e-9), key
            if found["terms"]:
                seen.add(kind)
                assert found["whole"] and found["sum"] == pytest.approx(found["value"], rel=1e-4, abs=1e-6), (
                    key
                )
            assert f"row {row}, column {col}" in found["said"]
    assert seen == {"affine", "weight_gradient", "bias_gradient", "input_gradient", "update"}


def test_the_sums_name_their_terms(page: Page) -> None:
    e = page.explanation
    x, W = e.numbers["x"], e.numbers["p:0.weight"]
    largest = int((W[3] * x[2]).abs().argmax())
    found = page.cell("y:0", 2, 3)
    assert (
        found["terms"] == 65 and f"W[3,{largest}] x[2,{largest}]" in found["text"] and "bias" in found["text"]
    )
    assert "58 other terms" in found["text"]
    assert page.cell("d:0.weight", 3, 5)["terms"] == 16 and page.cell("d:0.bias", 0, 3)["terms"] == 16
    p, t = torch.softmax(e.numbers["output"][1], 0), int(e.numbers["target"][1])
    text = page.cell("loss:g", 1, t)["text"]
    assert f"target is class {t}" in text and f"{p[t].item():.4g}" in text and "Why" in text
    assert "momentum" not in page.cell("u:0.weight", 1, 1)["text"]  # the first update has none to remember


def test_gradients_of_activations_are_computed_anew_by_the_printed_slope(page: Page) -> None:
    grids = page.run(
        "return DATA.grids.filter((g) => g.made.kind === 'slope').map((g) => [g.key, g.made.g, g.made.s])"
    )
    assert len(grids) == 2
    for key, g, s in grids:
        again = page.run(
            """const [g, s, key] = arguments, grid = DATA.grids.find((x) => x.key === key && x.made.kind === 'slope');
            const df = ACTIVATIONS[grid.made.layer].df, S = table(s).array();
            return Array.from(table(g).array(), (v, k) => v * df(S[k]))""",
            g,
            s,
            key,
        )
        wanted = page.explanation.numbers[key].reshape(-1)
        torch.testing.assert_close(torch.tensor(again), wanted, rtol=1e-4, atol=1e-7)


# ----- slider, play, example, nudge -----


def slide(page: Page, name: str, value: int) -> None:
    script = "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input', { bubbles: true }))"
    page.run(script, name, value)


def test_the_slider_plays_the_recorded_updates(page: Page) -> None:
    recording = page.explanation.recording
    picture = "return GRIDS[0].canvas.toDataURL()"
    before, last = page.run(picture), len(recording.at) - 1
    assert page.run("return DATA.at") == list(recording.at)
    slide(page, "frame", last)
    told = page.element("when").text
    assert f"update {recording.at[-1]} of 30" in told and f"loss {recording.frames[-1].loss:.4g}" in told
    assert page.run(picture) != before, "the weights are drawn anew"
    values = page.run("return Array.from(table('p:0.weight').array())")
    assert torch.equal(torch.tensor(values), recording.frames[-1].layers[0].weights[0].value.reshape(-1))
    assert "momentum" in page.cell("u:0.weight", 1, 1)["text"]
    remark = page.run("return [...document.querySelectorAll('.remarks')].map((e) => e.textContent).join(' ')")
    assert f"L = {recording.frames[-1].loss:.6g}" in remark
    assert page.run("return document.querySelectorAll('#curve circle').length") == last + 1


def test_play_and_pause(page: Page) -> None:
    button = page.element("play")
    button.click()
    assert (button.text, button.get_attribute("aria-pressed")) == ("Pause", "true")
    button.click()
    assert (button.text, button.get_attribute("aria-pressed")) == ("Play", "false")


def test_another_example_and_the_gradients(page: Page) -> None:
    def unit() -> Any:
        return page.run("return document.querySelectorAll('#network circle title')[12].textContent")

    first = unit()
    page.run(
        "const e = document.getElementById('example'); e.value = '5'; e.dispatchEvent(new Event('change'))"
    )
    second = unit()
    assert first != second
    page.run("document.querySelector('input[value=backward]').click()")
    index = int(second.split()[1].rstrip(":"))
    assert f"0 {index}: {page.explanation.numbers['g:0'][5, index].item():.4g}".replace("-", "−") == unit()
    assert "handed back" in page.element("legend").text or "hands back" in page.element("legend").text


def test_a_nudge_is_computed_anew(page: Page) -> None:
    e = page.explanation
    for key, row, col, by in (("p:2.weight", 3, 7, 55), ("p:0.weight", 1, 9, -80)):
        page.run("nudgeThis(...arguments)", key, row, col)
        slide(page, "nudge-by", by)
        got = {
            n: float(page.run("return document.getElementById(arguments[0]).value", n))
            for n in ("predicted", "recomputed", "missed")
        }
        delta = by / 100 * page.run("return nudgeScale(arguments[0])", key)
        model = nn.Sequential(nn.Linear(64, 20), nn.GELU(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 6))
        model.load_state_dict({w.name: w.value for w in e.observation.weights()})
        model.double()
        x, target = e.numbers["x"].double(), e.numbers["target"]
        with torch.no_grad():
            before = torch.nn.functional.cross_entropy(model(x), target)
            dict(model.named_parameters())[key[2:]][row, col] += delta
            after = torch.nn.functional.cross_entropy(model(x), target)
        assert got["recomputed"] == pytest.approx((after - before).item(), rel=1e-5, abs=1e-9)
        assert got["predicted"] == pytest.approx(
            delta * e.numbers[key.replace("p:", "d:")][row, col].item(), rel=1e-5
        )
        assert got["missed"] == pytest.approx(got["recomputed"] - got["predicted"], abs=1e-12)
    page.cell("p:2.weight", 0, 0)
    page.run("document.querySelector('[data-nudge]').click()")
    assert page.browser.switch_to.active_element.get_attribute("id") == "nudge-by"


def test_the_descents_are_drawn_side_by_side(page: Page) -> None:
    colours = page.run(
        """return [...document.querySelectorAll('canvas.path')].map((c) => {
          const pixels = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, seen = new Set();
          for (let k = 0; k < pixels.length; k += 4) seen.add(pixels.slice(k, k + 3).join());
          return [seen.size, c.getBoundingClientRect().top]; })"""
    )
    assert len(colours) == 3 and min(count for count, _ in colours) > 10
    assert len({top for _, top in colours}) == 1
    told = page.run("return [...document.querySelectorAll('figcaption')].map((f) => f.textContent)")
    assert ["noise" in text for text in told] == [True] * 3


# ----- keyboard and screen reader -----


def test_the_keyboard_goes_from_number_to_number(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    e = page.explanation
    page.run("const g = GRIDS.find((g) => g.grid.key === 'y:0'); g.draw(); g.target.focus()")
    canvas = page.browser.switch_to.active_element
    canvas.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert float(page.run("return document.getElementById('total').value")) == pytest.approx(
        e.numbers["y:0"][1, 2].item(), rel=1e-6
    )
    assert "output of 0, row 1, column 2" in page.element("said").get_attribute("textContent")
    canvas.send_keys(Keys.END)
    assert "column 19" in page.element("said").get_attribute("textContent")
    canvas.send_keys(Keys.ARROW_RIGHT)  # stays within
    assert "column 19" in page.element("said").get_attribute("textContent")
    page.run("document.querySelector('[data-move=ArrowLeft]').click()")  # for fingers
    assert "column 18" in page.element("said").get_attribute("textContent")
    canvas.send_keys(Keys.ESCAPE)
    assert not page.element("sum").is_displayed()
    frame = page.element("frame")
    frame.send_keys(Keys.ARROW_RIGHT)
    assert page.run("return state.frame") == 1


def test_the_pointer_finds_the_number_under_it(page: Page) -> None:
    from selenium.webdriver import ActionChains

    page.run("document.documentElement.style.scrollBehavior = 'auto'; GRIDS.forEach((g) => g.draw())")
    for key in ("y:0", "p:0.weight", "loss:l"):
        x, y, row, col = page.run(
            """const g = GRIDS.find((g) => g.grid.key === arguments[0]); g.element.scrollIntoView({ block: 'center' }); g.draw();
            const row = Math.min(3, g.numbers.rows - 1), col = Math.min(5, g.numbers.cols - 1), [a, b, w, h] = g.place(row, col), r = g.target.getBoundingClientRect();
            return [r.left + a + w / 2, r.top + b + h / 2, row, col]""",
            key,
        )
        actions = ActionChains(page.browser)
        actions.w3c_actions.pointer_action.move_to_location(int(x), int(y))
        actions.perform()
        wanted = as_table(key, page.explanation.numbers[key])[row, col].item()
        assert float(page.run("return document.getElementById('total').value")) == pytest.approx(
            wanted, rel=1e-6
        ), key


def test_everything_that_can_be_reached_has_a_name(page: Page) -> None:
    page.cell("y:0", 0, 0)
    nodes = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    unnamed = []
    focusable = 0
    for node in nodes:
        if node.get("ignored"):
            continue
        able = any(p["name"] == "focusable" and p["value"]["value"] for p in node.get("properties", []))
        role = node["role"]["value"]
        if able and role != "RootWebArea":
            focusable += 1
            if not node.get("name", {}).get("value"):
                unnamed.append((role, node))
        if role == "image" and not node.get("name", {}).get("value"):
            unnamed.append((role, node))
    assert focusable > 40 and unnamed == []
    levels = page.run("return [...document.querySelectorAll('h1, h2, h3')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert page.run("return document.documentElement.lang") == "en"
    assert page.run("return document.querySelectorAll('math').length") > 15


# ----- layout and contrast -----


@pytest.mark.parametrize("width", [360, 1440])
def test_the_layout_holds(page: Page, width: int) -> None:
    page.look(width)
    page.cell("y:0", 0, 0)
    wide, window = page.run("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window == width
    story, stage = page.run(
        "return ['story', 'stage'].map((id) => document.getElementById(id).getBoundingClientRect().left)"
    )
    assert (story > stage + 300) == (width == 1440), "two columns where there is room"
    out = page.run(
        """const scrolls = (e) => e && (['auto', 'scroll'].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
        return [...document.querySelectorAll('main *, header *')].filter((e) => { const r = e.getBoundingClientRect();
          return r.width && r.right > innerWidth + 1 && !e.closest('.sr') && !scrolls(e); }).map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert out == []
    if width == 360:
        low = page.run(
            "const r = document.getElementById('sum').getBoundingClientRect(); return [r.bottom, r.height, innerHeight]"
        )
        assert low[0] == pytest.approx(low[2], abs=1) and low[1] < low[2] / 2


CONTRASTS = """
const rgba = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length === 4 ? n : [...n, 1]; };
const over = (top, below) => top.slice(0, 3).map((c, k) => c * top[3] + below[k] * (1 - top[3]));
const ground = (e) => { if (!e) return rgba(getComputedStyle(document.documentElement).backgroundColor).slice(0, 3).map(() => DARK ? 0 : 255);
  const own = rgba(getComputedStyle(e).backgroundColor); return own[3] === 1 ? own.slice(0, 3) : over(own, ground(e.parentElement)); };
const DARK = matchMedia('(prefers-color-scheme: dark)').matches, found = [];
for (const e of document.querySelectorAll('body *')) {
  if (e.closest('script, style') || e.closest('.sr') || ![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
  const style = getComputedStyle(e), r = e.getBoundingClientRect();
  if (!r.width || style.visibility === 'hidden') continue;
  const svg = e instanceof SVGElement && !(e instanceof HTMLElement) && e.closest('svg'), below = ground(svg ? e.closest('svg').parentElement : e);
  const ink = over(rgba(svg ? style.fill : style.color), below), a = luminance(ink), b = luminance(below);
  const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), large ? 3 : 4.5, e.tagName + '.' + (e.className.baseVal ?? e.className) + ' ' + e.textContent.trim().slice(0, 30)]);
}
return found;
"""


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_the_contrast_is_enough(page: Page, dark: bool) -> None:
    page.look(1440, dark)
    page.cell("loss:g", 0, 0)
    page.run("GRIDS.forEach((g) => g.draw())")
    found = page.run(CONTRASTS)
    assert len(found) > 200
    assert [row for row in found if row[0] < row[1]] == []
    ground = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 150) == dark
    # Numbers within a coloured cell of a canvas: the ink is chosen by the colour.
    worst = page.run(
        """let worst = 99; for (let k = -50; k <= 50; k++) { const rgb = colour(k, 50), i = ink(rgb) === '#000000' ? 0 : 1, l = luminance(rgb);
        worst = Math.min(worst, (Math.max(i, l) + 0.05) / (Math.min(i, l) + 0.05)); } return worst"""
    )
    assert worst >= 4.5


# ----- the printed functions -----


def with_parameters(formula: Any, p: tuple[Any, ...]) -> Any:
    return lambda t: formula(t, *p)


def activations() -> dict[str, Activation]:
    found = {}
    for name, kind in vars(nn).items():
        if (
            inspect.isclass(kind)
            and issubclass(kind, torch_nn.Module)
            and "Softm" not in name
            and "Softmin" not in name
        ):
            try:
                stage = build(kind(), name)
            except TypeError:  # it needs arguments, or is no layer of one input
                continue
            if isinstance(stage, Activation):
                found[name] = stage
    return found


@pytest.mark.filterwarnings(
    "ignore:.*has been deprecated:UserWarning", "ignore:.*2-D input:UserWarning", "ignore::FutureWarning"
)
def test_every_printed_activation_computes_what_its_rule_computes(page: Page) -> None:
    x = torch.linspace(-7, 7, 57)
    stages = activations()
    assert len(stages) >= 18
    for name, stage in stages.items():
        rule: Any = stage.rule
        s = rule.f(x, *stage.p) if stage.saves_output else x
        for formula, argument in ((rule.f, x), (rule.df, s)):
            printed = _javascript.of_numbers(with_parameters(formula, stage.p))
            got = torch.tensor(
                page.run(f"return arguments[0].map({printed})", argument.tolist()), dtype=torch.float64
            )
            wanted = formula(argument.double(), *stage.p)
            torch.testing.assert_close(
                got, wanted, rtol=2e-6, atol=2e-7, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_every_printed_loss_computes_what_its_rule_computes(page: Page) -> None:
    torch.manual_seed(0)
    x, t, y = torch.randn(5, 4), torch.randint(4, (5,)), torch.rand(5, 4)
    t[2] = -100
    losses = [
        (nn.CrossEntropyLoss(), t),
        (nn.CrossEntropyLoss(weight=torch.rand(4) + 0.5, label_smoothing=0.1), t),
        (nn.MSELoss(), y),
        (nn.HuberLoss(delta=0.5), y),
        (nn.SmoothL1Loss(), y),
        (nn.BCEWithLogitsLoss(), y),
        (nn.SoftMarginLoss(), torch.sign(y - 0.5)),
    ]
    for loss, target in losses:
        single = loss_of_each(loss)
        printed = _javascript.of_loss_rows(single, x, target)
        got = page.run(
            f"const f = {printed}; return arguments[0].map((row, n) => f(row, arguments[1][n]))",
            x.tolist(),
            target.tolist(),
        )
        torch.testing.assert_close(torch.tensor(got), single(x, target), rtol=1e-5, atol=1e-6)


# ----- other models -----


@pytest.mark.slow
def test_a_large_network_is_cut_and_still_nudged(browser: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, target = torch.randn(32, 784), torch.randint(10, (32,))
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    e = manualprop.explain(model, nn.CrossEntropyLoss(), x, target, Batch(learning_rate=0.1), updates=0)
    path = tmp_path / "large.html"
    e.save(path)
    assert path.stat().st_size < SIZE_LIMIT
    page = Page(browser, e, path)
    page.look(1440)
    found = page.cell("y:0", 1, 2)
    assert not found["whole"] and "not on this page" in found["text"]
    assert found["shown"] == pytest.approx(e.numbers["y:0"][1, 2].item(), rel=1e-6)
    page.run("nudgeThis('p:0.weight', 1, 9)")
    got = float(page.run("return document.getElementById('recomputed').value"))
    delta = 0.4 * page.run("return nudgeScale('p:0.weight')")
    with torch.no_grad():
        model.double()
        before = torch.nn.functional.cross_entropy(model(x.double()), target)
        model[0].weight[1, 9] += delta
        after = torch.nn.functional.cross_entropy(model(x.double()), target)
    assert got == pytest.approx((after - before).item(), rel=1e-4, abs=1e-8)
    assert browser.get_log("browser") == []


def test_other_layers_and_tokens_have_a_page(browser: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch_nn.Sequential(
        torch_nn.Embedding(20, 6),
        torch_nn.LayerNorm(6),
        nn.Linear(6, 5),
        nn.ReLU(),
        torch_nn.Flatten(),
        nn.Linear(35, 3),
    )
    x, target = torch.randint(20, (4, 7)), torch.randint(3, (4,))
    e = manualprop.explain(model, nn.CrossEntropyLoss(), x, target, updates=0)
    path = tmp_path / "tokens.html"
    e.save(path)
    page = Page(browser, e, path)
    page.look(360)
    assert "is not a layer that the page computes" in page.element("nudge").text
    assert "not by hand" in page.element("story").text
    found = page.cell("y:2", 9, 4)  # the third token of the second example
    assert found["terms"] == 7 and found["sum"] == pytest.approx(e.numbers["y:2"][1, 2, 4].item(), rel=1e-5)
    assert page.cell("d:2.weight", 0, 0)["terms"] == 28
    assert browser.get_log("browser") == []


def test_what_multiplies_an_image_is_drawn_as_one(browser: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, target = torch.randn(4, 1, 6, 6), torch.randint(3, (4,))
    flat = nn.Sequential(torch_nn.Flatten(), nn.Linear(36, 3))
    convolved = torch_nn.Sequential(torch_nn.Conv2d(1, 2, 3), torch_nn.Flatten(), nn.Linear(32, 3))
    for model, key, image in ((flat, "p:1.weight", [6, 6]), (convolved, "p:0.weight", [3, 3])):
        e = manualprop.explain(model, nn.CrossEntropyLoss(), x, target, updates=0)
        path = tmp_path / "images.html"
        e.save(path)
        page = Page(browser, e, path)
        page.look(1440)
        images = page.run("return Object.fromEntries(GRIDS.map((g) => [g.grid.key, g.image]))")
        assert (images["x"], images[key], images["output"]) == ([6, 6], image, None)
    assert browser.get_log("browser") == []


def test_regression_shows_the_squared_error(browser: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, target = torch.randn(6, 3), torch.randn(6, 2)
    e = manualprop.explain(nn.Sequential(nn.Linear(3, 2)), nn.MSELoss(), x, target, updates=0)
    path = tmp_path / "regression.html"
    e.save(path)
    page = Page(browser, e, path)
    page.look(1440)
    found = page.cell("loss:g", 4, 1)
    output, t = e.numbers["output"][4, 1].item(), e.numbers["target"][4, 1].item()
    assert found["shown"] == pytest.approx(2 * (output - t) / 12, rel=1e-5) and "2 (" in found["text"]
    assert page.run("return DATA.nudge") and float(
        page.run("return document.getElementById('recomputed').value")
    )
    assert browser.get_log("browser") == []


def test_a_notebook_shows_the_page(browser: Any, explanation: Explanation, tmp_path: Path) -> None:
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><title>notebook</title>{explanation._repr_html_()}")
    browser.get(path.as_uri())
    browser.switch_to.frame(browser.find_element("tag name", "iframe"))
    assert browser.find_element("id", "when").text.startswith("update 0 of 30")
    browser.switch_to.default_content()
    assert [m for m in browser.get_log("browser") if m["level"] == "SEVERE"] == []


def test_these_tests_see_a_page_that_is_wrong(opened: Page, tmp_path: Path) -> None:
    """A message, a request, a wide element: each is noticed."""
    path = tmp_path / "wrong.html"
    wrong = "<img src='http://127.0.0.1:9/x.png' alt=''><p style='width: 3000px'>wide</p><script>console.error('no')</script>"
    path.write_text(opened.path.read_text().replace("</main>", f"</main>{wrong}"))
    page = opened._replace(path=path)
    page.look(1440)
    messages = " ".join(m["message"] for m in page.browser.get_log("browser"))
    assert '"no"' in messages and "Content Security Policy" in messages
    assert page.run("return document.documentElement.scrollWidth > innerWidth")


def test_the_tests_run_where_ci_has_installed_the_browser() -> None:
    assert os.access(str(CHROMIUM), os.X_OK) and os.access(str(DRIVER), os.X_OK)
