"""Train a compared layout on one rank and record losses, seconds, peak memory and collectives."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

# A part of torch is imported at the first operation under a dispatch mode, and ZeRO-3 would wrap that part.
import torch._dynamo
import torch.distributed as dist

from launcher.checkpoint.sources import WeightSource
from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.data.open import open_data
from launcher.engine.allocations import CollectiveName
from launcher.engine.build import build_engine
from launcher.engine.distributed import join, leave
from launcher.engine.measuring import RankMeasurement
from launcher.engine.watchdog import Watchdog
from launcher.runtime.batches import rank_loader
from launcher.runtime.resume import start_from
from launcher.runtime.training import optimizer_step

COUNTED = 4  # steps whose memory and collectives are counted; the first makes the optimizer's states


@dataclass
class RankRecord:
    """Losses, seconds, peak memory in bytes and collectives of one rank."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of the steps after the counted steps
    parts: list[dict[str, float]] = field(default_factory=list)  # of the same steps
    memory: int = 0
    collectives: list[tuple[str, CollectiveName, int, int]] = field(default_factory=list)  # and times called


def record_rank(
    rank: int, *, run: RunConfig, layout: Layout, initial: WeightSource | None, steps: int, folder: Path
) -> None:
    """Train COUNTED steps for memory and traffic, then `steps` timed steps; write folder/rank-N.json.

    Collective over the world.
    """
    torch.set_num_threads(1)  # equal in every layout
    measurement, minutes = RankMeasurement(), run.launch.timeout_minutes
    with measurement.timing_collectives():
        device = join(
            rank=rank,
            world_size=layout.world_size,
            local_rank=rank,
            device=layout.device,
            init_method=f"file://{folder / 'store'}",
            timeout_minutes=minutes,
        )
        with Watchdog(folder / "logs", minutes, setting="launch.timeout_minutes") as watchdog:
            record = measured(run, layout, initial, device, measurement, watchdog, steps)
            (folder / f"rank-{rank}.json").write_text(json.dumps(asdict(record)))
            leave()


def measured(
    run: RunConfig,
    layout: Layout,
    initial: WeightSource | None,
    device: torch.device,
    measurement: RankMeasurement,
    watchdog: Watchdog,
    steps: int,
) -> RankRecord:
    """Train, from `initial` if given; return the record of this rank. Collective over the world."""
    record = RankRecord()
    with measurement.tensors:
        engine = build_engine(run, layout, device)
        measurement.name_groups(engine)
        data = open_data(run)
        progress = start_from(run, engine, None, initial, data.digests).progress
        loader = rank_loader(run, engine, data.blend(progress.blends))
        peaks = []
        for _ in range(COUNTED):
            watchdog.at(f"step {progress.step + 1}")
            measurement.tensors.restart()
            record.losses.append(engine.mean_loss(optimizer_step(run, engine, loader, progress).loss))
            progress = progress.after(run.training.global_batch_size)
            peaks.append(measurement.tensors.peak)
    # Sometimes a thread of gloo frees a gradient only after the next gradient is made.
    record.memory = min(peaks[1:])
    record.collectives = [(*call, times) for call, times in measurement.collectives().items()]
    compiling = 1 if layout.compiled else 0  # the counted steps ran eager, the first timed step compiles
    with loader, measurement.timing_optimizer(engine):
        for _ in range(steps + compiling):
            watchdog.at(f"step {progress.step + 1}")
            dist.barrier()
            measurement.restart_clock()
            started = time.perf_counter()
            record.losses.append(engine.mean_loss(optimizer_step(run, engine, loader, progress).loss))
            record.seconds.append(time.perf_counter() - started)
            record.parts.append(measurement.seconds(record.seconds[-1]))
            progress = progress.after(run.training.global_batch_size)
    record.seconds, record.parts = record.seconds[compiling:], record.parts[compiling:]
    return record
