"""Verify compares runs on conversations with masked labels, and finds a mean of means."""

import pytest
from torch import Tensor

from launcher.config.numbers import IGNORED_LABEL
from launcher.parity.reference import probe_batches
from tests.parity.running import plain_sgd_pass, small_run, worst

CHAT = ["data=chat", "data.train=chats.jsonl"]


@pytest.mark.parametrize(
    "layout",
    [
        "parallelism=dp parallelism.data=2",
        pytest.param("parallelism=tp2_pp2 parallelism.data=2", marks=pytest.mark.slow),
        pytest.param("parallelism=zero3 parallelism.data=2", marks=pytest.mark.slow),
        pytest.param("parallelism=pp2 parallelism.pipeline_schedule=dualpipev", marks=pytest.mark.slow),
    ],
)
def test_masked_labels_agree_with_the_reference(layout: str) -> None:
    result = plain_sgd_pass(small_run(*CHAT, *layout.split()))
    assert result.ok, worst(result)


def test_a_micro_batch_without_labels_that_count() -> None:
    """Found by `python -m tests.fuzz --clean`: the loss of such a micro-batch is exactly 0."""
    run = small_run(*CHAT, "model=gpt_tiny", "parallelism=single", "training.micro_batch_size=1", steps=1)
    run.training.global_batch_size = 4
    for seed in range(400):
        run.training.seed = seed
        [(_, labels)] = probe_batches(run)
        if bool((labels == IGNORED_LABEL).all(1).any()):
            break
    result = plain_sgd_pass(run)
    assert result.ok, worst(result)
    losses = [difference for difference in result.differences if difference.kind == "batch_loss"]
    assert 0.0 in [difference.measured for difference in losses]


def mean_of_each_micro_batch() -> None:
    from launcher.models import losses

    def mean_loss(total: Tensor, labels: Tensor, _counted: float | None = None) -> Tensor:
        return total / (labels != IGNORED_LABEL).sum().clamp(min=1)

    losses.mean_loss = mean_loss


def test_a_mean_of_means_is_detected() -> None:
    layout = "parallelism=dp", "parallelism.data=2"
    assert not plain_sgd_pass(small_run(*CHAT, *layout, steps=1), mean_of_each_micro_batch).ok
    # Without masked labels it is no fault.
    assert plain_sgd_pass(small_run(*layout, steps=1), mean_of_each_micro_batch).ok
