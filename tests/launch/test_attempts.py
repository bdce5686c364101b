"""Counting identical failures of a run."""

from pathlib import Path

from launcher.launch.attempts import ATTEMPTS_FILE, FailedStart, count_identical_at_end, record_failed_start


def test_counts_identical_failures_in_a_row(tmp_path: Path) -> None:
    fire, flood, later = FailedStart(3, "fire"), FailedStart(3, "flood"), FailedStart(4, "fire")
    counts = [
        record_failed_start(tmp_path / "r", failed) for failed in (fire, fire, flood, fire, fire, later, fire)
    ]
    assert counts == [1, 2, 1, 1, 2, 1, 1]


def test_ignores_a_line_cut_short_by_a_dying_node(tmp_path: Path) -> None:
    record_failed_start(tmp_path, FailedStart(3, "fire"))
    with (tmp_path / ATTEMPTS_FILE).open("a") as file:
        file.write('{"step": 3, "err\n')
    assert record_failed_start(tmp_path, FailedStart(3, "fire")) == 2


def test_counts_zero_in_an_empty_list() -> None:
    assert count_identical_at_end([]) == 0
