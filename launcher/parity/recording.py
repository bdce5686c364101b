"""Run one rank of the verified layout, and record what its engine computes."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.config.layout import Layout
from launcher.config.numbers import IGNORED_LABEL
from launcher.config.schema import RunConfig
from launcher.data import sampler
from launcher.engine.base import Engine, MicroBatches, StepResult, gather_logical
from launcher.engine.build import build_engine
from launcher.engine.distributed import join, leave
from launcher.engine.optimizer import state_keys
from launcher.engine.watchdog import MEASURING_MINUTES, Watchdog
from launcher.models.selection_bias import selection_biases
from launcher.parallel.context import context_of
from launcher.parallel.mesh import Axis
from launcher.parallel.sharding import logical_of
from launcher.parity.dropout import DRAWS, NEXT_DRAWS, recorded_draws, write_draws
from launcher.parity.outputs import OutputRecorder
from launcher.parity.perturb import perturb
from launcher.parity.reference import GlobalBatch, probe_batches
from launcher.parity.step_trace import StepTrace, Weights, write_trace
from launcher.runtime.resume import Progress
from launcher.runtime.training import optimizer_step

# A step of the small model takes seconds, even where many ranks share a core. Compiling takes minutes.
HANG_MINUTES = 2 / 3
ENGINE = "engine"  # the file that names the engine that the ranks built


def record_rank(rank: int, *, run: RunConfig, layout: Layout, folder: Path) -> None:
    """Train; the first rank of each pipeline stage writes folder/stage-N. Collective over the world."""
    with rank_engine(rank, run, layout, folder) as (engine, watchdog):
        perturb(engine, run.training.seed)
        recorder = OutputRecorder(engine, run.parallelism.sequence_parallel, run.parallelism.context_method)
        steps = [record_weights(engine)]
        for batch in probe_batches(run):
            watchdog.at(f"step {len(steps)}")
            engine.random.begin_step(len(steps))
            labels = count_labels(batch)
            engine.set_learning_rate(run.optimizer.lr)
            take = partial(engine.train_batch, rank_batches(run, engine, batch), labels)
            steps.append(recorded_step(run, engine, recorder, take))
        if engine.mesh.data.rank == 0 and engine.mesh.tensor.rank == 0:
            write_trace(steps, folder / f"stage-{engine.mesh.stage}")


def record_dropout(rank: int, *, run: RunConfig, layout: Layout, folder: Path) -> None:
    """Take two steps; rank 0 writes all ranks' dropout masks to DRAWS and NEXT_DRAWS. Collective (world)."""
    with rank_engine(rank, run, layout, folder) as (engine, _):
        for step, name in enumerate((DRAWS, NEXT_DRAWS)):
            with recorded_draws() as draws:
                loader: Any = ProbeLoader(run, engine)
                optimizer_step(run, engine, loader, Progress(step=step))
            write_draws(draws, folder / name)


class ProbeLoader:
    """Gives the same probe batch in each step, as a Loader would."""

    def __init__(self, run: RunConfig, engine: Engine) -> None:
        batch = next(probe_batches(run))
        self._batches, self.labels = list(rank_batches(run, engine, batch)), count_labels(batch)

    def step(self, consumed: int) -> MicroBatches:
        return self._batches


def count_labels(batch: GlobalBatch) -> int:
    return int((batch[1] != IGNORED_LABEL).sum())


@contextmanager
def rank_engine(rank: int, run: RunConfig, layout: Layout, folder: Path) -> Iterator[tuple[Engine, Watchdog]]:
    """Join the other ranks and build the engine; leave the other ranks on exit. Collective over the world."""
    is_slow = layout.compiled or layout.device == "cuda"
    minutes = min(MEASURING_MINUTES if is_slow else HANG_MINUTES, run.launch.timeout_minutes)
    device = join(
        rank=rank,
        local_rank=rank,
        world_size=layout.world_size,
        device=layout.device,
        init_method=f"file://{folder / 'store'}",
        timeout_minutes=minutes,
    )
    with Watchdog(folder / "logs", minutes) as watchdog:
        engine = build_engine(run, layout, device, strict=True)
        if rank == 0:
            (folder / ENGINE).write_text(engine_in_words(engine))
        yield engine, watchdog
        leave()


def engine_in_words(engine: Engine) -> str:
    """Return the classes of the engine and of its optimizers, and whether blocks are compiled."""
    zero, optimizer = engine.deepspeed.optimizer, engine.optimizer
    names = [type(engine.deepspeed).__name__, type(zero).__name__, type(optimizer).__name__]
    compiled = ["compiled blocks"] if engine.layout.compiled else []
    return ", ".join([*dict.fromkeys(names), *compiled])


def recorded_step(
    run: RunConfig, engine: Engine, recorder: OutputRecorder, take: Callable[[], StepResult]
) -> StepTrace:
    """Take a step and return its trace. Collective over the world."""
    recorder.start()
    result = take()
    step = record_weights(engine)
    step.loss, step.grad_norm = engine.mean_loss(result.loss), float(result.grad_norm)
    step.norm_spread = spread(torch.tensor(step.grad_norm), dist.group.WORLD)
    step.norm_data_spread = spread(torch.tensor(step.grad_norm), engine.mesh.data.group)
    step.outputs, step.output_spread = recorder.outputs()
    step.batch_losses = recorder.losses()
    step.choices = recorder.chosen.choices()
    step.states = recorded_states(run, engine)
    return step


def recorded_states(run: RunConfig, engine: Engine) -> Weights:
    """Return all optimizer states and selection biases of this stage. Collective over the stage's ranks."""
    states = {
        f"{logical.name}.{key}": tensor.clone()
        for key in state_keys(run.optimizer)
        for logical, tensor in engine.full_states(key)
    }
    biases = selection_biases(engine.module)
    return states | {bias.logical.name: bias.value.cpu().clone() for bias in biases}


def record_weights(engine: Engine) -> StepTrace:
    """Return the current weights and spreads. Collective over this stage's data and tensor groups."""
    tensor, parameters = engine.mesh.tensor, list(engine.parameters())
    return StepTrace(
        weights={logical.name: weight.clone() for logical, weight in engine.full_weights()},
        tied={
            logical_of(p).name: gather_logical(engine.master(p), logical_of(p), engine.mesh).cpu().clone()
            for p in engine.module.parameters()
            if getattr(p, "ds_pipe_replicated", False)
        },
        replica_spread=_spreads(engine, tensor, [p for p in parameters if not logical_of(p).is_split]),
        # Under ZeRO-3 data ranks hold no replicas.
        data_spread=_spreads(engine, engine.mesh.data, parameters if engine.zero_stage < 3 else []),
    )


def _spreads(engine: Engine, axis: Axis, parameters: Iterable[torch.nn.Parameter]) -> dict[str, float]:
    """Return each parameter's spread over the ranks of the axis. Collective over the axis."""
    if axis.size == 1:
        return {}
    values = engine.master if axis is engine.mesh.tensor else (lambda p: p.detach())
    spreads = {}
    for parameter in parameters:
        logical = logical_of(parameter)
        group = engine.mesh.holders_of_experts.group if logical.is_part else axis.group
        spreads[logical.name] = spread(values(parameter).float(), group)
    return spreads


def spread(value: Tensor, group: dist.ProcessGroup | None) -> float:
    """Return the largest difference of an element between two ranks, or NaN. All-reduces over `group`."""
    highest, lowest = value.clone(), value.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=group)
    return float((highest - lowest).max())


def rank_batches(run: RunConfig, engine: Engine, batch: GlobalBatch) -> MicroBatches:
    """Return this data rank's micro-batches of a global batch."""
    inputs, labels = (tensor.numpy() for tensor in batch)
    indices = sampler.sample_indices(
        samples_consumed=0,
        global_batch_size=run.training.global_batch_size,
        micro_batch_size=run.training.micro_batch_size,
        data_rank=engine.mesh.batch.rank,
        data_size=engine.mesh.batch.size,
    )
    context = context_of(engine.mesh.context, run.parallelism.context_method)
    part = None if context is None else context.part(inputs.shape[1])
    return [sampler.part_of_pair(inputs[rows], labels[rows], part) for rows in indices]
