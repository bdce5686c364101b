"""A run that changes from any layout into any other equals a run in one process, within rounding."""

from itertools import permutations
from pathlib import Path

import pytest

from launcher.config.schema import CheckpointConfig
from tests.checkpoint.saving import LAYOUTS, RUNS, assert_close, run_in, saved, train

LOSS_TOLERANCE = {"momentum": 2e-6, "adamw, bf16": 2e-2}  # relative


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_resume_from_any_layout_into_any_other(source: str, kind: str, tmp_path: Path) -> None:
    """Train 10 steps in one layout and 10 more in each other layout; compare with 20 steps of one process."""
    run, layout = run_in("single", *RUNS[kind], steps=20)
    uninterrupted = train(run, layout, tmp_path / "uninterrupted", last=20)
    run, layout = run_in(source, *RUNS[kind], steps=20)
    train(run, layout, tmp_path / "half", last=10, save=CheckpointConfig())
    targets = [to_layout for from_layout, to_layout in permutations(LAYOUTS, 2) if from_layout == source]
    assert len(targets) == len(LAYOUTS) - 1
    for target in targets:
        run, layout = run_in(target, *RUNS[kind], steps=20)
        half = saved(tmp_path / "half", 10)
        resumed = train(run, layout, tmp_path / target, first=11, last=20, restore=half)
        assert resumed.losses == pytest.approx(uninterrupted.losses[10:], rel=LOSS_TOLERANCE[kind]), target
        if kind == "momentum":
            assert_close(resumed, uninterrupted, 1e-5)
