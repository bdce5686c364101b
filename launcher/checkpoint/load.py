"""Reading checkpoints into any layout: each rank the boxes that it holds, and no more."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from launcher.checkpoint.geometry import Box, logical_views
from launcher.checkpoint.manifest import BrokenCheckpoint, Manifest, damaged, entry_name
from launcher.engine.base import Engine
from launcher.engine.state import fragments, make_states, take_up


class Reader:
    """Copies boxes of logical tensors out of a checkpoint's files. `bytes_read` counts their bytes."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.bytes_read = 0
        self._open: dict[str, Any] = {}

    def fill(self, kind: str, name: str, box: Box, view: Tensor) -> None:
        """Copy `box` of a logical tensor into `view`. Raises BrokenCheckpoint where it is not all there."""
        stored = self.manifest.tensors.get(kind, {}).get(name)
        found = 0
        for piece in stored.pieces if stored else ():
            source = Box(piece.offsets, piece.sizes)
            common = box.overlap(source)
            if common is None:
                continue
            try:
                entry = self._file(piece.file).get_slice(entry_name(kind, name, piece.offsets))
                data = entry[common.within(source)]
            except (SafetensorError, OSError) as error:
                raise BrokenCheckpoint(self.path, piece.file, f"cannot be read: {error}") from None
            view[common.within(box)].copy_(data)
            self.bytes_read += data.nbytes
            found += common.numel
        if found != box.numel:
            why = f"has {found} of the {box.numel} elements of {kind} {name} at {box.offsets}"
            raise BrokenCheckpoint(self.path, "manifest.json", why)

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = safe_open(self.path / name, framework="pt")
        return self._open[name]


@torch.no_grad()
def restore(engine: Engine, path: Path, manifest: Manifest, keys: list[str]) -> int:
    """Take weights and the optimizer states `keys` from a checkpoint; returns the bytes this rank read.

    Collective over the data groups. Raises BrokenCheckpoint.
    """
    make_states(engine, keys, manifest.updates)
    reader = Reader(path, manifest)
    for fragment in fragments(engine, keys):
        for kind, tensor in fragment.tensors.items():
            views = logical_views(
                tensor, fragment.start, fragment.shard_shape, fragment.logical, engine.mesh.tensor
            )
            for box, view in views:
                reader.fill(kind, fragment.logical.name, box, view)
    take_up(engine)
    return reader.bytes_read


def first_damaged(path: Path, manifest: Manifest) -> str | None:
    """The first file whose checksum is wrong, the same on all ranks; each rank reads an even share.

    Collective over the world.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    found: list[str | None] = [None] * world
    try:
        own = damaged(path, manifest, sorted(manifest.files)[rank::world])
    except OSError as error:
        own = f"{error.filename}: {error.strerror}"
    dist.all_gather_object(found, own)
    return next((name for name in found if name is not None), None)
