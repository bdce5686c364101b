"""Slice the launcher's fused weights for peers that shard a tensor's rows evenly."""

import torch
from torch import Tensor

from benchmarks.contest.job import Sizes


def with_rows_by_rank(weights: dict[str, Tensor], sizes: Sizes, ranks: int) -> dict[str, Tensor]:
    """Return the weights with the rows of query, key and value ordered so that a rank's rows are adjacent.

    A rank's even share of the fused weight then holds its heads' queries, keys and values.
    """
    size = sizes.hidden // sizes.heads
    parts = [sizes.heads * size, sizes.kv_heads * size, sizes.kv_heads * size]

    def ordered(fused: Tensor) -> Tensor:
        by_part = [part.chunk(ranks) for part in fused.split(parts)]
        return torch.cat([chunk[rank] for rank in range(ranks) for chunk in by_part])

    return {name: ordered(weight) if ".qkv." in name else weight for name, weight in weights.items()}
