"""Perplexity by tokens and by bytes."""

import math
from dataclasses import dataclass
from itertools import chain, islice

from launcher.config.schema import EvaluateConfig
from launcher.data.evaluated import scored_bytes, scored_windows
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


def perplexity_of(
    stretches: list[Stretch], scorer: Scorer, config: EvaluateConfig, length: int, vocab_size: int,
    tokenizer: Tokenizer | None, end: int | None,
) -> Perplexity:  # fmt: skip
    """Return the perplexity of the tokens in `stretches`. Collective over the world."""
    stride = config.stride or length
    windows = chain.from_iterable(
        scored_windows(stretch, length, stride, vocab_size) for stretch in stretches
    )
    scores = scorer.scores(islice(windows, config.limit))
    tokens = sum(score.labels for score in scores)
    counts, left = [], tokens
    for stretch in stretches:
        counts.append(min(left, max(0, len(stretch) - 1)))
        left -= counts[-1]
    known = None if tokenizer is None else scored_bytes(stretches, counts, tokenizer, end)
    return Perplexity(math.fsum(score.loss for score in scores), tokens, known)
