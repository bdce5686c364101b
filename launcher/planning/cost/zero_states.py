"""Bytes of weights, gradients and optimizer states in DeepSpeed, by ZeRO stage and precision. Pure.

The sizes are read from DeepSpeed 0.19.8's code, and tests compare them with its allocations. The published
formulas (Rajbhandari et al., arXiv 1910.02054) count 16 bytes per parameter and DeepSpeed's estimators 18,
in every stage; the real numbers differ. All sizes are those of the data rank that holds most.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from typing import NamedTuple

from launcher.config.layout import Layout
from launcher.config.schema import (
    ActivationCheckpointing,
    Dtype,
    OptimizerConfig,
    OptimizerName,
    RunConfig,
    StatesDtype,
)
from launcher.models.arithmetic import (
    CAST_AT_ONCE,
    UPDATED_ALONE,
    gathered_block,
    gathers_whole_blocks,
    update_chunk,
)
from launcher.parallel.buckets import (
    buckets,
    reduces_during_backward,
    updates_directly,
    uses_bf16_optimizer,
)
from launcher.planning.cost.buffers import ALL_REDUCE_BUCKET, BufferSizes
from launcher.planning.cost.geometry import Rank, block_parameters
from launcher.planning.cost.operations import BYTES, FP32

MODULE_CALLS = 11  # module calls of a transformer block, with the block itself
WAITING_ELEMENTS = 1 << 26  # as in engine/gradient_passes.py
UPDATE_BYTES = 52  # per element that is updated at once: fp32 values and random bits, engine/stochastic.py


@dataclass(frozen=True)
class Holdings:
    """Gradients and buffers at a moment of a step, without weights, optimizer states and activations."""

    gradients: int = 0
    communication: int = 0
    untouched: int = 0  # part of `communication`: the end of the bucket, which no gradient fills


@dataclass(frozen=True)
class Prefetched:
    """Bytes of the buffers in which ZeRO-3 gathers weights ahead, while parts of the model compute."""

    blocks: int = 0  # all but the last
    last_block: int = 0
    loss: int = 0


class SentBucket(NamedTuple):
    """A bucket of gradients that the backward pass sends from a buffer."""

    done: int  # elements with a gradient when the bucket is complete
    buffer: int  # bytes


@dataclass(frozen=True)
class States:
    """A rank's share of the training state, and its gradients and buffers in each phase of a step."""

    weights: int
    optimizer: int
    host: int  # in CPU memory, for a rank on a GPU
    forward: Holdings  # during the forward pass of a micro-batch
    backward: Holdings  # at the start of its backward pass
    reduce: Holdings  # peak of the reduction after the last backward pass
    step: Holdings  # peak of the optimizer step
    fresh: int = 0  # bytes of gradients that exist in the first micro-batch of a step
    per_element: int = 0  # bytes of gradient per element that the backward pass has finished
    # Elements whose gradients in low precision wait, in the first micro-batch, to be copied into the sums.
    waiting: int = 0
    bucket: int | None = None  # elements after which gradients are reduced within the backward pass
    reduced: Holdings = Holdings()  # during that reduction and after it
    sent: tuple[SentBucket, ...] = ()
    gathered: int = 0  # bytes of whole weights that ZeRO-3 holds
    prefetched: Prefetched = Prefetched()


def states_of(run: RunConfig, layout: Layout, rank: Rank, buffers: BufferSizes) -> States:
    """Return the training state of a (pipeline, tensor) rank."""
    ledger = _Ledger(run, layout, rank, buffers)
    if layout.zero_stage == 0:
        return ledger.zero_0()
    if layout.zero_stage == 3:
        return ledger.zero_3()
    if run.precision.states is StatesDtype.bf16:
        return ledger.bf16_states_1() if layout.zero_stage == 1 else ledger.bf16_states_2()
    low = run.precision.dtype is not Dtype.fp32
    if updates_directly(run, layout):
        return ledger.direct_update()
    if uses_bf16_optimizer(run, layout):
        return ledger.bf16_optimizer()
    return ledger.zero_1(low) if layout.zero_stage == 1 else ledger.zero_2(low)


def state_count(optimizer: OptimizerConfig) -> int:
    """Return the optimizer states per element, without the master weight."""
    if optimizer.name is OptimizerName.adamw:
        return 2
    return 1 if optimizer.momentum else 0


def checkpoint_bytes(run: RunConfig, layout: Layout, rank: Rank) -> int:
    """Return the bytes of this rank's fp32 copy in host memory, from a save until it is on the disk."""
    if not run.checkpoint.enabled:
        return 0
    shared = rank.distributed_parameters
    written = -(-(rank.trained_of_its_own - shared) // layout.gradient_ranks)
    written += -(-shared // layout.expert_holders)
    copied = written * FP32 * (1 + state_count(run.optimizer))
    return copied if run.checkpoint.asynchronous else min(copied, int(run.checkpoint.max_file_gb * 1e9))


class _Ledger:
    """Sizes of a rank, shared by the ZeRO stages."""

    def __init__(self, run: RunConfig, layout: Layout, rank: Rank, buffers: BufferSizes) -> None:
        self.run, self.layout, self.rank, self.buffers = run, layout, rank, buffers
        self.element = BYTES[run.precision.dtype]
        self.has_bf16_states = run.precision.states is StatesDtype.bf16
        # Bytes per element of gradient sums, of optimizer states, and of the latter with the master weight.
        self.state = BYTES[Dtype.bf16] if self.has_bf16_states else FP32
        self.state_bytes = self.state * state_count(run.optimizer)
        self.optimizer_bytes = self.state_bytes + (0 if self.has_bf16_states else FP32)
        self.accumulates = layout.accumulation > 1
        self.total = rank.trained_parameters
        # Frozen weights (LoRA) are in the model's precision, without gradients and states.
        self.frozen = rank.parameters - rank.trained_parameters
        shares = partitioned_groups(layout, rank)
        self.flat = sum(flat for flat, _ in shares)
        self.share = sum(flat // ranks for flat, ranks in shares)
        self.largest_share = max(flat // ranks for flat, ranks in shares)
        self.bucket = self.buffers.reduce_bucket
        self.never_filled = max(0, self.bucket - self.total)  # elements of the bucket

    def zero_0(self) -> States:
        """torch's optimizer steps on the weights; gradients are reduced in place, in a pipeline in copies.

        On a CPU those of a bucket are moved into one buffer (engine/overlapped_reduction.py).
        """
        gradients, sent = FP32 * self.total, tuple[SentBucket, ...]()
        if not reduces_during_backward(self.run, self.layout):
            copies = self._reduced_in_copies(FP32)
        else:
            is_joined = self.layout.device == "cpu" and self.layout.gradient_ranks > 1
            sent = self._sent(FP32, least=2) if is_joined else ()
            copies = largest_buffer(sent)
        return States(
            weights=self.element * (self.total + self.frozen),
            optimizer=self.state_bytes * self.total,
            host=0,
            forward=Holdings(gradients if self.accumulates else 0),
            backward=Holdings(gradients if self.accumulates else 0),
            sent=sent,
            per_element=0 if self.accumulates else FP32,
            reduce=Holdings(gradients, copies),
            step=Holdings(gradients),
        )

    def _sent(self, element: int, least: int = 1) -> tuple[SentBucket, ...]:
        """Return the buckets with at least `least` weights: the others are sent without a buffer."""
        weights = reduced_weights(self.rank, self.buffers.reduce_bucket)
        sizes = [sum(bucket) for bucket in weights]
        sent = zip(weights, accumulate(sizes), sizes, strict=True)
        return tuple(SentBucket(done, element * size) for bucket, done, size in sent if len(bucket) >= least)

    def _reduced_in_copies(self, element: int) -> int:
        """Return the bytes of the buffer that is sent; one data rank reduces nothing (gradient_passes.py)."""
        if self.layout.gradient_ranks == 1:
            return 0
        return element * min(self.total, ALL_REDUCE_BUCKET)

    def bf16_optimizer(self) -> States:
        """BF16_Optimizer of DeepSpeed: whole gradients in fp32, partitioned fp32 weights and states.

        Each bf16 gradient is added to the sums at once; in the first micro-batch several gradients are copied
        together (engine/gradient_passes.py). The reduction works on a bf16 copy: without a pipeline of one
        bucket, within the backward pass (engine/overlapped_reduction.py), else of all gradients.
        """
        summed = FP32 * self.flat
        copies, sent = self._reduced_in_copies(self.element), tuple[SentBucket, ...]()
        if copies and reduces_during_backward(self.run, self.layout):
            sent = self._sent(self.element)
            copies = largest_buffer(sent)
        return States(
            weights=self.element * (self.flat + self.frozen),
            optimizer=self.optimizer_bytes * self.share,
            host=0,
            forward=Holdings(summed),
            backward=Holdings(summed),
            sent=sent,
            fresh=summed,
            waiting=WAITING_ELEMENTS + self.rank.largest_trained,
            reduce=Holdings(summed, copies),
            step=Holdings(summed),
        )

    def direct_update(self) -> States:
        """BF16_Optimizer without its sums: bf16 gradients, until their weights are updated."""
        gradients = self.element * self.total
        joined = sum(weight.numel for weight in self.rank.trained if weight.numel < UPDATED_ALONE)
        beside = self.element * joined
        if not self.layout.compiles_updates:
            largest = max(joined, self.rank.largest_trained)
            beside = max(beside, FP32 * min(largest, CAST_AT_ONCE))
        return States(
            weights=self.element * (self.flat + self.frozen),
            optimizer=self.optimizer_bytes * self.share,
            host=0,
            forward=Holdings(),
            backward=Holdings(),
            per_element=self.element,
            reduce=Holdings(gradients),
            step=Holdings(gradients, beside),
        )

    def zero_1(self, low: bool) -> States:
        """Whole gradients, in fp32 also in low precision; partitioned fp32 weights and states."""
        gradients, bucket = FP32 * self.total, FP32 * self.bucket
        untouched = FP32 * self.never_filled
        kept = FP32 * self._whole_in_partition()
        reduced = FP32 * max(min(self.total, self.bucket), self.rank.largest_trained)
        copied = reduced if self.layout.gradient_ranks > 1 or low else 0
        # In a pipeline, DeepSpeed makes a second bucket for the reduction and keeps the first.
        spare = 0 if self.rank.is_flat else self.element * self.bucket
        optimizer, host = self._optimizer()
        return States(
            weights=self.element * (self.flat + self.frozen),
            optimizer=optimizer,
            host=host,
            forward=Holdings(gradients if self.accumulates else 0),
            backward=Holdings(gradients if self.accumulates else 0, bucket, untouched),
            per_element=0 if self.accumulates else FP32,
            reduce=Holdings(max(gradients - reduced, 0) + kept, bucket + copied + spare, untouched + spare),
            step=Holdings(kept + FP32 * self.largest_share),
        )

    def zero_2(self, low: bool) -> States:
        """Return ZeRO-2 states: like ZeRO-1, but gradients are reduced in backward and sharded."""
        offloads = self.run.parallelism.offload_optimizer
        partition = self.state * self._whole_in_partition()
        bucket = self.element * self.bucket * self.buffers.reduce_buffers
        untouched = self.element * self.never_filled * self.buffers.reduce_buffers
        copied = self.element * reduced_at_first(self.rank, self.bucket)
        optimizer, host = self._optimizer()
        if low:  # a flat partition in fp32
            kept = arriving = FP32 * self.share
        elif offloads:  # summed on the host
            kept = arriving = 0
            if self.layout.device == "cpu":
                optimizer += partition if self.accumulates else 0
            else:
                host += partition if self.accumulates else 0
        else:
            kept, arriving = partition, partition * (2 if self.accumulates else 1)
        before = kept if self.accumulates else 0
        reduced = Holdings(arriving, bucket + copied, untouched)
        at_once = self.bucket >= self.total
        if at_once:  # after the backward pass: first the copy, then the gradients reduced in it
            reduced = Holdings(max(before, arriving - copied), bucket + copied, untouched)
        return States(
            weights=self.element * (self.flat + self.frozen),
            optimizer=optimizer,
            host=host,
            forward=Holdings(before),
            backward=Holdings(before, bucket, untouched),
            bucket=None if at_once else self.bucket,
            reduced=reduced,
            reduce=reduced,
            step=Holdings(kept + (0 if low or offloads else FP32 * self.largest_share)),
        )

    def bf16_states_1(self) -> States:
        """Whole bf16 gradients, reduced in place by way of a bucket; the optimizer reads them there."""
        gradients, kept = self.element * self.total, self.element * self._whole_in_partition()
        before = gradients if self.accumulates else 0
        return States(
            weights=self.element * (self.flat + self.frozen),
            optimizer=self.optimizer_bytes * self.share,
            host=0,
            forward=Holdings(before),
            backward=Holdings(before),
            per_element=0 if self.accumulates else self.element,
            reduce=Holdings(gradients, self.element * min(self.total, self.bucket)),
            step=Holdings(kept, self.update_bytes),
        )

    def bf16_states_2(self) -> States:
        """Return ZeRO-2 states whose gradients are bf16 and are not copied for the optimizer step."""
        with_copy = self.zero_2(low=False)
        kept = self.element * self._whole_in_partition()
        return replace(with_copy, step=Holdings(kept, self.update_bytes))

    @property
    def update_bytes(self) -> int:
        """Bytes of the chunk of bf16 weights that is being updated; none if one kernel updates them."""
        if not self.has_bf16_states or self.layout.compiles_updates:
            return 0
        return UPDATE_BYTES * min(self.largest_share, update_chunk(self.layout.device))

    def zero_3(self) -> States:
        """Return ZeRO-3 states: like ZeRO-2, with weights sharded and gathered when used."""
        buffers, data = self.buffers, self.layout.gradient_ranks
        held = sum(-(-weight.numel // data) for weight in self.rank.weights)
        share = sum(-(-weight.numel // data) for weight in self.rank.trained)
        persistent = sum(
            weight.numel for weight in self.rank.weights if weight.numel < buffers.persistence_threshold
        )
        persistent = min(persistent, buffers.model_persistence)
        free = self.rank.parameters - persistent
        gathered = min(free, self._gathered())
        optimizer = self.optimizer_bytes * share
        gradients, weights = self.state * share, self.element * held
        offloads = self.run.parallelism.offload_optimizer
        host = 0
        if offloads:
            host += optimizer + gradients + FP32 * share
            optimizer = gradients = 0
        if self.run.parallelism.offload_parameters:
            host, weights = host + weights, 0
        weights += self.element * persistent
        if self.layout.device == "cpu":
            optimizer, host = optimizer + host, 0
        bucket, untouched = self.element * self.bucket, self.element * self.never_filled
        reduced = self.element * reduced_at_first(self.rank, self.bucket)
        stepped = 0 if offloads else self.state * min(share, buffers.sub_group) + self.update_bytes
        # Weights that stay whole are gathered together after the step: their pieces and the whole weights.
        regathered = self.element * (persistent + persistent // data)
        return States(
            weights=weights,
            optimizer=optimizer,
            host=host,
            forward=Holdings(gradients, bucket, untouched),
            backward=Holdings(gradients, bucket, untouched),
            bucket=self.bucket,
            reduced=Holdings(gradients, bucket + reduced, untouched),
            reduce=Holdings(gradients, bucket + reduced, untouched),
            step=Holdings(gradients + stepped, bucket + regathered, untouched),
            gathered=self.element * gathered,
            prefetched=self._prefetched(free, has_all=gathered == free),
        )

    def _prefetched(self, free: int, *, has_all: bool) -> Prefetched:
        """Return the buffers of weights that are gathered ahead, of `free` elements that are not kept whole.

        A buffer is freed when the last module that waits for a weight in it begins. If blocks are gathered at
        once and all weights are kept for the backward pass, that is the last block or the head.
        """
        buffers, rank = self.buffers, self.rank
        if not buffers.prefetch_bucket:
            return Prefetched()
        of_blocks = gathers_whole_blocks(self.run, self.layout)
        ahead = min(buffers.prefetch_bucket, buffers.max_live) + rank.largest_weight
        size = self.element * min(free, max(ahead, self._at_once if of_blocks else 0))
        if not (has_all and of_blocks):
            return Prefetched(size, size, size)
        is_head_gathered = rank.outputs * rank.model.hidden_size >= buffers.persistence_threshold
        return Prefetched(size, size if is_head_gathered and not rank.shares_tied_weight else 0)

    def _gathered(self) -> int:
        """Return the peak number of elements of weights that ZeRO-3 holds whole.

        Every call of a block, or of a module in it, prefetches another bucket, and weights fetched ahead for
        the backward pass are not freed in the forward pass. The number therefore rises to max_live, unless
        the buckets are smaller than a block.
        """
        buffers = self.buffers
        runs_ahead = fetches_blocks_ahead(self.run, self.layout, buffers)
        return max(self._at_once, buffers.max_live if runs_ahead else buffers.max_reuse // 2)

    @property
    def _at_once(self) -> int:
        """Elements of weights that must be whole together: of a block, or of a module."""
        recomputes = self.run.parallelism.activation_checkpointing is ActivationCheckpointing.full
        if recomputes or gathers_whole_blocks(self.run, self.layout):
            return block_parameters(self.rank.model, self.rank.tensor)
        return self.rank.largest_weight

    def _optimizer(self) -> tuple[int, int]:
        """Return bytes on the device and on the host: fp32 weights, states, and with offload the gradient."""
        size = self.optimizer_bytes * self.share
        if not self.run.parallelism.offload_optimizer:
            return size, 0
        host = size + FP32 * self.share + self.element * (self.share + self.rank.largest_trained)
        device = self.element * self.rank.largest_trained
        return (device + host, 0) if self.layout.device == "cpu" else (device, host)

    def _whole_in_partition(self) -> int:
        """Return the elements of all weights in a rank's partition; gradients are kept whole."""
        holders = self.layout.expert_holders
        touched = _most_touched(self.rank.groups, self.layout.gradient_ranks)
        return touched + (_most_touched(self.rank.expert_groups, holders) if self.rank.expert_groups else 0)


def partitioned_groups(layout: Layout, rank: Rank) -> list[tuple[int, int]]:
    """Return (elements, ranks that partition them) of each optimizer group under ZeRO-1 and 2.

    DeepSpeed pads each group to a multiple of two elements per data rank that holds it.
    """
    data, holders = layout.gradient_ranks, layout.expert_holders
    shares = [(padded(sum(group), 2 * data), data) for group in rank.groups]
    return shares + [(padded(sum(group), 2 * holders), holders) for group in rank.expert_groups]


def largest_buffer(sent: Iterable[SentBucket]) -> int:
    return max((bucket.buffer for bucket in sent), default=0)


def fetches_per_block(run: RunConfig, layout: Layout) -> int:
    """Return how often ZeRO-3 fetches weights while a block computes."""
    return 1 if gathers_whole_blocks(run, layout) else MODULE_CALLS


def fetches_blocks_ahead(run: RunConfig, layout: Layout, buffers: BufferSizes) -> bool:
    """Return whether ZeRO-3 gathers the whole next block while a block computes."""
    block = gathered_block(run, layout)
    return fetches_per_block(run, layout) * buffers.prefetch_bucket >= block and buffers.max_live > block


def reduced_at_first(rank: Rank, bucket: int) -> int:
    """Return the elements of the first bucket that is reduced: whole gradients, from the last layer back."""
    filled = 0
    for weight in reversed(rank.trained):
        if filled + weight.numel > bucket:
            return filled or weight.numel
        filled += weight.numel
    return filled


def padded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


@cache
def _most_touched(groups: tuple[tuple[int, ...], ...], data: int) -> int:
    # The first ranks are enough: one of them has the embedding, the largest weight.
    touched = [0] * min(data, 16)
    for group in groups:
        share = padded(sum(group), 2 * data) // data
        for rank in range(len(touched)):
            touched[rank] += _touched(group, rank * share, (rank + 1) * share)
    return max(touched)


def _touched(sizes: Iterable[int], start: int, stop: int) -> int:
    position = total = 0
    for size in sizes:
        if position < stop and position + size > start:
            total += size
        position += size
    return total


def reduced_buckets(rank: Rank, filled: int) -> list[int]:
    """Return the elements of each bucket reduced within the backward pass, without distributed experts."""
    return [sum(weights) for weights in reduced_weights(rank, filled)]


def reduced_weights(rank: Rank, filled: int) -> list[list[int]]:
    """Return the elements of the weights of each such bucket."""
    sizes = [weight.numel for weight in rank.trained if not weight.is_distributed]
    return [[sizes[place] for place in bucket] for bucket in buckets(sizes, filled)]
