"""One rank of a compared layout: trains some steps, and writes down losses, times, memory and traffic."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

# Some of it is imported at the first operation under a dispatch mode, and ZeRO-3 wraps what it would find.
import torch._dynamo
import torch.distributed as dist

from launcher.compare.stopwatch import Stopwatch
from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.data.open import open_data
from launcher.engine.base import Engine
from launcher.engine.build import build_engine
from launcher.engine.distributed import join, leave
from launcher.runtime.saving import start_from
from launcher.runtime.train import loader_of, train_step
from launcher.tracing.allocations import Allocations

ACCOUNTED = 4  # steps whose memory and traffic are counted; the first makes the optimizer's states
NOISE = 64  # bytes: norms, flags and losses are reduced too
WAITS = ("tensor", "data", "pipeline")


@dataclass
class Recorded:
    """Of one rank: per step, and at the most. Seconds and bytes."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of the steps after the accounted ones
    parts: list[dict[str, float]] = field(default_factory=list)  # of the same steps
    memory: int = 0
    sent: dict[str, list[tuple[str, int, int]]] = field(default_factory=dict)  # by group: kind, size, times


def record_rank(rank: int, *, run: RunConfig, layout: Layout, steps: int, folder: Path) -> None:
    """Train ACCOUNTED and then `steps` more; write folder/rank-N.json. Collective over the world."""
    torch.set_num_threads(1)  # in every layout
    groups: dict[str, str] = {}
    watch, found = Stopwatch(lambda group: _name_of(group, groups)), Recorded()
    with watch.timing_collectives():
        device = join(
            rank=rank,
            world_size=layout.world_size,
            local_rank=rank,
            device=layout.device,
            init_method=f"file://{folder / 'store'}",
        )
        with Allocations(lambda group: groups.get(group.group_name)) as allocations:
            engine = build_engine(run, layout, device)
            groups |= group_names(engine)
            data = open_data(run)
            progress, _ = start_from(run, engine, None, None, data.digests)
            loader = loader_of(run, engine, data.blend(progress.blends))
            peaks = []
            for _ in range(ACCOUNTED):
                allocations.restart()
                found.losses.append(train_step(run, layout, engine, loader, progress)["train/loss"])
                progress = progress.after(run.training.global_batch_size)
                peaks.append(allocations.peak)
        # Now and then gloo's threads let go of a gradient only after the next one is made.
        found.memory, found.sent = min(peaks[1:]), _sent(allocations)
        with loader, timed_optimizer(engine, watch):
            for _ in range(steps):
                dist.barrier()
                watch.restart()
                started = time.perf_counter()
                found.losses.append(train_step(run, layout, engine, loader, progress)["train/loss"])
                found.seconds.append(time.perf_counter() - started)
                found.parts.append(_parts(found.seconds[-1], watch.seconds))
                progress = progress.after(run.training.global_batch_size)
    (folder / f"rank-{rank}.json").write_text(json.dumps(asdict(found)))
    leave()


def group_names(engine: Engine) -> dict[str, str]:
    """Tensor, data or pipeline, by torch's name of a group: of ours, and those DeepSpeed's pipeline makes."""
    mesh = engine.mesh
    found: dict[str, str] = {}
    grid = getattr(engine.deepspeed, "grid", None)
    if grid is not None:
        assert dist.group.WORLD is not None
        found[dist.group.WORLD.group_name] = "pipeline"  # over which stages send to each other
        found[grid.get_data_parallel_group().group_name] = "data"
        for tied in engine.module.tied_comms.values():  # type: ignore[operator]
            if len(tied["ranks"]) > 1:  # under DualPipeV both ends are on one
                found[tied["group"].group_name] = "pipeline"
    for name, axis in (("tensor", mesh.tensor), ("data", mesh.data)):
        assert axis.group is not None
        found[axis.group.group_name] = name
    return found


def _name_of(group: dist.ProcessGroup | None, names: dict[str, str]) -> str:
    known = names.get(group.group_name, "") if group is not None else ""
    # Without a group it is the whole world: a pipeline's sends, or a number that all ranks agree on.
    return known or ("pipeline" if "pipeline" in names.values() else "data")


@contextmanager
def timed_optimizer(engine: Engine, watch: Stopwatch) -> Iterator[None]:
    """DeepSpeed's step put down to the optimizer, but for what it waits for others."""
    own = engine.deepspeed
    step = own._take_model_step
    own._take_model_step = watch.within("optimizer", step)
    try:
        yield
    finally:
        own._take_model_step = step


def _parts(elapsed: float, seconds: dict[str, float]) -> dict[str, float]:
    """Those of `seconds`, and computation: what is left."""
    parts = {name: seconds.get(name, 0.0) for name in (*WAITS, "optimizer")}
    return {"compute": elapsed - sum(parts.values()), **parts}


def _sent(allocations: Allocations) -> dict[str, list[tuple[str, int, int]]]:
    found: dict[str, list[tuple[str, int, int]]] = {}
    for (group, one), count in allocations.collectives.items():
        if one.size > NOISE:
            # A tied weight's gradient is reduced between two ranks: each sends as much as that is.
            kind = "send" if group == "pipeline" else one.kind
            found.setdefault(group, []).append((kind, one.size, count))
    return found
