"""Initial weights that hide nothing: biases and norm weights with random numbers added.

As they are drawn, biases are 0 and norm weights are 1. A bias that is left out, or a norm weight of another
layer, would change no number of the first step, and little of the next ones.
"""

import hashlib

import torch
from torch import Tensor

from launcher.checkpoint.flat_ranges import fragment_views
from launcher.config.schema import RunConfig
from launcher.engine.base import Engine
from launcher.engine.state import fragments, update_model_weights
from launcher.parity.differences import has_bf16_states, is_frozen
from launcher.parity.step_trace import Weights

SIZE = 0.1  # standard deviation


def is_perturbed(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a weight is a bias, the weight of a norm, or an adapter's matrix B."""
    return len(shape) == 1 or name.endswith(".lora_b")


def noise(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Return the numbers that are added to a logical tensor, the same in every layout."""
    digest = hashlib.sha256(f"{seed}/perturbed/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return SIZE * torch.randn(shape, generator=generator)


def perturbed(run: RunConfig, weights: Weights) -> Weights:
    """Return the weights of the reference with the noise; rounded where the run keeps them in bf16."""
    result = dict(weights)
    for name, weight in weights.items():
        if is_perturbed(name, tuple(weight.shape)):
            sum_ = weight + noise(run.training.seed, name, tuple(weight.shape))
            is_low = run.precision.dtype.name == "bf16" and (has_bf16_states(run) or is_frozen(run, name))
            result[name] = sum_.bfloat16().float() if is_low else sum_
    return result


@torch.no_grad()
def perturb(engine: Engine, seed: int) -> None:
    """Add the noise to the weights of a layout. Collective over the data group."""
    for fragment in fragments(engine, []):
        logical = fragment.logical
        if not is_perturbed(logical.name, logical.shape):
            continue
        added = noise(seed, logical.name, logical.shape)
        for _, box, view in fragment_views(fragment, engine.mesh.tensor):
            view.copy_(view.float() + added[box.slices].to(view.device))
    update_model_weights(engine)
