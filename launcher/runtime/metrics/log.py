"""Writes a run's metrics: to metrics.jsonl always, to W&B as configured. Only rank 0 uses it."""

import json

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.runtime.metrics.rows import Row, keep_rows_before
from launcher.runtime.metrics.wandb_run import WandbRun, start_wandb
from launcher.runtime.run_dir import RunDir


class MetricsLog:
    """Appends rows to metrics.jsonl, each flushed, and to the W&B run."""

    def __init__(self, run: RunConfig, layout: Layout, directory: RunDir, first_step: int) -> None:
        """Drop rows of an earlier start from `first_step` on: these steps are run again."""
        kept = keep_rows_before(first_step, directory.metrics)
        self._file = directory.metrics.open("a")
        self._wandb: WandbRun | None
        self._wandb, self.notes = start_wandb(run, layout, directory)
        if self._wandb is not None:
            for row in kept:
                self._wandb.log(row)

    def write(self, row: Row) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(row)

    def close(self, *, failed: bool) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(failed=failed)

    def where(self) -> str | None:
        return None if self._wandb is None else self._wandb.where()
