"""The plan beside the run: figures in the rows, and a word once they are known."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from launcher.config.validate import validate
from launcher.config.world import World
from launcher.runtime.plan_check import MEASURED_STEP, PlanCheck, verdict
from launcher.runtime.step_clock import StepTimes
from tests.config.composing import run_of
from tests.runtime.command import metrics, trained

# A machine's speed, of which nothing is true.
FAST = [
    "hardware.peak_flops.fp32=1e18", "hardware.memory_bandwidth_gb_s=1e6",
    "hardware.bandwidth_intra_node_gb_s=1e6",
]  # fmt: skip


@pytest.mark.parametrize("layout", [["parallelism.tensor=2"], ["parallelism.pipeline=2"]], ids=["tp2", "pp2"])
def test_memory_is_as_planned(layout: list[str], tmp_path: Path) -> None:
    # The copy for a checkpoint of the step before is not memory of this step.
    saving = f"checkpoint.interval_steps={MEASURED_STEP - 1}"
    out = trained(*layout, f"training.steps={MEASURED_STEP + 2}", saving, "run.dir=r", cwd=tmp_path)
    assert " of tensors per rank, " in out
    assert "warning" not in out
    *before, tenth, _, last = metrics(tmp_path / "r")
    assert all("memory/allocated_bytes" not in row for row in before)
    for row in (tenth, last):
        assert row["memory/predicted_bytes"] == pytest.approx(row["memory/allocated_bytes"], rel=0.05)
        assert "perf/predicted_step_time_s" not in row


def test_a_wrong_plan_is_told_of(tmp_path: Path) -> None:
    out = trained("parallelism=single", *FAST, f"training.steps={MEASURED_STEP}", "run.dir=r", cwd=tmp_path)
    warned = next(line for line in out.splitlines() if " s per step, " in line)
    assert warned.endswith("the difference exceeds the 20% of docs/planning.md")
    rows = metrics(tmp_path / "r")
    assert all(0 < row["perf/predicted_step_time_s"] < row["perf/step_time_s"] for row in rows)


def test_what_is_told() -> None:
    assert verdict(104, 100, None, 1.0) == ["memory   100 B of tensors per rank, 104 B planned (+4.0%)"]
    assert [line[:8] for line in verdict(106, 100, 1.19, 1.0)] == ["warning ", "time    "]
    assert [line[:8] for line in verdict(94, 100, 0.79, 1.0)] == ["warning ", "warning "]


def measured(pending: list[torch.Tensor], step: Callable[[], object]) -> tuple[PlanCheck, int]:
    """A plan check after its measured step, and the bytes that it counted."""
    run = run_of("hardware=cpu", "parallelism=single")
    check = PlanCheck(run, validate(run, World("cpu", 1, 1)), torch.device("cpu"))
    for _ in range(MEASURED_STEP - 1):
        with check.measuring([]):
            assert check.allocated_bytes == 0
    with check.measuring(pending):
        step()
    return check, check.allocated_bytes


def test_existing_tensors_are_counted_and_tensors_freed_meanwhile_are_not() -> None:
    _, nothing = measured([], lambda: None)
    weight = torch.zeros(1_000_000, requires_grad=True)
    weight.grad = torch.zeros(1_000_000)

    def step() -> None:
        weight.grad = None
        (weight * 2.0).sum()

    check, allocated = measured([], step)
    # The weight, and its gradient or the product: never all three.
    assert abs(allocated - nothing - 8_000_000) < 80_000
    row, _ = check.after(StepTimes(laps=[1.0] * MEASURED_STEP), allocated)
    assert row["memory/allocated_bytes"] == allocated


def test_the_pending_copy_of_a_checkpoint_is_not_counted() -> None:
    _, nothing = measured([], lambda: None)
    copy = torch.zeros(1_000_000)
    assert measured([copy], lambda: None)[1] - nothing == pytest.approx(0, abs=1e5)


def test_the_first_and_the_measured_step_are_not_timed() -> None:
    check, _ = measured([], lambda: None)
    check.seconds = 1.0
    times = StepTimes(laps=[99.0, *[0.5] * (MEASURED_STEP - 2), 99.0])
    _, lines = check.after(times, 100)
    assert "0.5 s per step, 1 s planned" in lines[1]
    assert check.after(times, 100)[1] == [], "said once"


def test_compiled_blocks_may_need_less_than_planned_but_not_more() -> None:
    lines = verdict(200, 100, 2.0, 1.0, is_compiled=True)
    assert [line[:8] for line in lines] == ["memory  ", "time    "]
    assert all("planned (+100.0%)" in line for line in lines)
    assert [line[:8] for line in verdict(94, 100, 0.79, 1.0, is_compiled=True)] == ["warning ", "warning "]
