"""The samples that verify reads with plain seeks are those of the loader; its rates are those of the run."""

from pathlib import Path

import numpy as np
import pytest

from launcher.config.schema import SchedulerName
from launcher.data.open import blend_of, open_data
from launcher.data.sampler import permute
from launcher.parity.plain_data import shuffled, training_batch, use_files, validation_batch, write_files
from launcher.parity.whole import TOTAL, rate_of
from launcher.runtime.training import rate_of as rate_of_the_run
from tests.config.composing import run_of


def test_the_order_is_a_permutation_and_equals_that_of_the_sampler() -> None:
    for size in (1, 2, 19, 100):
        for epoch in (0, 3):
            order = [shuffled(position, size, "7/first", epoch) for position in range(size)]
            assert sorted(order) == list(range(size))
            assert order == permute(np.arange(size), size, seed="7/first", epoch=epoch).tolist()


def test_global_batches_are_those_of_the_blend(tmp_path: Path) -> None:
    run = run_of("model=gpt_tiny", "model.max_sequence_length=16", "training.global_batch_size=10")
    use_files(run, tmp_path)
    sources = write_files(run, tmp_path)
    data = open_data(run)
    for consumed in (0, 31, 95):
        inputs, labels = training_batch(run, sources, consumed)
        taken = data.blend([blend_of(run)]).take(np.arange(consumed, consumed + 10))
        assert isinstance(taken, np.ndarray)
        assert (inputs.numpy() == taken[:, :-1]).all()
        assert (labels.numpy() == taken[:, 1:]).all()
    for name, source in sources.items():
        assert len(data.validation[name]) == source.held_out
        held_out = data.validation[name].take(np.arange(min(20, source.held_out)))
        assert (validation_batch(run, source)[0].numpy()[:20] == held_out[:, :-1]).all()


@pytest.mark.parametrize("name", SchedulerName)
def test_the_rates_are_those_of_the_run(name: SchedulerName) -> None:
    run = run_of("scheduler.warmup_steps=2", "scheduler.min_lr_ratio=0.1", f"training.steps={TOTAL}")
    run.scheduler.name, run.scheduler.decay_steps = name, 1 if name is SchedulerName.wsd else None
    for step in range(1, TOTAL + 1):
        assert rate_of(run, step) == pytest.approx(rate_of_the_run(run, step))
