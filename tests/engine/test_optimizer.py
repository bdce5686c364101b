"""Learning-rate schedules against values computed by hand, and the parameters with weight decay."""

import pytest
import torch
from torch import nn

from launcher.config.schema import OptimizerConfig, OptimizerName, SchedulerConfig, SchedulerName
from launcher.engine.optimizer import build_optimizer, learning_rate
from launcher.parallel.sharding import LogicalTensor


def rates(scheduler: SchedulerConfig, steps: int) -> list[float]:
    optimizer = OptimizerConfig(name=OptimizerName.adamw, lr=1.0)
    return [learning_rate(optimizer, scheduler, step=step, steps=steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (SchedulerConfig(SchedulerName.constant), [1, 1, 1, 1]),
        (SchedulerConfig(SchedulerName.constant, warmup_steps=2), [0.5, 1, 1, 1]),
        (SchedulerConfig(SchedulerName.linear), [0.75, 0.5, 0.25, 0]),
        (SchedulerConfig(SchedulerName.linear, min_lr_ratio=0.2), [0.8, 0.6, 0.4, 0.2]),
        (SchedulerConfig(SchedulerName.linear, warmup_steps=2), [0.5, 1, 0.5, 0]),
        (SchedulerConfig(SchedulerName.cosine, warmup_steps=1, min_lr_ratio=0.1), [1, 0.775, 0.325, 0.1]),
        (SchedulerConfig(SchedulerName.wsd, warmup_steps=1, decay_steps=2), [1, 1, 0.5, 0]),
        (SchedulerConfig(SchedulerName.cosine, warmup_steps=8), [0.125, 0.25, 0.375, 0.5]),
        (SchedulerConfig(SchedulerName.cosine, warmup_steps=4), [0.25, 0.5, 0.75, 1]),
    ],
)
def test_learning_rate_schedule(scheduler: SchedulerConfig, expected: list[float]) -> None:
    assert rates(scheduler, 4) == pytest.approx(expected, abs=1e-12)


def parameter(name: str, *shape: int) -> nn.Parameter:
    flat = nn.Parameter(torch.zeros(6))  # as under ZeRO-3
    flat.logical = LogicalTensor(name, shape)  # type: ignore[attr-defined]
    return flat


def test_weight_decay_applies_to_logical_matrices_only() -> None:
    config = OptimizerConfig(OptimizerName.sgd, lr=0.1, weight_decay=0.5, momentum=0.9)
    matrix, vector = parameter("w", 2, 3), parameter("b", 6)
    groups = build_optimizer(config, [matrix, vector]).param_groups
    assert [(group["params"], group["weight_decay"]) for group in groups] == [
        ([matrix], 0.5),
        ([vector], 0.0),
    ]
