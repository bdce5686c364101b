"""The plan beside the run: its memory and time in every row, and once in a start what came of them."""

from contextlib import AbstractContextManager, nullcontext
from statistics import median

import torch
import torch.distributed as dist

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.engine.measuring import PeakMemory
from launcher.planning.cost.plan import make_plan
from launcher.runtime.metrics.rows import Row
from launcher.text import size

JUDGED_AT = 10  # steps after a start: the first ones make states, and ZeRO-3 learns the order of its weights
MEMORY_ERROR, TIME_ERROR = 0.05, 0.2  # as docs/planning.md states them


class Expectation:
    """That of one rank; all of them take every step with it."""

    def __init__(self, run: RunConfig, layout: Layout, device: torch.device) -> None:
        plan = make_plan(run, layout)
        self.memory = max(stage.memory.allocated for stage in plan.stages)
        self.seconds = plan.time.total if plan.time else None
        self._device = device
        self._taken: list[float] = []  # seconds of the steps so far, until they are judged
        self._peak = PeakMemory(device)
        self._row: Row = {"memory/predicted_bytes": self.memory}
        if self.seconds is not None:
            self._row["perf/predicted_step_time_s"] = self.seconds

    @property
    def counts_next(self) -> bool:
        """Whether the next step has its tensors counted, which is on CPU and takes time."""
        return len(self._taken) == JUDGED_AT - 1 and self._device.type == "cpu"

    def watching(self) -> AbstractContextManager[object]:
        """To be entered around a step."""
        return self._peak if len(self._taken) == JUDGED_AT - 1 else nullcontext()

    def after(self, elapsed: float) -> tuple[Row, list[str]]:
        """What belongs into the row of a step, and what to say. Collective once: a number is all-reduced."""
        if len(self._taken) == JUDGED_AT:
            return self._row, []
        self._taken.append(elapsed)
        if len(self._taken) < JUDGED_AT:
            return self._row, []
        allocated = self._most_allocated()
        self._row["memory/allocated_bytes"] = allocated
        # Neither the first, which begins cold, nor the one whose tensors were counted.
        return self._row, judged(self.memory, allocated, self.seconds, median(self._taken[1:-1]))

    def _most_allocated(self) -> int:
        """Bytes of tensors at the most, on the rank that has most. Collective over the world."""
        most = torch.tensor(self._peak.size, dtype=torch.int64, device=self._device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)


def judged(memory: int, allocated: int, seconds: float | None, taken: float) -> list[str]:
    """What to tell of bytes and seconds as predicted and as measured. Pure."""
    lines = [
        _told(
            f"tensors took {size(allocated)} of a rank, {size(memory)} planned",
            memory / allocated - 1,
            MEMORY_ERROR,
        )
    ]
    if seconds is not None:
        words = f"a step takes {taken:.3g} s, {seconds:.3g} s planned"
        lines.append(_told(words, seconds / taken - 1, TIME_ERROR))
    return lines


def _told(words: str, error: float, stated: float) -> str:
    if abs(error) <= stated:
        return f"planned  {words} ({error:+.1%})"
    return f"warning  {words} ({error:+.1%}): more than the {stated:.0%} that docs/planning.md states"
