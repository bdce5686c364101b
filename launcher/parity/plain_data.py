"""Token files for the whole run, and the samples of its steps, read in the plainest way.

The blend, the order of samples and the windows are written again here, with integers, loops and seeks: one
sample after the other. It shares no code with launcher/data, except that it writes the index of its files.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from launcher.config.schema import CorpusSource, RunConfig
from launcher.config.shape import end_of_document, sequence_length
from launcher.data.token_file import write_index

WEIGHTS = {"first": 2, "second": 1}  # weights of the blend
WINDOWS = {"first": 19, "second": 8}  # samples of an epoch: a few steps go through several epochs
ITEM = 4  # bytes of a token id
_MASK = 2**64 - 1

GlobalBatch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PlainSource:
    """The files of a source of the blend, and their numbers of samples."""

    train: Path
    validation: Path
    windows: int
    held_out: int


def write_files(run: RunConfig, folder: Path) -> dict[str, PlainSource]:
    """Write training and validation files of random tokens for each source; return them by name."""
    generator, length = np.random.default_rng(run.training.seed), sequence_length(run)
    sources: dict[str, PlainSource] = {}
    for name, windows in WINDOWS.items():
        # Not a whole number of global batches: the last batch is filled up with masked samples.
        held_out = run.training.global_batch_size + 1 + len(sources)
        for part, count in (("train", windows), ("validation", held_out)):
            tokens = generator.integers(0, run.model.vocab_size, count * length + 1 + length // 2)
            if (end := end_of_document(run)) is not None:
                tokens[generator.random(len(tokens)) < 0.25] = end
                tokens[-1] = end
            tokens.astype("<i4").tofile(folder / f"{name}-{part}.bin")
            rest = len(tokens) - 2 * (len(tokens) // 3)
            lengths = np.array([len(tokens) // 3, len(tokens) // 3, rest], np.int32)
            if end is not None:
                lengths = np.diff(np.flatnonzero(tokens == end), prepend=-1).astype(np.int32)
            write_index(folder / f"{name}-{part}.idx", lengths, np.dtype("<i4"))
        files = (folder / f"{name}-train.bin", folder / f"{name}-validation.bin")
        sources[name] = PlainSource(*files, windows, held_out)
    return sources


def use_files(run: RunConfig, folder: Path) -> None:
    """Let the run read the files that write_files writes into `folder`. Modifies `run`."""
    d = run.data
    d.source, d.train, d.validation, d.test, d.tokenizer = CorpusSource.tokens, None, None, None, None
    d.sources = {name: str(folder / f"{name}-train") for name in WEIGHTS}
    d.validation_sources = {name: str(folder / f"{name}-validation") for name in WEIGHTS}
    d.weights = {name: float(weight) for name, weight in WEIGHTS.items()}


def training_batch(run: RunConfig, sources: dict[str, PlainSource], consumed: int) -> GlobalBatch:
    """Return the global batch after `consumed` samples."""
    numbers = range(consumed, consumed + run.training.global_batch_size)
    blended = [name for name, _ in zip(_blend(), range(numbers.stop), strict=False)]
    rows = []
    for number in numbers:
        name = blended[number]
        epoch, position = divmod(blended[:number].count(name), sources[name].windows)
        seed = f"{run.training.seed}/{name}"
        place = shuffled(position, sources[name].windows, seed, epoch)
        rows.append(window(sources[name].train, place, sequence_length(run)))
    return _batch(rows)


def validation_batch(run: RunConfig, source: PlainSource) -> GlobalBatch:
    """Return the first validation samples of a source, in the order of the file."""
    count = min(run.training.validation_batches * run.training.global_batch_size, source.held_out)
    return _batch([window(source.validation, place, sequence_length(run)) for place in range(count)])


def window(path: Path, place: int, length: int) -> list[int]:
    """Return `length` input tokens and the last target of a window."""
    with path.open("rb") as file:
        file.seek(place * length * ITEM)
        read = [int.from_bytes(file.read(ITEM), "little") for _ in range(length + 1)]
    return read


def _batch(rows: list[list[int]]) -> GlobalBatch:
    tokens = torch.tensor(rows)
    return tokens[:, :-1], tokens[:, 1:].clone()


def _blend() -> Iterator[str]:
    """Yield the source of each sample: the earliest deadline of the sources not ahead of their share."""
    names, given, total = sorted(WEIGHTS), dict.fromkeys(WEIGHTS, 0), sum(WEIGHTS.values())
    sample = 0
    while True:
        # Sample j of a source comes between j / share and (j + 1) / share.
        due = [name for name in names if given[name] * total // WEIGHTS[name] <= sample]
        name = min(due, key=lambda n: (-(-(given[n] + 1) * total // WEIGHTS[n]), names.index(n)))
        given[name] += 1
        sample += 1
        yield name


def shuffled(position: int, size: int, seed: str, epoch: int) -> int:
    """Return the item at `position` of an epoch: a Feistel cipher of 16 rounds over a grid of `size` cells.

    A value of `size` or more is enciphered again (Black & Rogaway, CT-RSA 2002). Keys: SHAKE-128.
    """
    a = isqrt(size - 1) + 1
    b = (size + a - 1) // a
    digest = hashlib.shake_128(f"sample order/{seed}/{epoch}".encode()).digest(128)
    value = position
    while True:
        left, right = value // b, value % b
        for round_ in range(16):
            key = int.from_bytes(digest[8 * round_ : 8 * round_ + 8], "little")
            if round_ % 2 == 0:
                left = (left + _mixed(right, key) % a) % a
            else:
                right = (right + _mixed(left, key) % b) % b
        value = left * b + right
        if value < size:
            return value


def _mixed(value: int, key: int) -> int:
    """Return SplitMix64's output function (Steele, Lea & Flood, OOPSLA 2014)."""
    x = (value + key) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
