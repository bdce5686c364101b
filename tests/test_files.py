"""A crash at any moment leaves the old file or the new one, and what is returned from is on the disk."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import files


class Killed(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that change the disk, in their order; `calls.clear()` begins anew."""
    made: list[str] = []

    def noted(module: object, name: str) -> None:
        original = getattr(module, name)

        def call(*arguments: object, **options: object) -> object:
            made.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    noted(Path, "write_text")
    noted(Path, "replace")
    noted(os, "fsync")
    return made


def killed_at(call: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], None]) -> bool:
    """Run `work` until the call with this number; whether it came to that."""
    left = call

    def counted(module: object, name: str) -> None:
        original = getattr(module, name)

        def counting(*arguments: object, **options: object) -> object:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return original(*arguments, **options)

        context.setattr(module, name, counting)

    with monkeypatch.context() as context:
        for module, name in ((Path, "write_text"), (Path, "replace"), (Path, "mkdir"), (os, "fsync")):
            counted(module, name)
        try:
            work()
        except Killed:
            return True
    return False


def test_the_content_is_synced_before_the_rename_and_the_name_after_it(
    tmp_path: Path, calls: list[str]
) -> None:
    files.write_text(tmp_path / "file", "new")
    assert calls == ["write_text", "fsync", "replace", "fsync"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_crash_leaves_the_old_file_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "file", []
    for call in range(10):
        path.write_text("old")
        if not killed_at(call, monkeypatch, lambda: files.write_text(path, "new")):
            break
        seen.append(path.read_text())
    assert seen == ["old", "old", "old", "new"]
    assert path.read_text() == "new"


def test_an_exception_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), files.replacing(path) as aside:  # noqa: PT012
        aside.write_text("half")
        raise OSError("the disk is full")
    assert path.read_text() == "old"
    files.write_text(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_directory_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "directory"

    def fill() -> None:
        with files.new_directory(path) as aside:
            (aside / "inner").mkdir()
            (aside / "inner" / "file").write_text("content")

    absent = 0
    while killed_at(absent, monkeypatch, fill) and not path.exists():
        absent += 1
    assert absent > 5  # mkdir twice, write, and sync every entry before the rename
    assert (path / "inner" / "file").read_text() == "content"
    assert [entry.name for entry in tmp_path.iterdir()] == ["directory"]


def test_a_crash_while_deleting_leaves_no_part_under_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "directory"
    path.mkdir()
    (path / "file").write_text("content")

    def killed(_: Path) -> None:
        raise Killed

    with monkeypatch.context() as context:
        context.setattr(files.shutil, "rmtree", killed)
        with pytest.raises(Killed):
            files.delete_directory(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["directory.partial"]


def test_a_directory_of_the_user_is_not_deleted_to_make_way(tmp_path: Path) -> None:
    aside = files.partial_path(tmp_path / "a")
    aside.mkdir()
    (aside / "mine").touch()
    with pytest.raises(FileExistsError), files.new_directory(tmp_path / "a"):
        pass
    assert (aside / "mine").exists()
