"""The planned time of stages that share processors, against a simulation of the sharing."""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from launcher.config.schema import Device, HardwareConfig, Point
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.planning.cost.pipeline_schedule import order
from launcher.planning.cost.run_plan import Plan, make_plan
from launcher.planning.cost.step_time import StageTime
from launcher.planning.show.plan_figure import draw_plan
from tests.calibrate.test_engine_overhead import rates_of
from tests.config.composing import run_of

Pass = tuple[bool, int, int]  # whether it is a forward pass, stage, micro-batch


@dataclass
class Pipeline:
    """Ranks in the order of their schedule that share `processors`: running passes advance equally fast."""

    plan: Plan
    processors: float
    ended: set[Pass] = field(default_factory=set)
    running: dict[int, float] = field(default_factory=dict)  # seconds left, by rank

    @property
    def stages(self) -> tuple[StageTime, ...]:
        assert self.plan.time is not None
        return self.plan.time.stages

    def seconds(self) -> float:
        waiting = [self.passes(rank) for rank in range(self.plan.layout.pipeline)]
        now = 0.0
        while any(waiting):
            for rank, passes in enumerate(waiting):
                if passes and rank not in self.running and self.may_begin(*passes[0]):
                    is_forward, stage, _ = passes[0]
                    time = self.stages[stage]
                    self.running[rank] = (time.forward if is_forward else time.backward).total
            speed = min(1.0, self.processors / len(self.running))
            work = min(self.running.values())
            now += work / speed
            for rank in list(self.running):
                self.running[rank] -= work
                if self.running[rank] < 1e-9 * work:
                    del self.running[rank]
                    self.ended.add(waiting[rank].pop(0))
        return now

    def passes(self, rank: int) -> list[Pass]:
        counts: Counter[tuple[bool, int]] = Counter()
        passes = []
        for is_forward, chunk in order(self.plan.layout, rank, self.plan.layout.accumulation):
            stage = rank if chunk == 0 else len(self.stages) - 1 - rank
            passes.append((is_forward, stage, counts[is_forward, stage]))
            counts[is_forward, stage] += 1
        return passes

    def may_begin(self, is_forward: bool, stage: int, batch: int) -> bool:
        if is_forward:
            return stage == 0 or (True, stage - 1, batch) in self.ended
        if stage == len(self.stages) - 1:
            return (True, stage, batch) in self.ended
        return (False, stage + 1, batch) in self.ended


def planned(ranks: int, cores: int, layers: int, batches: int, *overrides: str) -> Plan:
    run = run_of(
        "model=gpt_mini", f"model.num_layers={layers}", f"training.global_batch_size={2 * batches}",
        f"parallelism.pipeline={ranks}", "parallelism.data=1", "parallelism.zero_stage=0",
        "training.micro_batch_size=2", *overrides,
    )  # fmt: skip
    hardware = HardwareConfig(
        device=Device.cpu, cores=cores, measured=[rates_of(1), rates_of(2), rates_of(4)]
    )
    run = replace(run, hardware=hardware)
    return make_plan(run, validate(run, World("cpu", ranks, ranks)))


DUALPIPEV = "parallelism.pipeline_schedule=dualpipev"


@pytest.mark.parametrize(
    ("ranks", "cores", "layers", "batches", "overrides"),
    [
        (4, 1, 8, 8, []), (4, 2, 8, 8, []), (4, 3, 8, 8, []), (4, 4, 8, 8, []), (8, 4, 8, 8, []),
        (4, 2, 8, 1, []), (8, 4, 8, 2, []), (8, 4, 8, 3, []),  # fewer micro-batches than processors
        (4, 2, 6, 8, []),  # stages of 2, 2, 1 and 1 layers
        (4, 2, 8, 8, [DUALPIPEV]), (4, 4, 8, 8, [DUALPIPEV]), (8, 4, 16, 16, [DUALPIPEV]),
    ],
)  # fmt: skip
def test_a_plan_takes_as_long_as_the_simulation(
    ranks: int, cores: int, layers: int, batches: int, overrides: list[str]
) -> None:
    plan = planned(ranks, cores, layers, batches, *overrides)
    time = plan.time
    assert time is not None
    stage = sum(stage.both.compute for stage in time.stages) / ranks  # of the mean rank and a micro-batch
    simulated = Pipeline(plan, cores).seconds()
    within = (0.6 if overrides else 0.35) * stage  # DualPipeV's formula is the less exact one
    assert time.compute + time.bubble == pytest.approx(simulated, abs=within)


def test_the_figure_says_that_its_ranks_do_not_share_processors(tmp_path: Path) -> None:
    said = "if each rank had a core of its own; on 2 cores the bubble is"
    for cores in (2, 4):
        picture = tmp_path / f"{cores}.svg"
        draw_plan(planned(4, cores, 8, 8), picture)
        assert (said in picture.read_text()) == (cores == 2)


def test_ranks_with_a_processor_each_take_no_turns() -> None:
    """Where sends take most of the time, the slowest stage computes less than the mean of all stages."""
    plan = planned(4, 4, 8, 8)
    slow_sends = [
        replace(rates, collectives=[replace(one, points=[Point(1e5, 1e6)]) for one in rates.collectives])
        for rates in plan.run.hardware.measured
    ]
    hardware = replace(plan.run.hardware, measured=slow_sends)
    plan = make_plan(replace(plan.run, hardware=hardware), plan.layout)
    assert plan.time is not None
    slowest = max(plan.time.stages, key=lambda stage: stage.total)
    computing = [stage.both.compute for stage in plan.time.stages]
    assert slowest.both.compute < sum(computing) / len(computing)
    assert plan.time.compute == pytest.approx(slowest.both.compute * plan.layout.accumulation)
