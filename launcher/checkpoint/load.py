"""Restore a checkpoint into any layout; each rank reads only the slices it holds."""

from pathlib import Path

import torch
import torch.distributed as dist

from launcher.checkpoint.flat_ranges import fragment_views
from launcher.checkpoint.manifest import Manifest, first_damaged_file
from launcher.checkpoint.read import CheckpointReader, WeightReader
from launcher.engine.base import Engine
from launcher.engine.state import fragments, make_states, update_model_weights


@torch.no_grad()
def restore(engine: Engine, path: Path, manifest: Manifest, keys: list[str]) -> int:
    """Restore the weights and the optimizer states `keys`; return the number of bytes this rank read.

    Collective over the data-parallel group. Raises UnusableCheckpoint.
    """
    make_states(engine, keys, manifest.updates)
    reader = CheckpointReader(path, manifest)
    _fill(engine, reader, keys)
    return reader.bytes_read


@torch.no_grad()
def load_initial_weights(engine: Engine, reader: WeightReader) -> None:
    """Load the weights that a new run starts from. Collective over the data-parallel group."""
    _fill(engine, reader, [])


def _fill(engine: Engine, reader: WeightReader, keys: list[str]) -> None:
    for fragment in fragments(engine, keys):
        for kind, box, view in fragment_views(fragment, engine.mesh.tensor):
            reader.fill(kind, fragment.logical.name, box, view)
    update_model_weights(engine)


def damaged_file_on_any_rank(path: Path, manifest: Manifest) -> str | None:
    """Return the first damaged file, or None. Collective over the world: each rank hashes a share."""
    rank, world = dist.get_rank(), dist.get_world_size()
    damaged: list[str | None] = [None] * world
    try:
        damaged_here = first_damaged_file(path, manifest, sorted(manifest.files)[rank::world])
    except OSError as error:
        damaged_here = f"{error.filename}: {error.strerror}"
    dist.all_gather_object(damaged, damaged_here)
    return next((name for name in damaged if name is not None), None)
