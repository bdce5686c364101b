"""Profile chosen steps of a run: a trace of each rank, and a table of the parts of a step on rank 0."""

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType

from launcher.config.schema import ProfileConfig
from launcher.engine.base import Engine
from launcher.engine.profiler_trace import ProfilerTrace
from launcher.engine.stopwatch import Stopwatch
from launcher.engine.trace_parts import StepParts, parts_of_trace
from launcher.runtime.output import RunOutput
from launcher.text import aligned

WARM_UP = 5  # steps of a start before those that are profiled, if profile.first_step is null
_OFF = nullcontext()


def profiled_steps(profile: ProfileConfig, first: int, last: int) -> range:
    """Return the steps to profile of a start that takes the steps `first` to `last`. Pure."""
    if not profile.enabled:
        return range(0)
    begin = profile.first_step
    if begin is None:
        begin = max(first, min(first + WARM_UP, last - profile.steps + 1))
    return range(max(begin, first), min(begin + profile.steps, last + 1))


class Profiling:
    """Records the steps to profile. As a context it writes the trace on exit if the run stops early."""

    def __init__(
        self, steps: range, engine: Engine, collectives: Stopwatch, output: RunOutput, directory: Path
    ) -> None:
        self.steps = steps
        self._engine, self._collectives = engine, collectives
        self._output, self._directory = output, directory
        self._trace: ProfilerTrace | None = None
        self._taken: list[int] = []

    def __enter__(self) -> "Profiling":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._trace is not None and kind is None:
            self.finish()
        elif self._trace is not None:
            self._trace.stop()

    def step(self, number: int) -> AbstractContextManager[object]:
        """Return the context of a step, which records the step if it is to be profiled."""
        if number not in self.steps:
            return _OFF
        if self._trace is None:
            self._trace = ProfilerTrace(self._engine, self._collectives)
            self._trace.start()
        self._taken.append(number)
        return self._trace.step(number)

    def finish(self) -> None:
        """Stop recording, write the trace of this rank, and print the table on rank 0."""
        trace, self._trace = self._trace, None
        assert trace is not None
        trace.stop()
        self._write(trace)

    def _write(self, trace: ProfilerTrace) -> None:
        rank = self._engine.mesh.rank
        path = self._directory / f"steps_{self._taken[0]}-{self._taken[-1]}_rank_{rank}.json"
        try:
            self._directory.mkdir(exist_ok=True)
            trace.write(path)
            if rank == 0:
                parts = parts_of_trace(json.loads(path.read_text()))
        except OSError as error:
            note = f"{path} cannot be written ({error.strerror}); training continues"
            print(f"note     {note}", flush=True)  # also on other ranks, into their logs
            return
        if rank == 0:
            self._output.say(*table(parts, self._taken))
            self._output.say(f"profile  {self._directory}: a trace of each rank, for https://ui.perfetto.dev")


def table(parts: StepParts, steps: Sequence[int]) -> list[str]:
    """Return the lines of the table: seconds and share of each part of a step. Pure."""
    rows = [(name, seconds, "") for name, seconds in parts.work.items()]
    for name, overlap in sorted(parts.collectives.items()):
        hidden = f"and {overlap.hidden:.4f} s hidden behind work" if overlap.hidden else ""
        rows.append((name, overlap.exposed, hidden))
    rows += [("idle", parts.idle, ""), ("step", parts.seconds, "")]
    cells = [[name, f"{seconds:.4f}", f"{seconds / parts.seconds:.1%}", note] for name, seconds, note in rows]
    which = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}, mean"
    return [
        f"profile  seconds per step on rank 0 ({which})",
        *(f"         {line}" for line in aligned(cells, right={1, 2})),
    ]
