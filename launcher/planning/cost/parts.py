"""The parts of a model that a pipeline rank runs, with what one micro-batch costs in each. Pure."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from launcher.planning.cost.geometry import Chunk
from launcher.planning.cost.operations import (
    Collective,
    Matmul,
    Operation,
    Sizes,
    block,
    embedding,
    head,
    loss,
    recomputed,
    run_again,
)
from launcher.planning.cost.tape import Footprint, footprint


@dataclass(frozen=True)
class Part:
    """Embedding, a block, or the head with the loss: its operations, and those it runs again."""

    program: tuple[Operation, ...]
    again: tuple[Operation, ...]
    footprint: Footprint

    @cached_property
    def forward_matmuls(self) -> list[Matmul]:
        return [matmul for one in self.program for matmul in one.forward_matmuls]

    @cached_property
    def backward_matmuls(self) -> list[Matmul]:
        """With those of the forward pass that are run again."""
        again = [matmul for one in self.again for matmul in one.forward_matmuls]
        return again + [matmul for one in self.program for matmul in one.backward_matmuls]

    @cached_property
    def flops(self) -> int:
        """Executed, forward and backward."""
        return sum(matmul.flops for matmul in self.forward_matmuls + self.backward_matmuls)

    @cached_property
    def traffic(self) -> Counter[Collective]:
        """Over the tensor group, forward and backward."""
        return Counter(
            collective
            for operations in (self.program, self.again)
            for one in operations
            for collective in one.forward_traffic
        ) + Counter(
            collective for one in self.program for collective in one.backward_traffic + one.overlapped_traffic
        )


@dataclass(frozen=True)
class Parts:
    """Those of every model: the blocks are alike."""

    embedding: Part
    block: Part
    head: Part

    def of(self, chunk: Chunk) -> list[tuple[Part, int]]:
        """Each part of a stage, and how many there are of it, in forward order."""
        found = [
            (self.embedding, int(chunk.has_embedding)),
            (self.block, chunk.blocks),
            (self.head, int(chunk.has_head)),
        ]
        return [(part, count) for part, count in found if count]


@cache
def parts(s: Sizes) -> Parts:
    blocks = block(s)
    return Parts(
        _part(embedding(s), [], s.inputs),
        _part(blocks, recomputed(s, blocks), s.stretch),
        _part([*head(s), loss(s)], [], s.stretch),
    )


def _part(program: Sequence[Operation], dropped: Sequence[Operation], input_size: int) -> Part:
    return Part(tuple(program), tuple(run_again(dropped)), footprint(program, dropped, input_size))


def flops(of: Iterable[tuple[Part, int]]) -> int:
    """Executed for one micro-batch."""
    return sum(part.flops * count for part, count in of)


def traffic(of: Iterable[tuple[Part, int]]) -> Counter[Collective]:
    """Collectives over the tensor group for one micro-batch."""
    total: Counter[Collective] = Counter()
    for part, count in of:
        for collective, number in part.traffic.items():
            total[collective] += number * count
    return total
