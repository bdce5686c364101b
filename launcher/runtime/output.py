"""The lines, progress display and metrics of a run: rank 0 writes them, the other ranks are silent."""

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.runtime.metrics.log import MetricsLog
from launcher.runtime.metrics.rows import Row
from launcher.runtime.progress import ProgressDisplay
from launcher.runtime.run_dir import RunDir


class RunOutput:
    """Prints and logs on rank 0. A context: on exit the log is closed, as failed unless `finished` is set."""

    def __init__(
        self, run: RunConfig, layout: Layout, directory: RunDir, first_step: int, last_step: int, *, rank: int
    ) -> None:
        self.finished = False
        self._directory = directory
        self._log = MetricsLog(run, layout, directory, first_step) if rank == 0 else None
        self.display = ProgressDisplay(first_step, last_step, visible=rank == 0)
        self._say_notes()

    def __enter__(self) -> "RunOutput":
        return self

    def __exit__(self, *_: object) -> None:
        if self._log:
            self._log.close(failed=not self.finished)
            self._say_notes()

    def say(self, *lines: str) -> None:
        if self._log:
            for line in lines:
                print(line, flush=True)

    def note(self, notes: list[str]) -> None:
        self.say(*[f"note     {note}" for note in notes])

    def log(self, row: Row) -> None:
        if self._log:
            self._log.write(row)
            self._say_notes()

    def say_where(self) -> None:
        if self._log:
            self.say(f"metrics  {self._directory.metrics}")
            if where := self._log.where():
                self.say(f"W&B      {where}")

    def _say_notes(self) -> None:
        if self._log:
            self.note(self._log.new_notes())
