"""A checkpoint on disk: one directory per step, complete or absent. Reads JSON only, imports no torch.

checkpoints/step-00000100/manifest.json    what is in it: see Manifest
                         /RANK-PART.safetensors
checkpoints/latest                         the newest one's name, for people and scripts
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from launcher.config.errors import ConfigError, settings

DIRECTORY, MANIFEST, LATEST = "checkpoints", "manifest.json", "latest"
FORMAT = 1


class BrokenCheckpoint(Exception):
    """A checkpoint that cannot be used: its directory, the file to blame, and what is wrong with it."""

    def __init__(self, path: Path, file: str, why: str) -> None:
        self.path, self.file, self.why = path, file, why
        super().__init__(f"{file} {why}")


@dataclass(frozen=True)
class File:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Piece:
    """One box of a logical tensor, whole under its own name in one file."""

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """One logical tensor: fp32, its global shape, and the pieces that cover it."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Manifest:
    """`tensors` is by kind (weight, or torch's name of an optimizer state) and logical name.

    `samples` are those consumed; `updates` the optimizer steps made; `scaler` the numbers of a dynamic loss
    scale. What is read back depends on nothing of the layout that wrote it.
    """

    step: int
    samples: int
    updates: int
    scaler: dict[str, float]
    corpus: dict[str, str]  # by source, the digest of what is trained on
    launcher: str  # version
    layout: str  # that wrote it, in words, for people
    config: dict[str, Any]  # as composed
    validation_loss: float | None
    tensors: dict[str, dict[str, Stored]]
    files: dict[str, File]
    blends: list[dict[str, Any]] = field(
        default_factory=list
    )  # each from sample `start` on, with its `weights`

    def to_json(self) -> str:
        """With the SHA-256 of the rest, so that a change of any figure is seen."""
        content = json.dumps(asdict(self), sort_keys=True)
        return f'{{"format": {FORMAT}, "sha256": "{_digest(content)}", "checkpoint": {content}}}\n'


def entry_name(kind: str, name: str, offsets: tuple[int, ...]) -> str:
    """The name of a piece in its safetensors file."""
    return f"{kind}/{name}/{'_'.join(map(str, offsets))}"


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def read_manifest(path: Path) -> Manifest:
    """That of the checkpoint directory `path`, all of whose files are there in full length.

    Raises BrokenCheckpoint. Their checksums are not computed: see damaged.
    """
    try:
        outer = json.loads((path / MANIFEST).read_text())
        if outer["format"] != FORMAT:
            raise BrokenCheckpoint(path, MANIFEST, f"is of a format other than {FORMAT}")
        found = outer["checkpoint"]
        if outer["sha256"] != _digest(json.dumps(found, sort_keys=True)):
            raise BrokenCheckpoint(path, MANIFEST, "was altered: its checksum is another")
        tensors = {
            kind: {
                name: Stored(tuple(one["shape"]), tuple(_piece(piece) for piece in one["pieces"]))
                for name, one in by_name.items()
            }
            for kind, by_name in found.pop("tensors").items()
        }
        files = {name: File(**file) for name, file in found.pop("files").items()}
        manifest = Manifest(**found, tensors=tensors, files=files)
    except OSError as error:
        raise BrokenCheckpoint(path, MANIFEST, f"cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BrokenCheckpoint(path, MANIFEST, "is not one that the launcher wrote") from None
    for name, file in manifest.files.items():
        try:
            size = (path / name).stat().st_size
        except OSError:
            raise BrokenCheckpoint(path, name, "is missing") from None
        if size != file.bytes:
            raise BrokenCheckpoint(path, name, f"is {size} bytes long and should be {file.bytes}")
    return manifest


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _piece(piece: dict[str, Any]) -> Piece:
    return Piece(piece["file"], tuple(piece["offsets"]), tuple(piece["sizes"]))


def damaged(path: Path, manifest: Manifest, names: list[str]) -> str | None:
    """The first of these files whose checksum is not the manifest's; reads them whole."""
    return next((name for name in names if sha256_of(path / name) != manifest.files[name].sha256), None)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoints_in(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, newest first, intact or not."""
    found = [
        path
        for path in (run_dir / DIRECTORY).glob("step-*")
        if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def is_readable(path: Path) -> bool:
    """Whether all files of a checkpoint are there in full length; their checksums are not computed."""
    try:
        read_manifest(path)
    except BrokenCheckpoint:
        return False
    return True


def readable_older(path: Path) -> Path | None:
    """The newest checkpoint beside and before `path` whose files are all there in full length."""
    siblings = checkpoints_in(path.parent.parent)
    before = siblings[siblings.index(path) + 1 :] if path in siblings else []
    return next(filter(is_readable, before), None)


def refusal_of(broken: BrokenCheckpoint) -> ConfigError:
    """What the user is told about a checkpoint that cannot be used."""
    older = readable_older(broken.path)
    remedies = ["checkpoint.fallback=true", *settings("checkpoint.resume", [older])] if older else []
    remedies.append("checkpoint.resume=none (from the first step, in a fresh run.dir)")
    return ConfigError("checkpoint.resume", broken.path, str(broken), " or ".join(remedies))
