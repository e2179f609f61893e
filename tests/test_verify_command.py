"""``manualprop verify``."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from manualprop import _verify_command
from manualprop._command import main
from manualprop.verify import Outcome, Report
from manualprop.verify._discover import NotFound, discover
from manualprop.verify._formats import html

OPS = """
import torch
from manualprop.verify import Case

class Function(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

class Linear(Function):
    @staticmethod
    def forward(x, weight, bias):
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx, g):
        x, weight, bias = ctx.saved_tensors
        return g @ weight, g.T @ x, g.mean(0)

class Root(Function):
    @staticmethod
    def forward(x):
        if (x < 0).any():
            raise ValueError("x must not be negative")
        return x.sqrt()

    @staticmethod
    def backward(ctx, g):
        return g / (2 * ctx.saved_tensors[0].sqrt())

class Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table, index):
        ctx.save_for_backward(index)
        ctx.shape = table.shape
        return table[index]

    @staticmethod
    def backward(ctx, g):
        (index,) = ctx.saved_tensors
        return g.new_zeros(ctx.shape).index_add(0, index.reshape(-1), g.reshape(-1, g.shape[-1])), None

class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor: float):
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor, None

class Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, num_bits, clip_ratio):
        return (x.clamp(-1, 1) * 2 ** (num_bits - 1) * clip_ratio).round() / 2 ** (num_bits - 1)

    @staticmethod
    def backward(ctx, g):
        return g, None, None

class Picky(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        raise ValueError("never")

SCALES = {"three": Case(Scale.apply, (torch.randn(2, requires_grad=True), 3.0))}
"""

REFUSED = """
import torch
from manualprop.verify import Case

class Text(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return "text"

class Cuda(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        raise RuntimeError("needs a GPU")

CASES = [
    Case(torch.sin, (torch.ones(2),)),
    Case(Text.apply, (torch.ones(2, requires_grad=True),)),
    Case(Cuda.apply, (torch.ones(2, requires_grad=True),)),
    Case(torch.sin, (torch.ones(2, requires_grad=True),)),
]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the working directory, new for each test."""
    name = f"ops_{abs(hash(tmp_path)) % 10**8}"
    (tmp_path / f"{name}.py").write_text(OPS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return name


def test_discovers_cases_and_makes_up_inputs_for_the_rest(module: str) -> None:
    found = {f.target.partition(":")[2]: f for f in discover(module)}
    assert set(found) == {"SCALES.three", "Linear", "Root", "Pick", "Quantize", "Picky"}
    assert found["SCALES.three"].guessed == ""
    assert found["Linear"].guessed == "x float32[4, 5], weight float32[3, 5], bias float32[3]"
    assert found["Pick"].guessed.startswith("table float32[4, 5], index int64")
    assert found["Quantize"].guessed == "x float32[4, 5], num_bits 4, clip_ratio 2", (
        "numbers without annotation"
    )
    assert found["Picky"].case is None
    root = found["Root"].case
    assert root is not None
    assert (root.args[0] > 0).all()


def test_inputs_for_variable_arguments() -> None:
    (found,) = discover("manualprop.functions:Tanh")  # forward(x, *parameters)
    assert found.guessed == "x float32[4, 5]"


def test_of_a_file_and_of_one_name(module: str) -> None:
    (found,) = discover(f"{module}.py:SCALES.three")
    assert found.case is not None
    assert found.case.args[1] == 3.0
    assert discover(f"{module}:Scale")[0].target == f"{module}:SCALES.three", "by its case"


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("no_such_module", "there is no module 'no_such_module'"),
        ("{0}:Liner", "has no 'Liner'. There are: Linear, Root, Pick, Scale, Quantize, Picky, SCALES"),
        ("missing.py", "^there is no file missing.py"),
        ("json", "json holds no autograd.Function and no manualprop.verify.Case"),
    ],
)
def test_what_is_not_there_is_one_line(module: str, target: str, text: str) -> None:
    with pytest.raises(NotFound, match=text):
        discover(target.format(module))


def test_the_command(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--only",
        "first_order,forward_mode",
        "--junit",
        "out.xml",
        "--html",
        "out.html",
        "--json",
        "out.json",
    ]
    assert main(["verify", f"{module}:Linear", f"{module}:SCALES", *options]) == 2, "SCALES holds several"
    capsys.readouterr()
    assert main(["verify", f"{module}:Linear", f"{module}:SCALES.three", *options]) == 1
    out = capsys.readouterr().out
    assert "inputs made up: x float32[4, 5]" in out
    assert f"{module}:Linear: 1 finding; " in out and "probe  " not in out, "the findings, not the table"
    assert "mean for sum over a broadcast dimension" in out
    assert f"again:     manualprop verify {module}:Linear --seed 0 --only first_order" in out
    assert "2 verified, 1 with findings, 0 not verified" in out
    assert [r["passed"] for r in json.loads(Path("out.json").read_text())] == [False, True]
    assert len(ElementTree.parse("out.xml").getroot()) == 2
    assert "<svg" in Path("out.html").read_text()
    assert main(["verify", f"{module}:SCALES.three", "--only", "first_order"]) == 0
    assert main(["verify", f"{module}:Picky"]) == 1, "what cannot be verified does not pass in silence"
    assert "NOT VERIFIED" in capsys.readouterr().out


def test_what_cannot_be_verified_hides_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kit").mkdir()
    for name, text in {"__init__": "", "a_broken": "import no_such_package", "refused": REFUSED}.items():
        (tmp_path / "kit" / f"{name}.py").write_text(text)
    gone = '[tool.manualprop.verify.accept."kit.refused.Gone"]\nvmap = "why"\n'
    (tmp_path / "pyproject.toml").write_text(gone)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    files = ["--json", "out.json", "--junit", "out.xml", "--html", "out.html"]
    assert main(["verify", "kit", "--only", "first_order", *files]) == 1
    out = capsys.readouterr().out
    for line in (
        "kit.a_broken: NOT VERIFIED: kit.a_broken cannot be imported: No module named 'no_such_package'",
        "kit.refused:CASES.0: NOT VERIFIED: ",
        "no input requires a gradient",
        "kit.refused:CASES.1: NOT VERIFIED: Text must return a floating tensor",
        "FINDING  call: the plain call raises RuntimeError: needs a GPU",
        "again:     manualprop verify kit.refused:CASES.2 --seed 0\n",
        "kit.refused:CASES.3: no finding",
        "kit.refused.Gone: pyproject.toml accepts findings of it, and there is no such name",
        "2 verified, 1 with findings, 3 not verified",
    ):
        assert line in out
    assert [r["passed"] for r in json.loads(Path("out.json").read_text())] == [False, True]
    reasons = [s.get("message", "") for s in ElementTree.parse("out.xml").getroot().iter("skipped")]
    assert sum(text.startswith("not verified: ") for text in reasons) == 3
    assert (
        "Text must return a floating tensor" in Path("out.html").read_text().partition("<h2>Not verified")[2]
    )


def test_ctrl_c_keeps_what_is_done(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(found: Any, plan: Any) -> Iterator[tuple[Any, Report]]:
        yield found[0], Report("first", ())
        raise KeyboardInterrupt

    monkeypatch.setattr(_verify_command, "_all_verified", interrupted)
    assert main(["verify", f"{module}:SCALES.three", f"{module}:SCALES.three", "--json", "out.json"]) == 130
    assert "interrupted: 1 of 2 verified" in capsys.readouterr().out
    assert [r["name"] for r in json.loads(Path("out.json").read_text())] == ["first"]


def test_the_page_shows_findings_first() -> None:
    wrong = Report("ops.b_wrong", (Outcome("vmap", "finding", "off by <2>"),))
    page = html([Report("ops.a_right", (Outcome("vmap", "passed"),)), wrong])
    assert (
        page.index("b_<wbr>wrong</h3>") < page.index("<h2>Without findings") < page.index("a_<wbr>right</h3>")
    )
    assert '<a href="#r0">' in page and '<details id="r0" open>' in page and "off by &lt;2&gt;" in page


def test_every_row_with_v(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"{module}:SCALES.three", "-v", "--only", "first_order"]) == 0
    assert "first_order  ok        largest error" in capsys.readouterr().out


def test_several_at_a_time_give_the_same(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    targets = [f"{module}:{name}" for name in ("Linear", "Root", "Pick")]
    outs = []
    for jobs in ("1", "2"):
        assert main(["verify", *targets, "--only", "first_order,linearity", "--jobs", jobs]) == 1
        outs.append(re.sub(r"\(\d.*? s\)", "", capsys.readouterr().out))
    assert outs[0] == outs[1] and "3 verified, 1 with findings" in outs[0]


def test_a_library_may_start_with_findings(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    known = ["--only", "first_order", "--baseline", "known.json"]
    assert main(["verify", f"{module}:Linear", *known]) == 2
    assert "there is no baseline known.json: --update-baseline writes it" in capsys.readouterr().err
    assert main(["verify", f"{module}:Linear", *known, "--update-baseline"]) == 0
    assert "known.json: 1 known finding" in capsys.readouterr().out
    assert main(["verify", f"{module}:Linear", f"{module}:Root", *known]) == 0
    assert "accepted first_order: known: it stands in the baseline" in capsys.readouterr().out
    path = Path("known.json")
    path.write_text(path.read_text().replace(f"{module}.Linear", f"{module}.Root"))
    assert main(["verify", f"{module}:Linear", f"{module}:Root", *known]) == 1
    out = capsys.readouterr().out
    assert "2 verified, 2 with findings" in out, "one is new, and one is gone"
    assert "known in the baseline, but it passes: --update-baseline takes it out" in out
    path.write_text("[]")
    assert main(["verify", f"{module}:Linear", *known]) == 2
    assert "known.json is not a baseline" in capsys.readouterr().err


def test_what_is_accepted_stands_in_pyproject_or_in_the_command(
    module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    linear = ["verify", f"{module}:Linear", "--only", "first_order"]
    assert main([*linear, "--accept", "first_order=means are meant"]) == 0
    assert "accepted first_order: means are meant (wrong for bias" in capsys.readouterr().out
    table = f'[tool.manualprop.verify.accept."{module}.Linear"]\n'
    Path("pyproject.toml").write_text(f'{table}first_order = "means are meant"\n')
    assert main(linear) == 0
    assert main(["verify", f"{module}:Root", "--only", "first_order"]) == 0, "it speaks of another"
    Path("pyproject.toml").write_text(f'{table}first_order = ""\n')
    assert main(linear) == 2
    assert "must give a reason for each probe" in capsys.readouterr().err
    Path("pyproject.toml").write_text(f'{table}frist_order = "means are meant"\n')
    assert main(linear) == 2
    assert (
        ".Linear' must name probes. Got 'frist_order'. Did you mean 'first_order'" in capsys.readouterr().err
    )
    Path("pyproject.toml").write_text("[tool.manualprop.verify]\naccpet = {}\n")
    assert main(linear) == 2
    assert "has accept, baseline and level. Got accpet." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["{0}:Scale", "--accept", "vmap"], "--accept takes PROBE=REASON"),
        (["{0}:Scale", "--accept", "vmpa=no"], "Did you mean 'vmap'"),
        (["{0}", "--accept", "vmap=no"], "--accept speaks of one target. There are 6"),
        (["{0}:Scale", "--jobs", "0"], "--jobs must be at least 1"),
        (["{0}:Scale", "--update-baseline"], "name the file by --baseline FILE"),
        ([], "name what to verify"),
        (["{0}:Scale", "--only", "frist_order"], "Did you mean 'first_order'"),
        (["{0}:Scale", "--json", "no/such/folder/x.json"], "there is no folder no/such/folder"),
        (["{0}:Scale", "--sed", "3"], "unrecognized arguments: --sed"),
        (["no_such_module"], "there is no module 'no_such_module'"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    module: str, options: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", *(o.format(module) for o in options)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("manualprop: verify: ")
    assert text in err
    assert err.count("\n") == 1


def test_json_to_standard_output_is_nothing_but_json(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"{module}:SCALES.three", "--only", "first_order", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["passed"]


def test_the_list(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", f"{module}:Root", "--list"]) == 0
    out = capsys.readouterr().out
    assert f"{module}:Root  x float32[4, 5]" in out
    assert "first_order             quick  backward against numerical differentiation." in out
