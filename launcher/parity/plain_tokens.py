"""Token files for the whole run, and their windows, read with seeks."""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from launcher.config.schema import CorpusSource, RunConfig
from launcher.config.shape import end_of_document, sequence_length
from launcher.data.token_file import write_index
from launcher.parity.plain_source import PlainSource, Sample

WEIGHTS = {"first": 2, "second": 1}  # of the blend
WINDOWS = {"first": 19, "second": 8}  # samples of an epoch: a few steps go through several epochs
ITEM = 4  # bytes of a token id


def use_tokens(run: RunConfig, folder: Path) -> None:
    """Let the run read the files of write_tokens. Modifies `run`."""
    d = run.data
    if d.document_attention:
        d.end_of_document = end_of_document(run)  # token files do not state one
    d.source, d.train, d.validation = CorpusSource.tokens, None, None
    d.sources = {name: str(folder / f"{name}-train") for name in WEIGHTS}
    d.validation_sources = {name: str(folder / f"{name}-validation") for name in WEIGHTS}
    d.weights = {name: float(weight) for name, weight in WEIGHTS.items()}


def write_tokens(run: RunConfig, folder: Path) -> dict[str, PlainSource]:
    """Write training and validation files of random tokens for each source; return them by name."""
    generator, length = np.random.default_rng(run.training.seed), sequence_length(run)
    sources: dict[str, PlainSource] = {}
    for name, windows in WINDOWS.items():
        # Not a whole number of global batches: the last one is filled up with masked samples.
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
        train, validation = (
            partial(window, folder / f"{name}-{part}.bin", length) for part in ("train", "validation")
        )
        sources[name] = PlainSource(train, windows, validation, held_out)
    return sources


def window(path: Path, length: int, place: int) -> Sample:
    """Return `length` input tokens and their labels, which are the tokens one place later."""
    tokens = tokens_at(path, place * length, length + 1)
    return torch.tensor(tokens[:-1]), torch.tensor(tokens[1:])


def tokens_at(path: Path, start: int, count: int) -> list[int]:
    """Return `count` tokens of a .bin of 4-byte tokens from the token `start` on."""
    with path.open("rb") as file:
        file.seek(start * ITEM)
        return [int.from_bytes(file.read(ITEM), "little") for _ in range(count)]
