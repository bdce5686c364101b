"""The final weights of a run: their files, and the manifest that makes them whole. Imports no torch.

weights/manifest.json                      step, length and SHA-256 of each file, shape of each tensor
       /model-STAGE-of-STAGES.safetensors  the weights of a pipeline stage by logical name, in fp32

The manifest is written last: weights without a manifest are those of a run that has not finished.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.checkpoint.manifest import (
    MANIFEST,
    StoredFile,
    StoredFiles,
    UnusableCheckpoint,
    check_lengths,
    sizes_of,
    stored_files,
)
from launcher.checkpoint.sealed import Malformed, fields, free, integer, sealed, shown, table, text, unsealed
from launcher.config.errors import ConfigError

FINAL_WEIGHTS = "weights"


@dataclass(frozen=True)
class FinalWeights:
    """The contents of weights/ after `step`; `shapes` is by file and by logical name."""

    step: int
    launcher: str  # version
    config: dict[str, Any]  # as composed
    files: dict[str, StoredFile]
    shapes: dict[str, dict[str, tuple[int, ...]]]

    def to_json(self) -> str:
        """Return the text of the manifest's file."""
        return sealed(FINAL_WEIGHTS, asdict(self))

    def stored(self, run_dir: Path) -> StoredFiles:
        """Return the files of these weights in a run's directory."""
        return StoredFiles(run_dir / FINAL_WEIGHTS, self.files, self.shapes)


def stage_file(run_dir: Path, stage: int, stages: int) -> Path:
    """Return the path of the weights file of one pipeline stage, counted from 0."""
    return run_dir / FINAL_WEIGHTS / f"model-{stage + 1:05d}-of-{stages:05d}.safetensors"


def read_final_weights(run_dir: Path) -> FinalWeights:
    """Return the manifest of a run's final weights; all files exist with their lengths.

    Computes no checksum: see integrity.check_files. Raises UnusableCheckpoint.
    """
    folder = run_dir / FINAL_WEIGHTS
    try:
        weights = _parse(unsealed(folder / MANIFEST, FINAL_WEIGHTS))
    except Malformed as malformed:
        raise UnusableCheckpoint(folder, f"{FINAL_WEIGHTS}/{MANIFEST}", str(malformed)) from None
    check_lengths(folder, weights.files)
    return weights


def final_weights_of(run_dir: Path) -> FinalWeights:
    """Return the manifest of a run's final weights. Raise ConfigError if they are not complete."""
    folder = run_dir / FINAL_WEIGHTS
    if not folder.is_dir():
        why = f"has no {FINAL_WEIGHTS}/: the run has not finished, or the directory was removed"
        remedy = "the directory of a run that has trained to its last step"
        raise ConfigError("run.dir", run_dir, why, remedy)
    try:
        return read_final_weights(run_dir)
    except UnusableCheckpoint as unusable:
        raise final_weights_error(run_dir, unusable) from None


def final_weights_error(run_dir: Path, unusable: object) -> ConfigError:
    """Return the user error about final weights that are damaged or were not written by a run."""
    remedy = f"remove {run_dir / FINAL_WEIGHTS} and repeat the run's command, which writes them again"
    return ConfigError("run.dir", run_dir, str(unusable), remedy)


def other_model_error(run_dir: Path, why: str) -> ConfigError:
    """Return the user error about final weights that do not fit the model in config.yaml."""
    return ConfigError("run.dir", run_dir, why, "the directory of a run whose files have not been changed")


def final_step(run_dir: Path) -> int | None:
    """Return the step of the final weights; None if they are not complete."""
    try:
        return read_final_weights(run_dir).step
    except UnusableCheckpoint:
        return None


def remove_final_weights(run_dir: Path) -> None:
    """Delete the final weights of an earlier end of the run, and partial files that a kill left behind."""
    folder = run_dir / FINAL_WEIGHTS
    (folder / MANIFEST).unlink(missing_ok=True)  # first: the other files do not count without it
    for path in folder.glob("model-*-of-*"):
        path.unlink()


def _parse(content: dict[str, Any]) -> FinalWeights:
    values = fields(content, FINAL_WEIGHTS, {"step", "launcher", "config", "files", "shapes"})
    files, by_file = stored_files(values["files"]), table(values["shapes"], "shapes")
    shapes = {
        file: {name: sizes_of(shape, f"the shape of {name}") for name, shape in table(by_name, file).items()}
        for file, by_name in by_file.items()
    }
    names = [name for by_name in shapes.values() for name in by_name]
    if shapes.keys() != files.keys() or len(names) != len(set(names)) or not names:
        odd = next(iter(shapes.keys() ^ files.keys()), None) or next(iter(files), None)
        raise Malformed(f"lists the tensors of {shown(odd)} wrongly: each tensor belongs to one listed file")
    step = integer(values["step"], "step")
    config = free(values["config"], "config")
    return FinalWeights(step, text(values["launcher"], "launcher"), config, files, shapes)
