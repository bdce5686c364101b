"""Writes a run's metrics: to metrics.jsonl and loss.png, and to W&B and TensorBoard as configured.

Only rank 0 uses it.
"""

from contextlib import ExitStack, suppress

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig, WandbMode
from launcher.launch.scratch import scratch_directory, temporary_files_in
from launcher.runtime.metrics.loss_picture import LossPicture
from launcher.runtime.metrics.rows import Row, RowFile, drop_rows_from, last_step
from launcher.runtime.metrics.tensorboard import TensorBoardLog
from launcher.runtime.run_dir import WANDB, RunDir


class MetricsLog:
    """Appends rows to metrics.jsonl, W&B and TensorBoard. None of them ends the run: a failure is a note."""

    def __init__(self, run: RunConfig, layout: Layout, directory: RunDir, first_step: int) -> None:
        """Drop rows of an earlier start from `first_step` on: these steps are run again."""
        self._notes: list[str] = []
        takes_back = False
        try:
            takes_back = last_step(directory.metrics) >= first_step
            self._notes += drop_rows_from(first_step, directory.metrics)
        except OSError as error:
            self._notes.append(f"{directory.metrics} keeps rows of an earlier start: {error.strerror}")
        self._file = RowFile(directory.metrics)
        self._scratch = ExitStack()
        self._picture = LossPicture(directory.metrics, f"{directory.path.name}, {run.training.steps} steps")
        tensorboard = TensorBoardLog(directory.path, first_step) if run.logging.tensorboard else None
        self._tensorboard, self._wandb = tensorboard, None
        if run.logging.wandb.mode is not WandbMode.disabled:
            try:
                temporary = self._scratch.enter_context(scratch_directory())
                with temporary_files_in(temporary):  # W&B makes directories when it is imported
                    from launcher.runtime.metrics.wandb_thread import WandbThread

                self._wandb = WandbThread(run, layout, directory, first_step, temporary)
            except Exception as error:
                self._notes.append(f"W&B cannot be used: {error!r}")
        elif takes_back and (directory.path / WANDB).is_dir():
            # The next start that logs to W&B trusts its files.
            with scratch_directory() as temporary, temporary_files_in(temporary), suppress(Exception):
                from launcher.runtime.metrics.wandb_files import drop_steps_from, fragments

                drop_steps_from(first_step, fragments(directory.path, directory.run_id))

    def write(self, row: Row) -> None:
        self._notes += self._file.append(row)
        self._picture.refresh(row)
        if self._tensorboard is not None:
            self._tensorboard.write(row)
        if self._wandb is not None:
            self._wandb.log(row)

    def close(self, *, failed: bool) -> None:
        self._notes += self._file.close()
        self._picture.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close(failed=failed)
        self._scratch.close()

    def new_notes(self) -> list[str]:
        """Return the notes to the user since the last call."""
        notes, self._notes = self._notes, []
        for writer in (self._picture, self._tensorboard, self._wandb):
            while writer is not None and writer.notes:
                notes.append(writer.notes.pop(0))
        return notes

    def where(self) -> str | None:
        return None if self._wandb is None else self._wandb.where
