"""What a run computed, step by step, in logical full tensors; and how ranks hand it over."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]  # by logical name


@dataclass
class StepTrace:
    """One optimizer step. `weights` and `states` are those after it, `gradients` those before clipping.

    `replica_spread`: of each tensor that all tensor ranks hold, the largest difference between two ranks.
    """

    loss: float
    grad_norm: float
    weights: Weights
    states: Weights
    gradients: Weights = field(default_factory=dict)
    replica_spread: dict[str, float] = field(default_factory=dict)


def write_trace(steps: list[StepTrace], path: Path) -> None:
    """`path`.json and `path`.safetensors: no pickle between processes."""
    numbers = [{"loss": s.loss, "grad_norm": s.grad_norm, "replica_spread": s.replica_spread} for s in steps]
    path.with_suffix(".json").write_text(json.dumps(numbers))
    tensors = {}
    for index, step in enumerate(steps):
        for kind in ("weights", "states"):
            for name, tensor in getattr(step, kind).items():
                tensors[f"{index}/{kind}/{name}"] = tensor.contiguous()
    save_file(tensors, path.with_suffix(".safetensors"))


def read_traces(paths: list[Path]) -> list[StepTrace]:
    """The traces of a run's stages put together. The numbers of the first are everybody's."""
    numbers = json.loads(paths[0].with_suffix(".json").read_text())
    steps = [StepTrace(n["loss"], n["grad_norm"], {}, {}) for n in numbers]
    for path in paths:
        for step, own in zip(steps, json.loads(path.with_suffix(".json").read_text()), strict=True):
            step.replica_spread |= own["replica_spread"]
        for key, tensor in load_file(path.with_suffix(".safetensors")).items():
            index, kind, name = key.split("/", 2)
            getattr(steps[int(index)], kind)[name] = tensor
    return steps
