"""Operations of a model as data: output, tensors kept for the backward pass, products and collectives.

Activation memory (tape.py), FLOPs, tensor-parallel traffic and time all follow from one list of operations.
Tests compare the list with the real modules, which launcher/tracing traces. Sizes are bytes of a tensor rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from launcher.config.schema import Dtype

BYTES = {Dtype.fp32: 4, Dtype.bf16: 2, Dtype.fp16: 2}
FP32, INT64, BOOL = 4, 8, 1

CollectiveKind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]


@dataclass(frozen=True)
class Collective:
    """A collective; `size` is the bytes of the tensor reduced, or of the whole gathered or scattered.

    Of an all-to-all it is the bytes of a rank's tensor, of which each rank gets an equal part.
    """

    kind: CollectiveKind
    size: int

    def sent(self, ranks: int) -> float:
        """Return the bytes that each rank sends in a ring of `ranks` (Thakur et al., IJHPCA 19, 2005)."""
        if ranks == 1:
            return 0.0
        rounds = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}
        return self.size if self.kind == "send" else rounds[self.kind] * self.size * (ranks - 1) / ranks


@dataclass(frozen=True)
class Matmul:
    """A product (m, k) x (k, n), done `count` times with 2 m n k FLOPs each."""

    m: int
    n: int
    k: int
    count: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k * self.count


@dataclass(frozen=True)
class FusedAttention:
    """Fused attention of `heads` heads over `length` tokens each: two products forward, five backward.

    With context parallelism over `pairs` pairs of chunks of queries and keys, of `length` tokens each.
    """

    length: int
    head_size: int
    heads: int  # of all sequences
    is_causal: bool  # computes only the scores of earlier tokens, in pairs of a chunk with itself
    pairs: int = 1
    diagonal: int = 1  # pairs of a chunk with itself

    @property
    def product(self) -> Matmul:
        """Return one of the products, over all scores, as FLOPs are counted."""
        return Matmul(self.length, self.length, self.head_size, self.heads * self.pairs)

    @property
    def flops(self) -> float:
        """FLOPs computed in one of the products."""
        skipped = self.diagonal / 2 if self.is_causal else 0
        return self.product.flops * (1 - skipped / self.pairs)


@dataclass(frozen=True)
class Operation:
    """A step of the forward pass, with its counterpart in the backward pass."""

    name: str
    inputs: tuple[str, ...]
    size: int  # of the output, which has the operation's name
    saves: tuple[str, ...] = ()  # inputs or output kept for the backward pass
    extra: int = 0  # other tensors kept: statistics, a mask, a copy in another precision
    scratch: int = 0  # temporary tensors of the forward pass
    backward_scratch: int = 0  # temporary tensors beside the gradients of the inputs
    backward_entry: int = 0  # temporary tensors before those gradients exist
    weight: int = 0  # gradient of the weight, temporary beside the accumulated gradient
    made: int = 0  # gradient of the weight that the forward pass makes in fp32, kept for the backward pass
    gradients: tuple[int, ...] = ()  # sizes of the inputs' gradients, if they differ from the inputs
    joins: bool = False  # gradients are pieces of one tensor, not terms of a sum
    adds: bool = False  # a residual: both inputs have the output's gradient
    forward_matmuls: tuple[Matmul, ...] = ()
    backward_matmuls: tuple[Matmul, ...] = ()
    attention: FusedAttention | None = None  # set if its fused kernels compute the products
    forward_traffic: tuple[Collective, ...] = ()
    backward_traffic: tuple[Collective, ...] = ()
    overlapped_traffic: tuple[Collective, ...] = ()  # backward, overlapped with the weight's product
    forward_exchange: tuple[Collective, ...] = ()  # over the expert group
    backward_exchange: tuple[Collective, ...] = ()
    forward_context: tuple[Collective, ...] = ()  # over the context group
    backward_context: tuple[Collective, ...] = ()
    hides_context: bool = False  # sends to context ranks run while the operation computes
    forward_bytes: int = 0  # read and written by memory-bound kernels
    backward_bytes: int = 0
    kernels: int = 1  # launched in the forward pass
    is_eager: bool = False  # also in a compiled block
    is_loop: bool = False  # kernels that one function starts in a loop, without Python or autograd for each


def run_again(stretch: Sequence[Operation]) -> list[Operation]:
    """Return the operations of a recomputed stretch that run again: torch stops at the last kept tensor."""
    keeping = [index for index, operation in enumerate(stretch) if operation.saves or operation.extra]
    last = max(keeping, default=-1)
    if last < 0:
        return []
    # A product keeps only its input, so it does not run again itself.
    runs_it = stretch[last].extra or stretch[last].name in stretch[last].saves
    return list(stretch[: last + 1 if runs_it else last])
