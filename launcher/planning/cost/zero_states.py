"""What DeepSpeed holds of weights, gradients and optimizer states, by stage and precision. Pure.

Read off DeepSpeed 0.19.8's code and held against its allocations by tests: the published formulas
(Rajbhandari et al., arXiv 1910.02054) count 16 bytes a parameter, and its own estimators 18, for what is
another number in every row here. Bytes of one data rank, the one that holds most.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from launcher.config.layout import Layout
from launcher.config.schema import ActivationCheckpointing, Dtype, OptimizerConfig, OptimizerName, RunConfig
from launcher.planning.cost.buffers import ALL_REDUCE_BUCKET, Tuning
from launcher.planning.cost.geometry import Rank, block_parameters
from launcher.planning.cost.operations import BYTES, FP32

MODULE_CALLS = 11  # of a transformer block, itself included


@dataclass(frozen=True)
class Holdings:
    """Beside weights, optimizer states and activations, at one moment of a step."""

    gradients: int = 0
    communication: int = 0
    untouched: int = 0  # of communication: the end of a bucket that no gradient reaches


@dataclass(frozen=True)
class States:
    """One rank's share of the training state."""

    weights: int
    optimizer: int
    host: int  # in the CPU's memory, where that is not the device's own
    forward: Holdings  # while a micro-batch's forward pass runs
    backward: Holdings  # while its backward pass begins
    reduce: Holdings  # at the most, when the last one has ended
    step: Holdings  # at the most, in the optimizer's step
    fresh: int = 0  # bytes of gradients that are there when a step begins, with its first micro-batch
    per_element: int = 0  # bytes of gradient for each element that the backward pass has come past
    bucket: int | None = None  # elements after which gradients are reduced within the backward pass
    reduced: Holdings = Holdings()  # while they are, and from then on
    gathered: int = 0  # whole weights that ZeRO-3 holds
    prefetched: int = 0  # and is about to, in the forward pass


def states_of(run: RunConfig, layout: Layout, rank: Rank) -> States:
    """Those of a pipeline rank of a tensor rank."""
    ledger = _Ledger(run, layout, rank)
    if layout.zero_stage == 0:
        return ledger.zero_0()
    if layout.zero_stage == 3:
        return ledger.zero_3()
    low = run.precision.dtype is not Dtype.fp32
    if layout.zero_stage == 1 and run.precision.dtype is Dtype.bf16 and not run.parallelism.offload_optimizer:
        return ledger.bf16_optimizer()
    return ledger.zero_1(low) if layout.zero_stage == 1 else ledger.zero_2(low)


def state_bytes(optimizer: OptimizerConfig) -> int:
    """Per element that it steps on, beside the fp32 weight."""
    if optimizer.name is OptimizerName.adamw:
        return 2 * FP32
    return FP32 if optimizer.momentum else 0


def checkpoint_bytes(run: RunConfig, layout: Layout, rank: Rank) -> int:
    """Copied to host memory at a save, and there until it is on the disk: this rank's part, in fp32."""
    if not run.checkpoint.enabled:
        return 0
    written = -(-rank.parameters_of_its_own // layout.data)
    copied = written * (FP32 + state_bytes(run.optimizer))
    return copied if run.checkpoint.asynchronous else min(copied, int(run.checkpoint.max_file_gb * 1e9))


class _Ledger:
    def __init__(self, run: RunConfig, layout: Layout, rank: Rank) -> None:
        self.run, self.layout, self.rank = run, layout, rank
        self.tuning = Tuning.of(run)
        self.element = BYTES[run.precision.dtype]
        self.accumulates = layout.accumulation > 1
        data = layout.data
        self.total = rank.parameters
        # DeepSpeed pads each group to two elements for every rank.
        self.flat = sum(padded(sum(group), 2 * data) for group in rank.groups)
        self.share = self.flat // data
        self.largest_share = max(padded(sum(group), 2 * data) // data for group in rank.groups)
        self.bucket = self.tuning.reduce_bucket
        self.never_filled = max(0, self.bucket - self.total)  # elements of it

    @property
    def state_bytes(self) -> int:
        return state_bytes(self.run.optimizer)

    def zero_0(self) -> States:
        """torch's optimizer on the weights themselves; gradients all-reduced in copies."""
        gradients = FP32 * self.total
        copies = FP32 * min(self.total, ALL_REDUCE_BUCKET)
        return States(
            weights=self.element * self.total,
            optimizer=self.state_bytes * self.total,
            host=0,
            forward=Holdings(gradients if self.accumulates else 0),
            backward=Holdings(gradients if self.accumulates else 0),
            per_element=0 if self.accumulates else FP32,
            reduce=Holdings(gradients, copies),
            step=Holdings(gradients),
        )

    def bf16_optimizer(self) -> States:
        """DeepSpeed's BF16_Optimizer: gradients whole in fp32, the fp32 weights and states partitioned.

        The weights' own gradients are zeroed once they are added, and stay until the step; they are reduced
        in a copy, cast to bf16.
        """
        summed, own = FP32 * self.flat, self.element * self.total
        copies = (FP32 + self.element) * min(self.flat, ALL_REDUCE_BUCKET)
        kept = summed + (own if self.accumulates else 0)
        return States(
            weights=self.element * self.flat,
            optimizer=(FP32 + self.state_bytes) * self.share,
            host=0,
            forward=Holdings(kept),
            backward=Holdings(kept),
            fresh=summed,
            per_element=0 if self.accumulates else self.element,
            reduce=Holdings(summed + own, copies),
            step=Holdings(summed + own),
        )

    def zero_1(self, low: bool) -> States:
        """Gradients whole, the optimizer's weights and states partitioned.

        In low precision they accumulate in fp32 beside the weights' own, which are freed as they are added.
        """
        gradients, bucket = FP32 * self.total, FP32 * self.bucket
        untouched = FP32 * self.never_filled
        own = FP32 * self._whole_in_partition()
        reduced = FP32 * max(min(self.total, self.bucket), self.rank.largest_weight)
        copied = reduced if self.layout.data > 1 or low else 0
        # Under a pipeline, DeepSpeed makes another bucket to reduce through, and goes on with the first.
        spare = 0 if self.rank.is_flat else self.element * self.bucket
        optimizer, host = self._optimizer()
        return States(
            weights=self.element * self.flat,
            optimizer=optimizer,
            host=host,
            forward=Holdings(gradients if self.accumulates else 0),
            backward=Holdings(gradients if self.accumulates else 0, bucket, untouched),
            per_element=0 if self.accumulates else FP32,
            reduce=Holdings(max(gradients - reduced, 0) + own, bucket + copied + spare, untouched + spare),
            step=Holdings(own + FP32 * self.largest_share),
        )

    def zero_2(self, low: bool) -> States:
        """As ZeRO-1, but gradients are reduced as they come, and only a rank's own are kept."""
        offloads = self.run.parallelism.offload_optimizer
        own = FP32 * self._whole_in_partition()
        bucket = self.element * self.bucket * self.tuning.reduce_buffers
        untouched = self.element * self.never_filled * self.tuning.reduce_buffers
        copied = self.element * reduced_at_first(self.rank, self.bucket)
        optimizer, host = self._optimizer()
        if low:  # a flat partition in fp32
            kept = arriving = FP32 * self.share
        elif offloads:  # summed on the host
            kept = arriving = 0
            if self.layout.device == "cpu":
                optimizer += own if self.accumulates else 0
            else:
                host += own if self.accumulates else 0
        else:
            kept, arriving = own, own * (2 if self.accumulates else 1)
        before = kept if self.accumulates else 0
        reduced = Holdings(arriving, bucket + copied, untouched)
        at_once = self.bucket >= self.total
        if at_once:  # when the backward pass has ended: first the copy, then what arrives from it
            reduced = Holdings(max(before, arriving - copied), bucket + copied, untouched)
        return States(
            weights=self.element * self.flat,
            optimizer=optimizer,
            host=host,
            forward=Holdings(before),
            backward=Holdings(before, bucket, untouched),
            bucket=None if at_once else self.bucket,
            reduced=reduced,
            reduce=reduced,
            step=Holdings(kept + (0 if low or offloads else FP32 * self.largest_share)),
        )

    def zero_3(self) -> States:
        """Weights partitioned too, each over all data ranks, and gathered for a while."""
        tuning, data = self.tuning, self.layout.data
        share = sum(-(-weight.numel // data) for weight in self.rank.weights)
        persistent = sum(
            weight.numel for weight in self.rank.weights if weight.numel < tuning.persistence_threshold
        )
        persistent = min(persistent, tuning.model_persistence)
        free = self.total - persistent
        gathered = min(free, self._gathered())
        fetched = min(free, tuning.prefetch_bucket + self.rank.largest_weight)
        optimizer = (FP32 + self.state_bytes) * share
        gradients, weights = FP32 * share, self.element * share
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
        stepped = 0 if offloads else FP32 * min(share, tuning.sub_group)
        # Weights that stay whole are gathered when it ends, at once: pieces, and what they make.
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
            prefetched=self.element * fetched if tuning.prefetch_bucket else 0,
        )

    def _gathered(self) -> int:
        """Elements of weights that ZeRO-3 holds whole at once.

        Every call of a module, containers included, prefetches another bucket; what is fetched ahead for the
        backward pass is not let go of in the forward pass. So it runs ahead as far as max_live allows, unless
        a block is larger than what its modules prefetch.
        """
        tuning, block = self.tuning, block_parameters(self.rank.model, self.rank.tensor)
        runs_ahead = MODULE_CALLS * tuning.prefetch_bucket >= block
        recomputes = self.run.parallelism.activation_checkpointing is ActivationCheckpointing.full
        least = block if recomputes else self.rank.largest_weight
        return max(least, tuning.max_live if runs_ahead else tuning.max_reuse // 2)

    def _optimizer(self) -> tuple[int, int]:
        """Bytes on the device and on the host: fp32 weights, states, and under offload their gradient."""
        size = (FP32 + self.state_bytes) * self.share
        if not self.run.parallelism.offload_optimizer:
            return size, 0
        host = size + FP32 * self.share + self.element * (self.share + self.rank.largest_weight)
        device = self.element * self.rank.largest_weight
        return (device + host, 0) if self.layout.device == "cpu" else (device, host)

    def _whole_in_partition(self) -> int:
        """Elements of all weights that a rank's partition touches, at the most: gradients are kept whole."""
        return _most_touched(self.rank.groups, self.layout.data)


def reduced_at_first(rank: Rank, bucket: int) -> int:
    """Elements in the first bucket that is reduced: whole gradients, from the last layer on."""
    filled = 0
    for weight in reversed(rank.weights):
        if filled + weight.numel > bucket:
            return filled or weight.numel
        filled += weight.numel
    return filled


def padded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


@cache
def _most_touched(groups: tuple[tuple[int, ...], ...], data: int) -> int:
    # The first ranks stand for all: among theirs is the embedding, the largest weight.
    found = [0] * min(data, 16)
    for group in groups:
        share = padded(sum(group), 2 * data) // data
        for rank in range(len(found)):
            found[rank] += _touched(group, rank * share, (rank + 1) * share)
    return max(found)


def _touched(sizes: Iterable[int], start: int, stop: int) -> int:
    position = total = 0
    for size in sizes:
        if position < stop and position + size > start:
            total += size
        position += size
    return total
