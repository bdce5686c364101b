"""Detect spikes of the loss and of the gradient norm, by a robust score over the last logged steps."""

import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import torch.distributed as dist

from launcher.checkpoint.manifest import UnusableCheckpoint, checkpoints_in, read_manifest
from launcher.config.errors import RunStopped
from launcher.config.schema import OnSpike, RunConfig
from launcher.engine.base import Engine
from launcher.engine.update_guard import LARGEST_NORM
from launcher.runtime.excluded import exclude
from launcher.runtime.resume import Progress

JUDGED = {"train/loss": "the loss", "train/grad_norm": "the gradient norm"}
_FEWEST = 16  # values before the first judgement: the first steps of a run change much
_SPREAD_OF_NORMAL = 1.4826  # standard deviations per median absolute deviation of a normal distribution
_MOST_ROLLBACKS = 5  # to the same checkpoint
# Shares of the median: values that hardly move are not judged by their noise alone.
_SMALLEST_SPREAD = {"train/loss": 0.02, "train/grad_norm": 0.1}
# A step with a larger gradient norm was skipped, for example one that overflowed in fp16.
_LARGEST = {"train/loss": math.inf, "train/grad_norm": LARGEST_NORM}


class SpikeDetector:
    """The last values of the loss and of the gradient norm, the same on every rank."""

    def __init__(self, window: int, score: float, history: Mapping[str, list[float]]) -> None:
        self.score = score
        self._values = {name: deque(history.get(name, []), window) for name in JUDGED}

    @property
    def history(self) -> dict[str, list[float]]:
        """The values by name. A checkpoint keeps them, so that a resumed run judges with the same values."""
        return {name: list(values) for name, values in self._values.items()}

    def limit(self, name: str) -> float:
        """Return the value above which `name` has a spike; infinity while too few values are known."""
        values = self._values[name]
        if len(values) < min(_FEWEST, values.maxlen or 0):
            return math.inf
        middle = median(values)
        spread = _SPREAD_OF_NORMAL * median(abs(value - middle) for value in values)
        return middle + self.score * max(spread, _SMALLEST_SPREAD[name] * abs(middle))

    def spikes(self, row: Mapping[str, float]) -> list[str]:
        """Judge the values of a logged step, then remember them; return a clause for each spike.

        Infinite values and NaN are neither judged nor remembered: guard.nonfinite handles such steps.
        """
        spikes = []
        for name, values in self._values.items():
            value = row[name]
            if not math.isfinite(value) or value > _LARGEST[name]:
                continue
            if value > self.limit(name):
                words = (
                    f"{JUDGED[name]} is {value:.4g}, the median of the {len(values)} logged steps before is"
                )
                spikes.append(f"{words} {median(values):.4g}")
            values.append(value)
        return spikes


class Rollback(Exception):
    """Raised on all ranks to leave the training loop: the run goes back to `checkpoint`."""

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        super().__init__(checkpoint)


class SpikeGuard:
    """Judges each logged step, and sets the limit of guard.spike=skip. All ranks see the same values."""

    def __init__(self, run: RunConfig, engine: Engine, history: Mapping[str, list[float]]) -> None:
        self.policy, self.engine = run.guard.spike, engine
        self.detector = SpikeDetector(run.guard.spike_window, run.guard.spike_score, history)
        self._set_limit()

    def after(self, row: Mapping[str, float]) -> list[str]:
        """Judge a logged step; return a clause for each spike."""
        if self.policy is OnSpike.off:
            return []
        spikes = self.detector.spikes(row)
        self._set_limit()
        return spikes

    def _set_limit(self) -> None:
        if self.policy is OnSpike.skip:
            self.engine.guard.limit = min(LARGEST_NORM, self.detector.limit("train/grad_norm"))


def checkpoint_before_spike(run: RunConfig, run_dir: Path, progress: Progress, words: str) -> Path | None:
    """Return the newest finite checkpoint before the last step, which has a spike; None if there is none.

    If there is a checkpoint, the samples since the logged step before the spike are left out from now on.
    Raises RunStopped, with the `words` about the spike, after too many rollbacks to the same checkpoint.
    Collective over the world.
    """
    chosen: list[Path | None] = [None]
    if dist.get_rank() == 0:
        checkpoints = checkpoints_in(run_dir)
        chosen[0] = next((path for path in checkpoints if _is_before(path, progress.step)), None)
    dist.broadcast_object_list(chosen)
    checkpoint = chosen[0]
    if checkpoint is None:
        return None
    samples = read_manifest(checkpoint).samples
    tries = sum(start >= samples for start, _ in progress.excluded)
    if tries >= _MOST_ROLLBACKS:
        raise RunStopped(
            f"{words}, after {tries} rollbacks to {checkpoint.name} that left out samples"
            "\n  try: a lower optimizer.lr, a longer scheduler.warmup_steps, or guard.spike=warn"
        )
    if dist.get_rank() == 0:
        length = run.logging.interval * run.training.global_batch_size
        exclude(run_dir, (max(samples, progress.samples - length), progress.samples))
    dist.barrier()
    return checkpoint


def _is_before(checkpoint: Path, step: int) -> bool:
    try:
        manifest = read_manifest(checkpoint)
    except UnusableCheckpoint:
        return False
    return manifest.step < step and manifest.finite
