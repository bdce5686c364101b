"""Recording and reading how ranks ended."""

from pathlib import Path

import pytest

from launcher.config.secrets import note_variables
from launcher.launch.records import (
    ENDS_VARIABLE,
    RankEnd,
    RankEndKind,
    all_recorded,
    error_summary,
    read_rank_ends,
    record_end,
)


def test_causes_are_sorted_before_consequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDS_VARIABLE, str(tmp_path))
    record_end(0, RankEndKind.lost, ConnectionError("closed"))
    record_end(1, RankEndKind.stopped)
    record_end(3, RankEndKind.failed, RuntimeError("disk on fire\nand more"))
    record_end(2, RankEndKind.failed, ValueError(""))
    assert read_rank_ends(tmp_path) == [
        RankEnd(2, RankEndKind.failed, "ValueError:"),
        RankEnd(3, RankEndKind.failed, "RuntimeError: disk on fire"),
        RankEnd(0, RankEndKind.lost, "ConnectionError: closed"),
        RankEnd(1, RankEndKind.stopped),
    ]


def test_a_record_holds_no_value_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDS_VARIABLE, str(tmp_path))
    monkeypatch.setenv("LAUNCHER_TEST_VALUE", "hunter2")
    note_variables(["LAUNCHER_TEST_VALUE"])
    record_end(0, RankEndKind.failed, OSError("no hunter2"))
    [end] = read_rank_ends(tmp_path)
    assert end.error == "OSError: no ${oc.env:LAUNCHER_TEST_VALUE}"


def test_records_nothing_outside_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENDS_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    record_end(0, RankEndKind.failed, "x")
    assert list(tmp_path.iterdir()) == []


def test_recording_to_a_missing_directory_does_not_raise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENDS_VARIABLE, str(tmp_path / "gone"))
    record_end(0, RankEndKind.failed, "x")
    assert read_rank_ends(tmp_path / "gone") == []


def test_ignores_a_partly_written_record(tmp_path: Path) -> None:
    (tmp_path / "rank_0.json").write_text('{"rank": 0, "ki')
    assert read_rank_ends(tmp_path) == []


def test_summary_of_the_same_failure_is_equal() -> None:
    error, again = (RuntimeError(f"tensor at 0x{address:x} is gone") for address in (0x7F01, 0x7F02))
    assert error_summary(error) == error_summary(again) == "RuntimeError: tensor at ... is gone"
    for address in ("[127.0.0.1]:38211", "10.0.3.7:29500", "127.0.0.1", "[fe80::1%eth0]:4", "[::1]:29500"):
        message = "[gloo/pair.cc:553] Connection closed by peer {}, after 30.5 s in step 3:4"
        assert error_summary(message.format(address)) == message.format("...")


def test_first_record_of_a_rank_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDS_VARIABLE, str(tmp_path))
    record_end(1, RankEndKind.failed, "disk on fire")
    record_end(1, RankEndKind.failed, "rank 1 of 2 failed")
    assert read_rank_ends(tmp_path) == [RankEnd(1, RankEndKind.failed, "disk on fire")]


def test_all_recorded_needs_a_complete_record_of_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENDS_VARIABLE, str(tmp_path))
    record_end(1, RankEndKind.stopped)
    assert all_recorded([1])
    assert not all_recorded([0, 1])
    (tmp_path / "rank_0.json").touch()  # as on a full disk
    assert not all_recorded([0, 1])
    monkeypatch.delenv(ENDS_VARIABLE)
    assert not all_recorded([1])
