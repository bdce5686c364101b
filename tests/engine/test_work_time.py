"""The work of a rank is the time of a step less its waiting in collectives."""

import time
from dataclasses import dataclass
from typing import Any

import pytest

from launcher.engine import work_time as module
from launcher.engine.work_time import DeviceWorkTime, HostWorkTime, covered


def test_on_cpu_all_time_outside_collectives_is_work() -> None:
    work = HostWorkTime()
    collective = work.collectives._timed_collective(lambda: time.sleep(0.2))
    work.restart()
    for _ in range(2):
        time.sleep(0.05)
        collective()
    assert 0.05 <= work.seconds(2) < 0.12
    work.restart()
    assert work.seconds(1) < 0.05


@dataclass
class FakeEvent:
    """An event of a GPU whose clock the test sets, in milliseconds."""

    at: float

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at - self.at


def test_on_a_gpu_events_around_the_collectives_of_a_logged_step_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = {"now": 0.0, "events": 0}

    def recorded() -> FakeEvent:
        clock["events"] += 1
        return FakeEvent(clock["now"])

    def advance(milliseconds: float) -> Any:
        clock["now"] += milliseconds

    monkeypatch.setattr(module, "recorded_event", recorded)
    work = DeviceWorkTime()
    collective = work.collectives._timed_collective(advance)
    for logged in (False, True):
        work.begin_step(logged=logged)
        advance(300.0)
        collective(100.0)
        advance(50.0)
        collective(500.0)
        work.end_step()
    collective(1000.0)  # the agreement after the step
    assert clock["events"] == 6  # none in the step that is not logged
    assert work.seconds(10) == pytest.approx(0.35)
    work.restart()
    assert work.seconds(10) == 0.0


def test_overlapping_waits_count_once() -> None:
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 4.0
    assert covered([]) == 0.0
