"""Tokenise batches of records in the worker processes of `launcher prepare`."""

import json
import os
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.data.reading import FileFormat, RecordBatch
from launcher.data.tokenizer import Bytes, HuggingFace, Tokenizer, pieces

_PIECE = 2**20  # the most characters that a tokenizer encodes in one call


@dataclass(frozen=True)
class TokenisedBatch:
    """The tokens of a batch, without the end token of a plain text, which may continue in the next batch."""

    tokens: bytes
    lengths: list[int]  # tokens of each document, or of this batch's piece of a plain text
    characters: int
    bad_lines: list[tuple[int, str]]  # line number, and what is wrong with the line


@dataclass(frozen=True)
class TokenizerSpec:
    """The settings from which each process loads the tokenizer."""

    path: Path | None  # of a tokenizer.json; None: tokens are bytes
    end_of_document: str | None  # the token that ends a document; None: a usual one

    def load(self) -> Tokenizer:
        """Return the tokenizer. Raises ConfigError if the file cannot be used."""
        path, end = self.path, self.end_of_document
        return Bytes() if path is None else HuggingFace(path, end, field="tokenizer.path")


class Worker:
    """Tokenises batches, each independently of the others."""

    def __init__(self, spec: TokenizerSpec, text_field: str, max_line: int) -> None:
        self._tokenizer, self._field, self._max_line = spec.load(), text_field, max_line

    def tokenise(self, batch: RecordBatch) -> TokenisedBatch:
        """Return the tokens of a batch, and its bad lines."""
        texts: list[str] = []
        bad_lines: list[tuple[int, str]] = []
        line = batch.first_line
        for record, line_count in zip(batch.records, batch.line_counts, strict=True):
            try:
                texts.append(text_of(record, batch.format, self._field, self._max_line))
            except ValueError as error:
                bad_lines.append((line, str(error)))
            line += line_count
        if batch.damage:
            bad_lines.append((line, batch.damage))
        if batch.format is FileFormat.plain_text:
            texts = ["".join(texts)]
        encoded = self._encode(texts)
        end = np.array([self._tokenizer.end_of_document], self._tokenizer.dtype)
        # A plain text may continue in the next batch, so its end token is written later. Records of the other
        # formats are whole documents; an empty record is not a document.
        if batch.format is not FileFormat.plain_text:
            encoded = [np.concatenate([ids, end]) for ids in encoded if len(ids)]
        tokens = np.concatenate(encoded) if encoded else end[:0]
        lengths = [len(ids) for ids in encoded]
        return TokenisedBatch(tokens.tobytes(), lengths, sum(map(len, texts)), bad_lines)

    def _encode(self, texts: list[str]) -> list[npt.NDArray[Any]]:
        texts_in_pieces = [list(pieces(text, _PIECE)) for text in texts]
        ids = iter(self._tokenizer.encode([piece for text in texts_in_pieces for piece in text]))
        return [np.concatenate([next(ids) for _ in text]) for text in texts_in_pieces]


def text_of(record: bytes | str | None, file_format: FileFormat, field: str, max_line: int) -> str:
    """Return the text of a record. Raises ValueError with the reason if the record is a bad line."""
    if record is None:
        too_long = f"is longer than max_line_mb={max_line / 1e6:g}"
        raise ValueError(f"has no {field!r}" if file_format is FileFormat.parquet else too_long)
    try:
        text = record if isinstance(record, str) else record.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from None
    if file_format is FileFormat.json_lines:
        text = _json_text(text, field)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("contains half a character (a lone surrogate)") from None
    return text


def _json_text(line: str, field: str) -> str:
    if not line.strip():
        return ""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {str(error).partition(':')[0]}") from None
    if not isinstance(document, dict):
        raise ValueError("is JSON but not an object")
    text = document.get(field)
    if text is None:
        raise ValueError(f"has no {field!r}; its fields are: {', '.join(list(document)[:5]) or 'none'}")
    if not isinstance(text, str):
        raise ValueError(f"has a {field!r} that is not text")
    return text


class WorkerKilled(Exception):
    """Raised when a worker process ended before it answered."""


class WorkerPool:
    """Worker processes that tokenise one batch each at a time, until this process closes the pool or ends.

    ProcessPoolExecutor is not used, because the executor keeps the writing end of every pipe open. If a
    worker is killed while sending an answer, the executor waits forever for the rest. Here only the worker
    keeps the writing end open.
    """

    def __init__(self, count: int, spec: TokenizerSpec, text_field: str, max_line: int) -> None:
        context = get_context("fork")
        self._processes = []
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        for _ in range(count):
            pipe, worker_pipe = context.Pipe()
            arguments = (worker_pipe, spec, text_field, max_line, os.getpid())
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


def _work(pipe: Connection, spec: TokenizerSpec, text_field: str, max_line: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    worker = Worker(spec, text_field, max_line)
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
