"""Low-rank adapters of the projections of a block: LoRA (Hu et al., arXiv 2106.09685).

An adapter adds alpha / rank * B A x to the output of a projection. B is zero at first. A fused projection has
an adapter for each of its segments, as models with separate projections have: q, k and v, or gate and up.

Shapes: B batch, T sequence, tp tensor-parallel size, r rank, k segments. Each adapter adds one collective of
(B, T, k r) or (B, T, r) to the collectives of its projection, in each direction that the table names.

| adapter of | A | B | without sequence parallelism | with it |
|---|---|---|---|---|
| column-parallel | whole | rows split | all-reduce backward | all-gather forward, reduce-scatter backward |
| row-parallel | columns split | whole | all-reduce forward | reduce-scatter forward, all-gather backward |

With sequence parallelism the gradient of the whole matrix is all-reduced too, like that of a norm's weight.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.config.schema import ModelConfig
from launcher.config.shape import lora_segments
from launcher.models.dropout import Seed, dropout
from launcher.parallel.initializer import normal, zeros
from launcher.parallel.sharding import LogicalTensor

if TYPE_CHECKING:
    from launcher.models.block_context import BlockContext

LORA_A, LORA_B = "lora_a", "lora_b"


class Adapter(nn.Module, ABC):
    """The adapter of one projection; see the subclasses for shapes."""

    def __init__(self, name: str, target: str, model: ModelConfig, context: "BlockContext") -> None:
        super().__init__()
        lora = context.lora
        assert lora is not None
        assert lora.rank
        self.context, self.tp, self.probability = context, context.tp, lora.dropout
        self.rank, self.scale = lora.rank, lora.alpha / lora.rank
        inputs, segments = lora_segments(model)[target]
        self.widths = [segment // self.tp.axis.size for segment in segments]
        make = self.tp.initializer.parameter
        # The variance of PEFT's uniform numbers.
        draw = normal((3 * inputs) ** -0.5)
        self.a = make(self._logical_a(name, inputs, len(segments)), draw, is_adapter=True)
        self.b = make(self._logical_b(name, segments), zeros, is_adapter=True)

    def seed(self) -> int | None:
        """Return the seed of the next dropout mask; None without dropout."""
        if not self.training or self.probability == 0.0:
            return None
        random = self.context.random
        return random.local() if self._differs_between_ranks() else random.shared()

    def _dropped(self, x: Tensor, seed: Seed | None) -> Tensor:
        return x if seed is None else dropout(x, self.probability, seed)

    @abstractmethod
    def _logical_a(self, name: str, inputs: int, segments: int) -> LogicalTensor:
        """Return the name, shape and split of A."""

    @abstractmethod
    def _logical_b(self, name: str, segments: tuple[int, ...]) -> LogicalTensor:
        """Return the name, shape and split of B."""

    @abstractmethod
    def _differs_between_ranks(self) -> bool:
        """Return whether tensor ranks have different inputs, and so need different masks."""


class ColumnAdapter(Adapter):
    """Adapter of a ColumnParallelLinear: (B, T, in) or (B, T/tp, in) -> (B, T, out/tp)."""

    def _logical_a(self, name: str, inputs: int, segments: int) -> LogicalTensor:
        return LogicalTensor(f"{name}.{LORA_A}", (segments * self.rank, inputs))

    def _logical_b(self, name: str, segments: tuple[int, ...]) -> LogicalTensor:
        return LogicalTensor(f"{name}.{LORA_B}", (sum(segments), self.rank), 0, segments)

    def _differs_between_ranks(self) -> bool:
        return self.tp.sequence_parallel

    def forward(self, x: Tensor, seed: Seed | None = None) -> Tensor:
        low = F.linear(self._dropped(x, seed), self.tp.replicated(self.a)) * self.scale
        low = self.tp.enter(low)
        if len(self.widths) == 1:
            return F.linear(low, self.b)
        pieces = zip(low.split(self.rank, dim=-1), self.b.split(self.widths), strict=True)
        return torch.cat([F.linear(of_segment, rows) for of_segment, rows in pieces], dim=-1)


class RowAdapter(Adapter):
    """Adapter of a RowParallelLinear: (B, T, in/tp) -> (B, T, out) or (B, T/tp, out)."""

    def _logical_a(self, name: str, inputs: int, segments: int) -> LogicalTensor:
        return LogicalTensor(f"{name}.{LORA_A}", (self.rank, inputs), 1, (inputs,))

    def _logical_b(self, name: str, segments: tuple[int, ...]) -> LogicalTensor:
        return LogicalTensor(f"{name}.{LORA_B}", (sum(segments), self.rank))

    def _differs_between_ranks(self) -> bool:
        return True

    def forward(self, x: Tensor, seed: Seed | None = None) -> Tensor:
        low = self.tp.leave(F.linear(self._dropped(x, seed), self.a) * self.scale)
        return F.linear(low, self.tp.replicated(self.b))


def adapter_of(
    kind: type[Adapter], name: str, target: str, model: ModelConfig, context: "BlockContext"
) -> Adapter | None:
    """Return the adapter of the projection `name`; None if `target` has none."""
    if context.lora is None or target not in context.lora.targets:
        return None
    return kind(name, target, model, context)


def seed_of_adapter(adapter: Adapter | None) -> int | None:
    return None if adapter is None else adapter.seed()


def adapted(linear: nn.Module, adapter: Adapter | None, x: Tensor, seed: Seed | None) -> Tensor:
    """Return the output of a projection, with its adapter if it has one."""
    y: Tensor = linear(x)
    return y if adapter is None else y + adapter(x, seed)
