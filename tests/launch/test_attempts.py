"""When a run that failed is given up."""

from pathlib import Path

from launcher.launch.attempts import ATTEMPTS, Attempt, alike, note_attempt


def test_only_failures_alike_in_a_row_count(tmp_path: Path) -> None:
    fire, flood, later = Attempt(3, "fire"), Attempt(3, "flood"), Attempt(4, "fire")
    noted = [note_attempt(tmp_path / "r", one) for one in (fire, fire, flood, fire, fire, later, fire)]
    assert noted == [1, 2, 1, 1, 2, 1, 1]


def test_what_a_dying_node_left_half_written_is_passed_over(tmp_path: Path) -> None:
    note_attempt(tmp_path, Attempt(3, "fire"))
    with (tmp_path / ATTEMPTS).open("a") as file:
        file.write('{"step": 3, "err\n')
    assert note_attempt(tmp_path, Attempt(3, "fire")) == 2


def test_none_are_alike_in_an_empty_list() -> None:
    assert alike([]) == 0
