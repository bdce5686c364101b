"""The parts of a model that a pipeline rank runs, with the cost of a micro-batch in each part. Pure."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from launcher.planning.cost.block_operations import block, recomputed, sparse_block
from launcher.planning.cost.end_operations import embedding, head
from launcher.planning.cost.geometry import Chunk
from launcher.planning.cost.operations import Collective, Matmul, Operation, run_again
from launcher.planning.cost.sizes import Sizes
from launcher.planning.cost.tape import Footprint, footprint


@dataclass(frozen=True)
class ModelPart:
    """Embedding, a block, or the head with the loss: its operations, and the operations recomputed."""

    program: tuple[Operation, ...]
    again: tuple[Operation, ...]
    footprint: Footprint

    @cached_property
    def forward_matmuls(self) -> list[Matmul]:
        return [matmul for operation in self.program for matmul in operation.forward_matmuls]

    @cached_property
    def backward_matmuls(self) -> list[Matmul]:
        """Products of the backward pass, after the recomputed products."""
        again = [matmul for operation in self.again for matmul in operation.forward_matmuls]
        return again + [matmul for operation in self.program for matmul in operation.backward_matmuls]

    @cached_property
    def flops(self) -> int:
        """FLOPs executed, forward and backward, with recomputation."""
        return sum(matmul.flops for matmul in self.forward_matmuls + self.backward_matmuls)

    @cached_property
    def traffic(self) -> Counter[Collective]:
        """Collectives over the tensor group, forward and backward."""
        calls = [call for operation in self.program + self.again for call in operation.forward_traffic]
        for operation in self.program:
            calls += operation.backward_traffic + operation.overlapped_traffic
        return Counter(calls)

    @cached_property
    def exchange(self) -> Counter[Collective]:
        """Collectives over the expert group, forward and backward."""
        calls = [call for operation in self.program + self.again for call in operation.forward_exchange]
        return Counter(calls + [call for operation in self.program for call in operation.backward_exchange])

    @cached_property
    def context(self) -> Counter[Collective]:
        """Collectives over the context group, forward and backward."""
        calls = [call for operation in self.program + self.again for call in operation.forward_context]
        return Counter(calls + [call for operation in self.program for call in operation.backward_context])


@dataclass(frozen=True)
class ModelParts:
    """The parts of a model; blocks with experts are alike, and so are blocks without.

    If a model has one of the two kinds only, both fields are that kind.
    """

    embedding: ModelPart
    dense: ModelPart  # a block without experts
    sparse: ModelPart  # a block with experts
    head: ModelPart

    @property
    def block(self) -> ModelPart:
        """Return the block that does most."""
        return self.sparse

    def block_of(self, has_experts: bool) -> ModelPart:
        return self.sparse if has_experts else self.dense

    def blocks(self, chunk: Chunk) -> list[ModelPart]:
        """Return the blocks of a stage in order."""
        return [self.block_of(has_experts) for has_experts in chunk.kinds]

    def of(self, chunk: Chunk) -> list[tuple[ModelPart, int]]:
        """Return the parts of a stage and their numbers, in forward order."""
        ends = int(chunk.has_embedding), int(chunk.has_head)
        sparse = sum(chunk.kinds)
        counts = [(self.embedding, ends[0]), (self.dense, chunk.blocks - sparse)]
        counts += [(self.sparse, sparse), (self.head, ends[1])]
        return [(part, count) for part, count in counts if count]


@cache
def parts(s: Sizes) -> ModelParts:
    e = s.experts
    has_dense = not e.count or e.first_dense_layers > 0 or e.every > 1
    blocks = [_block_part(s, block(s))] if has_dense else []
    blocks += [_block_part(s, sparse_block(s))] if e.count else []
    return ModelParts(
        _part(embedding(s), [], s.samples), blocks[0], blocks[-1], _part(head(s), [], s.stretch)
    )


def _block_part(s: Sizes, program: Sequence[Operation]) -> ModelPart:
    return _part(program, recomputed(s, program), s.stretch)


def _part(program: Sequence[Operation], dropped: Sequence[Operation], input_size: int) -> ModelPart:
    return ModelPart(tuple(program), tuple(run_again(dropped)), footprint(program, dropped, input_size))


def flops(counted_parts: Iterable[tuple[ModelPart, int]]) -> int:
    """Return the FLOPs executed for a micro-batch."""
    return sum(part.flops * count for part, count in counted_parts)


def traffic(counted_parts: Iterable[tuple[ModelPart, int]]) -> Counter[Collective]:
    """Return the collectives over the tensor group for a micro-batch."""
    return _total((part.traffic, count) for part, count in counted_parts)


def exchange(counted_parts: Iterable[tuple[ModelPart, int]]) -> Counter[Collective]:
    """Return the collectives over the expert group for a micro-batch."""
    return _total((part.exchange, count) for part, count in counted_parts)


def of_context(counted_parts: Iterable[tuple[ModelPart, int]]) -> Counter[Collective]:
    """Return the collectives over the context group for a micro-batch."""
    return _total((part.context, count) for part, count in counted_parts)


def _total(counted: Iterable[tuple[Counter[Collective], int]]) -> Counter[Collective]:
    total: Counter[Collective] = Counter()
    for calls, count in counted:
        for collective, number in calls.items():
            total[collective] += number * count
    return total
