"""Where time is put down to."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from launcher.engine.stopwatch import TIMED, Stopwatch


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def slow(*_: Any, **__: Any) -> None:
    time.sleep(0.02)


@pytest.mark.parametrize("positional", [True, False])
def test_a_collective_is_put_down_to_its_group(positional: bool, group: dist.ProcessGroup) -> None:
    watch = Stopwatch(lambda one: "here" if one is group else "elsewhere")
    timed = watch._timed_collective(slow)
    if positional:
        timed(torch.ones(1), dist.ReduceOp.SUM, group)
    else:
        timed(torch.ones(1), group=group)
    assert list(watch.seconds) == ["here"]
    assert 0.02 <= watch.seconds["here"] < 0.2
    timed(torch.ones(1))
    assert watch.seconds["elsewhere"] >= 0.02
    watch.restart()
    assert watch.seconds == {}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace the clock by one that runs while `sleep` is called: a busy machine sleeps longer than asked."""
    moments = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: moments[-1])
    monkeypatch.setattr(time, "sleep", lambda seconds: moments.append(moments[-1] + seconds))
    return moments


def test_collectives_that_call_one_another_count_once(clock: list[float]) -> None:
    watch = Stopwatch(lambda one: "all")
    inner = watch._timed_collective(slow)
    watch._timed_collective(lambda: inner())()
    assert watch.seconds["all"] == pytest.approx(0.02)
    assert clock[-1] == 0.02


def test_what_runs_within_is_less_its_collectives(clock: list[float]) -> None:
    watch = Stopwatch(lambda one: "data")

    def step() -> None:
        time.sleep(0.02)
        watch._timed_collective(slow)()

    watch.timed("optimizer", step)()
    assert watch.seconds == pytest.approx({"optimizer": 0.02, "data": 0.02})
    assert clock[-1] == 0.04


def test_waiting_for_a_handle_counts_and_all_is_as_before(group: dist.ProcessGroup) -> None:
    before = {name: getattr(dist, name) for name in TIMED}
    watch = Stopwatch(lambda one: "data")
    with watch.timing_collectives():
        work = dist.all_reduce(torch.ones(4), group=group, async_op=True)
        begun = watch.seconds["data"]
        assert work.wait()
        assert work.is_completed()
        assert watch.seconds["data"] > begun
    assert {name: getattr(dist, name) for name in TIMED} == before


def test_waiting_for_a_coalesced_all_reduce_counts(group: dist.ProcessGroup) -> None:
    """torch returns a future there, and no dist.Work."""
    watch = Stopwatch(lambda one: "data")
    with watch.timing_collectives():
        future = dist.all_reduce_coalesced([torch.ones(4)] * 2, group=group, async_op=True)
        begun = watch.seconds["data"]
        future.wait()  # type: ignore[union-attr]
        assert watch.seconds["data"] > begun


def test_a_batch_of_sends_and_receives_is_timed(group: dist.ProcessGroup) -> None:
    """DualPipeV sends in batches; torch rejects a P2POp of a wrapped isend."""
    watch = Stopwatch(lambda one: "pipeline")
    with watch.timing_collectives():
        assert dist.P2POp(dist.isend, torch.ones(1), 0, group)
        batch = watch._timed_collective(lambda ops: [dist.all_reduce(op, async_op=True) for op in ops])
        [work] = batch([torch.ones(1)])
        begun = watch.seconds["pipeline"]
        assert work.wait()
        assert watch.seconds["pipeline"] > begun


def test_a_batch_of_sends_is_put_down_to_the_group_of_its_operations(group: dist.ProcessGroup) -> None:
    """The ring of context ranks sends within its group."""
    watch = Stopwatch(lambda one: "here" if one is group else "elsewhere")
    watch._timed_collective(slow)([dist.P2POp(dist.isend, torch.ones(1), 0, group)])
    assert list(watch.seconds) == ["here"]


def test_a_profiler_shows_the_label_of_a_call_and_of_its_wait(group: dist.ProcessGroup) -> None:
    watch = Stopwatch(lambda one: "data")
    with watch.timing_collectives(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        dist.all_reduce(torch.ones(1), group=group)  # without a label
        watch.label = lambda name, one: f"{name} over {'here' if one is group else 'elsewhere'}"
        work = dist.all_reduce(torch.ones(1), group=group, async_op=True)
        watch.label = None
        assert work.wait()
    labels = [event.name for event in profiler.events() or [] if " over " in event.name]
    assert labels == ["all_reduce over here"] * 2
