"""Batches of records to token ids: what the worker processes of `launcher prepare` do."""

import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
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


_worker: Worker


def start_worker(spec: TokenizerSpec, text_field: str, max_line: int, parent: int) -> None:
    """Make this process one that tokenise_here works in. It ends with its parent, and only with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    global _worker
    _worker = Worker(spec, text_field, max_line)


def tokenise_here(batch: Batch) -> Tokenised:
    return _worker.tokenise(batch)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
