"""Plan a run: memory, traffic and time of every stage, before anything is started. Pure."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from launcher.config.layout import EXPERT_GROUPS, GROUPS, GroupName, Layout
from launcher.config.schema import RunConfig
from launcher.config.shape import sequence_length
from launcher.config.world import World
from launcher.models.arithmetic import active_parameters, mfu, parameters, step_flops
from launcher.planning.cost.geometry import pipeline_ranks
from launcher.planning.cost.measured_rates import rates_of
from launcher.planning.cost.memory import Memory, rank_memories
from launcher.planning.cost.operations import Collective
from launcher.planning.cost.parts import flops, parts
from launcher.planning.cost.rates import Shares
from launcher.planning.cost.sizes import Sizes
from launcher.planning.cost.step_time import StepTime, step_time
from launcher.planning.cost.traffic import TRAFFIC, GroupShape, group_shapes

PROCESS_BYTES = 400_000_000  # of a rank without its tensors: the interpreter, torch, DeepSpeed


@dataclass(frozen=True)
class StagePlan:
    """Costs of a pipeline rank, for the tensor and data rank that needs most."""

    blocks: int
    parameters: int  # held by a tensor rank
    flops: int  # of a rank in a step, with recomputation
    memory: Memory


@dataclass(frozen=True)
class GroupTraffic:
    """Collectives of a rank over a group in a step, for the stage that sends most."""

    shape: GroupShape
    collectives: Counter[Collective]

    @property
    def sent(self) -> float:
        """Bytes that the rank sends in a step."""
        ranks = self.shape.ranks
        return sum(collective.sent(ranks) * count for collective, count in self.collectives.items())


@dataclass(frozen=True)
class Plan:
    run: RunConfig
    layout: Layout
    budget: float | None  # bytes of an accelerator; None if not known
    stages: tuple[StagePlan, ...]
    traffic: dict[GroupName, GroupTraffic]
    time: StepTime | None  # None if the speed of the hardware is not known

    @property
    def world(self) -> World:
        """Return the fixed world of the layout's ranks, in which other layouts could run."""
        per_node = ranks_per_node(self.run, self.layout)
        return World(self.layout.device, self.layout.world_size, per_node, fixed=True)

    @property
    def peak(self) -> float:
        """Peak memory per rank in bytes, of the stage that needs most."""
        return max(stage.memory.total for stage in self.stages)

    @property
    def host(self) -> int:
        """Peak host memory per rank on a GPU in bytes, of the stage that needs most."""
        return max(stage.memory.on_host for stage in self.stages)

    @property
    def host_budget(self) -> float | None:
        return host_budget(self.run, self.layout)

    @property
    def fits(self) -> bool:
        """Whether no stage exceeds the budget of its device or its host; true without known budgets."""
        return not self.shortages and (self.host_budget is None or self.host <= self.host_budget)

    @cached_property
    def shortages(self) -> dict[int, float]:
        """Bytes above the budget, by pipeline rank, for the ranks that do not fit."""
        if self.budget is None:
            return {}
        missing = {index: stage.memory.total - self.budget for index, stage in enumerate(self.stages)}
        return {index: size for index, size in missing.items() if size > 0}

    @property
    def parameters(self) -> int:
        return parameters(self.run.model)

    @property
    def active_parameters(self) -> int:
        """Parameters that compute a token."""
        return active_parameters(self.run.model)

    @property
    def tokens(self) -> int:
        return self.run.training.global_batch_size * sequence_length(self.run)

    @property
    def model_flops(self) -> int:
        """FLOPs of a step over all ranks, without recomputation."""
        return round(step_flops(self.run))

    @property
    def tokens_per_s(self) -> float | None:
        return self.tokens / self.time.total if self.time else None

    @property
    def mfu(self) -> float | None:
        return mfu(self.run, self.layout.world_size, self.time.total) if self.time else None

    @property
    def bubble(self) -> float | None:
        """Share of the step in which the pipeline idles."""
        if self.layout.pipeline == 1 or self.time is None:
            return 0.0 if self.layout.pipeline == 1 else None
        return self.time.bubble / self.time.total


def make_plan(
    run: RunConfig, layout: Layout, *, budget: float | None = None, shares: Shares | None = None
) -> Plan:
    """Plan a validated run; `budget` comes from `memory_budget`."""
    ranks = pipeline_ranks(run, layout)
    groups = group_shapes(layout, ranks_per_node(run, layout))
    model = parts(Sizes.of(run, layout.device))
    stages, traffic = [], {}
    for rank, memory in zip(ranks, rank_memories(run, layout, ranks), strict=True):
        executed = sum(flops(model.of(chunk)) for chunk in rank.chunks) * layout.accumulation
        stages.append(StagePlan(rank.blocks, rank.parameters, executed, memory))
    used = [group for group in GROUPS if layout.expert > 1 or group not in EXPERT_GROUPS]
    for group in used:
        of_ranks = [GroupTraffic(groups[group], TRAFFIC[group](run, layout, rank)) for rank in ranks]
        traffic[group] = max(of_ranks, key=lambda traffic: traffic.sent)
    rates = rates_of(run.hardware, run.precision.dtype, layout.world_size, shares)
    time = step_time(run, layout, ranks, rates, groups) if rates else None
    return Plan(run, layout, budget, tuple(stages), traffic, time)


def ranks_per_node(run: RunConfig, layout: Layout) -> int:
    """Return accelerators per node from the config; without them, all ranks are on one node."""
    return run.hardware.accelerators_per_node or layout.world_size


def host_budget(run: RunConfig, layout: Layout) -> float | None:
    """Return the bytes of host memory for one rank on a GPU, beside its process; None if unknown."""
    if layout.device == "cpu" or run.hardware.host_memory_bytes is None:
        return None
    here = min(ranks_per_node(run, layout), layout.world_size)
    return max(0.0, run.hardware.host_memory_bytes / here - PROCESS_BYTES)


def memory_budget(run: RunConfig, world: World, ranks: int) -> float | None:
    """Return the bytes for one of `ranks`: set in the config, else a share of its node; None if unknown."""
    if run.hardware.memory_bytes is not None:
        return run.hardware.memory_bytes
    if world.memory_bytes is None:
        return None
    on_a_node = world.ranks_per_node if world.fixed or run.hardware.nodes > 1 else ranks
    return max(0.0, world.memory_bytes / on_a_node - PROCESS_BYTES)
