"""The fitted time model on the table it was fitted on, and the figures in docs/planning.md."""

from pathlib import Path

import pytest

from benchmarks.narayanan import TABLE_1, as_megatron_2021, errors, mean_error, plan_of, table
from launcher.planning.cost.rates import Shares

DOCS = Path(__file__).parents[2] / "docs" / "planning.md"


def test_throughput_is_within_four_percent_of_the_table_on_average() -> None:
    with as_megatron_2021():
        found = errors(Shares())
    assert len(found) == 10
    assert mean_error(found) < 0.04
    assert max(map(abs, found)) < 0.10


@pytest.mark.parametrize("row", TABLE_1, ids=lambda row: str(row.billions))
def test_parameters_equal_the_published_numbers(row: object) -> None:
    """To three digits, or as many as were published."""
    counted = plan_of(row, Shares()).parameters / 1e9  # type: ignore[arg-type]
    assert round(counted, 1) == row.billions  # type: ignore[attr-defined]


def test_a_wrong_share_gives_a_larger_error_than_the_fitted_share() -> None:
    with as_megatron_2021():
        fitted = mean_error(errors(Shares()))
        for wrong in (Shares(product=0.7), Shares(memory=0.4), Shares(link=0.3)):
            assert mean_error(errors(wrong)) > fitted + 0.02


def test_an_earlier_plan_changes_no_row() -> None:
    """Plans remember the times of parts, which the patches of 2021 change."""
    row = TABLE_1[-1]
    with as_megatron_2021():
        first = plan_of(row, Shares()).time
    ours = plan_of(row, Shares()).time
    with as_megatron_2021():
        again = plan_of(row, Shares()).time
    assert first is not None
    assert first == again != ours


def test_the_documentation_shows_the_table() -> None:
    with as_megatron_2021():
        assert table(Shares()) in DOCS.read_text()
