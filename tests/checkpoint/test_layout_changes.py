"""A run that changes from any layout into another equals a run in one process, within rounding."""

from pathlib import Path

import pytest

from launcher.config.schema import CheckpointConfig
from tests.checkpoint.saving import LAYOUTS, RUNS, assert_close, run_in, saved, train

LOSS_TOLERANCE = {"momentum": 2e-6, "adamw, bf16": 2e-2}  # relative


def targets_of(source: str, kind: str) -> list[str]:
    """Return all other layouts, or of runs with momentum three, in turn: their states change hands alike."""
    others = [layout for layout in LAYOUTS if layout != source]
    return others if kind == "adamw, bf16" else others[list(LAYOUTS).index(source) % 4 :: 4]


def test_every_layout_is_a_target_of_each_kind() -> None:
    for kind in RUNS:
        assert {target for source in LAYOUTS for target in targets_of(source, kind)} == {*LAYOUTS}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_resume_from_any_layout_into_another(source: str, kind: str, tmp_path: Path) -> None:
    """Train 10 steps in one layout and 10 more in each target; compare with 20 steps of one process."""
    run, layout = run_in("single", *RUNS[kind], steps=20)
    uninterrupted = train(run, layout, tmp_path / "uninterrupted", last=20)
    run, layout = run_in(source, *RUNS[kind], steps=20)
    train(run, layout, tmp_path / "half", last=10, save=CheckpointConfig())
    for target in targets_of(source, kind):
        run, layout = run_in(target, *RUNS[kind], steps=20)
        half = saved(tmp_path / "half", 10)
        resumed = train(run, layout, tmp_path / target, first=11, last=20, restore=half)
        assert resumed.losses == pytest.approx(uninterrupted.losses[10:], rel=LOSS_TOLERANCE[kind]), target
        if kind == "momentum":
            assert_close(resumed, uninterrupted, 1e-5)
