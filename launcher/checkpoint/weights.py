"""Save and load a run's final weights: safetensors by logical name, independent of the layout."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import nn

from launcher import __version__
from launcher.checkpoint.final import (
    FinalWeights,
    final_weights_error,
    final_weights_of,
    other_model_error,
    remove_final_weights,
    stage_file,
)
from launcher.checkpoint.held import check_directory
from launcher.checkpoint.integrity import check_files, sha256_of, unchanged
from launcher.checkpoint.manifest import MANIFEST, StoredFile, UnusableCheckpoint
from launcher.checkpoint.read import files_with_weights, fill_whole, open_weights, stored_files_of
from launcher.checkpoint.sources import WeightSource, damaged
from launcher.checkpoint.tensor_file import save_tensors
from launcher.config.errors import ConfigError
from launcher.files import replacing, write_text
from launcher.models.selection_bias import selection_biases
from launcher.parallel.sharding import logical_of

if TYPE_CHECKING:  # load_weights must not import deepspeed
    from launcher.engine.base import Engine

# The name of a weight file, its length and checksum, and the shapes of its tensors.
_Written = tuple[str, StoredFile, dict[str, tuple[int, ...]]]


def save_weights(
    engine: "Engine",
    run_dir: Path,
    step: int,
    config: dict[str, Any],
    loss_of_directory: Callable[[], str | None] = lambda: None,
) -> Path:
    """Write run_dir/weights/model-STAGE-of-STAGES.safetensors in fp32; return the directory.

    Collective over the world. The first rank of each pipeline stage writes the gathered weights of its stage
    under a temporary name, then renames the file. Rank 0 writes the manifest last. When the call has returned
    on every rank, all files of `step` are complete. `config` is the composed config of the run.
    Raises ConfigError if a file cannot be written, as on a full disk, or if `loss_of_directory` returns why
    run_dir is no longer this run's directory.
    """
    mesh = engine.mesh
    writes = mesh.data.rank == 0 and mesh.tensor.rank == 0
    # Every rank takes part in gathering all weights.
    tensors = {logical.name: tensor.contiguous() for logical, tensor in engine.full_weights() if writes}
    if writes:
        tensors |= {bias.logical.name: bias.value.cpu() for bias in selection_biases(engine.module)}
    path = stage_file(run_dir, mesh.stage, mesh.shape.pipeline)
    stages: list[_Written | None] = [None] * dist.get_world_size()
    try:
        if mesh.rank == 0:
            check_directory(run_dir, loss_of_directory)
            path.parent.mkdir(exist_ok=True)
            remove_final_weights(run_dir)  # another number of stages gives other file names
        dist.barrier()
        dist.all_gather_object(stages, _write(tensors, path) if writes else None)
        if mesh.rank == 0:
            check_directory(run_dir, loss_of_directory)
            manifest = _manifest(step, config, [stage for stage in stages if stage])
            write_text(path.parent / MANIFEST, manifest.to_json())
    except (OSError, SafetensorError) as error:
        why = f"the final weights cannot be written: {error}"
        raise ConfigError("run.dir", run_dir, why, "the same command after freeing disk space") from None
    dist.barrier()
    return path.parent


def _write(tensors: dict[str, torch.Tensor], path: Path) -> _Written:
    with replacing(path) as aside:
        save_tensors(tensors, aside)
    stored = StoredFile(path.stat().st_size, sha256_of(path))
    return path.name, stored, {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _manifest(step: int, config: dict[str, Any], stages: list[_Written]) -> FinalWeights:
    files = {name: stored for name, stored, _ in stages}
    return FinalWeights(step, __version__, config, files, {name: shapes for name, _, shapes in stages})


def load_weights(module: nn.Module, run_dir: Path) -> None:
    """Fill an unsharded module from a run's final weights; compare all checksums. Raises ConfigError."""
    parameters: dict[str, torch.Tensor] = {
        logical_of(parameter).name: parameter for parameter in module.parameters()
    }
    parameters |= {bias.logical.name: bias.value for bias in selection_biases(module)}
    weights = final_weights_of(run_dir)
    stored = weights.stored(run_dir)
    try:
        with unchanged(stored):
            check_files(stored, sorted(stored.files))
            for name in sorted(stored.files):
                with safe_open(stored.path / name, framework="pt") as file:
                    for key in weights.shapes[name]:
                        _fill(parameters.pop(key, None), file.get_tensor(key), key, run_dir, name)
    except (SafetensorError, OSError, UnusableCheckpoint) as error:
        raise final_weights_error(run_dir, error) from None
    if parameters:
        raise other_model_error(run_dir, f"the weights lack {', '.join(sorted(parameters))}")


@torch.no_grad()
def load_source(module: nn.Module, weights: WeightSource) -> None:
    """Fill an unsharded module from a checkpoint, or from a run with adapters; compare all checksums.

    Adapters (LoRA) are added to the weights. Raises ConfigError.
    """
    try:
        stored = stored_files_of(weights)
        assert stored is not None
        with unchanged(stored):
            check_files(stored, files_with_weights(stored))
            fill_whole(module, open_weights(weights))
    except (OSError, UnusableCheckpoint) as error:
        raise damaged("run.dir", weights.path, error) from None


def _fill(parameter: torch.Tensor | None, tensor: torch.Tensor, name: str, run_dir: Path, file: str) -> None:
    if parameter is None or parameter.shape != tensor.shape:
        expected = "no such tensor" if parameter is None else f"shape {tuple(parameter.shape)}"
        why = f"{file} has {name} of shape {tuple(tensor.shape)}"
        raise other_model_error(run_dir, f"{why}; the model in config.yaml has {expected}")
    with torch.no_grad():
        parameter.copy_(tensor)
