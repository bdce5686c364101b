"""metrics.jsonl: streamed, valid JSON, and never the end of a run, whatever is in it or under it."""

import json
import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.runtime.metrics.rows import RowFile, drop_rows_from, last_step, rows_in

DAMAGED = [
    b"\xff\xfe{}",
    b"7",
    b"null",
    b'{"train/loss": 1.0}',
    b'{"step": "3"}',
    b'{"step": true}',
    b'{"step": -1}',
    b'{"step": 1e400}',
    b'{"step": 3, "train/lo',
    b"\0" * 100,
    b"[" * 100_000,
]


def row(step: int) -> dict[str, float | int]:
    return {"step": step, "train/loss": 1.5, "train/lr": 3e-05}


def line(step: int) -> bytes:
    return json.dumps(row(step)).encode() + b"\n"


def test_rows_of_repeated_steps_are_cut_off_in_place(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(line(step) for step in range(1, 9)))
    inode = path.stat().st_ino
    assert drop_rows_from(6, path) == []
    assert (path.stat().st_ino, [row["step"] for row in rows_in(path)]) == (inode, [1, 2, 3, 4, 5])


@pytest.mark.parametrize("damage", DAMAGED, ids=lambda damage: repr(damage[:20]))
def test_a_damaged_line_is_moved_to_a_file_beside(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + damage + b"\n" + line(2) + line(3) + damage)
    [note] = drop_rows_from(3, path)
    assert "2 lines of" in note
    assert path.read_bytes() == line(1) + line(2)
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == 2 * (damage + b"\n")
    assert last_step(path) == 2


def test_a_terabyte_that_was_never_written_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = b"".join(line(step) for step in range(1, 200))
    path.write_bytes(rows)
    os.truncate(path, 2**40)
    assert (len(list(rows_in(path))), last_step(path)) == (199, 199)
    notes = drop_rows_from(200, path)
    assert f"{path} ended in 1,100 GB that were never written" in notes[0]
    assert path.read_bytes() == rows


def test_a_file_with_a_hole_before_its_last_rows_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("wb") as file:
        file.write(line(1))
        file.seek(2**20)
        file.write(b"\n" + line(2))
    assert last_step(path) == 2


def test_the_readers_pass_over_a_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + b"\xff\n" + line(2) + b"{half")
    assert ([row["step"] for row in rows_in(path)], last_step(path)) == ([1, 2], 2)


def test_rows_out_of_order_are_kept_by_their_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(5) + line(1) + line(9) + line(2))
    assert drop_rows_from(5, path) == []
    assert path.read_bytes() == line(1) + line(2)


def test_a_last_row_without_a_line_break_is_kept_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + line(2).rstrip())
    assert drop_rows_from(3, path) == []
    assert RowFile(path).append(row(3)) == []
    assert [row["step"] for row in rows_in(path)] == [1, 2, 3]


def test_values_that_are_not_finite_are_null_in_the_file_and_nan_in_a_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    RowFile(path).append({"step": 1, "a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e300})
    assert path.read_text() == '{"step": 1, "a": null, "b": null, "c": null, "d": 1e+300}\n'
    [read] = rows_in(path)
    assert [math.isnan(value) for value in read.values()] == [False, True, True, True, False]


@contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_rows_wait_until_the_disk_has_room_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = RowFile(path)
    assert rows.append(row(1)) == []
    with disk_full_after(len(line(1)) + 10):
        [note] = rows.append(row(2))
        assert "cannot be written" in note
        assert rows.append(row(3)) == []  # said once
        assert path.read_bytes() == line(1)  # no part of a row
    [note] = rows.append(row(4))
    assert "is written again" in note
    assert path.read_bytes() == b"".join(line(step) for step in range(1, 5))
    assert rows.close() == []


def test_rows_that_are_lost_are_said_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    rows = RowFile(tmp_path / "metrics.jsonl")
    assert len([*rows.append(row(1)), *rows.append(row(2))]) == 1
    assert rows.close() == [f"{tmp_path / 'metrics.jsonl'} lacks the last 2 rows"]
