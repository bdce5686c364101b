"""The measured time of ranks that wait for each other within a pass is planned where they do."""

from dataclasses import replace

import pytest

from launcher.config.schema import Device, HardwareConfig, Scale
from launcher.config.validate import validate
from launcher.config.world import World
from launcher.planning.cost.run_plan import make_plan
from launcher.planning.cost.step_time import StepTime
from tests.calibrate.test_engine_overhead import rates_of
from tests.config.composing import run_of

WAITING = 1.5
DENSE = ("model=gpt_mini", "parallelism.zero_stage=0", "parallelism.data=1")
DATA = ("model=gpt_mini", "parallelism.data=2")
EXPERTS = ("model=moe_tiny", "parallelism.data=2", "parallelism.zero_stage=0")


def planned(factor: float, ranks: int, cores: int, *overrides: str, alone: float = 1.0) -> StepTime:
    run = run_of(*overrides, "training.global_batch_size=8", "training.micro_batch_size=2")
    waiting = [Scale(1e6, factor)] if factor else []
    measured = [
        replace(rates_of(count), scales=[Scale(1e6, alone)], waiting_scales=waiting) for count in (1, 2, 4)
    ]
    run = replace(run, hardware=HardwareConfig(device=Device.cpu, cores=cores, measured=measured))
    time = make_plan(run, validate(run, World("cpu", ranks, ranks))).time
    assert time is not None
    return time


@pytest.mark.parametrize(
    ("waits", "overrides"),
    [
        (True, (*DENSE, "parallelism.tensor=2")),
        (True, (*DENSE, "parallelism.tensor=2", "parallelism.sequence_parallel=true")),
        (True, (*DENSE, "parallelism.context=2")),
        (True, (*DENSE, "parallelism.context=2", "parallelism.context_method=ulysses")),
        (True, (*EXPERTS, "parallelism.expert=2")),
        (True, (*DATA, "parallelism.zero_stage=3")),
        (True, (*DENSE, "parallelism.pipeline=2")),
        (False, EXPERTS),
        (False, (*DATA, "parallelism.zero_stage=0")),
        (False, (*DATA, "parallelism.zero_stage=2")),
    ],
)
def test_computation_takes_longer_where_ranks_wait_within_a_pass(
    waits: bool, overrides: tuple[str, ...]
) -> None:
    plain, late = (planned(factor, 2, 2, *overrides) for factor in (0.0, WAITING))
    assert late.compute == pytest.approx((WAITING if waits else 1) * plain.compute, rel=0.01)
    assert late.communication == plain.communication


def test_a_file_without_these_factors_has_those_of_ranks_alone() -> None:
    """Files of older calibrations have none. 1.0 would be slower than the measured 0.8."""
    waiting = (*DENSE, "parallelism.tensor=2")
    fast, usual = (planned(0.0, 2, 2, *waiting, alone=alone).compute for alone in (0.8, 1.0))
    assert fast == pytest.approx(0.8 * usual, rel=0.01)


def test_a_factor_below_that_of_ranks_alone_does_not_count() -> None:
    tensor = (*DENSE, "parallelism.tensor=2")
    assert planned(0.5, 2, 2, *tensor) == planned(0.0, 2, 2, *tensor)


@pytest.mark.parametrize("cores", [2, 4])
@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_ranks_that_share_a_processor_wait_as_well(axis: str, cores: int) -> None:
    layout = (*DENSE, f"parallelism.{axis}=4")
    plain, late = (planned(factor, 4, cores, *layout).compute for factor in (0.0, WAITING))
    assert late == pytest.approx(WAITING * plain, rel=0.01)


@pytest.mark.parametrize(("stage", "other"), [(2, 3), (3, 2)])
def test_a_block_has_the_overhead_of_its_zero_stage(stage: int, other: int) -> None:
    run = run_of(
        *DATA,
        f"parallelism.zero_stage={stage}",
        "training.global_batch_size=8",
        "training.micro_batch_size=2",
    )
    rates = rates_of(2)

    def seconds(**overhead: float) -> float:
        hardware = HardwareConfig(device=Device.cpu, cores=2, measured=[replace(rates, **overhead)])
        time = make_plan(replace(run, hardware=hardware), validate(run, World("cpu", 2, 2))).time
        assert time is not None
        return time.total

    further = seconds(**{f"zero_{stage}_block_s": 1e-3}) - seconds()
    assert further == pytest.approx(2 * run.model.num_layers * 1e-3)  # two micro-batches
    assert seconds(**{f"zero_{other}_block_s": 1e-3}) == seconds()
