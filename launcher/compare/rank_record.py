"""Train a compared layout on one rank and record losses, seconds, peak memory and collectives."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

# A part of torch is imported at the first operation under a dispatch mode, and ZeRO-3 would wrap that part.
import torch._dynamo
import torch.distributed as dist

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.data.open import open_data
from launcher.engine.allocations import CollectiveName
from launcher.engine.build import build_engine
from launcher.engine.distributed import join, leave
from launcher.engine.measuring import RankMeasurement
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


def record_rank(rank: int, *, run: RunConfig, layout: Layout, steps: int, folder: Path) -> None:
    """Train COUNTED steps for memory and traffic, then `steps` timed steps; write folder/rank-N.json.

    Collective over the world.
    """
    torch.set_num_threads(1)  # equal in every layout
    measurement, record = RankMeasurement(), RankRecord()
    with measurement.timing_collectives():
        store, ranks = f"file://{folder / 'store'}", layout.world_size
        device = join(rank=rank, world_size=ranks, local_rank=rank, device=layout.device, init_method=store)
        with measurement.tensors:
            engine = build_engine(run, layout, device)
            measurement.name_groups(engine)
            data = open_data(run)
            progress = start_from(run, engine, None, None, data.digests).progress
            loader = rank_loader(run, engine, data.blend(progress.blends))
            peaks = []
            for _ in range(COUNTED):
                measurement.tensors.restart()
                record.losses.append(engine.mean_loss(optimizer_step(run, engine, loader, progress).loss))
                progress = progress.after(run.training.global_batch_size)
                peaks.append(measurement.tensors.peak)
        # Sometimes a thread of gloo frees a gradient only after the next gradient is made.
        record.memory = min(peaks[1:])
        record.collectives = [(*call, times) for call, times in measurement.collectives().items()]
        with loader, measurement.timing_optimizer(engine):
            for _ in range(steps):
                dist.barrier()
                measurement.restart_clock()
                started = time.perf_counter()
                record.losses.append(engine.mean_loss(optimizer_step(run, engine, loader, progress).loss))
                record.seconds.append(time.perf_counter() - started)
                record.parts.append(measurement.seconds(record.seconds[-1]))
                progress = progress.after(run.training.global_batch_size)
    (folder / f"rank-{rank}.json").write_text(json.dumps(asdict(record)))
    leave()
