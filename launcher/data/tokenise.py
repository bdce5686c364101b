"""Tokenise batches of records in the worker processes of `launcher prepare`."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.config.schema import EndInText
from launcher.data.chat_template import ChatTemplate
from launcher.data.chat_tokens import ChatEncoder
from launcher.data.conversation import BadConversation
from launcher.data.reading import FileFormat, RecordBatch
from launcher.data.tokenizer import Bytes, HuggingFace, Tokenizer, pieces

_PIECE = 2**20  # the most characters that a tokenizer encodes in one call


@dataclass(frozen=True)
class BadLine:
    """A line that contains no usable text."""

    line: int  # line number
    why: str
    fields: tuple[str, ...] = ()  # fields of the line that contain text, if `text_field` does not


@dataclass
class TokenisedBatch:
    """The tokens of a batch. A plain text may continue in the next batch, which then ends it."""

    tokens: bytes = b""
    mask: bytes = b""  # of conversations: a byte per token, 1 if the token is learned
    lengths: list[int] = field(default_factory=list)  # of each document that ends here, with its end token
    open_tokens: int = 0  # tokens after the last end: of a plain text that has not ended
    characters: int = 0
    bad_lines: list[BadLine] = field(default_factory=list)
    empty: int = 0  # records whose text is empty
    spelled: int = 0  # times that the text spells the end token


@dataclass(frozen=True)
class TokeniseSettings:
    """The settings from which each process builds its Worker."""

    tokenizer: Path | None  # a tokenizer.json; None: tokens are bytes
    end_of_document: str | int | None  # the token that ends a document, or its id; None: a usual one
    text_field: str
    max_line: int  # bytes
    end_in_text: EndInText = EndInText.escape
    template: ChatTemplate | None = None  # of conversations; None: records are text
    field: str = "tokenizer.path"  # that names the tokenizer

    def load(self) -> Tokenizer:
        """Return the tokenizer. Raises ConfigError if the file cannot be used."""
        if self.tokenizer is None:
            return Bytes()
        return HuggingFace(self.tokenizer, self.end_of_document, field=self.field)


class NoText(ValueError):
    """Raised for a record without usable text."""

    def __init__(self, why: str, fields: Iterable[str] | None = None) -> None:
        """`fields` are the record's fields that contain text; None if the fault is not `text_field`."""
        super().__init__(why)
        self.fields = None if fields is None else tuple(islice(fields, 5))


class Worker:
    """Tokenises batches, each independently of the others."""

    def __init__(self, settings: TokeniseSettings) -> None:
        self._settings, self._tokenizer = settings, settings.load()
        self._end = self._tokenizer.end_of_document
        template = settings.template
        self._chats = None if template is None else ChatEncoder(template, self._tokenizer)

    def tokenise(self, batch: RecordBatch) -> TokenisedBatch:
        """Return the tokens of a batch, and its bad lines."""
        if self._chats is not None:
            return self._conversations(batch, self._chats)
        tokenised, texts = TokenisedBatch(), []
        line = batch.first_line
        for record, line_count in zip(batch.records, batch.line_counts, strict=True):
            try:
                text = text_of(record, batch.format, self._settings)
                tokenised.empty += not text and (not isinstance(record, bytes) or bool(record.strip()))
                texts.append((line, text))
            except NoText as error:
                fields = () if error.fields is None else error.fields or batch.fields
                tokenised.bad_lines.append(BadLine(line, str(error), fields))
            line += line_count
        if batch.format is FileFormat.plain_text:
            self._add_plain(texts, tokenised)
        else:
            self._add_documents(texts, tokenised)
        tokenised.bad_lines.sort(key=lambda bad: bad.line)
        if batch.damage:
            tokenised.bad_lines.append(BadLine(line, batch.damage, batch.fields))
        return tokenised

    def _conversations(self, batch: RecordBatch, encoder: ChatEncoder) -> TokenisedBatch:
        """Return the tokens of a batch of conversations, each a document."""
        tokenised, line = TokenisedBatch(), batch.first_line
        tokens, masks = [], []
        for record, line_count in zip(batch.records, batch.line_counts, strict=True):
            try:
                if (document := _json_object(_line_of(record, self._settings.max_line))) is not None:
                    ids, mask, characters = encoder.encode(document)
                    tokens.append(ids.tobytes())
                    masks.append(mask.tobytes())
                    tokenised.lengths.append(len(ids))
                    tokenised.characters += characters
            except (NoText, BadConversation) as error:
                tokenised.bad_lines.append(BadLine(line, str(error)))
            line += line_count
        tokenised.tokens, tokenised.mask = b"".join(tokens), b"".join(masks)
        if batch.damage:
            tokenised.bad_lines.append(BadLine(line, batch.damage))
        return tokenised

    def _add_documents(self, texts: list[tuple[int, str]], tokenised: TokenisedBatch) -> None:
        """Add the texts, each a document or several; an empty text is no document."""
        documents, kept = self._encode([text for _, text in texts]), []
        for (line, text), ids in zip(texts, documents, strict=True):
            if self._is_good(line, text, ids, tokenised):
                kept += [part for part in self._parts(ids) if len(part)]
                tokenised.characters += len(text)
        end = np.array([self._end], self._tokenizer.dtype)
        kept = [np.concatenate([ids, end]) for ids in kept]
        tokenised.tokens = b"".join(ids.tobytes() for ids in kept)
        tokenised.lengths = [len(ids) for ids in kept]

    def _add_plain(self, texts: list[tuple[int, str]], tokenised: TokenisedBatch) -> None:
        """Add the lines of a plain text, which are encoded together."""
        text = "".join(text for _, text in texts)
        [ids] = self._encode([text])
        if not self._is_allowed(text, ids):
            # Find the lines that must be left out. Where no line alone is at fault, all are left out.
            lines = self._encode([line for _, line in texts])
            wrong = [not self._is_allowed(*pair) for pair in zip((t for _, t in texts), lines, strict=True)]
            rest = [pair for pair, is_wrong in zip(texts, wrong, strict=True) if not is_wrong]
            for (line, text), is_wrong in zip(texts, wrong, strict=True):
                if is_wrong or len(rest) == len(texts):
                    tokenised.spelled += text.count(self._tokenizer.end_spelling)
                    tokenised.bad_lines.append(BadLine(line, self._end_in_text()))
            return self._add_plain(rest if len(rest) < len(texts) else [], tokenised)
        tokenised.spelled += text.count(self._tokenizer.end_spelling)
        tokenised.characters = len(text)
        *ended, last = self._parts(ids)
        end = np.array([self._end], self._tokenizer.dtype)
        # Only the first part may be empty: it continues the text of the batch before.
        ended = [np.concatenate([part, end]) for number, part in enumerate(ended) if len(part) or not number]
        tokenised.tokens = b"".join(part.tobytes() for part in [*ended, last])
        tokenised.lengths, tokenised.open_tokens = [len(part) for part in ended], len(last)
        return None

    def _is_good(self, line: int, text: str, ids: npt.NDArray[Any], tokenised: TokenisedBatch) -> bool:
        tokenised.spelled += text.count(self._tokenizer.end_spelling)
        if not self._is_allowed(text, ids):
            tokenised.bad_lines.append(BadLine(line, self._end_in_text()))
            return False
        return True

    def _is_allowed(self, text: str, ids: npt.NDArray[Any]) -> bool:
        """Return whether the text may be used although it spells the end token, or is encoded with it."""
        if self._settings.end_in_text is EndInText.count:
            return True
        refuse = self._settings.end_in_text is EndInText.refuse
        return not (ids == self._end).any() and not (refuse and self._tokenizer.end_spelling in text)

    def _end_in_text(self) -> str:
        if self._settings.end_in_text is EndInText.refuse:
            return f"{SPELLS_END}, {self._tokenizer.end_spelling!r}"
        hint = " (UTF-16 without a byte order mark?)" if self._tokenizer.end_spelling == "\0" else ""
        spelling = f"{self._tokenizer.end_spelling!r}{hint}"
        return f"{SPELLS_END}, {spelling}, and this tokenizer cannot encode the text without it"

    def _parts(self, ids: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """Return the ids between the end tokens, which are themselves left out."""
        return [
            part[number > 0 :] for number, part in enumerate(np.split(ids, (ids == self._end).nonzero()[0]))
        ]

    def _encode(self, texts: list[str]) -> list[npt.NDArray[Any]]:
        """Return the ids of each text. With end_in_text=count, each spelled end becomes an end token."""
        end = np.array([self._end], self._tokenizer.dtype)
        is_marker = self._settings.end_in_text is EndInText.count
        spelling = self._tokenizer.end_spelling
        parts = [text.split(spelling) if is_marker else [text] for text in texts]
        in_pieces = [[list(pieces(part, _PIECE)) for part in text] for text in parts]
        ids = iter(self._tokenizer.encode([piece for text in in_pieces for part in text for piece in part]))
        encoded = []
        for text in in_pieces:
            joined = []
            for part in text:
                joined += [end, *(next(ids) for _ in part)]
            encoded.append(np.concatenate(joined[1:]))
        return encoded


SPELLS_END = "spells the token that ends documents"


def text_of(record: Any, file_format: FileFormat, settings: TokeniseSettings) -> str:
    """Return the text of a record without a byte order mark. Raises NoText for a bad line."""
    if isinstance(record, dict):
        text = _text_at(record, settings.text_field, record, settings.text_field)
    else:
        text = record if isinstance(record, str) else _line_of(record, settings.max_line)
    if file_format is FileFormat.json_lines:
        document = _json_object(text)
        field = settings.text_field
        text = "" if document is None else _text_at(document, field, document, field)
    if file_format is not FileFormat.plain_text:
        text = text.removeprefix(_MARK)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise NoText("contains half a character (a lone surrogate)") from None
    return text


_MARK = "\ufeff"  # the byte order mark: the beginning of a file, or of a text that was copied from a file


def _line_of(record: bytes | None, max_line: int) -> str:
    if record is None:
        raise NoText(f"is longer than max_line_mb={max_line / 1e6:g}")
    return _decoded(record)


def _decoded(record: bytes) -> str:
    try:
        return record.decode()
    except UnicodeDecodeError as error:
        raise NoText(f"is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from None


def _json_object(line: str) -> dict[str, Any] | None:
    """Return the object on a line of JSON; None for a blank line."""
    line = line.removeprefix(_MARK)
    if not line.strip():
        return None
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise NoText(f"is not JSON: {str(error).partition(':')[0]}") from None
    if not isinstance(document, dict):
        raise NoText("is JSON but not an object")
    return document


def _text_at(value: Any, path: str, document: dict[str, Any], field: str) -> str:
    """Return the text at `path`, a part of `field`: names separated by dots, or * for each item of a list.

    The texts of a list are joined by newlines. `document` is the whole record, for messages.
    """
    if not path:
        return _checked_text(value, document, field)
    name, _, rest = path.partition(".")
    if name == "*" and isinstance(value, list):
        return "\n".join(_text_at(item, rest, document, field) for item in value)
    parts = path.split(".")
    for count in range(len(parts), 0, -1):  # a name may itself contain dots
        name, rest = ".".join(parts[:count]), ".".join(parts[count:])
        if isinstance(value, dict) and name in value:
            return _text_at(value[name], rest, document, field)
    names = ", ".join(list(document)[:5]) or "none"
    raise NoText(f"has no {field!r}; its fields are: {names}", _similar_fields(document, field))


def _checked_text(value: Any, document: dict[str, Any], field: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return _decoded(value)
    if value is None:
        raise NoText(f"has no text in {field!r} but null")
    kinds = {list: "a list", dict: "an object", bool: "a truth value", int: "a number", float: "a number"}
    kind = kinds.get(type(value), f"a value of the type {type(value).__name__}")
    raise NoText(f"has no text in {field!r} but {kind}", _similar_fields(document, field))


def _similar_fields(document: dict[str, Any], field: str) -> list[str]:
    """Return the fields that contain text: those below the first name of `field`, or else all of them."""
    first, last = field.partition(".")[0], field.rpartition(".")[2]
    names = list(_text_fields(document))
    inside = [name for name in names if name.startswith(f"{first}.")]
    return sorted(inside or names, key=lambda name: name.rpartition(".")[2] != last)


def _text_fields(value: Any, name: str = "") -> Iterator[str]:
    """Yield the fields below `value` that contain text, as `text_field` names them."""
    if isinstance(value, str | bytes):
        yield name
    elif isinstance(value, list) and value:
        yield from _text_fields(value[0], f"{name}.*")
    elif isinstance(value, dict) and name.count(".") < _DEEPEST:
        for inner, item in value.items():
            yield from _text_fields(item, f"{name}.{inner}" if name else inner)


_DEEPEST = 8  # levels of a record in which fields are suggested


class WorkerKilled(Exception):
    """Raised when a worker process ended before it answered."""


class WorkerPool:
    """Worker processes that tokenise one batch each at a time, until this process closes the pool or ends.

    ProcessPoolExecutor is not used, because the executor keeps the writing end of every pipe open. If a
    worker is killed while sending an answer, the executor waits forever for the rest. Here only the worker
    keeps the writing end open.
    """

    def __init__(self, count: int, settings: TokeniseSettings) -> None:
        context = get_context("fork")
        self._processes = []
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        for _ in range(count):
            pipe, worker_pipe = context.Pipe()
            arguments = (worker_pipe, settings, os.getpid())
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            worker_pipe.close()
            self._processes.append(process)
            self._idle.put(pipe)
        self._threads = ThreadPoolExecutor(count, "workers")

    def submit(self, batch: RecordBatch) -> "Future[TokenisedBatch]":
        """Return the future tokens of `batch`; result() raises WorkerKilled, or what the worker raised."""
        return self._threads.submit(self._tokenise, batch)

    def _tokenise(self, batch: RecordBatch) -> TokenisedBatch:
        pipe = self._idle.get()
        try:
            pipe.send(batch)
            answer: TokenisedBatch | Exception = pipe.recv()
        except (EOFError, OSError):
            raise WorkerKilled from None
        finally:
            self._idle.put(pipe)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Kill the worker processes, even if they are working."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
            process.join()
        self._threads.shutdown()


def _work(pipe: Connection, settings: TokeniseSettings, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    worker = Worker(settings)
    with suppress(EOFError, OSError):  # raised when the parent process has ended
        while True:
            batch = pipe.recv()
            try:
                answer: TokenisedBatch | Exception = worker.tokenise(batch)
            except Exception as error:
                answer = error
            pipe.send(answer)


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
