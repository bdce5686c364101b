"""Start a run from its last checkpoint, from the weights of `checkpoint.init_from`, or from new weights."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from launcher.checkpoint.integrity import unchanged
from launcher.checkpoint.load import agreed_error, check_files_together, load_initial_weights, restore
from launcher.checkpoint.manifest import Manifest, StoredFiles, UnusableCheckpoint, read_manifest
from launcher.checkpoint.read import stored_files_of
from launcher.checkpoint.resume_changes import changes_since
from launcher.checkpoint.resume_choice import check_can_resume, check_same_corpus, fallback_checkpoint
from launcher.checkpoint.sources import WeightSource, weights_at
from launcher.config.errors import ConfigError, as_typed
from launcher.config.schema import RunConfig, SchedulerConfig, SchedulerName
from launcher.config.shape import has_lora
from launcher.data.blend import Segment
from launcher.data.open import blend_of
from launcher.engine.base import Engine
from launcher.engine.optimizer import learning_rate, state_keys
from launcher.engine.state import set_loss_scaler
from launcher.runtime.excluded import SampleRange, past_excluded

_SAME_RATE = 0.01  # relative difference of learning rates that is not worth a line


@dataclass(frozen=True)
class Progress:
    """Steps taken and samples consumed so far."""

    step: int = 0  # optimizer steps
    samples: int = 0  # consumed
    blends: tuple[Segment, ...] = ()  # the blends so far; the last is in force
    skipped: int = 0  # steps of earlier starts that changed no weight (see guard.nonfinite)
    excluded: tuple[SampleRange, ...] = ()  # samples that are left out (see guard.spike)
    history: dict[str, list[float]] = field(default_factory=dict)  # as SpikeDetector.history

    def after(self, global_batch_size: int) -> "Progress":
        samples = past_excluded(self.samples + global_batch_size, self.excluded)
        return replace(self, step=self.step + 1, samples=samples)

    def at_step(self, step: int, global_batch_size: int) -> "Progress":
        """Return the progress after `step`, an equal or later step than this progress."""
        progress = self
        while progress.step < step:
            progress = progress.after(global_batch_size)
        return progress


@dataclass(frozen=True)
class Start:
    """The progress at which this start of a run begins, and the directory of the weights it begins with."""

    progress: Progress
    source: Path | None = None
    changes: tuple[str, ...] = ()  # lines about what differs from the checkpoint

    def notes(self) -> list[str]:
        lines = []
        blends = self.progress.blends
        if len(blends) > 1 and blends[-1].start == self.progress.samples:
            before, now = (as_typed(blend.weights) for blend in blends[-2:])
            change = f"a new blend from sample {blends[-1].start} on: {now} (until then {before})"
            lines.append(f"note     {change}")
        if self.source and self.progress.step:
            lines.append(f"resumed  {self.source}, at step {self.progress.step}")
        elif self.source:
            lines.append(f"begun    {self.source}")
        if self.changes:
            lines += ["changed  since the checkpoint:", *(f"         {change}" for change in self.changes)]
        return lines


def start_from(
    run: RunConfig,
    engine: Engine,
    checkpoint: Path | None,
    initial: WeightSource | None,
    corpus: dict[str, str],
    excluded: tuple[SampleRange, ...] = (),
) -> Start:
    """Restore `checkpoint`, or an older one if it is damaged, else load `initial`. Collective."""
    while checkpoint is not None:
        try:
            return restored(run, engine, checkpoint, corpus, excluded)
        except UnusableCheckpoint as unusable:
            checkpoint = fallback_checkpoint(run, unusable, quiet=engine.mesh.rank > 0)
    if initial is not None:
        begin_with(engine, initial)
    return Start(Progress(blends=(blend_of(run),)), initial.path if initial else None)


def begin_with(engine: Engine, initial: WeightSource) -> None:
    """Load the weights of checkpoint.init_from. Collective over the world. Raises ConfigError."""
    try:
        with agreed_error(), checked_together(stored_files_of(initial)):
            load_initial_weights(engine, initial)
    except UnusableCheckpoint as unusable:
        remedy = "weights that are intact: see `launcher checkpoint check`"
        raise ConfigError("checkpoint.init_from", initial.path, str(unusable), remedy) from None


def restored(
    run: RunConfig,
    engine: Engine,
    checkpoint: Path,
    corpus: dict[str, str],
    excluded: tuple[SampleRange, ...],
) -> Start:
    """Restore the engine; return the start, past the samples that are `excluded`. Collective, world.

    Raises UnusableCheckpoint, or ConfigError.
    """
    with agreed_error():
        manifest = read_manifest(checkpoint)
        check_can_resume(run, checkpoint, manifest)
        check_same_corpus(corpus, checkpoint, manifest)
    if has_lora(run) and run.checkpoint.init_from is not None:
        # The checkpoint holds the adapters alone.
        begin_with(engine, weights_at(Path(run.checkpoint.init_from), "checkpoint.init_from"))
    with agreed_error(), checked_together(manifest.stored(checkpoint)):
        restore(engine, checkpoint, manifest, state_keys(run.optimizer))
    set_loss_scaler(engine, manifest.scaler)
    excluded = tuple(sorted({*((start, end) for start, end in manifest.excluded), *excluded}))
    progress = Progress(
        step=manifest.step,
        samples=past_excluded(manifest.samples, excluded),
        blends=blends_after(run, manifest),
        skipped=manifest.skipped,
        excluded=excluded,
        history=manifest.history,
    )
    changes = changes_since(manifest, run, engine.layout.describe())
    return Start(progress, checkpoint, (*changes, *rate_change(run, manifest)))


def rate_change(run: RunConfig, manifest: Manifest) -> list[str]:
    """Return a line if the learning rate jumps at the resumed step; a warning if it had decayed before."""
    before, step = manifest.config, manifest.step
    try:
        optimizer = replace(run.optimizer, lr=float(before["optimizer"]["lr"]))
        schedule = {**before["scheduler"], "name": SchedulerName[before["scheduler"]["name"]]}
        scheduler, steps = SchedulerConfig(**schedule), int(before["training"]["steps"])
        old = learning_rate(optimizer, scheduler, step=min(step + 1, steps), steps=steps)
    except (KeyError, TypeError, ValueError):
        return []  # a launcher with other fields wrote it
    new = learning_rate(run.optimizer, run.scheduler, step=step + 1, steps=max(run.training.steps, step + 1))
    if abs(new - old) <= _SAME_RATE * old:
        return []
    lines = [f"learning rate of step {step + 1}: {old:.3g} -> {new:.3g}"]
    has_decayed = step > scheduler.warmup_steps and old < (1 - _SAME_RATE) * optimizer.lr
    if has_decayed and new > old and run.optimizer.lr <= optimizer.lr:
        lines.append("warning: the schedule of the checkpoint had begun its decay, and the rate rises again")
    return lines


def blends_after(run: RunConfig, manifest: Manifest) -> tuple[Segment, ...]:
    """Return the checkpoint's blends, and the run's blend from the checkpoint on if it is another."""
    earlier = tuple(Segment(**blend) for blend in manifest.blends)
    configured = blend_of(run, manifest.samples)
    if earlier and earlier[-1].weights == configured.weights:
        return earlier
    return *(blend for blend in earlier if blend.start < configured.start), configured


@contextmanager
def checked_together(stored: StoredFiles | None) -> Iterator[None]:
    """Check all files before the block, and after it that none was changed. Collective over the world."""
    with unchanged(stored) if stored else nullcontext():
        if stored:
            check_files_together(stored)
        yield
