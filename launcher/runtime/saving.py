"""When a run is saved, and where it starts."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from launcher import __version__
from launcher.checkpoint.load import damaged_file_on_any_rank, load_initial_weights, restore
from launcher.checkpoint.manifest import DAMAGED, Manifest, UnusableCheckpoint, read_manifest
from launcher.checkpoint.read import open_weights
from launcher.checkpoint.resume_choice import check_can_resume, check_same_corpus, fallback_checkpoint
from launcher.checkpoint.save import CheckpointError, CheckpointWriter
from launcher.checkpoint.sources import Kind, Weights
from launcher.config.errors import ConfigError
from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.data.blend import Segment
from launcher.data.open import blend_of
from launcher.engine.base import Engine
from launcher.engine.optimizer import state_keys
from launcher.engine.state import loss_scaler, set_loss_scaler, updates_made
from launcher.launch.rank import StopRequest
from launcher.runtime.run_dir import RunDir, config_as_dict


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0  # optimizer steps
    samples: int = 0  # consumed
    blends: tuple[Segment, ...] = ()  # of the run so far, the one in force last

    def after(self, global_batch_size: int) -> "Progress":
        """One step later."""
        return Progress(self.step + 1, self.samples + global_batch_size, self.blends)


def start_from(
    run: RunConfig, engine: Engine, path: Path | None, initial: Weights | None, corpus: dict[str, str]
) -> tuple[Progress, Path | None]:
    """Take up the checkpoint `path`, or one before it; where the run then is, and what was taken.

    Without one, at the first step, with the weights `initial` if there are any.

    Collective over the world. Raises ConfigError for one that cannot be used.
    """
    while path is not None:
        try:
            manifest = read_manifest(path)
            check_can_resume(run, path, manifest)
            check_same_corpus(corpus, path, manifest)
            if name := damaged_file_on_any_rank(path, manifest):
                raise UnusableCheckpoint(path, name, DAMAGED)
            restore(engine, path, manifest, state_keys(run.optimizer))
            set_loss_scaler(engine, manifest.scaler)
            return Progress(manifest.step, manifest.samples, blends_after(run, manifest)), path
        except UnusableCheckpoint as unusable:
            path = fallback_checkpoint(run, unusable)
    if initial is not None:
        try:
            check_intact(initial)
            load_initial_weights(engine, open_weights(initial))
        except UnusableCheckpoint as unusable:
            remedy = "weights that are intact: see `launcher checkpoint check`"
            raise ConfigError("checkpoint.init_from", initial.path, str(unusable), remedy) from None
    return Progress(blends=(blend_of(run),)), initial.path if initial else None


def blends_after(run: RunConfig, manifest: Manifest) -> tuple[Segment, ...]:
    """Those of the checkpoint, and the run's own from there on where it is another."""
    earlier = tuple(Segment(**blend) for blend in manifest.blends)
    own = blend_of(run, manifest.samples)
    if earlier and earlier[-1].weights == own.weights:
        return earlier
    return *(blend for blend in earlier if blend.start < own.start), own


def check_intact(weights: Weights) -> None:
    """Raise UnusableCheckpoint if a file of a checkpoint is damaged. Collective over the world."""
    if weights.kind is Kind.checkpoint and (
        name := damaged_file_on_any_rank(weights.path, read_manifest(weights.path))
    ):
        raise UnusableCheckpoint(weights.path, name, DAMAGED)


class Checkpoints:
    """Saves a run as its config says. Every method is collective over the world."""

    def __init__(
        self,
        run: RunConfig,
        layout: Layout,
        engine: Engine,
        directory: RunDir,
        corpus: dict[str, str],
        stop: StopRequest,
    ) -> None:
        self.stopping = False  # as all ranks agreed after the last step: it is saved, train no further
        self._stop = stop
        self.run, self.layout, self.engine, self.corpus = run, layout, engine, corpus
        self._writer = CheckpointWriter(engine, run.checkpoint, directory.path, state_keys(run.optimizer))
        self._saved_at = time.monotonic()

    def after_step(self, progress: Progress, validation_loss: float | None, *, last: bool) -> list[str]:
        """Save where it is due; what to tell the user."""
        if not self.run.checkpoint.enabled:
            return []
        due, self.stopping = self._agree(progress.step)
        if not (due or self.stopping or last):
            return []
        self._saved_at = time.monotonic()
        notes = []
        try:
            self._writer.save(self._manifest(progress, validation_loss))
        except CheckpointError as error:
            notes.append(self._failed(error))
        return notes

    def close(self) -> list[str]:
        """Wait for the last one; what to tell the user."""
        try:
            self._writer.wait()
        except CheckpointError as error:
            return [self._failed(error)]
        return []

    def _failed(self, error: CheckpointError) -> str:
        if self.run.checkpoint.stop_on_error:
            raise error
        return f"a checkpoint could not be written, those before it are intact: {error}"

    def _agree(self, step: int) -> tuple[bool, bool]:
        """Whether this step is to be saved, and whether the run was asked to stop, on any rank."""
        config = self.run.checkpoint
        overdue = False
        if config.interval_minutes is not None and self.engine.mesh.rank == 0:
            # The first rank's clock decides for all.
            overdue = time.monotonic() - self._saved_at >= 60 * config.interval_minutes
        agreed = torch.tensor([overdue, self._stop.asked], dtype=torch.int32)
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        overdue, stopping = (bool(one) for one in agreed.tolist())
        return overdue or bool(config.interval_steps and step % config.interval_steps == 0), stopping

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
        )
