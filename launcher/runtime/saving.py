"""When a run is saved: at intervals of steps or minutes, at the last step, and when it is asked to stop."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace

from torch import Tensor

from launcher import __version__
from launcher.checkpoint.manifest import Manifest
from launcher.checkpoint.save import CheckpointError, CheckpointWriter
from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.engine.base import Engine
from launcher.engine.optimizer import state_keys
from launcher.engine.state import loss_scaler, updates_made
from launcher.launch.stopping import stop_grace
from launcher.runtime.agreement import WorldValues
from launcher.runtime.replica_check import ReplicaCheck, diverged
from launcher.runtime.resume import Progress
from launcher.runtime.run_dir import RunDir, config_as_dict

# The part of the time for a stop or a save after which it is noticed at the latest. The rest is left for the
# save, and for steps that become slower than at the last agreement.
_NOTICED_WITHIN = 0.25


class Checkpoints:
    """Saves a run at the steps that its config asks for, and after a rank was asked to stop.

    The all-reduce of a logged step tells all ranks whether to stop and whether a save is due. But logged
    steps may be far apart, and a stop must be saved within checkpoint.stop_grace_seconds. So ranks also agree
    in between: each agreement tells all ranks the step time of the slowest rank, and from that every rank
    computes the same step for the next agreement, without communication.
    """

    def __init__(
        self, run: RunConfig, layout: Layout, engine: Engine, directory: RunDir, corpus: dict[str, str]
    ) -> None:
        self.stopping = False  # all ranks agreed to stop after the last step, which is saved
        self.run, self.layout, self.engine, self.corpus = run, layout, engine, corpus
        self._writer = CheckpointWriter(
            engine, run.checkpoint, directory.path, state_keys(run.optimizer), directory.loss
        )
        self._replicas, self._run_dir = ReplicaCheck(engine, run.guard.replica_interval), directory.path
        self._saved_at = time.monotonic()
        self._next_agreement = 0.0  # at the first step of this start: its time is not known
        self._last_notes: list[str] = []  # about the save that was pending when a guard ended the run

    @property
    def is_overdue(self) -> bool:
        """Whether checkpoint.interval_minutes have passed, by the clock of the first rank."""
        minutes = self.run.checkpoint.interval_minutes
        if minutes is None or self.engine.mesh.rank > 0:
            return False
        return time.monotonic() - self._saved_at >= 60 * minutes

    @property
    def pending_copy(self) -> list[Tensor]:
        """The tensors of the pending save, in host memory."""
        return self._writer.pending_copy

    def needs_agreement(self, step: int) -> bool:
        """Return whether ranks must agree after `step`, even if it is not logged; the same on all ranks."""
        for_a_save = self._is_interval(step) or step >= self._next_agreement
        return self._replicas.is_due(step) or (self.run.checkpoint.enabled and for_a_save)

    def after_step(
        self,
        progress: Progress,
        agreed: WorldValues,
        validation_loss: float | None,
        history: dict[str, list[float]],
        *,
        last: bool,
    ) -> list[str]:
        """Save if it is due, with the `history` of losses; return notes to the user. Collective, world.

        Raises RunStopped if the replicas are compared, as before every save, and differ.
        """
        saves = self.run.checkpoint.enabled
        if saves:
            self.stopping = agreed.stop_requested
            self._next_agreement = progress.step + steps_within(longest_wait(self.run), agreed.step_seconds)
            saves = agreed.save_due or self._is_interval(progress.step) or self.stopping or last
        if saves or last or self._replicas.is_due(progress.step):
            self._stop_if_diverged(progress)
        if not saves:
            return []
        self._saved_at = time.monotonic()
        progress = replace(progress, skipped=progress.skipped + agreed.skips[0], history=history)
        manifest = self._manifest(progress, validation_loss)
        # Apart from the save, so that a failure of the checkpoint before it does not prevent it.
        notes = self._failure_of(self._writer.wait)
        return notes + self._failure_of(lambda: self._writer.save(manifest))

    def close(self) -> list[str]:
        """Wait until the last checkpoint is written; return notes to the user. Collective over the world."""
        return self._failure_of(self._writer.wait)

    def complete(self) -> list[str]:
        """Wait for the pending save of a run that a guard ends; return notes to the user. Collective, world.

        A failed save is a note even with checkpoint.stop_on_error: an error would hide why the run ends.
        """
        try:
            self._writer.wait()
        except CheckpointError as error:
            self._last_notes.append(_failed_save(error))
        return self._last_notes

    def _stop_if_diverged(self, progress: Progress) -> None:
        if differing := self._replicas.disagreements(progress):
            # The pending checkpoint is of an earlier step, whose replicas were equal. Once it is complete,
            # the message names it.
            self.complete()
            raise diverged(progress.step, differing, self._run_dir)

    def _is_interval(self, step: int) -> bool:
        interval = self.run.checkpoint.interval_steps
        return bool(interval and step % interval == 0)

    def _failure_of(self, write: Callable[[], object]) -> list[str]:
        """Return a note if `write` fails, or raise with checkpoint.stop_on_error."""
        try:
            write()
        except CheckpointError as error:
            if self.run.checkpoint.stop_on_error:
                raise
            return [_failed_save(error)]
        return []

    def _manifest(self, progress: Progress, validation_loss: float | None) -> Manifest:
        return Manifest(
            step=progress.step,
            samples=progress.samples,
            updates=updates_made(self.engine),
            scaler=loss_scaler(self.engine),
            corpus=self.corpus,
            launcher=__version__,
            layout=self.layout.describe(),
            config=config_as_dict(self.run),
            validation_loss=validation_loss,
            tensors={},
            files={},
            blends=[asdict(blend) for blend in progress.blends],
            skipped=progress.skipped,
            excluded=[list(samples) for samples in progress.excluded],
            history=progress.history,
        )


def _failed_save(error: CheckpointError) -> str:
    return f"a checkpoint could not be written, those before it are intact: {error}"


def longest_wait(run: RunConfig) -> float:
    """Return the seconds within which ranks must agree again whether to stop or to save."""
    minutes = run.checkpoint.interval_minutes
    limits = [stop_grace(run) or float("inf"), float("inf") if minutes is None else 60 * minutes]
    return _NOTICED_WITHIN * min(limits)


def steps_within(seconds: float, step_seconds: float) -> float:
    """Return how many steps fit into `seconds`, at least one; infinity if `seconds` is infinite."""
    return max(1.0, seconds // max(step_seconds, 1e-9)) if seconds < float("inf") else seconds
