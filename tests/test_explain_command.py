"""``manualprop explain``: the digits recipe, a run at a checkpoint, any model by its name, and mistakes in one line."""

from __future__ import annotations

import importlib.util
import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from manualprop import _command
from manualprop._explain._steps import TITLES
from manualprop.training import loading

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning", "ignore:Checkpoint directory:UserWarning"
)

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "digits" / "minibatch.yaml"

PAGE = RECIPE.parents[2] / "docs" / "explain.md"

MODULE = """
import torch
from torch import nn as theirs
from manualprop import nn

def build():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

def torchs():
    return theirs.Sequential(theirs.Linear(4, 6), theirs.Tanh(), theirs.Linear(6, 1))

class Tagger(theirs.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 4), nn.Linear(4, 5)
    def forward(self, ids):
        return self.head(self.embed(ids)).mT

tokens = Tagger
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "mine_explained.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    sys.modules.pop("mine_explained", None)


@pytest.fixture
def no_descents(monkeypatch: pytest.MonkeyPatch) -> None:
    """The three descents take most of the time, and test_explain.py looks at them."""
    monkeypatch.setattr("manualprop._explain._explanation.three_descents", lambda *_: "Left out.")


def explain(*words: str) -> int:
    return _command.main(["explain", *words])


# ----- the digits -----


def test_alone_it_explains_the_digits(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain() == 0
    out = capsys.readouterr().out
    places = [out.index(f"{number:>2}  {title}") for number, (_, title, _) in TITLES.items()]
    assert places == sorted(places) and max(map(len, out.splitlines())) <= 80
    assert "The digits recipe" in out and "functions.Linear.weight_gradient" in out
    assert "explain --page explain.html" in out.splitlines()[-1]
    for block in re.findall(r"^```text\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S):
        assert_shown(block.split(), out.split())


def assert_shown(block: list[str], out: list[str]) -> None:
    """The words of the page's block follow each other in the output; numbers may differ by rounding."""
    for start in (i for i, word in enumerate(out) if word == block[0]):
        if all(alike(a, b) for a, b in zip(block, out[start:], strict=False)):
            return
    raise AssertionError(f"docs/explain.md shows what is not printed any more: {' '.join(block[:12])} ...")


def alike(a: str, b: str) -> bool:
    try:
        return abs(float(a) - float(b)) <= 0.02 * abs(float(b))
    except ValueError:
        return a == b


def test_a_page_that_shows_something_else_is_seen() -> None:
    assert_shown(["a", "1.001"], ["x", "a", "1.0", "b"])
    for wrong in (["a", "2"], ["a", "b"], ["c"]):
        with pytest.raises(AssertionError, match="not printed any more"):
            assert_shown(wrong, ["x", "a", "1.0", "b"])


def test_the_digits_are_those_of_the_recipe() -> None:
    from manualprop.training.cli import load_recipe

    recipe, loaded = load_recipe(RECIPE), loading.digits()
    wanted = recipe.model.model.state_dict()
    assert all(torch.equal(t, wanted[name]) for name, t in loaded.model.state_dict().items())
    assert loaded.descent == recipe.model.descent and type(loaded.loss) is type(recipe.model.loss)
    assert torch.equal(loaded.x, recipe.datamodule.train[0]) and loaded.seed == recipe.model.seed


def test_it_writes_the_page_the_figure_and_json(
    capsys: pytest.CaptureFixture[str], no_descents: None
) -> None:
    words = ["mine_explained:build", "--input", "8x4", "--target", "classes:3"]
    assert explain(*words, "--page", "a.html", "--figure", "a.png", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["title"] == "mine_explained:build" and data["loss"]["class"] == "CrossEntropyLoss"
    assert Path("a.html").read_text().startswith("<!doctype html>")
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


def test_help_needs_no_torch() -> None:
    script = (
        "import sys; from manualprop._command import main\n"
        "try: main(['explain', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'lightning', 'rich', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--checkpoint" in done.stdout and "ids:50:8x16" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.slow
def test_the_digits_take_less_than_five_seconds_of_processor_time(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, "-m", "manualprop", "explain", "--page", str(tmp_path / "page.html")]
    done = subprocess.run(words, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    assert (tmp_path / "page.html").stat().st_size < 2 * 10**6


# ----- a run -----


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ["--trainer.enable_progress_bar=false", "--trainer.max_epochs=2", "--name=short"]
        assert _command.main(["fit", "--config", str(RECIPE), *words]) == 0
    return folder


def test_a_run_at_any_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_descents: None
) -> None:
    monkeypatch.chdir(run)
    last = loading.run("short", "last")
    weights = torch.load(run / "runs/short/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(t, weights[f"model.{name}"]) for name, t in last.model.state_dict().items())
    assert last.title == "Run short, last.ckpt after 82 updates" and len(last.x) == 1297
    assert [row["epoch"] for row in last.history] == [1, 2] and last.image == (8, 8)
    capsys.readouterr()
    assert (
        explain(
            "--name",
            "short",
            "--checkpoint",
            "last",
            "--layer",
            "linear1",
            "--example",
            "3",
            "--page",
            "p.html",
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "Run short, last.ckpt after 82 updates" in out and "activation1" not in out
    loss = torch.nn.functional.cross_entropy
    rows = next(last.descent.updates(1297, seed=last.seed))[0]
    value = loss(last.model(last.x[rows]), last.target[rows]).item()
    assert f"{value:.6g}"[:5] in Path("p.html").read_text()
    capsys.readouterr()
    assert explain("--name", "short", "--checkpoint", "no.ckpt") == 2
    assert "There must be a checkpoint. no.ckpt does not exist" in one_line(capsys)


# ----- models by their name -----


def test_a_model_of_tokens(capsys: pytest.CaptureFixture[str], no_descents: None) -> None:
    assert (
        explain("mine_explained:tokens", "--input", "ids:50:4x7", "--target", "classes:5", "--verbose") == 0
    )
    out = capsys.readouterr().out
    assert "4×7×4" in out and "4×5×7" in out and "Autograd ran this model" in out


def test_a_model_of_torch_says_what_is_not_by_hand(
    capsys: pytest.CaptureFixture[str], no_descents: None
) -> None:
    words = ["--input", "8x4", "--target", "8x1", "--descent", "Batch", "--learning-rate", "0.5"]
    assert explain("mine_explained:torchs", *words, "--loss", "torch.nn.HuberLoss") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Not by hand are the gradients of 0 (Linear), 1 (Tanh), 2 (Linear), the loss (HuberLoss)" in out
    assert "Batch: learning rate 0.5" in out and out.count("by torch's autograd") >= 5


# ----- mistakes -----


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert (
        out == ""
        and err.count("\n") == 1
        and err.startswith("manualprop: explain: ")
        and "Traceback" not in err
    )
    return err


GOOD = ["mine_explained:build", "--input", "8x4", "--target", "classes:3"]
MISTAKES: dict[str, tuple[list[str], str]] = {
    "width": (["mine_explained:build", "--input", "8x5", "--target", "8:long:3"], r"must take inputs of shape \(8, 5\)"),
    "target": (["mine_explained:build", "--input", "8x4", "--target", "8:long:9"], r"targets of shape \(8,\), int64. It raised"),
    "kind": ([*GOOD, "--loss", "MSELoss"], "must be given an output and a target of one shape"),
    "classes": (["mine_explained:build", "--input", "8x4", "--target", "classes:7"], "as many classes as the model has outputs"),
    "rows": (["mine_explained:build", "--input", "8x4", "--target", "7:long:3"], "as many of them"),
    "loss": ([*GOOD, "--loss", "CrossEntropyLos"], "Did you mean CrossEntropyLoss"),
    "loss path": ([*GOOD, "--loss", "no.such.Loss"], "No module named 'no'"),
    "module": (["mine_missing:build", *GOOD[1:]], "the module 'mine_missing' must be importable"),
    "name": (["mine_explained:buidl", *GOOD[1:]], "Did you mean 'build'"),
    "no input": (["mine_explained:build", "--target", "classes:3"], "a model needs --input"),
    "no target": (["mine_explained:build", "--input", "8x4"], "a model needs --target"),
    "no model": (["--input", "8x4"], "--input belongs to a model of your own"),
    "both": ([*GOOD, "--name", "x"], "not both"),
    "no run": (["--name", "nowhere"], "There must be the configuration of a run. runs/nowhere/config.yaml does not exist"),
    "bad run": (["--name", "../x"], "plain directory name"),
    "rate": ([*GOOD, "--learning-rate", "-1"], "learning_rate must be a positive number"),
    "layer": ([*GOOD, "--layer", "9"], "layer must be one of 0, 2, 1, loss. Got '9'"),
    "example": ([*GOOD, "--example", "8"], "example must be from 0 to 7"),
    "page": ([*GOOD, "--page", "no/such/page.html"], "no/such/page.html must be a file in a folder that can be written to"),
    "figure": ([*GOOD, "--figure", "no/such/a.png"], "must be a file in a folder that can be written to"),
    "format": ([*GOOD, "--figure", "a.nonsense"], "not supported"),
    "option": ([*GOOD, "--lyer", "0"], "unrecognized arguments: --lyer"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line(
    mistake: str, capsys: pytest.CaptureFixture[str], no_descents: None
) -> None:
    words, text = MISTAKES[mistake]
    assert explain(*words) == 2
    assert re.search(text, one_line(capsys))


def test_a_run_needs_lightning_and_the_digits_do_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "lightning" else real(n, *a))
    assert explain("--name", "x") == 2
    assert (
        'a run needs lightning, which is not installed. Get it with: pip install "manualprop[training]"'
        in (one_line(capsys))
    )
    script = (
        "import sys; from manualprop._command import main; assert main(['explain', '--layer', 'linear2']) == 0\n"
        "heavy = {'lightning', 'matplotlib', 'jsonargparse'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
