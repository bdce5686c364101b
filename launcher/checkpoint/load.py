"""Restore a checkpoint into any layout; each rank reads only the slices it holds."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from launcher.checkpoint.flat_ranges import fragment_views
from launcher.checkpoint.integrity import check_files
from launcher.checkpoint.manifest import Manifest, StoredFiles, UnusableCheckpoint
from launcher.checkpoint.read import CheckpointReader, WeightReader, open_weights
from launcher.checkpoint.sources import WeightSource
from launcher.config.errors import ConfigError
from launcher.engine.base import Engine
from launcher.engine.state import fragments, make_states, update_model_weights
from launcher.models.selection_bias import selection_biases
from launcher.parallel.boxes import whole
from launcher.parallel.sharding import WEIGHT


@torch.no_grad()
def restore(engine: Engine, path: Path, manifest: Manifest, keys: list[str]) -> int:
    """Restore the weights and the optimizer states `keys`; return the number of bytes this rank read.

    Frozen weights (LoRA) stay as they are.

    Collective over the world. Raises UnusableCheckpoint on every rank. Checks no checksum.
    """
    make_states(engine, keys, manifest.updates)
    reader = CheckpointReader(path, manifest)
    _fill(engine, reader, keys, trained=True, has_biases=True)
    return reader.bytes_read


@torch.no_grad()
def load_initial_weights(engine: Engine, weights: WeightSource) -> None:
    """Load the weights that a new run starts from: without adapters (LoRA). Collective over the world.

    Biases for the choice of experts stay 0 if the source was trained without them, as all of Hugging Face.
    Raises UnusableCheckpoint, ConfigError.
    """
    has_adapters = any(fragment.is_frozen for fragment in fragments(engine, []))
    has_biases = weights.model.experts.bias_balancing > 0
    _fill(engine, open_weights(weights), [], trained=not has_adapters, has_biases=has_biases)


def _fill(engine: Engine, reader: WeightReader, keys: list[str], *, trained: bool, has_biases: bool) -> None:
    """Fill the fragments that training changes, or the frozen fragments, and the biases for the choice."""
    with agreed_error():
        for fragment in (each for each in fragments(engine, keys) if each.is_frozen is not trained):
            for kind, box, view in fragment_views(fragment, engine.mesh.tensor):
                reader.fill(kind, fragment.logical.name, box, view)
        for bias in selection_biases(engine.module) if has_biases else ():
            reader.fill(WEIGHT, bias.logical.name, whole(bias.logical.shape), bias.value)
    update_model_weights(engine)


def check_files_together(stored: StoredFiles) -> None:
    """Check SHA-256 and header of every file; each rank reads a share. Collective over the world.

    Raises UnusableCheckpoint on every rank.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    with agreed_error():
        check_files(stored, sorted(stored.files)[rank::world])


@contextmanager
def agreed_error() -> Iterator[None]:
    """Raise UnusableCheckpoint or ConfigError on every rank if a rank raises it. Collective over the world.

    Otherwise the other ranks would wait in a collective for a rank that has chosen another checkpoint.
    """
    error: Exception | None = None
    try:
        yield
    except (UnusableCheckpoint, ConfigError) as raised:
        error = raised
    errors: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    if first := next(filter(None, errors), None):
        raise first
