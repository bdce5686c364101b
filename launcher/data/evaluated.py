"""The data that `launcher evaluate` measures a model on: windows of tokens, and the bytes of their text."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.config.errors import ConfigError
from launcher.config.shape import END_OF_TEXT
from launcher.data.corpus import text_documents
from launcher.data.packing import PackedChats
from launcher.data.tokenizer import Bytes, Tokenizer, pieces
from launcher.data.tokens import HeldOutPart, check_vocabulary, open_tokens, probe_ids
from launcher.data.windows import Stretch, check_ids

_PIECE = 2**20  # characters of a document that are encoded at a time, and tokens that are decoded at a time


@dataclass(frozen=True, eq=False)
class Window:
    """Tokens (n + 1,): n inputs and their labels, of which those from index `first` on are scored.

    With `learned` (n,) only the marked labels are scored: the assistant's text in a conversation.
    """

    tokens: npt.NDArray[np.integer[Any]]
    first: int = 0
    learned: npt.NDArray[np.bool_] | None = None


def scored_windows(stretch: Stretch, length: int, stride: int, vocab_size: int) -> Iterator[Window]:
    """Yield windows of `length` inputs, `stride` tokens apart, that score each token but the first once.

    A window scores the labels that no earlier window has scored, so each label after the first window has at
    least length - stride + 1 tokens of context. The last window may be shorter.
    Raises ConfigError for a token id that the model's vocabulary does not have.
    """
    begin, scored = 0, 1
    while scored < len(stretch):
        end = min(begin + length, len(stretch) - 1)
        tokens = np.asarray(stretch.tokens[begin : end + 1])
        check_ids(tokens, vocab_size, stretch, begin)
        yield Window(tokens, scored - begin - 1)
        begin, scored = begin + stride, end + 1


def chat_windows(chats: PackedChats) -> Iterator[Window]:
    """Yield a window for each conversation, cut as in training; only the assistant's text is scored.

    Raises ConfigError for a token id that the model's vocabulary does not have.
    """
    for tokens, mask in chats.conversations():
        if mask[1:].any():
            yield Window(np.asarray(tokens), learned=mask[1:])


def learned_bytes(window: Window, tokenizer: Tokenizer, end: int | None) -> int:
    """Return the UTF-8 bytes of the text that the learned labels of a conversation decode to."""
    assert window.learned is not None
    # The ends of the stretches of learned labels, each pair a stretch.
    edges = np.flatnonzero(np.diff(np.concatenate([[False], window.learned, [False]])))
    labels = window.tokens[1:]
    return sum(
        text_bytes(labels[first:last], tokenizer, end) for first, last in edges.reshape(-1, 2).tolist()
    )


def text_bytes(tokens: npt.NDArray[np.integer[Any]], tokenizer: Tokenizer, end: int | None) -> int:
    """Return the UTF-8 bytes of the text that `tokens` decode to; the token `end` of documents has none."""
    if isinstance(tokenizer, Bytes):
        return int((tokens != END_OF_TEXT).sum())
    ends = [] if end is None else np.flatnonzero(tokens == end).tolist()
    starts = [0, *(place + 1 for place in ends)]
    total = 0
    for start, stop in zip(starts, [*ends, len(tokens)], strict=True):
        for first in range(start, stop, _PIECE):
            total += len(tokenizer.decode(tokens[first : min(first + _PIECE, stop)].tolist()).encode())
    return total


def text_stretch(pattern: str, tokenizer: Tokenizer, end: int | None) -> Stretch:
    """Return the tokens of the text files that `pattern` names, with `end` after each. Raises ConfigError."""
    tokens: list[npt.NDArray[Any]] = []
    for document in text_documents("text", pattern, Counter()):
        if isinstance(tokenizer, Bytes):
            tokens.append(np.frombuffer(document, tokenizer.dtype))
        else:
            tokens += tokenizer.encode(list(pieces(_decoded(document, pattern), _PIECE)))
        if end is not None:
            tokens.append(np.array([end], tokenizer.dtype))
    return Stretch(np.concatenate(tokens), pattern)


def _decoded(document: bytes, pattern: str) -> str:
    try:
        return document.decode()
    except UnicodeDecodeError as error:
        why = f"a file is not UTF-8 text: {error.reason} at byte {error.start}"
        raise ConfigError("text", pattern, why, "a glob of UTF-8 files") from None


def token_stretches(pattern: str, vocab_size: int) -> tuple[list[Stretch], list[Path]]:
    """Return the tokens of each of the token files that `pattern` names, and their prefixes.

    Raises ConfigError if they are no token files, or of a larger vocabulary.
    """
    none = HeldOutPart("tokens", None, 0.0)
    split = open_tokens("tokens", pattern, none, none, 2, Counter())
    prefixes = [file.prefix for file in split.files]
    for prefix in prefixes:
        check_vocabulary(vocab_size, prefix)
    probe_ids(split.train, vocab_size)
    return split.train, prefixes


def scored_bytes(
    stretches: Sequence[Stretch], counts: Sequence[int], tokenizer: Tokenizer, end: int | None
) -> int:
    """Return the bytes of the text of the first `counts` scored tokens of each stretch."""
    total = 0
    for stretch, count in zip(stretches, counts, strict=True):
        tokens = np.asarray(stretch.tokens[: count + 1])
        total += text_bytes(tokens, tokenizer, end) - text_bytes(tokens[:1], tokenizer, end)
    return total
