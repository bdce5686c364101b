"""Time of a step: computation, communication that is not hidden, the bubble, the optimizer. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.planning.cost.data_exchange import Groups, data_exchange
from launcher.planning.cost.geometry import Chunk, Rank
from launcher.planning.cost.measured_rates import AnyRates
from launcher.planning.cost.operations import Collective
from launcher.planning.cost.optimizer_time import optimizer_seconds
from launcher.planning.cost.pass_time import PartTimes, PassGroups, PassTime, part_times
from launcher.planning.cost.sizes import Sizes
from launcher.planning.cost.traffic import expert_data_traffic


@dataclass(frozen=True)
class StageTime:
    """Seconds of a micro-batch in a stage."""

    forward: PassTime
    backward: PassTime
    sending: float  # sending the output forward and its gradient backward

    @property
    def total(self) -> float:
        return self.forward.total + self.backward.total + self.sending

    @property
    def both(self) -> PassTime:
        return self.forward + self.backward


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step; the parts add up to the total, which does not contain hidden seconds."""

    compute: float
    tensor: float  # waiting for tensor ranks
    context: float  # waiting for context ranks
    data: float  # waiting for data ranks
    pipeline: float  # sending to other stages
    expert: float  # exchanging rows with the other ranks of the expert group
    expert_data: float  # waiting for the ranks that hold the same experts
    bubble: float  # idle while the pipeline fills and drains, or waits for slower stages
    optimizer: float
    tensor_hidden: float  # of the slowest rank's collectives, behind its computation
    context_hidden: float
    data_hidden: float
    stages: tuple[StageTime, ...]  # in the order of the model

    @property
    def communication(self) -> float:
        within = self.tensor + self.context + self.expert
        return within + self.data + self.pipeline + self.expert_data

    @property
    def total(self) -> float:
        return self.compute + self.communication + self.bubble + self.optimizer


def step_time(
    run: RunConfig, layout: Layout, ranks: Sequence[Rank], rates: AnyRates, groups: Groups
) -> StepTime:
    """Return the time of the slowest pipeline rank, with its waits for the other ranks."""
    kinds = {rank.kind: rank for rank in reversed(ranks)}
    sizes = Sizes.of(run, layout.device)
    # ZeRO-3 gathers weights within a pass, and a stage needs each micro-batch from the stage before.
    waits = layout.pipeline > 1 or (layout.zero_stage == 3 and layout.gradient_ranks > 1)
    within = PassGroups(groups["tensor"], groups["context"])
    times = part_times(sizes, rates, within, groups["expert"], waits=waits)
    send = 0.0
    if layout.pipeline > 1:
        times = replace(times, overhead=times.overhead + rates.pipeline_batch_s)
        send = rates.collective(Collective("send", sizes.stretch), groups["pipeline"])
    by_kind = {
        kind: [stage_time(times, chunk, send) for chunk in rank.chunks] for kind, rank in kinds.items()
    }
    by_rank = [by_kind[rank.kind] for rank in ranks]
    busy = [sum(stage.total for stage in stages) for stages in by_rank]
    slowest = max(range(len(ranks)), key=lambda index: busy[index])
    stages, rank, batches = by_rank[slowest], ranks[slowest], layout.accumulation
    work = sum((stage.both for stage in stages), PassTime()).times(batches)
    exchanges = [data_exchange(run, layout, other, rates, groups, times) for other in kinds.values()]
    data = max(exchanges, key=lambda exchange: exchange.waiting)
    compute = work.compute + data.copying + rates.beside * (work.hidden + work.context_hidden + data.hidden)
    if not rates.overlaps:
        of_block = {2: rates.zero_2_block_s, 3: rates.zero_3_block_s}.get(layout.zero_stage, 0.0)
        compute += rank.blocks * batches * of_block
    pipeline = sum(stage.sending for stage in stages) * batches
    taking_turns = compute * _turns(by_rank, slowest, rates.crowding)
    update = rates.crowding * max(optimizer_seconds(run, layout, other, rates) for other in kinds.values())
    host = _host(layout, rank, rates, work.host)
    of_experts = max(_expert_data(run, layout, other, rates, groups) for other in kinds.values())
    communicating = work.waiting + work.context + work.exchanging + data.waiting + of_experts + pipeline
    device = compute + communicating + rates.step_s + update
    back = [stages[1] for stages in reversed(by_rank)] if layout.stages_per_rank == 2 else []
    return StepTime(
        compute=compute + taking_turns + max(0.0, host - device),
        tensor=work.waiting,
        context=work.context,
        data=data.waiting,
        pipeline=pipeline,
        expert=work.exchanging,
        expert_data=of_experts,
        bubble=_bubble(layout, busy, by_rank, rates.crowding),
        optimizer=rates.step_s + update,
        tensor_hidden=work.hidden,
        context_hidden=work.context_hidden,
        data_hidden=data.hidden,
        stages=(*(stages[0] for stages in by_rank), *back),
    )


def _expert_data(run: RunConfig, layout: Layout, rank: Rank, rates: AnyRates, groups: Groups) -> float:
    """Return the seconds of the reduction of the gradients of experts that ranks share."""
    calls = expert_data_traffic(run, layout, rank).items()
    return sum(rates.collective(call, groups["expert_data"]) * count for call, count in calls)


def _host(layout: Layout, rank: Rank, rates: AnyRates, starting: float) -> float:
    """Return seconds of the host in a step.

    The host works ahead of the device, so a step takes the longer time of the two.
    """
    host = starting + rates.tensor_step_s * len(rank.trained)
    if layout.zero_stage == 3:
        host += rank.blocks * layout.accumulation * rates.zero_3_block_s
    return host if rates.overlaps else 0.0


def _turns(by_rank: Sequence[Sequence[StageTime]], slowest: int, crowding: float) -> float:
    """Return the turns of other ranks on the processor of the slowest, in units of its computation.

    A rank with short stages leaves its processor to the others.
    """
    if crowding == 1:
        return 0.0
    computing = [sum(stage.both.compute for stage in stages) for stages in by_rank]
    return max(0.0, crowding * sum(computing) / len(computing) / computing[slowest] - 1)


def _bubble(
    layout: Layout, busy: Sequence[float], by_rank: Sequence[Sequence[StageTime]], crowding: float
) -> float:
    """Return idle seconds. 1F1B waits for every other stage once: (p-1)/m of a step with equal stages
    (arXiv 2104.04473, section 2.2). DualPipeV, without its split of the backward pass, waits as long as
    pipeline_schedule.py simulates for equal stages. If each pipeline has only c processors, it idles like a
    pipeline of c ranks, or longer if micro-batches are too few to fill them: simulated in
    tests/planning/test_shared_processors.py.
    """
    if layout.pipeline == 1:
        return 0.0
    processors = max(1.0, layout.pipeline / crowding)
    if layout.stages_per_rank == 1:
        if crowding == 1:
            return sum(busy) - max(busy)
        # Fewer micro-batches than processors do not fill them.
        unfilled = layout.pipeline - 1 - layout.accumulation * (crowding - 1)
        return max(processors - 1, unfilled) * sum(busy) / len(busy)
    stages = [stage for stages in by_rank for stage in stages]
    forward = sum(stage.forward.total for stage in stages) / len(stages)
    backward = sum(stage.backward.total for stage in stages) / len(stages)
    filling = 2 * (processors - 1) * max(forward, backward)
    return max(0.0, filling - min(forward, max(0.0, backward - forward)))


def stage_time(times: PartTimes, chunk: Chunk, send: float) -> StageTime:
    """Return the time of a stage; `send` is the seconds to send an activation to the next stage."""
    # Most of the overhead is DeepSpeed's work around the backward pass.
    sparse = sum(chunk.kinds)
    forward, backward = (
        dense.times(chunk.blocks - sparse) + other.times(sparse)
        for dense, other in zip(times.dense, times.sparse, strict=True)
    )
    backward = backward + PassTime(times.overhead)
    for (ahead, back), is_here in ((times.embedding, chunk.has_embedding), (times.head, chunk.has_head)):
        if is_here:
            forward, backward = forward + ahead, backward + back
    return StageTime(forward, backward, send * ((not chunk.has_head) + (not chunk.has_embedding)))
