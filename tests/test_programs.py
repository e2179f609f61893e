"""Compiled programs: right, kept on disk, listed and deleted by the command."""

import copy
import functools
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from backprop_rows import CLASSES, FEATURES, ROWS, Row, distance, examples, head, mlp, twins
from test_epoch import T16, X16, agree, order, pair
from torch import Tensor

from manualprop import Backprop, _command, descent, nn
from manualprop._backprop import _graph, _programs

# ----- the packages on disk -----


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(_programs.FOLDER, str(tmp_path / "programs"))
    yield tmp_path / "programs"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A compiler that packs only a text, and a loader."""
    made: list[str] = []

    def compiled(graph: torch.fx.GraphModule, inputs: Sequence[Tensor], package: Path) -> Path:
        made.append(package.name)
        with zipfile.ZipFile(package, "w") as packed:
            packed.writestr("program", "a program")
        return package

    def load(package: Path) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        return lambda inputs: [inputs[0] + 1]

    monkeypatch.setattr(_programs, "compiled_ahead", compiled)
    monkeypatch.setattr(_programs, "load_program", load)
    monkeypatch.setattr(_programs, "has_compiler", lambda: True)
    return made


def graph_of(function: Callable[..., Any], *inputs: Tensor) -> torch.fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(function)(*inputs)


X = torch.ones(3)


def test_a_program_is_compiled_once(store: Path, compilations: list[str]) -> None:
    graph = graph_of(lambda x: x + 1, X)
    assert not _programs.is_kept(graph)
    for _ in range(2):
        (found,) = _programs.compiled_program(graph, [X])([X])
        assert torch.equal(found, X + 1)
    assert len(compilations) == 1 and _programs.is_kept(graph) and len(_programs.packages()) == 1
    assert _programs.clear() == 1 and _programs.packages() == [] and not list(store.iterdir())


def test_whatever_changes_gives_another_program(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    graphs = [
        graph_of(lambda x: x + 1, X),
        graph_of(lambda x: x + 2, X),
        graph_of(lambda x: x - 1, X),
        graph_of(lambda x: x + 1, torch.ones(4)),
        graph_of(lambda x: x + 1, X.double()),
        graph_of(lambda x: (x + 1, x), X),
        graph_of(lambda x: x + 1, torch.ones(2, 3).t()),
        graph_of(lambda x: x + 1, torch.ones(3, 2)),
    ]
    paths = {_programs._path(graph) for graph in graphs}
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    paths.add(_programs._path(graphs[0]))
    monkeypatch.undo()
    monkeypatch.setattr(_programs, "_machine", lambda: ("another processor",))
    paths.add(_programs._path(graphs[0]))
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    paths.add(_programs._path(graphs[0]))
    assert len(paths) == len(graphs) + 3


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:50], lambda whole: whole.replace(b"a pro", b"a prO")]
)
def test_a_damaged_package_is_compiled_again(
    damage: Callable[[bytes], bytes], store: Path, compilations: list[str]
) -> None:
    graph = graph_of(lambda x: x + 1, X)
    _programs.compiled_program(graph, [X])
    (package,) = _programs.packages()
    whole = package.read_bytes()
    package.write_bytes(damage(whole))
    _programs.compiled_program(graph, [X])
    _programs.compiled_program(graph, [X])
    assert len(compilations) == 2 and zipfile.ZipFile(package).read("program") == b"a program"


def test_a_package_that_cannot_be_loaded_now_is_replaced(
    store: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be sound: it is not deleted first."""
    graph = graph_of(lambda x: x + 1, X)
    _programs.compiled_program(graph, [X])
    (package,) = _programs.packages()
    load, calls = _programs.load_program, []

    def refuses_once(path: Path) -> _programs.Program:
        calls.append(package.exists())
        if len(calls) == 1:
            raise RuntimeError("no space left")
        return load(path)

    monkeypatch.setattr(_programs, "load_program", refuses_once)
    _programs.compiled_program(graph, [X])
    assert calls == [True, True] and len(compilations) == 2 and _programs.packages() == [package]


def test_without_a_folder_for_temporary_files(
    store: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = graph_of(lambda x: x + 1, X)
    _programs.compiled_program(graph, [X])
    monkeypatch.setenv("TMPDIR", str(store / "missing"))
    with pytest.raises(
        RuntimeError, match=r"unpacked in the folder for temporary files.* Got TMPDIR=.*missing; name"
    ):
        _programs.compiled_program(graph, [X])
    assert len(_programs.packages()) == len(compilations) == 1


def test_a_folder_of_another_user(
    store: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = graph_of(lambda x: x + 1, X)
    _programs.compiled_program(graph, [X])

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "utime", denied)
    monkeypatch.setattr(Path, "unlink", denied)
    _programs.compiled_program(graph, [X])
    assert len(compilations) == 1
    assert _command.main(["programs", "--clear"]) == 1
    _programs.packages()[0].write_text("half a pro")
    assert _programs._load(_programs.packages()[0]) is None


def test_what_a_killed_process_left_goes(store: Path, compilations: list[str]) -> None:
    store.mkdir()
    old, new = store / ".old.part", store / ".new.part"
    for path in (old, new):
        path.write_text("half a pro")
    os.utime(old, (0, 0))
    _programs.compiled_program(graph_of(lambda x: x + 1, X), [X])
    assert not old.exists() and new.exists() and len(_programs.packages()) == 1, "another may be writing"
    assert _programs.clear() == 1 and not list(store.iterdir())


def test_the_folder_is_bounded(store: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_programs, "MOST", 2)
    graphs = [graph_of(functools.partial(torch.add, other=k), X) for k in range(3)]
    for k, graph in enumerate(graphs[:2]):
        _programs.compiled_program(graph, [X])
        os.utime(_programs._path(graph), (k, k))
    _programs.compiled_program(graphs[0], [X])  # used again, so the other one goes
    _programs.compiled_program(graphs[2], [X])
    assert [_programs.is_kept(graph) for graph in graphs] == [True, False, True]


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(_programs.FOLDER, str(tmp_path / "file" / "programs"))
    with pytest.warns(UserWarning, match=r"could not be kept in .*file.*MANUALPROP_PROGRAMS names another"):
        (found,) = _programs.compiled_program(graph_of(lambda x: x + 1, X), [X])([X])
    assert torch.equal(found, X + 1)


def test_a_full_disk(store: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="could not be kept in .*: No space left on device"):
        _programs.compiled_program(graph_of(lambda x: x + 1, X), [X])
    assert not list(store.iterdir())


def test_the_folder_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_programs.FOLDER, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert _programs.folder() == Path("/cache/manualprop/programs")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert _programs.folder() == Path.home() / ".cache" / "manualprop" / "programs"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in (_programs.FOLDER, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert _command.main(["programs"]) == 1
    assert (
        "Got no home; name a folder in the environment variable MANUALPROP_PROGRAMS"
        in capsys.readouterr().err
    )


def test_without_a_compiler(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    step, _ = pair(ROWS[0])
    before = copy.deepcopy(step.model.state_dict())
    with pytest.raises(RuntimeError, match=r"must be on the PATH. Got none; install g\+\+"):
        step.epoch(*examples(ROWS[0]), order(16, 4))
    torch.testing.assert_close(step.model.state_dict(), before, rtol=0, atol=0)


def test_a_compiler_that_fails(store: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Path:
        raise ValueError("No working C++ compiler found\nin many lines")

    monkeypatch.setattr(_programs, "compiled_ahead", fails)
    with pytest.raises(
        RuntimeError, match=r"It failed: No working C\+\+ compiler found\. Name another in the"
    ):
        pair(ROWS[0])[0].epoch(X16, T16, order(16, 4))


# ----- compiled -----

COMPILED = [
    Row("one-row", descent={"momentum": 0.9, "weight_decay": 0.01}, rows=4),
    Row("rows", lambda: mlp(nn.GELU()), descent={"momentum": 0.9, "nesterov": True}, rows=32),
    Row("norms", lambda: [nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.LayerNorm(8), *head()], rows=32),
    Row(
        "residual", lambda: [nn.Residual(nn.Linear(FEATURES, FEATURES), nn.SiLU()), *mlp(nn.PReLU())], rows=32
    ),
    Row("loss", loss=nn.MSELoss, descent={"weight_decay": 0.1}, rows=32),
]


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=[pytest.mark.slow] * (row.name != "one-row")) for row in COMPILED],
    ids=str,
)
def test_compiled(row: Row, store: Path, capfd: pytest.CaptureFixture[str]) -> None:
    x, t = examples(row)
    steps = pair(row)
    updates = order(len(x), max(1, len(x) // 8)) * 2
    ours, other = (step.epoch(x, t, updates) for step in steps)
    agree(*steps)
    torch.testing.assert_close(ours, other)
    assert steps[0].has_program(x[: len(updates[0][0])], t[: len(updates[0][0])])
    again, _ = pair(row)
    again.epoch(x, t, updates[:1])  # one update alone, from disk
    torch.testing.assert_close(again.epoch(x, t, updates[1:]).losses, ours.losses[1:], rtol=0, atol=0)
    capfd.readouterr()  # a CUDA build of torch without a GPU says so when it compiles
    if not t.is_floating_point():  # refused without a trace of the program's C++ code
        with pytest.raises(IndexError, match=f"Target {CLASSES} is out of bounds"):
            again.epoch(x, t + 1, updates)
        assert capfd.readouterr().err == ""


def test_the_layout_of_the_examples(store: Path, compilations: list[str]) -> None:
    row = Row("", lambda: [nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, CLASSES)])
    x = torch.randn(16, 2, 4, 4).double()
    paths = set()
    for images in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3)):
        step = pair(row)[0]
        assert step._epochs.scanned is not None
        form = _graph.form_of(step.optimizer.param_groups)
        scan = step._epochs.scanned._scan(images[:4], T16[:4], form)
        assert all(i.is_contiguous() for i in scan.inputs), "a program runs on contiguous examples"
        paths.add(_programs._path(scan.step))
    assert len(paths) == 1


@pytest.mark.slow
def test_micro_kernels(store: Path) -> None:
    row = Row(
        "",
        lambda: [
            *(nn.Linear(FEATURES, 40), nn.Tanh(), nn.Residual(nn.Linear(40, 40), nn.GELU())),
            *(nn.BatchNorm1d(40), nn.Linear(40, CLASSES)),
        ],
        rows=240,
    )
    x, t = examples(row, torch.float32)
    plan = descent.MiniBatch(learning_rate=0.05, momentum=0.9)
    ours, by_steps = (
        Backprop(twins(row, torch.float32)[0], row.loss(), plan, compile=how) for how in ("epoch", False)
    )
    torch.testing.assert_close(ours.epoch(x, t, order(240, 30)), by_steps.epoch(x, t, order(240, 30)))
    assert distance(ours.model, by_steps.model) <= 1e-5
    assert any(b"micro_gemm" in package.read_bytes() for package in _programs.packages())


TWO = """
import torch
from manualprop import Backprop, descent, nn
torch.manual_seed(0)
x, t = torch.randn(8, 3), torch.randint(2, (8,))
step = Backprop(nn.Linear(3, 2), nn.CrossEntropyLoss(), descent.Stochastic(learning_rate=0.1), compile="epoch")
print(step.epoch(x, t, descent.Stochastic(learning_rate=0.1).updates(8)).losses.tolist())
"""


@pytest.mark.slow
def test_two_processes_at_once(store: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", TWO]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert said[0] == said[1] and said[0] and all(process.returncode == 0 for process in both)
    assert len(list(store.iterdir())) == 1
    assert subprocess.run(command, capture_output=True, text=True, env=environment).stdout == said[0]


# ----- the command -----


def test_the_command_lists_and_clears(
    store: Path, compilations: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for k in range(2):
        _programs.compiled_program(graph_of(functools.partial(torch.add, other=k), X), [X])
    assert _command.main(["programs"]) == 0
    *each, total = capsys.readouterr().out.splitlines()
    assert len(each) == 2 and all("MB  last used 20" in line for line in each)
    assert total == f"2 programs, 0.0 MB in {store}"
    assert _command.main(["programs", "--clear"]) == 0
    assert capsys.readouterr().out == f"2 programs deleted from {store}\n"
    _programs.compiled_program(graph_of(lambda x: x + 1, X), [X])
    assert _command.main(["programs", "--clear"]) == 0
    assert capsys.readouterr().out == f"1 program deleted from {store}\n"
    assert _command.main(["programs"]) == 0 and _command.main(["programs", "--all"]) == 2
    assert "unrecognized arguments: --all" in capsys.readouterr().err
