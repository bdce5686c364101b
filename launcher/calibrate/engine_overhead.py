"""Measure the time of a step beside the model's operations, by training small models on every rank."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from launcher.config.compose import compose_jobs
from launcher.config.layout import Layout
from launcher.config.schema import HardwareConfig, MeasuredRates, RunConfig, Scale
from launcher.config.shape import sequence_length
from launcher.launch.local import run_local_ranks, start_method_for
from launcher.launch.scratch import scratch_directory
from launcher.planning.cost.parts import parts
from launcher.planning.cost.run_plan import make_plan
from launcher.planning.cost.sizes import Sizes
from launcher.planning.cost.step_time import StepTime

WARM_UP, STEPS = 2, 6
MICRO_BATCH = 2
MANY = 8  # micro-batches of a step


@dataclass(frozen=True)
class Trial:
    """A short run of `ranks` processes: each alone, or in one world where a strategy or `sizes` need it."""

    run: RunConfig
    layout: Layout
    ranks: int

    @classmethod
    def of(
        cls, hidden: int, length: int, batches: int, *, ranks: int, zero_3: bool = False, **sizes: int
    ) -> "Trial":
        """Return the trial of a small model; `sizes` are of parallelism: `pipeline`, `tensor`, ..."""
        pipeline, tensor = (sizes.get(name, 1) for name in ("pipeline", "tensor"))
        data = ranks // (pipeline * tensor) if zero_3 or sizes else 1
        [job] = compose_jobs(
            "config",
            RunConfig,
            [
                f"model.hidden_size={hidden}",
                f"model.num_heads={max(2, hidden // 64)}",
                f"model.ffn_hidden_size={4 * hidden}",
                f"model.max_sequence_length={length}",
                f"training.micro_batch_size={MICRO_BATCH}",
                "hardware.device=cpu",
                f"training.global_batch_size={MICRO_BATCH * batches * data}",
                # At the default threshold such small weights would not be partitioned.
                *(["deepspeed.zero_optimization.stage3_param_persistence_threshold=0"] if zero_3 else []),
                *(f"parallelism.{name}={size}" for name, size in sizes.items()),
            ],
        )
        return cls(job.config, Layout(pipeline, data, tensor, "cpu", batches, 3 if zero_3 else 0), ranks)

    def planned_time(self, measured: MeasuredRates) -> StepTime:
        alone = replace(measured, ranks=self.layout.world_size)
        hardware = HardwareConfig(device=self.run.hardware.device, measured=[alone])
        time = make_plan(replace(self.run, hardware=hardware), self.layout).time
        assert time is not None
        return time

    @property
    def block_flops(self) -> int:
        return parts(Sizes.of(self.run, self.layout.device)).block.flops


def with_engine(measured: Sequence[MeasuredRates], *, cores: int, rounds: int) -> list[MeasuredRates]:
    """Return `measured` with the overhead of steps and micro-batches, and time factors by model size.

    Each round trains with all numbers of ranks, and medians are used: the speed of a shared machine changes
    within minutes, and would make one number of ranks look faster than another.
    """
    trials = [_trials(rates.ranks) for rates in measured]
    seconds: list[list[list[float]]] = [[[] for _ in of_ranks] for of_ranks in trials]
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}: training small models", flush=True)
        for rates, of_ranks, found in zip(measured, trials, seconds, strict=True):
            for trial, times in zip(of_ranks, found, strict=True):
                times.append(step_seconds(trial, threads=max(1, cores // rates.ranks)))
    return [
        _with_steps(rates, of_ranks, [median(times) for times in found])
        for rates, of_ranks, found in zip(measured, trials, seconds, strict=True)
    ]


def _trials(ranks: int) -> list[Trial]:
    """Return the runs whose step times `_with_steps` takes, in its order."""
    trial = partial(Trial.of, ranks=ranks)
    first, *larger = (
        trial(hidden, length, MANY // 4) for hidden, length in ((128, 96), (320, 160), (512, 256))
    )
    trials = [trial(32, 16, 1), trial(32, 16, MANY), trial(32, 16, MANY, zero_3=True), first, *larger]
    if ranks % 2:
        return trials
    split = partial(trial, 128, 96, MANY // 4, tensor=2)
    return [*trials, split(), split(sequence_parallel=True), trial(32, 16, 2 * MANY, pipeline=2)]


def _with_steps(measured: MeasuredRates, trials: list[Trial], seconds: list[float]) -> MeasuredRates:
    """Return `measured` with what the steps of the trials take beside the planned times of their parts."""
    (one, small, partitioned, *others), (single, many, with_zero_3, *times) = trials, seconds
    planned = small.planned_time(measured).total - one.planned_time(measured).total
    rates = replace(measured, micro_batch_s=_positive((many - single - planned) / (MANY - 1)))
    rates = replace(rates, step_s=_positive(single - one.planned_time(rates).total))
    # The factor is below 1 if the parts of this small model are planned slower than its measured step.
    time = small.planned_time(rates)
    factor = (many - (time.total - time.compute)) / time.compute
    blocks = MANY * small.run.model.num_layers
    zero_3_block_s = rounded(_unplanned(rates, partitioned, with_zero_3, factor) / blocks)
    taken = list(zip(others, times, strict=True))
    scales = [_scale(rates, *pair) for pair in taken if pair[0].layout.world_size == 1]
    split = [pair for pair in taken if pair[0].layout.tensor > 1]
    pass_collective_s = _late(replace(rates, scales=scales), split)
    pipeline_batch_s = 0.0
    for trial, step in taken:
        if trial.layout.pipeline > 1:
            # The bubble of two stages is a micro-batch of the other stage: its overhead comes once more.
            met = trial.layout.accumulation + 1
            pipeline_batch_s = rounded(_unplanned(rates, trial, step, factor) / met)
    return replace(
        rates,
        scales=scales,
        zero_3_block_s=zero_3_block_s,
        pass_collective_s=pass_collective_s,
        pipeline_batch_s=pipeline_batch_s,
    )


def _late(rates: MeasuredRates, split: Sequence[tuple[Trial, float]]) -> float:
    """Return seconds per collective over tensor ranks that steps take beside their planned parts."""
    later = replace(rates, pass_collective_s=1.0)
    calls = sum(trial.planned_time(later).tensor - trial.planned_time(rates).tensor for trial, _ in split)
    return rounded(sum(_unplanned(rates, *pair, 1.0) for pair in split) / calls) if split else 0.0


def _unplanned(rates: MeasuredRates, trial: Trial, taken: float, factor: float) -> float:
    """Return the seconds of a step beside its planned parts, of which computation takes `factor` times."""
    time = trial.planned_time(rates)
    computing = time.compute + time.bubble
    return max(0.0, taken - (time.total - computing) - factor * computing)


def _scale(rates: MeasuredRates, trial: Trial, taken: float) -> Scale:
    """Return the time of computation without the overhead of micro-batches, over its planned time."""
    time = trial.planned_time(rates)
    computed = time.compute - trial.layout.accumulation * rates.micro_batch_s
    return Scale(trial.block_flops, rounded((taken - (time.total - computed)) / computed))


def _positive(seconds: float) -> float:
    return rounded(max(0.0, seconds))


def rounded(number: float) -> float:
    """Round to four digits, the precision of a measurement."""
    return float(f"{number:.4g}")


def step_seconds(trial: Trial, threads: int) -> float:
    """Train on all ranks at once and return the median time of a step on its slowest rank.

    Ranks of one world wait for the slowest in each step; a median of rank 0 alone is faster.
    """
    with scratch_directory() as folder:
        target = partial(_rank, trial=trial, threads=threads, folder=folder)
        start_method = start_method_for(trial.layout.device)
        run_local_ranks(target, trial.ranks, log_dir=folder / "logs", start_method=start_method)
        by_rank = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(trial.ranks)]
    slowest: list[float] = [max(times) for times in zip(*by_rank, strict=True)]
    return median(slowest)


def _rank(rank: int, *, trial: Trial, threads: int, folder: Path) -> None:
    from launcher.engine.distributed import join, leave, prepare_deepspeed

    run, layout = trial.run, trial.layout
    prepare_deepspeed(layout.device)
    import torch

    from launcher.engine.build import build_engine
    from launcher.engine.watchdog import MEASURING_MINUTES, Watchdog

    torch.set_num_threads(threads)
    is_shared = layout.world_size > 1
    world = folder / ("world" if is_shared else f"world-{rank}")
    (world / "logs").mkdir(parents=True, exist_ok=True)
    device = join(
        rank=rank if is_shared else 0,
        world_size=layout.world_size,
        local_rank=rank,
        device=layout.device,
        init_method=f"file://{world / 'store'}",
        timeout_minutes=MEASURING_MINUTES,
    )
    with Watchdog(world / "logs", MEASURING_MINUTES) as watchdog:
        engine = build_engine(run, layout, device)
        tokens = np.zeros((run.training.micro_batch_size, sequence_length(run) + 1), np.int64)
        times = []
        for step in range(WARM_UP + STEPS):
            watchdog.at(f"step {step + 1}")
            engine.random.begin_step(step + 1)
            started = time.perf_counter()
            result = engine.train_batch([tokens] * layout.accumulation)
            float(result.loss)  # waits for the device
            times.append(time.perf_counter() - started)
        (folder / f"{rank}.json").write_text(json.dumps(times[WARM_UP:]))
        leave()
