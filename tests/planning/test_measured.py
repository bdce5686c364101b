"""Predicted memory is within 5% of real runs, with context ranks 3%, and predicted traffic is exact."""

from pathlib import Path
from unittest.mock import patch

import pytest

from launcher.planning.cost import zero_states as zero
from launcher.planning.cost.geometry import pipeline_ranks
from launcher.planning.cost.memory import rank_memories
from tests.planning.long_sequences import MODEL
from tests.planning.measured import CASES, SOME, Measured, axes, measure, planned, table

DOCS = Path(__file__).parents[2] / "docs" / "planning.md"
WITHIN, WITH_CONTEXT = 0.05, 0.03


def check(case: str) -> list[Measured]:
    memory, collectives = measure(case)
    bound = WITH_CONTEXT if "context" in case else WITHIN
    assert [one for one in memory if abs(one.error) > bound] == []
    assert collectives or "single" in case
    assert {one: both for one, both in collectives.items() if both[0] != both[1]} == {}
    return memory


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] * (case in ("ZeRO-3, data 2", "context 4, Llama")))
        for case in SOME
    ],
)
def test_memory_and_traffic_agree_with_a_real_run(case: str) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in SOME])
def test_memory_and_traffic_agree_with_every_real_run(case: str) -> None:
    check(case)


@pytest.mark.slow
def test_memory_of_a_long_sequence_shrinks_by_the_context_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {}
    for ranks in (1, 2, 4):
        overrides = [*axes(context=ranks), *MODEL, "model.max_sequence_length=16384"]
        case = f"context {ranks}, 16,384 tokens" if ranks > 1 else "single, 16,384 tokens"
        monkeypatch.setitem(CASES, case, overrides)
        [memory] = check(case)
        assert abs(memory.error) <= WITH_CONTEXT
        peaks[ranks] = memory.measured
    for ranks in (2, 4):
        assert peaks[1] / peaks[ranks] == pytest.approx(ranks, rel=0.1), peaks


def test_the_documentation_lists_every_case_within_bounds() -> None:
    """The numbers in the documentation come from one machine; other tests measure the bounds."""
    text = DOCS.read_text()
    assert len(CASES) >= 24
    for case in CASES:
        assert f"| {case} | 0 |" in text
    assert table([Measured("single", 0, 1, 1)]).splitlines()[0] in text


def test_a_wrong_formula_of_memory_is_out_of_bounds() -> None:
    """A missing byte per fp32 gradient and state would exceed the bound."""
    run, layout = planned(*CASES["ZeRO-1, data 2"])
    [rank] = pipeline_ranks(run, layout)
    right = rank_memories(run, layout, [rank])[0].allocated
    with patch.object(zero, "FP32", 3):
        wrong = rank_memories(run, layout, [rank])[0].allocated
    assert abs(wrong / right - 1) > WITHIN
