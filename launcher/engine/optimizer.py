"""Build the optimizer and compute its learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from launcher.config.schema import OptimizerConfig, OptimizerName, SchedulerConfig, SchedulerName, StatesDtype
from launcher.engine.stochastic import StochasticAdamW, StochasticSGD
from launcher.parallel.initializer import EXPERTS
from launcher.parallel.sharding import logical_of


def build_optimizer(
    config: OptimizerConfig, parameters: Iterable[nn.Parameter], states: StatesDtype = StatesDtype.fp32
) -> torch.optim.Optimizer:
    """Return AdamW or SGD: torch's, or with bf16 states the one that rounds stochastically.

    Weight decay applies to matrices only, not to biases and norm weights. Frozen weights are left out.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in filter(is_trained, parameters):
        # Use the logical shape: under ZeRO-3 every parameter is flattened to a vector.
        (matrices if len(logical_of(parameter).shape) > 1 else vectors).append(parameter)
    # DeepSpeed partitions the group of distributed experts, which are all matrices, over other ranks.
    shared = [weight for weight in matrices if logical_of(weight).is_part]
    matrices = [weight for weight in matrices if not logical_of(weight).is_part]
    decays = ((matrices, config.weight_decay), (vectors, 0.0))
    groups: list[dict[str, Any]] = [
        {"params": group, "weight_decay": decay} for group, decay in decays if group
    ]
    if shared:
        groups.append({"params": shared, "weight_decay": config.weight_decay, "moe": True, "name": EXPERTS})
    if config.name is OptimizerName.sgd:
        assert config.momentum is not None
        if states is StatesDtype.bf16:
            return StochasticSGD(groups, lr=config.lr, momentum=config.momentum)
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    beta1, beta2, epsilon = config.beta1, config.beta2, config.epsilon
    assert beta1 is not None
    assert beta2 is not None
    assert epsilon is not None
    if states is StatesDtype.bf16:
        return StochasticAdamW(groups, lr=config.lr, betas=(beta1, beta2), eps=epsilon)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(beta1, beta2), eps=epsilon, fused=True)


def is_trained(parameter: nn.Parameter) -> bool:
    """Return whether the optimizer updates a parameter; with adapters (LoRA) only adapters are updated."""
    return parameter.requires_grad


def state_keys(config: OptimizerConfig) -> list[str]:
    """Return the names of the state tensors that the configured optimizer keeps per parameter."""
    if config.name is OptimizerName.adamw:
        return ["exp_avg", "exp_avg_sq"]
    return ["momentum_buffer"] if config.momentum else []


def learning_rate(optimizer: OptimizerConfig, scheduler: SchedulerConfig, *, step: int, steps: int) -> float:
    """Return the learning rate of update `step` of `steps`, counted from 1. Pure: nothing to restore."""
    if step <= scheduler.warmup_steps:
        return optimizer.lr * step / scheduler.warmup_steps
    all_after_warmup = steps - scheduler.warmup_steps
    decay_steps = scheduler.decay_steps if scheduler.name is SchedulerName.wsd else all_after_warmup
    assert decay_steps is not None
    # 0 at the last step before the decay, 1 at the last step of the run.
    progress = max(0.0, (step - (steps - decay_steps)) / max(decay_steps, 1))
    return optimizer.lr * _decay(scheduler, min(progress, 1.0))


def _decay(scheduler: SchedulerConfig, progress: float) -> float:
    if scheduler.name is SchedulerName.constant:
        return 1.0
    shape = (1 + math.cos(math.pi * progress)) / 2 if scheduler.name is SchedulerName.cosine else 1 - progress
    return scheduler.min_lr_ratio + (1 - scheduler.min_lr_ratio) * shape
