"""A run's final weights: safetensors by logical name, the same whatever layout wrote them."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from launcher.checkpoint.files import save_tensors
from launcher.config.errors import ConfigError
from launcher.parallel.sharding import logical_of

if TYPE_CHECKING:  # reading weights needs no deepspeed
    from launcher.engine.base import Engine

DIRECTORY = "weights"


def save_weights(engine: "Engine", run_dir: Path) -> Path:
    """Write run_dir/weights/model-STAGE-of-STAGES.safetensors, one file per pipeline stage, in fp32.

    Collective over each stage; its first rank writes, aside and then renamed. Returns the directory.
    """
    mesh = engine.mesh
    writes = mesh.data.rank == 0 and mesh.tensor.rank == 0
    tensors = {}
    for logical, tensor in engine.full_weights():
        if writes:
            tensors[logical.name] = tensor.contiguous()
    directory = run_dir / DIRECTORY
    if writes:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"model-{mesh.stage + 1:05d}-of-{mesh.shape.pipeline:05d}.safetensors"
        aside = path.with_suffix(".partial")
        save_tensors(tensors, aside)
        aside.rename(path)
    return directory


def weight_files(run_dir: Path) -> list[Path]:
    """The files of a run's final weights. Raises ConfigError where there are none, or not all."""
    files = sorted((run_dir / DIRECTORY).glob("model-*-of-*.safetensors"))
    if not files:
        raise ConfigError(
            "run.dir",
            run_dir,
            f"no {DIRECTORY}/*.safetensors in it: the run has not finished",
            "the directory of a run that trained to its last step",
        )
    expected = int(files[0].stem.rsplit("-", 1)[1])
    if len(files) != expected:
        raise ConfigError(
            "run.dir",
            run_dir,
            f"{len(files)} of {expected} weight files are there",
            "a complete copy of the run's directory",
        )
    return files


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
