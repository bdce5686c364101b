"""Step time without a synchronisation per step: on a GPU the mean of the steps between two of them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from launcher.engine.work_time import WorkTime


@dataclass
class StepTimes:
    steps: int = 0
    seconds: float = 0.0
    data_wait: float = 0.0  # seconds of `seconds` in which this rank waited for its batches
    # Seconds per step between two synchronisations; None for steps of which one compiled.
    laps: list[float | None] = field(default_factory=list)
    compiling: float = 0.0  # seconds per step of the last steps of which one compiled, which do not count

    @property
    def per_step(self) -> float:
        return self.seconds / self.steps if self.steps else self.compiling


class StepClock:
    """Measures step time. A GPU still works when a call returns, so time counts up to `synchronise`.

    `compile_seconds` returns the seconds that this process has spent compiling. A step that compiles does not
    count, nor do the steps before it since the last logged step.
    """

    def __init__(self, device: torch.device, work: WorkTime, compile_seconds: Callable[[], float]) -> None:
        self.times = StepTimes()
        self._work, self._compile_seconds = work, compile_seconds
        work.restart()
        self._device = device
        self._started: float | None = None
        self._lap_steps = 0

    @contextmanager
    def step(self, *, logged: bool) -> Iterator[None]:
        if self._started is None:
            self._started = time.perf_counter()
        self._work.begin_step(logged=logged)
        compiled_before = self._compile_seconds()
        yield
        self._work.end_step()
        self._lap_steps += 1
        has_compiled = self._compile_seconds() > compiled_before
        if self._device.type == "cpu" or has_compiled:
            self.synchronise()
        if has_compiled:
            laps = self.times.laps
            self.times = StepTimes(laps=[*laps[:-1], None], compiling=laps[-1] or 0.0)
            self._work.restart()

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
