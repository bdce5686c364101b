"""Regions of tensor parallelism: collectives with the right backward.

Each function takes its axis and is the identity on an axis of one rank. f and g are those of Megatron-LM
(Shoeybi et al., arXiv 1909.08053, figure 3); the sequence-parallel pair is that of Korthikanti et al.,
arXiv 2205.05198, figure 5. Activations are (B, T, H): batch, sequence, hidden.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.parallel.mesh import Axis

SEQUENCE_DIM = 1


def copy_region(x: Tensor, axis: Axis) -> Tensor:
    """f: identity forward, all-reduce backward. Enters a tensor-parallel region.

    Also what a weight held equal on all tensor ranks, but used on each rank's own piece of the sequence,
    passes through: its gradient is then the sum over the ranks.
    """
    return x if axis.size == 1 else _Copy.apply(x, axis)  # type: ignore[no-untyped-call]


def reduce_region(x: Tensor, axis: Axis) -> Tensor:
    """g: all-reduce forward, identity backward. Leaves a tensor-parallel region."""
    return x if axis.size == 1 else _Reduce.apply(x, axis)  # type: ignore[no-untyped-call]


def gather_sequence_region(x: Tensor, axis: Axis) -> Tensor:
    """(B, T/tp, H) -> (B, T, H): all-gather forward, reduce-scatter backward."""
    return x if axis.size == 1 else _GatherSequence.apply(x, axis)  # type: ignore[no-untyped-call]


def reduce_scatter_sequence_region(x: Tensor, axis: Axis) -> Tensor:
    """(B, T, H) -> (B, T/tp, H): reduce-scatter forward, all-gather backward."""
    return x if axis.size == 1 else _ReduceScatterSequence.apply(x, axis)  # type: ignore[no-untyped-call]


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the axis, as a new tensor."""
    total = x.clone()
    dist.all_reduce(total, group=axis.group)
    return total


def all_gather_sequence(x: Tensor, axis: Axis) -> Tensor:
    """(B, T/tp, ...) on each rank -> (B, T, ...) on all."""
    return gather_pieces(all_gather_start(x, axis)[0], axis)


def all_gather_start(x: Tensor, axis: Axis, *, asynchronous: bool = False) -> tuple[Tensor, dist.Work | None]:
    """Start gathering (B, T/tp, ...) into (tp B, T/tp, ...); wait on the handle before reading it."""
    pieces = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    work = dist.all_gather_into_tensor(pieces, x.contiguous(), group=axis.group, async_op=asynchronous)
    return pieces, work


def gather_pieces(pieces: Tensor, axis: Axis) -> Tensor:
    """(tp B, T/tp, ...) -> (B, T, ...): rank r's piece is the r-th stretch of the sequence."""
    by_rank = pieces.unflatten(0, (axis.size, -1))
    whole: Tensor = by_rank.movedim(0, SEQUENCE_DIM).flatten(SEQUENCE_DIM, SEQUENCE_DIM + 1)
    return whole


def reduce_scatter_sequence(x: Tensor, axis: Axis) -> Tensor:
    """(B, T, ...) summed over the axis -> this rank's (B, T/tp, ...)."""
    piece, _ = reduce_scatter_start(x, axis)
    return piece


def reduce_scatter_start(
    x: Tensor, axis: Axis, *, asynchronous: bool = False
) -> tuple[Tensor, dist.Work | None]:
    """Start the reduce-scatter of (B, T, ...) into this rank's (B, T/tp, ...); wait on the handle first."""
    by_rank = x.unflatten(SEQUENCE_DIM, (axis.size, -1)).movedim(SEQUENCE_DIM, 0).contiguous()
    piece = torch.empty_like(by_rank[0])
    work = dist.reduce_scatter_tensor(piece, by_rank.flatten(0, 1), group=axis.group, async_op=asynchronous)
    return piece, work


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.axis), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_gather_sequence(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_sequence(grad, ctx.axis), None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter_sequence(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_gather_sequence(grad, ctx.axis), None
