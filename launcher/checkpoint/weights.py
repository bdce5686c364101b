"""A run's final weights: safetensors by logical name, the same whatever layout wrote them."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import nn

from launcher.checkpoint.final import clear, metadata_of, stage_file, weight_files
from launcher.checkpoint.tensor_file import save_tensors
from launcher.config.errors import ConfigError
from launcher.files import replacing
from launcher.parallel.sharding import logical_of

if TYPE_CHECKING:  # reading weights needs no deepspeed
    from launcher.engine.base import Engine


def save_weights(engine: "Engine", run_dir: Path, step: int) -> Path:
    """Write run_dir/weights/model-STAGE-of-STAGES.safetensors, one file per pipeline stage, in fp32.

    Collective over the world; the first rank of each stage writes, aside and then renamed. Once it returns
    on every rank, the weights of `step` are whole. Returns the directory. Raises ConfigError on a full disk.
    """
    mesh = engine.mesh
    writes = mesh.data.rank == 0 and mesh.tensor.rank == 0
    tensors = {}
    for logical, tensor in engine.full_weights():
        if writes:
            tensors[logical.name] = tensor.contiguous()
    path = stage_file(run_dir, mesh.stage, mesh.shape.pipeline)
    try:
        if mesh.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            clear(run_dir)  # another layout names its files otherwise
        dist.barrier()
        if writes:
            with replacing(path) as aside:
                save_tensors(tensors, aside, metadata_of(step))
    except (OSError, SafetensorError) as error:
        why = f"the final weights cannot be written: {error}"
        raise ConfigError("run.dir", run_dir, why, "the same command, once there is room for them") from None
    dist.barrier()
    return path.parent


def load_weights(module: nn.Module, run_dir: Path) -> None:
    """Fill an unsplit module from a run's final weights, one tensor at a time. Raises ConfigError."""
    parameters = {logical_of(parameter).name: parameter for parameter in module.parameters()}
    for path in weight_files(run_dir):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    _fill(parameters.pop(name, None), file.get_tensor(name), name, path)
        except (SafetensorError, OSError) as error:
            raise unusable(run_dir, f"{path.name} cannot be read: {error}") from None
    if parameters:
        raise unusable(run_dir, f"the weights lack {', '.join(sorted(parameters))}")


def _fill(parameter: nn.Parameter | None, tensor: torch.Tensor, name: str, path: Path) -> None:
    if parameter is None or parameter.shape != tensor.shape:
        expected = "has none" if parameter is None else f"has {tuple(parameter.shape)}"
        why = f"{path.name} has {name} of {tuple(tensor.shape)}, the model of config.yaml {expected}"
        raise unusable(path.parents[1], why)
    with torch.no_grad():
        parameter.copy_(tensor)


def unusable(run_dir: Path, why: str) -> ConfigError:
    """What the user is told about final weights that do not fit."""
    return ConfigError("run.dir", run_dir, why, "the directory of an unchanged run")
