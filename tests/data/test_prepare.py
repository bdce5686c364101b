"""`launcher prepare` with every file format, with bad lines, and after interruptions."""

import bz2
import gzip
import json
import lzma
import os
import re
import resource
import shlex
import signal
import struct
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

import launcher.data.preparation
from launcher.config.errors import ConfigError
from launcher.config.schema import BadLines, EndInText, PrepareConfig, TokenizerTraining
from launcher.data import parquet_pages, reading
from launcher.data.dataset_card import card_path, tokenizer_path
from launcher.data.preparation import Preparation, PrepareProgress, bad_lines_path, find_inputs
from launcher.data.reading import Place, batches, format_of
from launcher.data.token_file import bin_path, index_path, open_token_file
from launcher.data.tokenizer import Bytes, HuggingFace, pieces, write_byte_tokenizer
from tests.config.test_cli import ENVIRONMENT
from tests.forked_commands import Command, light

TEXTS = ["Ein Satz.\n", "naïve café — 漢字 🙂", "x", 'quotes " and \\ and \ttabs\n\n', "zwei\nZeilen"]


TEXT_CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\r\0\ufeff")


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode()


def prepared(sources: Path | list[Path], target: Path, workers: int = 1, **changes: Any) -> PrepareProgress:
    """Run a preparation with `changes` to PrepareConfig; `tokenizer__path` changes its tokenizer.path."""
    config = PrepareConfig(workers=workers)
    for name, value in changes.items():
        section, _, inner = name.rpartition("__")
        setattr(config.tokenizer if section else config, inner, value)
    inputs, _ = find_inputs([sources] if isinstance(sources, Path) else sources)
    return Preparation(inputs, target, config, workers).run(lambda progress, done: None)


def texts_in(target: Path) -> list[str]:
    """Return the texts of a file of byte tokens, without the tokens that end the documents."""
    file = open_token_file(target)
    documents = [bytes(file.document(n).tolist()) for n in range(file.num_documents)]
    assert all(document.endswith(b"\0") for document in documents)
    return [document[:-1].decode() for document in documents]


def files_of(target: Path) -> dict[str, bytes]:
    return {
        path.name.removeprefix(target.name): path.read_bytes()
        for path in target.parent.glob(f"{target.name}.*")
    }


@pytest.fixture
def bpe(tmp_path: Path) -> Path:
    (tmp_path / "for_bpe.jsonl").write_bytes(jsonl(["the cat sat on the mat, the rat ate the cat " * 40]))
    prepared(tmp_path / "for_bpe.jsonl", tmp_path / "bpe", tokenizer__train=TokenizerTraining.bpe, vocab=270)
    return tokenizer_path(tmp_path / "bpe")


class TestFormats:
    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("a.jsonl", jsonl(TEXTS), TEXTS),
            ("a.ndjson", jsonl(TEXTS), TEXTS),
            ("a.json", jsonl(TEXTS), TEXTS),
            ("a.jsonl", jsonl(TEXTS).rstrip(b"\n"), TEXTS),  # no newline at the end
            ("a.jsonl", jsonl(TEXTS).replace(b"\n", b"\r\n"), TEXTS),
            (
                "a.jsonl",
                jsonl(["a"]) + b"\n  \n" + jsonl(["", "b"]),
                ["a", "b"],
            ),  # an empty text is not a document
            ("a.jsonl.gz", gzip.compress(jsonl(TEXTS), mtime=0), TEXTS),
            (
                "a.jsonl.gz",
                gzip.compress(jsonl(TEXTS), mtime=0) + gzip.compress(jsonl(TEXTS), mtime=0),
                TEXTS * 2,
            ),
            ("a.jsonl.zst", zstandard.compress(jsonl(TEXTS)), TEXTS),
            ("a.JSONL.ZST", zstandard.compress(jsonl(TEXTS)) + zstandard.compress(jsonl(TEXTS)), TEXTS * 2),
            ("a.txt", "".join(TEXTS).encode(), ["".join(TEXTS)]),
            ("a.txt.gz", gzip.compress(TEXTS[1].encode(), mtime=0), [TEXTS[1]]),
            ("a.txt.zst", zstandard.compress(TEXTS[1].encode()), [TEXTS[1]]),
        ],
    )
    def test_is_read(self, name: str, content: bytes, expected: list[str], tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(content)
        prepared(tmp_path / name, tmp_path / "out")
        assert texts_in(tmp_path / "out") == expected

    def test_parquet_over_many_row_groups(self, tmp_path: Path) -> None:
        texts = [f"row {n}" for n in range(500)]
        table = pyarrow.table({"id": range(500), "text": texts})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=77)
        prepared(tmp_path / "a.parquet", tmp_path / "out")
        assert texts_in(tmp_path / "out") == texts

    def test_text_field_selects_the_field(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"content": "x", "text": "y"}\n')
        prepared(tmp_path / "a.jsonl", tmp_path / "out", text_field="content")
        assert texts_in(tmp_path / "out") == ["x"]

    def test_a_directory_is_read_in_the_order_of_file_names(self, tmp_path: Path) -> None:
        for name in ("c/z.jsonl", "b.jsonl", "c/a/x.jsonl"):
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / name).write_bytes(jsonl([name]))
        (tmp_path / "in" / "README.md").write_text("not text to prepare")
        assert find_inputs([tmp_path / "in"])[1]["of other formats"] == 1
        prepared(tmp_path / "in", tmp_path / "out")
        assert texts_in(tmp_path / "out") == ["b.jsonl", "c/a/x.jsonl", "c/z.jsonl"]

    def test_several_sources_are_read_in_the_given_order(self, tmp_path: Path) -> None:
        for name in "ab":
            (tmp_path / f"{name}.jsonl").write_bytes(jsonl([name]))
        prepared([tmp_path / "b.jsonl", tmp_path / "a.jsonl"], tmp_path / "out")
        assert texts_in(tmp_path / "out") == ["b", "a"]

    @pytest.mark.parametrize("name", ["a", "a.md", "a.gz", "a.parquet.gz", ".txt.md", "a.tar.zst"])
    def test_other_endings_are_unknown(self, name: str) -> None:
        assert format_of(Path(name)) is None

    @given(
        text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0\ufeff"), max_size=300)
    )
    @settings(max_examples=60)
    def test_a_text_of_many_pieces_is_one_document(
        self, text: str, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """The ends of batches and pieces fall inside lines and characters."""
        folder = tmp_path_factory.mktemp("x")
        (folder / "a.txt").write_text(text, newline="")
        if not text:
            return
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(reading, "BATCH_BYTES", 7)
            patched.setattr("launcher.data.tokenise._PIECE", 3)
            prepared(folder / "a.txt", folder / "out")
        assert texts_in(folder / "out") == [text]

    def test_a_text_too_long_for_the_index_becomes_several(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(launcher.data.preparation, "_LONGEST", 20)
        monkeypatch.setattr(reading, "BATCH_BYTES", 8)
        (tmp_path / "a.txt").write_text("0123456\n" * 7)
        prepared(tmp_path / "a.txt", tmp_path / "out")
        assert [len(text) for text in texts_in(tmp_path / "out")] == [24, 24, 8]

    @given(text=st.text(max_size=60), most=st.integers(2, 20))
    def test_pieces_join_to_the_text(self, text: str, most: int) -> None:
        cut = list(pieces(text, most))
        assert "".join(cut) == text
        assert all(len(piece) <= most for piece in cut)


class TestTokenizers:
    def test_bpe_trained_on_the_text_encodes_and_decodes_it(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS * 30))
        prepared(tmp_path / "a.jsonl", tmp_path / "out", tokenizer__train=TokenizerTraining.bpe, vocab=300)
        file = open_token_file(tmp_path / "out")
        tokenizer = HuggingFace(tokenizer_path(tmp_path / "out"), field="x")
        card = json.loads(card_path(tmp_path / "out").read_text())
        assert (card["vocab_size"], card["end_of_document"]) == (300, tokenizer.end_of_document) == (300, 0)
        assert file.tokens.dtype == "uint16"
        documents = [file.document(n).tolist() for n in range(file.num_documents)]
        assert [tokenizer.decode(document[:-1]) for document in documents] == TEXTS * 30
        assert all(document[-1] == tokenizer.end_of_document for document in documents)
        assert len(file.tokens) < len("".join(TEXTS * 30).encode()) / 1.3

    def test_bpe_training_is_deterministic(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(
            jsonl([f"{n} {n * n} words and words {n % 7}" for n in range(400)])
        )
        for name in ("first", "second"):
            prepared(tmp_path / "a.jsonl", tmp_path / name, tokenizer__train=TokenizerTraining.bpe, vocab=400)
        assert files_of(tmp_path / "first") == {
            name: content.replace(b"second.tokenizer", b"first.tokenizer")
            for name, content in files_of(tmp_path / "second").items()
        }

    def test_bpe_is_trained_on_an_equal_share_of_every_file(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.jsonl").write_bytes(jsonl(["aaaa bbbb " * 10] * 2000))
        (tmp_path / "in" / "z.jsonl").write_bytes(jsonl(["zebra zebra " * 10] * 2000))
        prepared(
            tmp_path / "in", tmp_path / "out", tokenizer__train=TokenizerTraining.bpe, vocab=265,
            tokenizer__train_mb=0.01,
        )  # fmt: skip
        merged = json.loads(tokenizer_path(tmp_path / "out").read_text())["model"]["merges"]
        assert ["zebr", "a"] in merged

    def test_a_vocabulary_too_large_for_the_text_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(jsonl(["abab"]))
        with pytest.raises(ConfigError) as raised:
            prepared(
                tmp_path / "a.jsonl", tmp_path / "out", tokenizer__train=TokenizerTraining.bpe, vocab=999
            )
        assert raised.value.field == "vocab"
        fits = int(raised.value.remedy.partition("=")[2].partition(",")[0])
        prepared(tmp_path / "a.jsonl", tmp_path / "out", tokenizer__train=TokenizerTraining.bpe, vocab=fits)

    def test_text_that_spells_a_special_token_stays_text(self, bpe: Path, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(jsonl(["the <|endoftext|> cat", "rat"]))
        prepared(tmp_path / "a.jsonl", tmp_path / "out", tokenizer__path=str(bpe))
        file = open_token_file(tmp_path / "out")
        assert file.num_documents == 2
        assert (file.tokens == 0).sum() == 2
        tokenizer = HuggingFace(bpe, field="x")
        assert tokenizer.decode(file.document(0).tolist()[:-1]) == "the <|endoftext|> cat"

    def test_added_special_tokens_and_truncation_are_ignored(self, bpe: Path, tmp_path: Path) -> None:
        """Llama's tokenizer adds a token before each text, and BERT's truncates at 512 tokens."""
        changed = json.loads(bpe.read_text())
        changed["truncation"] = {
            "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
        }  # fmt: skip
        end, text = "<|endoftext|>", {"Sequence": {"id": "A", "type_id": 0}}
        changed["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": end, "type_id": 0}}, text],
            "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {end: {"id": end, "ids": [0], "tokens": [end]}},
        }
        (tmp_path / "changed.json").write_text(json.dumps(changed))
        (tmp_path / "a.jsonl").write_bytes(jsonl(["the cat sat on the mat"]))
        for name, path in (("plain", bpe), ("changed", tmp_path / "changed.json")):
            prepared(tmp_path / "a.jsonl", tmp_path / name, tokenizer__path=str(path))
        assert bin_path(tmp_path / "plain").read_bytes() == bin_path(tmp_path / "changed").read_bytes()

    @pytest.mark.parametrize("content", ["", "{", "{}", "[1]", None])
    def test_an_unreadable_tokenizer_is_refused(self, content: str | None, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(jsonl(["a"]))
        if content is not None:
            (tmp_path / "t.json").write_text(content)
        with pytest.raises(ConfigError, match="cannot be read") as raised:
            prepared(tmp_path / "a.jsonl", tmp_path / "out", tokenizer__path=str(tmp_path / "t.json"))
        assert (raised.value.field, raised.value.value) == ("tokenizer.path", tmp_path / "t.json")
        assert not (tmp_path / "out.partial").exists()

    @pytest.mark.parametrize("end", [None, "</s>"])
    def test_a_tokenizer_without_an_end_token_is_refused(
        self, end: str | None, bpe: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "t.json").write_text(bpe.read_text().replace("<|endoftext|>", "THE-END"))
        (tmp_path / "a.jsonl").write_bytes(jsonl(["a"]))
        path = str(tmp_path / "t.json")
        with pytest.raises(ConfigError, match=r"t\.json: this tokenizer has no"):
            prepared(
                tmp_path / "a.jsonl", tmp_path / "out", tokenizer__path=path, tokenizer__end_of_document=end
            )
        prepared(
            tmp_path / "a.jsonl", tmp_path / "out", tokenizer__path=path, tokenizer__end_of_document="THE-END"
        )

    def test_bytes_decode_to_the_encoded_text(self) -> None:
        [ids] = Bytes().encode([TEXTS[1]])
        assert Bytes().decode(ids.tolist()) == TEXTS[1]

    def test_the_byte_tokenizer_json_gives_the_same_tokens(self, tmp_path: Path) -> None:
        write_byte_tokenizer(tmp_path / "t.json")
        tokenizer = HuggingFace(tmp_path / "t.json", field="x")
        assert tokenizer.vocab_size == 256
        texts = ["".join(map(chr, range(0x300))), *TEXTS]
        for expected, ids in zip(Bytes().encode(texts), tokenizer.encode(texts), strict=True):
            assert ids.tolist() == expected.tolist()
            assert tokenizer.decode(expected.tolist()) == Bytes().decode(expected.tolist())


def added_token(path: Path, spelling: str, **changes: Any) -> Path:
    """Write a byte-level tokenizer to which `spelling` was added without marking it as special."""
    from tokenizers import AddedToken, Tokenizer

    write_byte_tokenizer(path)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens([AddedToken(spelling, special=False, **changes)])
    tokenizer.save(str(path))
    return path


def word_tokenizer(path: Path) -> Path:
    """Write a tokenizer whose model itself contains the end token: no setting turns the token off."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"one": 0, "two": 1, "</s>": 2, "?": 3}
    tokenizer = Tokenizer(models.WordLevel(words, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path))
    return path


class TestTextThatSpellsTheEnd:
    """No text becomes the end of a document, unless end_of_document_in_text=count."""

    def ends(self, target: Path) -> list[int]:
        """Return the ids of the documents; check that only their last token is the end token."""
        file, card = open_token_file(target), json.loads(card_path(target).read_text())
        documents = [file.document(n).tolist() for n in range(file.num_documents)]
        assert card["documents"] == len(documents)
        assert all(document.count(card["end_of_document"]) == 1 for document in documents)
        assert all(document[-1] == card["end_of_document"] for document in documents)
        return [len(document) for document in documents]

    @pytest.mark.parametrize("normalized", [False, True])
    @pytest.mark.parametrize("spelling", ["<|endoftext|>", "</s>", "<|im_end|>"])
    @pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
    def test_an_added_token_is_encoded_as_text(
        self, name: str, spelling: str, normalized: bool, tmp_path: Path
    ) -> None:
        tokenizer = added_token(tmp_path / "t.json", spelling, normalized=normalized)
        texts = [f"a{spelling}b", spelling, "c"] if name != "a.txt" else [f"a{spelling}b\n{spelling}"]
        if name == "a.parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / name)
        else:
            (tmp_path / name).write_bytes(jsonl(texts) if name == "a.jsonl" else texts[0].encode())
        progress = prepared(tmp_path / name, tmp_path / "out", tokenizer__path=str(tokenizer))
        assert self.ends(tmp_path / "out") == [len(text) + 1 for text in texts]
        assert progress.spelled == 2
        loaded, file = HuggingFace(tokenizer, field="x"), open_token_file(tmp_path / "out")
        assert [loaded.decode(file.document(n).tolist()[:-1]) for n in range(len(texts))] == texts

    @pytest.mark.parametrize(
        ("name", "content", "line", "kept"),
        [
            ("a.jsonl", jsonl(["one", "x\0y", "two"]), 2, 2),
            ("a.txt", b"one\ntwo\nx\0y\n", 3, 1),
            ("a.txt", "one\n".encode("utf-16-le"), 1, None),
        ],
    )
    def test_a_zero_byte_is_refused_where_tokens_are_bytes(
        self, name: str, content: bytes, line: int, kept: int | None, tmp_path: Path
    ) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            ConfigError, match=rf"{name}:{line} spells the token that ends documents"
        ) as raised:
            prepared(tmp_path / name, tmp_path / "out")
        assert raised.value.field == "end_of_document_in_text"
        if kept is not None:
            progress = prepared(tmp_path / name, tmp_path / "out", bad_lines=BadLines.skip)
            assert progress.bad == {"spells the token that ends documents": 1}
            assert len(self.ends(tmp_path / "out")) == kept

    @pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
    def test_a_tokenizer_that_cannot_encode_it_as_text_refuses_the_line(
        self, name: str, tmp_path: Path
    ) -> None:
        tokenizer = str(word_tokenizer(tmp_path / "t.json"))
        lines = ["one\n", "two </s> one\n", "two\n"]
        (tmp_path / name).write_bytes(jsonl(lines) if name == "a.jsonl" else "".join(lines).encode())
        with pytest.raises(ConfigError, match=rf"{name}:2 spells .* cannot encode the text without it"):
            prepared(tmp_path / name, tmp_path / "out", tokenizer__path=tokenizer)
        prepared(tmp_path / name, tmp_path / "out", tokenizer__path=tokenizer, bad_lines=BadLines.skip)
        assert self.ends(tmp_path / "out") == ([2, 2] if name == "a.jsonl" else [3])

    def test_refuse_refuses_what_could_be_encoded(self, tmp_path: Path) -> None:
        tokenizer = str(added_token(tmp_path / "t.json", "<eos>"))
        (tmp_path / "a.jsonl").write_bytes(jsonl(["one", "a <eos> b"]))
        refuse = {"tokenizer__path": tokenizer, "end_of_document_in_text": EndInText.refuse}
        with pytest.raises(ConfigError, match=r"a.jsonl:2 spells the token .*, '<eos>'") as raised:
            prepared(tmp_path / "a.jsonl", tmp_path / "out", **refuse)
        assert "end_of_document_in_text=escape" in raised.value.remedy
        prepared(tmp_path / "a.jsonl", tmp_path / "out", tokenizer__path=tokenizer)
        assert self.ends(tmp_path / "out") == [4, 10]

    @pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
    @pytest.mark.parametrize("kind", ["bytes", "added", "words"])
    def test_count_ends_documents_there(
        self, kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(reading, "BATCH_BYTES", 12)  # each line of the text is a batch of its own
        settings: dict[str, Any] = {"end_of_document_in_text": EndInText.count}
        if kind == "added":
            settings["tokenizer__path"] = str(added_token(tmp_path / "t.json", "<eos>"))
        if kind == "words":
            settings["tokenizer__path"] = str(word_tokenizer(tmp_path / "t.json"))
        spelling = {"bytes": "\0", "added": "<eos>", "words": "</s>"}[kind]
        text = f"{spelling}one\n{spelling}two\n{spelling}{spelling}\none two one\ntwo"
        (tmp_path / name).write_bytes(jsonl([text]) if name == "a.jsonl" else text.encode())
        progress = prepared(tmp_path / name, tmp_path / "out", **settings)
        assert progress.spelled == 4
        assert len(self.ends(tmp_path / "out")) == 3
        if kind == "bytes":
            assert texts_in(tmp_path / "out") == ["one\n", "two\n", "\none two one\ntwo"]


class TestEncodings:
    """A byte order mark is no text, and decides the encoding."""

    @pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
    @pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json"])
    def test_the_mark_is_not_text(
        self, name: str, encoding: str, pack: Callable[[bytes], bytes], tmp_path: Path
    ) -> None:
        texts = ["naïve 漢字 🙂", "zwei"] if name != "a.txt" else ["naïve 漢字 🙂\r\nzwei"]
        content = jsonl(texts).decode() if name == "a.jsonl" else texts[0]
        if name == "a.json":
            content = json.dumps([{"text": text} for text in texts], indent=1)
        (tmp_path / name).write_bytes(pack(content.encode(encoding)))
        prepared(tmp_path / name, tmp_path / "out", json_arrays=True)
        assert texts_in(tmp_path / "out") == texts

    def test_a_mark_in_the_middle(self, tmp_path: Path) -> None:
        """Files with marks that were joined, and texts that were read with their file's mark."""
        mark = "\ufeff".encode()
        (tmp_path / "a.jsonl").write_bytes(mark + jsonl(["one"]) + mark + jsonl(["\ufefftwo"]))
        pyarrow.parquet.write_table(pyarrow.table({"text": ["\ufeffthree"]}), tmp_path / "b.parquet")
        prepared([tmp_path / "a.jsonl", tmp_path / "b.parquet"], tmp_path / "out")
        assert texts_in(tmp_path / "out") == ["one", "two", "three"]

    def test_half_a_character_of_utf_16_is_damage(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes("one".encode("utf-16") + b"x")
        with pytest.raises(ConfigError, match=r"a\.txt:1 is damaged: .*utf-16"):
            prepared(tmp_path / "a.txt", tmp_path / "out")

    def test_a_position_after_the_mark_is_found_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(reading, "BATCH_BYTES", 40)
        monkeypatch.setattr(launcher.data.preparation, "_SAVE_INTERVAL", 0.0)
        (tmp_path / "in").mkdir()
        for number, encoding in enumerate(("utf-8-sig", "utf-16", "utf-32")):
            content = jsonl([f"{encoding} ü {n}" for n in range(9)]).decode()
            (tmp_path / "in" / f"{number}.jsonl").write_bytes(content.encode(encoding))
        expected = [f"{encoding} ü {n}" for encoding in ("utf-8-sig", "utf-16", "utf-32") for n in range(9)]
        assert interrupted(tmp_path / "in", tmp_path / "out", every=2) > 5
        assert texts_in(tmp_path / "out") == expected


def interrupted(source: Path, target: Path, every: int, **changes: Any) -> int:
    """Prepare with an interruption after `every` batches; return the number of starts."""
    starts, config = 0, PrepareConfig()
    for name, value in changes.items():
        setattr(config, name, value)
    inputs, _ = find_inputs([source])
    while True:
        starts, left = starts + 1, every

        def stop(progress: PrepareProgress, done: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt

        try:
            Preparation(inputs, target, config, 1).run(stop)
        except KeyboardInterrupt:
            continue
        return starts


class TestJsonArrays:
    CONTENT = json.dumps(
        [{"text": "one"}, {"id": 2, "text": "two\n[x], {y}"}, {"text": ""}], indent=2
    ).encode()

    @pytest.mark.parametrize(
        "content",
        [
            CONTENT,
            json.dumps(json.loads(CONTENT)).encode(),
            b"\n" + CONTENT + b"\n\n",
            b"".join(json.dumps(document, indent=4).encode() + b"\n" for document in json.loads(CONTENT)),
            b"[" + CONTENT + b"]",  # arrays in an array, as pages of an API are joined
        ],
    )
    @pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
    def test_are_refused_by_name_and_read_by_the_remedy(
        self, name: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        for bad_lines in BadLines:
            with pytest.raises(ConfigError, match="JSON array or an object over several lines") as raised:
                prepared(tmp_path / name, tmp_path / "out", bad_lines=bad_lines)
            assert raised.value.remedy.startswith("json_arrays=true")
        monkeypatch.setattr(reading, "BATCH_BYTES", 16)
        prepared(tmp_path / name, tmp_path / "out", json_arrays=True)
        assert texts_in(tmp_path / "out") == ["one", "two\n[x], {y}"]

    @pytest.mark.parametrize("every", [1, 2])
    def test_continue_after_an_interruption(
        self, every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(reading, "BATCH_BYTES", 30)
        monkeypatch.setattr(launcher.data.preparation, "_SAVE_INTERVAL", 0.0)
        texts = [f"text ü {n}" for n in range(12)]
        (tmp_path / "a.json").write_text(json.dumps([{"text": text} for text in texts], indent=1))
        assert interrupted(tmp_path / "a.json", tmp_path / "out", every, json_arrays=True) > 3
        assert texts_in(tmp_path / "out") == texts

    @pytest.mark.parametrize(
        ("content", "line", "why"),
        [
            (b'[\n{"text": "one"},\n{"text": "two"}', 3, "ends before its JSON array is closed"),
            (b'[\n{"text": "one"},\n{"text": ', 3, "a JSON value is not valid"),
            (b'[\n{"text": "one"},\n{"id": 3}\n]', 3, "has no 'text'"),
            (b'[\n{"text": "one"},\n{"text": "\xff"}\n]', 3, "is not UTF-8"),
            (b'[\n{"text": "one"},\n3\n]', 3, "is JSON but not an object"),
        ],
    )
    def test_damage_is_reported_with_its_line(
        self, content: bytes, line: int, why: str, tmp_path: Path
    ) -> None:
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(ConfigError, match=rf"a\.json:{line} .*{why}"):
            prepared(tmp_path / "a.json", tmp_path / "out", json_arrays=True)

    def test_lines_that_begin_with_an_array_are_still_lines(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(b'["a", "header"]\n' + jsonl(["one"]))
        with pytest.raises(ConfigError, match=r"a\.jsonl:1 is JSON but not an object"):
            prepared(tmp_path / "a.jsonl", tmp_path / "out")


class TestTextField:
    CHAT: ClassVar[dict[str, Any]] = {
        "id": 7,
        "message": {"content": "inner", "author": {"name": "me"}},
        "turns": [{"role": "user", "content": "hi"}, {"role": "model", "content": "ho"}],
        "lines": ["x", "y"],
        "a.b": "dotted",
        "my text": "spaced",
        "none": None,
    }

    @pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
    @pytest.mark.parametrize(
        ("field", "expected"),
        [
            ("message.content", "inner"),
            ("message.author.name", "me"),
            ("turns.*.content", "hi\nho"),
            ("lines.*", "x\ny"),
            ("a.b", "dotted"),
            ("my text", "spaced"),
        ],
    )
    def test_names_a_nested_field(self, name: str, field: str, expected: str, tmp_path: Path) -> None:
        self.write(tmp_path / name)
        prepared(tmp_path / name, tmp_path / "out", text_field=field)
        assert texts_in(tmp_path / "out") == [expected]

    def write(self, path: Path) -> None:
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([self.CHAT]), path)
        else:
            path.write_text(json.dumps(self.CHAT) + "\n")

    @pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
    @pytest.mark.parametrize(
        ("field", "why", "remedy"),
        [
            ("txt", "'txt'; its ", "text_field=message.content or text_field=message.author.name or "),
            ("message", "has no text in 'message' but an object", "text_field=message.content or "),
            ("lines", "has no text in 'lines' but a list", "'text_field=\"lines.*\"'"),
            ("turns.content", "has no 'turns.content'", "'text_field=\"turns.*.content\"' or "),
            ("id", "has no text in 'id' but a number", "text_field=message.content or "),
        ],
    )
    def test_a_wrong_field_suggests_those_that_contain_text(
        self, name: str, field: str, why: str, remedy: str, tmp_path: Path
    ) -> None:
        self.write(tmp_path / name)
        with pytest.raises(ConfigError) as raised:
            prepared(tmp_path / name, tmp_path / "out", text_field=field)
        assert why in raised.value.why
        assert raised.value.remedy.startswith(remedy)
        assert "bad_lines" not in raised.value.remedy
        for typed in shlex.split(raised.value.remedy):
            if typed == "or":
                continue
            override = OverridesParser.create().parse_override(typed)
            prepared(tmp_path / name, tmp_path / "fixed", text_field=str(override.value()))
            index_path(tmp_path / "fixed").unlink()
        # Leaving out every line is no way to continue.
        with pytest.raises(ConfigError, match="no file contains any text") as raised:
            prepared(tmp_path / name, tmp_path / "out", text_field=field, bad_lines=BadLines.skip)
        assert raised.value.remedy.startswith(remedy)

    def test_a_null_is_not_a_missing_field(self, tmp_path: Path) -> None:
        self.write(tmp_path / "a.jsonl")
        with pytest.raises(ConfigError, match=r"a\.jsonl:1 has no text in 'none' but null"):
            prepared(tmp_path / "a.jsonl", tmp_path / "out", text_field="none")

    @pytest.mark.parametrize(
        "column",
        [
            pyarrow.array(["one", "two"], pyarrow.large_string()).dictionary_encode(),
            pyarrow.array([b"one", b"two"]),
            pyarrow.array(["one", "two"], pyarrow.large_string()),
        ],
    )
    def test_columns_of_other_text_types(self, column: Any, tmp_path: Path) -> None:
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
        prepared(tmp_path / "a.parquet", tmp_path / "out")
        assert texts_in(tmp_path / "out") == ["one", "two"]


class TestCompression:
    SKIPPABLE = struct.pack("<II", 0x184D2A50, 5) + b"abcde"

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.jsonl.gz", jsonl(TEXTS)),  # decompressed by the program that fetched the file
            ("a.jsonl", gzip.compress(jsonl(TEXTS))),
            ("a.jsonl", zstandard.compress(jsonl(TEXTS))),
            ("a.jsonl.gz", zstandard.compress(jsonl(TEXTS))),
            ("a.txt.zst", gzip.compress("".join(TEXTS).encode())),
            ("a.jsonl.zst", SKIPPABLE + zstandard.compress(jsonl(TEXTS)) + SKIPPABLE),
            ("a.jsonl.gz", b"".join(map(gzip.compress, (jsonl(TEXTS[:2]), b"", jsonl(TEXTS[2:]))))),
            ("a.jsonl.gz", gzip.compress(jsonl(TEXTS)) + bytes(512)),  # padded, as by tape programs
        ],
        ids=["plain", "gz", "zst", "zst as gz", "gz as zst", "skippable", "members", "padded"],
    )  # fmt: skip
    def test_is_recognised_by_the_content(self, name: str, content: bytes, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(content)
        prepared(tmp_path / name, tmp_path / "out")
        assert "".join(texts_in(tmp_path / "out")) == "".join(TEXTS)

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            (bz2.compress(jsonl(TEXTS)), "is compressed with bzip2"),
            (lzma.compress(jsonl(TEXTS)), "is compressed with xz"),
            (b"PK\x03\x04 and so on", "is compressed with zip"),
            (gzip.compress(jsonl(TEXTS)) + b"more", "is damaged"),
            (zstandard.compress(jsonl(TEXTS)) + b"more", "is damaged"),
        ],
    )
    def test_others_are_refused_by_name(self, content: bytes, why: str, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(content)
        with pytest.raises(ConfigError, match=f"a.jsonl:.*{why}"):
            prepared(tmp_path / "a.jsonl", tmp_path / "out")


class TestBadLines:
    """A bad line is reported by file and line. It ends the preparation, or it is left out and listed."""

    GOOD = jsonl(["before"])

    @pytest.mark.parametrize(
        ("name", "content", "line", "why"),
        [
            ("a.jsonl", GOOD + b"{oops\n" + GOOD, 2, "is not JSON"),
            ("a.jsonl", GOOD + b'"text"\n', 2, "is JSON but not an object"),
            ("a.jsonl", GOOD + b'{"content": "x", "id": 1}\n', 2, "has no 'text'; its fields are: content"),
            ("a.jsonl", GOOD + b'{"text": 3}\n', 2, "has no text in 'text' but a number"),
            ("a.jsonl", GOOD * 2 + b'{"text": "\xff"}\n', 3, "is not UTF-8: byte 10 is 0xff"),
            ("a.jsonl", GOOD + b'{"text": "\\ud83d"}\n', 2, "contains half a character"),
            ("a.jsonl", GOOD + b'{"text": "cut sho', 2, "is not JSON"),
            ("a.jsonl", GOOD + b"[" * 1900 + b"\n", 2, "is not JSON"),
            ("a.jsonl", GOOD + jsonl(["y" * 3000]) + GOOD, 2, "is longer than max_line_mb=0.002"),
            ("a.jsonl.gz", gzip.compress(GOOD * 999, mtime=0)[:-12], None, "is damaged: Compressed file"),
            ("a.jsonl.gz", b"no gzip", 1, "is not JSON"),
            ("a.jsonl.gz", b"", None, ""),
            ("a.jsonl.zst", zstandard.compress(GOOD * 999)[:-5], None, "is damaged: the file ends in"),
            ("a.jsonl.zst", b"no zstd at all", 1, "is not JSON"),
            ("a.txt", b"fine\nb\xc3\n\xffd\n", 2, "is not UTF-8: byte 1 is 0xc3"),
            ("a.txt.gz", gzip.compress(b"fine\n" * 99, mtime=0)[:-9], None, "is damaged"),
            ("a.parquet", b"PAR1 it is not", 1, "is damaged"),
            ("a.parquet", b"", None, ""),
        ],
    )  # fmt: skip
    def test_are_reported(
        self, name: str, content: bytes, line: int | None, why: str, tmp_path: Path
    ) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / name).write_bytes(content)
        (tmp_path / "in" / "z.jsonl").write_bytes(jsonl(["after"]))
        options = {"max_line_mb": 0.002}
        if why:
            with pytest.raises(ConfigError) as raised:
                prepared(tmp_path / "in", tmp_path / "out", **options)
            assert raised.value.field == ("text_field" if "its fields are" in why else "bad_lines")
            assert ("text_field=content" in raised.value.remedy) == ("its fields are" in why)
            where, _, reason = raised.value.why.partition(" ")
            assert where.startswith(f"{tmp_path / 'in' / name}:{'' if line is None else line}")
            assert reason.startswith(why)
            assert "bad_lines=skip" in raised.value.remedy
        assert not index_path(tmp_path / "out").exists()
        assert not bin_path(tmp_path / "out").exists()
        progress = prepared(tmp_path / "in", tmp_path / "out", bad_lines=BadLines.skip, **options)
        assert texts_in(tmp_path / "out")[-1] == "after"
        assert (progress.bad_lines > 0) == bool(why) == bad_lines_path(tmp_path / "out").exists()
        if why:
            listed = bad_lines_path(tmp_path / "out").read_text().splitlines()
            assert len(listed) == progress.bad_lines
            assert listed[0].startswith(f"{tmp_path / 'in' / name}:")
            assert why in listed[0]

    def test_the_other_lines_of_a_plain_text_are_kept(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"one\ntw\xff\nthree\n")
        prepared(tmp_path / "a.txt", tmp_path / "out", bad_lines=BadLines.skip)
        assert texts_in(tmp_path / "out") == ["one\nthree\n"]

    def test_a_parquet_file_without_the_column_or_with_nulls(self, tmp_path: Path) -> None:
        pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "a.parquet")
        with pytest.raises(ConfigError, match=r"a.parquet:1 has no column 'text'; its columns are body"):
            prepared(tmp_path / "a.parquet", tmp_path / "out")
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "c"]}), tmp_path / "b.parquet")
        with pytest.raises(ConfigError, match=r"b.parquet:2 has no text in 'text' but null"):
            prepared(tmp_path / "b.parquet", tmp_path / "out")
        prepared(tmp_path / "b.parquet", tmp_path / "out", bad_lines=BadLines.skip)
        assert texts_in(tmp_path / "out") == ["a", "c"]

    def test_a_file_without_read_permission(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a.jsonl").write_bytes(jsonl(["a"]))
        opened = Path.open

        def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
            if path.name == "a.jsonl":
                raise PermissionError(13, "Permission denied", str(path))
            return opened(path, *arguments, **options)

        monkeypatch.setattr(Path, "open", refuse)  # root may read a file of any mode
        with pytest.raises(ConfigError, match=r"a.jsonl:1 cannot be read: Permission denied"):
            prepared(tmp_path / "a.jsonl", tmp_path / "out")

    def test_skip_continues_after_a_failure(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.jsonl").write_bytes(jsonl(["a"]))
        (tmp_path / "in" / "b.jsonl").write_bytes(b"{\n" + jsonl(["b"]))
        with pytest.raises(ConfigError):
            prepared(tmp_path / "in", tmp_path / "out")
        journal = json.loads((tmp_path / "out.partial" / "journal.json").read_text())["progress"]
        assert (journal["documents"], journal["place"]["file"]) == (1, 1)
        prepared(tmp_path / "in", tmp_path / "out", bad_lines=BadLines.skip)
        assert texts_in(tmp_path / "out") == ["a", "b"]

    @pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": ""}\n'])
    def test_input_without_text_is_refused_and_no_files_are_left(
        self, content: bytes, tmp_path: Path
    ) -> None:
        (tmp_path / "a.jsonl").write_bytes(content)
        why = "no file contains any text" if content else "all files are empty"
        with pytest.raises(ConfigError, match=why):
            prepared(tmp_path / "a.jsonl", tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]

    def test_missing_files_are_refused(self, tmp_path: Path) -> None:
        for source in (tmp_path / "none", tmp_path):
            with pytest.raises(ConfigError) as raised:
                find_inputs([source])
            assert (raised.value.field, raised.value.value) == ("SOURCE", source)

    @pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
    def test_a_line_of_100_megabytes(self, name: str, tmp_path: Path) -> None:
        long = "ab cd " * 17_000_000
        (tmp_path / name).write_bytes(jsonl([long]) if name == "a.jsonl" else long.encode())
        prepared(tmp_path / name, tmp_path / "out")
        assert open_token_file(tmp_path / "out").lengths.tolist() == [len(long) + 1]
        if name == "a.jsonl":
            with pytest.raises(ConfigError, match=r"a.jsonl:1 is longer than max_line_mb=50"):
                prepared(tmp_path / name, tmp_path / "other", max_line_mb=50)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of every format with some bad lines; batches have only a few records."""
    monkeypatch.setattr(reading, "BATCH_BYTES", 300)
    monkeypatch.setattr(parquet_pages, "MOST_ROWS", 3)
    folder = tmp_path / "in"
    folder.mkdir()
    texts = [f"{n}: {text}" * (n % 5 + 1) for n in range(60) for text in TEXTS[:3]]
    (folder / "a.jsonl").write_bytes(jsonl(texts[:60]) + b"{bad\n" + jsonl(texts[60:80]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(texts[80:110])))
    (folder / "c.txt").write_text("\n".join(texts[:70]))
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts[100:140]}), folder / "d.parquet", row_group_size=7
    )
    (folder / "e.jsonl.zst").write_bytes(zstandard.compress(jsonl(texts[140:170])))
    (folder / "f.txt.gz").write_bytes(gzip.compress("\n".join(texts[:50]).encode() + b"\n\xff\n"))
    return folder


SKIP = {"bad_lines": BadLines.skip}


def flip_a_digit(path: Path) -> None:
    other = {"1": "2"}
    path.write_text(re.sub(r'(?<="tokens": )\d', lambda digit: other.get(digit[0], "1"), path.read_text()))


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def become_a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


class TestSameResult:
    def test_for_any_number_of_workers(self, corpus: Path, tmp_path: Path, bpe: Path) -> None:
        (tmp_path / "w").mkdir()
        for workers in (1, 2, 5):
            prepared(corpus, tmp_path / "w" / f"{workers}", workers, tokenizer__path=str(bpe), **SKIP)
        one, two, five = (files_of(tmp_path / "w" / name) for name in "125")
        assert one.keys() == {".bin", ".idx", ".json", ".tokenizer.json", ".bad_lines.txt"}
        assert all(one[name] == two[name] == five[name] for name in one if name != ".json")

    @pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 3])
    def test_after_interruptions_at_any_time(
        self, workers: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(launcher.data.preparation, "_SAVE_INTERVAL", 0.0)
        prepared(corpus, tmp_path / "whole", **SKIP)
        whole = files_of(tmp_path / "whole")
        inputs, _ = find_inputs([corpus])
        starts = 0
        progress = None
        while progress is None:
            starts += 1
            left = 7

            def stop(progress: PrepareProgress, done: int) -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt

            job = Preparation(inputs, tmp_path / "cut", PrepareConfig(bad_lines=BadLines.skip), workers)
            try:
                progress = job.run(stop)
            except KeyboardInterrupt:
                assert not index_path(tmp_path / "cut").exists()
                # Bytes that are written after the last journal are truncated at the restart.
                for name in ("tokens.bin", "lengths.bin", "bad_lines.txt"):
                    with (tmp_path / "cut.partial" / name).open("ab") as file:
                        file.write(b"half a record")
            assert job.note == ("continued an interrupted preparation" if starts > 1 else "")
        assert starts > 5
        assert files_of(tmp_path / "cut") == whole
        assert not (tmp_path / "cut.partial").exists()

    @pytest.mark.parametrize(
        ("name", "damage", "why"),
        [
            ("journal.json", lambda path: path.write_text(""), "journal.json is damaged"),
            ("journal.json", lambda path: path.write_text("[1]"), "journal.json is damaged"),
            ("journal.json", lambda path: path.write_text("[" * 10**5), "journal.json is damaged"),
            ("journal.json", lambda path: path.write_bytes(b"\xff"), "journal.json is damaged"),
            ("journal.json", flip_a_digit, "journal.json does not match its checksum"),
            ("journal.json", become_a_fifo, "journal.json is a FIFO instead of a regular file"),
            (
                "made_of.json",
                lambda path: path.write_text("{"),
                "made_of.json states other files or settings",
            ),
            ("made_of.json", become_a_fifo, "made_of.json states other files or settings"),
            ("tokens.bin", shorten, r"tokens.bin has \d+ of the \d+ bytes that journal.json states"),
            ("tokens.bin", become_a_fifo, "tokens.bin has 0 of the "),
            ("lengths.bin", Path.unlink, "lengths.bin has 0 of the "),
            ("bad_lines.txt", shorten, "bad_lines.txt has "),
            ("tokenizer.json", shorten, None),  # it is written again at each start
        ],
    )
    def test_after_damage_to_an_interrupted_preparation(
        self,
        name: str,
        damage: Callable[[Path], object],
        why: str | None,
        corpus: Path,
        tmp_path: Path,
        bpe: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(launcher.data.preparation, "_SAVE_INTERVAL", 0.0)
        prepared(corpus, tmp_path / "whole", tokenizer__path=str(bpe), **SKIP)
        config = PrepareConfig(bad_lines=BadLines.skip)
        config.tokenizer.path = str(bpe)

        def stop(progress: PrepareProgress, done: int) -> None:
            if progress.bad and progress.place.file > 1:
                raise KeyboardInterrupt

        inputs, _ = find_inputs([corpus])
        with pytest.raises(KeyboardInterrupt):
            Preparation(inputs, tmp_path / "cut", config, 1).run(stop)
        damage(tmp_path / "cut.partial" / name)
        job = Preparation(inputs, tmp_path / "cut", config, 1)
        job.run(lambda *_: None)
        expected = "continued an interrupted" if why is None else f"began anew, because .*cut.partial/{why}"
        assert re.match(expected, job.note), job.note
        assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")

    def test_after_a_kill_while_damaged_work_is_removed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a.jsonl").write_bytes(jsonl(["a"]) + b"{\n")
        with pytest.raises(ConfigError, match="bad_lines"):
            prepared(tmp_path / "a.jsonl", tmp_path / "out")
        (tmp_path / "out.partial" / "journal.json").write_text("")
        unlink, removed = Path.unlink, 0

        def killed(path: Path, missing_ok: bool = False) -> None:
            nonlocal removed
            if path.parent.name == "out.partial" and path.suffix != ".tmp":
                removed += 1
                if removed == stop_at:
                    raise KeyboardInterrupt
            unlink(path, missing_ok)

        monkeypatch.setattr(Path, "unlink", killed)
        for stop_at in (1, 2, 3):
            with pytest.raises(KeyboardInterrupt):
                prepared(tmp_path / "a.jsonl", tmp_path / "out", text_field=str(stop_at), **SKIP)
            removed = 0
        stop_at = 0
        prepared(tmp_path / "a.jsonl", tmp_path / "out", **SKIP)
        assert texts_in(tmp_path / "out") == ["a"]

    def test_a_link_in_the_place_of_an_output_is_not_written_through(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a.jsonl").write_bytes(b"{\n" + jsonl(["a"]))
        (tmp_path / "mine").write_text("mine")
        with pytest.raises(ConfigError, match="bad_lines"):
            prepared(tmp_path / "a.jsonl", tmp_path / "out")
        for name in ("tokens.bin", "bad_lines.txt"):
            (tmp_path / "out.partial" / name).unlink()
            (tmp_path / "out.partial" / name).symlink_to(tmp_path / "mine")
        prepared(tmp_path / "a.jsonl", tmp_path / "out", **SKIP)
        assert (tmp_path / "mine").read_text() == "mine"
        assert texts_in(tmp_path / "out") == ["a"]

    def test_after_an_interruption_between_the_final_renames(
        self, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prepared(corpus, tmp_path / "whole", **SKIP)
        replace_path, renamed = Path.replace, 0
        for stop_at in range(1, 6):  # the list of bad lines, the tokenizer, the card, .bin and .idx
            target = tmp_path / f"cut{stop_at}"

            def stop(path: Path, to: Path, target: Path = target, stop_at: int = stop_at) -> Path:
                nonlocal renamed
                if to.parent == target.parent:
                    renamed += 1
                    if renamed == stop_at:
                        raise KeyboardInterrupt
                return replace_path(path, to)

            renamed = 0
            with monkeypatch.context() as patched:
                patched.setattr(Path, "replace", stop)
                with pytest.raises(KeyboardInterrupt):
                    prepared(corpus, target, **SKIP)
            assert not index_path(target).exists()
            prepared(corpus, target, **SKIP)
            assert files_of(target) == files_of(tmp_path / "whole")

    def test_other_input_or_settings_start_again(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a.jsonl").write_bytes(jsonl(["a"]))
        (tmp_path / "in" / "b.jsonl").write_bytes(b"{\n")
        with pytest.raises(ConfigError):
            prepared(tmp_path / "in", tmp_path / "out")
        (tmp_path / "in" / "a.jsonl").write_bytes(jsonl(["other"]))
        prepared(tmp_path / "in", tmp_path / "out", **SKIP)
        assert texts_in(tmp_path / "out") == ["other"]


def launched(*arguments: str, cwd: Path, largest_file: int | None = None) -> Command:
    command = ["prepare", *arguments]
    return light().start(command, cwd=cwd, environment=ENVIRONMENT, largest_file=largest_file)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class TestCommand:
    def test_prints_the_result_and_the_training_command(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
        process = launched("a.jsonl", "web", cwd=tmp_path)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        assert out.splitlines() == [
            "prepared web.bin",
            "  read from           a.jsonl",
            "  files               1",
            "  files left out      0",
            "  documents           5",
            "  tokens              81",
            "  bad lines left out  0",
            "  end of a document   '\\x00' (token 0), from the byte tokenizer",
            "train    launcher data=tokens data.train=web model.vocab_size=256",
        ]

    def test_the_table_counts_what_is_left_out_by_reason(self, tmp_path: Path, bpe: Path) -> None:
        folder = tmp_path / "in"
        (folder / ".ipynb_checkpoints").mkdir(parents=True)
        lines = jsonl(["one", "", "<|endoftext|>"]) + b'{"text": null}\n{"text": 3}\n{"text": null}\n{oops\n'
        for name, content in {
            "a.jsonl": lines, "blank.jsonl": b"\n\n", "empty.jsonl": b"", "a.jsonl~": lines,
            "._a.jsonl": b"\0\5\x16\7", ".ipynb_checkpoints/a-checkpoint.jsonl": lines, "a.md": b"x",
        }.items():  # fmt: skip
            (folder / name).write_bytes(content)
        (folder / "b.jsonl").symlink_to("a.jsonl")
        process = launched("in", "web", "bad_lines=skip", f"tokenizer.path={bpe}", cwd=tmp_path)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        table = dict(re.findall(r"^  (\S.*?)  +(.*)$", out, re.MULTILINE))
        assert table.pop("tokens")
        assert table.pop("end of a document").startswith(
            f"'<|endoftext|>' (token 0), from {bpe} (the first of"
        )
        left_out = "backup copies: 1, empty: 1, hidden: 2, of other formats: 1, the same file"
        left_out += " by another name: 1"
        bad = "has no text in 'text' but a number: 1, has no text in 'text' but null: 2, is not JSON: 1"
        assert table == {
            "read from": "in",
            "files": "2 (without text: 1)",
            "files left out": left_out,
            "documents": "2 (empty texts left out: 1)",
            "bad lines left out": f"{bad} (in web.bad_lines.txt)",
            "end in the text": "1 (kept as text, or a bad line)",
        }

    def test_paths_may_contain_an_equals_sign(self, tmp_path: Path) -> None:
        """As the directories of partitioned data do. A path without a slash is one if its file exists."""
        for name in ("data/lang=en/a.jsonl", "lang=de.jsonl", "workers=9"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(jsonl(TEXTS))
        process = launched("data/lang=en/a.jsonl", "lang=de.jsonl", "./n=1", "workers=1", cwd=tmp_path)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")
        assert re.search(r"documents +10\n", out)
        assert bin_path(tmp_path / "n=1").exists()
        process = launched("lang=de.jsonl", "./n=1", "workers=9", cwd=tmp_path)
        _, err = process.communicate(timeout=60)
        assert err.endswith("try: launcher prepare ./lang=de.jsonl ./n=1-2 workers=9\n")

    @pytest.mark.parametrize("typed", ["web.bin", "web.idx", "web"])
    def test_the_target_may_be_typed_with_an_ending(self, typed: str, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
        process = launched("a.jsonl", typed, cwd=tmp_path)
        assert process.communicate(timeout=60)[0].splitlines()[0] == "prepared web.bin"
        names = {"a.jsonl", "web.bin", "web.idx", "web.json", "web.tokenizer.json"}
        assert {path.name for path in tmp_path.iterdir()} == names

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["a.jsonl"], "prepare a.jsonl: the command needs at least one SOURCE to read and the TARGET"),
            (["none", "web"], "SOURCE=none: this file or directory does not exist"),
            (["a.jsonl", "web", "workrs=2"], "workrs=2: no such field\n  try: workers=2"),
            (["a.jsonl", "web", "workers=0"], "workers=0: must be at least 1"),
            (
                ["a.jsonl", "old"],
                "TARGET=old: old.idx already exists, and `launcher prepare` does not overwrite",
            ),
            (
                ["a.jsonl", "old", "tokenizer.train=bpe", "vocab=300"],
                "TARGET=old: old.idx already exists, and `launcher prepare` does not overwrite files\n  try: "
                "launcher prepare a.jsonl old-2 tokenizer.train=bpe vocab=300",
            ),
            (["a.jsonl", "web", "vocab=300"], "vocab=300: only a tokenizer that is trained has a vocabulary"),
            (["a.jsonl", "."], "TARGET=.: the token files need a name\n  try: launcher prepare a.jsonl web"),
            (["a.jsonl", "no/such/web"], None),
        ],
    )
    def test_wrong_arguments_are_refused(
        self, arguments: list[str], message: str | None, tmp_path: Path
    ) -> None:
        (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS))
        (tmp_path / "old.idx").touch()
        process = launched(*arguments, cwd=tmp_path)
        out, err = process.communicate(timeout=60)
        if message is None:
            assert process.returncode == 0, err  # missing folders are created
            return
        assert (process.returncode, out) == (2, "")
        assert err.startswith(f"launcher: {message}")
        assert "Traceback" not in err

    @pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    def test_a_stop_leaves_no_complete_file_and_no_process(
        self, sent: signal.Signals, tmp_path: Path
    ) -> None:
        text = jsonl(["some words that go on and on " * 2000])
        (tmp_path / "a.jsonl").write_bytes(text * 1500)  # 90 MB
        process = launched("a.jsonl", "web", "workers=2", cwd=tmp_path)
        partial = tmp_path / "web.partial" / "tokens.bin"
        wait_until(lambda: partial.exists() and partial.stat().st_size > 0)
        workers = [int(pid) for pid in _children(process.pid)]
        assert len(workers) == 2
        process.send_signal(sent)
        process.communicate(timeout=60)
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[sent]
        assert not list(tmp_path.glob("web.[bi]*"))
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
        if sent is signal.SIGKILL:
            again = launched("a.jsonl", "web", cwd=tmp_path)
            assert again.wait(timeout=120) == 0
            assert open_token_file(tmp_path / "web").num_documents == 1500

    def test_a_full_disk_is_reported_and_the_command_continues_later(self, tmp_path: Path) -> None:
        """A limit on the size of a file that the process writes stands for the full disk."""
        (tmp_path / "a.jsonl").write_bytes(jsonl(["some words that go on and on " * 2000]) * 200)
        process = launched("a.jsonl", "web", "workers=2", cwd=tmp_path, largest_file=3_000_000)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2
        assert err.startswith("launcher: TARGET=web: ")
        assert "cannot be written: File too large" in err
        assert not list(tmp_path.glob("web.[bi]*"))
        assert launched("a.jsonl", "web", cwd=tmp_path).wait(timeout=60) == 0
        assert open_token_file(tmp_path / "web").num_documents == 200

    def test_a_worker_killed_while_it_sends_an_answer_is_reported(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_bytes(jsonl(["some words that go on and on " * 2000]) * 1500)
        process = launched("a.jsonl", "web", "workers=2", cwd=tmp_path)
        partial = tmp_path / "web.partial" / "tokens.bin"
        wait_until(lambda: partial.exists() and partial.stat().st_size > 0)
        process.send_signal(signal.SIGSTOP)  # no answer is received, so each worker waits while it sends one
        victim = int(_children(process.pid)[0])
        wait_until(lambda: _is_idle(victim))
        os.kill(victim, signal.SIGKILL)
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2
        assert "workers=2: a worker process was killed" in err


def _is_idle(pid: int) -> bool:
    """Return whether the process uses no processor time for 0.3 seconds."""
    before = _processor_time(pid)
    time.sleep(0.3)
    return before == _processor_time(pid)


def _processor_time(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().split()[13:15]


def _children(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except FileNotFoundError:
        return []


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """The peak memory of a process that prepares ten times as much text is less than 16 MB higher."""

    def peak(megabytes: int) -> int:
        source = tmp_path / f"{megabytes}.jsonl"
        source.write_bytes(jsonl(["words " * 1000]) * (megabytes * 166))
        pid = os.fork()
        if not pid:
            prepared(source, tmp_path / f"out{megabytes}", tokenizer__path=None)
            os._exit(0)
        _, status, usage = os.wait4(pid, 0)
        assert status == 0
        return usage.ru_maxrss // 1024

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
    small, large = peak(8), peak(80)
    assert large - small < 16, (small, large)


def test_a_directory_of_the_user_is_not_deleted_to_make_way(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text("text")
    folder = tmp_path / "target.partial"
    folder.mkdir()
    (folder / "mine").touch()
    with pytest.raises(OSError, match="it is a directory that no preparation made"):
        prepared(source, tmp_path / "target")
    assert (folder / "mine").exists()


@pytest.mark.slow
def test_a_compressed_file_is_read_in_bounded_memory(tmp_path: Path, subtests: pytest.Subtests) -> None:
    """Repetitions compress a thousandfold and more: the reader never holds what a file expands to."""
    expanded = 400 * 2**20
    zstd = zstandard.ZstdCompressor(level=19).compressobj()
    for name, compressor in {"a.txt.zst": zstd, "a.txt.gz": zlib.compressobj(wbits=31)}.items():
        with subtests.test(name):
            pieces = [compressor.compress(b" " * 2**20) for _ in range(expanded // 2**20)]
            (tmp_path / name).write_bytes(b"".join(pieces) + compressor.flush())
            tracemalloc.start()
            size = 0
            for batch in batches([tmp_path / name], Place(), "text", 2**20):
                size += sum(len(record) for record in batch.records if record)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert size == expanded
            assert peak < 150 * 2**20


def test_a_zstd_frame_with_a_huge_window_is_damaged(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.txt.zst").write_bytes(compressor.compress(b"text" * 2**10) + compressor.flush())
    [batch] = batches([tmp_path / "a.txt.zst"], Place(), "text", 2**20)
    assert batch.damage is not None
    assert "memory" in batch.damage
