"""Validation and test losses of a run, over the same samples each time and in every layout."""

from launcher.config.schema import RunConfig
from launcher.data.open import ONLY, Data
from launcher.data.sampler import Samples
from launcher.engine.base import Engine
from launcher.runtime.batches import rank_batches
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
    """Return the mean loss over the first validation batches. Collective over the world."""
    size = run.training.global_batch_size
    batches = max(1, min(run.training.validation_batches, len(samples) // size))
    losses = [engine.eval_batch(rank_batches(run, engine, samples, n * size)) for n in range(batches)]
    # Read only now, so that the batches follow one another on the device.
    return sum(float(loss) for loss in losses) / batches
