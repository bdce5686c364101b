"""The progress display of a run: a bar on a terminal, plain lines in a log file."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from launcher.runtime.metrics.rows import Row

LINES_PER_RUN = 20
_BAR_WIDTH = 12  # columns: a terminal of 80 also shows steps, time left and values
_FORMATS = {
    "train/loss": "loss {:.4f}",
    "train/grad_norm": "grad norm {:.3f}",
    "val/loss": "validation loss {:.4f}",
    "val/accuracy": "accuracy {:.1%}",
    "perf/tokens_per_s": "{:,.0f} tokens/s",
    "perf/mfu": "MFU {:.1%}",
}
_IN_BAR = ("train/loss", "train/grad_norm", "perf/tokens_per_s")


class ProgressDisplay:
    """Shows the steps of a run, with the values of its logged steps. A context: the bar ends with it."""

    def __init__(self, first_step: int, steps: int, *, visible: bool) -> None:
        self._steps, self._visible = steps, visible
        self._every = max(1, steps // LINES_PER_RUN)
        self._last_logged = first_step - 1
        self._bar: Progress | None = None
        if visible and sys.stdout.isatty():
            columns = (BarColumn(_BAR_WIDTH), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
            values = TextColumn("{task.description}", markup=False)
            self._bar = Progress(*columns, values, console=Console())
            # A resumed run begins here: otherwise its first step would count as all steps so far, in no time.
            self._task = self._bar.add_task("starting", total=steps, completed=first_step - 1)

    def __enter__(self) -> "ProgressDisplay":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, row: Row | None) -> None:
        """Show a step. `row` is None unless the step is logged: the bar then keeps the last logged values."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        if row is None or not self._visible:
            return
        values = [text.format(row[name]) for name, text in _FORMATS.items() if name in row]
        line = "  ".join([f"step {step}/{self._steps}", *values])
        is_due = step // self._every > self._last_logged // self._every
        self._last_logged = step
        if self._bar is not None:
            shown = [_FORMATS[name].format(row[name]) for name in _IN_BAR if name in row]
            self._bar.update(self._task, description="  ".join(shown))
            if "val/loss" in row:
                self._bar.console.print(line, highlight=False)
        elif "val/loss" in row or step == 1 or is_due:
            print(line, flush=True)
