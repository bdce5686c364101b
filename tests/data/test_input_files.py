"""The files below a directory that are read, and those that are left out and counted."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from launcher.config.errors import ConfigError
from launcher.data.input_files import LeftOut, listed, matching
from launcher.data.preparation import find_inputs


def write(root: Path, *names: str, content: str = '{"text": "a"}\n') -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


def found(*sources: Path) -> tuple[list[str], dict[str, int]]:
    inputs, left_out = find_inputs(list(sources))
    return [file.name for file in inputs], {reason: count for reason, count in left_out.items() if count}


@pytest.mark.parametrize(
    "name",
    [
        "._x.jsonl",
        ".x.jsonl.swp",
        ".git/x.jsonl",
        "a/.ipynb_checkpoints/x-checkpoint.jsonl",
        ".cache/b/x.txt",
    ],
)
def test_hidden_files_are_left_out(name: str, tmp_path: Path) -> None:
    write(tmp_path, "x.jsonl", name)
    assert found(tmp_path) == (["x.jsonl"], {"hidden": 1})


@pytest.mark.parametrize("name", ["x.jsonl~", "x.jsonl.bak", "#x.jsonl#", "x.txt.orig", "__MACOSX/x.jsonl"])
def test_backup_copies_are_left_out(name: str, tmp_path: Path) -> None:
    write(tmp_path, "x.jsonl", name)
    assert found(tmp_path) == (["x.jsonl"], {"backup copies": 1})


def test_a_directory_that_is_itself_hidden_is_read(tmp_path: Path) -> None:
    write(tmp_path, ".cache/x.jsonl", ".y.jsonl")
    assert found(tmp_path / ".cache", tmp_path / ".y.jsonl") == (["x.jsonl", ".y.jsonl"], {})


def test_a_file_that_two_sources_name_is_read_once(tmp_path: Path) -> None:
    write(tmp_path, "in/a.jsonl", "in/b.jsonl")
    (tmp_path / "in" / "c.jsonl").symlink_to("a.jsonl")
    (tmp_path / "in" / "d.jsonl").hardlink_to(tmp_path / "in" / "b.jsonl")
    twice = {"the same file by another name": 3}
    assert found(tmp_path / "in", tmp_path / "in" / "a.jsonl") == (["a.jsonl", "b.jsonl"], twice)


def test_links_to_directories_are_followed_and_loops_end(tmp_path: Path) -> None:
    write(tmp_path, "in/a.jsonl", "elsewhere/b.jsonl", "elsewhere/deeper/c.jsonl")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "deeper" / "up").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "self").symlink_to(tmp_path / "in")
    assert found(tmp_path / "in")[0] == ["a.jsonl", "more/b.jsonl", "more/deeper/c.jsonl"]


def test_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "in/a.jsonl")
    (tmp_path / "in" / "large.jsonl").symlink_to("not-fetched")
    with pytest.raises(ConfigError, match=r"large\.jsonl is a link to not-fetched, which does not exist"):
        found(tmp_path / "in")


def test_a_directory_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "in/a.jsonl", "in/closed/b.jsonl")
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read a directory of any mode
    with pytest.raises(ConfigError, match="closed cannot be read: Permission denied"):
        found(tmp_path / "in")


def test_empty_files_pipes_and_other_formats_are_counted(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "README.md", "data.csv")
    write(tmp_path, "b.jsonl", "c.parquet", content="")
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert found(tmp_path) == (["a.jsonl"], {"empty": 2, "of other formats": 2, "not regular files": 1})


def test_what_a_preparation_wrote_is_no_text(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", "web.json", "web.tokenizer.json", "web.bad_lines.txt", "other.json")
    write(tmp_path, "old.partial/made_of.json", "old.partial/journal.json", "old.partial/bad_lines.txt")
    (tmp_path / "web.idx").touch()
    names, left_out = found(tmp_path)
    assert names == ["a.jsonl", "other.json"]
    assert left_out == {
        "written by `launcher prepare`": 3, "of an interrupted preparation": 3, "of other formats": 1,
    }  # fmt: skip


def test_the_counts_are_listed_by_reason() -> None:
    left_out: LeftOut = Counter({"hidden": 2000, "empty": 0, "backup copies": 1})
    assert listed(left_out) == "backup copies: 1, hidden: 2,000"


def test_a_glob_enters_each_directory_once(tmp_path: Path) -> None:
    """glob.glob needs more than 2**20 steps here."""
    write(tmp_path, "a/x.txt", "b/y.txt", "b/.hidden/z.txt", "c/d/e.txt")
    for name, target in (("a/b", "b"), ("b/a", "a"), ("b/top", "."), ("a/top", "."), ("linked", "c")):
        (tmp_path / name).symlink_to(tmp_path / target)
    left_out: LeftOut = Counter()

    def matches(pattern: str) -> list[str]:
        paths = matching(tmp_path, pattern, "data.train", left_out)
        return sorted({path.relative_to(tmp_path).as_posix() for path in paths if path.is_file()})

    assert matches("**/*.txt") == matches("**") == ["a/x.txt", "b/y.txt", "c/d/e.txt"]
    assert left_out["directories by another name"] == 10
    assert matches("c/**/*.txt") == matches("**/d/*") == matches("**/c/**/*.txt") == ["c/d/e.txt"]
    assert matches("**/.hidden/*.txt") == ["b/.hidden/z.txt"]
    assert matches("*/*.txt") == ["a/x.txt", "b/y.txt"]
