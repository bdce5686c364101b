"""Decide which samples each rank reads: a pure function of (seed, samples consumed).

The data-parallel size, accumulation and pipeline depth divide a global batch among ranks. They do not change
which samples it consists of. The sampler has no state: a run resumes in any layout from `samples_consumed`.

Shapes: B micro-batch, T sequence length, A accumulation (micro-batches per step and data rank), C image
channels, S image height and width in pixels.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from launcher.config.sequence_order import Part

# Rounds of the cipher. Four are enough for a large corpus; with 16, even all orders of five windows are
# equally likely.
_ROUNDS = 16

# Tokens (B, T+1), of which inputs are [:, :-1] and labels [:, 1:]; or inputs and labels: tokens (B, T) and
# their masked labels (B, T), or images (B, C, S, S) and classes (B, 1).
MicroBatch = npt.NDArray[np.int64] | tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.int64]]


class Items(Protocol):
    """The windows or images that one epoch reads, each exactly once."""

    def __len__(self) -> int: ...

    def read(self, places: npt.NDArray[np.int64], part: Part | None = None) -> MicroBatch:
        """Return the items at indices `places` (B,), each in [0, len(self)).

        With a `part` only its positions, as inputs and labels: tokens (B, T/C) for C context ranks.
        """

    def count_labels(self, places: npt.NDArray[np.int64]) -> int:
        """Return how many labels of the items at `places` (B,) count, which is how many are not masked."""


@dataclass(frozen=True, eq=False)
class Samples:
    """An endless sequence of samples over `items`, epoch after epoch."""

    items: Items
    shuffle_seed: int | str | None  # gives each epoch another order; None: each epoch in the items' order

    def __len__(self) -> int:
        """Return the number of samples per epoch."""
        return len(self.items)

    def places(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the item index (B,), in [0, len(self)), of each sample `indices` (B,)."""
        epochs, positions = np.divmod(indices, len(self))
        if self.shuffle_seed is None:
            return positions
        places = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            places[rows] = permute(positions[rows], len(self), seed=self.shuffle_seed, epoch=epoch)
        return places

    def take(self, indices: npt.NDArray[np.int64], part: Part | None = None) -> MicroBatch:
        """Return the micro-batch of samples `indices` (B,), or its `part`. Raises ConfigError."""
        return self.items.read(self.places(indices), part)

    def count_labels(self, indices: npt.NDArray[np.int64]) -> int:
        """Return how many labels of samples `indices` (B,) count."""
        return self.items.count_labels(self.places(indices))


def part_of_pair(
    inputs: npt.NDArray[Any], labels: npt.NDArray[Any], part: Part | None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the positions of `part` of inputs and labels (B, T), in the order of the part."""
    if part is None:
        return inputs, labels
    places = np.concatenate([np.arange(each.start, each.stop) for each in part])
    return inputs[:, places], labels[:, places]


def sample_indices(
    *, samples_consumed: int, global_batch_size: int, micro_batch_size: int, data_rank: int, data_size: int
) -> npt.NDArray[np.int64]:
    """Return the samples (A, B) that a data rank reads in the step after `samples_consumed` samples.

    All data ranks together read samples_consumed .. samples_consumed + global_batch_size - 1, each once.
    """
    samples_per_pass = micro_batch_size * data_size
    assert global_batch_size % samples_per_pass == 0, "validated with the config"
    assert 0 <= data_rank < data_size
    assert samples_consumed >= 0
    passes = np.arange(0, global_batch_size, samples_per_pass, dtype=np.int64)
    first = samples_consumed + passes + data_rank * micro_batch_size
    return first[:, None] + np.arange(micro_batch_size, dtype=np.int64)


class Source(Protocol):
    """Gives samples by their index, counted from the beginning of the run."""

    def take(self, indices: npt.NDArray[np.int64], part: Part | None = None) -> MicroBatch:
        """Return the micro-batch of samples `indices` (B,), or its `part`."""

    def count_labels(self, indices: npt.NDArray[np.int64]) -> int:
        """Return how many labels of samples `indices` (B,) count."""


def permute(
    positions: npt.NDArray[np.int64], size: int, *, seed: int | str, epoch: int
) -> npt.NDArray[np.int64]:
    """Return the values at `positions` (n,) of a pseudo-random permutation of range(size).

    `seed` and `epoch` are the key of the permutation. It is the generalised Feistel cipher with cycle walking
    of Black & Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002 (eprint.iacr.org/2001/012). The
    cipher needs no table, so neither memory nor the time to resume grows with the corpus.
    """
    # left_size * right_size exceeds size by less than left_size, so cycle walks are rare and short.
    left_size = math.isqrt(size - 1) + 1
    right_size = -(-size // left_size)
    # A hash, because the streams of numpy's generators may change between numpy versions.
    digest = hashlib.shake_128(f"sample order/{seed}/{epoch}".encode()).digest(8 * _ROUNDS)
    keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
    values = _encipher(positions.astype(np.uint64), left_size, right_size, keys)
    while (outside := values >= size).any():
        values[outside] = _encipher(values[outside], left_size, right_size, keys)
    return values.astype(np.int64)


def _encipher(
    values: npt.NDArray[np.uint64], left_size: int, right_size: int, keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Return the cipher of `values` (n,), a bijection of range(left_size * right_size)."""
    a, b = np.uint64(left_size), np.uint64(right_size)
    left, right = np.divmod(values, b)
    for i, key in enumerate(keys):
        # Reduce the mixed value before the addition: a sum that wraps at 2**64 would map two values to one.
        if i % 2 == 0:
            left = (left + _mix(right, key) % a) % a
        else:
            right = (right + _mix(left, key) % b) % b
    return left * b + right


def _mix(values: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """Return SplitMix64's output function (Steele, Lea & Flood, OOPSLA 2014); it wraps at 2**64 by design."""
    mixed = values + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
