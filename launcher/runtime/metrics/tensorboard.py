"""Event files for TensorBoard (`logging.tensorboard`). A failure is a note and never ends the run."""

from pathlib import Path
from typing import Any

from launcher.runtime.metrics.rows import Row
from launcher.runtime.run_dir import TENSORBOARD


class TensorBoardLog:
    """Writes the rows of this start. `notes` are for the user."""

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self.notes: list[str] = []
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard hides what earlier starts logged from first_step on: these steps are run again.
            self._writer = SummaryWriter(str(run_dir / TENSORBOARD), purge_step=first_step)
        except Exception as error:
            self._give_up(error)

    def write(self, row: Row) -> None:
        try:
            for name, value in row.items() if self._writer else ():
                if name != "step":
                    self._writer.add_scalar(name, value, int(row["step"]))
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        try:
            if self._writer:
                self._writer.close()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        self.notes.append(f"TensorBoard's files are no longer written ({error!r}); training continues")
