"""Report steps skipped because their gradients are not usable, or stop the run (guard.nonfinite)."""

from launcher.config.errors import RunStopped
from launcher.config.schema import OnNonfinite, RunConfig
from launcher.data.blend import Blend
from launcher.data.sampler import sample_indices
from launcher.engine.base import Engine
from launcher.engine.examination import BadValue, first_bad_value
from launcher.runtime.agreement import WorldValues
from launcher.runtime.batches import counted_labels, rank_batches
from launcher.runtime.resume import Progress

_MOST_REPORTS = 5  # in one start: each repeats a step
_MOST_SAMPLES = 8  # listed in a message


class NonfiniteGuard:
    """Reports skipped steps, and stops the run if there are too many in a row."""

    def __init__(self, run: RunConfig, engine: Engine, progress: Progress) -> None:
        """`progress` is the progress at which this start of the run begins."""
        self.run, self.engine = run, engine
        self._earlier = progress  # at the last call of `after`
        self._known, self._reports = 0, 0

    def after(self, progress: Progress, agreed: WorldValues, blend: Blend) -> list[str]:
        """Return lines for the user after a logged step. Raises RunStopped. Collective over the world."""
        total, in_row, since = agreed.skips
        earlier, self._earlier = self._earlier, progress
        if total == self._known:
            return []
        new, self._known = total - self._known, total
        exceeds_limit = in_row > 0 and bool(self.engine.guard.norm.isfinite())  # as guard.spike=skip sets it
        if self.engine.lowers_loss_scale and not exceeds_limit:
            return []  # not an error: fp16's loss scale is found by trying
        step = progress.step - since
        count = f"step {step} was" if new == 1 else f"{new} steps were"
        # Count forwards, because a step may be followed by samples that a rollback left out.
        before = earlier.at_step(step - 1, self.run.training.global_batch_size)
        lines = [f"warning  {count} skipped: {_UNUSABLE}{self._finding(before, blend)}"]
        if self.run.guard.nonfinite is OnNonfinite.stop:
            raise RunStopped(f"{lines[0][9:]}\n  try: guard.nonfinite=skip (to leave out such steps)")
        if in_row >= self.run.guard.max_skips:
            raise RunStopped(
                f"{in_row} steps in a row were skipped, the last is step {step}: {_UNUSABLE}. Weights and "
                f"checkpoints are finite.\n  try: a lower optimizer.lr, other data, or "
                f"guard.max_skips={10 * self.run.guard.max_skips}"
            )
        return lines

    def _finding(self, before: Progress, blend: Blend) -> str:
        """Repeat the step that follows `before`; return in words where its first bad value is."""
        self._reports += 1
        if self._reports > _MOST_REPORTS:
            return ""
        consumed = before.samples
        batches = rank_batches(self.run, self.engine, blend, consumed) if self.engine.reads_data else []
        labels = counted_labels(self.run, blend, consumed)
        bad = first_bad_value(self.engine, before.step + 1, batches, labels)
        if bad is None:
            return ". When the step was repeated, all its values were finite"
        return f".\n         The first bad value is {place_of(bad, self.run, self.engine, consumed)}"


_UNUSABLE = "its gradients have NaN, infinite or huge values"


def place_of(bad: BadValue, run: RunConfig, engine: Engine, consumed: int) -> str:
    """Return layer, rank, micro-batch and sample indices of a bad value in words."""
    samples = sample_indices(
        samples_consumed=consumed,
        global_batch_size=run.training.global_batch_size,
        micro_batch_size=run.training.micro_batch_size,
        data_rank=bad.data_rank // engine.mesh.context.size,
        data_size=engine.mesh.batch.size,
    )[bad.micro_batch]
    more = f" and {len(samples) - _MOST_SAMPLES} more" if len(samples) > _MOST_SAMPLES else ""
    listed = ", ".join(map(str, samples[:_MOST_SAMPLES]))
    return f"{bad.name}, on rank {bad.rank}, micro-batch {bad.micro_batch} (samples {listed}{more})"
