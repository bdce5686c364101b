"""Collectives of a rank in an optimizer step, by group of ranks, and the link that carries them. Pure."""

from collections import Counter
from dataclasses import dataclass

from launcher.config.layout import GroupName, Layout
from launcher.config.schema import RunConfig
from launcher.parallel.buckets import reduces_during_backward, uses_bf16_optimizer
from launcher.planning.cost.buffers import BufferSizes
from launcher.planning.cost.geometry import Rank
from launcher.planning.cost.operations import BOOL, BYTES, FP32, Collective
from launcher.planning.cost.parts import exchange, of_context, parts, traffic
from launcher.planning.cost.sizes import Sizes
from launcher.planning.cost.zero_states import padded, reduced_buckets

TIED_RANKS = 2  # pipeline ranks with a copy of a tied weight


@dataclass(frozen=True)
class GroupShape:
    """Size of a group of ranks, and its distribution over nodes."""

    ranks: int
    per_node: int  # ranks of the group on a node

    @property
    def is_within_node(self) -> bool:
        return self.per_node >= self.ranks


def group_shapes(layout: Layout, ranks_per_node: int) -> dict[GroupName, GroupShape]:
    """Return the shape of each group; ranks count tensor fastest, then context and data (parallel/mesh.py).

    The data group reduces gradients, so it includes the context ranks; expert groups are parts of it.
    """
    tensor = _shape(layout.tensor, 1, ranks_per_node)
    context = _shape(layout.context, layout.tensor, ranks_per_node)
    data = _shape(layout.gradient_ranks, layout.tensor, ranks_per_node)
    neighbours = _shape(layout.pipeline, layout.tensor * layout.gradient_ranks, ranks_per_node)
    expert = _shape(layout.expert, layout.tensor, ranks_per_node)
    expert_data = _shape(layout.expert_holders, layout.tensor * layout.expert, ranks_per_node)
    return {
        "tensor": tensor, "context": context, "data": data, "expert": expert, "expert_data": expert_data,
        "pipeline": neighbours,
    }  # fmt: skip


def _shape(ranks: int, stride: int, ranks_per_node: int) -> GroupShape:
    return GroupShape(ranks, min(ranks, max(1, ranks_per_node // stride)))


def tensor_traffic(run: RunConfig, layout: Layout, rank: Rank) -> Counter[Collective]:
    """Return the collectives over the tensor group in a step."""
    if layout.tensor == 1:
        return Counter()
    model = parts(Sizes.of(run, layout.device))
    micro_batch = sum((traffic(model.of(chunk)) for chunk in rank.chunks), Counter[Collective]())
    return Counter({collective: count * layout.accumulation for collective, count in micro_batch.items()})


def context_traffic(run: RunConfig, layout: Layout, rank: Rank) -> Counter[Collective]:
    """Return the collectives over the context group in a step: of attention, and of ends of documents."""
    if layout.context == 1:
        return Counter()
    sizes = Sizes.of(run, layout.device)
    model = parts(sizes)
    micro_batch = sum((of_context(model.of(chunk)) for chunk in rank.chunks), Counter[Collective]())
    if sizes.masks_documents:
        # Every stage, also each of the two of a rank, learns where documents end.
        micro_batch[Collective("all_gather", sizes.tokens * layout.context * BOOL)] += len(rank.chunks)
    return Counter({collective: count * layout.accumulation for collective, count in micro_batch.items()})


def pipeline_traffic(run: RunConfig, layout: Layout, rank: Rank) -> Counter[Collective]:
    """Return the sends to other stages in a step: activations, their gradients, a tied weight's gradient."""
    sent: Counter[Collective] = Counter()
    if layout.pipeline == 1:
        return sent
    sizes = Sizes.of(run, layout.device)
    activation = Collective("send", sizes.stretch)
    for index, chunk in enumerate(rank.chunks):
        # DualPipeV turns around on the last rank, which sends nothing between its two stages.
        is_turn = layout.stages_per_rank == 2 and rank.stage == layout.pipeline - 1
        forward, backward = not chunk.has_head, not chunk.has_embedding
        if is_turn:
            forward, backward = forward and index == 1, backward and index == 0
        sent[activation] += layout.accumulation * (forward + backward)
    if tied := tied_traffic(run, layout, rank):
        # Between two ranks an all-reduce sends the size of its tensor.
        sent[Collective("send", tied.size)] += 1
    return +sent


def tied_traffic(run: RunConfig, layout: Layout, rank: Rank) -> Collective | None:
    """Return the all-reduce of the gradient of a weight that the first and the last stage share."""
    if not (rank.copies_tied_weight and rank.trains_whole_model):
        return None
    sizes = Sizes.of(run, layout.device)
    return Collective("all_reduce", FP32 * sizes.vocabulary * sizes.hidden_size)


def data_traffic(run: RunConfig, layout: Layout, rank: Rank) -> Counter[Collective]:
    """Return the collectives over the data group in a step: gradients, and weights that are partitioned."""
    if layout.zero_stage == 3 and layout.gradient_ranks > 1:
        return _zero_3(run, layout, rank)
    if not reduces_during_backward(run, layout) or layout.gradient_ranks == 1:
        total = rank.trained_parameters - rank.distributed_parameters
        return _of_gradients(run, layout, rank.groups, total, layout.gradient_ranks)
    element = BYTES[run.precision.dtype]
    buckets = reduced_buckets(rank, BufferSizes.of(run, layout).reduce_bucket)
    sent = Counter(Collective("all_reduce", element * size) for size in buckets)
    if layout.zero_stage:
        sent.update(_gathers(rank.groups, layout.gradient_ranks, element))
    return sent


def expert_data_traffic(run: RunConfig, layout: Layout, rank: Rank) -> Counter[Collective]:
    """Return the collectives in a step over the data ranks that hold the same experts."""
    return _of_gradients(run, layout, rank.expert_groups, rank.distributed_parameters, layout.expert_holders)


def _of_gradients(
    run: RunConfig, layout: Layout, sizes: tuple[tuple[int, ...], ...], total: int, ranks: int
) -> Counter[Collective]:
    """Return the collectives over `ranks` that hold the parameter groups `sizes`, under ZeRO-0 to 2."""
    sent: Counter[Collective] = Counter()
    if ranks == 1 or not total:
        return sent
    element = BYTES[run.precision.dtype]
    if layout.zero_stage == 0:
        sent[Collective("all_reduce", FP32 * total)] += 1
        return sent
    if layout.zero_stage == 2:
        # Reduced in every micro-batch, because a rank keeps only its partition.
        sent[Collective("all_reduce", element * total)] += layout.accumulation
    else:
        groups = (padded(sum(group), 2 * ranks) for group in sizes)
        reduced = sum(groups) if uses_bf16_optimizer(run, layout) else total
        sent[Collective("all_reduce", element * reduced)] += 1
    return sent + _gathers(sizes, ranks, element)


def _gathers(sizes: tuple[tuple[int, ...], ...], ranks: int, element: int) -> Counter[Collective]:
    """Return the gathers of updated weights, one for each parameter group."""
    return Counter(Collective("all_gather", element * padded(sum(group), 2 * ranks)) for group in sizes)


def expert_traffic(run: RunConfig, layout: Layout, rank: Rank) -> Counter[Collective]:
    """Return the collectives over the expert group in a step: rows of tokens, of an even router."""
    if layout.expert == 1:
        return Counter()
    model = parts(Sizes.of(run, layout.device))
    micro_batch = sum((exchange(model.of(chunk)) for chunk in rank.chunks), Counter[Collective]())
    return Counter({collective: count * layout.accumulation for collective, count in micro_batch.items()})


def _zero_3(run: RunConfig, layout: Layout, rank: Rank) -> Counter[Collective]:
    """Gather each weight in the forward pass, and in the backward pass if it was freed between."""
    element, data, buffers = BYTES[run.precision.dtype], layout.gradient_ranks, BufferSizes.of(run, layout)
    whole = sum(padded(numel, data) * count for numel, count in rank.sizes.items())
    reduced = sum(padded(weight.numel, data) for weight in rank.trained)
    freed = {numel: count for numel, count in rank.sizes.items() if numel >= buffers.persistence_threshold}
    free = sum(padded(numel, data) * count for numel, count in freed.items())
    kept = min(free, buffers.max_live)
    sent: Counter[Collective] = Counter()
    # A prefetch takes whole weights until they fill its bucket.
    at_once = max(1, buffers.prefetch_bucket, free // max(1, sum(freed.values())))
    for size, count in pieces(2 * free - kept, at_once):
        sent[Collective("all_gather", element * size)] += count * layout.accumulation
    for size, count in pieces(reduced, buffers.reduce_bucket):
        sent[Collective("reduce_scatter", element * size)] += count * layout.accumulation
    if whole > free:
        sent[Collective("all_gather", element * (whole - free))] += 1
    return +sent


def pieces(total: int, at_once: int) -> list[tuple[int, int]]:
    """Return the sizes of the pieces of `total` elements, and how many pieces have each size."""
    full, rest = divmod(total, at_once)
    return [(size, count) for size, count in ((at_once, full), (rest, 1)) if size and count]


TRAFFIC = {
    "tensor": tensor_traffic,
    "context": context_traffic,
    "data": data_traffic,
    "expert": expert_traffic,
    "expert_data": expert_data_traffic,
    "pipeline": pipeline_traffic,
}
