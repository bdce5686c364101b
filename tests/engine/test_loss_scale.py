"""fp16's loss scale: what changes it, which skipped steps are expected, and its state in a checkpoint."""

import math
from types import SimpleNamespace
from typing import Any, cast

import deepspeed.comm
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from launcher.config.errors import RunStopped
from launcher.engine.flat import FlatEngine
from launcher.engine.state import loss_scaler, set_loss_scaler
from launcher.engine.update_guard import UpdateGuard, install
from launcher.parallel.mesh import ProcessMesh
from launcher.runtime.nonfinite import _MOST_REPORTS, NonfiniteGuard
from launcher.runtime.resume import Progress
from tests.config.composing import run_of


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed.comm, "get_rank", lambda: 0)  # DynamicLossScaler logs on rank 0


def dynamic(scale: float = 2.0**16, *, least: int = 1, window: int = 1000, hysteresis: int = 1) -> Any:
    return DynamicLossScaler(scale, window, least, hysteresis, consecutive_hysteresis=False)


def engine_with(scaler: Any) -> FlatEngine:
    """Return an engine without a model, in whose optimizer the guard is installed."""
    engine = FlatEngine.__new__(FlatEngine)
    engine.guard = UpdateGuard(torch.device("cpu"))
    zero = SimpleNamespace(loss_scaler=scaler)
    install(engine.guard, zero, ProcessMesh.single())
    engine.deepspeed = SimpleNamespace(optimizer=zero)
    return engine


def step(engine: FlatEngine, norm: float) -> None:
    """Take a step with this gradient norm, as far as the guard and the loss scale take part."""
    engine.guard.judge(torch.tensor(norm))
    engine.deepspeed.optimizer._update_scale(bool(engine.guard.skipped))


def test_an_overflow_lowers_the_scale_to_its_minimum_without_an_exception() -> None:
    engine = engine_with(scaler := dynamic(8.0, least=2))
    scales = []
    for _ in range(4):
        step(engine, math.inf)
        scales.append(scaler.cur_scale)
    assert scales == [4.0, 2.0, 2.0, 2.0]


def test_neither_a_repeated_step_nor_a_large_finite_norm_changes_the_scale() -> None:
    engine = engine_with(scaler := dynamic())
    before = dict(vars(scaler))
    with engine.guard.rehearsal():
        step(engine, math.inf)
        step(engine, 1.0)
    engine.guard.limit = 2.0
    step(engine, 3.0)
    assert bool(engine.guard.skipped)
    assert vars(scaler) == before
    step(engine, math.nan)
    assert scaler.cur_scale == 2.0**15


@pytest.mark.parametrize(
    ("scaler", "expected"),
    [
        (dynamic(), True),
        (dynamic(2.0), True),
        (dynamic(1.0), False),
        (dynamic(4.0, least=4), False),
        (LossScaler(scale=1024), False),
        (LossScaler(scale=1.0), False),
        (None, False),
    ],
)
def test_only_a_dynamic_scale_above_its_minimum_can_be_lowered(scaler: Any, expected: bool) -> None:
    engine = FlatEngine.__new__(FlatEngine)
    engine.deepspeed = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))
    assert engine.lowers_loss_scale == expected


def lines_after(scaler: Any, norm: float, *settings: str, skips: int = 1) -> list[str]:
    """Return what the user reads after `skips` steps in a row with this gradient norm."""
    engine = engine_with(scaler)
    engine.guard.limit = 2.0
    for _ in range(skips):
        step(engine, norm)
    guard = NonfiniteGuard(run_of(*settings), engine, Progress())
    guard._reports = _MOST_REPORTS  # repeats no step
    total, in_row, since = engine.guard.counts.tolist()
    agreed = cast("Any", SimpleNamespace(skips=(total, in_row, since)))
    return guard.after(Progress(step=skips), agreed, cast("Any", None))


def test_a_skipped_step_is_expected_only_while_the_scale_is_searched() -> None:
    assert lines_after(dynamic(), math.inf) == []
    for scaler, norm in ((LossScaler(scale=1024), math.inf), (dynamic(1.0), math.nan), (dynamic(), 3.0)):
        [line] = lines_after(scaler, norm)
        assert line.startswith("warning  step 1 was skipped")
        with pytest.raises(RunStopped, match="step 1 was skipped"):
            lines_after(scaler, norm, "guard.nonfinite=stop")
        with pytest.raises(RunStopped, match="3 steps in a row were skipped"):
            lines_after(scaler, norm, "guard.max_skips=3", skips=3)


def test_a_checkpoint_restores_the_state_of_the_scale_and_not_its_settings() -> None:
    saved = dynamic(window=2, hysteresis=3)
    for overflow in (False, True, False, False, False):
        saved.update_scale(overflow)
    state = loss_scaler(engine_with(saved))
    scaler = dynamic(2.0**4, window=7, hysteresis=4)
    set_loss_scaler(engine_with(scaler), state)
    assert (scaler.scale_window, scaler.delayed_shift) == (7, 4)
    names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    assert [getattr(scaler, name) for name in names] == [getattr(saved, name) for name in names]
    assert loss_scaler(engine_with(scaler)) == state


def test_a_restored_scale_is_within_the_limits_of_the_run() -> None:
    scaler = dynamic(least=512, hysteresis=1)
    set_loss_scaler(engine_with(scaler), loss_scaler(engine_with(dynamic(8.0, hysteresis=5))))
    assert (scaler.cur_scale, scaler.cur_hysteresis) == (512, 1)


def test_a_static_scale_has_no_state() -> None:
    static, scaler = LossScaler(scale=1024), dynamic()
    assert loss_scaler(engine_with(static)) == {}
    set_loss_scaler(engine_with(static), loss_scaler(engine_with(scaler)))
    assert static.cur_scale == 1024
    for earlier in ({}, {"cur_scale": 1024.0}):  # older checkpoints have the second
        set_loss_scaler(engine_with(scaler), earlier)
        assert scaler.cur_scale == 2.0**16
