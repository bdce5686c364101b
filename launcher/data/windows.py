"""Cut tokens into samples: windows of the sequence length, packed across documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.config.errors import ConfigError
from launcher.config.sequence_order import Part
from launcher.data.sampler import MicroBatch
from launcher.data.token_file import MappedTokens
from launcher.text import plural

TokenIds = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)  # eq: arrays have no single truth value
class Stretch:
    """Consecutive tokens of one file, from which windows are cut."""

    tokens: TokenIds | MappedTokens  # (tokens,)
    file: str = "the corpus"  # named in error messages
    first: int = 0  # index in the file of the stretch's first token

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class Windows:
    """All windows of T + 1 tokens in the stretches, in order: T inputs and the last target.

    The last target of a window is also the first input of the next window. No window spans two stretches.
    """

    stretches: Sequence[Stretch]
    sequence_length: int  # T, input tokens of a window
    vocab_size: int | None = None  # ids are checked against this size when read; None: no check

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        counts = [windows_in(len(stretch), self.sequence_length) for stretch in self.stretches]
        return np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, places: npt.NDArray[np.int64], part: Part | None = None) -> MicroBatch:
        """Return the tokens (B, T+1) of windows `places` (B,): inputs are [:, :-1], labels [:, 1:].

        With a `part`, return inputs and labels at its positions and read no others.
        Raises ConfigError for a token id that the model's vocabulary does not have.
        """
        if part is None:
            return self._tokens(places, 0, self.sequence_length + 1)
        pieces = [self._tokens(places, each.start, len(each) + 1) for each in part]
        inputs = np.concatenate([piece[:, :-1] for piece in pieces], 1)
        return inputs, np.concatenate([piece[:, 1:] for piece in pieces], 1)

    def _tokens(self, places: npt.NDArray[np.int64], skipped: int, length: int) -> npt.NDArray[np.int64]:
        """Return `length` tokens (B, length) of windows `places` (B,), after the first `skipped`."""
        rows = np.empty((len(places), length), np.int64)
        numbers = np.searchsorted(self._ends, places, side="right")
        windows = places - np.concatenate([[0], self._ends])[numbers]  # counted within the stretch
        stretches = [self.stretches[number] for number in numbers.tolist()]
        starts = list(zip(stretches, (windows * self.sequence_length + skipped).tolist(), strict=True))
        for stretch, start in starts:
            if isinstance(stretch.tokens, MappedTokens):
                stretch.tokens.fetch(start, length)
        for row, (stretch, start) in enumerate(starts):
            tokens = stretch.tokens[start : start + length]
            rows[row] = tokens
            if self.vocab_size is not None:
                check_ids(tokens, self.vocab_size, stretch, start)
        return rows

    def count_labels(self, places: npt.NDArray[np.int64]) -> int:
        """Return the number of labels of windows `places` (B,), which all count."""
        return len(places) * self.sequence_length


def check_ids(tokens: TokenIds, vocab_size: int, stretch: Stretch, start: int = 0) -> None:
    """Raise ConfigError for an id outside the vocabulary. `tokens` start at index `start` of `stretch`."""
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest >= 0 and highest < vocab_size:
        return
    wrong = lowest if lowest < 0 else highest
    place = stretch.first + start + int((tokens == wrong).argmax())
    why = f"{stretch.file} has token id {wrong} at token {place}, and the model has no embedding for this id"
    other_files = "token files made with a tokenizer of this vocabulary size"
    remedy = other_files if wrong < 0 else f"model.vocab_size={wrong + 1} (or more), or {other_files}"
    raise ConfigError("model.vocab_size", vocab_size, why, remedy)


def windows_in(tokens: int, sequence_length: int) -> int:
    """Return how many windows of `sequence_length` inputs, plus the last target, fit into `tokens` tokens."""
    return max(0, tokens - 1) // sequence_length


def check_long_enough(tokens: Sequence[int], sequence_length: int, part: str = "the corpus") -> None:
    """Raise ConfigError about `part` if no stretch, with `tokens` tokens each, has one window."""
    longest = max(tokens, default=0)
    if windows_in(longest, sequence_length) == 0:
        remedy = f"data.sequence_length={longest - 1}, or more text" if longest > 1 else "more text"
        why = f"{part} has {plural(longest, 'token')}, but a sample needs {sequence_length + 1}"
        why += " (data.sequence_length + 1)"
        raise ConfigError("data.sequence_length", sequence_length, why, remedy)
