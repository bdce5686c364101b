"""What a run computed, step by step, in logical full tensors; and how ranks hand it over."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]  # by logical name
TENSORS = ("weights", "states", "outputs", "tied")
NUMBERS = (
    "loss",
    "grad_norm",
    "batch_losses",
    "replica_spread",
    "data_spread",
    "output_spread",
    "norm_spread",
)


@dataclass
class StepTrace:
    """One optimizer step. `weights` and `states` are those after it, `gradients` those before clipping.

    A trace is a list of these by step number: at 0 stands what the run starts from, weights and spreads only.
    A spread is the largest difference between two ranks of what they should hold alike.
    """

    loss: float = 0.0
    grad_norm: float = 0.0
    weights: Weights = field(default_factory=dict)
    states: Weights = field(default_factory=dict)
    gradients: Weights = field(default_factory=dict)
    outputs: Weights = field(default_factory=dict)  # of each layer, in data rank 0's first micro-batch
    tied: Weights = field(default_factory=dict)  # copies of a weight that later pipeline stages hold
    batch_losses: list[list[float]] = field(default_factory=list)  # [data rank][micro-batch]
    replica_spread: dict[str, float] = field(default_factory=dict)  # weights, between tensor ranks
    data_spread: dict[str, float] = field(default_factory=dict)  # weights, between data ranks
    output_spread: dict[str, float] = field(default_factory=dict)  # outputs, between tensor ranks
    norm_spread: float = 0.0  # the gradient norm, between all ranks
    stage_of: dict[str, int] = field(default_factory=dict)  # the pipeline stage of each output


def write_trace(steps: list[StepTrace], path: Path) -> None:
    """`path`.json and `path`.safetensors: no pickle between processes."""
    numbers = [{name: getattr(step, name) for name in NUMBERS} for step in steps]
    path.with_suffix(".json").write_text(json.dumps(numbers))
    tensors = {
        f"{index}/{kind}/{name}": tensor.contiguous()
        for index, step in enumerate(steps)
        for kind in TENSORS
        for name, tensor in getattr(step, kind).items()
    }
    save_file(tensors, path.with_suffix(".safetensors"))


def read_traces(paths: list[Path]) -> list[StepTrace]:
    """The traces of a run's pipeline ranks put together, with the numbers of the one that has the loss."""
    numbers = [json.loads(path.with_suffix(".json").read_text()) for path in paths]
    # Under DualPipeV the first rank of the pipeline has the loss.
    of_the_loss = next(
        (own for own in numbers if any(any(step["batch_losses"]) for step in own)), numbers[-1]
    )
    steps = [StepTrace(**own) for own in of_the_loss]
    for stage, (path, of_stage) in enumerate(zip(paths, numbers, strict=True)):
        for step, own in zip(steps, of_stage, strict=True):
            for name in ("replica_spread", "data_spread", "output_spread"):
                getattr(step, name).update(own[name])
        for key, tensor in load_file(path.with_suffix(".safetensors")).items():
            index, kind, name = key.split("/", 2)
            getattr(steps[int(index)], kind)[name] = tensor
            if kind == "outputs":
                steps[int(index)].stage_of[name] = stage
    return steps
