"""Traces: what a run computed in each step, as full logical tensors; written by ranks, read by verify."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

Weights = dict[str, Tensor]  # by logical name
TENSORS = ("weights", "states", "outputs", "tied", "choices")
SPREADS = ("replica_spread", "data_spread", "output_spread")
NUMBERS = ("loss", "grad_norm", "batch_losses", "norm_spread", "norm_data_spread", *SPREADS)


@dataclass
class StepTrace:
    """One optimizer step: weights and optimizer states after the step, gradients before clipping.

    A trace is a list of StepTrace by step number; number 0 holds the initial weights and their spreads only.
    A spread is the largest difference between two ranks in a tensor that both should hold with equal values.
    """

    loss: float = 0.0
    grad_norm: float = 0.0
    rate: float | None = None  # the learning rate, in the reference; None: optimizer.lr
    weights: Weights = field(default_factory=dict)
    states: Weights = field(default_factory=dict)
    gradients: Weights = field(default_factory=dict)
    outputs: Weights = field(default_factory=dict)  # outputs of each layer, first micro-batch of data rank 0
    tied: Weights = field(default_factory=dict)  # copies of tied weights on later pipeline stages
    choices: Weights = field(default_factory=dict)  # experts chosen by each token (G, T, k), by router
    scores: Weights = field(default_factory=dict)  # by which the reference chooses (G, T, E), by router
    batch_losses: list[list[float]] = field(default_factory=list)  # [data rank][micro-batch]
    replica_spread: dict[str, float] = field(
        default_factory=dict
    )  # largest difference of weights between tensor ranks
    data_spread: dict[str, float] = field(
        default_factory=dict
    )  # largest difference of weights between data ranks
    output_spread: dict[str, float] = field(
        default_factory=dict
    )  # largest difference of outputs between tensor ranks
    norm_spread: float = 0.0  # largest difference of the gradient norm between ranks
    norm_data_spread: float = 0.0  # the same between data ranks alone
    stage_of: dict[str, int] = field(default_factory=dict)  # the pipeline stage of each output


def write_trace(steps: list[StepTrace], path: Path) -> None:
    """Write `path`.json and `path`.safetensors; no pickle travels between processes."""
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
    """Merge the traces of all pipeline stages; scalars come from the stage that computes the loss."""
    numbers = [json.loads(path.with_suffix(".json").read_text()) for path in paths]
    # Under DualPipeV the first pipeline rank computes the loss, under 1F1B the last.
    stages = (stage for stage in numbers if any(any(step["batch_losses"]) for step in stage))
    steps = [StepTrace(**scalars) for scalars in next(stages, numbers[-1])]
    for stage, (path, stage_numbers) in enumerate(zip(paths, numbers, strict=True)):
        for step, scalars in zip(steps, stage_numbers, strict=True):
            for name in SPREADS:
                getattr(step, name).update(scalars[name])
        for key, tensor in load_file(path.with_suffix(".safetensors")).items():
            index, kind, name = key.split("/", 2)
            getattr(steps[int(index)], kind)[name] = tensor
            if kind == "outputs":
                steps[int(index)].stage_of[name] = stage
    return steps
