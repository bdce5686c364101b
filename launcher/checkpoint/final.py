"""Paths of a run's final weights, and the check that all of them are there. Imports no torch."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from launcher.config.errors import ConfigError

FINAL_WEIGHTS = "weights"
STEP = "step"  # key in the safetensors metadata of a weights file: the step of its weights


def stage_file(run_dir: Path, stage: int, stages: int) -> Path:
    """Return the path of the weights file of one pipeline stage, counted from 0."""
    return run_dir / FINAL_WEIGHTS / f"model-{stage + 1:05d}-of-{stages:05d}.safetensors"


def weight_files(run_dir: Path) -> list[Path]:
    """Return the files of a run's final weights. Raise ConfigError if any of them is missing."""
    files = _files(run_dir)
    if not files:
        why = f"{FINAL_WEIGHTS}/ is missing or empty: the run has not finished, or the files were removed"
        remedy = "the directory of a run that has trained to its last step"
        raise ConfigError("run.dir", run_dir, why, remedy)
    if len(files) != _stages_of(files[0]):
        why = f"only {len(files)} of {_stages_of(files[0])} weight files exist"
        raise ConfigError("run.dir", run_dir, why, "a complete copy of the run's directory")
    return files


def final_step(run_dir: Path) -> int | None:
    """Return the step of the final weights; None if a file is missing or the files are of several steps."""
    files, steps = _files(run_dir), set()
    for path in files:
        try:
            with safe_open(path, framework="np") as file:
                steps.add(int(file.metadata()[STEP]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None
    return steps.pop() if files and len(files) == _stages_of(files[0]) and len(steps) == 1 else None


def remove_final_weights(run_dir: Path) -> None:
    """Delete the final weights of an earlier end of the run, and partial files that a kill left behind."""
    for path in (run_dir / FINAL_WEIGHTS).glob("model-*-of-*"):
        path.unlink()


def _files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / FINAL_WEIGHTS).glob("model-*-of-*.safetensors"))


def _stages_of(path: Path) -> int:
    return int(path.stem.rsplit("-", 1)[1])
