"""Map a flat range of a shard to boxes of the logical tensor. Pure."""

from collections.abc import Iterator
from itertools import accumulate

from torch import Tensor

from launcher.checkpoint.boxes import Box, flat_blocks
from launcher.parallel.mesh import Axis
from launcher.parallel.sharding import LogicalTensor


def logical_views(
    tensor: Tensor, start: int, shard_shape: tuple[int, ...], logical: LogicalTensor, axis: Axis
) -> Iterator[tuple[Box, Tensor]]:
    """Yield each box of the logical tensor that `tensor` covers, with the view of `tensor` that holds it.

    `tensor` (numel,) holds elements start .. start + numel of the flattened shard of tensor rank
    `axis.rank`; the shard has shape `shard_shape`. Padding of the vocabulary belongs to no box.
    """
    segments = _split_segments(logical, axis)
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
                yield Box(tuple(offsets), tuple(sizes)), view.narrow(dim, first - box.offsets[dim], size)


def _split_segments(logical: LogicalTensor, axis: Axis) -> list[tuple[int, int, int]]:
    """Return the shard's segments along the split dimension.

    A segment is (first index in the shard, first index in the logical tensor, length). A fused weight has one
    segment for each of its parts: queries, keys and values.
    """
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
