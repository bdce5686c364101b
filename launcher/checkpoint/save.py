"""Writing checkpoints: every rank its own part, behind training; the first rank makes them complete."""

import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from launcher.checkpoint.files import replace_file, save_tensors, sync
from launcher.checkpoint.geometry import Box, logical_views
from launcher.checkpoint.manifest import (
    DIRECTORY,
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
    step_name,
)
from launcher.config.schema import CheckpointConfig
from launcher.engine.base import Engine
from launcher.engine.state import Fragment, fragments

_PARTIAL, _INDEX = ".partial", ".json"
_POLL = 0.02


class CheckpointError(Exception):
    """A checkpoint could not be written; those before it are intact."""


@dataclass(frozen=True)
class _Part:
    """One box of this rank's, copied to host memory."""

    kind: str
    name: str
    shape: tuple[int, ...]
    box: Box
    tensor: Tensor


class CheckpointWriter:
    """Saves one at a time. Every method is collective over the world."""

    def __init__(self, engine: Engine, config: CheckpointConfig, run_dir: Path, keys: list[str]) -> None:
        self.engine, self.config, self.keys = engine, config, keys
        self.folder = run_dir / DIRECTORY
        self._first = engine.mesh.rank == 0
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._all_ended = threading.Event()

    def save(self, manifest: Manifest) -> float:
        """Begin to write `manifest`, whose tensors and files are still empty.

        Waits for the one before, and for a copy to host memory; returns the seconds this took.
        Raises CheckpointError for the one before (see wait), and for a directory that cannot be made.
        """
        started = time.perf_counter()
        self.wait()
        partial = self._make_directory(manifest.step)
        parts = list(self._snapshot())
        self._error = None
        self._all_ended.clear()
        self._thread = threading.Thread(target=self._write, args=(partial, parts, manifest), daemon=True)
        self._thread.start()
        if not self.config.asynchronous:
            self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        """Until the last one is complete. Raises CheckpointError on every rank if one could not write."""
        if self._thread is None:
            return
        if not self._first:
            self._thread.join()
        # Whoever cannot write cannot leave a word on the disk either: the first rank must not wait for it.
        errors: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, None if self._first else self._error)
        if self._first:
            self._all_ended.set()
            self._thread.join()
        own = [self._error]
        dist.broadcast_object_list(own)
        self._thread = None
        found = next((error for error in (*errors, *own) if error), None)
        if found:
            raise CheckpointError(found)

    def _make_directory(self, step: int) -> Path:
        partial = self.folder / f"{step_name(step)}{_PARTIAL}"
        error: list[str | None] = [None]
        if self._first:
            try:
                self.folder.mkdir(exist_ok=True)
                for leftover in self.folder.glob(f"*{_PARTIAL}"):
                    shutil.rmtree(leftover)
                partial.mkdir()
            except OSError as reason:
                error = [str(reason)]
        dist.broadcast_object_list(error)
        if error[0]:
            raise CheckpointError(error[0])
        return partial

    def _snapshot(self) -> Iterator[_Part]:
        for fragment in fragments(self.engine, self.keys):
            own = own_part(fragment, self.engine)
            if own is None:
                continue
            for kind, tensor in own.tensors.items():
                views = logical_views(
                    tensor, own.start, own.shard_shape, own.logical, self.engine.mesh.tensor
                )
                for box, view in views:
                    copied = view.to("cpu", copy=True).contiguous()
                    yield _Part(kind, own.logical.name, own.logical.shape, box, copied)

    def _write(self, partial: Path, parts: list[_Part], manifest: Manifest) -> None:
        try:
            write_parts(partial, self.engine.mesh.rank, parts, int(self.config.max_file_gb * 1e9))
            if self._first:
                world = dist.get_world_size()
                if not _all_indexed(partial, world, self._all_ended):
                    return  # another rank says why
                commit(partial, manifest, world)
                prune(self.folder.parent, self.config)
        except Exception as error:
            self._error = f"{type(error).__name__}: {error}"


def own_part(fragment: Fragment, engine: Engine) -> Fragment | None:
    """What of a fragment this rank writes, so that all ranks together write each element once."""
    mesh = engine.mesh
    if fragment.is_tied_copy or (not fragment.logical.is_split and mesh.tensor.rank > 0):
        return None
    if engine.zero_stage > 0:
        return fragment
    # Every data rank has all of it: each writes an even share.
    total = next(iter(fragment.tensors.values())).numel()
    start, stop = (total * rank // mesh.data.size for rank in (mesh.data.rank, mesh.data.rank + 1))
    return fragment.narrowed(start, stop - start) if stop > start else None


def write_parts(partial: Path, rank: int, parts: list[_Part], max_bytes: int) -> None:
    """This rank's files, synced, and last of all their index."""
    files: dict[str, File] = {}
    listed = []
    for number, group in enumerate(_in_files(parts, max_bytes)):
        name = f"{rank:05d}-{number:03d}.safetensors"
        save_tensors({entry_name(p.kind, p.name, p.box.offsets): p.tensor for p in group}, partial / name)
        files[name] = File((partial / name).stat().st_size, sha256_of(partial / name))
        listed += [(p.kind, p.name, p.shape, asdict(Piece(name, p.box.offsets, p.box.sizes))) for p in group]
    index = {"files": {name: asdict(file) for name, file in files.items()}, "pieces": listed}
    replace_file(partial / f"{rank:05d}{_INDEX}", json.dumps(index))


def _in_files(parts: list[_Part], max_bytes: int) -> Iterator[list[_Part]]:
    group: list[_Part] = []
    size = 0
    for part in parts:
        if group and size + part.tensor.nbytes > max_bytes:
            yield group
            group, size = [], 0
        group.append(part)
        size += part.tensor.nbytes
    if group:
        yield group


def _all_indexed(partial: Path, world: int, all_ended: threading.Event) -> bool:
    indices = [partial / f"{rank:05d}{_INDEX}" for rank in range(world)]
    while True:
        ended = all_ended.wait(_POLL)
        if all(index.exists() for index in indices):
            return True
        if ended:
            return False


def commit(partial: Path, manifest: Manifest, world: int) -> Path:
    """Make the checkpoint complete: its manifest, then its name, then `latest`. Returns its directory."""
    tensors: dict[str, dict[str, Stored]] = {}
    files: dict[str, File] = {}
    for rank in range(world):
        path = partial / f"{rank:05d}{_INDEX}"
        index = json.loads(path.read_text())
        files |= {name: File(**file) for name, file in index["files"].items()}
        for kind, name, shape, piece in index["pieces"]:
            stored = tensors.setdefault(kind, {}).get(name, Stored(tuple(shape), ()))
            own = Piece(piece["file"], tuple(piece["offsets"]), tuple(piece["sizes"]))
            tensors[kind][name] = replace(stored, pieces=(*stored.pieces, own))
        path.unlink()
    replace_file(partial / MANIFEST, replace(manifest, tensors=tensors, files=files).to_json())
    final = partial.with_name(partial.name.removesuffix(_PARTIAL))
    if final.exists():
        # An unusable one that a fallback went past: it makes room.
        shutil.rmtree(final)
    partial.rename(final)
    sync(final.parent)
    replace_file(final.parent / LATEST, final.name + "\n")
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
            # Renamed first: a half deleted one is not a checkpoint.
            doomed = path.with_name(f"{path.name}{_PARTIAL}")
            path.rename(doomed)
            shutil.rmtree(doomed)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _validation_loss(path: Path) -> float:
    loss = read_manifest(path).validation_loss
    return inf if loss is None else loss
