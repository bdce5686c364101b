"""Collectives that enter and leave tensor-parallel regions, with their backward passes.

The regions take a mesh axis and are the identity on an axis of one rank. copy_region and reduce_region are f
and g of Megatron-LM (Shoeybi et al., arXiv 1909.08053, figure 3). The two sequence regions are g and g-bar of
sequence parallelism (Korthikanti et al., arXiv 2205.05198, figure 5). Activations are (B, T, H): batch,
sequence, hidden. tp is the size of the axis.

In a compiled graph the collectives are custom operators, which take the name of the group and run the same
code. torch's own functional collectives would be scheduled by the compiler.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

from launcher.parallel.all_reduce import Handle, all_reduce_
from launcher.parallel.mesh import Axis

SEQUENCE_DIM = 1

AxisOperation = Callable[[Tensor, Axis], Tensor]


def copy_region(x: Tensor, axis: Axis) -> Tensor:
    """Enter a tensor-parallel region (f): identity forward, all-reduce of the gradient over `axis` backward.

    x and the result have the same shape. Also used for a replicated weight that each rank applies to its own
    shard of the sequence: the all-reduce then sums the weight's gradient over the ranks.
    """
    return _apply(x, axis, _identity, all_reduce)


def reduce_region(x: Tensor, axis: Axis) -> Tensor:
    """Leave a tensor-parallel region (g): all-reduce (sum) over `axis` forward, identity backward."""
    return _apply(x, axis, all_reduce, _identity)


def reduce_region_(x: Tensor, axis: Axis) -> Tensor:
    """Do what reduce_region does, in place: x must be new, and no operation may keep it."""
    if axis.size == 1 or torch.compiler.is_compiling():
        return reduce_region(x, axis)
    return _SumInPlace.apply(x, axis)  # type: ignore[no-untyped-call,no-any-return]


def gather_sequence_region(x: Tensor, axis: Axis) -> Tensor:
    """Gather the sequence, (B, T/tp, H) -> (B, T, H): all-gather forward, reduce-scatter backward."""
    return _apply(x, axis, all_gather_sequence, reduce_scatter_sequence)


def gather_copies_region(x: Tensor, axis: Axis) -> Tensor:
    """Gather (B, T/tp, ...) -> (B, T, ...) for work that every rank does alike: all-gather forward.

    Backward each rank has the whole gradient already, and takes its own part of the sequence: no collective.
    """
    return _apply(x, axis, all_gather_sequence, _own_part)


def reduce_scatter_sequence_region(x: Tensor, axis: Axis) -> Tensor:
    """Sum and shard the sequence, (B, T, H) -> (B, T/tp, H): reduce-scatter forward, all-gather backward."""
    return _apply(x, axis, reduce_scatter_sequence, all_gather_sequence)


def reduce_scatter_biased_region(x: Tensor, bias: Tensor, axis: Axis) -> Tensor:
    """Do what reduce_scatter_sequence_region does, and add a replicated bias (H,).

    Its gradient needs no collective: backward each rank gathers the gradient of the whole sequence anyway.
    """
    return _BiasedScatter.apply(x, bias, axis)  # type: ignore[no-untyped-call,no-any-return]


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Return the sum of x over `axis` as a new tensor of the same shape (all-reduce)."""
    if torch.compiler.is_compiling():
        return torch.ops.launcher.all_reduce(x, axis.group_name)  # type: ignore[no-any-return]
    total = x.clone(memory_format=torch.contiguous_format)
    all_reduce_(total, axis.group)
    return total


def all_gather_sequence(x: Tensor, axis: Axis) -> Tensor:
    """Return the full sequence (B, T, ...) from each rank's (B, T/tp, ...) (all-gather over `axis`)."""
    if torch.compiler.is_compiling():
        return torch.ops.launcher.all_gather_sequence(x, axis.group_name, axis.size)  # type: ignore[no-any-return]
    return join_sequence_shards(all_gather_start(x, axis)[0], axis)


def all_gather_start(x: Tensor, axis: Axis, *, asynchronous: bool = False) -> tuple[Tensor, Handle | None]:
    """Start the all-gather of (B, T/tp, ...) into (tp B, T/tp, ...); return result and handle or None."""
    shards = x.new_empty(axis.size * x.shape[0], *x.shape[1:])
    work = dist.all_gather_into_tensor(shards, x.contiguous(), group=axis.group, async_op=asynchronous)
    return shards, work


def join_sequence_shards(shards: Tensor, axis: Axis) -> Tensor:
    """Reorder gathered shards, (tp B, T/tp, ...) -> (B, T, ...); rank r has shard r of the sequence."""
    by_rank = shards.unflatten(0, (axis.size, -1))
    whole: Tensor = by_rank.movedim(0, SEQUENCE_DIM).flatten(SEQUENCE_DIM, SEQUENCE_DIM + 1)
    return whole


def reduce_scatter_sequence(x: Tensor, axis: Axis) -> Tensor:
    """Return this rank's shard (B, T/tp, ...) of x (B, T, ...) summed over `axis` (reduce-scatter)."""
    if torch.compiler.is_compiling():
        return torch.ops.launcher.reduce_scatter_sequence(x, axis.group_name, axis.size)  # type: ignore[no-any-return]
    shard, _ = reduce_scatter_start(x, axis)
    return shard


def reduce_scatter_start(
    x: Tensor, axis: Axis, *, asynchronous: bool = False
) -> tuple[Tensor, Handle | None]:
    """Start the reduce-scatter of (B, T, ...) into (B, T/tp, ...); return result and handle or None.

    On a CPU it is an all-to-all, whose results are added up in the order of the ranks: see is_exchanged.
    """
    by_rank = x.unflatten(SEQUENCE_DIM, (axis.size, -1)).movedim(SEQUENCE_DIM, 0).contiguous()
    shard = torch.empty_like(by_rank[0])
    if not is_exchanged(x):
        scattered = by_rank.flatten(0, 1)
        return shard, dist.reduce_scatter_tensor(shard, scattered, group=axis.group, async_op=asynchronous)
    received = torch.empty_like(by_rank)
    work = dist.all_to_all_single(received, by_rank, group=axis.group, async_op=True)
    summing = _Sum(work, received, shard)
    if asynchronous:
        return shard, summing
    summing.wait()
    return shard, None


def is_exchanged(x: Tensor) -> bool:
    """Return whether a reduce-scatter of x exchanges its parts, and adds them up itself.

    Gloo all-reduces a copy of x instead, which takes 3 times as long with two ranks (benchmarks/exchange.py).
    """
    return x.device.type == "cpu"


class _Sum(NamedTuple):
    """An all-to-all of parts (tp, ...) that is followed by their sum."""

    work: Any
    parts: Tensor
    total: Tensor

    def wait(self) -> None:
        self.work.wait()
        torch.sum(self.parts, 0, out=self.total)


def _apply(x: Tensor, axis: Axis, forward: AxisOperation, backward: AxisOperation) -> Tensor:
    return x if axis.size == 1 else _Region.apply(x, axis, forward, backward)  # type: ignore[no-untyped-call]


class _Region(torch.autograd.Function):
    """Applies one operation to x in the forward pass and another to its gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, forward: AxisOperation, backward: AxisOperation) -> Tensor:
        ctx.axis, ctx.operation = axis, backward
        return forward(x, axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.operation(grad, ctx.axis), None, None, None


class _BiasedScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return reduce_scatter_sequence(x, axis).add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        whole = all_gather_sequence(grad, ctx.axis)
        return whole, whole.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None


class _SumInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.mark_dirty(x)
        all_reduce_(x, axis.group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _identity(x: Tensor, axis: Axis) -> Tensor:
    return x.view_as(x)


def _own_part(x: Tensor, axis: Axis) -> Tensor:
    return x.chunk(axis.size, SEQUENCE_DIM)[axis.rank].contiguous()


def named_axis(group: str, size: int) -> Axis:
    """Return the axis of a process group by its name, with the rank left at 0: collectives do not need it."""
    return Axis(0, size, _resolve_process_group(group))  # type: ignore[arg-type]  # a NewType of str


@torch.library.custom_op("launcher::all_reduce", mutates_args=())
def _all_reduce(x: Tensor, group: str) -> Tensor:
    return all_reduce(x, named_axis(group, 0))


@_all_reduce.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("launcher::all_gather_sequence", mutates_args=())
def _all_gather_sequence(x: Tensor, group: str, size: int) -> Tensor:
    return all_gather_sequence(x, named_axis(group, size))


@_all_gather_sequence.register_fake
def _(x: Tensor, group: str, size: int) -> Tensor:
    return x.new_empty(x.shape[0], size * x.shape[SEQUENCE_DIM], *x.shape[2:])


@torch.library.custom_op("launcher::reduce_scatter_sequence", mutates_args=())
def _reduce_scatter_sequence(x: Tensor, group: str, size: int) -> Tensor:
    return reduce_scatter_sequence(x, named_axis(group, size))


@_reduce_scatter_sequence.register_fake
def _(x: Tensor, group: str, size: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[SEQUENCE_DIM] // size, *x.shape[2:])
