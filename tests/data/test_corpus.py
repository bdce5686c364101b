"""The files of a text corpus, their split into training and validation, and the refusals."""

import hashlib
import os
import re
import shlex
import stat
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from launcher.config.errors import ConfigError
from launcher.config.schema import CorpusSource, DataConfig
from launcher.data import corpus
from launcher.data.corpus import corpus_files, load_corpus, token_counts

STDLIB = DataConfig(source=CorpusSource.stdlib)


def text(
    train: str | Path | None, validation: str | Path | None = None, fraction: float = 0.05
) -> DataConfig:
    return DataConfig(
        source=CorpusSource.text,
        train=None if train is None else str(train),
        validation=None if validation is None else str(validation),
        validation_fraction=fraction,
    )


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def numbered(count: int) -> dict[str, bytes]:
    return {f"{i:03}.txt": f"text {i}".encode() for i in range(count)}


def names(files: list[Path], root: Path) -> list[str]:
    return [file.relative_to(root).as_posix() for file in files]


def refused(data: DataConfig) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        corpus_files(data)
    return raised.value


def offered(error: ConfigError) -> str:
    """Return the field's value in the remedy, parsed as the shell and then Hydra would parse it."""
    override = next(word for word in shlex.split(error.remedy) if word.startswith(f"{error.field}="))
    return str(OverridesParser.create().parse_override(override).value())


@pytest.fixture
def as_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make os.access answer by the owner's permission bits, because root may read every file."""
    if os.geteuid() == 0:
        monkeypatch.setattr(os, "access", lambda path, mode: bool(os.stat(path).st_mode & stat.S_IRUSR))


class TestStdlib:
    def test_has_enough_text_in_both_parts(self) -> None:
        loaded = load_corpus(STDLIB)
        assert loaded.train.size > 5_000_000
        assert loaded.validation.size > 50_000

    def test_leaves_out_files_that_differ_between_machines(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept = {"abc.py": b"a", "json/decoder.py": b"b", "unittest/mock.py": b"c", "testing.py": b"d"}
        left_out = {
            f"{directory}/module.py": b"x"
            for directory in (
                "site-packages",
                "dist-packages",
                "test",
                "unittest/test",
                "ctypes/tests",
                "idlelib",
                "lib2to3/pgen2",
                "json/__pycache__",
            )
        }
        write(tmp_path, kept | left_out | {"LICENSE.txt": b"x", "abc.pyc": b"x"})
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
        train, validation = corpus_files(STDLIB)
        assert sorted(names(train + validation, tmp_path)) == sorted(kept)

    def test_order_does_not_depend_on_the_file_system(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(tmp_path, {f"{name}.py": b"x" for name in ("b", "a", "z/c", "z/a", "Z", "m/n/o", "m/n")})
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
        expected = corpus_files(STDLIB)
        walk = os.walk

        def backwards(root: Path) -> list[tuple[str, list[str], list[str]]]:
            return [(top, list(dirs), sorted(files, reverse=True)) for top, dirs, files in walk(root)][::-1]

        monkeypatch.setattr(os, "walk", backwards)
        assert corpus_files(STDLIB) == expected
        for part in expected:
            assert names(part, tmp_path) == sorted(names(part, tmp_path))

    def test_without_source_text_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
        error = refused(STDLIB)
        assert (error.field, error.value) == ("data.source", "stdlib")
        assert "data=text" in error.remedy

    def test_accepts_a_validation_glob(self, tmp_path: Path) -> None:
        write(tmp_path, {"held_out.txt": b"mine"})
        data = DataConfig(source=CorpusSource.stdlib, validation=str(tmp_path / "*.txt"))
        train, validation = corpus_files(data)
        assert validation == [tmp_path / "held_out.txt"]
        assert len(train) == sum(len(part) for part in corpus_files(STDLIB))


class TestGlobs:
    def test_recurses_and_sorts_by_relative_path(self, tmp_path: Path) -> None:
        write(tmp_path, {"b.txt": b"1", "a/z.txt": b"2", "a/b/c.txt": b"3", "a.md": b"4", "a0.txt": b"5"})
        train, validation = corpus_files(text(tmp_path / "**" / "*.txt"))
        assert sorted(names(train + validation, tmp_path)) == ["a/b/c.txt", "a/z.txt", "a0.txt", "b.txt"]
        assert train == sorted(train, key=lambda path: path.relative_to(tmp_path).as_posix())

    def test_expands_home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path, {"corpus/a.txt": b"a", "corpus/b.txt": b"b"})
        monkeypatch.setenv("HOME", str(tmp_path))
        assert corpus_files(text("~/corpus/*.txt")) == corpus_files(text(tmp_path / "corpus/*.txt"))

    def test_a_moved_corpus_is_the_same_corpus(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for root in ("here", "elsewhere/deeper"):
            write(tmp_path / root, numbered(40))
        here = load_corpus(text(tmp_path / "here" / "*.txt"))
        elsewhere = load_corpus(text(tmp_path / "elsewhere" / "deeper" / "*.txt"))
        monkeypatch.chdir(tmp_path / "here")
        relative = load_corpus(text("*.txt"))
        assert here.validation.tobytes() == elsewhere.validation.tobytes() == relative.validation.tobytes()
        assert here.train.tobytes() == elsewhere.train.tobytes() == relative.train.tobytes()

    def test_a_file_matched_twice_counts_once(self, tmp_path: Path) -> None:
        write(tmp_path, {"a/a/one.txt": b"1", "a/a/two.txt": b"2"})
        train, validation = corpus_files(text(f"{tmp_path}/**/a/**/*.txt"))
        assert sorted(names(train + validation, tmp_path)) == ["a/a/one.txt", "a/a/two.txt"]


class TestSplit:
    @given(count=st.integers(2, 60), fraction=st.floats(0.001, 0.999))
    def test_is_by_file_and_no_part_is_empty(self, count: int, fraction: float) -> None:
        files = [corpus._TextFile(f"{i}.txt", Path(f"{i}.txt")) for i in range(count)]
        train, validation = corpus._split(files, fraction)
        assert train
        assert validation
        assert sorted(train + validation) == sorted(files)
        assert corpus._split(files[::-1], fraction) == (train, validation)

    @pytest.mark.parametrize("fraction", [0.05, 0.3, 0.8])
    def test_holds_out_about_the_fraction(self, fraction: float) -> None:
        files = [corpus._TextFile(f"{i}.txt", Path(f"{i}.txt")) for i in range(4000)]
        _, validation = corpus._split(files, fraction)
        assert len(validation) / len(files) == pytest.approx(fraction, abs=0.03)

    def test_an_added_file_moves_no_other_file(self, tmp_path: Path) -> None:
        write(tmp_path, numbered(200))
        before = corpus_files(text(tmp_path / "*.txt"))[1]
        write(tmp_path, {"added.txt": b"x"})
        after = corpus_files(text(tmp_path / "*.txt"))[1]
        assert len(before) > 1
        assert set(after) - {tmp_path / "added.txt"} == set(before)

    def test_never_changes(self, tmp_path: Path) -> None:
        write(tmp_path, numbered(40))
        _, validation = corpus_files(text(tmp_path / "*.txt", fraction=0.15))
        # Recorded values: if they change, the data of every existing run change when it resumes.
        assert names(validation, tmp_path) == [f"{i:03}.txt" for i in (7, 14, 16, 17, 22, 23, 24, 28, 30, 37)]

    def test_a_validation_glob_needs_no_fraction(self, tmp_path: Path) -> None:
        write(tmp_path, {"train.txt": b"t", "held_out.txt": b"v"})
        data = text(tmp_path / "train.txt", tmp_path / "held_out.txt", fraction=0.0)
        assert corpus_files(data) == ([tmp_path / "train.txt"], [tmp_path / "held_out.txt"])

    def test_validation_files_are_not_trained_on(self, tmp_path: Path) -> None:
        write(tmp_path, {"a.txt": b"a", "b.txt": b"b", "held_out/c.txt": b"c"})
        (tmp_path / "alias.txt").symlink_to(tmp_path / "held_out" / "c.txt")
        data = text(tmp_path / "**" / "*.txt", tmp_path / "held_out" / "*.txt")
        train, validation = corpus_files(data)
        assert names(train, tmp_path) == ["a.txt", "b.txt"]
        assert names(validation, tmp_path) == ["held_out/c.txt"]

    def test_a_validation_glob_that_matches_every_file_is_refused(self, tmp_path: Path) -> None:
        write(tmp_path, numbered(3))
        error = refused(text(tmp_path / "*.txt", tmp_path / "*"))
        assert (error.field, error.value) == ("data.validation", str(tmp_path / "*"))
        assert "data.validation=null" in error.remedy


class TestBytes:
    def test_each_file_ends_with_a_zero_byte(self, tmp_path: Path) -> None:
        write(tmp_path, {"train/b.txt": b"second", "train/a.txt": b"first", "held_out/c.txt": "ü".encode()})
        loaded = load_corpus(text(tmp_path / "train" / "*", tmp_path / "held_out" / "*"))
        assert loaded.train.tobytes() == b"first\0second\0"
        assert loaded.validation.tobytes() == b"\xc3\xbc\0"
        assert loaded.train.dtype == np.uint8
        assert loaded.train.ndim == 1

    def test_other_bytes_are_read_unchanged(self, tmp_path: Path) -> None:
        content = bytes(range(1, 256)) + b"\r\n\xff\xfe"
        content = content + content[::-1] + b"x"
        write(tmp_path, {"a.bin": content, "held_out": content[::-1]})
        loaded = load_corpus(text(tmp_path / "*.bin", tmp_path / "held_out"))
        assert loaded.train.tobytes() == content + b"\0"
        assert loaded.validation.tobytes() == content[::-1] + b"\0"

    @pytest.mark.parametrize(
        ("size", "fraction", "held_out"), [(99, 0.05, 5), (99, 0.999, 99), (9, 0.05, 1), (1, 0.05, 1)]
    )
    def test_the_tail_of_a_single_file_is_held_out(
        self, tmp_path: Path, size: int, fraction: float, held_out: int
    ) -> None:
        content = bytes(1 + i % 255 for i in range(size))
        write(tmp_path, {"only.txt": content, "empty.txt": b""})
        data = text(tmp_path / "*.txt", fraction=fraction)
        loaded = load_corpus(data)
        assert corpus_files(data) == ([tmp_path / "only.txt"], [tmp_path / "only.txt"])
        assert loaded.train.tobytes() + loaded.validation.tobytes() == content + b"\0"
        assert loaded.validation.size == held_out

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
    def test_a_byte_order_mark_is_no_text(self, tmp_path: Path, encoding: str) -> None:
        texts = {"a.txt": "naïve 漢字 🙂\r\n", "b.txt": "zwei"}
        write(tmp_path, {name: content.encode(encoding) for name, content in texts.items()})
        data = text(tmp_path / "a.txt", tmp_path / "b.txt")
        loaded = load_corpus(data)
        assert loaded.train.tobytes() == texts["a.txt"].encode() + b"\0"
        assert loaded.validation.tobytes() == b"zwei\0"
        assert token_counts(data, Counter()) == (loaded.train.size, loaded.validation.size)

    @pytest.mark.parametrize("field", ["data.train", "data.validation"])
    @pytest.mark.parametrize("content", [b"a\0b", b"\0", "UTF-16".encode("utf-16-le")])
    def test_a_zero_byte_is_refused_because_it_ends_a_document(
        self, tmp_path: Path, content: bytes, field: str
    ) -> None:
        write(tmp_path, {"a.txt": b"good", "b.txt": content})
        names = ["b.txt", "a.txt"] if field == "data.train" else ["a.txt", "b.txt"]
        data = text(*(tmp_path / name for name in names))
        for read in (load_corpus, lambda data: token_counts(data, Counter())):
            with pytest.raises(ConfigError, match=r"b\.txt contains a zero byte") as raised:
                read(data)
            assert (raised.value.field, raised.value.value) == (field, str(tmp_path / "b.txt"))

    def test_half_a_character_of_utf_16_is_refused(self, tmp_path: Path) -> None:
        write(tmp_path, {"a.txt": "one".encode("utf-16") + b"x"})
        with pytest.raises(ConfigError, match=r"a\.txt begins as UTF-16, but its text is not valid"):
            load_corpus(text(tmp_path / "a.txt"))

    @pytest.mark.parametrize("count", [1, 2, 30])
    def test_token_counts_follow_from_file_sizes(self, tmp_path: Path, count: int) -> None:
        write(tmp_path, numbered(count))
        data = text(tmp_path / "*.txt", fraction=0.3)
        loaded = load_corpus(data)
        assert token_counts(data, Counter()) == (loaded.train.size, loaded.validation.size)


class TestRefusals:
    @pytest.mark.parametrize("field", ["data.train", "data.validation"])
    def test_the_remedy_is_a_glob_that_matches(self, tmp_path: Path, field: str) -> None:
        write(tmp_path, {"my corpus/a.md": b"a", "my corpus/b.md": b"b", "train/t.txt": b"t"})
        # Hidden and empty files, which a glob does not match, do not count for the suggested ending.
        no_matches = {".hidden.rst": b"h", ".other.rst": b"h", "empty.rst": b"", "void.rst": b""}
        write(tmp_path / "my corpus", {"c.rst": b"c"} | no_matches)
        pattern = f"{tmp_path}/my corpus/missing.txt"
        good = f"{tmp_path}/train/*.txt"
        error = refused(text(pattern) if field == "data.train" else text(good, pattern))
        assert (error.field, error.value) == (field, pattern)
        assert "the glob matches no file" in error.why
        assert "(2 files)" in error.remedy
        repaired = text(offered(error)) if field == "data.train" else text(good, offered(error))
        train, validation = corpus_files(repaired)
        assert {"a.md", "b.md"} <= {path.name for path in train + validation}

    def test_the_remedy_for_a_directory_is_a_glob_in_it(self, tmp_path: Path) -> None:
        write(tmp_path, {"corpus [1]/a.txt": b"a"})
        error = refused(text(tmp_path / "corpus [1]"))
        assert offered(error) == f"{tmp_path}/corpus [[]1]/*.txt"

    def test_the_remedy_for_a_missing_directory_is_the_closest_existing_directory(
        self, tmp_path: Path
    ) -> None:
        write(tmp_path, {"corpus/a.txt": b"a"})
        error = refused(text(tmp_path / "corpus" / "no" / "such" / "*.txt"))
        assert offered(error) == f"{tmp_path}/corpus/*.txt"

    def test_a_glob_below_a_file(self, tmp_path: Path) -> None:
        write(tmp_path, {"a.txt": b"a"})
        assert offered(refused(text(tmp_path / "a.txt" / "*.txt"))) == f"{tmp_path}/*.txt"

    def test_a_directory_without_permission_is_not_listed(self, tmp_path: Path, as_owner: None) -> None:
        write(tmp_path, {"closed/a.md": b"a", "open.txt": b"b"})
        (tmp_path / "closed").chmod(0)
        error = refused(text(tmp_path / "closed" / "*.txt"))
        (tmp_path / "closed").chmod(0o700)
        assert offered(error) == f"{tmp_path}/*.txt"

    @pytest.mark.parametrize(
        "pattern", ["/*.nothing", "/no/such/*.txt", "{above}/no/*.txt", "../*.none", "{home}/x/*"]
    )
    def test_the_remedy_names_no_file_outside_the_users_directories(
        self, pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(tmp_path, {"other.md": b"x", "home/dot.md": b"x", "home/me/own/a.txt": b"x"})
        monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        error = refused(text(pattern.format(above=tmp_path, home=tmp_path / "home")))
        assert offered(error) == "corpus/**/*.txt"

    def test_the_remedy_names_no_file_of_a_shared_directory(self, tmp_path: Path) -> None:
        write(tmp_path, {"shared/theirs.md": b"x"})
        (tmp_path / "shared").chmod(0o1777)  # as /tmp
        assert offered(refused(text(tmp_path / "shared" / "mine" / "*.txt"))) == "corpus/**/*.txt"

    def test_no_directory_with_text_is_still_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for pattern in ("*.txt", ""):
            error = refused(text(pattern))
            assert (error.field, error.value) == ("data.train", pattern)
            assert offered(error) == "**/*.txt"

    @pytest.mark.parametrize(
        ("files", "pattern", "source"),
        [
            (["x.jsonl"], "x.jsonl", "x.jsonl"),
            (["c/x.json"], "c/x.json", "c/x.json"),
            (["c/x.json", "c/y.json"], "c/*", "c"),
            (["c/x.parquet", "c/y.txt"], "c/**/*", "c"),
            (["c/x.txt.gz"], "c/*.gz", "c"),
            (["my data/x.jsonl.zst"], "my data/x.jsonl.zst", "my data/x.jsonl.zst"),
            (["c/x.ndjson"], "c", "c"),
        ],
    )
    @pytest.mark.parametrize("field", ["data.train", "data.validation"])
    def test_files_of_records_are_pointed_to_prepare(
        self, files: list[str], pattern: str, source: str, field: str, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.chdir(tmp_path)
        write(tmp_path, dict.fromkeys(files, b'{"text": "a"}') | {"good/a.txt": b"a", "good/b.txt": b"b"})
        error = refused(text(pattern) if field == "data.train" else text("good/*", pattern))
        assert (error.field, error.value) == (field, pattern)
        prepare, train = error.remedy.split("; then ")
        assert shlex.split(prepare)[:3] == ["launcher", "prepare", source]
        target = shlex.split(prepare)[3]
        assert shlex.split(train)[:2] == ["launcher", "data=tokens"]
        assert target in train

    def test_json_among_source_text_is_text(self, tmp_path: Path) -> None:
        write(tmp_path, {"a.py": b"a", "package.json": b"{}"})
        assert sum(map(len, corpus_files(text(tmp_path / "*")))) == 2


class TestFilesLeftOut:
    """Files that a glob matches and that are not read are counted."""

    def left_out(self, data: DataConfig) -> dict[str, int]:
        counts: Counter[str] = Counter()
        corpus_files(data, counts)
        return {reason: count for reason, count in counts.items() if count}

    def test_backup_copies_and_empty_files(self, tmp_path: Path) -> None:
        copies = ["a.txt~", "a.txt.bak", "#a.txt#", "b.txt.orig", "c.swp", "__MACOSX/a.txt"]
        write(tmp_path, numbered(3) | dict.fromkeys(copies, b"x") | {"empty.txt": b""})
        os.mkfifo(tmp_path / "pipe.txt")
        data = text(tmp_path / "**" / "*")
        assert sum(map(len, corpus_files(data))) == 3
        assert self.left_out(data) == {"backup copies": 6, "empty": 1, "not regular files": 1}

    def test_a_copy_that_is_asked_for_is_read(self, tmp_path: Path) -> None:
        write(tmp_path, {"a.txt.bak": b"a", "b.txt.bak": b"b"})
        assert sum(map(len, corpus_files(text(tmp_path / "*.bak")))) == 2

    def test_a_file_by_two_names_is_read_once(self, tmp_path: Path) -> None:
        write(tmp_path, {"a.txt": b"a", "b/c.txt": b"c"})
        (tmp_path / "hard.txt").hardlink_to(tmp_path / "a.txt")
        (tmp_path / "soft.txt").symlink_to("b/c.txt")
        (tmp_path / "linked").symlink_to("b")
        (tmp_path / "b" / "loop").symlink_to(tmp_path)
        data = text(tmp_path / "**" / "*.txt")
        train, validation = corpus_files(data)
        assert sorted(path.read_bytes() for path in train + validation) == [b"a", b"c"]
        assert self.left_out(data) == {
            "the same file by another name": 2, "directories by another name": 2,
        }  # fmt: skip

    def test_files_of_the_validation_glob(self, tmp_path: Path) -> None:
        write(tmp_path, numbered(5))
        assert self.left_out(text(tmp_path / "*", tmp_path / "00[12].txt")) == {"files of data.validation": 2}

    def test_empty_files_are_left_out(self, tmp_path: Path) -> None:
        write(tmp_path, numbered(3) | {"empty.txt": b""})
        (tmp_path / "directory.txt").mkdir()
        train, validation = corpus_files(text(tmp_path / "*.txt"))
        assert sorted(names(train + validation, tmp_path)) == sorted(numbered(3))

    def test_only_empty_files(self, tmp_path: Path) -> None:
        write(tmp_path, {"a.txt": b"", "b.txt": b""})
        error = refused(text(tmp_path / "*.txt"))
        assert (error.field, error.value) == ("data.train", str(tmp_path / "*.txt"))
        assert "every matched file is empty" in error.why

    def test_a_pipe_is_skipped(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.txt")
        write(tmp_path, numbered(2))
        loaded = load_corpus(text(tmp_path / "*.txt"))
        assert loaded.train.size + loaded.validation.size == 2 * len(b"text 0\0")

    def test_a_dangling_link_is_refused(self, tmp_path: Path) -> None:
        write(tmp_path, numbered(3))
        (tmp_path / "large.txt").symlink_to(tmp_path / "not-fetched")
        error = refused(text(tmp_path / "*.txt"))
        assert (error.field, error.value) == ("data.train", str(tmp_path / "*.txt"))
        assert "No such file" in error.why
        assert str(tmp_path / "large.txt") in error.remedy

    def test_an_unreadable_file_is_refused(self, tmp_path: Path, as_owner: None) -> None:
        write(tmp_path, numbered(3) | {"secret.txt": b"s"})
        (tmp_path / "secret.txt").chmod(0)
        error = refused(text(tmp_path / "001.txt", tmp_path / "*.txt"))
        assert (error.field, error.value) == ("data.validation", str(tmp_path / "*.txt"))
        assert "permission denied" in error.why
        assert str(tmp_path / "secret.txt") in error.remedy

    def test_the_message_has_a_reason_and_a_remedy(self, tmp_path: Path) -> None:
        message = str(refused(text(tmp_path / "*.txt")))
        assert re.match(rf"data\.train={re.escape(str(tmp_path))}/\*\.txt: .+\n  try: .+", message)


def test_file_names_that_are_not_utf8_are_split(tmp_path: Path) -> None:
    for name in (b"a\xff.txt", b"b\xfe.txt"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(hashlib.sha256(name).digest())
    train, validation = corpus_files(text(tmp_path / "*.txt"))
    assert (len(train), len(validation)) == (1, 1)
