"""Compares the plan with the run: in every row, and once per start in a line for the user."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from statistics import median

import torch
from torch import Tensor

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.engine.measuring import PeakMemory
from launcher.planning.cost.run_plan import make_plan
from launcher.runtime.metrics.rows import Row
from launcher.runtime.step_clock import StepTimes
from launcher.text import size

# The step whose memory is measured, or the next one that is not profiled: the first steps make states, and
# ZeRO-3 learns the order of its weights.
MEASURED_STEP = 10
MEMORY_ERROR, TIME_ERROR = 0.05, 0.2  # as docs/planning.md states them


class PlanCheck:
    """Measures one rank beside its plan. Every rank measures the same step of its start."""

    def __init__(self, run: RunConfig, layout: Layout, device: torch.device) -> None:
        plan = make_plan(run, layout)
        self.memory = max(stage.memory.allocated for stage in plan.stages)
        self.seconds = plan.time.total if plan.time else None
        self._is_compiled = layout.compiled
        ranks = layout.world_size // layout.pipeline
        self.flops = [stage.flops for stage in plan.stages for _ in range(ranks)]  # of each rank in a step
        self._steps = 0
        self._measured_step: int | None = None
        self._peak = PeakMemory(device)
        self._laps: list[float | None] = []
        self._row: Row = {"memory/predicted_bytes": self.memory}
        if self.seconds is not None:
            self._row["perf/predicted_step_time_s"] = self.seconds

    def measuring(
        self, pending_copy: Iterable[Tensor], *, profiled: bool = False
    ) -> AbstractContextManager[object]:
        """Return the context of the next step. The step's peak memory leaves out `pending_copy` (a save).

        A profiled step is not measured: counting tensors slows a step down.
        """
        self._steps += 1
        if profiled or self._steps < MEASURED_STEP or self._measured_step is not None:
            return nullcontext()
        self._measured_step = self._steps
        self._peak.excluded = list(pending_copy)
        return self._peak

    @property
    def allocated_bytes(self) -> int:
        """This rank's peak of the measured step; 0 before that step."""
        return self._peak.size

    def after(self, times: StepTimes, allocated: int) -> tuple[Row, list[str]]:
        """Return the plan's columns of a logged row, and lines for the user once memory is measured."""
        if "memory/allocated_bytes" in self._row:
            return self._row, []
        self._laps += times.laps
        if not allocated:
            return self._row, []
        self._row["memory/allocated_bytes"] = allocated
        # Without the first step, which also warms up, and the step that counting tensors slowed down.
        laps = [(step, lap) for step, lap in enumerate(self._laps, 1) if lap is not None]
        timed = [lap for step, lap in laps if step not in (1, self._measured_step)] or [
            lap for _, lap in laps
        ]
        seconds = self.seconds if timed else None
        lines = verdict(
            self.memory, allocated, seconds, median(timed or [0.0]), is_compiled=self._is_compiled
        )
        return self._row, lines


def verdict(
    memory: int, allocated: int, seconds: float | None, measured: float, *, is_compiled: bool = False
) -> list[str]:
    """Return a line for memory and, if a time is predicted, a line for the step time. Pure.

    Compiled blocks may need less than planned.
    """
    words = f"{size(allocated)} of tensors per rank, {size(memory)} planned"
    lines = [_line("memory", words, memory / allocated - 1, MEMORY_ERROR, is_compiled)]
    if seconds is not None:
        words = f"{measured:.3g} s per step, {seconds:.3g} s planned"
        lines.append(_line("time", words, seconds / measured - 1, TIME_ERROR, is_compiled))
    return lines


def _line(label: str, words: str, error: float, stated: float, may_need_less: bool) -> str:
    if abs(error) <= stated or (may_need_less and error > 0):
        return f"{label:8} {words} ({error:+z.1%})"
    return f"warning  {words} ({error:+.1%}): the difference exceeds the {stated:.0%} of docs/planning.md"
