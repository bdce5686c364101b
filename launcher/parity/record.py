"""One rank's part of a verification: run the layout's engine and write down what it computed."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from launcher.config.layout import Layout
from launcher.config.schema import OptimizerName, RunConfig
from launcher.config.shape import sequence_length
from launcher.data.sampler import sample_indices
from launcher.engine.base import Engine, MicroBatches
from launcher.engine.build import build_engine
from launcher.engine.distributed import join, leave
from launcher.parallel.sharding import logical_of
from launcher.parity.reference import probe_batches
from launcher.parity.trace import StepTrace, write_trace


def record_rank(rank: int, *, run: RunConfig, layout: Layout, folder: Path) -> None:
    """Run verify.steps steps; each stage's first rank writes folder/stage-N. Collective over the world."""
    device = join(
        rank=rank,
        world_size=layout.world_size,
        local_rank=rank,
        device=layout.device,
        init_method=f"file://{folder / 'store'}",
    )
    engine = build_engine(run, layout, device)
    steps = [
        record_step(run, engine, batch.numpy()[_own_samples(run, engine)])
        for batch in probe_batches(run, sequence_length(run))
    ]
    if engine.mesh.data.rank == 0 and engine.mesh.tensor.rank == 0:
        write_trace(steps, folder / f"stage-{engine.mesh.stage}")
    leave()


def record_step(run: RunConfig, engine: Engine, batches: MicroBatches) -> StepTrace:
    """One optimizer step of this data rank's micro-batches (A, B, T+1). Collective over the world."""
    engine.set_learning_rate(run.optimizer.lr)
    result = engine.train_batch(iter(batches))
    return StepTrace(
        loss=result.loss,
        grad_norm=result.grad_norm,
        weights={logical.name: tensor.clone() for logical, tensor in engine.full_weights()},
        states={
            f"{logical.name}.{key}": tensor.clone()
            for key in state_keys(run)
            for logical, tensor in engine.full_states(key)
        },
        replica_spread=replica_spread(engine),
    )


def state_keys(run: RunConfig) -> list[str]:
    """The tensors that the configured optimizer keeps per parameter."""
    if run.optimizer.name is OptimizerName.adamw:
        return ["exp_avg", "exp_avg_sq"]
    return ["momentum_buffer"] if run.optimizer.momentum else []


def replica_spread(engine: Engine) -> dict[str, float]:
    """The largest difference between tensor ranks of each tensor they all hold. Collective over the group."""
    axis, spread = engine.mesh.tensor, {}
    if axis.size == 1:
        return {}
    for parameter in engine.parameters():
        logical = logical_of(parameter)
        if not logical.is_split:
            highest = engine.master(parameter).clone()
            lowest = highest.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=axis.group)
            dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=axis.group)
            spread[logical.name] = float((highest - lowest).max())
    return spread


def _own_samples(run: RunConfig, engine: Engine) -> npt.NDArray[np.int64]:
    return sample_indices(
        samples_consumed=0,
        global_batch_size=run.training.global_batch_size,
        micro_batch_size=run.training.micro_batch_size,
        data_rank=engine.mesh.data.rank,
        data_size=engine.mesh.data.size,
    )
