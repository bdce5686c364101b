"""Perplexity by tokens and by bytes."""

import math
from dataclasses import dataclass
from itertools import chain, islice

from launcher.data.evaluated import chat_windows, learned_bytes, scored_bytes, scored_windows
from launcher.data.packing import PackedChats
from launcher.data.tokenizer import Tokenizer
from launcher.data.windows import Stretch
from launcher.evaluation.scorer import Scorer


@dataclass(frozen=True)
class Perplexity:
    """The loss of scored tokens, and the bytes of their text; None if the tokenizer is not known."""

    loss: float  # nats, summed
    tokens: int
    bytes: int | None

    def values(self) -> dict[str, float | int]:
        """Return the results by name."""
        mean = self.loss / self.tokens
        values = {"tokens": self.tokens, "loss": mean, "perplexity": _exp(mean)}
        if self.bytes:
            per_byte = self.loss / self.bytes
            values |= {
                "bytes": self.bytes,
                "byte_perplexity": _exp(per_byte),
                "bits_per_byte": per_byte / math.log(2),
            }
        return values


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class Measure:
    """Measures perplexity by one model's scorer, with the settings of the command."""

    scorer: Scorer
    length: int  # tokens of a window
    stride: int
    limit: int | None  # of windows or conversations
    vocab_size: int
    tokenizer: Tokenizer | None
    end_of_document: int | None

    def __call__(self, data: list[Stretch] | PackedChats) -> Perplexity:
        """Return the perplexity of tokens, or of the assistant's part of conversations. Collective, world."""
        return self._of_chats(data) if isinstance(data, PackedChats) else self._of_tokens(data)

    def _of_tokens(self, stretches: list[Stretch]) -> Perplexity:
        windows = chain.from_iterable(
            scored_windows(stretch, self.length, self.stride, self.vocab_size) for stretch in stretches
        )
        scores = self.scorer.scores(islice(windows, self.limit))
        tokens = sum(score.labels for score in scores)
        counts, left = [], tokens
        for stretch in stretches:
            counts.append(min(left, max(0, len(stretch) - 1)))
            left -= counts[-1]
        known = None
        if self.tokenizer is not None:
            known = scored_bytes(stretches, counts, self.tokenizer, self.end_of_document)
        return Perplexity(math.fsum(score.loss for score in scores), tokens, known)

    def _of_chats(self, chats: PackedChats) -> Perplexity:
        windows = list(islice(chat_windows(chats), self.limit))
        scores, known = self.scorer.scores(windows), None
        if self.tokenizer is not None:
            known = sum(learned_bytes(window, self.tokenizer, self.end_of_document) for window in windows)
        losses = math.fsum(score.loss for score in scores)
        return Perplexity(losses, sum(score.labels for score in scores), known)
