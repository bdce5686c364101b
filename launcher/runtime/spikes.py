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
        """Judge the values of a logged step, then remember them; return a clause for each spike."""
        spikes = []
        for name, values in self._values.items():
            value, limit = row[name], self.limit(name)
            if value > limit:
                words = (
                    f"{JUDGED[name]} is {value:.4g}, the median of the {len(values)} logged steps before is"
                )
                spikes.append(f"{words} {median(values):.4g}")
            if math.isfinite(value):
                values.append(value)
        return spikes


class Spike(Exception):
    """Raised on all ranks to leave the training loop: the run goes back to a checkpoint."""

    def __init__(self, progress: Progress, words: str) -> None:
        self.progress, self.words = progress, words
        super().__init__(words)


class SpikeGuard:
    """Applies guard.spike to each logged step. All ranks see the same values."""

    def __init__(self, run: RunConfig, engine: Engine, history: Mapping[str, list[float]]) -> None:
        self.policy, self.engine = run.guard.spike, engine
        self.detector = SpikeDetector(run.guard.spike_window, run.guard.spike_score, history)
        self._set_limit()

    def after(self, progress: Progress, row: Mapping[str, float]) -> list[str]:
        """Judge a logged step; return lines for the user. Raises Spike if the run must go back."""
        if self.policy is OnSpike.off:
            return []
        spikes = self.detector.spikes(row)
        self._set_limit()
        if spikes and self.policy is OnSpike.rollback:
            raise Spike(progress, f"step {progress.step}: {' and '.join(spikes)}")
        return [f"warning  step {progress.step}: {spike}" for spike in spikes]

    def _set_limit(self) -> None:
        if self.policy is OnSpike.skip:
            self.engine.guard.limit = min(LARGEST_NORM, self.detector.limit("train/grad_norm"))


def roll_back(run: RunConfig, run_dir: Path, spike: Spike) -> Path | None:
    """Return the newest finite checkpoint before the spike; None if there is none.

    The samples since the last logged step before the spike are left out from now on. Raises RunStopped after
    too many rollbacks to the same checkpoint. Collective over the world.
    """
    chosen: list[Path | None] = [None]
    if dist.get_rank() == 0:
        checkpoints = checkpoints_in(run_dir)
        chosen[0] = next((path for path in checkpoints if _is_before(path, spike.progress.step)), None)
    dist.broadcast_object_list(chosen)
    checkpoint = chosen[0]
    if checkpoint is None:
        return None
    samples = read_manifest(checkpoint).samples
    tries = sum(start >= samples for start, _ in spike.progress.excluded)
    if tries >= _MOST_ROLLBACKS:
        raise RunStopped(
            f"{spike.words}, after {tries} rollbacks to {checkpoint.name} that left out samples"
            "\n  try: a lower optimizer.lr, a longer scheduler.warmup_steps, or guard.spike=warn"
        )
    if dist.get_rank() == 0:
        length = run.logging.interval * run.training.global_batch_size
        exclude(run_dir, (max(samples, spike.progress.samples - length), spike.progress.samples))
    dist.barrier()
    return checkpoint


def _is_before(checkpoint: Path, step: int) -> bool:
    try:
        manifest = read_manifest(checkpoint)
    except UnusableCheckpoint:
        return False
    return manifest.step < step and manifest.finite
