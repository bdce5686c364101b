"""Train a layout on this machine and combine the records of its ranks."""

import json
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

from launcher.checkpoint.sources import WeightSource
from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.launch.local import run_local_ranks, start_method_for
from launcher.launch.scratch import scratch_directory
from launcher.planning.cost.operations import Collective

if TYPE_CHECKING:
    from launcher.compare.rank_record import RankRecord


@dataclass(frozen=True)
class MeasuredLayout:
    """Measurement of a layout. Seconds are medians; `parts` is of the rank that computes longest."""

    losses: list[float]
    seconds: float
    parts: dict[str, float]
    memory: int  # peak bytes of tensors on the rank with the highest peak
    sent: dict[str, float]  # bytes per step by group, of the rank that sends most in that group


def measure_layout(
    run: RunConfig, layout: Layout, initial: WeightSource | None, *, steps: int
) -> MeasuredLayout:
    """Train from the weights in `initial`, or else from drawn weights, and measure.

    Raises what run_local_ranks raises. The caller has called prepare_deepspeed.
    """
    from launcher.compare.rank_record import RankRecord, record_rank

    with scratch_directory() as folder:
        target = partial(record_rank, run=run, layout=layout, initial=initial, steps=steps, folder=folder)
        start_method = start_method_for(layout.device)
        run_local_ranks(
            target,
            layout.world_size,
            log_dir=folder / "logs",
            start_method=start_method,
            stopped_limit=60 * run.launch.timeout_minutes,
        )
        records = [folder / f"rank-{rank}.json" for rank in range(layout.world_size)]
        return combined(layout, [RankRecord(**json.loads(record.read_text())) for record in records])


def combined(layout: Layout, ranks: list["RankRecord"]) -> MeasuredLayout:
    """Combine the records of all ranks. Pure."""
    busiest = max(ranks, key=lambda rank: median(parts["compute"] for parts in rank.parts))
    sizes = {
        "tensor": layout.tensor,
        "context": layout.context,
        "data": layout.gradient_ranks,
        "pipeline": layout.pipeline,
    }
    if layout.expert > 1:
        sizes |= {"expert": layout.expert, "expert_data": layout.expert_holders}
    return MeasuredLayout(
        losses=ranks[0].losses,
        seconds=median(ranks[0].seconds),
        parts={name: median(parts[name] for parts in busiest.parts) for name in busiest.parts[0]},
        memory=max(rank.memory for rank in ranks),
        sent={group: max(_sent(rank, group, size) for rank in ranks) for group, size in sizes.items()},
    )


def _sent(rank: "RankRecord", group: str, ranks: int) -> float:
    calls = [call[1:] for call in rank.collectives if call[0] == group]
    return sum(Collective(kind, size).sent(ranks) * times for kind, size, times in calls)
