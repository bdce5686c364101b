"""A checkpoint's files: each rank's parts, then the manifest and the name that make it complete."""

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path

from torch import Tensor

from launcher.checkpoint.boxes import Box
from launcher.checkpoint.manifest import (
    LATEST,
    MANIFEST,
    File,
    Manifest,
    Piece,
    Stored,
    checkpoints_in,
    entry_name,
    is_readable,
    read_manifest,
    sha256_of,
)
from launcher.checkpoint.tensor_file import save_tensors
from launcher.config.schema import CheckpointConfig
from launcher.files import PARTIAL, delete_directory, rename, write_text

_INDEX = ".json"


@dataclass(frozen=True)
class Part:
    """One box of a logical tensor, in host memory."""

    kind: str
    name: str
    shape: tuple[int, ...]
    box: Box
    tensor: Tensor


def write_parts(partial: Path, rank: int, parts: Iterable[Part], max_bytes: int) -> None:
    """This rank's files, synced, and last of all their index. Takes a file's worth of parts at a time."""
    files: dict[str, File] = {}
    listed = []
    for number, group in enumerate(_in_files(parts, max_bytes)):
        name = f"{rank:05d}-{number:03d}.safetensors"
        save_tensors({entry_name(p.kind, p.name, p.box.offsets): p.tensor for p in group}, partial / name)
        files[name] = File((partial / name).stat().st_size, sha256_of(partial / name))
        listed += [(p.kind, p.name, p.shape, asdict(Piece(name, p.box.offsets, p.box.sizes))) for p in group]
        group.clear()  # before the next file's are made
    index = {"files": {name: asdict(file) for name, file in files.items()}, "pieces": listed}
    write_text(index_of(partial, rank), json.dumps(index))


def _in_files(parts: Iterable[Part], max_bytes: int) -> Iterator[list[Part]]:
    group: list[Part] = []
    size = 0
    for part in parts:
        if group and size + part.tensor.nbytes > max_bytes:
            yield group
            group, size = [], 0
        group.append(part)
        size += part.tensor.nbytes
    if group:
        yield group


def index_of(partial: Path, rank: int) -> Path:
    """Where a rank leaves word that its files are written."""
    return partial / f"{rank:05d}{_INDEX}"


def commit(partial: Path, manifest: Manifest, world: int) -> Path:
    """Make the checkpoint complete: its manifest, then its name, then `latest`. Returns its directory."""
    tensors: dict[str, dict[str, Stored]] = {}
    files: dict[str, File] = {}
    for rank in range(world):
        path = index_of(partial, rank)
        index = json.loads(path.read_text())
        files |= {name: File(**file) for name, file in index["files"].items()}
        for kind, name, shape, piece in index["pieces"]:
            stored = tensors.setdefault(kind, {}).get(name, Stored(tuple(shape), ()))
            own = Piece(piece["file"], tuple(piece["offsets"]), tuple(piece["sizes"]))
            tensors[kind][name] = replace(stored, pieces=(*stored.pieces, own))
        path.unlink()
    write_text(partial / MANIFEST, replace(manifest, tensors=tensors, files=files).to_json())
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    if final.exists():
        # An unusable one that a fallback went past: it makes room.
        shutil.rmtree(final)
    rename(partial, final)
    write_text(final.parent / LATEST, final.name + "\n")
    return final


def prune(run_dir: Path, config: CheckpointConfig) -> None:
    """Delete what `config` does not keep. What cannot be used is not counted, and stays to be looked at."""
    complete = [path for path in checkpoints_in(run_dir) if is_readable(path)]
    kept = set(complete[: config.keep_last])
    if config.keep_every_steps:
        kept |= {path for path in complete if _step(path) % config.keep_every_steps == 0}
    if config.keep_best and (best := min(complete, key=_validation_loss, default=None)):
        kept.add(best)
    for path in complete:
        if path not in kept:
            delete_directory(path)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _validation_loss(path: Path) -> float:
    loss = read_manifest(path).validation_loss
    return inf if loss is None else loss
