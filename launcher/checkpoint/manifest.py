"""The manifest of a checkpoint, and its verification. Reads JSON only, imports no torch.

checkpoints/step-00000100/manifest.json    contents of the checkpoint: see Manifest
                         /RANK-NUMBER.safetensors
checkpoints/latest                         name of the newest checkpoint, for people and scripts

A checkpoint is verified in two stages:
- complete: the manifest is valid, and every file exists with its recorded length (read_manifest,
  is_complete). This check is cheap and runs before any rank is launched.
- intact: every file also has its recorded SHA-256 (first_damaged_file); a file that has not is damaged. This
  check reads every byte and runs before training resumes.
A checkpoint that fails either stage raises UnusableCheckpoint.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher.config.errors import ConfigError, settings
from launcher.config.run_format import FORMAT, IDENTITY, wrong_format

CHECKPOINTS, MANIFEST, LATEST = "checkpoints", "manifest.json", "latest"
NOT_READABLE = "cannot be read: it is damaged or was written by another program"
DAMAGED = "is damaged: its SHA-256 differs from the one in the manifest"


class UnusableCheckpoint(Exception):
    """Raised for a checkpoint that cannot be restored; names the file at fault and what is wrong with it."""

    def __init__(self, path: Path, file: str, why: str) -> None:
        self.path, self.file, self.why = path, file, why
        super().__init__(f"{file} {why}")


@dataclass(frozen=True)
class StoredFile:
    """Length and checksum of one safetensors file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Piece:
    """One box of a logical tensor, stored in one file under its own name."""

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """One logical tensor in fp32: its global shape, and the pieces that cover it."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Manifest:
    """The contents of one checkpoint. Nothing that is restored depends on the layout that wrote it.

    `tensors` maps a kind ("weight", or torch's name of an optimizer state) and a logical name to a tensor.
    """

    step: int
    samples: int  # consumed so far
    updates: int  # optimizer updates made; fewer than `step` where a step was skipped
    scaler: dict[str, float]  # state of the dynamic loss scale; empty outside fp16
    corpus: dict[str, str]  # digest of the training data, by source
    launcher: str  # version
    layout: str  # description of the layout that wrote the checkpoint, for people
    config: dict[str, Any]  # as composed
    validation_loss: float | None
    tensors: dict[str, dict[str, StoredTensor]]
    files: dict[str, StoredFile]
    # Each blend applies from its sample `start` on, and has its sampling `weights`.
    blends: list[dict[str, Any]] = field(default_factory=list)
    finite: bool = True  # false: a weight or an optimizer state is NaN or infinite
    skipped: int = 0  # steps so far that changed no weight
    # Samples left out after a rollback: pairs of the first, and the one after the last.
    excluded: list[list[int]] = field(default_factory=list)
    history: dict[str, list[float]] = field(
        default_factory=dict
    )  # losses and norms that a spike is judged by

    def to_json(self) -> str:
        """Return the manifest with its own SHA-256, so that any changed digit is detected."""
        content = json.dumps(asdict(self), sort_keys=True)
        return f'{{"format": {FORMAT}, "sha256": "{_sha256_of_text(content)}", "checkpoint": {content}}}\n'


def entry_name(kind: str, name: str, offsets: tuple[int, ...]) -> str:
    """Return the name of a piece within its safetensors file."""
    return f"{kind}/{name}/{'_'.join(map(str, offsets))}"


def step_name(step: int) -> str:
    """Return the directory name of the checkpoint of `step`."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step of a checkpoint from the name of its directory."""
    return int(path.name.removeprefix("step-"))


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of the checkpoint directory `path` after checking that the checkpoint is complete.

    Computes no checksum of a tensor file: see first_damaged_file. Raises UnusableCheckpoint.
    """
    try:
        manifest = _parse(path, json.loads((path / MANIFEST).read_text()))
    except OSError as error:
        raise UnusableCheckpoint(path, MANIFEST, f"cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UnusableCheckpoint(path, MANIFEST, NOT_READABLE) from None
    for name, file in manifest.files.items():
        try:
            size = (path / name).stat().st_size
        except OSError:
            raise UnusableCheckpoint(path, name, "is missing") from None
        if size != file.bytes:
            raise UnusableCheckpoint(path, name, f"is {size} bytes long instead of {file.bytes}")
    return manifest


def _parse(path: Path, outer: dict[str, Any]) -> Manifest:
    if outer["format"] != FORMAT:
        raise UnusableCheckpoint(path, MANIFEST, wrong_format(outer["format"]))
    content = outer["checkpoint"]
    if outer["sha256"] != _sha256_of_text(json.dumps(content, sort_keys=True)):
        raise UnusableCheckpoint(path, MANIFEST, "was altered: it does not match its own SHA-256")
    tensors = {
        kind: {
            name: StoredTensor(tuple(tensor["shape"]), tuple(map(piece_of, tensor["pieces"])))
            for name, tensor in by_name.items()
        }
        for kind, by_name in content.pop("tensors").items()
    }
    files = {name: StoredFile(**file) for name, file in content.pop("files").items()}
    return Manifest(**content, tensors=tensors, files=files)


def _sha256_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def piece_of(entry: dict[str, Any]) -> Piece:
    """Return the piece that a JSON object describes."""
    return Piece(entry["file"], tuple(entry["offsets"]), tuple(entry["sizes"]))


def first_damaged_file(path: Path, manifest: Manifest, names: list[str]) -> str | None:
    """Return the first file of `names` whose SHA-256 differs from the manifest's; reads the files whole."""
    return next((name for name in names if sha256_of(path / name) != manifest.files[name].sha256), None)


def read_intact_manifest(path: Path) -> Manifest:
    """Return the manifest after comparing the SHA-256 of every file. Raises UnusableCheckpoint."""
    manifest = read_manifest(path)
    if name := first_damaged_file(path, manifest, sorted(manifest.files)):
        raise UnusableCheckpoint(path, name, DAMAGED)
    return manifest


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints_in(run_dir: Path) -> list[Path]:
    """Return a run's committed checkpoint directories, newest first, without verifying them."""
    paths = (run_dir / CHECKPOINTS).glob("step-*")
    directories = [path for path in paths if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()]
    return sorted(directories, key=step_of, reverse=True)


def checkpoints_at(path: Path) -> list[Path]:
    """Return the checkpoint `path`, or the checkpoints of the run `path`. Raises ConfigError for none."""
    checkpoints = [path] if (path / MANIFEST).exists() else checkpoints_in(path)
    if not checkpoints:
        why = "this run has no checkpoint yet" if (path / IDENTITY).exists() else "contains no checkpoint"
        raise ConfigError(str(path), None, why, "a checkpoint, or a run that has saved a checkpoint")
    return checkpoints


def is_complete(path: Path) -> bool:
    """Return whether the manifest is valid and all files have full length; computes no checksum of a file."""
    try:
        read_manifest(path)
    except UnusableCheckpoint:
        return False
    return True


def newest_complete_before(path: Path) -> Path | None:
    """Return the newest complete checkpoint of the same run that is older than `path`."""
    siblings = checkpoints_in(path.parent.parent)
    older = siblings[siblings.index(path) + 1 :] if path in siblings else []
    return next(filter(is_complete, older), None)


def unusable_checkpoint_error(unusable: UnusableCheckpoint) -> ConfigError:
    """Return the user error about a checkpoint that cannot be restored; suggests an older checkpoint."""
    older = newest_complete_before(unusable.path)
    remedies = ["checkpoint.fallback=true", *settings("checkpoint.resume", [older])] if older else []
    remedies.append("checkpoint.resume=none (from the first step, in a fresh run.dir)")
    return ConfigError("checkpoint.resume", unusable.path, str(unusable), " or ".join(remedies))
