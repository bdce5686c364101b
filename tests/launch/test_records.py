"""What ranks leave about their ends."""

from pathlib import Path

import pytest

from launcher.launch.records import ENDS, Kind, RankEnd, ends_in, has_recorded, one_line, record_end


def test_a_cause_stands_before_its_consequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDS, str(tmp_path))
    record_end(0, Kind.lost, ConnectionError("closed"))
    record_end(1, Kind.stopped)
    record_end(3, Kind.failed, RuntimeError("disk on fire\nand more"))
    record_end(2, Kind.failed, ValueError(""))
    assert ends_in(tmp_path) == [
        RankEnd(2, Kind.failed, "ValueError:"),
        RankEnd(3, Kind.failed, "RuntimeError: disk on fire"),
        RankEnd(0, Kind.lost, "ConnectionError: closed"),
        RankEnd(1, Kind.stopped),
    ]


def test_without_a_job_nothing_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENDS, raising=False)
    monkeypatch.chdir(tmp_path)
    record_end(0, Kind.failed, "x")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_hides_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDS, str(tmp_path / "gone"))
    record_end(0, Kind.failed, "x")
    assert ends_in(tmp_path / "gone") == []


def test_what_was_half_written_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "rank_0.json").write_text('{"rank": 0, "ki')
    assert ends_in(tmp_path) == []


def test_the_same_failure_reads_the_same() -> None:
    error, again = (RuntimeError(f"tensor at 0x{address:x} is gone") for address in (0x7F01, 0x7F02))
    assert one_line(error) == one_line(again) == "RuntimeError: tensor at ... is gone"
    for address in ("[127.0.0.1]:38211", "10.0.3.7:29500", "127.0.0.1", "[fe80::1%eth0]:4", "[::1]:29500"):
        said = "[gloo/pair.cc:553] Connection closed by peer {}, after 30.5 s in step 3:4"
        assert one_line(said.format(address)) == said.format("...")


def test_the_first_word_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDS, str(tmp_path))
    record_end(1, Kind.failed, "disk on fire")
    record_end(1, Kind.failed, "rank 1 of 2 failed")
    assert ends_in(tmp_path) == [RankEnd(1, Kind.failed, "disk on fire")]


def test_who_has_left_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDS, str(tmp_path))
    record_end(1, Kind.stopped)
    assert has_recorded([1])
    assert not has_recorded([0, 1])
    (tmp_path / "rank_0.json").touch()  # its disk was full
    assert not has_recorded([0, 1])
    monkeypatch.delenv(ENDS)
    assert not has_recorded([1])
