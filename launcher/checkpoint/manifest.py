"""The manifest of a checkpoint, and its verification. Reads JSON only, imports no torch.

checkpoints/step-00000100/manifest.json    contents of the checkpoint: see Manifest
                         /RANK-NUMBER.safetensors
checkpoints/latest                         name of the newest checkpoint, for people and scripts

A checkpoint is verified in two stages:
- complete: every value of the manifest is checked (sealed.py), and every file exists with its recorded length
  (read_manifest). This check is cheap and runs before any rank is launched.
- intact: every file also has its recorded SHA-256 and holds the recorded tensors (integrity.py). This check
  reads every byte and runs before training resumes.
A checkpoint that fails either stage raises UnusableCheckpoint.
"""

import os
import re
from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from launcher.checkpoint.sealed import (
    LARGEST,
    Malformed,
    boolean,
    fields,
    finite,
    free,
    integer,
    items,
    number,
    sealed,
    shown,
    table,
    text,
    unsealed,
)
from launcher.config.errors import ConfigError, typed_text
from launcher.config.run_format import IDENTITY
from launcher.files import open_regular, what_is_wrong
from launcher.parallel.boxes import Box, is_tiling

CHECKPOINTS, MANIFEST, LATEST = "checkpoints", "manifest.json", "latest"
CHECKPOINT = "checkpoint"  # the kind of manifest
IMPORTED = "import"  # the layout in the manifest that `launcher import` writes
_FILE_NAME = re.compile(r"[0-9A-Za-z][0-9A-Za-z_-]{0,200}\.safetensors")
_MOST_DIMENSIONS = 8
_PIECE_KEYS = {"file", "offsets", "sizes"}


class UnusableCheckpoint(Exception):
    """Raised for a checkpoint that cannot be restored; names the file at fault and what is wrong with it."""

    def __init__(self, path: Path, file: str, why: str) -> None:
        self.path, self.file, self.why = path, file, why
        super().__init__(f"{file} {why}")

    def __reduce__(self) -> tuple[type["UnusableCheckpoint"], tuple[Path, str, str]]:
        # By default, only an exception's message is pickled; this exception is sent between ranks.
        return type(self), (self.path, self.file, self.why)


@dataclass(frozen=True)
class StoredFile:
    """Length and checksum of one safetensors file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredFiles:
    """Safetensors files of a directory as its manifest lists them; `shapes` is by file and by tensor name."""

    path: Path
    files: dict[str, StoredFile]
    shapes: dict[str, dict[str, tuple[int, ...]]]


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
    history: dict[str, list[float]] = field(default_factory=dict)  # last losses and norms, to detect spikes

    def to_json(self) -> str:
        """Return the text of the manifest's file."""
        return sealed(CHECKPOINT, asdict(self))

    def stored(self, path: Path) -> StoredFiles:
        """Return the files of the checkpoint in the directory `path`, with the pieces that each holds."""
        entries: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in self.files}
        for kind, tensors in self.tensors.items():
            for name, tensor in tensors.items():
                for piece in tensor.pieces:
                    entries[piece.file][entry_name(kind, name, piece.offsets)] = piece.sizes
        return StoredFiles(path, self.files, entries)


def entry_name(kind: str, name: str, offsets: tuple[int, ...]) -> str:
    """Return the name of a piece within its safetensors file."""
    return f"{kind}/{name}/{'_'.join(map(str, offsets))}"


def step_name(step: int) -> str:
    """Return the directory name of the checkpoint of `step`."""
    return f"step-{step:08d}"


def is_step_name(name: str) -> bool:
    """Return whether `step_name` gives this name for a step."""
    return re.fullmatch(r"step-([0-9]{8}|[1-9][0-9]{8,18})", name) is not None


def step_of(path: Path) -> int:
    """Return the step of a checkpoint from the name of its directory."""
    return int(path.name.removeprefix("step-"))


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of the checkpoint directory `path` after checking that the checkpoint is complete.

    Computes no checksum of a tensor file: see integrity.check_files. Raises UnusableCheckpoint.
    """
    try:
        manifest = _parse(unsealed(path / MANIFEST, CHECKPOINT))
        if is_step_name(path.name) and manifest.step != step_of(path):
            raise Malformed(f"is of step {manifest.step}, and its directory is {path.name}")
    except Malformed as malformed:
        raise UnusableCheckpoint(path, MANIFEST, str(malformed)) from None
    check_lengths(path, manifest.files)
    return manifest


def check_lengths(path: Path, files: dict[str, StoredFile]) -> None:
    """Check that each file exists in the directory `path` with its length. Raises UnusableCheckpoint."""
    for name, file in files.items():
        try:
            with open_regular(path / name) as opened:
                size = os.fstat(opened.fileno()).st_size
        except OSError as error:
            raise UnusableCheckpoint(path, name, what_is_wrong(error)) from None
        if size != file.bytes:
            raise UnusableCheckpoint(path, name, f"is {size} bytes long instead of {file.bytes}")


def _parse(content: dict[str, Any]) -> Manifest:
    """Return the manifest in the content of a file; every value is checked. Raises Malformed."""
    optional = frozenset({"blends", "finite", "skipped", "excluded", "history"})
    values = fields(
        content, CHECKPOINT, {field.name for field in dataclass_fields(Manifest)} - optional, optional
    )
    files = stored_files(values["files"])
    scaler = table(values["scaler"], "scaler")
    loss = values["validation_loss"]
    return Manifest(
        step=integer(values["step"], "step"),
        samples=integer(values["samples"], "samples"),
        updates=integer(values["updates"], "updates"),
        scaler={name: finite(value, f"scaler.{name}") for name, value in scaler.items()},
        corpus={name: text(value, "a digest") for name, value in table(values["corpus"], "corpus").items()},
        launcher=text(values["launcher"], "launcher"),
        layout=text(values["layout"], "layout"),
        config=free(values["config"], "config"),
        validation_loss=None if loss is None else number(loss, "validation_loss"),
        tensors={
            kind: {name: _stored_tensor(tensor, name, files) for name, tensor in table(by_name, kind).items()}
            for kind, by_name in table(values["tensors"], "tensors").items()
        },
        files=files,
        blends=[_blend(blend) for blend in items(values.get("blends", []), "blends")],
        finite=boolean(values.get("finite", True), "finite"),
        skipped=integer(values.get("skipped", 0), "skipped"),
        excluded=[_sample_range(each) for each in items(values.get("excluded", []), "excluded")],
        history={
            name: [finite(value, f"history.{name}") for value in items(series, f"history.{name}")]
            for name, series in table(values.get("history", {}), "history").items()
        },
    )


def stored_files(value: object) -> dict[str, StoredFile]:
    """Return lengths and checksums by file name; a name is plain, without a directory. Raises Malformed."""
    files = {}
    for name, entry in table(value, "files").items():
        if not _FILE_NAME.fullmatch(name):
            raise Malformed(f"names the file {shown(name)}, which is not a plain *.safetensors name")
        values = fields(entry, name, {"bytes", "sha256"})
        digest = text(values["sha256"], f"{name}.sha256")
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise Malformed(f"has {shown(digest)} as {name}.sha256")
        files[name] = StoredFile(integer(values["bytes"], f"{name}.bytes"), digest)
    return files


def sizes_of(value: object, where: str, least: int = 1) -> tuple[int, ...]:
    """Return the sizes, or the offsets if `least` is 0, of the dimensions of a tensor. Raises Malformed."""
    for size in items(value, where, _MOST_DIMENSIONS):
        if type(size) is not int or not least <= size <= LARGEST:  # inline: a manifest has millions of sizes
            integer(size, where, least)
    return tuple(value)  # type: ignore[arg-type]


def _stored_tensor(value: object, name: str, files: dict[str, StoredFile]) -> StoredTensor:
    """Return the tensor whose pieces lie in `files` and cover each of its elements once. Raises Malformed."""
    values = fields(value, name, {"shape", "pieces"})
    shape, where = sizes_of(values["shape"], f"the shape of {name}"), f"a piece of {name}"
    pieces = tuple(_piece(piece, where, shape, files) for piece in items(values["pieces"], f"{name}.pieces"))
    if not is_tiling(shape, (Box(piece.offsets, piece.sizes) for piece in pieces)):
        raise Malformed(f"has pieces of {name} that overlap or leave a gap")
    return StoredTensor(shape, pieces)


def _piece(value: object, where: str, shape: tuple[int, ...], files: dict[str, StoredFile]) -> Piece:
    if not isinstance(value, dict) or value.keys() != _PIECE_KEYS:
        value = fields(value, where, _PIECE_KEYS)
    offsets, sizes = sizes_of(value["offsets"], where, least=0), sizes_of(value["sizes"], where)
    if text(value["file"], where) not in files:
        raise Malformed(f"has {where} in {shown(value['file'])}, which is not one of its files")
    is_inside = len(offsets) == len(sizes) == len(shape)
    if not is_inside or any(map(lambda offset, size, end: offset + size > end, offsets, sizes, shape)):
        raise Malformed(f"has {where} at {offsets} of {sizes}, outside the shape {shape}")
    return Piece(value["file"], offsets, sizes)


def _blend(value: object) -> dict[str, Any]:
    values = fields(value, "a blend", {"start", "weights"})
    weights = table(values["weights"], "the weights of a blend")
    return {
        "start": integer(values["start"], "the start of a blend"),
        "weights": {name: finite(weight, f"the weight of {name}") for name, weight in weights.items()},
    }


def _sample_range(value: object) -> list[int]:
    ends = [integer(number, "excluded") for number in items(value, "excluded", 2)]
    if len(ends) != 2 or ends[0] >= ends[1]:
        raise Malformed(f"has {ends} in excluded instead of a first sample and a later one")
    return ends


def piece_of(entry: dict[str, Any]) -> Piece:
    """Return the piece that a JSON object describes."""
    return Piece(entry["file"], tuple(entry["offsets"]), tuple(entry["sizes"]))


def checkpoints_in(run_dir: Path) -> list[Path]:
    """Return a run's committed checkpoint directories, newest first, without verifying them."""
    paths = (run_dir / CHECKPOINTS).glob("step-*")
    directories = [path for path in paths if is_step_name(path.name) and path.is_dir()]
    return sorted(directories, key=step_of, reverse=True)


def checkpoints_at(path: Path) -> list[Path]:
    """Return the checkpoint `path`, or the checkpoints of the run `path`. Raises ConfigError for none."""
    checkpoints = [path] if (path / MANIFEST).exists() else checkpoints_in(path)
    if not checkpoints:
        why = "this run has no checkpoint yet" if (path / IDENTITY).exists() else "contains no checkpoint"
        raise ConfigError(str(path), None, why, "a checkpoint, or a run that has saved a checkpoint")
    return checkpoints


def read_manifest_to_resume(path: Path) -> Manifest:
    """Return the manifest of a complete checkpoint with finite values. Raises UnusableCheckpoint."""
    manifest = read_manifest(path)
    if not manifest.finite:
        raise UnusableCheckpoint(path, MANIFEST, "says that weights or optimizer states are NaN or infinite")
    return manifest


def is_usable(path: Path) -> bool:
    """Return whether a run can resume from the checkpoint, as far as is known without its checksums."""
    try:
        read_manifest_to_resume(path)
    except UnusableCheckpoint:
        return False
    return True


def checkpoint_at(path: Path) -> Path | None:
    """Return the checkpoint `path`, or the newest checkpoint of the run `path`; None if it has none."""
    return path if (path / MANIFEST).exists() else next(iter(checkpoints_in(path)), None)


def newest_complete_before(path: Path) -> Path | None:
    """Return the newest checkpoint of the same run that is older than `path` and can be resumed from."""
    siblings = checkpoints_in(path.parent.parent)
    older = siblings[siblings.index(path) + 1 :] if path in siblings else []
    return next(filter(is_usable, older), None)


def unusable_checkpoint_error(unusable: UnusableCheckpoint) -> ConfigError:
    """Return the user error about a checkpoint that cannot be restored; suggests an older checkpoint."""
    older = newest_complete_before(unusable.path)
    fresh = "in a fresh run.dir"
    from_older = f"{typed_text('checkpoint.resume', str(older))} ({fresh})"
    remedies = ["checkpoint.fallback=true", from_older] if older else []
    remedies.append(f"checkpoint.resume=none (from the first step, {fresh})")
    return ConfigError("checkpoint.resume", unusable.path, str(unusable), " or ".join(remedies))
