"""Taking a checkpoint up in any layout: each rank the boxes that it holds, and no more."""

from pathlib import Path

import torch
import torch.distributed as dist

from launcher.checkpoint.flat_ranges import logical_views
from launcher.checkpoint.manifest import Manifest, damaged
from launcher.checkpoint.read import Reader, WeightReader
from launcher.engine.base import Engine
from launcher.engine.state import fragments, make_states, take_up


@torch.no_grad()
def restore(engine: Engine, path: Path, manifest: Manifest, keys: list[str]) -> int:
    """Take weights and the optimizer states `keys` from a checkpoint; returns the bytes this rank read.

    Collective over the data groups. Raises BrokenCheckpoint.
    """
    make_states(engine, keys, manifest.updates)
    reader = Reader(path, manifest)
    _fill(engine, reader, keys)
    return reader.bytes_read


@torch.no_grad()
def begin_with(engine: Engine, reader: WeightReader) -> None:
    """Take weights alone, as a run's first. Collective over the data groups.

    Raises BrokenCheckpoint, ConfigError.
    """
    _fill(engine, reader, [])


def _fill(engine: Engine, reader: WeightReader, keys: list[str]) -> None:
    for fragment in fragments(engine, keys):
        for kind, tensor in fragment.tensors.items():
            views = logical_views(
                tensor, fragment.start, fragment.shard_shape, fragment.logical, engine.mesh.tensor
            )
            for box, view in views:
                reader.fill(kind, fragment.logical.name, box, view)
    take_up(engine)


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
