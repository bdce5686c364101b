"""Context parallelism: each rank holds a part of every sequence. Exchanges of keys and values, and of heads.

Shapes: B batch, T sequence, C context ranks, h heads, D head size. A rank holds T/C tokens, in the order of
config/sequence_order.py. The functions here have no backward pass: models/context_attention.py calls them in
both directions.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.config.schema import ContextMethod
from launcher.config.sequence_order import Part, chunks_of, chunks_per_rank, part_of
from launcher.parallel.mesh import Axis

Transfer = tuple[Tensor, list[dist.Work]]  # the tensor that is being received, and handles to wait for


@dataclass(frozen=True)
class ContextParallel:
    """The context axis of this rank, and the method by which its ranks compute attention together."""

    axis: Axis
    method: ContextMethod

    @property
    def chunks(self) -> int:
        """The number of chunks of a whole sequence."""
        return self.axis.size * chunks_per_rank(self.method)

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        return chunks_of(rank, self.axis.size, self.method)

    def part(self, length: int) -> Part:
        """Return the positions that this rank holds of a sequence of `length` tokens."""
        return part_of(length, self.axis.rank, self.axis.size, self.method)

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Return the positions of this rank's part as a tensor (T/C,)."""
        return torch.cat([torch.arange(each.start, each.stop, device=device) for each in self.part(length)])

    def in_order(self, by_rank: Tensor, dim: int) -> Tensor:
        """Join the parts (C, ...) of all ranks to whole sequences: `dim` of a part grows from T/C to T."""
        parts: dict[int, Tensor] = {}
        for rank, held in enumerate(by_rank.unbind(0)):
            chunks = self.chunks_of(rank)
            parts |= zip(chunks, held.chunk(len(chunks), dim), strict=True)
        return torch.cat([parts[number] for number in range(self.chunks)], dim)

    def whole(self, x: Tensor) -> Tensor:
        """Return whole sequences (B, T) from each rank's x (B, T/C). For small tensors (all-gather)."""
        return self.in_order(all_gather_parts(x, self.axis), 1)


def context_of(axis: Axis, method: ContextMethod) -> ContextParallel | None:
    """Return the context parallelism of this rank; None if every rank holds whole sequences."""
    return None if axis.size == 1 else ContextParallel(axis, method)


def all_gather_parts(x: Tensor, axis: Axis) -> Tensor:
    """Return every rank's x, (C, ...), by rank (all-gather over `axis`)."""
    parts = x.new_empty(axis.size, *x.shape)
    dist.all_gather_into_tensor(parts.flatten(0, 1), x.contiguous(), group=axis.group)
    return parts


def reduce_scatter_parts(x: Tensor, axis: Axis) -> Tensor:
    """Return this rank's part of x (C, ...) summed over the ranks (reduce-scatter over `axis`)."""
    part = torch.empty_like(x[0])
    dist.reduce_scatter_tensor(part, x.flatten(0, 1), group=axis.group)
    return part


def pass_on_start(x: Tensor, axis: Axis) -> Transfer:
    """Start to send x to the next rank of the ring and to receive the tensor of the rank before."""
    received = torch.empty_like(x)
    assert axis.group is not None
    ranks = dist.get_process_group_ranks(axis.group)
    after, before = ranks[(axis.rank + 1) % axis.size], ranks[(axis.rank - 1) % axis.size]
    operations = [
        dist.P2POp(dist.isend, x, after, axis.group),
        dist.P2POp(dist.irecv, received, before, axis.group),
    ]
    return received, dist.batch_isend_irecv(operations)


def finish(transfer: Transfer) -> Tensor:
    """Wait for the transfer; return the tensor that was received."""
    received, works = transfer
    for work in works:
        work.wait()
    return received


def heads_for_sequence(tensors: list[Tensor], axis: Axis) -> Tensor:
    """Exchange parts of sequences for heads: from each (B, T/C, h, D) to (B, T, h/C, D).

    The results are one tensor, (B, T, sum of h/C, D). Collective over `axis`: one all-to-all.
    """
    heads = [x.shape[2] // axis.size for x in tensors]
    batch, length, _, size = tensors[0].shape
    by_heads = tensors[0].new_empty(axis.size, batch, length, sum(heads), size)
    for place, x in zip(by_heads.split(heads, 3), tensors, strict=True):
        place.copy_(x.unflatten(2, (axis.size, -1)).movedim(2, 0))
    by_part = torch.empty_like(by_heads)
    dist.all_to_all_single(by_part, by_heads, group=axis.group)
    return by_part.movedim(0, 1).flatten(1, 2)


def sequence_for_heads(tensors: list[Tensor], axis: Axis) -> list[Tensor]:
    """Exchange heads for parts of sequences: each (B, T, h/C, D) -> (B, T/C, h, D).

    Collective over `axis`: one all-to-all.
    """
    heads = [x.shape[2] for x in tensors]
    batch, length, _, size = tensors[0].shape
    by_part = tensors[0].new_empty(axis.size, batch, length // axis.size, sum(heads), size)
    for place, x in zip(by_part.split(heads, 3), tensors, strict=True):
        place.copy_(x.unflatten(1, (axis.size, -1)).movedim(1, 0))
    by_heads = torch.empty_like(by_part)
    dist.all_to_all_single(by_heads, by_part, group=axis.group)
    return [x.movedim(0, 2).flatten(2, 3) for x in by_heads.split(heads, 3)]
