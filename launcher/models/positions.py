"""Learned positions, added to the embedding."""

import torch.nn.functional as F
from torch import Tensor, nn

from launcher.config.schema import ModelConfig
from launcher.config.shape import position_count
from launcher.models.block_context import BlockContext, HiddenDropout
from launcher.parallel.initializer import normal
from launcher.parallel.sharding import LogicalTensor


class LearnedPositions(nn.Module):
    """Add a learned vector per position, then apply dropout: (B, T, H) or (B, T/tp, H) -> the same.

    Positions count from the start of the sample, or of the document (models/documents.py), also where this
    rank holds a part of the sample.
    """

    def __init__(self, name: str, model: ModelConfig, context: BlockContext) -> None:
        super().__init__()
        self.tp, self.documents, self.cp = context.tp, context.documents, context.cp
        shape = (position_count(model), model.hidden_size)
        self.weight = self.tp.initializer.parameter(
            LogicalTensor(f"{name}.weight", shape), normal(model.init_std)
        )
        self.dropout = HiddenDropout(model.dropout, context)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        shards, shard = (self.tp.axis.size, self.tp.axis.rank) if self.tp.sequence_parallel else (1, 0)
        places = self.documents.positions
        if self.cp is None:
            used = self.tp.replicated(self.weight[: shards * length])
        else:
            used = self.tp.replicated(self.weight[: shards * length * self.cp.axis.size])
            if places is None:
                places = self.cp.positions(len(used), x.device)
        if places is not None:
            used = F.embedding(places, used)
        x = x + used[..., shard * length : (shard + 1) * length, :]
        return self.dropout(x, self.dropout.seed())  # type: ignore[no-any-return]
