"""What a step of the engine takes beside a model's operations: small models are trained on every rank."""

import json
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np

from launcher.config.compose import compose_jobs
from launcher.config.layout import Layout
from launcher.config.schema import HardwareConfig, MeasuredRates, RunConfig, Scale
from launcher.config.shape import sequence_length
from launcher.launch.local import run_local_ranks
from launcher.planning.cost.operations import Sizes
from launcher.planning.cost.parts import parts
from launcher.planning.cost.plan import Plan, make_plan

STEPS = 6  # after two that begin cold
MICRO_BATCH, MANY = 2, 8


@dataclass(frozen=True)
class Trial:
    """A run of the engine: each of `ranks` alone, or all of them in one data-parallel world."""

    run: RunConfig
    layout: Layout
    ranks: int

    @classmethod
    def of(
        cls, *, hidden: int, length: int, batches: int, ranks: int, device: str, zero_3: bool = False
    ) -> "Trial":
        data = ranks if zero_3 else 1
        [job] = compose_jobs("config", RunConfig, [
            f"model.hidden_size={hidden}", f"model.num_heads={max(2, hidden // 64)}",
            f"model.ffn_hidden_size={4 * hidden}", f"model.max_sequence_length={length}",
            f"training.micro_batch_size={MICRO_BATCH}", f"hardware.device={device}",
            f"training.global_batch_size={MICRO_BATCH * batches * data}",
            # Or its weights were too small to be partitioned.
            *(["deepspeed.zero_optimization.stage3_param_persistence_threshold=0"] if zero_3 else []),
        ])  # fmt: skip
        return cls(job.config, Layout(1, data, 1, device, batches, 3 if zero_3 else 0), ranks)

    def planned(self, measured: MeasuredRates) -> Plan:
        alone = replace(measured, ranks=self.layout.world_size)
        hardware = HardwareConfig(device=self.run.hardware.device, measured=[alone])
        return make_plan(replace(self.run, hardware=hardware), self.layout)

    @property
    def block_flops(self) -> int:
        return parts(Sizes.of(self.run, self.layout.device)).block.flops


def with_engine(measured: MeasuredRates, *, threads: int, device: str) -> MeasuredRates:
    """`measured`, with what steps, micro-batches, and models of some sizes take besides."""

    def trial(hidden: int, length: int, batches: int, zero_3: bool = False) -> Trial:
        return Trial.of(
            hidden=hidden, length=length, batches=batches, ranks=measured.ranks, device=device, zero_3=zero_3
        )

    small = trial(32, 16, MANY)
    one, many = (seconds(run, threads) for run in (trial(32, 16, 1), small))
    each = (many - one) / (MANY - 1)
    found = replace(
        measured,
        step_s=rounded(max(0.0, one - each)),
        micro_batch_s=rounded(max(0.0, each - compute(small, measured) / MANY)),
    )
    scales = []
    for hidden, length in ((128, 96), (320, 160), (512, 256)):
        sized = trial(hidden, length, MANY // 4)
        time = sized.planned(found).time
        assert time is not None
        beside = time.total - time.compute + MANY // 4 * found.micro_batch_s
        factor = (seconds(sized, threads) - beside) / (time.compute - MANY // 4 * found.micro_batch_s)
        scales.append(Scale(sized.block_flops, rounded(factor)))
    partitioned = trial(32, 16, MANY, zero_3=True)
    time = partitioned.planned(found).time
    assert time is not None
    more = seconds(partitioned, threads) - many - time.data
    blocks = MANY * small.run.model.num_layers
    return replace(found, scales=scales, zero_3_block_s=rounded(max(0.0, more) / blocks))


def compute(trial: Trial, measured: MeasuredRates) -> float:
    time = trial.planned(measured).time
    assert time is not None
    return time.compute


def rounded(number: float) -> float:
    """To four digits: no more than that can be measured."""
    return float(f"{number:.4g}")


def seconds(trial: Trial, threads: int) -> float:
    """Of a step, on all ranks at once; what the first of them saw."""
    with tempfile.TemporaryDirectory(prefix="launcher-calibrate-") as name:
        folder = Path(name)
        target = partial(_rank, trial=trial, threads=threads, folder=folder)
        start_method: Literal["fork", "spawn"] = "fork" if trial.layout.device == "cpu" else "spawn"
        run_local_ranks(target, trial.ranks, log_dir=folder / "logs", start_method=start_method)
        return float(json.loads((folder / "0.json").read_text()))


def _rank(rank: int, *, trial: Trial, threads: int, folder: Path) -> None:
    from launcher.engine.distributed import join, leave, prepare_deepspeed

    run, layout = trial.run, trial.layout
    prepare_deepspeed(layout.device)
    import torch

    from launcher.engine.build import build_engine

    torch.set_num_threads(threads)
    together = layout.world_size > 1
    own = join(
        rank=rank if together else 0,
        world_size=layout.world_size,
        local_rank=rank,
        device=layout.device,
        init_method=f"file://{folder / ('store' if together else f'store-{rank}')}",
    )
    engine = build_engine(run, layout, own)
    tokens = np.zeros((run.training.micro_batch_size, sequence_length(run) + 1), np.int64)
    taken = []
    for step in range(STEPS + 2):
        engine.random.begin_step(step + 1)
        started = time.perf_counter()
        engine.train_batch([tokens] * layout.accumulation)
        taken.append(time.perf_counter() - started)
    (folder / f"{rank}.json").write_text(json.dumps(median(taken[2:])))
    leave()
