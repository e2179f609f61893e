"""The checker says the same with other seeds, in another order of its probes, and on a machine that is busy."""

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest
from planted import CONTROLS, DEFECTS, Control, Defect
from test_verify_defects import checked

from manualprop.verify._check import chosen

SEEDS = range(1, 11)
PROBES = [p.name for p in chosen("quick")]
QUICK = [d for d in DEFECTS if d.probes[0] in PROBES and "time_limit" not in d.options]
SAMPLE = 15  # each so-manieth row, where all would take an hour


def ids(row: Defect | Control) -> str:
    return row.name


def shuffled(seed: int) -> list[str]:
    probes = list(PROBES)
    random.Random(seed).shuffle(probes)
    return probes


def found(row: Defect | Control, **options) -> set[str]:
    return {o.probe for o in checked(row, **options).findings}


@pytest.mark.parametrize("defect", QUICK[::60], ids=ids)
def test_the_order_of_the_probes_changes_nothing(defect: Defect) -> None:
    assert found(defect, only=shuffled(1), level="quick") == found(defect, level="quick")


@pytest.mark.slow
@pytest.mark.parametrize("defect", QUICK, ids=ids)
def test_a_defect_is_found_with_any_seed(defect: Defect) -> None:
    right = defect.probes[0]
    assert [seed for seed in SEEDS if right not in found(defect, only=right, seed=seed)] == []


@pytest.mark.slow
@pytest.mark.parametrize("control", CONTROLS, ids=ids)
def test_a_control_passes_with_any_seed(control: Control) -> None:
    assert {seed: f for seed in SEEDS if (f := found(control, only=control.tempts, seed=seed))} == {}


@pytest.mark.slow
@pytest.mark.parametrize("row", [*QUICK[::SAMPLE], *CONTROLS[::SAMPLE]], ids=ids)
def test_ten_orders_of_the_probes_find_the_same(row: Defect | Control) -> None:
    usual = found(row, level="quick")
    assert {seed: f for seed in SEEDS if (f := found(row, only=shuffled(seed), level="quick")) != usual} == {}


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Twice as many processes as processors, each of which computes."""
    code = "while True: sum(range(10000))"
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2 * (os.cpu_count() or 1))]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("row", [*QUICK[::SAMPLE], *CONTROLS[::SAMPLE]], ids=ids)
def test_a_busy_machine_sees_the_same(row: Defect | Control) -> None:
    def said() -> list[tuple[str, str, str]]:
        return [(o.probe, o.verdict, o.evidence) for o in checked(row, level="quick")]

    with busy():
        under_load = said()
    assert under_load == said()
