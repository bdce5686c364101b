"""Writing checkpoints: every rank its own part, behind training; the first rank makes them complete."""

import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist

from launcher.checkpoint.flat_ranges import logical_views
from launcher.checkpoint.manifest import DIRECTORY, Manifest, step_name
from launcher.checkpoint.write import Part, commit, index_of, prune, write_parts
from launcher.config.schema import CheckpointConfig
from launcher.engine.base import Engine
from launcher.engine.state import Fragment, fragments
from launcher.files import PARTIAL

_POLL = 0.02


class CheckpointError(Exception):
    """A checkpoint could not be written; those before it are intact."""


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

        Waits for the one before, and for a copy to host memory (not asynchronous: of a file's worth at a
        time, and until it is complete); returns the seconds this took.
        Raises CheckpointError for the one before (see wait), and for a directory that cannot be made.
        """
        started = time.perf_counter()
        self.wait()
        partial = self._make_directory(manifest.step)
        parts: Iterable[Part] = self._snapshot()
        if self.config.asynchronous:
            parts = list(parts)  # of this step, before the next one changes it
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
            if self._first:  # what there is of it would fill a full disk
                with suppress(OSError):
                    self._remove_leftovers()
            raise CheckpointError(found)

    def _make_directory(self, step: int) -> Path:
        partial = self.folder / f"{step_name(step)}{PARTIAL}"
        error: list[str | None] = [None]
        if self._first:
            try:
                self.folder.mkdir(exist_ok=True)
                self._remove_leftovers()
                partial.mkdir()
            except OSError as reason:
                error = [str(reason)]
        dist.broadcast_object_list(error)
        if error[0]:
            raise CheckpointError(error[0])
        return partial

    def _remove_leftovers(self) -> None:
        for leftover in self.folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(leftover)

    def _snapshot(self) -> Iterator[Part]:
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
                    yield Part(kind, own.logical.name, own.logical.shape, box, copied)

    def _write(self, partial: Path, parts: Iterable[Part], manifest: Manifest) -> None:
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


def _all_indexed(partial: Path, world: int, all_ended: threading.Event) -> bool:
    indices = [index_of(partial, rank) for rank in range(world)]
    while True:
        ended = all_ended.wait(_POLL)
        if all(index.exists() for index in indices):
            return True
        if ended:
            return False
