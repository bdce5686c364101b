"""Write a checkpoint's files: the pieces of each rank, then the manifest, then the final directory name."""

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite
from pathlib import Path

from torch import Tensor

from launcher.checkpoint.integrity import sha256_of
from launcher.checkpoint.manifest import (
    LATEST,
    MANIFEST,
    Manifest,
    Piece,
    StoredFile,
    StoredTensor,
    UnusableCheckpoint,
    checkpoints_in,
    entry_name,
    piece_of,
    read_manifest,
    step_of,
)
from launcher.checkpoint.tensor_file import save_tensors
from launcher.config.schema import CheckpointConfig
from launcher.files import PARTIAL, delete_directory, make_way, rename, write_text
from launcher.parallel.boxes import Box


@dataclass(frozen=True)
class HostPiece:
    """One box of a logical tensor, copied to host memory and not yet written."""

    kind: str
    name: str
    shape: tuple[int, ...]  # of the whole logical tensor
    box: Box
    tensor: Tensor


def write_pieces(partial: Path, rank: int, pieces: Iterable[HostPiece], max_bytes: int) -> None:
    """Write this rank's files, sync them, and then write their index.

    Takes pieces for one file of at most `max_bytes` at a time; a larger piece gets a file of its own.
    """
    files, listed, finite = {}, [], True
    for number, group in enumerate(_in_files(pieces, max_bytes)):
        name = f"{rank:05d}-{number:03d}.safetensors"
        save_tensors({entry_name(p.kind, p.name, p.box.offsets): p.tensor for p in group}, partial / name)
        files[name] = asdict(StoredFile((partial / name).stat().st_size, sha256_of(partial / name)))
        listed += [(p.kind, p.name, p.shape, asdict(Piece(name, p.box.offsets, p.box.sizes))) for p in group]
        # The extremes of a tensor are NaN if any value is, and need no copy of the tensor.
        finite = finite and all(isfinite(extreme) for p in group for extreme in p.tensor.aminmax())
        group.clear()  # free these tensors before the next file's tensors are copied
    write_text(index_path(partial, rank), json.dumps({"files": files, "pieces": listed, "finite": finite}))


def _in_files(pieces: Iterable[HostPiece], max_bytes: int) -> Iterator[list[HostPiece]]:
    group: list[HostPiece] = []
    size = 0
    for piece in pieces:
        if group and size + piece.tensor.nbytes > max_bytes:
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece.tensor.nbytes
    if group:
        yield group


def index_path(partial: Path, rank: int) -> Path:
    """Return the path of a rank's index; the file exists once all other files of the rank are written."""
    return partial / f"{rank:05d}.json"


def commit(partial: Path, manifest: Manifest, world: int) -> Path:
    """Commit a checkpoint: write its manifest, rename its directory, update `latest`; return the directory.

    A kill at any moment leaves either no checkpoint of this step or a complete checkpoint.
    """
    tensors: dict[str, dict[str, StoredTensor]] = {}
    files: dict[str, StoredFile] = {}
    finite = True
    for rank in range(world):
        path = index_path(partial, rank)
        index = json.loads(path.read_text())
        files |= {name: StoredFile(**file) for name, file in index["files"].items()}
        for kind, name, shape, entry in index["pieces"]:
            stored = tensors.setdefault(kind, {}).get(name, StoredTensor(tuple(shape), ()))
            tensors[kind][name] = replace(stored, pieces=(*stored.pieces, piece_of(entry)))
        finite = finite and index["finite"]
        path.unlink()
    written = replace(manifest, tensors=tensors, files=files, finite=finite)
    write_text(partial / MANIFEST, written.to_json())
    read_manifest(partial)  # what cannot be read back is not committed
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    make_way(final, for_directory=True)
    if final.exists():
        # An unusable checkpoint of the same step, which checkpoint.fallback skipped: replace it.
        shutil.rmtree(final)
    rename(partial, final)
    for name in (LATEST, f"{LATEST}.tmp"):
        make_way(final.parent / name, for_directory=False)
    write_text(final.parent / LATEST, final.name + "\n")
    return final


def prune(run_dir: Path, config: CheckpointConfig, step: int) -> None:
    """Delete the complete checkpoints up to `step`, written last, that `config` does not keep.

    Incomplete checkpoints stay for inspection. Checkpoints of later steps stay too and are not counted: the
    run has gone back behind them, as checkpoint.fallback does if they are damaged.
    A checkpoint with values that are not finite never displaces a finite one: both kinds are counted apart.
    """
    manifests = {}
    for path in (path for path in checkpoints_in(run_dir) if step_of(path) <= step):
        with suppress(UnusableCheckpoint):
            manifests[path] = read_manifest(path)
    complete = list(manifests)
    finite = [path for path in complete if manifests[path].finite]
    kept = {*complete[: config.keep_last], *finite[: config.keep_last]}
    if config.keep_every_steps:
        kept |= {path for path in complete if step_of(path) % config.keep_every_steps == 0}
    if config.keep_best and (
        best := min(finite, key=lambda path: _validation_loss(manifests[path]), default=None)
    ):
        kept.add(best)
    for path in complete:
        if path not in kept:
            delete_directory(path)


def _validation_loss(manifest: Manifest) -> float:
    loss = manifest.validation_loss
    return loss if loss is not None and isfinite(loss) else inf
