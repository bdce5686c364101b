"""The planned time of stages that share processors, against a simulation of the sharing."""

from dataclasses import dataclass, field, replace

import pytest

from launcher.config.schema import Device, HardwareConfig
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.planning.cost.pipeline_schedule import order
from launcher.planning.cost.run_plan import Plan, make_plan
from tests.calibrate.test_engine_overhead import rates_of
from tests.config.composing import run_of

Pass = tuple[bool, int, int]  # whether it is a forward pass, stage, micro-batch


@dataclass
class Stages:
    """Stages in 1F1B order that share `processors`: running passes advance at the same speed."""

    forward: list[float]
    backward: list[float]
    processors: int
    ended: set[Pass] = field(default_factory=set)
    running: dict[int, float] = field(default_factory=dict)  # seconds left, by stage

    def seconds(self, plan: Plan) -> float:
        batches, last = plan.layout.accumulation, len(self.forward) - 1
        counts = [[0, 0] for _ in self.forward]
        waiting: list[list[Pass]] = []
        for stage, count in enumerate(counts):
            waiting.append([])
            for is_forward, _ in order(plan.layout, stage, batches):
                waiting[stage].append((is_forward, stage, count[is_forward]))
                count[is_forward] += 1
        now = 0.0
        while any(waiting):
            for stage, passes in enumerate(waiting):
                if passes and stage not in self.running and self.may_begin(passes[0], last):
                    self.running[stage] = (self.forward if passes[0][0] else self.backward)[stage]
            speed = min(1.0, self.processors / len(self.running))
            work = min(self.running.values())
            now += work / speed
            for stage in list(self.running):
                self.running[stage] -= work
                if self.running[stage] < 1e-9 * work:
                    del self.running[stage]
                    self.ended.add(waiting[stage].pop(0))
        return now

    def may_begin(self, one: Pass, last: int) -> bool:
        is_forward, stage, batch = one
        if is_forward:
            return stage == 0 or (True, stage - 1, batch) in self.ended
        return (
            (True, stage, batch) in self.ended if stage == last else (False, stage + 1, batch) in self.ended
        )


def planned(stages: int, cores: int, layers: int) -> Plan:
    run = run_of(
        "model=gpt_mini", f"model.num_layers={layers}", "training.global_batch_size=32",
        f"parallelism.pipeline={stages}", "parallelism.data=1", "parallelism.zero_stage=0",
        "training.micro_batch_size=2",
    )  # fmt: skip
    hardware = HardwareConfig(
        device=Device.cpu, cores=cores, measured=[rates_of(1), rates_of(2), rates_of(4)]
    )
    run = replace(run, hardware=hardware)
    return make_plan(run, validate(run, World("cpu", stages, stages)))


# Stages of 2, 1, 1 and 2 layers take unequal time: the planned mean stage hides which ones wait at the ends.
@pytest.mark.parametrize(
    ("stages", "cores", "layers", "within"),
    [(4, 1, 8, 0.01), (4, 2, 8, 0.02), (8, 4, 8, 0.02), (8, 2, 16, 0.02), (4, 2, 6, 0.04), (4, 4, 8, 0.03)],
)
def test_a_plan_takes_as_long_as_the_simulation(stages: int, cores: int, layers: int, within: float) -> None:
    plan = planned(stages, cores, layers)
    time = plan.time
    assert time is not None
    forward = [stage.forward.total for stage in time.stages]
    backward = [stage.backward.total for stage in time.stages]
    simulated = Stages(forward, backward, cores).seconds(plan)
    assert time.compute + time.bubble == pytest.approx(simulated, rel=within)
