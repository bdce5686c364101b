"""The check before each save that the run's directory is still the one that the run holds."""

from collections.abc import Callable
from pathlib import Path

from launcher.config.errors import ConfigError


def check_directory(run_dir: Path, loss_of_directory: Callable[[], str | None]) -> None:
    """Raise ConfigError if `run_dir` is no longer the directory that the run began in."""
    if why := loss_of_directory():
        remedy = "the same command with the run.dir that has the checkpoints of this run, which resumes it"
        raise ConfigError("run.dir", run_dir, f"{why}; this run has stopped without a further save", remedy)
