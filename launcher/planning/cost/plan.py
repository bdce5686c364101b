"""What a run will need and take, before it is started: memory, traffic and time of every stage. Pure."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from launcher.config.layout import GROUPS, GroupName, Layout
from launcher.config.schema import RunConfig
from launcher.config.shape import sequence_length
from launcher.config.world import World
from launcher.models.arithmetic import parameters, train_flops_per_token
from launcher.planning.cost.geometry import pipeline_ranks
from launcher.planning.cost.measured_rates import rates_of
from launcher.planning.cost.memory import Memory, rank_memory
from launcher.planning.cost.operations import Collective, Sizes
from launcher.planning.cost.parts import flops, parts
from launcher.planning.cost.rates import Shares
from launcher.planning.cost.step_time import StepTime, step_time
from launcher.planning.cost.traffic import (
    GroupShape,
    data_traffic,
    group_shapes,
    pipeline_traffic,
    tensor_traffic,
)

PROCESS_BYTES = 400_000_000  # of a CPU rank beside its tensors: the interpreter, torch, DeepSpeed


@dataclass(frozen=True)
class StagePlan:
    """One pipeline rank, of the tensor and data rank that need most."""

    blocks: int
    parameters: int  # that one tensor rank holds
    flops: int  # of one rank in a step, recomputation included
    memory: Memory


@dataclass(frozen=True)
class GroupTraffic:
    """What one rank sends over one group in a step: that of the stage which sends most."""

    shape: GroupShape
    collectives: Counter[Collective]

    @property
    def sent(self) -> float:
        """Bytes."""
        return sum(one.sent(self.shape.ranks) * count for one, count in self.collectives.items())


@dataclass(frozen=True)
class Plan:
    run: RunConfig
    layout: Layout
    budget: float | None  # bytes of one accelerator, where that is known
    stages: tuple[StagePlan, ...]
    traffic: dict[GroupName, GroupTraffic]
    time: StepTime | None  # None where the hardware's speed is not known

    @property
    def world(self) -> World:
        """The ranks of the layout: what else could run on them."""
        per_node = ranks_per_node(self.run, self.layout)
        return World(self.layout.device, self.layout.world_size, per_node, fixed=True)

    @property
    def fits(self) -> bool:
        """True, too, where the budget is not known."""
        return not self.shortages

    @cached_property
    def shortages(self) -> dict[int, float]:
        """Bytes that are missing, by pipeline rank."""
        if self.budget is None:
            return {}
        missing = {index: stage.memory.total - self.budget for index, stage in enumerate(self.stages)}
        return {index: size for index, size in missing.items() if size > 0}

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return parameters(self.run.model)

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.run.training.global_batch_size * sequence_length(self.run)

    @property
    def model_flops(self) -> int:
        """Of a step over all ranks, without recomputation."""
        return round(train_flops_per_token(self.run.model, sequence_length(self.run)) * self.tokens)

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.time.total if self.time else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over what the accelerators could do meanwhile (PaLM, arXiv 2204.02311, appendix B)."""
        peak = getattr(self.run.hardware.peak_flops, self.run.precision.dtype.name)
        if self.time is None or peak is None:
            return None
        return float(self.model_flops / (self.time.total * peak * self.layout.world_size))

    @property
    def bubble(self) -> float | None:
        """Idle time over the time that computing would take without any: (p-1)/m of equal stages."""
        if self.layout.pipeline == 1:
            return 0.0
        if self.time is None:
            return None
        return self.time.bubble / (self.time.compute + self.time.tensor + self.time.pipeline)


def make_plan(
    run: RunConfig, layout: Layout, *, budget: float | None = None, shares: Shares | None = None
) -> Plan:
    """The plan of a validated run. `budget` is that of `memory_budget`."""
    ranks = pipeline_ranks(run, layout)
    groups = group_shapes(layout, ranks_per_node(run, layout))
    model = parts(Sizes.of(run, layout.device))
    stages = tuple(
        StagePlan(
            rank.blocks,
            rank.parameters,
            sum(flops(model.of(chunk)) for chunk in rank.chunks) * layout.accumulation,
            rank_memory(run, layout, rank),
        )
        for rank in ranks
    )
    of_each = {"tensor": tensor_traffic, "data": data_traffic, "pipeline": pipeline_traffic}
    traffic = {
        name: max(
            (GroupTraffic(groups[name], of_each[name](run, layout, rank)) for rank in ranks),
            key=lambda one: one.sent,
        )
        for name in GROUPS
    }
    rates = rates_of(run.hardware, run.precision.dtype, layout.world_size, shares)
    return Plan(
        run=run,
        layout=layout,
        budget=budget,
        stages=stages,
        traffic=traffic,
        time=step_time(run, layout, ranks, rates, groups) if rates else None,
    )


def ranks_per_node(run: RunConfig, layout: Layout) -> int:
    """Of the hardware where that is said; else all ranks are on one node."""
    return run.hardware.accelerators_per_node or layout.world_size


def memory_budget(run: RunConfig, world: World, ranks: int) -> float | None:
    """Return the bytes of memory for one of `ranks`: of the config, else of what the ranks of a node share.

    None where neither is known.
    """
    if run.hardware.memory_bytes is not None:
        return run.hardware.memory_bytes
    if world.memory_bytes is None:
        return None
    return world.memory_bytes / (world.ranks_per_node if world.fixed else ranks) - PROCESS_BYTES
