"""Peak memory of a rank by kind: evaluate each phase of a step and take the maximum. Pure."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from launcher.config.layout import Layout
from launcher.config.schema import ActivationCheckpointing, CardRates, RunConfig
from launcher.planning.cost.buffers import BufferSizes
from launcher.planning.cost.geometry import Chunk, Rank
from launcher.planning.cost.operations import BYTES
from launcher.planning.cost.parts import ModelParts, parts
from launcher.planning.cost.sizes import Sizes
from launcher.planning.cost.tape import Footprint
from launcher.planning.cost.zero_states import (
    Holdings,
    States,
    checkpoint_bytes,
    largest_buffer,
    reduced_at_first,
    states_of,
)

BLOCK_BYTES = 131_072  # a block of initial weights in fp32, launcher/parallel/initializer.py
# On a GPU beside the allocator's peak: CUDA's context with the kernels of its libraries, and NCCL's buffers
# for each group. Assumed, unless `launcher calibrate` measured them on the card. Memory that the allocator
# holds but cannot use is given back before an allocation fails, so no run is refused for it;
# parallelism=auto leaves room for it (choose/search.py).
CONTEXT_BYTES, GROUP_BYTES = 600_000_000, 200_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at the memory peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    communication: int
    checkpoint: int  # copy of the state while a checkpoint is written, for a run on CPU
    margin: int
    moment: str
    host: int  # CPU memory of a rank on a GPU, with the copy for a checkpoint; not in the total
    start_up: int  # CPU memory while the initial weights are made, see start_up_bytes; not in the total
    allocated: int  # peak bytes of the tensors of a step, with buffers that are never written to

    @property
    def on_host(self) -> int:
        return max(self.host, self.start_up)

    @property
    def total(self) -> int:
        state = self.weights + self.gradients + self.optimizer
        return state + self.activations + self.communication + self.checkpoint + self.margin


@dataclass(frozen=True)
class _Moment:
    name: str
    activations: int
    holdings: Holdings
    gathered: int = 0

    @property
    def allocated(self) -> int:
        return self.activations + self.gathered + self.holdings.gradients + self.holdings.communication

    @property
    def touched(self) -> int:
        return self.allocated - self.holdings.untouched


def rank_memories(run: RunConfig, layout: Layout, ranks: Iterable[Rank]) -> list[Memory]:
    """Return the memory of each pipeline rank, for the tensor and data rank that needs most.

    On a CPU only memory that is written to counts.
    """
    sizes, buffers = Sizes.of(run, layout.device), BufferSizes.of(run, layout)
    return [_memory(run, layout, rank, sizes, states_of(run, layout, rank, buffers)) for rank in ranks]


def _memory(run: RunConfig, layout: Layout, rank: Rank, sizes: Sizes, states: States) -> Memory:
    flow = _Flat(sizes, rank, states) if rank.is_flat else _Pipelined(sizes, rank, states, layout)
    moments, on_cpu = list(flow.moments()), layout.device == "cpu"
    fullest = max(moments, key=lambda moment: moment.touched if on_cpu else moment.allocated)
    held = states.weights + states.optimizer + sizes.tables
    copied = checkpoint_bytes(run, layout, rank)
    axes = layout.tensor, layout.context, layout.gradient_ranks, layout.pipeline
    of_experts = (layout.expert, layout.expert_holders) if layout.expert > 1 else ()
    groups = sum(size > 1 for size in axes + of_experts)
    margin = 0 if on_cpu else margin_bytes(run.hardware.card, groups)
    communication = fullest.holdings.communication + fullest.gathered
    return Memory(
        weights=states.weights,
        gradients=fullest.holdings.gradients,
        optimizer=states.optimizer,
        activations=fullest.activations + sizes.tables,
        communication=communication - (fullest.holdings.untouched if on_cpu else 0),
        checkpoint=copied if on_cpu else 0,
        margin=margin,
        moment=fullest.name,
        host=states.host + (0 if on_cpu else copied),
        start_up=start_up_bytes(run, layout, rank),
        allocated=held + max(moment.allocated for moment in moments),
    )


def margin_bytes(card: CardRates, groups: int) -> int:
    """Return the bytes of a GPU beside the allocator's, with NCCL's buffers for `groups` groups of ranks."""
    context = CONTEXT_BYTES if card.context_bytes is None else card.context_bytes
    group = GROUP_BYTES if card.group_bytes is None else card.group_bytes
    return round(context + groups * group)


def start_up_bytes(run: RunConfig, layout: Layout, rank: Rank) -> int:
    """Return the peak CPU memory of a rank while its weights are made, one after the other.

    On a GPU: the weight, or under ZeRO-3 the partition, that moves there next. On a CPU: all weights, or all
    partitions and the weight that ZeRO-3 cuts next. Values are drawn in fp32 block by block.
    """
    element, data, on_cpu = BYTES[run.precision.dtype], layout.gradient_ranks, layout.device == "cpu"
    if layout.zero_stage < 3:
        return element * (rank.parameters if on_cpu else rank.largest_weight) + BLOCK_BYTES
    if not on_cpu and not run.parallelism.offload_parameters:
        return element * -(-rank.largest_weight // data) + BLOCK_BYTES
    held = accumulate(element * -(-weight.numel // data) for weight in rank.weights)
    whole = (element * weight.numel if on_cpu else 0 for weight in rank.weights)
    return max(partitions + max(size, BLOCK_BYTES) for partitions, size in zip(held, whole, strict=True))


class _Flow:
    """The moments of a step at which memory may be fullest."""

    def __init__(self, sizes: Sizes, rank: Rank, states: States) -> None:
        self.sizes, self.rank, self.states = sizes, rank, states
        self.parts: ModelParts = parts(sizes)

    def after(self) -> Iterator[_Moment]:
        """Yield the moments after the last backward pass."""
        yield _Moment("reduction of gradients", 0, self.states.reduce)
        yield _Moment("optimizer step", 0, self.states.step)

    def backward(self, name: str, activations: int, done: int = 0, soon: int = 0) -> _Moment:
        """Return a moment of the backward pass after the gradients of `done` elements of the weights.

        If `soon` more elements fill a bucket, gradients may have been reduced already.
        """
        states, held = self.states, self.states.backward
        arrived = states.bucket is not None and done + soon >= states.bucket
        gradients = states.reduced.gradients if arrived else held.gradients + states.per_element * done
        waiting, sent = max(
            (self._waiting_and_sent(done, reached) for reached in (done, done + soon)), key=sum
        )
        holdings = Holdings(gradients + waiting, held.communication + sent, held.untouched)
        return _Moment(name, activations, holdings, states.gathered)

    def _waiting_and_sent(self, done: int, reached: int) -> tuple[int, int]:
        """Return the bytes of gradients that wait for their sums, and of the buffer of a bucket that is sent.

        A bucket is sent once `reached` elements fill it. Before, all gradients that wait are summed.
        """
        if not (self.states.sent or self.states.waiting):
            return 0, 0
        sent = [bucket for bucket in self.states.sent if bucket.done <= reached]
        waiting = max(0, done - max((bucket.done for bucket in sent), default=0))
        return self.sizes.element * min(waiting, self.states.waiting), largest_buffer(sent)

    def first_backward(self, name: str, activations: int) -> _Moment:
        """Return the moment before any weight has a gradient, and before DeepSpeed allocates a bucket."""
        states, held = self.states, self.states.forward
        return _Moment(name, activations, replace(held, gradients=states.backward.gradients), states.gathered)

    def forward(self, name: str, activations: int, prefetched: int = 0) -> _Moment:
        """Return a moment of the forward pass."""
        states = self.states
        return _Moment(name, activations, states.forward, states.gathered + prefetched)

    def _attention(self, name: str, kept: int, done: int, of_block: int) -> Iterator[_Moment]:
        """Yield the peak of attention in the backward pass of a block, with the exchanges of context ranks.

        At this moment all weights of the block except those of its projections to heads have gradients.
        """
        if self.sizes.context > 1:
            there = done + of_block - self.rank.parameters_before_core
            yield self.backward(f"backward pass, attention of the {name}", kept + self.of_core, max(0, there))

    @property
    def of_core(self) -> int:
        return self.parts.block.footprint.attention


class _Flat(_Flow):
    """A step without a pipeline: one micro-batch at a time."""

    def moments(self) -> Iterator[_Moment]:
        embedding, head = self.parts.embedding, self.parts.head
        rank, size = self.rank, self.sizes
        blocks = [part.footprint for part in self.parts.blocks(rank.chunks[0])]
        vocabulary = size.vocabulary * size.hidden_size
        # A tied weight is accumulated once: the head's gradient waits for the embedding's gradient.
        tied = vocabulary * size.element if rank.shares_tied_weight and rank.trains_whole_model else 0
        first = size.boundaries + embedding.footprint.saved
        body = first + sum(block.saved for block in blocks)
        saved = body + head.footprint.saved
        of_blocks = rank.trained_of_blocks
        of_embedding = rank.parameters_of_embedding if rank.trains_whole_model else 0
        of_head = rank.trained_parameters - of_embedding - sum(of_blocks)
        yield from self._forward_of_blocks(blocks, first)
        yield self.forward("loss", body + head.footprint.forward, self.states.prefetched.loss)
        yield self.first_backward("backward pass, head", saved + head.footprint.backward)
        yield self.backward("backward pass, head", saved + head.footprint.later)
        if self.states.bucket is not None:
            yield self._reduction(of_head, -(-sum(of_blocks) // len(of_blocks)), tied)
        yield from self._backward_of_blocks(blocks, body, of_head, tied)
        end = first + embedding.footprint.backward + 2 * tied
        yield self.backward("backward pass, embedding", end, of_head + sum(of_blocks))
        yield from self.after()

    def _forward_of_blocks(self, blocks: list[Footprint], kept: int) -> Iterator[_Moment]:
        """Yield the moments of the forward pass. Of equal blocks with equal buffers the last is fullest."""
        last, ahead = len(blocks) - 1, self.states.prefetched
        for index, block in enumerate(blocks):
            if index >= last - 1 or blocks[index + 1] is not block:
                buffer = ahead.blocks if index < last else ahead.last_block
                yield self.forward("forward pass", kept + block.forward, buffer)
            kept += block.saved

    def _backward_of_blocks(
        self, blocks: list[Footprint], kept: int, done: int, tied: int
    ) -> Iterator[_Moment]:
        """Yield the moments of the backward pass from the last block to the first."""
        last, are_alike = len(blocks) - 1, len(set(blocks)) == 1
        for index in range(last, -1, -1):
            block, weights = blocks[index], self.rank.trained_of_blocks[index]
            name = {last: "last block", 0: "first block"}.get(index, "a block between")
            if index in (0, last) or not are_alike:
                held = kept + block.backward + tied
                # A block with experts has its peak before any of its weights has a gradient.
                soon = 0 if self.rank.kinds[index] else weights
                yield self.backward(f"backward pass, {name}", held, done, soon=soon)
                yield from self._attention(name, kept + tied, done, weights)
            kept, done = kept - block.saved, done + weights

    def _reduction(self, of_head: int, of_block: int, tied: int) -> _Moment:
        """Return the moment when the first bucket of gradients is full; blocks that filled it are freed."""
        block, size = self.parts.block.footprint, self.sizes
        filled = reduced_at_first(self.rank, self.states.bucket or 0)
        ahead = self.rank.blocks - min(self.rank.blocks, max(0, filled - of_head) // of_block)
        left = self.parts.embedding.footprint.saved + ahead * block.saved + size.stretch + tied
        left += size.boundaries
        if ahead and size.checkpointing is ActivationCheckpointing.full:
            left += block.later  # a bucket is full when a weight has its gradient
        elif ahead:
            left -= size.ffn  # of the block whose last weight no longer fits into the bucket
        return _Moment("reduction within the backward pass", left, self.states.reduced, self.states.gathered)


class _Pipelined(_Flow):
    """A step with several micro-batches in flight: 1F1B (arXiv 2104.04473), or DualPipeV's two directions."""

    def __init__(self, sizes: Sizes, rank: Rank, states: States, layout: Layout) -> None:
        super().__init__(sizes, rank, states)
        self.layout = layout

    def moments(self) -> Iterator[_Moment]:
        flight = in_flight(self.layout, self.rank.stage)
        # Receive buffers, and the head's input that a last stage keeps for the next micro-batch.
        buffers = self.sizes.stretch + (self.sizes.scored.stretch if self.rank.has_head else 0)
        held = sum(self._saved(chunk) * count for chunk, count in enumerate(flight)) + buffers
        for chunk, stage in enumerate(self.rank.chunks):
            saved = self._saved(chunk)
            blocks = self.parts.blocks(stage)
            block = max((part.footprint for part in blocks), key=lambda part: part.backward)
            others = held - saved
            inputs = saved - sum(part.footprint.saved * count for part, count in self.parts.of(stage))
            body = saved - (self.parts.head.footprint.saved if stage.has_head else 0)
            yield self.forward("forward pass", others + body - block.saved + block.forward)
            ends = [("last block", others + body, block)]
            if stage.has_head:
                head = self.parts.head.footprint
                yield self.forward("loss", others + body + head.forward)
                ends.insert(0, ("head", others + saved, head))
            for place, kept, end in ends:
                yield from self._backward(f"backward pass, {place}", kept, end, one_less=kept - saved)
            of_last = self.rank.trained_of_block(stage.kinds[-1])
            yield from self._attention("last block", others + body, self._of_head(stage), of_last)
            if stage.has_embedding:
                embedding = self.parts.embedding.footprint
                kept = others + inputs + embedding.saved
                yield self.backward("backward pass, embedding", kept + embedding.backward)
        yield from self.after()

    def _of_head(self, stage: Chunk) -> int:
        """Return the elements whose gradients are computed before those of the last block of a stage."""
        if not (stage.has_head and self.rank.trains_whole_model):
            return 0
        ends = self.rank.trained_parameters - sum(self.rank.trained_of_blocks)
        return ends - self.rank.parameters_of_embedding

    @property
    def _is_steady(self) -> bool:
        """Whether as many micro-batches are in flight again later, beside the gradients of the first."""
        return self.layout.accumulation > sum(in_flight(self.layout, self.rank.stage))

    def forward(self, name: str, activations: int, prefetched: int = 0) -> _Moment:
        """Return a moment of the last forward pass. A pipeline has no ZeRO-3 that prefetches."""
        assert not prefetched
        return self.backward(name, activations) if self._is_steady else super().forward(name, activations)

    def _backward(self, name: str, kept: int, end: Footprint, *, one_less: int) -> Iterator[_Moment]:
        """Yield moments at an end of a stage; `kept` is the bytes of all micro-batches in flight."""
        if self._is_steady:
            yield self.backward(name, kept + end.backward)
            return
        states = self.states
        before = replace(states.forward, gradients=states.fresh)
        yield _Moment(name, kept + end.backward, before, states.gathered)
        begun = replace(states.backward, gradients=states.fresh)
        yield _Moment(name, kept + end.later, begun, states.gathered)
        yield self.backward(name, one_less + end.backward)

    def _saved(self, chunk: int) -> int:
        """Return bytes of a micro-batch: what autograd saves, and DeepSpeed's copies of input and output."""
        stage, size = self.rank.chunks[chunk], self.sizes
        saved = sum(part.footprint.saved * count for part, count in self.parts.of(stage))
        # The input twice, to compute with and for its gradient; the output until its gradient arrives.
        saved += size.samples if stage.has_embedding else size.stretch
        saved += size.boundaries  # the masks of this micro-batch
        return saved + (0 if stage.has_head else size.stretch)


def in_flight(layout: Layout, stage: int) -> tuple[int, ...]:
    """Return the largest number of micro-batches in flight, for each stage of a rank."""
    if layout.stages_per_rank == 2:
        return 2 * layout.pipeline - stage, stage + 1
    return (min(layout.pipeline - stage, layout.accumulation),)
