"""Add results to the summary of a run's W&B run, after the run or between two of its starts."""

from pathlib import Path

from launcher.config.compose import load_typed
from launcher.config.run_format import IDENTITY, read_identity
from launcher.config.schema import RunConfig, WandbMode
from launcher.launch.scratch import temporary_files_in
from launcher.runtime.hold import is_held
from launcher.runtime.run_dir import CONFIG

_FINISH_TIMEOUT = 60.0  # seconds for the server to take the values


def add_to_summary(run_dir: Path, values: dict[str, float], temporary: Path) -> list[str]:
    """Add `values` by name to the W&B summary of the run in `run_dir`; return notes to the user.

    Does nothing for weights without a run, or a run that does not log to W&B.
    """
    if not (run_dir / IDENTITY).is_file() or not (run_dir / CONFIG).is_file():
        return []
    if load_typed(run_dir / CONFIG, RunConfig).logging.wandb.mode is WandbMode.disabled:
        return []
    if is_held(run_dir):
        return ["note     the run is training: its W&B run does not get these results"]
    try:
        read_identity(run_dir)
        with temporary_files_in(temporary):  # W&B makes directories when it is imported
            from launcher.runtime.metrics.upload import summarise

            return [f"W&B      {summarise(run_dir, values, temporary, _FINISH_TIMEOUT)}"]
    except Exception as error:  # W&B raises any
        return [f"note     W&B did not accept the results: {error}"]
