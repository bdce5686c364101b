"""Temporary directories are removed at their end, or at the next start after a kill."""

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

from launcher.launch.scratch import scratch_directory, temporary_files_in


def killed_owner(parent: Path) -> Path:
    """Return the directory of a process that was killed inside scratch_directory."""
    child = os.fork()
    if child == 0:
        with scratch_directory():
            time.sleep(600)
    while not list(parent.glob("launcher-*/owner")):
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    [left] = parent.glob("launcher-*")
    return left


def test_directories_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = killed_owner(tmp_path)
    (tmp_path / "launcher-of-somebody").mkdir()
    with scratch_directory() as first:
        assert not left.exists()
        with scratch_directory() as second:
            assert first.exists()
            assert second.exists()
        assert not second.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["launcher-of-somebody"]


def test_directories_of_ranks_that_were_killed_meanwhile_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(theirs))
    left = killed_owner(theirs)
    monkeypatch.setattr("tempfile.tempdir", str(ours))
    with scratch_directory():
        left.rename(ours / left.name)
    assert list(ours.iterdir()) == []


@pytest.mark.parametrize("variable", [None, "/elsewhere"])
def test_temporary_files_of_a_block_have_a_directory_of_their_own(
    variable: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    if variable:
        monkeypatch.setenv("TMPDIR", variable)
    before = tempfile.gettempdir()
    with temporary_files_in(tmp_path):
        assert os.environ["TMPDIR"] == tempfile.gettempdir() == str(tmp_path)
    assert (os.environ.get("TMPDIR"), tempfile.gettempdir()) == (variable, before)


def test_a_rank_that_lives_on_keeps_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that were forked hold the lock: their parent may be gone a moment before them."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with scratch_directory() as folder:
        child = os.fork()
        if child == 0:
            time.sleep(600)
    folder.mkdir()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
