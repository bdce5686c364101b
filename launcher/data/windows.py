"""Samples of tokens: windows of the sequence length, packed across documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.config.errors import ConfigError
from launcher.data.token_file import fetch


@dataclass(frozen=True, eq=False)  # eq: arrays have no single truth value
class Stretch:
    """Tokens (tokens,) in order, of any integer type, that windows are cut from, and where they lie."""

    tokens: npt.NDArray[np.integer[Any]]
    file: str = "the corpus"
    first: int = 0  # the place of its first token in the file


@dataclass(frozen=True, eq=False)
class Windows:
    """Every window of T inputs and one last target that fits into a stretch, stretch after stretch.

    Neighbouring windows share one token: the last target of one is the first input of the next.
    """

    stretches: Sequence[Stretch]
    sequence_length: int  # T, in tokens
    vocab_size: int | None = None  # ids are checked against it as they are read; None: they need not be

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        counts = [windows_in(len(stretch.tokens), self.sequence_length) for stretch in self.stretches]
        return np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Windows (B,) to their tokens (B, T+1): inputs are [:, :-1], labels [:, 1:].

        Raises ConfigError for a token id that the model's vocabulary does not have.
        """
        length = self.sequence_length + 1
        rows = np.empty((len(places), length), np.int64)
        found = [
            (self.stretches[stretch], place * self.sequence_length)
            for stretch, place in zip(*self._locate(places), strict=True)
        ]
        for stretch, start in found:
            fetch(stretch.tokens, stretch.first + start, length)
        for row, (stretch, start) in enumerate(found):
            tokens = stretch.tokens[start : start + length]
            rows[row] = tokens
            if self.vocab_size is not None:
                check_ids(tokens, self.vocab_size, stretch, start)
        return rows

    def _locate(self, places: npt.NDArray[np.int64]) -> tuple[list[int], list[int]]:
        """The stretch of each window, and its place within it."""
        stretches = np.searchsorted(self._ends, places, side="right")
        before = np.concatenate([[0], self._ends])[stretches]
        return stretches.tolist(), (places - before).tolist()


def check_ids(
    tokens: npt.NDArray[np.integer[Any]], vocab_size: int, stretch: Stretch, start: int = 0
) -> None:
    """Raises ConfigError for an id that would index past the embedding."""
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest >= 0 and highest < vocab_size:
        return
    wrong = lowest if lowest < 0 else highest
    place = stretch.first + start + int((tokens == wrong).argmax())
    why = f"{stretch.file} has token id {wrong} at token {place}, which the model has no embedding for"
    other = "the token files that this vocabulary belongs to"
    remedy = other if wrong < 0 else f"model.vocab_size={wrong + 1} (or more), or {other}"
    raise ConfigError("model.vocab_size", vocab_size, why, remedy)


def windows_in(tokens: int, sequence_length: int) -> int:
    """Windows of `sequence_length` inputs, plus one last target, that fit in `tokens`."""
    return max(0, tokens - 1) // sequence_length


def check_long_enough(tokens: Sequence[int], sequence_length: int, part: str = "the corpus") -> None:
    """Refuse stretches of so many tokens where not one window fits in any."""
    longest = max(tokens, default=0)
    if windows_in(longest, sequence_length) == 0:
        shorter = f"data.sequence_length={longest - 1}, or more text" if longest > 1 else "more text"
        raise ConfigError(
            "data.sequence_length",
            sequence_length,
            f"{part} has {longest} tokens, and one sample takes {sequence_length + 1} (the last is a target)",
            shorter,
        )
