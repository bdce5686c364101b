"""The weights and the batches that every peer starts from: those of the launcher."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.contest.job import BATCHES, WEIGHTS, Job

MicroBatch = tuple[Tensor, Tensor]  # tokens and labels, both (B, T)


def initial_weights(job: Job) -> dict[str, Tensor]:
    """Return the launcher's initial weights in fp32, by logical name."""
    return load_file(Path(job.folder) / WEIGHTS)


def micro_batches(job: Job, data_rank: int) -> Iterator[list[MicroBatch]]:
    """Yield this data rank's micro-batches of each step: those that the launcher's data rank reads."""
    batches = np.load(Path(job.folder) / BATCHES)  # (steps, global batch, T+1)
    parts = batches.reshape(len(batches), job.accumulation, job.data_ranks, job.micro_batch, -1)
    for step in count():
        yield [_split(part, job.device) for part in parts[step % len(parts), :, data_rank]]


def _split(tokens: np.ndarray, device: str) -> MicroBatch:
    inputs, labels = (torch.from_numpy(np.ascontiguousarray(x)) for x in (tokens[:, :-1], tokens[:, 1:]))
    if device == "cuda":
        inputs, labels = (x.pin_memory().to(device, non_blocking=True) for x in (inputs, labels))
    return inputs, labels
