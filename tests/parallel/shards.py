"""An independent way to cut a whole tensor into the shards of the tensor ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from launcher.parallel.initializer import DrawFunction, LogicalView
from launcher.parallel.mesh import Axis
from launcher.parallel.sharding import LogicalTensor


def split(full: Tensor, logical: LogicalTensor, axis: Axis) -> Tensor:
    """Return this tensor rank's shard of `full`, which has logical.shape. Padding rows are zero."""
    assert tuple(full.shape) == logical.shape, (logical, full.shape)
    if logical.split_dim is None:
        return full
    dim = logical.split_dim
    if logical.padded is not None:
        rows = list(full.shape)
        rows[dim] = logical.padded - full.shape[dim]
        full = torch.cat([full, full.new_zeros(rows)], dim=dim)
        return full.chunk(axis.size, dim=dim)[axis.rank].contiguous()
    pieces = [
        segment.chunk(axis.size, dim=dim)[axis.rank] for segment in full.split(logical.segments, dim=dim)
    ]
    return torch.cat(pieces, dim=dim)


def drawn_as(full: Tensor) -> DrawFunction:
    """Return the function that draws the values of `full`, a whole logical tensor."""

    def draw(seed: int, logical: LogicalTensor, pieces: Sequence[LogicalView]) -> None:
        for box, tensor in pieces:
            tensor.copy_(full.detach()[box.slices])

    return draw
