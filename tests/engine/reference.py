"""The independent reference: one process, plain torch modules and optimizer, no DeepSpeed, no mesh."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from launcher.config.schema import ModelConfig, OptimizerName, ParallelismConfig, RunConfig
from launcher.data.sampler import Samples, sample_indices
from launcher.data.windows import Stretch, Windows
from launcher.models.architecture import flat_model
from launcher.models.context import BlockContext
from launcher.parallel.mesh import ProcessMesh
from launcher.parallel.sharding import logical_of


@dataclass
class Trace:
    """What a run computed: per step, and at the end."""

    losses: list[float]
    norms: list[float]
    validation: float
    weights: dict[str, Tensor]


def samples_for(model: ModelConfig, length: int, seed: int) -> Samples:
    tokens = np.random.default_rng(seed).integers(0, model.vocab_size, 4000)
    return Samples(Windows([Stretch(tokens)], length), shuffle_seed=seed)


def reference_trace(run: RunConfig, steps: int) -> Trace:
    """Each global batch as one batch: no micro-batches, so accumulation is checked too."""
    single = RunConfig(model=run.model, parallelism=ParallelismConfig(), training=run.training)
    context = BlockContext.create(single, ProcessMesh.single(), torch.device("cpu"))
    model = flat_model(run.model, context)
    parameters = {logical_of(p).name: p for p in model.parameters()}
    optimizer = _optimizer(run, list(parameters.values()))
    samples = samples_for(run.model, run.model.max_sequence_length, 1)
    trace = Trace([], [], 0.0, {})
    for step in range(steps):
        loss = model(*_batch(run, samples, step))
        optimizer.zero_grad()
        loss.backward()
        limit = run.optimizer.gradient_clipping or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), limit)
        optimizer.step()
        trace.losses.append(loss.item())
        trace.norms.append(float(norm))
    model.eval()
    with torch.no_grad():
        trace.validation = float(model(*_batch(run, samples, steps)))
    trace.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return trace


def _optimizer(run: RunConfig, parameters: list[Tensor]) -> torch.optim.Optimizer:
    o = run.optimizer
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    if o.name is OptimizerName.sgd:
        return torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum)
    return torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.epsilon)


def _batch(run: RunConfig, samples: Samples, step: int) -> tuple[Tensor, Tensor]:
    size = run.training.global_batch_size
    indices = sample_indices(
        samples_consumed=step * size, global_batch_size=size, micro_batch_size=size, data_rank=0, data_size=1
    )
    tokens = torch.from_numpy(samples.take(indices[0]))
    return tokens[:, :-1], tokens[:, 1:]
