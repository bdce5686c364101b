"""Files for the whole run, and the global batches of its steps, read in the plainest way.

The blend and the order of samples are written again here, with integers and loops: one sample after the
other. Tokens, images and conversations each have a module. They share no code with launcher/data, except
the function that writes the index of token files.
"""

import hashlib
from collections.abc import Iterator
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor

from launcher.config.schema import CorpusSource, InputKind, RunConfig
from launcher.parity.plain_chats import use_chats, write_chats
from launcher.parity.plain_images import use_images, write_images
from launcher.parity.plain_source import PlainSource, Sample
from launcher.parity.plain_tokens import use_tokens, write_tokens

_MASK = 2**64 - 1

GlobalBatch = tuple[Tensor, Tensor]


def use_files(run: RunConfig, folder: Path) -> None:
    """Let the run read the files that write_files writes into `folder`. Modifies `run`.

    A run on conversations keeps them, a run on images reads an image folder, all others read token files.
    """
    d = run.data
    d.sources, d.validation_sources, d.weights = {}, {}, {}
    d.test, d.tokenizer, d.test_fraction = None, None, 0.0
    if run.model.inputs is InputKind.patches:
        use_images(run, folder)
    elif d.source is CorpusSource.chat:
        use_chats(run, folder)
    else:
        use_tokens(run, folder)


def write_files(run: RunConfig, folder: Path) -> dict[str, PlainSource]:
    """Write the training and validation files of a run after use_files; return its sources by name.

    A blend has several sources; a run without one has a single source without a name.
    """
    if run.model.inputs is InputKind.patches:
        return write_images(run, folder)
    return write_chats(run, folder) if run.data.source is CorpusSource.chat else write_tokens(run, folder)


def blend_weights(run: RunConfig) -> dict[str, int]:
    """Return the weight of each source in the blend."""
    return {name: int(weight) for name, weight in run.data.weights.items()} or {"": 1}


def training_batch(run: RunConfig, sources: dict[str, PlainSource], consumed: int) -> GlobalBatch:
    """Return the global batch after `consumed` samples."""
    numbers = range(consumed, consumed + run.training.global_batch_size)
    blended = [name for name, _ in zip(_blend(blend_weights(run)), range(numbers.stop), strict=False)]
    rows = []
    for number in numbers:
        name = blended[number]
        source = sources[name]
        epoch, position = divmod(blended[:number].count(name), source.samples)
        seed = f"{run.training.seed}/{name}" if name else str(run.training.seed)
        rows.append(source.train(shuffled(position, source.samples, seed, epoch)))
    return _batch(rows)


def validation_batch(run: RunConfig, source: PlainSource) -> GlobalBatch:
    """Return the first validation samples of a source, in the order of the files."""
    count = min(run.training.validation_batches * run.training.global_batch_size, source.held_out)
    return _batch([source.validation(place) for place in range(count)])


def _batch(rows: list[Sample]) -> GlobalBatch:
    return torch.stack([inputs for inputs, _ in rows]), torch.stack([labels for _, labels in rows])


def _blend(weights: dict[str, int]) -> Iterator[str]:
    """Yield the source of each sample: the earliest deadline of the sources not ahead of their share."""
    names, given, total = sorted(weights), dict.fromkeys(weights, 0), sum(weights.values())
    sample = 0
    while True:
        # Sample j of a source comes between j / share and (j + 1) / share.
        due = [name for name in names if given[name] * total // weights[name] <= sample]
        name = min(due, key=lambda n: (-(-(given[n] + 1) * total // weights[n]), names.index(n)))
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
