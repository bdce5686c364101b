"""Turn text into token files with parallel processes, for `launcher prepare`.

The number of processes does not change the result. All output is written into TARGET.partial/, with a journal
of the progress, and renamed at the end. The .idx is renamed last, so a TARGET.idx that exists is complete.
"""

import errno
import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np

from launcher import __version__
from launcher.config.errors import ConfigError, settings
from launcher.config.schema import BadLines, PrepareConfig
from launcher.data.card import card_path, tokenizer_path
from launcher.data.reading import FileFormat, Place, RecordBatch, batches, format_of
from launcher.data.token_file import bin_path, index_path, write_index
from launcher.data.tokenise import TokenisedBatch, TokenizerSpec, Worker, WorkerKilled, WorkerPool, text_of
from launcher.data.tokenizer import Tokenizer, train_bpe, write_byte_tokenizer
from launcher.files import partial_path, rename, sync, write_text

JOURNAL, TOKENS, LENGTHS, INDEX = "journal.json", "tokens.bin", "lengths.bin", "index.idx"
BAD, TOKENIZER, CARD = "bad_lines.txt", "tokenizer.json", "card.json"
_SAVE_INTERVAL = 5.0  # seconds between two writes of the journal
_LONGEST = 2**30  # tokens per document: a longer text is split, because the index stores lengths in 31 bits
_AHEAD = 4  # batches per process that are read before their results are written
_FORMAT = 1  # version of the journal and of the output; a change makes an interrupted preparation start again


@dataclass
class PrepareProgress:
    """The progress of a preparation, which the journal stores and the progress bar shows."""

    place: Place = field(default_factory=Place)
    tokens: int = 0
    documents: int = 0
    open_length: int = 0  # tokens so far of a plain text that continues in the next batch
    characters: int = 0
    bad: int = 0  # bad lines
    bad_bytes: int = 0  # size of the list of bad lines
    done: bool = False

    def add(self, batch: RecordBatch, tokenised: TokenisedBatch) -> list[int]:
        """Count the tokens of a batch; return the lengths of the documents that end in the batch."""
        self.tokens += sum(tokenised.lengths)
        self.characters += tokenised.characters
        ended = tokenised.lengths
        if batch.format is FileFormat.plain_text:
            self.open_length += sum(tokenised.lengths)
            ended = []
            if self.open_length and (batch.ends_document or self.open_length >= _LONGEST):
                self.tokens += 1
                ended, self.open_length = [self.open_length + 1], 0
        self.documents += len(ended)
        return ended


@dataclass(frozen=True)
class InputFile:
    """A file to read."""

    name: str  # POSIX path relative to the SOURCE directory
    path: Path
    bytes: int


ShowProgress = Callable[[PrepareProgress, int], None]  # (progress, bytes read of all files)


def bad_lines_path(prefix: Path) -> Path:
    return prefix.with_name(f"{prefix.name}.bad_lines.txt")


def find_inputs(sources: list[Path]) -> tuple[list[InputFile], int]:
    """Return the text files in reading order, and the number of skipped files. Raises ConfigError."""
    inputs: list[InputFile] = []
    skipped = 0
    for source in sources:
        if not source.exists():
            raise ConfigError("SOURCE", source, "this file or directory does not exist", _SOURCES)
        paths = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
        known = [path for path in paths if format_of(path) is not None]
        skipped += len(paths) - len(known)
        for path in known:
            name = path.relative_to(source).as_posix() if source.is_dir() else path.name
            inputs.append(InputFile(name, path, path.stat().st_size))
    if not inputs:
        raise ConfigError("SOURCE", sources[0], "no file has the ending of a known text format", _SOURCES)
    return inputs, skipped


_SOURCES = "a .jsonl, .ndjson, .json or .txt file (also .gz or .zst), a .parquet file, or a directory of them"


class Preparation:
    """Writes the token files of a target, or continues an interrupted preparation of the target."""

    def __init__(self, inputs: list[InputFile], target: Path, config: PrepareConfig, workers: int) -> None:
        self.inputs, self.target, self.config, self.workers = inputs, target, config, workers
        self.folder = partial_path(target)
        self.max_line = int(config.max_line_mb * 1e6)

    def run(self, show: ShowProgress) -> PrepareProgress:
        """Write the token files, or the rest of them; return the progress. Raises ConfigError, OSError."""
        t = self.config.tokenizer
        if t.path is not None:
            # Raises ConfigError here: a later error would name the copy of the file in TARGET.partial/.
            end = TokenizerSpec(Path(t.path).expanduser(), t.end_of_document).load().end_of_document
            assert end >= 0
        self.resumed = self._begin()
        spec = self._tokenizer()
        tokenizer = spec.load()
        progress = self._journal()
        if not progress.done:
            self._write(spec, tokenizer, progress, show)
        if progress.documents == 0:
            shutil.rmtree(self.folder)
            has_bytes = any(file.bytes for file in self.inputs)
            why = "no file contains any text" if has_bytes else "all files are empty"
            why += f" (bad lines: {progress.bad})" if progress.bad else ""
            raise ConfigError("SOURCE", self.inputs[0].path, why, "files that contain text")
        self._finish(tokenizer, progress)
        return progress

    def _begin(self) -> bool:
        """Keep the folder of the same input and settings, else make it anew; return whether work resumes."""
        fingerprint = self.folder / "made_of.json"
        if self._journal().done:
            # The last start stopped between the final renames: move the renamed files back.
            for path, name in self.outputs().items():
                if path.exists() and not (self.folder / name).exists():
                    rename(path, self.folder / name)
        if fingerprint.exists() and json.loads(fingerprint.read_text()) == self._fingerprint():
            return (self.folder / JOURNAL).exists()
        if self.folder.exists():
            if any(self.folder.iterdir()) and not any(self.folder.glob(f"{fingerprint.name}*")):
                raise OSError(errno.EEXIST, "it is a directory that no preparation made", str(self.folder))
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        write_text(fingerprint, json.dumps(self._fingerprint(), indent=2))
        return False

    def _fingerprint(self) -> dict[str, Any]:
        """Return everything that the token files depend on."""
        c = self.config
        tokenizer = Path(c.tokenizer.path).expanduser() if c.tokenizer.path else None
        return {
            "format": _FORMAT,
            "inputs": [[file.name, file.bytes, file.path.stat().st_mtime_ns] for file in self.inputs],
            "text_field": c.text_field,
            "max_line": self.max_line,
            "tokenizer": tokenizer.read_text() if tokenizer and tokenizer.is_file() else None,
            "train": [c.tokenizer.train.name, c.vocab, c.tokenizer.train_mb] if c.tokenizer.train else None,
            "end_of_document": c.tokenizer.end_of_document,
        }

    def _tokenizer(self) -> TokenizerSpec:
        """Write the tokenizer into the folder if it is missing there, and return its settings."""
        path, t = self.folder / TOKENIZER, self.config.tokenizer
        if self._is_bytes():
            write_byte_tokenizer(path)
        elif t.train is not None and not path.exists():
            train_bpe(self._training_texts(int(t.train_mb * 1e6)), self.config.vocab, path)
        elif t.path is not None and not path.exists():
            shutil.copyfile(Path(t.path).expanduser(), path)
        return TokenizerSpec(None if self._is_bytes() else path, t.end_of_document)

    def _is_bytes(self) -> bool:
        return self.config.tokenizer.path is None and self.config.tokenizer.train is None

    def _training_texts(self, total_bytes: int) -> Iterator[str]:
        """Yield the beginning of every file, an equal share of the bytes each, without bad lines."""
        for file in self.inputs:
            remaining = total_bytes // len(self.inputs)
            for batch in self._batches([file.path], Place()):
                for record in batch.records:
                    with suppress(ValueError):
                        text = text_of(record, batch.format, self.config.text_field, self.max_line)
                        remaining -= len(text.encode())
                        yield text
                if remaining <= 0:
                    break

    def _batches(self, files: list[Path], place: Place) -> Iterator[RecordBatch]:
        return batches(files, place, self.config.text_field, self.max_line)

    def _journal(self) -> PrepareProgress:
        path = self.folder / JOURNAL
        if not path.exists():
            return PrepareProgress()
        journal = json.loads(path.read_text())
        return PrepareProgress(place=Place(**journal.pop("place")), **journal)

    def _write(
        self, spec: TokenizerSpec, tokenizer: Tokenizer, progress: PrepareProgress, show: ShowProgress
    ) -> None:
        size = tokenizer.dtype.itemsize
        end = np.array([tokenizer.end_of_document], tokenizer.dtype).tobytes()
        starts = accumulate((file.bytes for file in self.inputs), initial=0)
        bytes_before = {file.path: start for file, start in zip(self.inputs, starts, strict=False)}
        with (
            _open_truncated(self.folder / TOKENS, progress.tokens * size) as tokens,
            _open_truncated(self.folder / LENGTHS, progress.documents * 4) as lengths,
            _open_truncated(self.folder / BAD, progress.bad_bytes) as bad,
        ):
            saved = time.monotonic()

            def save() -> None:
                for file in (tokens, lengths, bad):
                    file.flush()
                    sync(Path(file.name))
                write_text(self.folder / JOURNAL, json.dumps(asdict(progress), indent=2))

            for batch, tokenised in self._tokenised(spec, progress.place):
                if tokenised.bad_lines and self.config.bad_lines is BadLines.fail:
                    save()
                    line, reason = tokenised.bad_lines[0]
                    raise _bad_line_error(self.config, f"{batch.file}:{line} {reason}")
                for line, why in tokenised.bad_lines:
                    progress.bad_bytes += bad.write(f"{batch.file}:{line}: {why}\n".encode())
                progress.bad += len(tokenised.bad_lines)
                ended = progress.add(batch, tokenised)
                tokens.write(tokenised.tokens)
                if ended and batch.format is FileFormat.plain_text:
                    tokens.write(end)
                lengths.write(np.array(ended, "<i4").tobytes())
                progress.place = batch.next_place
                show(progress, bytes_before[batch.file] + batch.bytes_read)
                if time.monotonic() - saved > _SAVE_INTERVAL:
                    save()
                    saved = time.monotonic()
            progress.done = True
            save()

    def _tokenised(self, spec: TokenizerSpec, place: Place) -> Iterator[tuple[RecordBatch, TokenisedBatch]]:
        """Yield the batches from `place` on with their tokens, in the order of the files."""
        record_batches = self._batches([file.path for file in self.inputs], place)
        if self.workers == 1:
            worker = Worker(spec, self.config.text_field, self.max_line)
            yield from ((batch, worker.tokenise(batch)) for batch in record_batches)
            return
        pool = WorkerPool(self.workers, spec, self.config.text_field, self.max_line)
        pending: deque[tuple[RecordBatch, Future[TokenisedBatch]]] = deque()
        try:
            for batch in record_batches:
                pending.append((batch, pool.submit(batch)))
                if len(pending) >= _AHEAD * self.workers:
                    first, future = pending.popleft()
                    yield first, future.result()
            yield from ((first, future.result()) for first, future in pending)
        except WorkerKilled:
            why = "a worker process was killed, probably because the machine ran out of memory"
            fewer = settings("workers", [max(1, self.workers // 2)])[0]
            remedy = f"{fewer} with the same command, which continues where this one stopped"
            raise ConfigError("workers", self.workers, why, remedy) from None
        finally:
            pool.close()

    def outputs(self) -> dict[Path, str]:
        """Return the final path of each file in the folder, in the order of the final renames."""
        return {
            bad_lines_path(self.target): BAD,
            tokenizer_path(self.target): TOKENIZER,
            card_path(self.target): CARD,
            bin_path(self.target): TOKENS,
            index_path(self.target): INDEX,
        }

    def _finish(self, tokenizer: Tokenizer, progress: PrepareProgress) -> None:
        lengths = np.memmap(self.folder / LENGTHS, "<i4", mode="r")
        write_index(self.folder / INDEX, lengths, tokenizer.dtype)
        write_text(self.folder / CARD, json.dumps(self._card(tokenizer, progress), indent=2))
        for path, name in self.outputs().items():
            if (self.folder / name).exists() and not (name == BAD and progress.bad == 0):
                rename(self.folder / name, path)
        shutil.rmtree(self.folder)

    def _card(self, tokenizer: Tokenizer, progress: PrepareProgress) -> dict[str, Any]:
        return {
            "tokenizer": "bytes" if self._is_bytes() else "Hugging Face's tokenizers",
            "vocab_size": tokenizer.vocab_size,
            "end_of_document": tokenizer.end_of_document,
            "tokens": progress.tokens,
            "documents": progress.documents,
            "characters": progress.characters,
            "bad_lines": progress.bad,
            "launcher": __version__,
            "inputs": [{"name": file.name, "bytes": file.bytes} for file in self.inputs],
        }


def _bad_line_error(config: PrepareConfig, why: str) -> ConfigError:
    """Return the error about the first bad line; if the text field is missing, suggest the other fields."""
    skip = "bad_lines=skip (leaves bad lines out and lists them)"
    fields = why.rpartition(f"has no {config.text_field!r}; its fields are: ")[2]
    if fields in (why, "none"):
        return ConfigError("bad_lines", "fail", why, f"{skip}, or correct the line")
    remedy = " or ".join([*settings("text_field", fields.split(", ")), skip])
    return ConfigError("text_field", config.text_field, why, remedy)


def _open_truncated(path: Path, size: int) -> IO[bytes]:
    """Open a file for writing, truncated to `size` bytes, with the position at its end."""
    path.touch()
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file
