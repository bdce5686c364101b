"""How long a step takes: computation, communication that nothing hides, the bubble, the optimizer. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from launcher.config.layout import GroupName, Layout
from launcher.config.schema import Dtype, OptimizerName, RunConfig
from launcher.planning.cost.geometry import Chunk, Rank, kind_of
from launcher.planning.cost.measured_rates import AnyRates
from launcher.planning.cost.operations import BYTES, FP32, Collective, Operation, Sizes
from launcher.planning.cost.parts import Part, parts
from launcher.planning.cost.traffic import (
    TIED_RANKS,
    GroupShape,
    data_traffic,
    tied_traffic,
)
from launcher.planning.cost.zero_states import padded


@dataclass(frozen=True)
class Pass:
    """Seconds of one micro-batch in one direction: its computation, and what it waits for tensor ranks."""

    compute: float = 0.0
    waiting: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.waiting

    def __add__(self, other: "Pass") -> "Pass":
        return Pass(self.compute + other.compute, self.waiting + other.waiting)

    def times(self, count: int) -> "Pass":
        return Pass(self.compute * count, self.waiting * count)


def scaled(one: Pass, scale: float) -> Pass:
    """Its computation takes longer; what it waits for does not."""
    return Pass(one.compute * scale, one.waiting)


@dataclass(frozen=True)
class StageTime:
    """Of one micro-batch in one stage, in seconds."""

    forward: Pass
    backward: Pass
    sending: float  # its output on, and its gradient back

    @property
    def total(self) -> float:
        return self.forward.total + self.backward.total + self.sending


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step; the parts add up to the total."""

    compute: float
    tensor: float  # waiting for tensor ranks
    data: float  # waiting for data ranks
    pipeline: float  # sending to other stages
    bubble: float  # idle while the pipeline fills and drains, and for slower stages
    optimizer: float
    stages: tuple[StageTime, ...]  # in the order of the model

    @property
    def communication(self) -> float:
        return self.tensor + self.data + self.pipeline

    @property
    def total(self) -> float:
        return self.compute + self.communication + self.bubble + self.optimizer


def step_time(
    run: RunConfig,
    layout: Layout,
    ranks: Sequence[Rank],
    rates: AnyRates,
    groups: dict[GroupName, GroupShape],
) -> StepTime:
    """That of the slowest pipeline rank, with what it waits for the others."""
    kinds = {kind_of(rank): rank for rank in reversed(ranks)}
    sizes = Sizes.of(run, layout.device)
    times = _part_times(sizes, rates, groups["tensor"])
    send = 0.0
    if layout.pipeline > 1:
        send = rates.collective(Collective("send", sizes.stretch), groups["pipeline"])
    by_kind = {
        kind: [stage_time(times, chunk, send) for chunk in rank.chunks] for kind, rank in kinds.items()
    }
    by_rank = [by_kind[kind] for kind in map(kind_of, ranks)]
    own = [sum(stage.total for stage in stages) for stages in by_rank]
    slowest = max(range(len(ranks)), key=lambda index: own[index])
    stages, rank, batches = by_rank[slowest], ranks[slowest], layout.accumulation
    compute = sum(stage.forward.compute + stage.backward.compute for stage in stages) * batches
    if layout.zero_stage == 3:
        compute += rank.blocks * batches * rates.zero_3_block_s
    waiting = sum(stage.forward.waiting + stage.backward.waiting for stage in stages) * batches
    data = max(
        _data_waiting(run, layout, one, rates, groups, compute if kind == kind_of(rank) else 0.0)
        for kind, one in kinds.items()
    )
    # Ranks that share a processor take turns, and some of that while others would idle.
    taking_turns = compute * (rates.crowding - 1)
    return StepTime(
        compute=compute + taking_turns,
        tensor=waiting,
        data=data,
        pipeline=sum(stage.sending for stage in stages) * batches,
        bubble=max(0.0, _bubble(layout, own, by_rank) - taking_turns),
        optimizer=rates.step_s
        + rates.crowding * max(_optimizer(run, layout, one, rates) for one in kinds.values()),
        stages=_in_order(layout, by_rank),
    )


def _in_order(layout: Layout, by_rank: Sequence[Sequence[StageTime]]) -> tuple[StageTime, ...]:
    outward = [stages[0] for stages in by_rank]
    back = [stages[1] for stages in reversed(by_rank)] if layout.stages_per_rank == 2 else []
    return tuple(outward + back)


def _bubble(layout: Layout, own: Sequence[float], by_rank: Sequence[Sequence[StageTime]]) -> float:
    """1F1B: every other stage once, (p-1)/m of the step where stages are equal (arXiv 2104.04473, 2.2).

    DualPipeV without its split of the backward pass: what schedule.py's simulation gives for equal stages.
    """
    if layout.pipeline == 1:
        return 0.0
    if layout.stages_per_rank == 1:
        return sum(own) - max(own)
    stages = [stage for of_rank in by_rank for stage in of_rank]
    forward = sum(stage.forward.total for stage in stages) / len(stages)
    backward = sum(stage.backward.total for stage in stages) / len(stages)
    return 2 * (layout.pipeline - 1) * max(forward, backward) - min(forward, max(0.0, backward - forward))


@dataclass(frozen=True)
class _PartTimes:
    """Forward and backward pass of a micro-batch in each part of a model."""

    embedding: tuple[Pass, Pass]
    block: tuple[Pass, Pass]
    head: tuple[Pass, Pass]
    each: float  # seconds that any stage takes besides


@cache
def _part_times(sizes: Sizes, rates: AnyRates, tensor: GroupShape) -> _PartTimes:
    model = parts(sizes)
    scale = rates.scale(model.block.flops)

    def both(part: Part) -> tuple[Pass, Pass]:
        forward, backward = forward_pass(part.program, rates, tensor), backward_pass(part, rates, tensor)
        return scaled(forward, scale), scaled(backward, scale)

    return _PartTimes(both(model.embedding), both(model.block), both(model.head), rates.micro_batch_s)


def stage_time(times: _PartTimes, chunk: Chunk, send: float) -> StageTime:
    """`send` is the seconds to hand an activation to the next stage."""
    # Most of what it takes besides is DeepSpeed's work around the backward pass.
    forward = times.block[0].times(chunk.blocks)
    backward = times.block[1].times(chunk.blocks) + Pass(times.each)
    for (ahead, back), there in ((times.embedding, chunk.has_embedding), (times.head, chunk.has_head)):
        if there:
            forward, backward = forward + ahead, backward + back
    return StageTime(forward, backward, send * ((not chunk.has_head) + (not chunk.has_embedding)))


def forward_pass(operations: Sequence[Operation], rates: AnyRates, tensor: GroupShape) -> Pass:
    compute = waiting = 0.0
    for one in operations:
        compute += sum(rates.product(matmul) for matmul in one.forward_matmuls)
        compute += rates.moving(one.forward_bytes, one.kernels)
        waiting += sum(rates.collective(collective, tensor) for collective in one.forward_traffic)
    return Pass(compute, waiting)


def backward_pass(part: Part, rates: AnyRates, tensor: GroupShape) -> Pass:
    """With what is run again. A column layer's collective hides behind its weight's product."""
    again = forward_pass(part.again, rates, tensor)
    compute, waiting = again.compute, again.waiting
    for one in part.program:
        products = [rates.product(matmul) for matmul in one.backward_matmuls]
        compute += sum(products) + rates.moving(one.backward_bytes, 2 * one.kernels)
        waiting += sum(rates.collective(collective, tensor) for collective in one.backward_traffic)
        for collective in one.overlapped_traffic:
            seconds = rates.collective(collective, tensor)
            waiting += seconds - min(seconds, products[-1]) * rates.shares.overlap
    return Pass(compute, waiting)


def _data_waiting(
    run: RunConfig,
    layout: Layout,
    rank: Rank,
    rates: AnyRates,
    groups: dict[GroupName, GroupShape],
    compute: float,
) -> float:
    """ZeRO-3 gathers ahead of computation; all else is reduced when a backward pass has ended."""
    seconds = sum(
        rates.collective(one, groups["data"]) * count
        for one, count in data_traffic(run, layout, rank).items()
    )
    if layout.zero_stage == 3:
        seconds -= min(seconds, compute) * rates.shares.overlap
    if tied := tied_traffic(run, layout, rank):
        group = groups["pipeline"]
        pair = GroupShape(TIED_RANKS, TIED_RANKS if group.is_within_node else 1)
        seconds += rates.collective(tied, pair)
    return seconds


def _optimizer(run: RunConfig, layout: Layout, rank: Rank, rates: AnyRates) -> float:
    """Seconds that memory's bandwidth takes for the gradients' norm, clipping, and the update."""
    element, data = BYTES[run.precision.dtype], layout.data
    whole = rank.parameters
    share = (
        whole
        if layout.zero_stage == 0
        else sum(padded(sum(group), 2 * data) for group in rank.groups) // data
    )
    states = 2 if run.optimizer.name is OptimizerName.adamw else 1 if run.optimizer.momentum else 0
    # Norm: read. Clipping: read and write. Update: gradient read, weight and states read and written.
    update = share * FP32 * (1 + 2 + 1 + 2 * (1 + states))
    # Gradients laid out flat and reduced from there, and set to zero; the new weights cast and taken up.
    passes = 4 if layout.zero_stage < 3 else 2
    copies = whole * FP32 * passes + (share * (FP32 + element) if layout.zero_stage else 0)
    if run.precision.dtype is not Dtype.fp32:
        # Each micro-batch's gradients are cast and added to those in fp32.
        copies += layout.accumulation * (whole if layout.zero_stage < 3 else 0) * (element + 2 * FP32)
    if run.parallelism.offload_optimizer and layout.device == "cuda":
        # Gradients out and weights in; the update itself in the host's memory.
        return (share * (FP32 + element) + update) / rates.host + copies / rates.memory
    return (update + copies) / rates.memory
