"""Which sample each rank reads: a pure function of (seed, samples consumed).

Data-parallel size, accumulation and pipeline depth only cut a global batch up; they never choose it.
There is no sampler state: a run resumes in any layout from the one number `samples_consumed`.

Shapes: B micro-batch, T sequence length, A accumulation (micro-batches per step and data rank).
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.config.errors import ConfigError
from launcher.config.schema import DataConfig
from launcher.data.corpus import token_counts

# Four suffice for a large corpus; with 16 even all orders of five windows are equally likely.
_ROUNDS = 16


@dataclass(frozen=True, eq=False)  # eq: arrays have no single truth value
class TokenSamples:
    """An endless sequence of samples over `tokens`, epoch after epoch.

    `tokens` has shape (tokens,), any integer type. Neighbouring windows share one token:
    the last target of one is the first input of the next.
    """

    tokens: npt.NDArray[np.integer[Any]]
    sequence_length: int  # T, in tokens
    shuffle_seed: int | None  # each epoch in an order of its own; None: every epoch in corpus order

    def __post_init__(self) -> None:
        count_windows(len(self.tokens), self.sequence_length)

    def __len__(self) -> int:
        """Windows, that is samples per epoch."""
        return count_windows(len(self.tokens), self.sequence_length)

    def windows(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sample indices (B,) to the windows they cover (B,), each in [0, len(self))."""
        epochs, positions = np.divmod(indices, len(self))
        if self.shuffle_seed is None:
            return positions
        windows = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            windows[here] = permute(positions[here], len(self), seed=self.shuffle_seed, epoch=epoch)
        return windows

    def take(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sample indices (B,) to their tokens (B, T+1): inputs are [:, :-1], targets [:, 1:]."""
        starts = self.windows(indices) * self.sequence_length
        tokens: npt.NDArray[np.integer[Any]]
        tokens = self.tokens[starts[:, None] + np.arange(self.sequence_length + 1)]
        return tokens.astype(np.int64)


def sample_indices(
    *, samples_consumed: int, global_batch_size: int, micro_batch_size: int, data_rank: int, data_size: int
) -> npt.NDArray[np.int64]:
    """The samples that one data rank reads in the step after `samples_consumed`: shape (A, B).

    Over all data ranks these are samples_consumed .. samples_consumed + global_batch_size - 1, each once.
    """
    samples_per_pass = micro_batch_size * data_size
    assert global_batch_size % samples_per_pass == 0, "validated with the config"
    assert 0 <= data_rank < data_size
    assert samples_consumed >= 0
    passes = np.arange(0, global_batch_size, samples_per_pass, dtype=np.int64)
    first = samples_consumed + passes + data_rank * micro_batch_size
    return first[:, None] + np.arange(micro_batch_size, dtype=np.int64)


def micro_batches(
    samples: TokenSamples,
    *,
    samples_consumed: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
) -> Iterator[npt.NDArray[np.int64]]:
    """The micro-batches of one data rank for one step: A arrays of tokens (B, T+1)."""
    indices = sample_indices(
        samples_consumed=samples_consumed,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        data_rank=data_rank,
        data_size=data_size,
    )
    return map(samples.take, indices)


def check_corpus(data: DataConfig, sequence_length: int) -> None:
    """Refuse, from file sizes alone, a corpus that cannot fill one sample in either part."""
    train, validation = token_counts(data)
    # The shorter part first: what it is offered as a remedy then holds for both.
    parts = sorted(
        [(train, "the training part of the corpus"), (validation, "the validation part of the corpus")]
    )
    for tokens, part in parts:
        count_windows(tokens, sequence_length, part)


def count_windows(tokens: int, sequence_length: int, part: str = "the corpus") -> int:
    """Windows of `sequence_length` inputs, plus one last target, that fit in `tokens`: at least one."""
    assert sequence_length >= 1, "validated with the config"
    if tokens <= sequence_length:
        shorter = f"data.sequence_length={tokens - 1}, or more text" if tokens > 1 else "more text"
        raise ConfigError(
            "data.sequence_length",
            sequence_length,
            f"{part} has {tokens} tokens, and one sample takes {sequence_length + 1} (the last is a target)",
            shorter,
        )
    return (tokens - 1) // sequence_length


def permute(positions: npt.NDArray[np.int64], size: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """A pseudo-random permutation of range(size), keyed by (seed, epoch), at `positions` (any,) only.

    The generalised Feistel cipher with cycle walking of Black & Rogaway, "Ciphers with Arbitrary
    Finite Domains", CT-RSA 2002 (eprint.iacr.org/2001/012): no table, so neither memory nor a
    restart's start-up grows with the corpus.
    """
    # The factors' product exceeds size by less than left_size, so that walks are rare and short.
    left_size = math.isqrt(size - 1) + 1
    right_size = -(-size // left_size)
    keys = _round_keys(seed, epoch)
    values = _encipher(positions.astype(np.uint64), left_size, right_size, keys)
    outside = values >= size
    while outside.any():
        values[outside] = _encipher(values[outside], left_size, right_size, keys)
        outside = values >= size
    return values.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> npt.NDArray[np.uint64]:
    # A hash and not numpy's generators, whose streams may change between numpy versions.
    digest = hashlib.shake_128(f"sample order/{seed}/{epoch}".encode()).digest(8 * _ROUNDS)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _encipher(
    values: npt.NDArray[np.uint64], left_size: int, right_size: int, keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """A bijection of range(left_size * right_size)."""
    a, b = np.uint64(left_size), np.uint64(right_size)
    left, right = values // b, values % b
    for i, key in enumerate(keys):
        # Reduced before it is added: a sum that wrapped at 2**64 would make two values collide.
        if i % 2 == 0:
            left = (left + _mix(right, key) % a) % a
        else:
            right = (right + _mix(left, key) % b) % b
    return left * b + right


def _mix(values: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """SplitMix64's output function (Steele, Lea & Flood, OOPSLA 2014), wrapping at 2**64 as meant."""
    mixed = values + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
