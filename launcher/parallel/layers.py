"""Tensor-parallel layers (Shoeybi et al., arXiv 1909.08053) with sequence parallelism (arXiv 2205.05198).

Shapes: B batch, T sequence, H hidden, V vocabulary (padded to a multiple of tp), tp tensor-parallel size.
Between blocks activations are (B, T, H) on every tensor rank, or (B, T/tp, H) under sequence parallelism.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.parallel.all_reduce import all_reduce_
from launcher.parallel.collectives import (
    all_gather_sequence,
    all_gather_start,
    all_reduce,
    copy_region,
    gather_sequence_region,
    join_sequence_shards,
    named_axis,
    reduce_region_,
    reduce_scatter_biased_region,
    reduce_scatter_sequence,
    reduce_scatter_sequence_region,
    reduce_scatter_start,
)
from launcher.parallel.cross_entropy import linear_cross_entropy, linear_token_scores
from launcher.parallel.initializer import DrawFunction, Initializer, normal, zeros
from launcher.parallel.loss_kernels import EAGER, LossKernels, soft_capped
from launcher.parallel.mesh import Axis
from launcher.parallel.sharding import LogicalTensor
from launcher.parallel.vocabulary import padded_length


@dataclass(frozen=True)
class TensorParallel:
    """Settings shared by all tensor-parallel layers: axis, sequence parallelism, initializer, device."""

    axis: Axis
    sequence_parallel: bool
    initializer: Initializer
    device: str = "cpu"  # or "cuda": where the layers run
    kernels: LossKernels = EAGER  # of the loss
    vocabulary_multiple: int = 1  # divides the vocabulary of each tensor rank, with padding

    def padded(self, vocabulary: int) -> int:
        """Return the length of a vocabulary with padding, over all tensor ranks."""
        return padded_length(vocabulary, self.axis.size, self.vocabulary_multiple)

    def enter(self, x: Tensor) -> Tensor:
        """Return (B, T, H) for a parallel region; the gradients of the tensor ranks are summed backward."""
        if self.sequence_parallel:
            return gather_sequence_region(x, self.axis)
        return copy_region(x, self.axis)

    def leave(self, partial: Tensor) -> Tensor:
        """Sum (B, T, H) over the tensor ranks: whole, or this rank's (B, T/tp, H) (reduce-scatter).

        `partial` may be overwritten.
        """
        if self.sequence_parallel:
            return reduce_scatter_sequence_region(partial, self.axis)
        return reduce_region_(partial, self.axis)

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
        # Compiled, the bias is added and its gradient summed in kernels that there are anyway.
        if self.tp.axis.size == 1 and not torch.compiler.is_compiling():
            return F.linear(x, self.weight, self.bias)
        partial = F.linear(x, self.weight)
        if self.bias is None:
            return self.tp.leave(partial)
        if self.tp.sequence_parallel:
            return reduce_scatter_biased_region(partial, self.bias, self.tp.axis)
        return self.tp.leave(partial).add_(self.bias)


class VocabParallelEmbedding(nn.Module):
    """Token embedding with the vocabulary sharded over the tensor ranks; also the output head if tied.

    The vocabulary is padded (TensorParallel.padded). No token maps to a padding row, and the loss gives
    padding the probability zero. Forward: tokens (B, T) -> (B, T, H), or (B, T/tp, H) under sequence
    parallelism, by all-reduce (or reduce-scatter) of the masked look-ups. As the head: with `labels`, hidden
    (B, T, H) -> the sum of the losses (cross_entropy.py), or with `per_token` each loss and the likeliest
    token; with `project`, hidden -> logits (B, T, V/tp), like ColumnParallelLinear. Look-ups are multiplied
    by `scale`; `cap` is the logits' soft cap.
    """

    bias: nn.Parameter | None

    def __init__(
        self, name: str, vocabulary: int, hidden: int, tp: TensorParallel, std: float, scale: float = 1.0,
        cap: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tp, self.vocabulary, self.cap = tp, vocabulary, cap
        # In the model's precision, as Gemma rounds it.
        self.scale = float(torch.tensor(scale).to(tp.initializer.dtype))
        padded = tp.padded(vocabulary)
        self.first = tp.axis.rank * (padded // tp.axis.size)
        logical = LogicalTensor(f"{name}.weight", (vocabulary, hidden), 0, (vocabulary,), padded)
        self.weight = tp.initializer.parameter(logical, normal(std))
        self.register_parameter("bias", None)

    def forward(
        self, x: Tensor, labels: Tensor | None = None, project: bool = False, per_token: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        # All uses go through forward: ZeRO-3 gathers the weight of a module only around its forward.
        if labels is not None:
            whole, axis = self.tp.enter(x), self.tp.axis
            settings = labels, self.vocabulary, axis, self.tp.device, self.cap
            if per_token:
                return linear_token_scores(whole, self.weight, self.bias, *settings)
            return linear_cross_entropy(whole, self.weight, self.bias, *settings, self.tp.kernels)
        return self.logits(x) if project else self._first_use(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return this rank's logits (B, T, V/tp)."""
        logits = column_linear(x, self.weight, self.bias, self.tp)
        return logits if self.cap is None else soft_capped(logits, self.cap)

    def _first_use(self, x: Tensor) -> Tensor:
        """Look up tokens."""
        rows = self._looked_up(x)
        if not self.weight.requires_grad and torch.is_grad_enabled():
            # With adapters: the first block's input needs a gradient as the other blocks' inputs do.
            rows = rows.requires_grad_()
        return rows if self.scale == 1.0 else rows * self.scale

    def _looked_up(self, x: Tensor) -> Tensor:
        if self.tp.axis.size == 1:
            return F.embedding(x, self.weight)
        local = x - self.first
        elsewhere = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.tp.leave(rows.masked_fill(elsewhere.unsqueeze(-1), 0.0))


class VocabParallelHead(VocabParallelEmbedding):
    """Untied output head: see VocabParallelEmbedding. Without `labels` and `project` it returns its input."""

    def __init__(
        self, name: str, vocabulary: int, hidden: int, tp: TensorParallel, std: float, scale: float = 1.0,
        cap: float | None = None, bias: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(name, vocabulary, hidden, tp, std, scale, cap)
        padded = tp.padded(vocabulary)
        logical = LogicalTensor(f"{name}.bias", (vocabulary,), 0, (vocabulary,), padded)
        self.bias = tp.initializer.parameter(logical, zeros) if bias else None

    def _first_use(self, x: Tensor) -> Tensor:
        """Pass hidden states on. A pipeline runs this layer without labels; the loss runs it with them."""
        return x


def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tp: TensorParallel) -> Tensor:
    """Return X W^T + b for a weight sharded by rows; see ColumnParallelLinear for shapes and collectives."""
    if tp.axis.size == 1:
        return F.linear(x, weight, bias)
    arguments = tp.axis, tp.sequence_parallel, weight.requires_grad
    return _ColumnLinear.apply(x, weight, bias, *arguments)  # type: ignore[no-untyped-call,no-any-return]


class _ColumnLinear(torch.autograd.Function):
    """X W^T + b. Backward starts the collective on X's gradient before it computes W's gradient.

    A frozen weight (LoRA) gets no gradient, and X is not kept for it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        axis: Axis,
        sequence_parallel: bool,
        is_trained: bool,
    ) -> Tensor:
        # Keep only this rank's shard of the sequence for the backward pass, which gathers the sequence again.
        ctx.save_for_backward(*((x, weight) if is_trained else (weight,)))
        ctx.axis, ctx.sequence_parallel = axis, sequence_parallel
        return F.linear(all_gather_sequence(x, axis) if sequence_parallel else x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *kept, weight = ctx.saved_tensors
        axis, sequence_parallel = ctx.axis, ctx.sequence_parallel
        of_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        if not kept:
            reduced = reduce_scatter_sequence if sequence_parallel else all_reduce
            return reduced(grad.matmul(weight), axis), None, of_bias, None, None, None
        [x] = kept
        if torch.compiler.is_compiling():
            arguments = axis.group_name, axis.size, sequence_parallel
            of_x, of_weight = torch.ops.launcher.column_gradients(grad, x, weight, *arguments)
        else:
            of_x, of_weight = column_gradients(grad, x, weight, axis, sequence_parallel)
        return of_x, of_weight, of_bias, None, None, None


def column_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, axis: Axis, sequence_parallel: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight; the collective overlaps the product for the weight."""
    if sequence_parallel:
        shards, gathering = all_gather_start(x, axis, asynchronous=True)
        grad_whole = grad.matmul(weight)
        assert gathering is not None
        gathering.wait()
        x = join_sequence_shards(shards, axis)
        del shards  # the scattering needs memory
        grad_x, reducing = reduce_scatter_start(grad_whole, axis, asynchronous=True)
    else:
        grad_x = grad.matmul(weight)
        reducing = all_reduce_(grad_x, axis.group, asynchronous=True)
    grad_weight = grad.flatten(0, -2).t().matmul(x.flatten(0, -2))
    assert reducing is not None
    reducing.wait()
    return grad_x, grad_weight


@torch.library.custom_op("launcher::column_gradients", mutates_args=())
def _column_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, group: str, size: int, sequence_parallel: bool
) -> tuple[Tensor, Tensor]:
    return column_gradients(grad, x, weight, named_axis(group, size), sequence_parallel)


@_column_gradients.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, group: str, size: int, sequence_parallel: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)
