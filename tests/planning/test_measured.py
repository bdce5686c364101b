"""Predicted memory within 5% of real runs, and predicted traffic exactly what they send."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from launcher.planning.cost import zero_states as zero
from launcher.planning.cost.geometry import pipeline_ranks
from launcher.planning.cost.memory import rank_memory
from launcher.tracing.allocations import Allocations
from tests.planning.measured import CASES, SOME, Measured, measure, planned, table

DOCS = Path(__file__).parents[2] / "docs" / "planning.md"
WITHIN = 0.05


def check(case: str) -> list[Measured]:
    memory, collectives = measure(case)
    assert [one for one in memory if abs(one.error) > WITHIN] == []
    assert collectives or case.startswith("single")
    assert {one: both for one, both in collectives.items() if both[0] != both[1]} == {}
    return memory


@pytest.mark.parametrize("case", SOME)
def test_memory_and_traffic_are_those_of_a_real_run(case: str) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case not in SOME])
def test_memory_and_traffic_are_those_of_every_real_run(case: str) -> None:
    check(case)


def test_the_documentation_lists_every_case_within_bounds() -> None:
    """Its numbers are a machine's; that they are within bounds is measured above."""
    text = DOCS.read_text()
    assert len(CASES) >= 24
    for case in CASES:
        assert f"| {case} | 0 |" in text
    assert table([Measured("single", 0, 1, 1)]).splitlines()[0] in text


def test_a_wrong_account_is_out_of_bounds() -> None:
    """Were a byte of each fp32 gradient and state forgotten, the bound would tell."""
    run, layout = planned(*CASES["ZeRO-1, data 2"])
    [rank] = pipeline_ranks(run, layout)
    right = rank_memory(run, layout, rank).allocated
    with patch.object(zero, "FP32", 3):
        wrong = rank_memory(run, layout, rank).allocated
    assert abs(wrong / right - 1) > WITHIN


class TestAllocations:
    def test_counts_a_storage_once_and_until_it_is_gone(self) -> None:
        with Allocations() as allocations:
            whole = torch.zeros(1000)
            view = whole.view(10, 100)
            assert allocations.live == 4000
            del whole
            assert allocations.live == 4000
            del view
            assert (allocations.live, allocations.peak) == (0, 4000)

    def test_counts_what_the_backward_pass_makes(self) -> None:
        with Allocations() as allocations:
            x = torch.ones(1000, requires_grad=True)
            y = (x * x).sum()
            before = allocations.live
            y.backward()
            assert allocations.live == before + 4000  # the gradient
            allocations.restart()
            assert allocations.peak == allocations.live

    def test_takes_in_what_was_there(self) -> None:
        old = torch.zeros(500)
        with Allocations() as allocations:
            allocations.count(old)
            assert allocations.live == 2000
            old = torch.zeros(1)
            assert allocations.live == 4
        del old
