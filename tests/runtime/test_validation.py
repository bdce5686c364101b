"""The validation loss counts each sample once, however many samples there are."""

from typing import Any

import numpy as np
import pytest
import torch

from launcher.config.numbers import IGNORED_LABEL
from launcher.config.schema import RunConfig
from launcher.data.sampler import Samples
from launcher.data.windows import Stretch, Windows
from launcher.engine.base import MicroBatches
from launcher.models.losses import ClassificationLoss
from launcher.parallel.initializer import Initializer
from launcher.parallel.layers import TensorParallel, VocabParallelHead
from launcher.parallel.mesh import Axis
from launcher.runtime.validation import validation_loss
from tests.config.composing import run_of

LENGTH = 4


def run_with(batch: int, micro_batch: int, batches: int) -> RunConfig:
    sizes = f"training.global_batch_size={batch}", f"training.micro_batch_size={micro_batch}"
    return run_of("model=gpt_tiny", "parallelism.data=1", *sizes, f"training.validation_batches={batches}")


class AllRanks:
    """An engine of `data` data ranks in one process: the loss of a label is the label."""

    def __init__(self, data: int) -> None:
        self.mesh = self  # a mesh with the axis `batch`
        self.size = data
        self.rank = 0
        self.counted: list[int] = []  # first label of each sample that is counted

    @property
    def batch(self) -> "AllRanks":
        return self

    @property
    def context(self) -> Axis:
        return Axis()

    def eval_batch(self, batches: MicroBatches, labels: int) -> torch.Tensor:
        losses = []
        for inputs, of_batch in (self._pair(batch) for batch in batches):
            assert inputs.shape == of_batch.shape
            kept = of_batch != IGNORED_LABEL
            assert (kept.all(axis=1) | ~kept.any(axis=1)).all()
            self.counted += of_batch[kept.all(axis=1), 0].tolist()
            losses.append(of_batch[kept].sum())
        return torch.tensor(np.sum(losses) * self.size / labels)

    def _pair(self, batch: Any) -> Any:
        return batch if isinstance(batch, tuple) else (batch[:, :-1], batch[:, 1:])


def samples_of(count: int) -> Samples:
    tokens = np.random.default_rng(count).permutation(count * LENGTH + 1)
    return Samples(Windows([Stretch(tokens)], LENGTH), None)


@pytest.mark.parametrize(
    ("count", "batch", "micro_batch", "batches", "used"),
    [
        (8, 8, 2, 3, 8),  # one whole batch
        (3, 8, 2, 3, 3),  # fewer than a batch: one whole micro-batch and a half
        (1, 8, 4, 1, 1),
        (21, 8, 4, 9, 21),  # two batches, a micro-batch and a sample
        (21, 8, 4, 2, 16),  # no more than training.validation_batches
        (30, 7, 1, 9, 30),
        (5, 6, 6, 2, 5),
    ],
)
def test_each_sample_counts_once(count: int, batch: int, micro_batch: int, batches: int, used: int) -> None:
    engine, samples = AllRanks(1), samples_of(count)
    loss = validation_loss(run_with(batch, micro_batch, batches), engine, samples)  # type: ignore[arg-type]
    taken = samples.take(np.arange(used))
    assert isinstance(taken, np.ndarray)
    assert loss == pytest.approx(taken[:, 1:].mean())
    assert sorted(engine.counted) == sorted(taken[:, 1].tolist())


def test_data_ranks_share_the_remaining_samples() -> None:
    """Two ranks run one after the other; each returns the mean of its own micro-batches."""
    run, samples, losses = run_with(8, 2, 5), samples_of(11), []
    engines = [AllRanks(2), AllRanks(2)]
    for rank, engine in enumerate(engines):
        engine.rank = rank
        losses.append(validation_loss(run, engine, samples))  # type: ignore[arg-type]
    taken = samples.take(np.arange(11))
    assert isinstance(taken, np.ndarray)
    assert np.mean(losses) == pytest.approx(taken[:, 1:].mean())
    assert sorted(engines[0].counted + engines[1].counted) == sorted(taken[:, 1].tolist())


def test_accuracy_does_not_count_ignored_labels() -> None:
    run = run_of("model=vit_tiny", "data=digits")
    tp = TensorParallel(Axis(), False, Initializer(0, Axis()))
    loss = ClassificationLoss(run.model, tp)
    loss.head = VocabParallelHead("head", 10, 10, tp, std=1.0)
    torch.nn.init.eye_(loss.head.weight)  # the logits are the input
    logits = torch.zeros(3, 1, 10)
    logits[:, 0, 4] = 1.0
    with torch.no_grad():
        loss.labels_per_micro_batch = 2
        mean = loss(logits, torch.tensor([[4], [2], [IGNORED_LABEL]]))
    assert (loss.right, loss.seen) == (1, 2)
    assert float(mean) == pytest.approx(float(torch.logsumexp(logits[0, 0], 0)) - 0.5)
