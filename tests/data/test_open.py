"""Opening a run's data: parts, digests, and refusals before ranks start or, if impossible, while reading."""

import os
import re
import resource
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from launcher.config.errors import ConfigError
from launcher.config.schema import CorpusSource, DataConfig, RunConfig
from launcher.data.corpus import load_corpus
from launcher.data.open import ONLY, check_data, held_out_name, open_data
from launcher.data.sampler import Samples
from launcher.data.token_file import bin_path, index_path
from launcher.data.windows import Stretch, Windows, check_ids, windows_in
from tests.config.composing import run_of
from tests.data.token_files import write_documents


def run_with(data: DataConfig, sequence_length: int, vocab_size: int = 256) -> RunConfig:
    run = run_of("model=gpt_tiny", "model.max_sequence_length=8192", f"model.vocab_size={vocab_size}")
    run.data = data
    run.data.sequence_length = sequence_length
    return run


def check(data: DataConfig, sequence_length: int) -> None:
    check_data(run_with(data, sequence_length))


class TestCheckText:
    @staticmethod
    def corpus(root: Path, train: int, validation: int) -> DataConfig:
        """Write two files with these numbers of tokens, including their final zero bytes."""
        (root / "train.txt").write_bytes(b"t" * (train - 1))
        (root / "validation.txt").write_bytes(b"v" * (validation - 1))
        return DataConfig(CorpusSource.text, str(root / "train.txt"), str(root / "validation.txt"))

    def refused(self, data: DataConfig, sequence_length: int) -> ConfigError:
        with pytest.raises(ConfigError) as raised:
            check(data, sequence_length)
        assert (raised.value.field, raised.value.value) == ("data.sequence_length", sequence_length)
        return raised.value

    @pytest.mark.parametrize(("train", "validation", "part"), [(50, 9, "validation"), (9, 50, "training")])
    def test_names_the_short_part_and_a_sequence_length_that_fits(
        self, tmp_path: Path, train: int, validation: int, part: str
    ) -> None:
        error = self.refused(self.corpus(tmp_path, train, validation), sequence_length=9)
        assert part in error.why
        assert error.remedy.startswith("data.sequence_length=8,")

    def test_the_remedy_fits_both_parts(self, tmp_path: Path) -> None:
        data = self.corpus(tmp_path, train=30, validation=20)
        error = self.refused(data, sequence_length=64)
        assert error.remedy.startswith("data.sequence_length=19,")
        check(data, 19)

    @pytest.mark.parametrize("size", [1, 2, 19, 20, 21, 400])
    def test_agrees_with_the_loaded_corpus(self, tmp_path: Path, size: int) -> None:
        (tmp_path / "only.txt").write_bytes(b"x" * size)
        data = DataConfig(CorpusSource.text, str(tmp_path / "only.txt"), validation_fraction=0.1)
        loaded = load_corpus(data)
        for sequence_length in (1, 2, 39, 40):
            fits = min(loaded.train.size, loaded.validation.size) > sequence_length
            if fits:
                check(data, sequence_length)
                assert windows_in(loaded.train.size, sequence_length) >= 1
                assert windows_in(loaded.validation.size, sequence_length) >= 1
            else:
                self.refused(data, sequence_length)

    def test_the_shipped_corpus_is_long_enough(self) -> None:
        check(DataConfig(source=CorpusSource.stdlib), 8192)


def tokens(train: Path | str, validation: Path | None = None, fraction: float = 0.25) -> DataConfig:
    held_out = None if validation is None else str(validation)
    return DataConfig(CorpusSource.tokens, str(train), held_out, fraction)


def lengths_of(data: DataConfig, sequence_length: int = 2) -> tuple[list[int], list[int]]:
    opened = open_data(run_with(data, sequence_length, 2**31 - 1))
    parts = []
    for samples in (opened.train[ONLY], opened.validation[ONLY]):
        assert isinstance(samples.items, Windows)
        parts.append([len(stretch.tokens) for stretch in samples.items.stretches])
    return parts[0], parts[1]


class TestTokens:
    @pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
    def test_are_named_with_or_without_an_ending(self, ending: str, tmp_path: Path) -> None:
        write_documents(tmp_path / "web", [np.arange(30), np.arange(10)])
        assert lengths_of(tokens(f"{tmp_path / 'web'}{ending}")) == ([30], [10])

    def test_validation_starts_at_the_closest_document(self, tmp_path: Path) -> None:
        write_documents(tmp_path / "web", [np.arange(n) for n in (50, 20, 17, 13)])
        for fraction, held_out in ((0.1, 13), (0.2, 20), (0.25, 30), (0.4, 50), (0.9, 90), (0.01, 1)):
            assert lengths_of(tokens(tmp_path / "web", fraction=fraction))[1] == [held_out], fraction

    def test_the_end_of_a_single_document_is_held_out(self, tmp_path: Path) -> None:
        write_documents(tmp_path / "web", [np.arange(100)])
        assert lengths_of(tokens(tmp_path / "web")) == ([75], [25])

    def test_a_separate_validation_file(self, tmp_path: Path) -> None:
        write_documents(tmp_path / "web", [np.arange(100)])
        write_documents(tmp_path / "held", [np.arange(40)])
        assert lengths_of(tokens(tmp_path / "web", tmp_path / "held")) == ([100], [40])

    def test_a_glob_is_one_source_and_no_window_spans_two_files(self, tmp_path: Path) -> None:
        for name, first in (("web_0", 0), ("web_1", 1000), ("web_2", 2000)):
            write_documents(tmp_path / name, [np.arange(first, first + 21), np.arange(7)])
        data = open_data(run_with(tokens(tmp_path / "web_*"), 4, 5000))
        assert len(data.train[ONLY]) == 3 * 5
        taken = data.train[ONLY].take(np.arange(15))
        assert (np.diff(taken, axis=1) == 1).all()
        assert sorted(taken[:, 0].tolist()) == [f + s for f in (0, 1000, 2000) for s in range(0, 20, 4)]

    def test_the_digest_covers_the_training_files_only(self, tmp_path: Path) -> None:
        for folder, last in (("a", 9), ("b", 9), ("c", 8)):
            (tmp_path / folder).mkdir()
            write_documents(tmp_path / folder / "web", [np.arange(30), np.array([1, 2, last])])
        a, b, c = (open_data(run_with(tokens(tmp_path / x / "web"), 2)).digests for x in "abc")
        assert a == b != c

    def test_separate_validation_files_have_their_own_digest(self, tmp_path: Path) -> None:
        write_documents(tmp_path / "web", [np.arange(30)])
        for name, last in (("one", 9), ("same", 9), ("other", 8)):
            write_documents(tmp_path / name, [np.array([1, 2, 3, last])])
        one, same, other = (
            open_data(run_with(tokens(tmp_path / "web", tmp_path / name), 2)).digests
            for name in ("one", "same", "other")
        )
        assert one == same
        assert one[ONLY] == other[ONLY]
        assert one[held_out_name(ONLY, "validation")] != other[held_out_name(ONLY, "validation")]


def taken(samples: Samples) -> npt.NDArray[np.int64]:
    """Return the tokens of all samples of an epoch."""
    tokens = samples.take(np.arange(len(samples)))
    assert isinstance(tokens, np.ndarray)
    return tokens


class TestFilesOfAGlob:
    def left_out(self, data: DataConfig) -> dict[str, int]:
        counts = check_data(run_with(data, 2, 5000))
        return {reason: count for reason, count in counts.items() if count}

    def test_a_file_by_two_names_is_read_once(self, tmp_path: Path) -> None:
        for name in ("web_0", "web_1"):
            write_documents(tmp_path / name, [np.arange(30)])
        for ending in (".bin", ".idx"):
            (tmp_path / f"web_2{ending}").symlink_to(tmp_path / f"web_0{ending}")
            (tmp_path / f"web_3{ending}").hardlink_to(tmp_path / f"web_1{ending}")
        data = tokens(tmp_path / "web_*")
        assert lengths_of(data)[0] == [22, 22]
        assert self.left_out(data) == {"the same file by another name": 2}

    def test_validation_files_are_not_trained_on(self, tmp_path: Path) -> None:
        for number in range(3):
            write_documents(tmp_path / f"web_{number}", [np.arange(30 + number)])
        data = tokens(tmp_path / "web_*", tmp_path / "web_1")
        assert lengths_of(data) == ([30, 32], [31])
        assert self.left_out(data) == {"files of data.validation or data.test": 1}
        with pytest.raises(ConfigError, match="all of these files are validation or test files") as raised:
            check_data(run_with(tokens(tmp_path / "web_1", tmp_path / "web_*"), 2))
        assert raised.value.field == "data.train"

    def test_tokens_without_an_index_are_counted(self, tmp_path: Path) -> None:
        for name in ("web_0", "web_1", "web_2"):
            write_documents(tmp_path / name, [np.arange(30)])
        index_path(tmp_path / "web_1").unlink()
        assert self.left_out(tokens(tmp_path / "web_*")) == {"without an .idx file": 1}

    @pytest.mark.parametrize(("soft", "hard"), [(64, 64), (40, 300), (30, 30)])
    def test_more_files_than_a_process_may_open(self, tmp_path: Path, soft: int, hard: int) -> None:
        for number in range(60):
            write_documents(tmp_path / f"web_{number:02}", [np.arange(number * 100, number * 100 + 31)])
        write_documents(tmp_path / "held", [np.arange(31)])
        pid = os.fork()
        if not pid:
            status = 1
            try:
                open_now = len(os.listdir("/proc/self/fd"))
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft + open_now, hard + open_now))
                data = tokens(tmp_path / "web_*", tmp_path / "held")
                samples = open_data(run_with(data, 10, 10_000)).train[ONLY]
                for _ in range(2):
                    rows = taken(samples)
                    assert (np.diff(rows, axis=1) == 1).all()
                    starts = [number * 100 + first for number in range(60) for first in (0, 10, 20)]
                    assert sorted(rows[:, 0].tolist()) == starts
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0


class TestParts:
    def parts(self, data: DataConfig, name: str = ONLY) -> list[list[int]]:
        """Return the tokens of the training, validation and test part."""
        opened = open_data(run_with(data, 2, 2**31 - 1))
        parts = []
        for part in (opened.train, opened.validation, opened.test):
            items = part[name].items if name in part else Windows([], 2)
            assert isinstance(items, Windows)
            parts.append([int(token) for stretch in items.stretches for token in stretch.tokens])
        return parts

    @pytest.mark.parametrize("lengths", [[1000], [7] * 143, [100, 300, 200, 400], [990, 5, 5]])
    @pytest.mark.parametrize(("validation", "test"), [(0.1, 0.1), (0.02, 0.3), (0.3, 0.02), (0.05, 0.0)])
    def test_are_consecutive_and_cover_the_file(
        self, lengths: list[int], validation: float, test: float, tmp_path: Path
    ) -> None:
        ends = np.cumsum(lengths)
        write_documents(tmp_path / "web", [np.arange(e - n, e) for n, e in zip(lengths, ends, strict=True)])
        data = tokens(tmp_path / "web", fraction=validation)
        data.test_fraction = test
        parts, total = self.parts(data), int(ends[-1])
        assert [token for part in parts for token in part] == list(range(total))
        shares = [1 - validation - test, validation, test]
        slack = min(share for share in shares if share) / 3 * 2 + 1 / total
        assert all(abs(len(p) / total - share) <= slack for p, share in zip(parts, shares, strict=True))

    @pytest.mark.parametrize(("validation", "test"), [(0.1, 0.0), (0.05, 0.1), (0.3, 0.3)])
    def test_whole_files_are_held_out_of_many_small_files(
        self, validation: float, test: float, tmp_path: Path
    ) -> None:
        for number in range(40):
            write_documents(tmp_path / f"web_{number}", [np.arange(20 * number, 20 * number + 20)])
        data = tokens(tmp_path / "web_*", fraction=validation)
        data.test_fraction = test
        run = run_with(data, 15, 2**31 - 1)
        opened = open_data(run)
        check_data(run)
        counts = [len(part[ONLY]) if part else 0 for part in (opened.train, opened.validation, opened.test)]
        assert counts == [40 - sum(counts[1:]), round(40 * validation), round(40 * test)]
        firsts = {int(row[0]) for part in (opened.train, opened.validation) for row in taken(part[ONLY])}
        assert len(firsts) == counts[0] + counts[1]

    def test_too_few_small_files_are_refused(self, tmp_path: Path) -> None:
        write_documents(tmp_path / "web_0", [np.arange(20)])
        with pytest.raises(ConfigError, match="the validation part of the corpus has"):
            check_data(run_with(tokens(tmp_path / "web_*"), 15))

    def test_separate_test_files(self, tmp_path: Path) -> None:
        write_documents(tmp_path / "web", [np.arange(100)])
        write_documents(tmp_path / "test", [np.arange(200, 230)])
        data = tokens(tmp_path / "web")
        data.test = str(tmp_path / "test")
        assert self.parts(data)[2] == list(range(200, 230))
        assert len(self.parts(data)[1]) == 25

    def test_each_source_of_a_blend_has_parts(self, tmp_path: Path) -> None:
        for name, first in (("web", 0), ("code", 1000), ("held", 2000)):
            write_documents(tmp_path / name, [np.arange(first, first + 100)])
        data = DataConfig(
            CorpusSource.tokens,
            validation_fraction=0.2,
            test_fraction=0.1,
            sources={"web": str(tmp_path / "web"), "code": str(tmp_path / "code")},
            weights={"web": 1, "code": 1},
            validation_sources={"code": str(tmp_path / "held")},
        )
        assert [len(part) for part in self.parts(data, "web")] == [70, 20, 10]
        assert [len(part) for part in self.parts(data, "code")] == [90, 100, 10]
        assert self.parts(data, "code")[1] == list(range(2000, 2100))

    def test_sources_of_equal_length_have_different_orders(self, tmp_path: Path) -> None:
        for name in ("web", "code"):
            write_documents(tmp_path / name, [np.arange(1000)])
        sources = {name: str(tmp_path / name) for name in ("web", "code")}
        data = DataConfig(CorpusSource.tokens, sources=sources, weights={"web": 1, "code": 1})
        opened = open_data(run_with(data, 2, 5000)).train
        web, code = (opened[name].take(np.arange(50)) for name in ("web", "code"))
        assert (web != code).any()


class TestRefusedBeforeRanksStart:
    """Damaged token files raise a ConfigError about data.train with the reason and a remedy."""

    def refused(self, data: DataConfig, sequence_length: int = 4, vocab_size: int = 256) -> ConfigError:
        with pytest.raises(ConfigError) as raised:
            check_data(run_with(data, sequence_length, vocab_size))
        assert raised.value.remedy
        return raised.value

    @pytest.fixture
    def web(self, tmp_path: Path) -> Path:
        write_documents(tmp_path / "web", [np.arange(60), np.arange(40)])
        check_data(run_with(tokens(tmp_path / "web"), 4))
        return tmp_path / "web"

    def test_a_missing_file(self, tmp_path: Path) -> None:
        error = self.refused(tokens(tmp_path / "none" / "web"))
        assert (error.field, error.why) == ("data.train", f"{tmp_path}/none/web.idx does not exist")

    def test_the_remedy_names_existing_token_files(self, web: Path) -> None:
        for misspelt in (web.parent, web.parent / "wbe", web.parent / "x" / "web"):
            error = self.refused(tokens(misspelt))
            assert error.remedy == f"data.train={web}"
        assert "matches no .idx file" in self.refused(tokens(web.parent / "c*")).why

    @pytest.mark.parametrize("name", ["x.jsonl", "x.txt.gz", "x.parquet"])
    def test_text_is_pointed_to_prepare(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / name).write_bytes(b"x")
        for train, source in ((tmp_path / "in" / name, tmp_path / "in" / name), (tmp_path / "in",) * 2):
            assert self.refused(tokens(train)).remedy.startswith(f"launcher prepare {source} corpora/")

    @pytest.mark.parametrize("missing", [bin_path, index_path])
    def test_the_bin_or_idx_is_missing(self, missing: Any, web: Path) -> None:
        missing(web).unlink()
        assert self.refused(tokens(web)).why == f"{missing(web)} does not exist"

    @pytest.mark.parametrize("of", [bin_path, index_path])
    @pytest.mark.parametrize("keep", [0, 1, 20, -1])
    def test_cut_short(self, of: Any, keep: int, web: Path) -> None:
        of(web).write_bytes(of(web).read_bytes()[:keep])
        why = self.refused(tokens(web)).why
        assert str(of(web)) in why
        assert re.search("is not the index|has .* bytes", why)

    @pytest.mark.parametrize("of", [bin_path, index_path])
    def test_longer_than_the_index_describes(self, of: Any, web: Path) -> None:
        of(web).write_bytes(of(web).read_bytes() + b"xyz")
        assert re.search("has .* bytes", self.refused(tokens(web)).why)

    def test_the_index_of_another_file(self, web: Path) -> None:
        write_documents(web.parent / "other", [np.arange(99)])
        index_path(web).write_bytes(index_path(web.parent / "other").read_bytes())
        assert (
            self.refused(tokens(web)).why == f"{bin_path(web)} has 100 bytes, but web.idx describes 99 bytes"
        )

    @pytest.mark.parametrize(
        ("place", "raw", "why"),
        [
            (0, b"PK", "is not the index"),
            (9, struct.pack("<Q", 7), "version 7"),
            (17, b"\x09", "dtype code 9"),
            (18, struct.pack("<Q", 2**40), "1099511627776 sequences"),
            (18, struct.pack("<Q", 0), "0 sequences"),
            (34, struct.pack("<i", 59), "sequence 0 does not end where the next sequence begins"),
            (34, struct.pack("<i", -1), "sequence 0 does not end"),
            (42, struct.pack("<q", 3), "sequence 0 does not end"),
            (58, struct.pack("<q", 1), "document indices that do not rise from 0 to 2"),
            (66, struct.pack("<q", 2**50), "document indices that do not rise from 0 to 2"),
            (74, struct.pack("<q", 1), "document indices that do not rise from 0 to 2"),
        ],
    )
    def test_a_damaged_index(self, place: int, raw: bytes, why: str, web: Path) -> None:
        content = bytearray(index_path(web).read_bytes())
        content[place : place + len(raw)] = raw
        index_path(web).write_bytes(content)
        assert why in self.refused(tokens(web)).why

    @pytest.mark.parametrize("documents", [[], [[]], [[], []]])
    def test_empty(self, documents: list[list[int]], tmp_path: Path) -> None:
        write_documents(tmp_path / "web", [np.array(d, np.uint8) for d in documents])
        assert re.search("contains no (sequence|tokens)", self.refused(tokens(tmp_path / "web")).why)

    def test_tokens_that_are_not_integers(self, tmp_path: Path) -> None:
        write_documents(tmp_path / "web", [np.arange(50, dtype=np.float32)])
        assert "contains float32, but token ids are integers" in self.refused(tokens(tmp_path / "web")).why

    @pytest.mark.parametrize(
        ("wrong", "remedy"), [(256, "model.vocab_size=257 (or more)"), (-1, "token files")]
    )
    def test_an_id_without_an_embedding(self, wrong: int, remedy: str, tmp_path: Path) -> None:
        ids = np.arange(200, dtype=np.int16)
        ids[77] = wrong
        write_documents(tmp_path / "web", [ids])
        error = self.refused(tokens(tmp_path / "web"))
        assert (error.field, error.value) == ("model.vocab_size", 256)
        assert f"web.bin has token id {wrong} at token 77" in error.why
        assert error.remedy.startswith(remedy)

    @pytest.mark.parametrize(
        ("lasts", "end", "why", "remedy"),
        [
            (
                [5, 5, 5],
                None,
                "do not end with this token",
                "data.end_of_document=5 (the token they end with)",
            ),
            ([5, 5, 5], 0, "do not end with this token", "data.end_of_document=5 (the token they end with)"),
            ([5, 6, 9], 5, "end with different tokens, such as 5, 6, 9", "data.document_attention=false"),
        ],
    )
    def test_documents_that_do_not_end_with_the_token(
        self, lasts: list[int], end: int | None, why: str, remedy: str, tmp_path: Path
    ) -> None:
        write_documents(tmp_path / "web", [np.array([1, 2, 3, 4, 1, 2, last]) for last in lasts])
        data = tokens(tmp_path / "web", fraction=0.3)
        data.document_attention, data.end_of_document = True, end
        error = self.refused(data)
        assert (error.field, error.value) == ("data.end_of_document", "null" if end is None else str(end))
        assert why in error.why
        assert remedy in error.remedy
        data.document_attention = False
        check_data(run_with(data, 4))

    def test_documents_that_end_with_the_token(self, tmp_path: Path) -> None:
        write_documents(tmp_path / "web", [np.array([1, 2, 3, 4, 1, 2, 5])] * 3)
        data = tokens(tmp_path / "web", fraction=0.3)
        data.document_attention, data.end_of_document = True, 5
        check_data(run_with(data, 4))

    def test_too_short_for_one_sample(self, web: Path) -> None:
        error = self.refused(tokens(web, fraction=0.4), sequence_length=40)
        assert error.why.startswith("the validation part of the corpus has 40 tokens, but a sample needs 41")
        check_data(run_with(tokens(web, fraction=0.4), 39))

    def test_a_validation_file_is_refused_under_its_field(self, web: Path) -> None:
        assert self.refused(tokens(web, web.parent / "held")).field == "data.validation"

    def test_a_source_is_refused_under_its_field(self, web: Path) -> None:
        sources = {"web": str(web), "code": str(web.parent / "code")}
        data = DataConfig(CorpusSource.tokens, sources=sources, weights={"web": 1, "code": 1})
        assert self.refused(data).field == "data.sources.code"
        data.sources["code"], data.validation_sources = str(web), {"web": str(web.parent / "held")}
        assert self.refused(data).field == "data.validation_sources.web"
        data.validation_sources, data.validation_fraction = {}, 0.1
        assert self.refused(data, 20).why.startswith("the validation part of web has 10 tokens")


def test_an_id_without_an_embedding_is_refused_when_it_is_read(tmp_path: Path) -> None:
    ids = np.zeros(3_000_000, np.uint16)
    ids[1_000_003] = 60_000  # between two stretches that are checked before ranks start
    write_documents(tmp_path / "web", [ids])
    run = run_with(tokens(tmp_path / "web", fraction=0.1), 8192)
    check_data(run)
    samples = open_data(run).train[ONLY]
    with pytest.raises(ConfigError, match="token id 60000 at token 1000003"):
        samples.take(np.arange(len(samples)))


def test_check_ids_counts_tokens_from_the_beginning_of_the_file() -> None:
    stretch = Stretch(np.array([1, 2, 9, 3]), "a.bin", first=100)
    check_ids(stretch.tokens, 10, stretch)
    with pytest.raises(ConfigError, match=r"a\.bin has token id 9 at token 102"):
        check_ids(stretch.tokens, 9, stretch)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "int32", "int64"])
def test_every_integer_dtype_is_read_as_int64(dtype: str, tmp_path: Path) -> None:
    ids: npt.NDArray[Any] = np.arange(100).astype(dtype)
    write_documents(tmp_path / "web", [ids])
    taken = open_data(run_with(tokens(tmp_path / "web"), 3)).validation[ONLY].take(np.arange(2))
    assert taken.dtype == np.int64
    assert taken.tolist() == [[75, 76, 77, 78], [78, 79, 80, 81]]
