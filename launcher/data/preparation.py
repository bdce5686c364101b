"""Turn text into token files with parallel processes, for `launcher prepare`.

The number of processes does not change the result. All output is written into TARGET.partial/, with a journal
of the progress, and renamed at the end. The .idx is renamed last, so a TARGET.idx that exists is complete.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np

from launcher import __version__
from launcher.config.errors import ConfigError, typed_text
from launcher.config.schema import BadLines, EndInText, PrepareConfig
from launcher.data.chat_template import ChatTemplate, template_of
from launcher.data.dataset_card import card_path, chat_entries, tokenizer_path
from launcher.data.input_files import EMPTY, TWICE, LeftOut, files_below, first_of_each, listed
from launcher.data.reading import JSON_ARRAY, FileFormat, Place, RecordBatch, batches, format_of
from launcher.data.token_file import bin_path, index_path, mask_path, write_index
from launcher.data.tokenise import (
    SPELLS_END,
    BadLine,
    NoText,
    TokenisedBatch,
    TokeniseSettings,
    Worker,
    WorkerKilled,
    WorkerPool,
    text_of,
)
from launcher.data.tokenizer import Tokenizer, train_bpe, write_byte_tokenizer
from launcher.files import (
    make_way,
    partial_path,
    read_regular,
    rename,
    replacing,
    sync,
    what_is_wrong,
    write_text,
)

JOURNAL, TOKENS, LENGTHS, INDEX = "journal.json", "tokens.bin", "lengths.bin", "index.idx"
MASK = "mask.bin"  # only of conversations
BAD, TOKENIZER, CARD, MADE_OF = "bad_lines.txt", "tokenizer.json", "card.json", "made_of.json"
_SAVE_INTERVAL = 5.0  # seconds between two writes of the journal
_LONGEST = 2**30  # tokens per document: a longer text is split, because the index stores lengths in 31 bits
_AHEAD = 4  # batches per process that are read before their results are written
_AHEAD_BYTES = 2**28  # total size of these batches, of which each may be a line of max_line_mb
_MOST_JOURNAL_BYTES = 2**24
_FORMAT = 3  # version of the journal and of the output; a change makes an interrupted preparation start again


@dataclass
class PrepareProgress:
    """The progress of a preparation, which the journal stores and the progress bar shows."""

    place: Place = field(default_factory=Place)
    tokens: int = 0
    documents: int = 0
    open_length: int = 0  # tokens so far of a plain text that continues in the next batch
    characters: int = 0
    bad: dict[str, int] = field(default_factory=dict)  # bad lines by reason
    sizes: dict[str, int] = field(default_factory=dict)  # bytes written to each file, by its name
    empty: int = 0  # records whose text is empty
    spelled: int = 0  # times that the text spells the end token
    in_file: int = 0  # documents of the current file so far
    files_without_text: int = 0
    done: bool = False

    @property
    def bad_lines(self) -> int:
        return sum(self.bad.values())

    def add(self, batch: RecordBatch, tokenised: TokenisedBatch) -> tuple[list[int], bool]:
        """Count the tokens of a batch.

        Return the lengths of the documents that end in the batch, and whether an end token must be added
        because the file, and with it the document, ends.
        """
        ended = list(tokenised.lengths)
        if ended:
            ended[0] += self.open_length
            self.open_length = 0
        self.open_length += tokenised.open_tokens
        ends = self.open_length > 0 and (batch.ends_document or self.open_length >= _LONGEST)
        self.tokens += sum(tokenised.lengths) + tokenised.open_tokens + ends
        if ends:
            ended.append(self.open_length + 1)
            self.open_length = 0
        self.documents += len(ended)
        self.characters += tokenised.characters
        self.empty += tokenised.empty
        self.spelled += tokenised.spelled
        self.in_file += len(ended)
        if batch.next_place.file != self.place.file:
            self.files_without_text += not self.in_file
            self.in_file = 0
        return ended, ends


@dataclass(frozen=True)
class InputFile:
    """A file to read."""

    name: str  # POSIX path relative to the SOURCE directory
    path: Path
    bytes: int


class Unusable(Exception):
    """Raised for an interrupted preparation that cannot be continued; the message says why."""


ShowProgress = Callable[[PrepareProgress, int], None]  # (progress, bytes read of all files)


def bad_lines_path(prefix: Path) -> Path:
    return prefix.parent / f"{prefix.name}.bad_lines.txt"


def find_inputs(sources: list[Path]) -> tuple[list[InputFile], LeftOut]:
    """Return the text files in reading order, and the number of files left out by reason. Raises ConfigError.

    A file that is itself a source is read whatever its name is, hidden or not.
    """
    left_out: LeftOut = Counter()
    names: dict[Path, str] = {}
    for source in sources:
        if not source.exists():
            raise ConfigError("SOURCE", source, "this file or directory does not exist", _SOURCES)
        is_directory = source.is_dir()
        paths = files_below(source, left_out, "SOURCE") if is_directory else [source]
        for path in paths:
            reason = _reason_to_leave_out(path, source if is_directory else path.parent)
            if reason is None:
                # A path that is named a second time is still the same file.
                left_out[TWICE] += path in names
                names.setdefault(path, path.relative_to(source).as_posix() if is_directory else path.name)
            else:
                left_out[reason] += 1
    inputs = [InputFile(names[path], path, path.stat().st_size) for path in first_of_each(names, left_out)]
    with_bytes = [file for file in inputs if file.bytes]
    left_out[EMPTY] += len(inputs) - len(with_bytes)
    if not inputs:
        why = "no file has the ending of a known text format"
        why += f" (left out: {listed(left_out)})" if left_out.total() else ""
        raise ConfigError("SOURCE", sources[0], why, _SOURCES)
    if not with_bytes:
        raise ConfigError("SOURCE", inputs[0].path, "all files are empty", "files that contain text")
    return with_bytes, left_out


def _reason_to_leave_out(path: Path, root: Path) -> str | None:
    """Return why a file below `root` is not read, or None."""
    if any(parent.joinpath(MADE_OF).exists() for parent in path.parents if parent.is_relative_to(root)):
        return "of an interrupted preparation"
    for ending in (".bad_lines.txt", ".tokenizer.json", ".json"):
        name = path.name.removesuffix(ending)
        if name != path.name and index_path(path.with_name(name)).exists():
            return "written by `launcher prepare`"
    return "of other formats" if format_of(path) is None else None


_SOURCES = "a .jsonl, .ndjson, .json or .txt file (also .gz or .zst), a .parquet file, or a directory of them"


class Preparation:
    """Writes the token files of a target, or continues an interrupted preparation of the target."""

    def __init__(self, inputs: list[InputFile], target: Path, config: PrepareConfig, workers: int) -> None:
        self.inputs, self.target, self.config, self.workers = inputs, target, config, workers
        self.folder = partial_path(target)
        self.max_line = int(config.max_line_mb * 1e6)
        self.template = _template(config, inputs) if config.chat else None
        self.first_fields: tuple[str, ...] = ()  # fields with text of the first record that lacks text_field

    def run(self, show: ShowProgress) -> PrepareProgress:
        """Write the token files, or the rest of them; return the progress. Raises ConfigError, OSError."""
        t = self.config.tokenizer
        if t.path is not None:
            # Raises ConfigError here: a later error would name the copy of the file in TARGET.partial/.
            assert self._settings(Path(t.path).expanduser()).load().end_of_document >= 0
        progress = self._begin()
        settings = self._tokenizer()
        tokenizer = settings.load()
        if not progress.done:
            self._write(settings, tokenizer, progress, show)
        if progress.documents == 0:
            shutil.rmtree(self.folder)
            raise self._without_text(progress)
        self.end = f"{tokenizer.end_spelling!r} (token {tokenizer.end_of_document})"
        self._finish(tokenizer, progress)
        return progress

    def _without_text(self, progress: PrepareProgress) -> ConfigError:
        bad = f" (bad lines: {listed(progress.bad)})" if progress.bad else ""
        why, remedy = f"no file contains any text{bad}", "files that contain text"
        if JSON_ARRAY.partition(",")[0] in progress.bad:
            return ConfigError("json_arrays", "false", why, "json_arrays=true")
        if self.first_fields:
            names = [typed_text("text_field", name) for name in self.first_fields]
            return ConfigError("text_field", self.config.text_field, why, " or ".join(names))
        return ConfigError("SOURCE", self.inputs[0].path, why, remedy)

    def _settings(self, tokenizer: Path | None) -> TokeniseSettings:
        c = self.config
        end, end_in_text = c.tokenizer.end_of_document, c.end_of_document_in_text
        return TokeniseSettings(tokenizer, end, c.text_field, self.max_line, end_in_text, self.template)

    def _begin(self) -> PrepareProgress:
        """Return the progress of an interrupted preparation of the same input and settings.

        Without such progress make the folder anew. `note` says what happened to an earlier preparation.
        """
        made_of = json.dumps(self._fingerprint(), indent=2)
        self.note = ""
        if self.folder.exists():
            if any(self.folder.iterdir()) and not any(self.folder.glob(f"{MADE_OF}*")):
                raise OSError(errno.EEXIST, "it is a directory that no preparation made", str(self.folder))
            try:
                progress = self._saved_progress(made_of)
            except Unusable as unusable:
                self.note = f"began anew, because {unusable}"
                self._remove_work()
            else:
                self.note = "continued an interrupted preparation" if progress.sizes else ""
                return progress
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / MADE_OF, made_of)
        return PrepareProgress()

    def _remove_work(self) -> None:
        """Empty the folder, except for the file by which the next start knows it after a kill."""
        for entry in self.folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif not entry.name.startswith(MADE_OF):
                entry.unlink()

    def _saved_progress(self, made_of: str) -> PrepareProgress:
        """Return the progress that the journal states. Raises Unusable."""
        progress = _read_journal(self.folder / JOURNAL)
        if progress.done:
            # The last start stopped between the final renames: move the renamed files back.
            for path, name in self.outputs().items():
                if path.exists() and not (self.folder / name).exists():
                    rename(path, self.folder / name)
        fingerprint = self.folder / MADE_OF
        try:
            is_same = read_regular(fingerprint, len(made_of)) == made_of.encode()
        except OSError:
            is_same = False
        if not is_same:
            raise Unusable(f"{fingerprint} states other files or settings, or is damaged")
        for name, size in progress.sizes.items():
            if (present := _size_of(self.folder / name)) < size:
                raise Unusable(
                    f"{self.folder / name} has {present} of the {size} bytes that {JOURNAL} states"
                )
        return progress

    def _fingerprint(self) -> dict[str, Any]:
        """Return everything that the token files depend on."""
        c = self.config
        tokenizer = Path(c.tokenizer.path).expanduser() if c.tokenizer.path else None
        return {
            "format": _FORMAT,
            "inputs": [[file.name, file.bytes, file.path.stat().st_mtime_ns] for file in self.inputs],
            "text_field": c.text_field,
            "max_line": self.max_line,
            "json_arrays": c.json_arrays,
            "tokenizer": tokenizer.read_text() if tokenizer and tokenizer.is_file() else None,
            "train": [c.tokenizer.train.name, c.vocab, c.tokenizer.train_mb] if c.tokenizer.train else None,
            "end_of_document": [c.tokenizer.end_of_document, c.end_of_document_in_text.name],
            "template": None if self.template is None else asdict(self.template),
        }

    def _tokenizer(self) -> TokeniseSettings:
        """Write the tokenizer into the folder if it is missing there, and return its settings."""
        path, t = self.folder / TOKENIZER, self.config.tokenizer
        if self._is_bytes():
            write_byte_tokenizer(path)
        elif t.train is not None and not path.exists():
            train_bpe(self._training_texts(int(t.train_mb * 1e6)), self.config.vocab, path)
        elif t.path is not None:
            with replacing(path) as copy:
                shutil.copyfile(Path(t.path).expanduser(), copy)
        return self._settings(None if self._is_bytes() else path)

    def _is_bytes(self) -> bool:
        return self.config.tokenizer.path is None and self.config.tokenizer.train is None

    def _training_texts(self, total_bytes: int) -> Iterator[str]:
        """Yield the first texts of every file, up to its equal share of `total_bytes`, without bad lines."""
        for file in self.inputs:
            remaining = total_bytes // len(self.inputs)
            for batch in self._batches([file.path], Place()):
                for record in batch.records:
                    with suppress(NoText):
                        text = text_of(record, batch.format, self._settings(None))
                        remaining -= len(text.encode())
                        yield text
                if remaining <= 0:
                    break

    def _batches(self, files: list[Path], place: Place) -> Iterator[RecordBatch]:
        c = self.config
        return batches(files, place, c.text_field, self.max_line, c.json_arrays)

    def _write(
        self, settings: TokeniseSettings, tokenizer: Tokenizer, progress: PrepareProgress, show: ShowProgress
    ) -> None:
        size = tokenizer.dtype.itemsize
        end = np.array([tokenizer.end_of_document], tokenizer.dtype).tobytes()
        starts = accumulate((file.bytes for file in self.inputs), initial=0)
        bytes_before = {file.path: start for file, start in zip(self.inputs, starts, strict=False)}
        with ExitStack() as stack:
            names = (TOKENS, LENGTHS, BAD, *([MASK] if self.template else []))
            files = [stack.enter_context(_open_truncated(self.folder / n, progress.sizes)) for n in names]
            tokens, lengths, bad = files[:3]
            saved = time.monotonic()

            def save() -> None:
                for file in files:
                    file.flush()
                    sync(Path(file.name))
                    progress.sizes[Path(file.name).name] = file.tell()
                content = asdict(progress)
                sealed = {"progress": content, "sha256": _digest(content)}
                write_text(self.folder / JOURNAL, json.dumps(sealed, indent=2))

            for batch, tokenised in self._tokenised(settings, progress.place):
                if tokenised.bad_lines and self.config.bad_lines is BadLines.fail:
                    save()
                    raise _bad_line_error(self.config, batch, tokenised, is_first=progress.documents == 0)
                for line in tokenised.bad_lines:
                    bad.write(f"{batch.file}:{line.line}: {line.why}\n".encode())
                    reason = re.split("[:;,]", line.why)[0]  # without what differs from line to line
                    progress.bad[reason] = progress.bad.get(reason, 0) + 1
                    self.first_fields = self.first_fields or line.fields
                if not progress.open_length and tokenised.lengths[:1] == [1]:
                    # The text begins with an end of a document, and no text comes before.
                    tokenised.tokens, tokenised.lengths = tokenised.tokens[size:], tokenised.lengths[1:]
                ended, ends = progress.add(batch, tokenised)
                tokens.write(tokenised.tokens)
                if self.template:
                    files[3].write(tokenised.mask)
                if ends:
                    tokens.write(end)
                lengths.write(np.array(ended, "<i4").tobytes())
                progress.place = batch.next_place
                show(progress, bytes_before[batch.file] + batch.bytes_read)
                if time.monotonic() - saved > _SAVE_INTERVAL:
                    save()
                    saved = time.monotonic()
            progress.done = True
            save()

    def _tokenised(
        self, settings: TokeniseSettings, place: Place
    ) -> Iterator[tuple[RecordBatch, TokenisedBatch]]:
        """Yield the batches from `place` on with their tokens, in the order of the files."""
        record_batches = self._batches([file.path for file in self.inputs], place)
        if self.workers == 1:
            worker = Worker(settings)
            yield from ((batch, worker.tokenise(batch)) for batch in record_batches)
            return
        pool = WorkerPool(self.workers, settings)
        pending: deque[tuple[RecordBatch, Future[TokenisedBatch]]] = deque()
        size = 0  # bytes of the pending batches
        try:
            for batch in record_batches:
                pending.append((batch, pool.submit(batch)))
                size += _bytes_of(batch)
                while len(pending) >= _AHEAD * self.workers or size > _AHEAD_BYTES:
                    first, future = pending.popleft()
                    size -= _bytes_of(first)
                    yield first, future.result()
            yield from ((first, future.result()) for first, future in pending)
        except WorkerKilled:
            why = "a worker process was killed, probably because the machine ran out of memory"
            fewer = f"workers={max(1, self.workers // 2)}"
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
            mask_path(self.target): MASK,
            bin_path(self.target): TOKENS,
            index_path(self.target): INDEX,
        }

    def _finish(self, tokenizer: Tokenizer, progress: PrepareProgress) -> None:
        lengths = np.memmap(self.folder / LENGTHS, "<i4", mode="r")
        write_index(self.folder / INDEX, lengths, tokenizer.dtype)
        write_text(self.folder / CARD, json.dumps(self._card(tokenizer, progress), indent=2))
        for path, name in self.outputs().items():
            if (self.folder / name).exists() and not (name == BAD and not progress.bad):
                rename(self.folder / name, path)
        shutil.rmtree(self.folder)

    def _card(self, tokenizer: Tokenizer, progress: PrepareProgress) -> dict[str, Any]:
        return {
            "tokenizer": "bytes" if self._is_bytes() else "Hugging Face's tokenizers",
            "vocab_size": tokenizer.vocab_size,
            "text_vocab_size": tokenizer.text_vocab_size,
            "end_of_document": tokenizer.end_of_document,
            "tokens": progress.tokens,
            "documents": progress.documents,
            "characters": progress.characters,
            "bad_lines": progress.bad_lines,
            "launcher": __version__,
            "inputs": [{"name": file.name, "bytes": file.bytes} for file in self.inputs],
            **({} if self.template is None else chat_entries(self.template.source, self.template.tokens)),
        }


def _template(config: PrepareConfig, inputs: list[InputFile]) -> ChatTemplate:
    """Return the chat template of `config`. Raises ConfigError, also for files that are not JSON."""
    for file in inputs:
        if format_of(file.path) is not FileFormat.json_lines:
            why = f"{file.path} is not JSON, and conversations are read from JSON only"
            raise ConfigError("chat", "true", why, "JSON files as SOURCE, or chat=false")
    tokenizer, template = (
        None if path is None else Path(path).expanduser()
        for path in (config.tokenizer.path, config.chat_template)
    )
    return template_of(tokenizer, template, tokenizer_field="tokenizer.path", template_field="chat_template")


def _bad_line_error(
    config: PrepareConfig, batch: RecordBatch, tokenised: TokenisedBatch, *, is_first: bool
) -> ConfigError:
    """Return the error about the first bad line; if the text field is missing, suggest the other fields.

    If no line before had the field either (`is_first`), leaving lines out would leave out all of them.
    """
    line: BadLine = tokenised.bad_lines[0]
    why = f"{batch.file}:{line.line} {line.why}"
    skip = "bad_lines=skip (leaves bad lines out and lists them)"
    if line.why.startswith(SPELLS_END):
        count = "end_of_document_in_text=count (the document ends there)"
        mode = config.end_of_document_in_text
        ways = ["end_of_document_in_text=escape"] if mode is EndInText.refuse else []
        return ConfigError("end_of_document_in_text", mode.name, why, " or ".join([*ways, count, skip]))
    if line.why == JSON_ARRAY:
        return ConfigError("json_arrays", "false", why, "json_arrays=true (reads each object of such files)")
    if not line.fields:
        return ConfigError("bad_lines", "fail", why, f"{skip}, or correct the line")
    remedies = [typed_text("text_field", name) for name in line.fields]
    if not is_first or tokenised.lengths:
        remedies.append(skip)
    return ConfigError("text_field", config.text_field, why, " or ".join(remedies))


def _bytes_of(batch: RecordBatch) -> int:
    return sum(len(record or "") for record in batch.records)


def _read_journal(path: Path) -> PrepareProgress:
    """Return the progress that a journal states, or no progress without a journal. Raises Unusable."""
    if not os.path.lexists(path):
        return PrepareProgress()
    try:
        sealed = json.loads(read_regular(path, _MOST_JOURNAL_BYTES))
        content = sealed["progress"]
        if sealed["sha256"] != _digest(content):
            raise Unusable(f"{path} does not match its checksum")
        return PrepareProgress(**{**content, "place": Place(**content["place"])})
    except OSError as error:
        raise Unusable(f"{path} {what_is_wrong(error)}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Unusable(f"{path} is damaged") from None


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _size_of(path: Path) -> int:
    """Return the bytes of a regular file; 0 for anything else."""
    with suppress(OSError):
        status = path.lstat()
        return status.st_size if stat.S_ISREG(status.st_mode) else 0
    return 0


def _open_truncated(path: Path, sizes: dict[str, int]) -> IO[bytes]:
    """Open a file for writing at its end, truncated to its size in `sizes` (0 without an entry)."""
    size = sizes.get(path.name, 0)
    make_way(path, for_directory=False)
    path.touch()
    file = path.open("r+b")
    file.truncate(size)
    file.seek(size)
    return file
