"""Measure how long a rank works in a step, apart from its waiting in collectives.

All ranks of a synchronous step take the same time: the fast ranks wait for the slowest rank. The slowest rank
is the rank that waits least. Clocks of different hosts are not compared.
"""

import time
from typing import Any, Protocol

import torch

from launcher.engine.stopwatch import Stopwatch


class WorkTime(Protocol):
    """Seconds of work of this rank. Enter `collectives.timing_collectives` before `join`."""

    @property
    def collectives(self) -> Stopwatch: ...

    def begin_step(self, *, logged: bool) -> None: ...

    def end_step(self) -> None: ...

    def seconds(self, steps: int) -> float:
        """Return the mean work of `steps` steps since `restart`. The device must be synchronised."""

    def restart(self) -> None: ...


def work_time(device: str) -> WorkTime:
    return HostWorkTime() if device == "cpu" else DeviceWorkTime()


class HostWorkTime:
    """On CPU a collective returns when it is done: all time outside collectives is work, also logging."""

    def __init__(self) -> None:
        self.collectives = Stopwatch(lambda _group: "wait")
        self._started = time.perf_counter()

    def begin_step(self, *, logged: bool) -> None:
        pass

    def end_step(self) -> None:
        pass

    def seconds(self, steps: int) -> float:
        waited = sum(self.collectives.seconds.values())
        return max(0.0, time.perf_counter() - self._started - waited) / max(1, steps)

    def restart(self) -> None:
        self.collectives.restart()
        self._started = time.perf_counter()


class DeviceWorkTime:
    """On a GPU a collective returns before it is done: events around the collectives of a logged step."""

    def __init__(self) -> None:
        self.collectives = EventStopwatch()
        self._begin: torch.cuda.Event | None = None
        self._end: torch.cuda.Event | None = None

    def begin_step(self, *, logged: bool) -> None:
        if logged:
            self._begin, self.collectives.is_on = recorded_event(), True

    def end_step(self) -> None:
        if self.collectives.is_on:
            self._end, self.collectives.is_on = recorded_event(), False

    def seconds(self, steps: int) -> float:
        if self._begin is None or self._end is None:
            return 0.0
        waits = [
            (self._begin.elapsed_time(before), self._begin.elapsed_time(after))
            for before, after in self.collectives.intervals
        ]
        total = self._begin.elapsed_time(self._end)
        return max(0.0, float(total) - covered(waits)) / 1e3  # torch counts in milliseconds

    def restart(self) -> None:
        self.collectives.restart()
        self._begin = self._end = None


class EventStopwatch(Stopwatch):
    """Records events on the current stream before and after each collective, while `is_on`."""

    def __init__(self) -> None:
        super().__init__(lambda _group: "wait")
        self.is_on = False
        self.intervals: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def mark(self) -> Any:
        return recorded_event() if self.is_on else None

    def add_since(self, mark: Any, name: str) -> None:
        if mark is not None:
            self.intervals.append((mark, recorded_event()))

    def restart(self) -> None:
        self.intervals.clear()


def recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def covered(intervals: list[tuple[float, float]]) -> float:
    """Return the length of the union of the intervals: collectives on several streams overlap. Pure."""
    length, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        length += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return length
