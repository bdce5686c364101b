"""Overheads of a step are computed from step times of small runs: medians over interleaved rounds."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launcher.calibrate import engine_overhead, probes
from launcher.calibrate.engine_overhead import Trial, step_seconds, with_engine
from launcher.config.schema import MeasuredCollective, MeasuredProducts, MeasuredRates, Point, Scale

STEP, MICRO_BATCH, BLOCK_OF_ZERO_2, BLOCK_OF_ZERO_3, STAGE = 3e-3, 1e-3, 3e-4, 5e-4, 2e-3
FACTOR, WAITING_FACTOR = 1.25, 1.5


def rates_of(ranks: int) -> MeasuredRates:
    kinds = ("all_reduce", "all_gather", "reduce_scatter", "send")
    return MeasuredRates(
        ranks=ranks,
        products=MeasuredProducts(fp32=[Point(1e6, 5e10)], bf16=[Point(1e6, 5e10)]),
        elementwise=[Point(1e4, 1e10)],
        stream=1e10,
        operation_s=1e-5,
        collectives=[MeasuredCollective(kind, 2, [Point(1e5, 1e9)]) for kind in kinds],
    )


class Machine:
    """Takes the planned time of a step with the overheads above, and `slow` times as long in one round."""

    def __init__(self, slow_calls: range = range(0)) -> None:
        self.taken: list[int] = []
        self.slow_calls = slow_calls

    def step_seconds(self, trial: Trial, *, threads: int, steps: int) -> float:
        assert threads == 2 // trial.ranks
        assert 6 <= steps <= 40
        self.taken.append(trial.ranks)
        sized = trial.run.model.hidden_size > 32
        rates = replace(
            rates_of(trial.ranks),
            step_s=STEP,
            micro_batch_s=MICRO_BATCH,
            zero_2_block_s=BLOCK_OF_ZERO_2,
            zero_3_block_s=BLOCK_OF_ZERO_3,
            pipeline_batch_s=STAGE,
            scales=[Scale(trial.block_flops, FACTOR)] if sized else [],
            waiting_scales=[Scale(trial.block_flops, WAITING_FACTOR)] if sized else [],
        )
        slow = 10 if len(self.taken) - 1 in self.slow_calls else 1
        return slow * trial.planned_time(rates).total


@pytest.mark.parametrize("slow_calls", [range(0), range(7), range(7, 18), range(22, 33)])
def test_overheads_of_a_known_machine_are_found(slow_calls: range, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(slow_calls)
    monkeypatch.setattr(engine_overhead, "step_seconds", machine.step_seconds)
    for found in with_engine([rates_of(1), rates_of(2)], cores=2, rounds=3):
        assert found.step_s == pytest.approx(STEP, rel=0.01)
        assert found.micro_batch_s == pytest.approx(MICRO_BATCH, rel=0.01)
        assert found.zero_2_block_s == pytest.approx(BLOCK_OF_ZERO_2, rel=0.01)
        assert found.zero_3_block_s == pytest.approx(BLOCK_OF_ZERO_3, rel=0.01)
        assert found.pipeline_batch_s == pytest.approx(STAGE if found.ranks > 1 else 0, rel=0.01)
        assert [scale.factor for scale in found.scales] == pytest.approx([FACTOR] * 3, rel=0.01)
        waiting = [] if found.ranks == 1 else [WAITING_FACTOR] * 3
        assert [scale.factor for scale in found.waiting_scales] == pytest.approx(waiting, rel=0.01)


def test_each_round_has_all_numbers_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    monkeypatch.setattr(engine_overhead, "step_seconds", machine.step_seconds)
    with_engine([rates_of(1), rates_of(2)], cores=2, rounds=2)
    assert machine.taken == ([1] * 7 + [2] * 11) * 2  # tensor parallelism and a pipeline need two ranks


def test_overheads_are_found_where_the_parts_are_planned_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    def step_seconds(trial: Trial, *, threads: int, steps: int) -> float:
        known = replace(rates_of(2), zero_3_block_s=BLOCK_OF_ZERO_3, pipeline_batch_s=STAGE)
        with_overheads, bare = trial.planned_time(known), trial.planned_time(rates_of(2))
        return with_overheads.total - 0.3 * (bare.compute + bare.bubble)

    monkeypatch.setattr(engine_overhead, "step_seconds", step_seconds)
    [found] = with_engine([rates_of(2)], cores=2, rounds=1)
    assert (found.step_s, found.micro_batch_s) == (0, 0)
    assert found.zero_3_block_s == pytest.approx(BLOCK_OF_ZERO_3, rel=0.02)
    assert found.pipeline_batch_s == pytest.approx(STAGE, rel=0.02)


def test_factors_are_above_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor of zero or less would be refused when the hardware config is read."""

    def step_seconds(trial: Trial, *, threads: int, steps: int) -> float:
        return trial.planned_time(rates_of(2)).total if trial.layout.tensor == 1 else 0.0

    monkeypatch.setattr(engine_overhead, "step_seconds", step_seconds)
    [found] = with_engine([rates_of(2)], cores=2, rounds=1)
    assert [scale.factor for scale in found.scales] == pytest.approx([1] * 3, rel=0.01)
    assert [scale.factor for scale in found.waiting_scales] == [0.01] * 3


def test_a_step_takes_as_long_as_its_slowest_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {0: [1.0, 1.0, 5.0, 1.0], 1: [2.0, 3.0, 1.0, 2.0]}

    def train(rank: int, *, trial: Trial, threads: int, steps: int, folder: Path) -> None:
        (folder / f"{rank}.json").write_text(json.dumps(times[rank]))

    def run_local_ranks(target: Callable[[int], None], count: int, **_: object) -> None:
        for rank in range(count):
            target(rank)

    monkeypatch.setattr(engine_overhead, "_rank", train)
    monkeypatch.setattr(engine_overhead, "run_local_ranks", run_local_ranks)
    assert step_seconds(Trial.of(32, 16, 1, ranks=2), threads=1, steps=4) == 2.5  # of 2, 3, 5 and 2


def test_the_rate_of_elementwise_operations_has_no_fixed_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "seconds", lambda work, device: 1e-3)
    for operation_s, moving in ((1e-5, 1e-3 - 9e-5), (1e-4, 5e-4)):  # at least half of the time is moving
        size, per_s = next(iter(probes.elementwise(torch.device("cpu"), operation_s)))
        assert 16 * size / per_s == pytest.approx(moving)
