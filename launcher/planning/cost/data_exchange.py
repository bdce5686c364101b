"""Seconds of the collectives over the data ranks in a step: hidden by computation, and waited for. Pure."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from launcher.config.layout import GroupName, Layout
from launcher.config.schema import RunConfig
from launcher.parallel.buckets import reduces_during_backward
from launcher.planning.cost.buffers import BufferSizes
from launcher.planning.cost.geometry import Rank, block_parameters, parameters_of_block
from launcher.planning.cost.measured_rates import AnyRates
from launcher.planning.cost.operations import BYTES, FP32, Collective, CollectiveKind
from launcher.planning.cost.overlap import LayerCost, micro_batch
from launcher.planning.cost.pass_time import PartTimes
from launcher.planning.cost.traffic import TIED_RANKS, GroupShape, data_traffic, pieces, tied_traffic
from launcher.planning.cost.zero_states import fetches_blocks_ahead, fetches_per_block, reduced_buckets

Groups = dict[GroupName, GroupShape]
# Times that ZeRO-3 reads or writes a weight or its gradient in memory for a micro-batch: each of two gathers
# joins the pieces (partition_parameters.py, AllGatherCoalescedHandle.wait); the reduction joins and then
# divides the gradients (runtime/comm/coalesced_collectives.py, reduce_scatter_coalesced).
GATHER_COPIES, REDUCTION_COPIES = 2 * 2, 2 + 2
# Bytes of an element over the link to the host when ZeRO-3 adds a gradient to its fp32 sum there: it comes to
# the device, where the gradient is added, and goes back (runtime/zero/stage3.py, partition_grads).
HOST_SUM = 2 * FP32


@dataclass(frozen=True)
class DataExchange:
    """Seconds of the collectives over the data ranks in a step."""

    waiting: float
    hidden: float = 0.0  # hidden behind the computation of other layers
    copying: float = 0.0  # copying the tensors that are sent and received


def data_exchange(
    run: RunConfig, layout: Layout, rank: Rank, rates: AnyRates, groups: Groups, times: PartTimes
) -> DataExchange:
    """Return the wait for data ranks, and the seconds of their collectives that computation hides.

    Without a pipeline, ZeRO-0 and BF16_Optimizer reduce within the last backward pass
    (engine/overlapped_reduction.py), in a pipeline after it. In other stages DeepSpeed reduces on the stream
    that computes unless `overlap_comm` is set, which is its default under ZeRO-3 alone
    (runtime/zero/config.py, overlap_comm_valid).
    """
    calls = data_traffic(run, layout, rank).items()
    seconds = sum(rates.collective(call, groups["data"]) * count for call, count in calls)
    hidden = 0.0
    buffers = BufferSizes.of(run, layout)
    overlaps = (
        layout.zero_stage == 3
        or (layout.zero_stage == 2 and buffers.reduce_buffers == 2)
        or reduces_during_backward(run, layout)
    )
    if overlaps and rates.overlaps:
        simulated = _simulated(run, layout, rank, rates, groups["data"], times)
        # Collectives after the micro-batches: gathers of weights that stay whole, or of updated weights.
        after = max(0.0, seconds - simulated.hidden - simulated.waiting)
        seconds, hidden = simulated.waiting + after, simulated.hidden
    copied = 0.0
    if layout.zero_stage == 3 and rates.overlaps:
        copies = GATHER_COPIES * rank.parameters + REDUCTION_COPIES * rank.trained_parameters
        copied = layout.accumulation * BYTES[run.precision.dtype] * copies / rates.memory
    if tied := tied_traffic(run, layout, rank):
        group = groups["pipeline"]
        pair = GroupShape(TIED_RANKS, TIED_RANKS if group.is_within_node else 1)
        seconds += rates.collective(tied, pair)
    return DataExchange(seconds, hidden, copied)


def _simulated(
    run: RunConfig, layout: Layout, rank: Rank, rates: AnyRates, data: GroupShape, times: PartTimes
) -> DataExchange:
    """Return the collectives of all micro-batches of a rank without a pipeline, by simulation.

    ZeRO-0 and BF16_Optimizer have some in the last micro-batch only.
    """
    buffers, element = BufferSizes.of(run, layout), BYTES[run.precision.dtype]
    reduced, bucket = rank.trained_parameters - rank.distributed_parameters, buffers.reduce_bucket
    times_in_step = layout.accumulation
    if reduces_during_backward(run, layout):
        bucket = max(1, -(-reduced // max(1, len(reduced_buckets(rank, bucket)))))
        times_in_step = 1
    partitions, offloads = layout.zero_stage == 3, run.parallelism.offload_parameters
    sums_on_host = partitions and run.parallelism.offload_optimizer
    block = block_parameters(rank.model, rank.tensor)
    block += 0 if rank.trains_whole_model else rank.trained_of_block(False)
    at_once = max(buffers.prefetch_bucket, block // fetches_per_block(run, layout))

    def seconds(kind: CollectiveKind, elements: int, at_once: int) -> float:
        sent = ((Collective(kind, element * size), count) for size, count in pieces(elements, at_once))
        return sum(count * rates.collective(call, data) for call, count in sent)

    @cache
    def gather(elements: int) -> float:
        if not partitions:
            return 0.0
        # Offloaded partitions first come over the link to the host.
        from_host = element * elements / layout.gradient_ranks / rates.host if offloads else 0.0
        return seconds("all_gather", elements, at_once) + from_host

    kind: CollectiveKind = "reduce_scatter" if partitions else "all_reduce"

    def reduction(elements: int) -> float:
        reducing = rates.collective(Collective(kind, element * elements), data)
        return reducing + (HOST_SUM * elements / layout.gradient_ranks / rates.host if sums_on_host else 0.0)

    # The weights that the forward pass used last are still there for the backward pass.
    kept = min(rank.blocks, buffers.max_live // block)
    layers = _layers(rank, times, gather, kept=kept, host=rates.zero_3_block_s if partitions else 0.0)
    ahead = max(1, buffers.max_live // block if fetches_blocks_ahead(run, layout, buffers) else 1)
    end = micro_batch(layers, ahead=ahead, bucket=bucket, reduction=reduction)
    link = sum(layer.gather + layer.gather_again for layer in layers)
    link += sum(count * reduction(size) for size, count in pieces(reduced, bucket))
    waiting = end - sum(layer.forward + layer.backward for layer in layers)
    hidden = max(0.0, link - waiting)
    return DataExchange(max(0.0, waiting) * times_in_step, hidden * times_in_step)


def _layers(
    rank: Rank, times: PartTimes, gather: Callable[[int], float], *, kept: int, host: float
) -> list[LayerCost]:
    """Return embedding, blocks and head. `gather` returns the seconds to gather a number of elements.

    The weights of the last `kept` blocks are gathered once. `host` is the least seconds for a block.
    """
    held = [_block_size(rank, has_experts) for has_experts in rank.kinds]
    ends = rank.parameters - sum(held)
    embedding = min(ends, rank.parameters_of_embedding)
    of_embedding = gather(embedding)
    reduced_ends = (embedding, ends - embedding) if rank.trains_whole_model else (0, 0)
    layers = [
        LayerCost(
            times.embedding[0].total, times.embedding[1].total, reduced_ends[0], of_embedding, of_embedding
        )
    ]
    for index, has_experts in enumerate(rank.kinds):
        passes = times.sparse if has_experts else times.dense
        forward, backward = (
            max(part.total, host * share) for part, share in zip(passes, (1 / 3, 2 / 3), strict=True)
        )
        gathers = gather(held[index]), 0.0 if index >= rank.blocks - kept else gather(held[index])
        reduced = rank.trained_of_block(has_experts) - (rank.distributed_of_block if has_experts else 0)
        layers.append(LayerCost(forward, backward, reduced, *gathers))
    head = times.head
    layers.append(LayerCost(head[0].total, head[1].total, reduced_ends[1], gather(ends - embedding)))
    return layers


def _block_size(rank: Rank, has_experts: bool) -> int:
    """Return the parameters of a block with its adapters."""
    size = parameters_of_block(rank.model, rank.tensor, has_experts, rank.expert)
    return size + (0 if rank.trains_whole_model else rank.trained_of_block(has_experts))
