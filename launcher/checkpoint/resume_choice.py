"""Which checkpoint a run goes on from, and whether it can. Runs before any rank does, without torch."""

import shlex
from pathlib import Path

from launcher.checkpoint.final import final_step
from launcher.checkpoint.manifest import (
    MANIFEST,
    BrokenCheckpoint,
    Manifest,
    checkpoints_in,
    read_manifest,
    readable_older,
    refusal_of,
)
from launcher.config.errors import ConfigError, as_typed, refusal, value_of
from launcher.config.fields import fields_of
from launcher.config.schema import RunConfig

# Another value would make it another model, or other samples. All else may change from one start to the next.
_FREE_OF_MODEL = ("model.dropout",)
_DATA = (
    "data.source",
    "data.train",
    "data.validation",
    "data.test",
    "data.validation_fraction",
    "data.test_fraction",
    "data.sequence_length",
    "data.document_attention",
    "data.end_of_document",
    "training.seed",
    "optimizer.name",
)
_BLEND = ("data.sources", "data.weights", "data.validation_sources")  # what checkpoint.new_blend lets change


def checkpoint_of(run: RunConfig, run_dir: Path) -> Path | None:
    """The checkpoint that `checkpoint.resume` means for a run in `run_dir`; None: from the first step.

    Raises ConfigError where it is not there or cannot be used, or is of another model or other data.
    """
    path = _meant(run, run_dir)
    while path is not None:
        try:
            manifest = read_manifest(path)
            check_goes_on(run, path, manifest)
            check_is_unfinished(run, path, manifest, run_dir)
            return path
        except BrokenCheckpoint as broken:
            path = older_or_refused(run, broken)
    return None


def older_or_refused(run: RunConfig, broken: BrokenCheckpoint) -> Path:
    """The next one back, where `checkpoint.fallback` allows it. Raises ConfigError where not."""
    older = readable_older(broken.path) if run.checkpoint.fallback else None
    if older is None:
        raise refusal_of(broken)
    return older


def _meant(run: RunConfig, run_dir: Path) -> Path | None:
    resume = run.checkpoint.resume
    if resume == "none":
        return None
    if resume == "auto":
        return next(iter(checkpoints_in(run_dir)), None)
    path = Path(resume).expanduser()
    if (path / MANIFEST).exists():
        return path.resolve()
    found = checkpoints_in(path)
    if not found:
        instead = "checkpoint.resume=auto (what run.dir holds)"
        if (path / "config.json").exists():
            instead = f"checkpoint.init_from={resume} checkpoint.resume=auto (its weights)"
        why = "neither a checkpoint nor a run's directory with one"
        raise refusal(run, "checkpoint.resume", why, instead, "checkpoint.resume=none")
    return found[0].resolve()


def check_goes_on(run: RunConfig, path: Path, manifest: Manifest) -> None:
    """Raises ConfigError where the run cannot go on from there: the field, its value, and what it was."""
    model = [name for name in fields_of(RunConfig) if name.startswith("model.")]
    for name in (*(name for name in model if name not in _FREE_OF_MODEL), *_DATA):
        was, now = _stored(manifest, name), as_typed(value_of(run, name))
        if was != now:
            why = f"{path} is of a run with {name}={was}"
            raise refusal(run, name, why, f"{name}={was}", "checkpoint.resume=none in a fresh run.dir")
    for name in () if run.checkpoint.new_blend else _BLEND:
        was, now = _stored(manifest, name), as_typed(value_of(run, name))
        if was != now:
            why = f"{path} is of a run with {name}={was}"
            new = f"checkpoint.new_blend=true (the new one counts from sample {manifest.samples} on)"
            raise refusal(run, name, why, shlex.quote(f"{name}={was}"), new)
    if (run.optimizer.momentum or 0) and "momentum_buffer" not in manifest.tensors:
        why = f"{path} has no momentum to go on with"
        raise refusal(run, "optimizer.momentum", why, "optimizer.momentum=0")


def check_is_unfinished(run: RunConfig, path: Path, manifest: Manifest, run_dir: Path) -> None:
    """Raises ConfigError where no step is left, unless this run was killed before its final weights."""
    last = run.training.stop_at or run.training.steps
    own = path.resolve().parent.parent == run_dir.resolve()
    if manifest.step < last or (own and manifest.step == last and final_step(run_dir) != last):
        return
    field = "training.steps" if run.training.stop_at is None else "training.stop_at"
    why = f"{path} is of step {manifest.step}: nothing is left to train"
    raise refusal(run, field, why, f"{field}={manifest.step + 1} (or more)", "another run.dir")


def _stored(manifest: Manifest, name: str) -> str:
    value: object = manifest.config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return as_typed(value)


def check_corpus_is(corpus: dict[str, str], path: Path, manifest: Manifest) -> None:
    """Raises ConfigError where a source's data, by their digest, are not what the checkpoint trained on."""
    for source in manifest.corpus.keys() & corpus.keys():
        was, now = manifest.corpus[source], corpus[source]
        if was != now:
            what = f"trained on another {source}" if source else "trained on other data"
            raise ConfigError(
                "checkpoint.resume",
                path,
                f"{what}: its digest is {was}, here it is {now}",
                "the same files and, with data=stdlib, the same Python; or checkpoint.resume=none",
            )
