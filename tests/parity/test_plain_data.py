"""The samples that verify reads with plain seeks are those of the loader; its rates are those of the run."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from launcher.config.numbers import IGNORED_LABEL
from launcher.config.schema import SchedulerName
from launcher.data.chat import open_chats
from launcher.data.open import blend_of, open_data
from launcher.data.sampler import MicroBatch, permute
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


RUNS = {
    "tokens": ["model=gpt_tiny", "model.max_sequence_length=16"],
    "documents": ["model=gpt_tiny", "model.max_sequence_length=16", "data.document_attention=true"],
    "parts of the files": ["model=gpt_tiny", "data=tokens", "data.train=web", "data.test_fraction=0.3"],
    "conversations": [
        "model=gpt_tiny",
        "model.max_sequence_length=16",
        "data=chat",
        "data.train=chats.jsonl",
    ],
    "conversations of few tokens": [
        "model=gpt_tiny",
        "data=chat",
        "data.train=c.jsonl",
        "data.sequence_length=4",
    ],
    "digits": ["model=vit_tiny", "data=digits"],
    "images in colour": ["model=vit_b16", "data=image_folder", "data.train=images", "model.image_size=16"],
}


def as_pair(taken: MicroBatch) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    return taken if isinstance(taken, tuple) else (taken[:, :-1], taken[:, 1:])


@pytest.mark.parametrize("kind", RUNS)
def test_global_batches_are_those_of_the_loader(kind: str, tmp_path: Path) -> None:
    run = run_of(*RUNS[kind], "training.global_batch_size=10")
    use_files(run, tmp_path)
    sources = write_files(run, tmp_path)
    data = open_data(run)
    for consumed in (0, 31, 95):
        ours = training_batch(run, sources, consumed)
        theirs = as_pair(data.blend([blend_of(run)]).take(np.arange(consumed, consumed + 10)))
        for plain, loaded in zip(ours, theirs, strict=True):
            assert plain.shape == loaded.shape
            assert (plain.numpy() == loaded).all()
    assert {name: len(samples) for name, samples in data.train.items()} == {
        name: source.samples for name, source in sources.items()
    }
    for name, source in sources.items():
        assert len(data.validation[name]) == source.held_out
        count = min(20, source.held_out)
        theirs = as_pair(data.validation[name].take(np.arange(count)))
        for plain, loaded in zip(validation_batch(run, source), theirs, strict=True):
            assert (plain.numpy()[:count] == loaded).all()


def test_conversations_are_left_out_cut_and_masked(tmp_path: Path) -> None:
    """Else the whole run would not show a mistake in these."""
    run = run_of(*RUNS["conversations"], "training.global_batch_size=10")
    use_files(run, tmp_path)
    sources = write_files(run, tmp_path)
    for part in (open_chats(run).train, open_chats(run).validation):
        assert part.left_out > 0
        assert part.cut > 0
    _, labels = training_batch(run, sources, 31)
    shares = (labels != IGNORED_LABEL).float().mean(1)
    assert 0.1 < shares.mean() < 0.9
    assert len(set(shares.tolist())) > 1


@pytest.mark.parametrize("name", SchedulerName)
def test_the_rates_are_those_of_the_run(name: SchedulerName) -> None:
    run = run_of("scheduler.warmup_steps=2", "scheduler.min_lr_ratio=0.1", f"training.steps={TOTAL}")
    run.scheduler.name, run.scheduler.decay_steps = name, 1 if name is SchedulerName.wsd else None
    for step in range(1, TOTAL + 1):
        assert rate_of(run, step) == pytest.approx(rate_of_the_run(run, step))
