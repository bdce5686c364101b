"""Batches of records to token ids: what the worker processes of `launcher prepare` do."""

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

from launcher.data.reading import Batch, Kind
from launcher.data.tokenizer import Bytes, HuggingFace, Tokenizer, pieces

_PIECE = 2**20  # characters that a tokenizer is given at once


@dataclass(frozen=True)
class Tokenised:
    """A batch's tokens, and the `lengths` of its documents, each with the token that ends it.

    Of a text, which may go on in the next batch, there is no such token yet. `bad` is (line, what is wrong).
    """

    tokens: bytes
    lengths: list[int]
    characters: int
    bad: list[tuple[int, str]]


@dataclass(frozen=True)
class TokenizerSpec:
    """Which tokenizer; what a process needs to make it."""

    path: Path | None  # None: bytes
    end_of_document: str | None

    def load(self) -> Tokenizer:
        if self.path is None:
            return Bytes()
        return HuggingFace(self.path, self.end_of_document, field="tokenizer.path")


class Worker:
    """Tokenises batches, each by itself."""

    def __init__(self, spec: TokenizerSpec, text_field: str, max_line: int) -> None:
        self._tokenizer, self._field, self._max_line = spec.load(), text_field, max_line

    def tokenise(self, batch: Batch) -> Tokenised:
        texts: list[str] = []
        bad: list[tuple[int, str]] = []
        line = batch.first_line
        for record, lines in zip(batch.records, batch.lines, strict=True):
            try:
                texts.append(text_of(record, batch.kind, self._field, self._max_line))
            except ValueError as error:
                bad.append((line, str(error)))
            line += lines
        if batch.damage:
            bad.append((line, batch.damage))
        if batch.kind is Kind.text:
            texts = ["".join(texts)]
        encoded = self._encode(texts)
        end = np.array([self._tokenizer.end_of_document], self._tokenizer.dtype)
        # A text that goes on has no end yet; other records are whole. An empty one is no document.
        if batch.kind is not Kind.text:
            encoded = [np.concatenate([ids, end]) for ids in encoded if len(ids)]
        tokens = np.concatenate(encoded) if encoded else end[:0]
        return Tokenised(tokens.tobytes(), [len(ids) for ids in encoded], sum(map(len, texts)), bad)

    def _encode(self, texts: list[str]) -> list[npt.NDArray[Any]]:
        cut = [list(pieces(text, _PIECE)) for text in texts]
        ids = iter(self._tokenizer.encode([piece for one in cut for piece in one]))
        return [np.concatenate([next(ids) for _ in one]) for one in cut]


def text_of(record: bytes | str | None, kind: Kind, field: str, max_line: int) -> str:
    """The text of a record. Raises ValueError with what is wrong with it."""
    if record is None:
        if kind is Kind.rows:
            raise ValueError(f"has no {field!r}")
        raise ValueError(f"is longer than max_line_mb={max_line / 1e6:g}")
    try:
        text = record if isinstance(record, str) else record.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}") from None
    if kind is Kind.lines:
        text = _json_text(text, field)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a character (a lone surrogate)") from None
    return text


def _json_text(line: str, field: str) -> str:
    if not line.strip():
        return ""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {str(error).partition(':')[0]}") from None
    if not isinstance(found, dict):
        raise ValueError("is JSON, but no object")
    text = found.get(field)
    if not isinstance(text, str):
        others = ", ".join(list(found)[:5]) or "nothing"
        raise ValueError(
            f"has no {field!r}, but {others}" if text is None else f"has a {field!r} that is no text"
        )
    return text


class WorkerKilled(Exception):
    """A worker process is gone."""


class Workers:
    """Processes that tokenise, one batch each at a time; they end with this process, and only with it.

    ProcessPoolExecutor would wait forever for the rest of an answer whose sender was killed: it holds every
    pipe's writing end itself. Here only the worker does.
    """

    def __init__(self, count: int, spec: TokenizerSpec, text_field: str, max_line: int) -> None:
        context = get_context("fork")
        self._processes = []
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, spec, text_field, max_line, os.getpid()), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._idle.put(ours)
        self._threads = ThreadPoolExecutor(count, "workers")

    def submit(self, batch: Batch) -> "Future[Tokenised]":
        """Raises, from the future's result(), WorkerKilled and what the worker raised."""
        return self._threads.submit(self._tokenise, batch)

    def _tokenise(self, batch: Batch) -> Tokenised:
        pipe = self._idle.get()
        try:
            pipe.send(batch)
            answer: Tokenised | Exception = pipe.recv()
        except (EOFError, OSError):
            raise WorkerKilled from None
        finally:
            self._idle.put(pipe)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End them, whatever they are at."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
            process.join()
        self._threads.shutdown()


def _work(pipe: Connection, spec: TokenizerSpec, text_field: str, max_line: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    worker = Worker(spec, text_field, max_line)
    with suppress(EOFError, OSError):  # the parent is gone
        while True:
            pipe.send(_answer(worker, pipe.recv()))


def _answer(worker: Worker, batch: Batch) -> Tokenised | Exception:
    try:
        return worker.tokenise(batch)
    except Exception as error:
        return error


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
