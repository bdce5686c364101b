"""Tensor-parallel layers (Shoeybi et al., arXiv 1909.08053) with sequence parallelism (arXiv 2205.05198).

Shapes: B batch, T sequence, H hidden, V vocabulary (padded to a multiple of tp), tp tensor-parallel size.
Between blocks activations are (B, T, H) on every tensor rank, or (B, T/tp, H) under sequence parallelism.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.parallel.collectives import (
    all_gather_start,
    copy_region,
    join_sequence_shards,
    reduce_region,
    reduce_scatter_sequence_region,
    reduce_scatter_start,
)
from launcher.parallel.initializer import DrawFunction, Initializer, normal, zeros
from launcher.parallel.mesh import Axis
from launcher.parallel.sharding import LogicalTensor, padded_length

IGNORED_LABEL = -100


@dataclass(frozen=True)
class TensorParallel:
    """Settings shared by all tensor-parallel layers: axis, sequence parallelism, weight initializer."""

    axis: Axis
    sequence_parallel: bool
    initializer: Initializer

    def leave(self, partial: Tensor) -> Tensor:
        """Sum (B, T, H) over the tensor ranks: whole, or this rank's (B, T/tp, H) (reduce-scatter)."""
        if self.sequence_parallel:
            return reduce_scatter_sequence_region(partial, self.axis)
        return reduce_region(partial, self.axis)

    def replicated(self, weight: Tensor) -> Tensor:
        """Return a replicated weight; under sequence parallelism its partial gradients are all-reduced."""
        return copy_region(weight, self.axis) if self.sequence_parallel else weight


class ColumnParallelLinear(nn.Module):
    """Linear layer Y = X A^T + b with the rows of A (the outputs) sharded over the tensor ranks.

    Input (B, T, H), or (B, T/tp, H) under sequence parallelism; output (B, T, out/tp), not gathered.
    `segments` are the output sizes of the fused projections (query, key, value); each is sharded evenly, and
    their sum is `out`. Forward: all-gather of the input under sequence parallelism, else no collective.
    Backward: all-reduce (or reduce-scatter) of the input's gradient, overlapped with the computation of the
    weight's gradient.
    """

    def __init__(
        self,
        name: str,
        inputs: int,
        segments: tuple[int, ...],
        tp: TensorParallel,
        *,
        bias: bool,
        draw: DrawFunction,
    ) -> None:
        super().__init__()
        self.tp = tp
        outputs = sum(segments)
        make = tp.initializer.parameter
        self.weight = make(LogicalTensor(f"{name}.weight", (outputs, inputs), 0, segments), draw)
        self.bias = make(LogicalTensor(f"{name}.bias", (outputs,), 0, segments), zeros) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return column_linear(x, self.weight, self.bias, self.tp)


class RowParallelLinear(nn.Module):
    """Linear layer Y = X A^T + b with the columns of A (the inputs) sharded over the tensor ranks.

    Input (B, T, in/tp); output (B, T, H), or (B, T/tp, H) under sequence parallelism. Forward: all-reduce (or
    reduce-scatter) of the partial products; the bias, replicated on every rank, is added after the
    collective. Backward: none; under sequence parallelism the all-gather of the output's gradient and the
    all-reduce of the bias's gradient.
    """

    def __init__(
        self, name: str, inputs: int, outputs: int, tp: TensorParallel, *, bias: bool, draw: DrawFunction
    ) -> None:
        super().__init__()
        self.tp = tp
        make = tp.initializer.parameter
        self.weight = make(LogicalTensor(f"{name}.weight", (outputs, inputs), 1, (inputs,)), draw)
        self.bias = make(LogicalTensor(f"{name}.bias", (outputs,)), zeros) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.tp.leave(F.linear(x, self.weight))
        return y if self.bias is None else y + self.tp.replicated(self.bias)


class VocabParallelEmbedding(nn.Module):
    """Token embedding with the vocabulary sharded over the tensor ranks; also the output head if tied.

    The vocabulary is padded to a multiple of tp. No token maps to a padding row, and the loss gives padding
    the probability zero. Forward: tokens (B, T) -> (B, T, H), or (B, T/tp, H) under sequence parallelism, by
    all-reduce (or reduce-scatter) of the masked look-ups. With `project`: hidden (B, T, H) -> logits (B, T,
    V/tp), like ColumnParallelLinear.
    """

    def __init__(self, name: str, vocabulary: int, hidden: int, tp: TensorParallel, std: float) -> None:
        super().__init__()
        self.tp = tp
        padded = padded_length(vocabulary, tp.axis.size)
        self.first = tp.axis.rank * (padded // tp.axis.size)
        logical = LogicalTensor(f"{name}.weight", (vocabulary, hidden), 0, (vocabulary,), padded)
        self.weight = tp.initializer.parameter(logical, normal(std))

    def forward(self, x: Tensor, project: bool = False) -> Tensor:
        # Both uses go through forward: ZeRO-3 gathers the weight of a module only around its forward.
        if project:
            return column_linear(x, self.weight, None, self.tp)
        if self.tp.axis.size == 1:
            return F.embedding(x, self.weight)
        local = x - self.first
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.tp.leave(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0))


class VocabParallelHead(VocabParallelEmbedding):
    """Untied output head: hidden (B, T, H) or (B, T/tp, H) -> logits (B, T, V/tp) of this rank."""

    def __init__(
        self, name: str, vocabulary: int, hidden: int, tp: TensorParallel, std: float, bias: bool = False
    ) -> None:
        super().__init__(name, vocabulary, hidden, tp, std)
        padded = padded_length(vocabulary, tp.axis.size)
        logical = LogicalTensor(f"{name}.bias", (vocabulary,), 0, (vocabulary,), padded)
        self.bias = tp.initializer.parameter(logical, zeros) if bias else None

    def forward(self, x: Tensor, project: bool = True) -> Tensor:
        return column_linear(x, self.weight, self.bias, self.tp)


def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel) -> Tensor:
    """Return X W^T + b for a weight sharded by rows; see ColumnParallelLinear for shapes and collectives."""
    if tp.axis.size == 1:
        return F.linear(x, weight, bias)
    y = _ColumnLinear.apply(x, weight, tp.axis, tp.sequence_parallel)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias  # type: ignore[no-any-return]


class _ColumnLinear(torch.autograd.Function):
    """Product X W^T. Backward starts the collective on X's gradient before it computes W's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, axis: Axis, sequence_parallel: bool) -> Tensor:
        # Keep only this rank's shard of the sequence for the backward pass, which gathers the sequence again.
        ctx.save_for_backward(x, weight)
        ctx.axis, ctx.sequence_parallel = axis, sequence_parallel
        whole = join_sequence_shards(all_gather_start(x, axis)[0], axis) if sequence_parallel else x
        return F.linear(whole, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        axis = ctx.axis
        if ctx.sequence_parallel:
            shards, gathering = all_gather_start(x, axis, asynchronous=True)
            grad_whole = grad.matmul(weight)
            assert gathering is not None
            gathering.wait()
            x = join_sequence_shards(shards, axis)
            grad_x, reducing = reduce_scatter_start(grad_whole, axis, asynchronous=True)
        else:
            grad_x = grad.matmul(weight)
            reducing = dist.all_reduce(grad_x, group=axis.group, async_op=True)
        grad_weight = grad.flatten(0, -2).t().matmul(x.flatten(0, -2))
        assert reducing is not None
        reducing.wait()
        return grad_x, grad_weight, None, None


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, vocabulary: int, axis: Axis) -> Tensor:
    """Return the cross-entropy in nats per label; the logits are sharded by vocabulary and never gathered.

    logits (B, T, V/tp), labels (B, T) -> losses (B, T) in fp32; 0 for a label that is IGNORED_LABEL.
    `vocabulary` is the unpadded size; padding gets probability zero. Forward: three all-reduces of (B, T)
    values over `axis` (maximum, sum of exponentials, logit of the label). Backward: no collective; each rank
    computes its shard of softmax minus one-hot.
    """
    losses: Tensor = _VocabParallelCrossEntropy.apply(logits, labels, vocabulary, axis)  # type: ignore[no-untyped-call]
    return losses


def vocab_parallel_hits(logits: Tensor, labels: Tensor, vocabulary: int, axis: Axis) -> Tensor:
    """Return whether labels have the highest logit, ties included: two all-reduces of (B, T) over `axis`."""
    scores = _mask_padding(logits, vocabulary, axis)
    highest = _reduced(scores.amax(dim=-1), dist.ReduceOp.MAX, axis)
    elsewhere, index = _local_labels(logits, labels, axis)
    label_logits = scores.gather(-1, index.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
    return _reduced(label_logits, dist.ReduceOp.SUM, axis) >= highest


def _mask_padding(logits: Tensor, vocabulary: int, axis: Axis) -> Tensor:
    columns = logits.shape[-1]
    unpadded = min(max(vocabulary - axis.rank * columns, 0), columns)
    scores = logits.float()
    if unpadded < columns:
        scores = scores.clone()
        scores[..., unpadded:] = float("-inf")
    return scores


def _local_labels(logits: Tensor, labels: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Return a mask of labels on other ranks, and each label's index in this rank's logits (0 if masked)."""
    local = logits.shape[-1]
    first = axis.rank * local
    elsewhere = (labels < first) | (labels >= first + local)
    return elsewhere, (labels - first).masked_fill(elsewhere, 0)


def mean_loss(losses: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of (B, T) losses over labels that are not ignored; 0 if all are."""
    return losses.sum() / (labels != IGNORED_LABEL).sum().clamp(min=1)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, vocabulary: int, axis: Axis) -> Tensor:
        scores = _mask_padding(logits, vocabulary, axis)
        highest = _reduced(scores.amax(dim=-1), dist.ReduceOp.MAX, axis)
        exponentials = (scores - highest.unsqueeze(-1)).exp_()
        total = _reduced(exponentials.sum(dim=-1), dist.ReduceOp.SUM, axis)

        ignored = labels == IGNORED_LABEL
        elsewhere, index = _local_labels(logits, labels, axis)
        label_logits = scores.gather(-1, index.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
        label_logits = _reduced(label_logits, dist.ReduceOp.SUM, axis)

        softmax = exponentials.div_(total.unsqueeze(-1))
        ctx.save_for_backward(softmax, index, elsewhere, ignored)
        ctx.dtype = logits.dtype
        return (total.log() + highest - label_logits).masked_fill(ignored, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        softmax, index, elsewhere, ignored = ctx.saved_tensors
        grad = grad.masked_fill(ignored, 0.0).unsqueeze(-1)
        one_hot = torch.where(elsewhere, 0.0, 1.0).unsqueeze(-1)
        grad_logits = softmax.scatter_add(-1, index.unsqueeze(-1), -one_hot).mul_(grad)
        return grad_logits.to(ctx.dtype), None, None, None


def _reduced(x: Tensor, operation: Any, axis: Axis) -> Tensor:
    if axis.size > 1:
        dist.all_reduce(x, op=operation, group=axis.group)
    return x
