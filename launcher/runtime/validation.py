"""Validation and test losses of a run, over the same samples each time and in every layout."""

import numpy as np

from launcher.config.numbers import IGNORED_LABEL
from launcher.config.schema import RunConfig
from launcher.data.open import ONLY, Data
from launcher.data.sampler import Samples
from launcher.engine.base import Engine, MicroBatches
from launcher.runtime.batches import part_of_rank, rank_batches, rank_samples
from launcher.runtime.metrics.rows import Row


def is_validation_step(run: RunConfig, step: int, last: int) -> bool:
    """Return whether to validate after a step: at intervals, after the first step and after the last."""
    interval = run.training.validation_interval
    return step == last or (interval > 0 and (step == 1 or step % interval == 0))


def validation_row(run: RunConfig, engine: Engine, data: Data, step: int) -> Row:
    """Return the validation losses, after the last step also those of a test set. Collective."""
    row = loss_row(run, engine, data.validation, "val/loss")
    if step and step == run.training.steps and data.test:
        row |= loss_row(run, engine, data.test, "test/loss")
    return row


def loss_row(run: RunConfig, engine: Engine, sources: dict[str, Samples], name: str) -> Row:
    """Return the loss of each source and their mean by the blend's weights. Collective over the world."""
    losses = {source: validation_loss(run, engine, samples) for source, samples in sources.items()}
    accuracy = engine.accuracy()
    weights = {source: run.data.weights.get(source, 1.0) for source in losses}
    mean = sum(weights[source] * losses[source] for source in losses) / sum(weights.values())
    row: Row = {name: mean, **{f"{name}/{source}": loss for source, loss in losses.items() if source != ONLY}}
    return row if accuracy is None else row | {name.replace("loss", "accuracy"): accuracy}


def validation_loss(run: RunConfig, engine: Engine, samples: Samples) -> float:
    """Return the mean loss over all labels of the first validation samples. Collective over the world.

    The number of samples is `training.validation_batches` global batches, or all samples if there are fewer.
    """
    size, losses = run.training.global_batch_size, []
    count = min(run.training.validation_batches * size, len(samples))
    for start in range(0, count, size):
        part = range(start, min(start + size, count))
        if len(part) == size:
            batches = rank_batches(run, engine, samples, start)
        else:
            batches = _masked_batches(run, engine, samples, part)
        labels = samples.count_labels(np.array(part))
        losses.append((engine.eval_batch(batches, labels), labels))
    # Read only now, so that the batches follow one another on the device.
    return sum(float(loss) * labels for loss, labels in losses) / max(1, sum(n for _, n in losses))


def _masked_batches(run: RunConfig, engine: Engine, samples: Samples, counted: range) -> MicroBatches:
    """Yield this data rank's micro-batches of a global batch; samples that are not `counted` are masked."""
    for places in rank_samples(run, engine, counted.start):
        # Samples outside `counted` keep the shape of the batch, but their labels are ignored.
        batch = samples.take(np.minimum(places, counted.stop - 1), part_of_rank(run, engine.mesh))
        inputs, labels = batch if isinstance(batch, tuple) else (batch[:, :-1], batch[:, 1:])
        yield inputs, np.where((places < counted.stop)[:, None], labels, IGNORED_LABEL)
