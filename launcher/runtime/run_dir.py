"""The run directory: one directory is one run, with one id for W&B and everything the run writes."""

import dataclasses
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import __version__
from launcher.checkpoint.companions import COMPANIONS, carry_companions
from launcher.checkpoint.final import FINAL_WEIGHTS, final_step
from launcher.checkpoint.manifest import CHECKPOINTS, checkpoints_in, step_of
from launcher.checkpoint.resume_choice import checkpoint_to_resume, continues_run, resumed_path
from launcher.checkpoint.sources import (
    WeightsKind,
    WeightSource,
    check_model_is,
    stored_dtype,
    weights_at,
)
from launcher.config.errors import ConfigError, typed_text
from launcher.config.layout import Layout
from launcher.config.paths import free_path
from launcher.config.run_format import (
    BEGUN_BY_JOB,
    BEGUN_FROM,
    COMPARISON,
    END_OF_DOCUMENT,
    FORMAT,
    IDENTITY,
    SAVED_STEP,
    begun_from,
    read_identity,
    write_identity,
)
from launcher.config.schema import ComparedRunConfig, RunConfig
from launcher.config.secrets import as_written, as_yaml
from launcher.data.open import end_of_documents
from launcher.files import write_text
from launcher.launch.environment import slurm_step_name
from launcher.runtime.hold import HOLDER, HeldDirectory, held, is_holder_file

CONFIG, LOGS, METRICS, WANDB = "config.yaml", "logs", "metrics.jsonl", "wandb"
PICTURE, TENSORBOARD, PROFILE = "loss.png", "tensorboard", "profile"


@dataclass(frozen=True)
class RunDir:
    """A run directory that this process or rank 0 holds, and the weights that the run starts from."""

    path: Path
    run_id: str
    checkpoint: Path | None = None  # to resume from
    initial: WeightSource | None = None  # to begin with if there is no checkpoint
    held_directory: HeldDirectory | None = None  # of the directory that is held

    @property
    def logs(self) -> Path:
        return self.path / LOGS

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    def loss(self) -> str | None:
        """Return why `path` no longer leads to the directory that is held; None if it does."""
        return self.held_directory.loss() if self.held_directory else None


@contextmanager
def claimed_run_dir(
    run: RunConfig, layout: Layout, *, multirun_index: int | None = None
) -> Iterator[tuple[RunDir, list[str]]]:
    """Make the run directory, hold it for the block, and write the run's config and identity there.

    Yields the directory and notes to the user. One process per run calls this. An unfinished run in the
    directory is resumed under its id. Raises ConfigError if the directory cannot be made or holds files that
    no run wrote, if it is of another command, if another process holds it, if its run cannot be resumed, or
    if checkpoint.resume forbids it; and RunFinished if its run is finished.
    """
    run_id = secrets.token_hex(4)
    path = run_path(run, run_id, multirun_index)
    with ExitStack() as stack:
        try:
            # These raise before anything is made or written.
            check_files_are_ours(path)
            check_command(run, path)
            if not path.exists():
                _beginning(run, path)
            held_directory, notes = stack.enter_context(held(path))
            directory, copied = _claim(run, layout, held_directory, run_id, path)
        except OSError as error:
            why = f"cannot be written: {error.strerror}"
            raise ConfigError("run.dir", path, why, "a directory you may write to") from None
        yield directory, [*notes, *copied, *_losses(path, run)]


def start_of(run: RunConfig, path: Path) -> Path | None:
    """Return the checkpoint that a run in `path` resumes from, if there is one.

    Raises ConfigError, and RunFinished if the run is finished.
    """
    check_files_are_ours(path)
    check_command(run, path)
    checkpoint = checkpoint_to_resume(run, path)
    if read_identity(path) is None:
        return checkpoint
    # The checkpoint may be another run's, from which the run in `path` was begun.
    continues, has_checkpoint = continues_run(run, path), bool(checkpoints_in(path))
    if continues and not has_checkpoint:
        check_no_checkpoint_is_missing(path)
    is_over = not has_checkpoint and final_step(path) is not None
    if not continues or is_over:
        raise _holds_a_run(path, is_over=is_over)
    return checkpoint


def _holds_a_run(path: Path, *, is_over: bool) -> ConfigError:
    """Return the refusal to begin a run in a run's directory. A run that is over cannot be continued."""
    source = begun_from(path)
    why = "already holds a run" + (f", which was begun from {source}" if source else "")
    others = _fresh_directory(path)
    remedy = others if is_over else f"checkpoint.resume=auto (continues the run there) or {others}"
    return ConfigError("run.dir", path, why, remedy)


def check_no_checkpoint_is_missing(path: Path) -> None:
    """Raise ConfigError if the run has written a checkpoint, and none is there."""
    step = (read_identity(path) or {}).get(SAVED_STEP)
    if step is not None:
        folder = path / CHECKPOINTS
        why = f"this run saved a checkpoint at step {step}, and {folder} holds none"
        restore = f"restore {folder}"
        unused = typed_text("run.dir", str(free_path(path)))
        remedy = f"{restore}, or checkpoint.resume=none {unused} (from the first step)"
        raise ConfigError("run.dir", path, why, remedy)


def check_files_are_ours(path: Path) -> None:
    """Check that every file which a run writes in `path` is free or was written by a run. Raises ConfigError.

    If the directory has a run.json of ours, a run wrote its files. Each must still have the right file type.
    """
    if os.path.lexists(path) and not path.is_dir():
        unused = typed_text("run.dir", str(free_path(path)))
        raise ConfigError("run.dir", path, "is a file, not a directory", unused)
    is_ours = read_identity(path) is not None
    for name in (CONFIG, METRICS, HOLDER, IDENTITY, PICTURE):
        entry = path / name
        if os.path.lexists(entry) and not entry.is_file():
            raise _not_ours(path, f"{name} is not a regular file")
    for name in (LOGS, CHECKPOINTS, FINAL_WEIGHTS, COMPANIONS, PROFILE):
        entry = path / name
        if os.path.lexists(entry) and not entry.is_dir():
            raise _not_ours(path, f"{name} is not a directory")
    if is_ours:
        return
    directories = (CHECKPOINTS, FINAL_WEIGHTS, COMPANIONS, WANDB, TENSORBOARD, PROFILE)
    for name in (CONFIG, METRICS, PICTURE, *directories, "hang.txt"):
        if os.path.lexists(path / name):
            raise _not_ours(path, f"holds {name}, which would be overwritten, and no run.json")
    # Both may be there before run.json: a start can be killed, and a Slurm job logs before its ranks start.
    if (path / LOGS).is_dir() and not all(map(_is_log, (path / LOGS).iterdir())):
        raise _not_ours(path, f"holds {LOGS}/ with files that no run wrote, and no run.json")
    if os.path.lexists(path / HOLDER) and not is_holder_file(path / HOLDER):
        raise _not_ours(path, f"holds a {HOLDER} that no run wrote, and no run.json")


def check_command(run: RunConfig, path: Path) -> None:
    """Raise ConfigError if `launcher compare` would continue a training run, or training a comparison.

    Both write their config and their rows of metrics from step 1 on.
    """
    identity = read_identity(path)
    if identity is None or bool(identity.get(COMPARISON)) == isinstance(run, ComparedRunConfig):
        return
    there, here = ("comparison", "training") if identity.get(COMPARISON) else ("training run", "a comparison")
    why = f"holds a {there}, whose config and metrics {here} would replace"
    raise ConfigError("run.dir", path, why, _fresh_directory(path))


def _not_ours(path: Path, why: str) -> ConfigError:
    remedy = _fresh_directory(path)
    if checkpoints_in(path):
        remedy = f"{remedy}; {typed_text('checkpoint.init_from', str(path))} starts it from the weights there"
    return ConfigError("run.dir", path, why, remedy)


def _fresh_directory(path: Path) -> str:
    """Return the settings with which a run does not begin in `path`."""
    return f"{typed_text('run.dir', str(free_path(path)))}, or leave run.dir out for a fresh one"


def _is_log(path: Path) -> bool:
    return re.fullmatch(r"rank_\d+\.log|hang_rank_\d+\.(json|tmp)|ends|slurm-.*", path.name) is not None


def _losses(path: Path, run: RunConfig) -> list[str]:
    """Return a note for each file of an earlier start from which this start does not continue."""
    saved = (read_identity(path) or {}).get(SAVED_STEP)
    newest = next(map(step_of, checkpoints_in(path)), None)
    if not continues_run(run, path):
        return []
    if saved is not None and newest is not None and newest < saved:
        return [f"the checkpoint of step {saved} is missing: the newest one is of step {newest}"]
    if newest is None and (path / METRICS).exists():
        return [
            "an earlier start saved no checkpoint: the run begins again, and so do the rows of metrics.jsonl"
        ]
    return []


def _claim(
    run: RunConfig, layout: Layout, held_directory: HeldDirectory, run_id: str, path: Path
) -> tuple[RunDir, list[str]]:
    """Write identity and config; return the run directory, and notes to the user."""
    checkpoint, initial = _beginning(run, path)
    before = read_identity(path) or _origin(run, run_id)
    notes = []
    if original := _copied_from(path, before):
        before["id"] = run_id
        notes = [f"{path} is a copy of {original}: from here on it is a run of its own, also in W&B"]
    identity = {"format": FORMAT, "launcher": __version__, "layout": dataclasses.asdict(layout)}
    identity["directory"] = str(path.resolve())
    identity[END_OF_DOCUMENT] = end_of_documents(run)
    if isinstance(run, ComparedRunConfig):
        identity[COMPARISON] = True
    write_identity(path, before | identity)  # first: it says that the files below are a run's
    (path / LOGS).mkdir(exist_ok=True)
    if source := checkpoint or (initial and initial.path):
        is_huggingface = checkpoint is None and initial and initial.kind is WeightsKind.huggingface
        carry_companions(source, path, stored_dtype(initial) if initial and is_huggingface else None)
    write_text(path / CONFIG, as_yaml(_of_training(run)))
    return RunDir(held_directory.path, before["id"], checkpoint, initial, held_directory), notes


def _origin(run: RunConfig, run_id: str) -> dict[str, Any]:
    """Return the part of run.json that the first start of a run writes and later starts keep."""
    origin = {"id": run_id, BEGUN_FROM: resumed_path(run), BEGUN_BY_JOB: os.environ.get("SLURM_JOB_ID")}
    return {key: value for key, value in origin.items() if value is not None}


def _copied_from(path: Path, identity: dict[str, Any]) -> Path | None:
    """Return the directory that `path` was copied from if its run is still there; None for a moved run."""
    original = Path(str(identity.get("directory", path)))
    try:
        is_copy = not original.samefile(path) and (read_identity(original) or {}).get("id") == identity["id"]
    except (OSError, ValueError, ConfigError):  # it was moved or replaced, or the name is damaged
        return None
    return original if is_copy else None


def _beginning(run: RunConfig, path: Path) -> tuple[Path | None, WeightSource | None]:
    """Return the checkpoint to resume from or else the weights to begin with, if any. Raises ConfigError."""
    checkpoint = start_of(run, path)
    if checkpoint or run.checkpoint.init_from is None:
        return checkpoint, None
    weights = weights_at(Path(run.checkpoint.init_from), "checkpoint.init_from")
    check_model_is(run.model, weights, "checkpoint.init_from")
    return None, weights


def _of_training(run: RunConfig) -> RunConfig:
    """Return the run without the settings of `launcher compare`: every command reads config.yaml as a run."""
    return RunConfig(**{field.name: getattr(run, field.name) for field in dataclasses.fields(RunConfig)})


def config_as_dict(run: RunConfig) -> dict[str, Any]:
    """Return the composed config as plain values, without values of the environment."""
    config: dict[str, Any] = as_written(run)
    return config


def run_path(run: RunConfig, run_id: str = "", multirun_index: int | None = None) -> Path:
    """Return `run.dir`; if it is null, a directory named after srun's step or after the time and run id."""
    if run.run.dir is None:
        name = slurm_step_name(os.environ) or f"{time.strftime('%Y%m%d-%H%M%S')}-{run_id}"
        return Path("runs") / name
    path = Path(run.run.dir).expanduser()
    return path if multirun_index is None else path / str(multirun_index)
