"""The run directory: one directory is one run, with one id for W&B and everything the run writes."""

import dataclasses
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from launcher import __version__
from launcher.checkpoint.companions import carry_companions
from launcher.checkpoint.final import final_step
from launcher.checkpoint.resume_choice import checkpoint_to_resume
from launcher.checkpoint.sources import WeightSource, check_model_is, weights_at
from launcher.config.errors import ConfigError
from launcher.config.layout import Layout
from launcher.config.run_format import FORMAT, IDENTITY, check_format
from launcher.config.schema import RunConfig
from launcher.launch.environment import slurm_step_name
from launcher.runtime.hold import held

CONFIG, LOGS, METRICS = "config.yaml", "logs", "metrics.jsonl"


@dataclass(frozen=True)
class RunDir:
    """A run directory that this process or rank 0 holds, and the weights that the run starts from."""

    path: Path
    run_id: str
    checkpoint: Path | None = None  # to resume from
    initial: WeightSource | None = None  # to begin with if there is no checkpoint

    @property
    def logs(self) -> Path:
        return self.path / LOGS

    @property
    def metrics(self) -> Path:
        return self.path / METRICS


@contextmanager
def claimed_run_dir(
    run: RunConfig, layout: Layout, *, multirun_index: int | None = None
) -> Iterator[tuple[RunDir, list[str]]]:
    """Make the run directory, hold it for the block, and write the run's config and identity there.

    Yields the directory and notes to the user. One process per run calls this. An unfinished run in the
    directory is resumed under its id. Raises ConfigError if the directory cannot be made, if another process
    holds it, if its run cannot be resumed, or if checkpoint.resume forbids it.
    """
    run_id = secrets.token_hex(4)
    path = run_path(run, run_id, multirun_index)
    if not path.exists():
        _beginning(run, path)  # raises before the directory is made
    with ExitStack() as stack:
        try:
            notes = stack.enter_context(held(path))
            directory = _claim(run, layout, path, run_id)
        except OSError as error:
            why = f"cannot be written: {error.strerror}"
            raise ConfigError("run.dir", path, why, "a directory you may write to") from None
        yield directory, notes


def start_of(run: RunConfig, path: Path) -> Path | None:
    """Return the checkpoint that a run in `path` resumes from, if there is one. Raises ConfigError."""
    check_format(path)
    checkpoint = checkpoint_to_resume(run, path)
    is_over = checkpoint is None and final_step(path) is not None
    if (path / CONFIG).exists() and (run.checkpoint.resume != "auto" or is_over):
        remedy = f"run.dir={_unused(path)}, or leave run.dir out for a fresh one"
        raise ConfigError("run.dir", path, "already holds a run", remedy)
    return checkpoint


def _claim(run: RunConfig, layout: Layout, path: Path, run_id: str) -> RunDir:
    checkpoint, initial = _beginning(run, path)
    run_id = _id_of(path) or run_id
    (path / LOGS).mkdir(exist_ok=True)
    if source := checkpoint or (initial and initial.path):
        carry_companions(source, path)
    (path / CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.structured(run)))
    identity = {"format": FORMAT, "id": run_id, "launcher": __version__, "layout": dataclasses.asdict(layout)}
    (path / IDENTITY).write_text(json.dumps(identity, indent=2) + "\n")
    return RunDir(path.resolve(), run_id, checkpoint, initial)


def _beginning(run: RunConfig, path: Path) -> tuple[Path | None, WeightSource | None]:
    """Return the checkpoint to resume from or else the weights to begin with, if any. Raises ConfigError."""
    checkpoint = start_of(run, path)
    if checkpoint or run.checkpoint.init_from is None:
        return checkpoint, None
    weights = weights_at(Path(run.checkpoint.init_from), "checkpoint.init_from")
    check_model_is(run.model, weights, "checkpoint.init_from")
    return None, weights


def config_as_dict(run: RunConfig) -> dict[str, Any]:
    """Return the composed config as plain values, enums by name."""
    container = OmegaConf.to_container(OmegaConf.structured(run), enum_to_str=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def run_path(run: RunConfig, run_id: str = "", multirun_index: int | None = None) -> Path:
    """Return `run.dir`; if it is null, a directory named after srun's step or after the time and run id."""
    if run.run.dir is None:
        name = slurm_step_name(os.environ) or f"{time.strftime('%Y%m%d-%H%M%S')}-{run_id}"
        return Path("runs") / name
    path = Path(run.run.dir).expanduser()
    return path if multirun_index is None else path / str(multirun_index)


def _unused(path: Path) -> Path:
    candidates = (path.with_name(f"{path.name}-{n}") for n in range(2, 10**6))
    return next(candidate for candidate in candidates if not candidate.exists())


def _id_of(path: Path) -> str | None:
    try:
        return str(json.loads((path / IDENTITY).read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
