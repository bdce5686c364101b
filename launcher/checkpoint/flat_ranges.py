"""Map a flat range of a shard to boxes of the logical tensor. Pure."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from launcher.checkpoint.boxes import Box, flat_blocks
from launcher.parallel.mesh import Axis
from launcher.parallel.sharding import LogicalTensor

if TYPE_CHECKING:  # imports deepspeed
    from launcher.engine.state import Fragment


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


def fragment_views(fragment: "Fragment", axis: Axis) -> Iterator[tuple[str, Box, Tensor]]:
    """Yield the kind of tensor, the box and the view of each box of a fragment's tensors."""
    for kind, tensor in fragment.tensors.items():
        for box, view in logical_views(tensor, fragment.start, fragment.shard_shape, fragment.logical, axis):
            yield kind, box, view


def _split_segments(logical: LogicalTensor, axis: Axis) -> list[tuple[int, int, int]]:
    """Return (index in the shard, index in the logical tensor, length) of each segment of the split dim."""
    if logical.split_dim is None:
        return []
    if logical.padded is not None:
        each = logical.padded // axis.size
        length = min(each, logical.shape[logical.split_dim] - axis.rank * each)
        return [(0, axis.rank * each, length)] if length > 0 else []
    segments, local, target = [], 0, 0
    for length in logical.segments:
        piece = length // axis.size
        segments.append((local, target + axis.rank * piece, piece))
        local, target = local + piece, target + length
    return segments
