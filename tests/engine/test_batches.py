"""The inputs and labels that an engine makes of a micro-batch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from launcher.config.numbers import IGNORED_LABEL
from launcher.engine.base import Engine


def to_device(batch: object, labels_per_micro_batch: float | None = None) -> list[list[list[int]]]:
    engine = SimpleNamespace(
        device=torch.device("cpu"), loss=SimpleNamespace(labels_per_micro_batch=labels_per_micro_batch)
    )
    return [part.tolist() for part in Engine._to_device(engine, batch)]  # type: ignore[arg-type]


def test_labels_are_the_tokens_one_position_later() -> None:
    batch = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert to_device(batch) == [[[1, 2, 3], [5, 6, 7]], [[2, 3, 4], [6, 7, 8]]]


def test_a_pair_is_taken_as_it_is() -> None:
    inputs, labels = np.array([[1, 2]]), np.array([[IGNORED_LABEL, 4]])
    assert to_device((inputs, labels), 1.0) == [[[1, 2]], [[IGNORED_LABEL, 4]]]
    with pytest.raises(AssertionError, match="the number of labels that count"):
        to_device((inputs, labels))
