"""The benchmark of planned step times on CPU: its layouts, its errors and its check of the order."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.calibration import LAYOUTS, MODEL, launcher, plan_of, spearman, table, typed


def test_every_layout_is_legal_and_different_from_the_others() -> None:
    layouts = [plan_of(["hardware=cpu", *MODEL, *typed(sizes)]) for sizes in LAYOUTS.values()]
    settings = {(plan.layout, plan.run.parallelism.sequence_parallel) for plan in layouts}
    assert len(settings) == len(LAYOUTS) == 12
    assert {plan.layout.world_size for plan in layouts} == {1, 2, 4}
    assert len({plan.tokens for plan in layouts}) == 1


def test_errors_and_order_are_reported() -> None:
    """(planned, measured) seconds: c is planned faster than b, which is clearly faster; a and b are alike."""
    found = {"a": (1.1, 1.0), "b": (1.0, 1.1), "c": (0.9, 1.5), "d": (2.0, 2.0)}
    lines = table(found).splitlines()
    assert "| a | 1000 | 1100 | +10.0% |" in lines
    assert "| c | 1500 | 900 | -40.0% |" in lines
    assert lines[-4] == "Mean error 14.8%, the largest 40.0%. Spearman's rank correlation 0.20."
    assert lines[-3] == "The plan has 3 of 5 pairs in the right order (measured times more than 15% apart)."
    assert lines[-2:] == [
        "Planned in the other order: a is faster than c.",
        "Planned in the other order: b is faster than c.",
    ]


def test_rank_correlation() -> None:
    assert spearman((1.0, 2.0, 4.0), (10.0, 20.0, 30.0)) == 1
    assert spearman((1.0, 2.0, 4.0), (30.0, 20.0, 10.0)) == -1


def test_the_threads_of_the_caller_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single rank would train with one thread, and be planned with a thread on each core."""
    started: dict[str, Any] = {}

    def run(command: list[str], **more: Any) -> SimpleNamespace:
        started.update(command=command, **more)
        return SimpleNamespace(returncode=0)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("KEPT", "yes")
    monkeypatch.setattr(subprocess, "run", run)
    launcher("train", "a=b")
    assert started["command"] == [sys.executable, "-m", "launcher", "train", "a=b"]
    assert started["env"]["KEPT"] == "yes"
    assert "OMP_NUM_THREADS" not in started["env"]
