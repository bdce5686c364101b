"""The batches of this rank: its data rank's samples of each global batch, in order, or their part."""

import numpy as np
import numpy.typing as npt

from launcher.config.schema import RunConfig
from launcher.config.sequence_order import Part
from launcher.config.shape import sequence_length
from launcher.data.loader import Loader
from launcher.data.sampler import Source, sample_indices
from launcher.engine.base import Engine, MicroBatches
from launcher.parallel.context import context_of
from launcher.parallel.mesh import ProcessMesh


def rank_loader(run: RunConfig, engine: Engine, training: Source) -> Loader:
    """Return the loader that reads this data rank's batches ahead of the steps."""
    return Loader(
        training,
        lambda consumed: rank_samples(run, engine, consumed),
        global_batch_size=run.training.global_batch_size,
        threads=run.data.num_workers,
        ahead=run.data.prefetch,
        part=part_of_rank(run, engine.mesh),
    )


def rank_batches(run: RunConfig, engine: Engine, samples: Source, consumed: int) -> MicroBatches:
    """Return this data rank's micro-batches of the global batch after `consumed` samples."""
    part = part_of_rank(run, engine.mesh)
    return (samples.take(indices, part) for indices in rank_samples(run, engine, consumed))


def part_of_rank(run: RunConfig, mesh: ProcessMesh) -> Part | None:
    """Return the positions of each sequence that this context rank holds; None if it holds all of them."""
    context = context_of(mesh.context, run.parallelism.context_method)
    return None if context is None else context.part(sequence_length(run))


def counted_labels(run: RunConfig, samples: Source, consumed: int) -> int:
    """Return how many labels of the global batch after `consumed` samples count, of all data ranks."""
    return samples.count_labels(np.arange(consumed, consumed + run.training.global_batch_size))


def rank_samples(run: RunConfig, engine: Engine, consumed: int) -> npt.NDArray[np.int64]:
    """Return this data rank's sample indices (A, B) of the global batch after `consumed` samples."""
    return sample_indices(
        samples_consumed=consumed,
        global_batch_size=run.training.global_batch_size,
        micro_batch_size=run.training.micro_batch_size,
        data_rank=engine.mesh.batch.rank,
        data_size=engine.mesh.batch.size,
    )
