"""Step time without a synchronisation per step: on a GPU the mean of the steps between two of them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from launcher.engine.work_time import WorkTime


@dataclass
class StepTimes:
    steps: int = 0
    seconds: float = 0.0
    data_wait: float = 0.0  # seconds of `seconds` in which this rank waited for its batches
    laps: list[float] = field(default_factory=list)  # seconds per step between two synchronisations

    @property
    def per_step(self) -> float:
        return self.seconds / self.steps


class StepClock:
    """Measures step time. A GPU still works when a call returns, so time counts up to `synchronise`."""

    def __init__(self, device: torch.device, work: WorkTime) -> None:
        self.times = StepTimes()
        self._work = work
        work.restart()
        self._device = device
        self._started: float | None = None
        self._lap_steps = 0

    @contextmanager
    def step(self, *, logged: bool) -> Iterator[None]:
        if self._started is None:
            self._started = time.perf_counter()
        self._work.begin_step(logged=logged)
        yield
        self._work.end_step()
        self._lap_steps += 1
        if self._device.type == "cpu":
            self.synchronise()

    def synchronise(self) -> None:
        """Wait for the device to finish the steps so far, and count their time."""
        if self._started is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._started
        self.times.steps += self._lap_steps
        self.times.seconds += seconds
        self.times.laps.append(seconds / self._lap_steps)
        self._started, self._lap_steps = None, 0

    @property
    def work_seconds(self) -> float:
        """Mean seconds per step in which this rank worked. Call `synchronise` before."""
        return self._work.seconds(self.times.steps)

    def restart(self) -> None:
        self.times = StepTimes()
        self._work.restart()
