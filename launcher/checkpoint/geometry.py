"""Where a stretch of a flattened shard lies in the logical tensor, as boxes. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import prod

from torch import Tensor

from launcher.parallel.mesh import Axis
from launcher.parallel.sharding import LogicalTensor


@dataclass(frozen=True)
class Box:
    """A block of a tensor: its first element, and how far it extends in each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.sizes)

    def overlap(self, other: "Box") -> "Box | None":
        """What both cover."""
        first = tuple(map(max, self.offsets, other.offsets))
        ends = [
            min(a + n, b + m)
            for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        ]
        sizes = tuple(end - start for start, end in zip(first, ends, strict=True))
        return Box(first, sizes) if all(size > 0 for size in sizes) else None

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """The slices that cut it out of `outer`."""
        starts = [a - b for a, b in zip(self.offsets, outer.offsets, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))


def flat_blocks(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Elements start .. stop of a row-major tensor of `shape`, cut into boxes, in order of memory."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield Box((start,), (stop - start,))
        return
    inner = prod(shape[1:])
    while start < stop:
        row, column = divmod(start, inner)
        whole_rows = (stop - start) // inner if column == 0 else 0
        if whole_rows:
            yield Box((row, *(0 for _ in shape[1:])), (whole_rows, *shape[1:]))
            start += whole_rows * inner
            continue
        end = min(inner, column + stop - start)
        for box in flat_blocks(shape[1:], column, end):
            yield Box((row, *box.offsets), (1, *box.sizes))
        start += end - column


def logical_views(
    tensor: Tensor, start: int, shard_shape: tuple[int, ...], logical: LogicalTensor, axis: Axis
) -> Iterator[tuple[Box, Tensor]]:
    """Each box of the logical tensor that `tensor` covers, with the view of `tensor` that holds it.

    `tensor` (numel,) is elements start .. start + numel of tensor rank `axis.rank`'s flattened shard.
    Padding is in no box.
    """
    stretches = _stretches(logical, axis)
    position = 0
    for box in flat_blocks(shard_shape, start, start + tensor.numel()):
        view = tensor.narrow(0, position, box.numel).view(box.sizes)
        position += box.numel
        if logical.split_dim is None:
            yield box, view
            continue
        dim = logical.split_dim
        for local, target, length in stretches:
            first = max(local, box.offsets[dim])
            size = min(local + length, box.offsets[dim] + box.sizes[dim]) - first
            if size > 0:
                offsets, sizes = list(box.offsets), list(box.sizes)
                offsets[dim], sizes[dim] = target + first - local, size
                yield Box(tuple(offsets), tuple(sizes)), view.narrow(dim, first - box.offsets[dim], size)


def _stretches(logical: LogicalTensor, axis: Axis) -> list[tuple[int, int, int]]:
    """(first index in the shard, first index in the logical tensor, length) along the split dimension."""
    if logical.split_dim is None:
        return []
    if logical.padded is not None:
        each = logical.padded // axis.size
        length = min(each, logical.shape[logical.split_dim] - axis.rank * each)
        return [(0, axis.rank * each, length)] if length > 0 else []
    pieces = [segment // axis.size for segment in logical.segments]
    locals_ = accumulate(pieces, initial=0)
    targets = accumulate(logical.segments, initial=0)
    return [
        (local, target + axis.rank * piece, piece)
        for local, target, piece in zip(locals_, targets, pieces, strict=False)
    ]
