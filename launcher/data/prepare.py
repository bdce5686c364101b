"""`launcher prepare`: text to token files, in parallel, in one order whatever the number of processes.

Everything is written into TARGET.partial/, with a journal of how far it came, and renamed at the end,
the .idx last: a TARGET.idx that is there is whole.
"""

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np

from launcher import __version__
from launcher.config.errors import ConfigError, settings
from launcher.config.schema import BadLines, PrepareConfig
from launcher.data.card import card_path, tokenizer_path
from launcher.data.reading import Batch, Kind, Place, batches, kind_of
from launcher.data.token_file import bin_path, index_path, write_index
from launcher.data.tokenise import (
    Tokenised,
    TokenizerSpec,
    Worker,
    WorkerKilled,
    Workers,
    text_of,
)
from launcher.data.tokenizer import Tokenizer, train_bpe, write_byte_tokenizer
from launcher.files import partial_path, rename, sync, write_text

JOURNAL, TOKENS, LENGTHS, INDEX, BAD = (
    "journal.json",
    "tokens.bin",
    "lengths.bin",
    "index.idx",
    "bad_lines.txt",
)
TOKENIZER, CARD = "tokenizer.json", "card.json"
_SAVED_EVERY = 5.0  # seconds
_LONGEST = 2**30  # tokens of a document: a longer text becomes several, as the index counts in 31 bits
_AHEAD = 4  # batches in work per process
_FORMAT = 1  # of the journal, and of what the same input becomes


@dataclass
class Progress:
    """How far a preparation has come: the journal of a restart, and what is shown."""

    place: Place = field(default_factory=Place)
    tokens: int = 0
    documents: int = 0
    open_length: int = 0  # tokens so far of a text that goes on in the next batch
    characters: int = 0
    bad: int = 0
    bad_bytes: int = 0  # of their list
    done: bool = False


@dataclass(frozen=True)
class Input:
    """A file to read, by its name below the source that was named."""

    name: str
    path: Path
    bytes: int


Show = Callable[[Progress, int], None]  # (progress, bytes read of all files)


def bad_lines_path(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.bad_lines.txt")


def find_inputs(sources: list[Path]) -> tuple[list[Input], int]:
    """The files of text in order, and how many others there are. Raises ConfigError where there is none."""
    found: list[Input] = []
    others = 0
    for source in sources:
        if not source.exists():
            raise ConfigError("SOURCE", source, "there is no such file or directory", _SOURCES)
        paths = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
        for path in paths:
            if kind_of(path) is None:
                others += 1
                continue
            name = path.relative_to(source).as_posix() if source.is_dir() else path.name
            found.append(Input(name, path, path.stat().st_size))
    if not found:
        raise ConfigError("SOURCE", sources[0], "holds no file of text that is known by its ending", _SOURCES)
    return found, others


_SOURCES = "files of .jsonl, .json or .txt, plain, .gz or .zst, and .parquet; or a directory of them"


class Preparation:
    """One target in the making."""

    def __init__(self, inputs: list[Input], target: Path, config: PrepareConfig, workers: int) -> None:
        self.inputs, self.target, self.config, self.workers = inputs, target, config, workers
        self.folder = partial_path(target)
        self.max_line = int(config.max_line_mb * 1e6)

    def run(self, show: Show) -> Progress:
        """From where an earlier start stopped, to the end. Raises ConfigError, OSError."""
        self._check_tokenizer()
        self.resumed = self._begin()
        spec = self._tokenizer()
        tokenizer = spec.load()
        progress = self._journal()
        if not progress.done:
            self._write(spec, tokenizer, progress, show)
        if progress.documents == 0:
            shutil.rmtree(self.folder)
            why = "no file holds any text" + (f" ({progress.bad} bad lines)" if progress.bad else "")
            raise ConfigError("SOURCE", self.inputs[0].path, why, _SOURCES)
        self._finish(tokenizer, progress)
        return progress

    def _begin(self) -> bool:
        """Make the folder, unless it is of the same input and settings; whether it was."""
        same = self.folder / "made_of.json"
        if self._journal().done:
            # A stop between the renames of the end left some files in their places.
            for path, name in self.places().items():
                if path.exists() and not (self.folder / name).exists():
                    rename(path, self.folder / name)
        if same.exists() and json.loads(same.read_text()) == self._fingerprint():
            return (self.folder / JOURNAL).exists()
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        write_text(same, json.dumps(self._fingerprint(), indent=2))
        return False

    def _fingerprint(self) -> dict[str, Any]:
        """What the result depends on."""
        c = self.config
        tokenizer = Path(c.tokenizer.path).expanduser() if c.tokenizer.path else None
        return {
            "format": _FORMAT,
            "inputs": [[one.name, one.bytes, one.path.stat().st_mtime_ns] for one in self.inputs],
            "text_field": c.text_field,
            "max_line": self.max_line,
            "tokenizer": tokenizer.read_text() if tokenizer and tokenizer.is_file() else None,
            "train": [c.tokenizer.train.name, c.vocab, c.tokenizer.train_mb] if c.tokenizer.train else None,
            "end_of_document": c.tokenizer.end_of_document,
        }

    def _tokenizer(self) -> TokenizerSpec:
        own, t = self.folder / TOKENIZER, self.config.tokenizer
        if t.train is not None and not own.exists():
            train_bpe(self._texts(int(t.train_mb * 1e6)), self.config.vocab, own)
        elif t.path is not None and not own.exists():
            shutil.copyfile(Path(t.path).expanduser(), own)
        elif self._is_bytes():
            write_byte_tokenizer(own)
        return TokenizerSpec(None if self._is_bytes() else own, t.end_of_document)

    def _check_tokenizer(self) -> None:
        """Refuse one that cannot be used under its own name, before anything is written."""
        t = self.config.tokenizer
        if t.path is not None:
            end = TokenizerSpec(Path(t.path).expanduser(), t.end_of_document).load().end_of_document
            assert end >= 0

    def _is_bytes(self) -> bool:
        return self.config.tokenizer.path is None and self.config.tokenizer.train is None

    def _texts(self, most: int) -> Iterator[str]:
        """The beginning of every file, an equal share of `most` bytes each; bad lines are told of later."""
        for one in self.inputs:
            left = most // len(self.inputs)
            for batch in self._batches([one.path], Place()):
                for record in batch.records:
                    try:
                        text = text_of(record, batch.kind, self.config.text_field, self.max_line)
                    except ValueError:
                        continue
                    yield text
                    left -= len(text.encode())
                if left <= 0:
                    break

    def _batches(self, files: list[Path], place: Place) -> Iterator[Batch]:
        return batches(files, place, self.config.text_field, self.max_line)

    def _journal(self) -> Progress:
        path = self.folder / JOURNAL
        if not path.exists():
            return Progress()
        found = json.loads(path.read_text())
        return Progress(place=Place(**found.pop("place")), **found)

    def _write(self, spec: TokenizerSpec, tokenizer: Tokenizer, progress: Progress, show: Show) -> None:
        size = tokenizer.dtype.itemsize
        end = np.array([tokenizer.end_of_document], tokenizer.dtype).tobytes()
        ends = accumulate((one.bytes for one in self.inputs), initial=0)
        before = {one.path: end for one, end in zip(self.inputs, ends, strict=False)}
        with (
            _at(self.folder / TOKENS, progress.tokens * size) as tokens,
            _at(self.folder / LENGTHS, progress.documents * 4) as lengths,
            _at(self.folder / BAD, progress.bad_bytes) as bad,
        ):
            saved = time.monotonic()

            def save() -> None:
                for file in (tokens, lengths, bad):
                    file.flush()
                    sync(Path(file.name))
                write_text(self.folder / JOURNAL, json.dumps(asdict(progress), indent=2))

            for batch, found in self._tokenised(spec, progress.place):
                if found.bad and self.config.bad_lines is BadLines.fail:
                    save()
                    raise self._bad_line(batch, *found.bad[0])
                for line, why in found.bad:
                    progress.bad_bytes += bad.write(f"{batch.file}:{line}: {why}\n".encode())
                progress.bad += len(found.bad)
                _take(batch, found, end, progress, tokens, lengths)
                progress.place = batch.after
                show(progress, before[batch.file] + batch.bytes_read)
                if time.monotonic() - saved > _SAVED_EVERY:
                    save()
                    saved = time.monotonic()
            progress.done = True
            save()

    def _bad_line(self, batch: Batch, line: int, why: str) -> ConfigError:
        where = f"{batch.file}:{line} {why}"
        remedy = "bad_lines=skip (leaves such lines out and lists them), or the line mended"
        return ConfigError("bad_lines", "fail", where, remedy)

    def _tokenised(self, spec: TokenizerSpec, place: Place) -> Iterator[tuple[Batch, Tokenised]]:
        """Batches and their tokens, in the order of the files."""
        found = self._batches([one.path for one in self.inputs], place)
        if self.workers == 1:
            worker = Worker(spec, self.config.text_field, self.max_line)
            yield from ((batch, worker.tokenise(batch)) for batch in found)
            return
        pool = Workers(self.workers, spec, self.config.text_field, self.max_line)
        waiting: deque[tuple[Batch, Future[Tokenised]]] = deque()
        try:
            for batch in found:
                waiting.append((batch, pool.submit(batch)))
                if len(waiting) >= _AHEAD * self.workers:
                    yield _answer(waiting)
            while waiting:
                yield _answer(waiting)
        except WorkerKilled:
            why = "a process was killed, as it is where memory runs out"
            remedies = *settings("workers", [max(1, self.workers // 2)]), "the same command goes on"
            raise ConfigError("workers", self.workers, why, ": ".join(remedies)) from None
        finally:
            pool.close()

    def places(self) -> dict[Path, str]:
        """Where each file goes at the end, in the order in which it goes there."""
        return {
            bad_lines_path(self.target): BAD,
            tokenizer_path(self.target): TOKENIZER,
            card_path(self.target): CARD,
            bin_path(self.target): TOKENS,
            index_path(self.target): INDEX,
        }

    def _finish(self, tokenizer: Tokenizer, progress: Progress) -> None:
        lengths = np.memmap(self.folder / LENGTHS, "<i4", mode="r")
        write_index(self.folder / INDEX, lengths, tokenizer.dtype)
        write_text(self.folder / CARD, json.dumps(self._card(tokenizer, progress), indent=2))
        for path, name in self.places().items():
            if (self.folder / name).exists() and not (name == BAD and progress.bad == 0):
                rename(self.folder / name, path)
        shutil.rmtree(self.folder)

    def _card(self, tokenizer: Tokenizer, progress: Progress) -> dict[str, Any]:
        return {
            "tokenizer": "bytes" if self._is_bytes() else "Hugging Face's tokenizers",
            "vocab_size": tokenizer.vocab_size,
            "end_of_document": tokenizer.end_of_document,
            "tokens": progress.tokens,
            "documents": progress.documents,
            "characters": progress.characters,
            "bad_lines": progress.bad,
            "launcher": __version__,
            "inputs": [{"name": one.name, "bytes": one.bytes} for one in self.inputs],
        }


def _answer(waiting: deque[tuple[Batch, Future[Tokenised]]]) -> tuple[Batch, Tokenised]:
    batch, future = waiting.popleft()
    return batch, future.result()


def _take(
    batch: Batch, found: Tokenised, end: bytes, progress: Progress, tokens: IO[bytes], lengths: IO[bytes]
) -> None:
    """Write a batch's tokens, and the lengths of the documents that end with it."""
    tokens.write(found.tokens)
    progress.tokens += sum(found.lengths)
    progress.characters += found.characters
    ended = found.lengths
    if batch.kind is Kind.text:
        progress.open_length += sum(found.lengths)
        ended = []
        if progress.open_length and (batch.ends_document or progress.open_length >= _LONGEST):
            tokens.write(end)
            progress.tokens += 1
            ended = [progress.open_length + 1]
            progress.open_length = 0
    lengths.write(np.array(ended, "<i4").tobytes())
    progress.documents += len(ended)


def _at(path: Path, size: int) -> IO[bytes]:
    """The file, cut to `size`, to write on from there."""
    path.touch()
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file
