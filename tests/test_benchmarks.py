"""The harness of the benchmarks, on tiny settings; no test asserts a time."""

from pathlib import Path

import bench_blocks
import bench_head
import bench_layers
import bench_models
import benchmarking
import convnet_layers
import pytest
import torch

import manualprop
from manualprop import functions
from manualprop import nn as our_nn

TINY = bench_layers.Settings(rounds=2, seconds=1e-5, middle=(32, 64), big=(32, 64), compiled=False)


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    manualprop.kernels("eager")


@pytest.mark.parametrize("name", bench_layers.LAYERS)
def test_every_entry_runs_and_is_the_twin(name: str) -> None:
    ours, torchs, _ = bench_layers.pair(bench_layers.LAYERS[name], 32, 64)
    assert type(ours).__bases__[0] is type(torchs) and type(ours).__module__.startswith(our_nn.__name__)
    cells = bench_layers.measure(name, TINY)
    assert set(cells) == {"small", "middle", "big"}
    assert all(cell.ratio.median > 0 and min(cell.bytes) >= 0 for cell in cells.values())


def test_the_activations_are_those_of_the_package() -> None:
    kinds = {name: layer.targets for name, layer in bench_layers.activations().items()}
    rules = {
        name
        for name, rule in vars(functions).items()
        if isinstance(rule, type) and issubclass(rule, functions.Elementwise)
    }
    assert kinds.keys() == rules & vars(our_nn).keys() & vars(torch.nn).keys() and len(kinds) > 15
    assert kinds["ReLU"] == kinds["Threshold"] == bench_layers.PIECEWISE
    assert kinds["SiLU"] == kinds["Mish"] == bench_layers.SMOOTH
    assert kinds["GELU"].middle == 2.2 and kinds["Tanh"].big == 1.3


def test_every_twin_has_an_entry(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_layers.without_an_entry() == []
    monkeypatch.delitem(bench_layers.LAYERS, "Tanh")
    assert bench_layers.main(["--quick"]) == 1
    assert "without an entry in LAYERS: Tanh" in capsys.readouterr().err


def test_the_page_is_written_and_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "docs" / "benchmarks.md"
    benchmarking.write_section("other", "kept", page)
    monkeypatch.setattr(benchmarking, "PAGE", page)
    monkeypatch.setattr(benchmarking.write_section, "__defaults__", (page,))
    monkeypatch.setattr(bench_layers, "Settings", lambda *_: TINY)
    for _ in range(2):
        assert bench_layers.main(["--quick", "--only", "^(ReLU|Tanh)$", "--write"]) == 0
    text = page.read_text()
    assert text.count("| ReLU |") == 1 and "kept" in text and "| Tanh |" in text
    assert "python3 scripts/run.py bench layers --quick --only '^(ReLU|Tanh)$' --write" in text
    assert "1 thread (processor time)" in text and torch.__version__ in text


def test_a_regex_that_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_layers.main(["--only", "Tahn"]) == 2
    assert "finds no layer" in capsys.readouterr().out


def test_a_miss_is_marked() -> None:
    ratio = benchmarking.Ratio(1.4, 1.3, 1.5)
    assert bench_layers.Cell(ratio, (8, 8), 1.3).missed
    assert bench_layers.Cell(ratio, (9, 8), None).missed
    assert not bench_layers.Cell(ratio, (8, 8), 1.4).missed
    table = bench_layers.rows({"X": {"big": bench_layers.Cell(ratio, (3_000_000, 2_000_000), 1.3)}})
    assert table[0][3] == "1.40 (1.3) !" and table[0][7] == "3.0 / 2.0 !"


def test_a_layer_that_does_not_compile_is_named() -> None:
    assert bench_layers.Refused(ours=True, torchs=False).missed
    assert not bench_layers.Refused(ours=True, torchs=True).missed
    (row,) = bench_layers.rows({"X": {"compiled": bench_layers.Refused(ours=False, torchs=True)}})
    assert "torch's does not compile" in row

    def refuses(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no")

    assert not bench_layers._runs(refuses, (torch.ones(1),)) and bench_layers._runs(
        torch.tanh, (torch.ones(1),)
    )


def test_the_head_is_measured_and_its_misses_are_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "benchmarks.md"
    monkeypatch.setattr(benchmarking.write_section, "__defaults__", (page,))
    tiny = bench_head.Cell(64, 8, 500)
    monkeypatch.setattr(bench_head, "CELLS", [tiny])
    monkeypatch.setattr(bench_head, "peak_memory", lambda name, cell: 7.0 if name == "torch" else 1.0)
    assert bench_head.main(["--quick", "--write"]) == 0
    text = page.read_text()
    assert all(f"| 64 x 8 x 500 | {name} |" in text for name in bench_head.CANDIDATES)
    assert "| 1 | 0.14 |" in text and "bench head --quick --write" in text
    torchs = bench_head.Measured(100.0, 1.0, 600.0)
    ours = bench_head.Measured(130.0, 1.3, 100.0)
    (_, row) = bench_head.table_rows(bench_head.PROMISED, {"torch": torchs, "ours": ours})
    assert row[3] == "1.30 (1.25) !" and row[5] == "0.17 (0.17)"
    assert bench_head.measure_memory("ours", tiny) >= 0


def test_saved_bytes_count_a_storage_once() -> None:
    x = torch.ones(4, 4, requires_grad=True)
    assert benchmarking.saved_bytes(lambda: x.view(16) * x.t().reshape(16)) == 2 * 64
    assert benchmarking.saved_bytes(lambda: x * x) == 64
    assert benchmarking.saved_bytes(lambda: x + 1) == 0


@pytest.mark.parametrize("name", bench_blocks.BLOCKS)
def test_every_block_runs_and_keeps_no_more_than_torch(name: str) -> None:
    row = bench_blocks.measure(bench_blocks.BLOCKS[name], bench_blocks.Size(32, 64, 256), 2, 1e-5, False)
    ours, torchs, compiled = row.bytes
    assert row.eager.median > 0 and ours <= torchs and compiled is None


def test_the_misses_of_a_block_are_marked() -> None:
    ratio = benchmarking.Ratio(1.4, 1.3, 1.5)
    row = bench_blocks.Row(ratio, ratio, ratio, (60, 100, 50), (1.3, 1.5), True)
    assert row.misses == (True, False, True)
    assert bench_blocks.cells("X", row) == ["X", "1.40 (1.3) !", "1.40 (1.5)", "1.40", "0.1 !", "0.1", "0.1"]
    assert not any(row._replace(bytes=(50, 100, 50), targets=(1.4, None)).misses)
    text = bench_blocks.section(bench_blocks.SIZES[0], {"X": row}, "command")
    assert "| X | 1.40 (1.3) ! |" in text and "1 of 3 promises are kept." in text


def test_functions_take_turns_and_are_compared_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr(benchmarking, "timer", lambda: lambda: now[0])

    def takes(name: str, seconds: float) -> None:
        order.append(name)
        now[0] += seconds

    steps = [lambda: takes("a", 2.0), lambda: takes("b", 3.0), lambda: takes("c", 1.0)]
    first, ratios = benchmarking.interleaved(steps, 2, 0.1)
    assert first == 2.0 and [ratio.median for ratio in ratios] == [1.5, 0.5]
    assert order[-6:] == ["a", "b", "c", "c", "b", "a"]
    assert benchmarking.paired(steps[1], steps[0], 3, 0.1).median == 1.5


def test_the_models_are_measured_and_the_page_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "benchmarks.md"
    monkeypatch.setattr(benchmarking.write_section, "__defaults__", (page,))
    monkeypatch.setattr(bench_models, "has_transformers", lambda: False)
    monkeypatch.setattr(bench_models, "measure", lambda *_, **__: MODEL_ROW)
    monkeypatch.setattr(convnet_layers, "measure", lambda *_: LAYER_CELLS)
    assert bench_models.main(["--quick", "--write"]) == 0
    text, told = page.read_text(), capsys.readouterr()
    assert "| max pool 2 | 8 x 64 x 28 x 28 | 1.08 (1) ! |  |  | 0.8 / 2.4 |" in text
    assert "begin convnet layers, " in text and f"of {len(convnet_layers.LAYERS)} measurements" in text
    assert "| convnet |" in text and "| small MLP |" in text and "| BERT |" not in text
    assert "bench models --quick --write" in text and told.err.count("pip install") == 1
    assert bench_models.main(["--only", "Bort"]) == 2
    assert "finds no model and no layer. There are: GPT-2, BERT" in capsys.readouterr().out


RATIO = benchmarking.Ratio(1.08, 1.0, 1.2)
MODEL_ROW = bench_models.Row(
    12.5,
    {"swap": RATIO, "fuse": RATIO, "kernels": RATIO},
    {"torch": 2_000_000, "swap": 2_000_000, "fuse": 2_000_000, "kernels": 3_000_000},
    {"swap": 1.05, "fuse": 1.1},
    fused=True,
)
LAYER_CELLS = {"eager": bench_layers.Cell(RATIO, (800_000, 2_400_000), 1.0)}


def test_the_misses_of_a_model_are_marked() -> None:
    times, kept = ["1.08 (1.05) !", "1.08 (1.1)", "1.08"], ["2.00", "2.00 !", "3.00 !"]
    assert bench_models.cells("X", MODEL_ROW) == ["X", "12.5", *times, "2.00", *kept]
    assert MODEL_ROW.misses == [True, False, False, True, False, True]
    assert bench_models.cells("X", MODEL_ROW._replace(fused=False))[-2] == "2.00"  # it need not keep less
    assert "3 of 6 promises are kept." in bench_models.section({"X": MODEL_ROW}, "command")
    three_quarters = MODEL_ROW._replace(most_kept=0.75, kept=MODEL_ROW.kept | {"fuse": 1_500_000})
    assert bench_models.cells("X", three_quarters)[-2] == "1.50 (1.50)"
    assert bench_models.cells("X", three_quarters._replace(most_kept=0.7, fused=False))[-2] == "1.50 (1.40) !"


@pytest.mark.parametrize("name", ["small MLP", "convnet"])
def test_a_model_is_the_same_swapped_and_keeps_no_more(name: str) -> None:
    row = bench_models.measure(bench_models.MODELS[name], 1, 1e-5, compiler=False)
    assert row.milliseconds > 0 and set(row.times) == {"swap", "fuse"}
    assert row.fused and not any(map(row.large, row.times))
    model, inputs = bench_models.MODELS[name].make()
    assert manualprop.swap(model, fuse=True, check={**inputs}).check is not None


@pytest.mark.parametrize("name", convnet_layers.LAYERS)
def test_every_layer_of_a_convolutional_network_has_a_twin(name: str) -> None:
    layer = convnet_layers.LAYERS[name]
    torchs = layer.make()
    swapped = manualprop.swap(layer.make()).model
    assert type(swapped).__bases__[0] is type(torchs) and type(swapped).__module__.startswith(our_nn.__name__)
    assert swapped(torch.randn(layer.shape)).shape == torchs(torch.randn(layer.shape)).shape
    assert layer.eager <= 1.6


@pytest.mark.parametrize("name", ["max pool 2", "convolution 1 x 1"])
def test_a_layer_of_a_convolutional_network_is_measured(name: str) -> None:
    cells = convnet_layers.measure(convnet_layers.LAYERS[name], 1, 1e-5, compiler=False)
    assert set(cells) == {"eager", "half"} and all(cell.ratio.median > 0 for cell in cells.values())
    assert cells["eager"].bytes[0] <= cells["eager"].bytes[1]


@pytest.mark.slow
@pytest.mark.skipif(not bench_models.has_transformers(), reason="`scripts/run.py test --full` installs it")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", [name for name, m in bench_models.MODELS.items() if m.of_transformers])
def test_a_transformer_is_measured_and_keeps_less_fused(name: str) -> None:
    row = bench_models.measure(bench_models.MODELS[name], 1, 1e-5, compiler=False)
    assert row.fused and row.kept["fuse"] < row.kept["swap"] <= row.kept["torch"]
