"""Restore a checkpoint into any layout; each rank reads only the slices it holds."""

from pathlib import Path

import torch
import torch.distributed as dist

from launcher.checkpoint.flat_ranges import logical_views
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
    """Load the weights that a new run starts from, without optimizer states.

    Collective over the data-parallel group. Raises UnusableCheckpoint, ConfigError.
    """
    _fill(engine, reader, [])


def _fill(engine: Engine, reader: WeightReader, keys: list[str]) -> None:
    """Read the slices of this rank's fragments, then refresh the model weights from the fp32 weights."""
    for fragment in fragments(engine, keys):
        for kind, tensor in fragment.tensors.items():
            views = logical_views(
                tensor, fragment.start, fragment.shard_shape, fragment.logical, engine.mesh.tensor
            )
            for box, view in views:
                reader.fill(kind, fragment.logical.name, box, view)
    update_model_weights(engine)


def damaged_file_on_any_rank(path: Path, manifest: Manifest) -> str | None:
    """Return the first damaged file, the same on all ranks; each rank hashes an equal share of the files.

    Collective over the world.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    damaged: list[str | None] = [None] * world
    try:
        damaged_here = first_damaged_file(path, manifest, sorted(manifest.files)[rank::world])
    except OSError as error:
        damaged_here = f"{error.filename}: {error.strerror}"
    dist.all_gather_object(damaged, damaged_here)
    return next((name for name in damaged if name is not None), None)
