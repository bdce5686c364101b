"""Map a logical (unsharded) tensor to the shards of the tensor ranks, and back.

Every parameter of a model carries a LogicalTensor: name, global shape and split. Weights are initialized,
saved, compared and counted by their LogicalTensor, in any layout. Only this module computes the mapping, and
only launcher/parallel/initializer.py draws the initial values.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from launcher.parallel.boxes import Box, flat_blocks
from launcher.parallel.mesh import Axis

WEIGHT = "weight"  # names a parameter itself, as "exp_avg" and so on name its optimizer states


@dataclass(frozen=True)
class LogicalTensor:
    """Name, global shape and split of the unsharded tensor behind a parameter.

    With `split_dim` None every tensor rank holds the whole tensor. Otherwise `segments` are lengths along
    split_dim whose sum is shape[split_dim], for example query, key and value of a fused projection. Each
    segment is split evenly over the tensor ranks, and a shard is the concatenation of a rank's parts of all
    segments. With `part` (i, n) a rank holds the i-th of n equal stretches of the rows, and splits that over
    the tensor ranks: experts, of which each expert-parallel rank holds a part. `padded` is the length of
    split_dim with padding rows, which belong to no logical row; it needs a single segment.
    """

    name: str
    shape: tuple[int, ...]
    split_dim: int | None = None
    segments: tuple[int, ...] = ()
    padded: int | None = None
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if self.split_dim is not None:
            assert sum(self.segments) == self.shape[self.split_dim], self
            assert self.padded is None or len(self.segments) == 1, self

    @property
    def is_split(self) -> bool:
        return self.split_dim is not None

    @property
    def is_part(self) -> bool:
        """Whether data ranks hold different rows."""
        return self.part[1] > 1

    @property
    def rows(self) -> tuple[int, int]:
        """Return the first row of the part, and its number of rows."""
        index, count = self.part
        return self.shape[0] // count * index, self.shape[0] // count

    @property
    def segments_of_part(self) -> tuple[int, ...]:
        """Return the segments of the part: of all segments if the columns are split."""
        index, count = self.part
        each = len(self.segments) // count
        return self.segments[index * each : (index + 1) * each] if self.split_dim == 0 else self.segments

    def shard_shape(self, ranks: int) -> tuple[int, ...]:
        """Return the shape of the shard of each of `ranks` tensor ranks, padding included."""
        if self.split_dim is None:
            return self.shape
        lengths = self.segments_of_part if self.padded is None else (self.padded,)
        assert all(length % ranks == 0 for length in lengths), (self, ranks)
        shape = (self.rows[1], *self.shape[1:])
        before, after = shape[: self.split_dim], shape[self.split_dim + 1 :]
        return (*before, sum(lengths) // ranks, *after)


def logical_views(
    tensor: Tensor, start: int, shard_shape: tuple[int, ...], logical: LogicalTensor, axis: Axis
) -> Iterator[tuple[Box, Tensor]]:
    """Yield each box of the logical tensor that `tensor` covers, with the view of `tensor` that holds it.

    `tensor` (numel,) holds elements start .. start + numel of the flattened shard of tensor rank
    `axis.rank`; the shard has shape `shard_shape`. Padding of the vocabulary belongs to no box.
    """
    segments = split_segments(logical, axis)
    first_row = logical.rows[0] if logical.split_dim else 0  # if rows are split, the segments have the offset
    position = 0
    for box in flat_blocks(shard_shape, start, start + tensor.numel()):
        view = tensor.narrow(0, position, box.numel).view(box.sizes)
        position += box.numel
        if logical.split_dim is None:
            yield box, view
            continue
        dim = logical.split_dim
        for local, target, length in segments:
            first = max(local, box.offsets[dim])
            size = min(local + length, box.offsets[dim] + box.sizes[dim]) - first
            if size > 0:
                offsets, sizes = list(box.offsets), list(box.sizes)
                offsets[dim], sizes[dim] = target + first - local, size
                offsets[0] += first_row
                yield Box(tuple(offsets), tuple(sizes)), view.narrow(dim, first - box.offsets[dim], size)


def split_segments(logical: LogicalTensor, axis: Axis) -> list[tuple[int, int, int]]:
    """Return (index in the shard, index in the logical tensor, length) of each segment of the split dim."""
    if logical.split_dim is None:
        return []
    if logical.padded is not None:
        each = logical.padded // axis.size
        length = min(each, logical.shape[logical.split_dim] - axis.rank * each)
        return [(0, axis.rank * each, length)] if length > 0 else []
    segments, local, target = [], 0, logical.rows[0] if logical.split_dim == 0 else 0
    for length in logical.segments_of_part:
        piece = length // axis.size
        segments.append((local, target + axis.rank * piece, piece))
        local, target = local + piece, target + length
    return segments


def merge(shards: Sequence[Tensor], logical: LogicalTensor) -> Tensor:
    """Return the logical tensor, or its part, from all shards, in the order of the tensor ranks."""
    if logical.split_dim is None:
        return shards[0]
    dim, ranks = logical.split_dim, len(shards)
    if logical.padded is not None:
        return torch.cat(list(shards), dim=dim).narrow(dim, 0, logical.shape[dim])
    by_rank = [
        shard.split([length // ranks for length in logical.segments_of_part], dim=dim) for shard in shards
    ]
    return torch.cat([torch.cat(pieces, dim=dim) for pieces in zip(*by_rank, strict=True)], dim=dim)


def logical_of(parameter: Tensor) -> LogicalTensor:
    """Return the LogicalTensor that Initializer attached to a parameter."""
    logical = parameter.logical  # type: ignore[attr-defined]
    assert isinstance(logical, LogicalTensor)
    return logical


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed computed from the values, equal on every machine."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
