"""Choose the checkpoint to resume from and check that the run can resume. Needs no torch and no ranks."""

import shlex
from pathlib import Path
from typing import Any

from launcher.checkpoint.final import final_step, read_final_weights
from launcher.checkpoint.manifest import (
    Manifest,
    UnusableCheckpoint,
    checkpoint_at,
    checkpoints_in,
    newest_complete_before,
    read_manifest_to_resume,
    unusable_checkpoint_error,
)
from launcher.config.errors import ConfigError, as_typed, refusal, typed_text, value_of
from launcher.config.fields import fields_of
from launcher.config.paths import free_path
from launcher.config.run_format import SAVED_STEP, begun_from, read_identity
from launcher.config.schema import RunConfig
from launcher.config.shape import has_lora

# Must not change on resume: _DATA, and the model fields other than these. Every other field may.
_MAY_CHANGE_IN_MODEL = ("model.dropout",)
_DATA = (
    *("data.source", "data.train", "data.validation", "data.test"),
    *("data.validation_fraction", "data.test_fraction", "data.sequence_length"),
    *("data.document_attention", "data.end_of_document", "training.seed", "optimizer.name"),
)
_LORA = ("finetune.lora.rank", "finetune.lora.alpha", "finetune.lora.targets")
# These may change if checkpoint.new_blend is set.
_BLEND = ("data.sources", "data.weights", "data.validation_sources")


# Sections of the config that decide what the final weights are; others, such as the layout, do not.
_RESULT = ("model.", "finetune.", "data.", "optimizer.", "scheduler.", "precision.", "training.")


class RunFinished(Exception):
    """Raised for a run whose final weights are there: no step is left to train, and that is no error."""

    def __init__(self, run_dir: Path, step: int) -> None:
        self.run_dir, self.step = run_dir, step
        super().__init__(f"{run_dir} is at step {step} of {step}: nothing is left to train")

    def __reduce__(self) -> tuple[type["RunFinished"], tuple[Path, int]]:
        return type(self), (self.run_dir, self.step)  # the exception is sent between ranks

    def refusal(self) -> ConfigError:
        """Return the user error for a command that needs steps to train."""
        remedy = f"training.steps={self.step + 1} (or more), or another run.dir"
        why = f"this run is at step {self.step}: no step is left to train"
        return ConfigError("run.dir", self.run_dir, why, remedy)


def checkpoint_to_resume(run: RunConfig, run_dir: Path) -> Path | None:
    """Return the checkpoint that checkpoint.resume selects; None to start at step 0.

    A run that continues the run in run_dir takes the newest checkpoint there. Without one it begins where
    that run began.
    Raises ConfigError, and RunFinished if the run in run_dir has final weights of the same config.
    """
    raise_if_finished(run, run_dir)
    path = _requested_checkpoint(run, run_dir)
    while path is not None:
        try:
            manifest = read_manifest_to_resume(path)
            check_can_resume(run, path, manifest)
            check_steps_remain(run, path, manifest, run_dir)
            return path
        except UnusableCheckpoint as unusable:
            path = fallback_checkpoint(run, unusable)
    return None


def resumed_path(run: RunConfig) -> str | None:
    """Return the resolved path in checkpoint.resume; None for `auto` and `none`."""
    resume = run.checkpoint.resume
    return None if resume in ("auto", "none") else str(Path(resume).expanduser().resolve())


def continues_run(run: RunConfig, run_dir: Path) -> bool:
    """Return whether checkpoint.resume continues the run in run_dir: `auto`, or the path it was begun from.

    With that path, the command that began a run also resumes it.
    """
    if run.checkpoint.resume in ("auto", "none"):
        return run.checkpoint.resume == "auto"
    return begun_from(run_dir) == resumed_path(run)


def raise_if_finished(run: RunConfig, run_dir: Path) -> None:
    """Raise RunFinished if run_dir holds the final weights of this config's last step."""
    if not continues_run(run, run_dir):
        return
    try:
        weights = read_final_weights(run_dir)
    except UnusableCheckpoint:
        return
    is_last = weights.step == (run.training.stop_at or run.training.steps)
    if is_last and not any(name.startswith(_RESULT) for name in _differences(run, weights.config)):
        raise RunFinished(run_dir, weights.step)


def _differences(run: RunConfig, config: dict[str, Any]) -> list[str]:
    """Return the fields that `config` has with another value than the run."""
    names = [name for name in fields_of(RunConfig) if _stored_value(config, name) is not None]
    return [name for name in names if _stored_value(config, name) != as_typed(value_of(run, name))]


def fallback_checkpoint(run: RunConfig, unusable: UnusableCheckpoint, *, quiet: bool = False) -> Path:
    """Return, and print, the next older checkpoint. Raise ConfigError if none exists or fallback is off."""
    older = newest_complete_before(unusable.path) if run.checkpoint.fallback else None
    if older is None:
        raise unusable_checkpoint_error(unusable)
    if not quiet:
        print(f"note     {unusable.path} cannot be used: {unusable}; trying {older.name} instead", flush=True)
    return older


def _requested_checkpoint(run: RunConfig, run_dir: Path) -> Path | None:
    resume = run.checkpoint.resume
    if resume == "none":
        return None
    if continues_run(run, run_dir):
        newest = next(iter(checkpoints_in(run_dir)), None)
        return newest or _first_checkpoint(run, run_dir)
    path = Path(resume).expanduser()
    if checkpoint := checkpoint_at(path):
        return checkpoint.resolve()
    instead = "checkpoint.resume=auto (the newest checkpoint of run.dir)"
    if (path / "config.json").exists():
        weights = typed_text("checkpoint.init_from", resume)
        instead = f"{weights} checkpoint.resume=auto (to start from its weights)"
    why = f"no checkpoint was found in {path}"
    raise refusal(run, "checkpoint.resume", why, instead, "checkpoint.resume=none")


def _first_checkpoint(run: RunConfig, run_dir: Path) -> Path | None:
    """Return the checkpoint that the run in run_dir, which has saved none, began from; None for step 0."""
    source = begun_from(run_dir)
    has_saved = (read_identity(run_dir) or {}).get(SAVED_STEP) is not None
    if source is None or has_saved:  # start_of refuses a run whose checkpoints are missing
        return None
    if checkpoint := checkpoint_at(Path(source)):
        return checkpoint.resolve()
    why = f"{run_dir} was begun from {source}, which holds no checkpoint now, and has saved none itself"
    unused = typed_text("run.dir", str(free_path(run_dir)))
    remedy = f"checkpoint.resume=none {unused} (from the first step)"
    raise refusal(run, "checkpoint.resume", why, f"restore {source}", remedy)


def check_can_resume(run: RunConfig, path: Path, manifest: Manifest) -> None:
    """Raise ConfigError for the first field that differs from the checkpoint and may not."""
    fixed = [name for name in fields_of(RunConfig) if name.startswith("model.")]
    fixed += [*_DATA, *(() if run.checkpoint.new_blend else _BLEND)]
    for name in (name for name in fixed if name not in _MAY_CHANGE_IN_MODEL):
        stored, requested = _stored_value(manifest.config, name) or "null", as_typed(value_of(run, name))
        if stored == requested or _digests_decide(name, manifest, run):
            continue
        why = f"the run that wrote {path} has {name}={stored}"
        if name in _BLEND:
            new = f"checkpoint.new_blend=true (to use the new blend from sample {manifest.samples} on)"
            why += ", and checkpoint.new_blend is not set"
            raise refusal(run, name, why, shlex.quote(f"{name}={stored}"), new)
        why += ", which cannot change on resume"
        raise refusal(run, name, why, f"{name}={stored}", "checkpoint.resume=none in a fresh run.dir")
    _check_adapters(run, path, manifest)
    if (run.optimizer.momentum or 0) and "momentum_buffer" not in manifest.tensors:
        why = f"{path} contains no momentum to restore: its run had optimizer.momentum=0"
        raise refusal(run, "optimizer.momentum", why, "optimizer.momentum=0")


def _check_adapters(run: RunConfig, path: Path, manifest: Manifest) -> None:
    """Raise ConfigError if the adapters (LoRA), or the weights that they adapt, differ from the checkpoint's.

    The checkpoint of a run with adapters does not hold the frozen weights.
    """
    stored_rank = _stored(manifest.config, "finetune.lora.rank")
    had_adapters = stored_rank not in (_ABSENT, None, 0)
    if not had_adapters and not has_lora(run):
        return
    if had_adapters != has_lora(run):
        why = f"the run that wrote {path} trained {'adapters' if had_adapters else 'the whole model'}"
        new = typed_text("checkpoint.init_from", str(path))
        rank = f"finetune.lora.rank={as_typed(stored_rank) if had_adapters else 'null'}"
        raise refusal(run, "finetune.lora.rank", why, rank, f"{new} in a fresh run.dir")
    for name in (*_LORA, "checkpoint.init_from"):
        stored, requested = _stored_value(manifest.config, name), as_typed(value_of(run, name))
        if stored not in (None, requested):
            why = f"the adapters of {path} were trained with {name}={stored}, which cannot change on resume"
            raise refusal(run, name, why, shlex.quote(f"{name}={stored}"))


def check_steps_remain(run: RunConfig, path: Path, manifest: Manifest, run_dir: Path) -> None:
    """Raise ConfigError if the checkpoint is at or beyond the last step.

    A run that was killed between its last checkpoint and its final weights may resume: it writes the weights.
    """
    last = run.training.stop_at or run.training.steps
    same_run = path.resolve().parent.parent == run_dir.resolve()
    if manifest.step < last or (same_run and manifest.step == last and final_step(run_dir) != last):
        return
    field = "training.steps" if run.training.stop_at is None else "training.stop_at"
    why = f"{'this run' if same_run else path} is already at step {manifest.step}: no step is left to train"
    raise refusal(run, field, why, f"{field}={manifest.step + 1} (or more)", "another run.dir")


_ABSENT = object()  # stands for a field that a config does not have


def _stored_value(config: dict[str, Any], name: str) -> str | None:
    """Return the value of a dotted field as it is typed; None if a config has no such field."""
    value = _stored(config, name)
    return None if value is _ABSENT else as_typed(value)


def _stored(config: dict[str, Any], name: str) -> object:
    value: object = config
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _digests_decide(field: str, manifest: Manifest, run: RunConfig) -> bool:
    """Return whether `field` names files whose digests the checkpoint has, so that their paths may differ."""
    if field not in _DIGESTS:
        return False
    stored, requested = _stored(manifest.config, field), value_of(run, field)
    if isinstance(stored, dict) and isinstance(requested, dict):
        return stored.keys() == requested.keys() and all(
            f"{source}{_DIGESTS[field]}" in manifest.corpus for source in stored
        )
    return bool(stored and requested) and _DIGESTS[field] in manifest.corpus


# The fields of paths, and the ending of the names of their digests: the source and, for separate validation
# or test files, their part.
_DIGESTS = {
    **{"data.train": "", "data.sources": ""},
    **{"data.validation": ":validation", "data.validation_sources": ":validation", "data.test": ":test"},
}


def check_same_corpus(corpus: dict[str, str], path: Path, manifest: Manifest) -> None:
    """Raise ConfigError if a digest in `corpus`, by source, differs from the digest in the checkpoint."""
    for source in manifest.corpus.keys() & corpus.keys():
        stored, present = manifest.corpus[source], corpus[source]
        if stored != present:
            name, _, part = source.partition(":")
            name = (f"data source {name}" if name else "training data") if not part else f"{part} data"
            digests = f"its digest was {stored} and is now {present}"
            why = f"the {name} has changed since the checkpoint: {digests}"
            remedy = "the same files and, with data=stdlib, the same Python; or checkpoint.resume=none"
            raise ConfigError("checkpoint.resume", path, why, remedy)
