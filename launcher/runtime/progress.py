"""What a person sees of a run: a bar on a terminal, plain lines in a log file."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from launcher.text import whole

LINES_PER_RUN = 20


class ProgressDisplay:
    """A context that is told of every step."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = Progress(*columns, console=Console())
            self._task = self._bar.add_task("starting", total=steps)

    def __enter__(self) -> "ProgressDisplay":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, row: dict[str, float | int]) -> None:
        """Show one step; validations always get a line of their own."""
        step = int(row["step"])
        line = f"step {step}/{self._steps}  {describe(row)}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=f"loss {row['train/loss']:.4f}")
            if "val/loss" in row:
                self._bar.console.print(line, highlight=False)
        elif "val/loss" in row or step == 1 or step % max(1, self._steps // LINES_PER_RUN) == 0:
            print(line, flush=True)


def describe(row: dict[str, float | int]) -> str:
    parts = [f"loss {row['train/loss']:.4f}", f"grad norm {row['train/grad_norm']:.3f}"]
    if "val/loss" in row:
        parts.append(f"validation loss {row['val/loss']:.4f}")
    if "val/accuracy" in row:
        parts.append(f"accuracy {row['val/accuracy']:.1%}")
    parts.append(f"{whole(row['perf/tokens_per_s'])} tokens/s")
    if "perf/mfu" in row:
        parts.append(f"MFU {row['perf/mfu']:.1%}")
    return "  ".join(parts)
