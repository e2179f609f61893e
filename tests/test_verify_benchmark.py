"""The benchmark of the checker; no test asserts a time."""

import bench_verify
import pytest


def test_a_broken_promise_is_marked() -> None:
    slow = bench_verify.Measured(2.0, [0.5, 1.2, 1.3])
    text = bench_verify.section(
        {"quick": slow, "full": slow}, [(2.0, 5.0), (2.0, 7.0), (1.0, 4.0)], "command"
    )
    assert "| quick | 3 | 2.00 | 1.20 ! |" in text and "| full | 3 | 2.00 | 1.20 |" in text
    assert "3.5 times ! (median of 3 pairs, 2.5 to 4.0; promised: 3)" in text


def test_a_few_rows_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench_verify.rows()
    monkeypatch.setattr(bench_verify, "rows", lambda: rows[:2])
    monkeypatch.setattr(bench_verify, "first", lambda level: 1.0)
    assert bench_verify.main(["--quick"]) == 0
    assert "| quick | 1 |" in capsys.readouterr().out
