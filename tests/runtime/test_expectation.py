"""The plan beside the run: figures in the rows, and a word once they are known."""

from pathlib import Path

import pytest
import torch

from launcher.config.validate import validate
from launcher.config.world import World
from launcher.runtime.expectation import JUDGED_AT, Expectation, judged
from tests.config.composing import run_of
from tests.runtime.command import metrics, trained

# A machine's speed, of which nothing is true.
FAST = [
    "hardware.peak_flops.fp32=1e18", "hardware.memory_bandwidth_gb_s=1e6",
    "hardware.bandwidth_intra_node_gb_s=1e6",
]  # fmt: skip


@pytest.mark.parametrize("layout", [["parallelism.tensor=2"], ["parallelism.pipeline=2"]], ids=["tp2", "pp2"])
def test_memory_is_as_planned(layout: list[str], tmp_path: Path) -> None:
    # What is copied for a checkpoint of the step before is not the step's.
    saving = f"checkpoint.interval_steps={JUDGED_AT - 1}"
    out = trained(*layout, f"training.steps={JUDGED_AT + 2}", saving, "run.dir=r", cwd=tmp_path)
    assert "planned  tensors took " in out
    assert "warning" not in out
    *before, tenth, _, last = metrics(tmp_path / "r")
    assert all("memory/allocated_bytes" not in row for row in before)
    for row in (tenth, last):
        assert row["memory/predicted_bytes"] == pytest.approx(row["memory/allocated_bytes"], rel=0.05)
        assert "perf/predicted_step_time_s" not in row


def test_a_wrong_plan_is_told_of(tmp_path: Path) -> None:
    out = trained("parallelism=single", *FAST, f"training.steps={JUDGED_AT}", "run.dir=r", cwd=tmp_path)
    warned = next(line for line in out.splitlines() if line.startswith("warning  a step takes "))
    assert warned.endswith("more than the 20% that docs/planning.md states")
    rows = metrics(tmp_path / "r")
    assert all(0 < row["perf/predicted_step_time_s"] < row["perf/step_time_s"] for row in rows)


def test_what_is_told() -> None:
    assert judged(104, 100, None, 1.0) == ["planned  tensors took 100 B of a rank, 104 B planned (+4.0%)"]
    assert [line[:8] for line in judged(106, 100, 1.19, 1.0)] == ["warning ", "planned "]
    assert [line[:8] for line in judged(94, 100, 0.79, 1.0)] == ["warning ", "warning "]


def test_what_is_alive_already_is_counted_and_what_goes_meanwhile_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = run_of("hardware=cpu", "parallelism=single")
    expectation = Expectation(run, validate(run, World("cpu", 1, 1)), torch.device("cpu"))
    expectation._taken = [1.0] * (JUDGED_AT - 1)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    with expectation.watching():
        pass
    nothing = expectation._peak.size
    weight = torch.zeros(1_000_000, requires_grad=True)
    weight.grad = torch.zeros(1_000_000)
    with expectation.watching():
        weight.grad = None
        (weight * 2.0).sum()
    row, _ = expectation.after(1.0)
    # The weight, and its gradient or the product: never all three.
    assert row["memory/allocated_bytes"] - nothing == pytest.approx(8e6, rel=0.01)
