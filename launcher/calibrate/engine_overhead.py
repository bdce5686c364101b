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

WARM_UP = 2  # steps
LEAST, MOST = 6, 40  # steps that are timed
TARGET_S = 2.0  # planned time of the timed steps: a shared machine changes its speed
MICRO_BATCH = 2
MANY = 8  # micro-batches of a step
LEAST_FACTOR = 0.01  # of a scale
SIZES = ((128, 96), (320, 160), (512, 256))  # hidden size and sequence length


@dataclass(frozen=True)
class Trial:
    """A short run of `ranks` processes: each alone, or in one world where a strategy or `sizes` need it."""

    run: RunConfig
    layout: Layout
    ranks: int

    @classmethod
    def of(
        cls, hidden: int, length: int, batches: int, *, ranks: int, zero: int = 0, **sizes: int
    ) -> "Trial":
        """Return the trial of a small model; `sizes` are of parallelism: `pipeline`, `tensor`."""
        pipeline, tensor = (sizes.get(name, 1) for name in ("pipeline", "tensor"))
        data = ranks // (pipeline * tensor) if zero or sizes else 1
        [job] = compose_jobs(
            "config",
            RunConfig,
            [
                f"model.hidden_size={hidden}",
                f"model.num_heads={2 * max(1, hidden // 128)}",
                f"model.ffn_hidden_size={4 * hidden}",
                f"model.max_sequence_length={length}",
                f"training.micro_batch_size={MICRO_BATCH}",
                "hardware.device=cpu",
                f"training.global_batch_size={MICRO_BATCH * batches * data}",
                # At the default threshold such small weights would not be partitioned.
                "deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
                *(f"parallelism.{name}={size}" for name, size in sizes.items()),
            ],
        )
        return cls(job.config, Layout(pipeline, data, tensor, "cpu", batches, zero), ranks)

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
    steps = [
        [_timed_steps(trial, rates) for trial in of_ranks]
        for rates, of_ranks in zip(measured, trials, strict=True)
    ]
    seconds: list[list[list[float]]] = [[[] for _ in of_ranks] for of_ranks in trials]
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}: training small models", flush=True)
        for rates, of_ranks, counts, found in zip(measured, trials, steps, seconds, strict=True):
            for trial, count, times in zip(of_ranks, counts, found, strict=True):
                times.append(step_seconds(trial, threads=max(1, cores // rates.ranks), steps=count))
    return [
        _with_steps(rates, of_ranks, [median(times) for times in found])
        for rates, of_ranks, found in zip(measured, trials, seconds, strict=True)
    ]


def _trials(ranks: int) -> list[Trial]:
    """Return the runs that `_with_steps` evaluates: the first two in this order, the others in any order."""
    trial = partial(Trial.of, ranks=ranks)
    zero = [trial(128, 96, MANY // 2, zero=stage) for stage in (2, 3)]
    sized = [trial(hidden, length, MANY // 4) for hidden, length in SIZES]
    trials = [trial(32, 16, 1), trial(32, 16, MANY), *zero, *sized]
    if ranks % 2:
        return trials
    split = [trial(hidden, length, MANY // 4, tensor=2) for hidden, length in SIZES]
    return [*trials, *split, trial(32, 16, 2 * MANY, pipeline=2)]


def _timed_steps(trial: Trial, rates: MeasuredRates) -> int:
    return min(MOST, max(LEAST, round(TARGET_S / trial.planned_time(rates).total)))


def _with_steps(measured: MeasuredRates, trials: list[Trial], seconds: list[float]) -> MeasuredRates:
    """Return `measured` with what the steps of the trials take beside the planned times of their parts."""
    (one, small, *others), (single, many, *times) = trials, seconds
    planned = small.planned_time(measured).total - one.planned_time(measured).total
    rates = replace(measured, micro_batch_s=_positive((many - single - planned) / (MANY - 1)))
    rates = replace(rates, step_s=_positive(single - one.planned_time(rates).total))
    taken = list(zip(others, times, strict=True))
    flat = [pair for pair in taken if pair[0].layout.pipeline == 1 and not pair[0].layout.zero_stage]
    alone = [_scale(rates, *pair) for pair in flat if pair[0].layout.tensor == 1]
    waiting = [_scale(rates, *pair) for pair in flat if pair[0].layout.tensor > 1]
    rates = replace(rates, scales=alone, waiting_scales=waiting)
    for trial, step in taken:
        layout = trial.layout
        if layout.zero_stage:
            blocks = layout.accumulation * trial.run.model.num_layers
            further = rounded(_unplanned(rates, trial, step) / blocks)
            is_2 = layout.zero_stage == 2
            rates = replace(rates, zero_2_block_s=further) if is_2 else replace(rates, zero_3_block_s=further)
        elif layout.pipeline > 1:
            # The factor is below 1 if the parts of this small model are planned slower than its step.
            factor = _scale(replace(rates, scales=[]), small, many)
            # The bubble of two stages is a micro-batch of the other stage: its overhead comes once more.
            # The waits of the larger models have their factors: of this small model all counts as overhead.
            bare = replace(rates, scales=[factor], waiting_scales=[])
            further = _unplanned(bare, trial, step) / (layout.accumulation + 1)
            rates = replace(rates, pipeline_batch_s=rounded(further))
    return rates


def _unplanned(rates: MeasuredRates, trial: Trial, taken: float) -> float:
    """Return the seconds by which a step is longer than planned; 0 if it is shorter."""
    return max(0.0, taken - trial.planned_time(rates).total)


def _scale(rates: MeasuredRates, trial: Trial, taken: float) -> Scale:
    """Return the measured time of computation, without the overhead of micro-batches, divided by the planned.

    If the machine is faster than in the probes, a step can be shorter than its planned collectives.
    """
    time = trial.planned_time(rates)
    computed = time.compute - trial.layout.accumulation * rates.micro_batch_s
    return Scale(trial.block_flops, max(LEAST_FACTOR, rounded((taken - (time.total - computed)) / computed)))


def _positive(seconds: float) -> float:
    return rounded(max(0.0, seconds))


def rounded(number: float) -> float:
    """Round to four digits, the precision of a measurement."""
    return float(f"{number:.4g}")


def step_seconds(trial: Trial, *, threads: int, steps: int) -> float:
    """Train on all ranks at once; return the median over the steps of the longest time of any rank.

    Ranks of one world wait for the slowest rank in each step: rank 0 alone would look too fast.
    """
    with scratch_directory() as folder:
        target = partial(_rank, trial=trial, threads=threads, steps=steps, folder=folder)
        start_method = start_method_for(trial.layout.device)
        run_local_ranks(target, trial.ranks, log_dir=folder / "logs", start_method=start_method)
        by_rank = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(trial.ranks)]
    slowest: list[float] = [max(times) for times in zip(*by_rank, strict=True)]
    return median(slowest)


def _rank(rank: int, *, trial: Trial, threads: int, steps: int, folder: Path) -> None:
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
        for step in range(WARM_UP + steps):
            watchdog.at(f"step {step + 1}")
            engine.random.begin_step(step + 1)
            started = time.perf_counter()
            result = engine.train_batch([tokens] * layout.accumulation)
            float(result.loss)  # waits for the device
            times.append(time.perf_counter() - started)
        (folder / f"{rank}.json").write_text(json.dumps(times[WARM_UP:]))
        leave()
