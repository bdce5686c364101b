"""Where a run's final weights lie, and whether they are whole. No torch."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from launcher.config.errors import ConfigError

DIRECTORY = "weights"
_STEP = "step"


def stage_file(run_dir: Path, stage: int, stages: int) -> Path:
    """That of a pipeline stage, counted from 0."""
    return run_dir / DIRECTORY / f"model-{stage + 1:05d}-of-{stages:05d}.safetensors"


def metadata_of(step: int) -> dict[str, str]:
    """What each file says of itself."""
    return {_STEP: str(step)}


def weight_files(run_dir: Path) -> list[Path]:
    """The files of a run's final weights. Raises ConfigError where there are none, or not all."""
    files = _files(run_dir)
    if not files:
        raise ConfigError(
            "run.dir",
            run_dir,
            f"no {DIRECTORY}/*.safetensors in it: the run has not finished",
            "the directory of a run that trained to its last step",
        )
    if len(files) != _stages_of(files[0]):
        raise ConfigError(
            "run.dir",
            run_dir,
            f"{len(files)} of {_stages_of(files[0])} weight files are there",
            "a complete copy of the run's directory",
        )
    return files


def final_step(run_dir: Path) -> int | None:
    """The step that the final weights are of; None where they are not there, or not all of one step."""
    files = _files(run_dir)
    steps = {_step_of(path) for path in files}
    return steps.pop() if files and len(files) == _stages_of(files[0]) and len(steps) == 1 else None


def clear(run_dir: Path) -> None:
    """Remove those of an earlier end of the run, and what a killed one left half written."""
    for path in (run_dir / DIRECTORY).glob("model-*-of-*"):
        path.unlink()


def _files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / DIRECTORY).glob("model-*-of-*.safetensors"))


def _stages_of(path: Path) -> int:
    return int(path.stem.rsplit("-", 1)[1])


def _step_of(path: Path) -> int | None:
    try:
        with safe_open(path, framework="np") as file:
            return int(file.metadata()[_STEP])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None
