"""Save and load a run's final weights: safetensors by logical name, independent of the layout."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import nn

from launcher.checkpoint.final import STEP, remove_final_weights, stage_file, weight_files
from launcher.checkpoint.tensor_file import save_tensors
from launcher.config.errors import ConfigError
from launcher.files import replacing
from launcher.parallel.sharding import logical_of

if TYPE_CHECKING:  # load_weights must not import deepspeed
    from launcher.engine.base import Engine


def save_weights(engine: "Engine", run_dir: Path, step: int) -> Path:
    """Write run_dir/weights/model-STAGE-of-STAGES.safetensors in fp32; return the directory.

    Collective over the world. The first rank of each pipeline stage writes the gathered weights of its stage
    under a temporary name, then renames the file. When the call has returned on every rank, all files of
    `step` are complete.
    Raises ConfigError if a file cannot be written, as on a full disk.
    """
    mesh = engine.mesh
    writes = mesh.data.rank == 0 and mesh.tensor.rank == 0
    # Every rank takes part in gathering all weights.
    tensors = {logical.name: tensor.contiguous() for logical, tensor in engine.full_weights() if writes}
    path = stage_file(run_dir, mesh.stage, mesh.shape.pipeline)
    try:
        if mesh.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_final_weights(run_dir)  # another number of stages gives other file names
        dist.barrier()
        if writes:
            with replacing(path) as aside:
                save_tensors(tensors, aside, {STEP: str(step)})
    except (OSError, SafetensorError) as error:
        why = f"the final weights cannot be written: {error}"
        raise ConfigError("run.dir", run_dir, why, "the same command after freeing disk space") from None
    dist.barrier()
    return path.parent


def load_weights(module: nn.Module, run_dir: Path) -> None:
    """Fill an unsharded module from a run's final weights. Raises ConfigError if they do not fit."""
    parameters = {logical_of(parameter).name: parameter for parameter in module.parameters()}
    for path in weight_files(run_dir):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    _fill(parameters.pop(name, None), file.get_tensor(name), name, path)
        except (SafetensorError, OSError) as error:
            raise final_weights_error(run_dir, f"{path.name} cannot be read: {error}") from None
    if parameters:
        raise final_weights_error(run_dir, f"the weights lack {', '.join(sorted(parameters))}")


def _fill(parameter: nn.Parameter | None, tensor: torch.Tensor, name: str, path: Path) -> None:
    if parameter is None or parameter.shape != tensor.shape:
        expected = "no such tensor" if parameter is None else f"shape {tuple(parameter.shape)}"
        why = f"{path.name} has {name} of shape {tuple(tensor.shape)}"
        raise final_weights_error(path.parents[1], f"{why}; the model in config.yaml has {expected}")
    with torch.no_grad():
        parameter.copy_(tensor)


def final_weights_error(run_dir: Path, why: str) -> ConfigError:
    """Return the user error about final weights that cannot be loaded."""
    return ConfigError("run.dir", run_dir, why, "the directory of a run whose files have not been changed")
