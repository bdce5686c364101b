"""The run directory: one directory is one run, with one id for W&B and everything the run writes."""

import dataclasses
import json
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from launcher import __version__
from launcher.checkpoint.choose import checkpoint_of
from launcher.checkpoint.companions import carry_companions
from launcher.checkpoint.sources import Weights, check_model_is, weights_at
from launcher.config.errors import ConfigError
from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.launch.environment import step_name

CONFIG, IDENTITY, LOGS, METRICS = "config.yaml", "run.json", "logs", "metrics.jsonl"
WEIGHTS = "weights"


@dataclass(frozen=True)
class RunDir:
    path: Path
    run_id: str
    checkpoint: Path | None = None  # to go on from
    initial: Weights | None = None  # to begin with, where there is none

    @property
    def logs(self) -> Path:
        return self.path / LOGS

    @property
    def metrics(self) -> Path:
        return self.path / METRICS


def claim_run_dir(run: RunConfig, layout: Layout, *, multirun_index: int | None = None) -> RunDir:
    """Make the run's directory and write its config and identity. One process per run calls this.

    A directory that holds a run which has not finished is taken up again, under the same id.
    Raises ConfigError where it cannot be made, holds a run that cannot go on, or for checkpoint.resume.
    """
    run_id = secrets.token_hex(4)
    path = run_path(run, run_id, multirun_index)
    checkpoint = checkpoint_of(run, path)
    initial = _initial(run) if checkpoint is None else None
    if (path / CONFIG).exists():
        if run.checkpoint.resume != "auto" or (checkpoint is None and (path / WEIGHTS).exists()):
            raise ConfigError(
                "run.dir",
                path,
                "already holds a run",
                f"run.dir={_unused(path)}, or leave run.dir out for a fresh one",
            )
        run_id = _id_of(path) or run_id
    try:
        (path / LOGS).mkdir(parents=True, exist_ok=True)
        if source := checkpoint or (initial and initial.path):
            carry_companions(source, path)
        (path / CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.structured(run)))
        (path / IDENTITY).write_text(json.dumps(_identity(run_id, layout), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(
            "run.dir", path, f"cannot be written: {error.strerror}", "a directory you may write to"
        ) from None
    return RunDir(path.resolve(), run_id, checkpoint, initial)


def _initial(run: RunConfig) -> Weights | None:
    if run.checkpoint.init_from is None:
        return None
    weights = weights_at(Path(run.checkpoint.init_from), "checkpoint.init_from")
    check_model_is(run.model, weights, "checkpoint.init_from")
    return weights


def stop_grace(run: RunConfig) -> float:
    """The seconds that a run which is told to stop may take to save itself; 0: it does not."""
    return (run.checkpoint.stop_grace_seconds or 0.0) if run.checkpoint.enabled else 0.0


def config_as_dict(run: RunConfig) -> dict[str, Any]:
    """The composed config as plain values, enums by name."""
    container = OmegaConf.to_container(OmegaConf.structured(run), enum_to_str=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def run_path(run: RunConfig, run_id: str = "", multirun_index: int | None = None) -> Path:
    """`run.dir`; where it is null, one named after the step that srun started, else a fresh one."""
    if run.run.dir is None:
        name = step_name(os.environ) or f"{time.strftime('%Y%m%d-%H%M%S')}-{run_id}"
        return Path("runs") / name
    path = Path(run.run.dir).expanduser()
    return path if multirun_index is None else path / str(multirun_index)


def _unused(path: Path) -> Path:
    return next(
        candidate for n in range(2, 10**6) if not (candidate := path.with_name(f"{path.name}-{n}")).exists()
    )


def _id_of(path: Path) -> str | None:
    try:
        return str(json.loads((path / IDENTITY).read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _identity(run_id: str, layout: Layout) -> dict[str, Any]:
    return {"id": run_id, "launcher": __version__, "layout": dataclasses.asdict(layout)}
