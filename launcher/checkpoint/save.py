"""Write checkpoints in a background thread: each rank writes its own slices, then rank 0 commits them."""

import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from launcher.checkpoint.flat_ranges import fragment_views
from launcher.checkpoint.held import check_directory
from launcher.checkpoint.manifest import CHECKPOINTS, Manifest, is_step_name, step_name
from launcher.checkpoint.write import HostPiece, commit, index_path, prune, write_pieces
from launcher.config.errors import ConfigError
from launcher.config.run_format import record_saved_step
from launcher.config.schema import CheckpointConfig
from launcher.engine.base import Engine
from launcher.engine.state import Fragment, trained_fragments
from launcher.files import PARTIAL, make_way
from launcher.models.selection_bias import selection_biases
from launcher.parallel.boxes import whole
from launcher.parallel.sharding import WEIGHT

_POLL = 0.02  # seconds


class CheckpointError(Exception):
    """A checkpoint could not be written; earlier checkpoints are unaffected."""


class CheckpointWriter:
    """Saves one checkpoint at a time. Every public method is collective over the world."""

    def __init__(
        self,
        engine: Engine,
        config: CheckpointConfig,
        run_dir: Path,
        keys: list[str],
        loss_of_directory: Callable[[], str | None] = lambda: None,
    ) -> None:
        """`loss_of_directory` returns why run_dir is no longer this run's directory, or None if it is."""
        self.engine, self.config, self.keys = engine, config, keys
        self._loss_of_directory = loss_of_directory
        self.folder = run_dir / CHECKPOINTS
        self._is_rank_0 = engine.mesh.rank == 0
        self._thread: threading.Thread | None = None
        self._error: str | None = None
        self._all_ended = threading.Event()
        self.pending_copy: list[Tensor] = []  # the tensors in host memory that are still to be written

    def save(self, manifest: Manifest) -> float:
        """Start to save the state of this step; return the seconds for which training was blocked.

        `manifest` has empty `tensors` and `files`. Blocks until the previous save has ended and this rank's
        state is copied to host memory. With checkpoint.asynchronous=false it blocks until the checkpoint is
        complete, and copies one file's worth of tensors at a time.
        Raises CheckpointError if the previous save failed (see wait) or the directory cannot be created, and
        ConfigError if the run's directory was moved, replaced or taken over.
        """
        started = time.perf_counter()
        self.wait()
        partial = self._make_directory(manifest.step)
        pieces: Iterable[HostPiece] = self._snapshot()
        if self.config.asynchronous:
            pieces = list(pieces)  # copied now, before the next step changes the tensors
            self.pending_copy = [piece.tensor for piece in pieces]
        self._error = None
        self._all_ended.clear()
        self._thread = threading.Thread(target=self._write, args=(partial, pieces, manifest), daemon=True)
        self._thread.start()
        if not self.config.asynchronous:
            self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        """Wait until the last save has ended. Raises CheckpointError on every rank if any rank failed."""
        if self._thread is None:
            return
        if not self._is_rank_0:
            self._thread.join()
        # A rank that cannot write cannot write its index file either, for which rank 0 polls. Its error
        # therefore travels in a collective, and rank 0 stops polling.
        errors: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, None if self._is_rank_0 else self._error)
        if self._is_rank_0:
            self._all_ended.set()
            self._thread.join()
        commit_error = [self._error]
        dist.broadcast_object_list(commit_error)
        self._thread = None
        message = next((error for error in (*errors, *commit_error) if error), None)
        if message:
            if self._is_rank_0:  # partial files would keep a full disk full
                with suppress(OSError):
                    self._remove_leftovers()
            raise CheckpointError(message)

    def _make_directory(self, step: int) -> Path:
        partial = self.folder / f"{step_name(step)}{PARTIAL}"
        error: list[str | ConfigError | None] = [None]
        if self._is_rank_0:
            try:
                check_directory(self.folder.parent, self._loss_of_directory)
                self.folder.mkdir(exist_ok=True)
                self._remove_leftovers()
                partial.mkdir()
            except OSError as reason:
                error = [str(reason)]
            except ConfigError as lost:
                error = [lost]
        dist.broadcast_object_list(error)
        if isinstance(error[0], ConfigError):
            raise error[0]
        if error[0]:
            raise CheckpointError(error[0])
        return partial

    def _remove_leftovers(self) -> None:
        for leftover in self.folder.glob(f"step-*{PARTIAL}"):
            if is_step_name(leftover.name.removesuffix(PARTIAL)):
                make_way(leftover, for_directory=True)
                shutil.rmtree(leftover, ignore_errors=True)

    def _snapshot(self) -> Iterator[HostPiece]:
        for fragment in trained_fragments(self.engine, self.keys):
            share = fragment_to_write(fragment, self.engine)
            if share is None:
                continue
            for kind, box, view in fragment_views(share, self.engine.mesh.tensor):
                copied = view.to("cpu", copy=True).float().contiguous()
                yield HostPiece(kind, share.logical.name, share.logical.shape, box, copied)

        mesh = self.engine.mesh
        for bias in selection_biases(self.engine.module) if mesh.data.rank + mesh.tensor.rank == 0 else ():
            name, shape = bias.logical.name, bias.logical.shape
            yield HostPiece(WEIGHT, name, shape, whole(shape), bias.value.to("cpu", copy=True))

    def _write(self, partial: Path, pieces: Iterable[HostPiece], manifest: Manifest) -> None:
        try:
            write_pieces(partial, self.engine.mesh.rank, pieces, int(self.config.max_file_gb * 1e9))
            if self._is_rank_0:
                world = dist.get_world_size()
                if not _all_indices_written(partial, world, self._all_ended):
                    return  # another rank reports why
                check_directory(self.folder.parent, self._loss_of_directory)
                commit(partial, manifest, world)
                record_saved_step(self.folder.parent, manifest.step)
                prune(self.folder.parent, self.config, manifest.step)
        except Exception as error:
            self._error = f"{type(error).__name__}: {error}"
        finally:
            self.pending_copy = []


def fragment_to_write(fragment: Fragment, engine: Engine) -> Fragment | None:
    """Return the part of a fragment that this rank writes: the ranks together write each element once."""
    mesh = engine.mesh
    if fragment.is_tied_copy or (not fragment.logical.is_split and mesh.tensor.rank > 0):
        return None
    if engine.zero_stage > 0:
        return fragment
    # Under ZeRO-0 every data-parallel rank holds the whole fragment: each writes an equal share.
    holders = mesh.holders_of_experts if fragment.logical.is_part else mesh.data
    total = next(iter(fragment.tensors.values())).numel()
    start, stop = (total * rank // holders.size for rank in (holders.rank, holders.rank + 1))
    return fragment.narrowed(start, stop - start) if stop > start else None


def _all_indices_written(partial: Path, world: int, all_ended: threading.Event) -> bool:
    """Wait for the index files of all ranks; return False if a rank ended without writing its index."""
    ended = written = False
    while not (ended or written):
        ended = all_ended.wait(_POLL)
        written = all(index_path(partial, rank).exists() for rank in range(world))
    return written
