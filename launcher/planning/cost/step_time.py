"""Time of a step: computation, communication that is not hidden, the bubble, the optimizer. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from launcher.config.layout import GroupName, Layout
from launcher.config.schema import Dtype, RunConfig, StatesDtype
from launcher.planning.cost.geometry import Chunk, Rank, kind_of
from launcher.planning.cost.measured_rates import AnyRates
from launcher.planning.cost.operations import BYTES, FP32, Collective, Operation
from launcher.planning.cost.parts import ModelPart, parts
from launcher.planning.cost.sizes import Sizes
from launcher.planning.cost.traffic import TIED_RANKS, GroupShape, data_traffic, tied_traffic
from launcher.planning.cost.zero_states import padded, state_count

# Bytes that a stochastic update moves per element, for the weight and for each state: compiled, in one pass;
# eager, in passes over fp32 values and 64-bit counters.
COMPILED_UPDATE, EAGER_UPDATE = 12, 200


@dataclass(frozen=True)
class PassTime:
    """Seconds of a micro-batch in one direction: its computation, and its wait for tensor ranks."""

    compute: float = 0.0
    waiting: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.waiting

    def __add__(self, other: "PassTime") -> "PassTime":
        return PassTime(self.compute + other.compute, self.waiting + other.waiting)

    def times(self, count: int) -> "PassTime":
        return PassTime(self.compute * count, self.waiting * count)


def scaled(seconds: PassTime, scale: float) -> PassTime:
    """Multiply the seconds of computation, and not the wait."""
    return PassTime(seconds.compute * scale, seconds.waiting)


@dataclass(frozen=True)
class StageTime:
    """Seconds of a micro-batch in a stage."""

    forward: PassTime
    backward: PassTime
    sending: float  # of its output forward and its gradient backward

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
    bubble: float  # idle while the pipeline fills and drains, or waits for slower stages
    optimizer: float
    stages: tuple[StageTime, ...]  # in the order of the model

    @property
    def communication(self) -> float:
        return self.tensor + self.data + self.pipeline

    @property
    def total(self) -> float:
        return self.compute + self.communication + self.bubble + self.optimizer


Groups = dict[GroupName, GroupShape]


def step_time(
    run: RunConfig, layout: Layout, ranks: Sequence[Rank], rates: AnyRates, groups: Groups
) -> StepTime:
    """Return the time of the slowest pipeline rank, with its waits for the other ranks."""
    kinds = {kind_of(rank): rank for rank in reversed(ranks)}
    sizes = Sizes.of(run, layout.device)
    times = _part_times(sizes, rates, groups["tensor"])
    send = 0.0
    if layout.pipeline > 1:
        send = rates.collective(Collective("send", sizes.stretch), groups["pipeline"])
    by_kind = {
        kind: [stage_time(times, chunk, send) for chunk in rank.chunks] for kind, rank in kinds.items()
    }
    by_rank = [by_kind[kind_of(rank)] for rank in ranks]
    busy = [sum(stage.total for stage in stages) for stages in by_rank]
    slowest = max(range(len(ranks)), key=lambda index: busy[index])
    stages, rank, batches = by_rank[slowest], ranks[slowest], layout.accumulation
    compute = sum(stage.forward.compute + stage.backward.compute for stage in stages) * batches
    if layout.zero_stage == 3:
        compute += rank.blocks * batches * rates.zero_3_block_s
    waiting = sum(stage.forward.waiting + stage.backward.waiting for stage in stages) * batches
    data = max(
        _data_waiting(run, layout, other, rates, groups, compute if kind == kind_of(rank) else 0.0)
        for kind, other in kinds.items()
    )
    # Ranks that share a processor take turns, partly in time that would be idle otherwise.
    taking_turns = compute * (rates.crowding - 1)
    update = rates.crowding * max(_optimizer(run, layout, other, rates) for other in kinds.values())
    back = [stages[1] for stages in reversed(by_rank)] if layout.stages_per_rank == 2 else []
    return StepTime(
        compute=compute + taking_turns,
        tensor=waiting,
        data=data,
        pipeline=sum(stage.sending for stage in stages) * batches,
        bubble=max(0.0, _bubble(layout, busy, by_rank) - taking_turns),
        optimizer=rates.step_s + update,
        stages=(*(stages[0] for stages in by_rank), *back),
    )


def _bubble(layout: Layout, busy: Sequence[float], by_rank: Sequence[Sequence[StageTime]]) -> float:
    """Return idle seconds. 1F1B waits for every other stage once: (p-1)/m of a step with equal stages
    (arXiv 2104.04473, section 2.2). DualPipeV, without its split of the backward pass, waits as long as
    pipeline_schedule.py simulates for equal stages.
    """
    if layout.pipeline == 1:
        return 0.0
    if layout.stages_per_rank == 1:
        return sum(busy) - max(busy)
    stages = [stage for stages in by_rank for stage in stages]
    forward = sum(stage.forward.total for stage in stages) / len(stages)
    backward = sum(stage.backward.total for stage in stages) / len(stages)
    return 2 * (layout.pipeline - 1) * max(forward, backward) - min(forward, max(0.0, backward - forward))


@dataclass(frozen=True)
class _PartTimes:
    """Forward and backward pass of a micro-batch, for each part of a model."""

    embedding: tuple[PassTime, PassTime]
    block: tuple[PassTime, PassTime]
    head: tuple[PassTime, PassTime]
    overhead: float  # of a micro-batch in any stage


@cache
def _part_times(sizes: Sizes, rates: AnyRates, tensor: GroupShape) -> _PartTimes:
    model = parts(sizes)
    scale = rates.scale(model.block.flops)

    def both(part: ModelPart) -> tuple[PassTime, PassTime]:
        forward, backward = forward_pass(part.program, rates, tensor), backward_pass(part, rates, tensor)
        return scaled(forward, scale), scaled(backward, scale)

    return _PartTimes(both(model.embedding), both(model.block), both(model.head), rates.micro_batch_s)


def stage_time(times: _PartTimes, chunk: Chunk, send: float) -> StageTime:
    """Return the time of a stage; `send` is the seconds to send an activation to the next stage."""
    # Most of the overhead is DeepSpeed's work around the backward pass.
    forward = times.block[0].times(chunk.blocks)
    backward = times.block[1].times(chunk.blocks) + PassTime(times.overhead)
    for (ahead, back), is_here in ((times.embedding, chunk.has_embedding), (times.head, chunk.has_head)):
        if is_here:
            forward, backward = forward + ahead, backward + back
    return StageTime(forward, backward, send * ((not chunk.has_head) + (not chunk.has_embedding)))


def forward_pass(operations: Sequence[Operation], rates: AnyRates, tensor: GroupShape) -> PassTime:
    compute = waiting = 0.0
    for operation in operations:
        compute += sum(rates.product(matmul) for matmul in operation.forward_matmuls)
        compute += rates.moving(operation.forward_bytes, operation.kernels)
        waiting += sum(rates.collective(collective, tensor) for collective in operation.forward_traffic)
    return PassTime(compute, waiting)


def backward_pass(part: ModelPart, rates: AnyRates, tensor: GroupShape) -> PassTime:
    """Return the time with recomputation. A column layer's collective overlaps its weight's product."""
    again = forward_pass(part.again, rates, tensor)
    compute, waiting = again.compute, again.waiting
    for operation in part.program:
        products = [rates.product(matmul) for matmul in operation.backward_matmuls]
        compute += sum(products) + rates.moving(operation.backward_bytes, 2 * operation.kernels)
        waiting += sum(rates.collective(collective, tensor) for collective in operation.backward_traffic)
        for collective in operation.overlapped_traffic:
            seconds = rates.collective(collective, tensor)
            waiting += seconds - min(seconds, products[-1]) * rates.shares.overlap
    return PassTime(compute, waiting)


def _data_waiting(
    run: RunConfig, layout: Layout, rank: Rank, rates: AnyRates, groups: Groups, compute: float
) -> float:
    """Return the wait for data ranks. Only ZeRO-3 overlaps its communication with computation."""
    calls = data_traffic(run, layout, rank).items()
    seconds = sum(rates.collective(call, groups["data"]) * count for call, count in calls)
    if layout.zero_stage == 3:
        seconds -= min(seconds, compute) * rates.shares.overlap
    if tied := tied_traffic(run, layout, rank):
        group = groups["pipeline"]
        pair = GroupShape(TIED_RANKS, TIED_RANKS if group.is_within_node else 1)
        seconds += rates.collective(tied, pair)
    return seconds


def _optimizer(run: RunConfig, layout: Layout, rank: Rank, rates: AnyRates) -> float:
    """Return seconds of memory traffic for the norm of the gradients, clipping, and the update."""
    element, data = BYTES[run.precision.dtype], layout.data
    whole = share = rank.parameters
    if layout.zero_stage > 0:
        share = sum(padded(sum(group), 2 * data) for group in rank.groups) // data
    states = state_count(run.optimizer)
    if run.precision.states is StatesDtype.bf16:
        # Norm and reduction of bf16 gradients, and the passes of the update over its chunks.
        passes = 1 + (2 if layout.zero_stage < 3 else 1)
        update = COMPILED_UPDATE if layout.compiled and layout.device == "cuda" else EAGER_UPDATE
        return (whole * element * passes + share * update * (1 + states)) / rates.memory
    # Norm: read. Clipping: read and write. Update: read gradients, read and write weights and states.
    update = share * FP32 * (1 + 2 + 1 + 2 * (1 + states))
    # Gradients are copied into a flat buffer, reduced and set to zero; new weights are cast and copied.
    passes = 4 if layout.zero_stage < 3 else 2
    copies = whole * FP32 * passes + (share * (FP32 + element) if layout.zero_stage else 0)
    if run.precision.dtype is not Dtype.fp32:
        # The gradients of each micro-batch are cast and added to the fp32 gradients.
        copies += layout.accumulation * (whole if layout.zero_stage < 3 else 0) * (element + 2 * FP32)
    if run.parallelism.offload_optimizer and layout.device == "cuda":
        # Gradients go to the host and weights come back; the update runs in the host's memory.
        return (share * (FP32 + element) + update) / rates.host + copies / rates.memory
    return (update + copies) / rates.memory
