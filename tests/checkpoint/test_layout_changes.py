"""A run that changes from any layout into another equals a run in one process, within rounding."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from launcher.config.schema import CheckpointConfig
from tests.checkpoint.saving import LAYOUTS, RUNS, Outcome, assert_close, run_in, saved, train

LOSS_TOLERANCE = {"momentum": 2e-6, "adamw, bf16": 2e-2}  # relative


def targets_of(source: str, kind: str) -> list[str]:
    """Return a quarter of the other layouts; each kind of run has another quarter."""
    others = [layout for layout in LAYOUTS if layout != source]
    return others[(list(LAYOUTS).index(source) + 2 * list(RUNS).index(kind)) % 4 :: 4]


def test_every_layout_is_a_target_of_each_kind() -> None:
    for kind in RUNS:
        assert {target for source in LAYOUTS for target in targets_of(source, kind)} == {*LAYOUTS}


@pytest.fixture(scope="module")
def losses_of_one_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """Return the undisturbed run of a kind."""

    @cache
    def trained(kind: str) -> Outcome:
        run, layout = run_in("single", *RUNS[kind], steps=20)
        return train(run, layout, tmp_path_factory.mktemp("uninterrupted"), last=20)

    return trained


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("source", LAYOUTS)
def test_resume_from_any_layout_into_another(
    source: str, kind: str, losses_of_one_process: Callable[[str], Outcome], tmp_path: Path
) -> None:
    """Train 10 steps in one layout and 10 more in each target; compare with 20 steps of one process."""
    uninterrupted = losses_of_one_process(kind)
    run, layout = run_in(source, *RUNS[kind], steps=20)
    train(run, layout, tmp_path / "half", last=10, save=CheckpointConfig())
    for target in targets_of(source, kind):
        run, layout = run_in(target, *RUNS[kind], steps=20)
        half = saved(tmp_path / "half", 10)
        resumed = train(run, layout, tmp_path / target, first=11, last=20, restore=half)
        assert resumed.losses == pytest.approx(uninterrupted.losses[10:], rel=LOSS_TOLERANCE[kind]), target
        if kind == "momentum":
            assert_close(resumed, uninterrupted, 1e-5)
