"""Attention over context ranks as an operation: models/context_attention.py, method by method. Pure.

Each sequence is split over C context ranks, and attention runs pair by pair of chunks of queries and keys.
Sizes are bytes of a tensor rank: queries, and keys with values, of its part of the sequence.
"""

import math
from dataclasses import dataclass

from launcher.config.schema import ContextMethod
from launcher.config.sequence_order import chunks_per_rank
from launcher.planning.cost.operations import BOOL, FP32, Collective, FusedAttention, Operation
from launcher.planning.cost.sizes import Sizes

_SCORES = 1 << 22  # scores that exist at the same time without a fused kernel: models/attention_pairs.py


@dataclass(frozen=True)
class _Part:
    """The chunks of a sequence that a rank computes, and the sizes of its tensors."""

    s: Sizes

    @property
    def is_masked(self) -> bool:
        """Whether queries attend to a part of the earlier keys only: documents and windows."""
        return self.s.masks_documents or self.s.has_windows

    @property
    def is_ulysses(self) -> bool:
        return self.s.context_method is ContextMethod.ulysses

    @property
    def chunks(self) -> int:
        """Chunks of queries of a rank."""
        if not self.is_ulysses:
            return chunks_per_rank(self.s.context_method)
        return self.s.context if self.is_masked else 1

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return self.s.length * (self.s.context if self.is_ulysses else 1) // self.chunks

    @property
    def heads(self) -> int:
        return self.s.heads // (self.s.context if self.is_ulysses else 1)

    @property
    def pairs(self) -> int:
        """Number of pairs of chunks; `chunks` of these pair a chunk with itself."""
        return self.chunks * (self.chunks + 1) // 2 if self.is_ulysses else 2 * self.s.context + 1

    @property
    def attention(self) -> FusedAttention:
        heads = self.s.micro_batch * self.heads
        return FusedAttention(
            self.chunk, self.s.head_size, heads, not self.is_masked, self.pairs, self.chunks
        )

    @property
    def is_fused(self) -> bool:
        on_cpu = self.s.device == "cpu"
        has_kernel = on_cpu or (not self.is_masked and self.s.element < FP32)
        return has_kernel and not self.s.caps_scores and self.s.dropout == 0.0

    @property
    def sums(self) -> int:
        """Log-sum-exps of the scores."""
        return FP32 * self.s.tokens * self.s.heads

    @property
    def mask(self) -> int:
        """The mask of a pair."""
        if not self.is_masked:
            return 0
        element = self.s.element if self.s.device == "cpu" else FP32
        samples = self.s.micro_batch if self.s.masks_documents else 1
        return samples * self.chunk**2 * element

    @property
    def masking(self) -> int:
        """The mask of a pair while it is made: the mask, and two Boolean tensors of the hidden scores."""
        element = self.s.element if self.s.device == "cpu" else FP32
        return self.mask // element * (element + 2 * BOOL)

    @property
    def forward_peak(self) -> int:
        """Peak of the attention of one pair, with the results of all chunks."""
        return max(self.joined + self.masking, self.joining + self.mask + 4 * self.scores)

    @property
    def backward_peak(self) -> int:
        """Peak of the backward pass of one pair, with the gradients of all queries."""
        of_keys = self.pair // (1 if self.is_ulysses and not self.is_masked else self.chunks)
        work = self.joining + of_keys + self.mask + 7 * self.scores
        return max(self.joined + self.masking, work)

    @property
    def scores(self) -> int:
        """Scores in fp32 that exist at the same time; none with a fused kernel."""
        if self.is_fused:
            return 0
        of_row = self.s.micro_batch * self.heads * self.chunk
        return FP32 * of_row * min(self.chunk, max(1, _SCORES // of_row))

    @property
    def copies(self) -> int:
        """Copies of each key/value head under ulysses, so that the ranks divide the heads."""
        return self.s.context // math.gcd(self.s.kv_heads, self.s.context) if self.is_ulysses else 1

    @property
    def pair(self) -> int:
        """Keys and values."""
        return 2 * self.s.key * self.copies

    @property
    def whole(self) -> int:
        """Queries, keys and values, with copies, as ulysses exchanges them."""
        return self.s.query + self.pair

    @property
    def reordered(self) -> tuple[int, int]:
        """Copies of queries, and of keys and values, ordered by head after an exchange; 0 with one head."""
        of_keys = self.s.kv_heads * self.copies // self.s.context
        return self.s.query * (self.heads > 1), self.pair * (of_keys > 1)

    def in_fp32(self, size: int) -> int:
        return size // self.s.element * FP32

    @property
    def joined(self) -> int:
        """The results of all chunks; in fp32 if results of several pairs were joined."""
        return self.s.query if self.pairs == self.chunks else self.in_fp32(self.s.query)

    @property
    def joining(self) -> int:
        """The results of all chunks while the result of a pair is joined to the result of its chunk."""
        if self.pairs == self.chunks:
            return self.s.query
        of_chunk, low = self.s.query // self.chunks, self.s.element < FP32
        return self.joined + of_chunk + (of_chunk + self.in_fp32(of_chunk) if low else 0)

    @property
    def ending(self) -> int:
        """The results of all chunks while they are copied into one tensor."""
        if self.chunks == 1:
            return self.joined
        return self.joined + self.s.query * (2 if self.s.element < FP32 else 1)


def context_core(s: Sizes, inputs: tuple[str, ...], gradients: tuple[int, ...]) -> Operation:
    """Return attention over context ranks: from queries, keys and values of a part to its mixed values."""
    part = _Part(s)
    forward, backward = _ulysses(part) if part.is_ulysses else _exchanged(part)
    kept = part.sums + (part.whole + s.query if part.is_ulysses else 0)
    ahead, back = exchanges(part)
    attention = part.attention
    passes = part.pairs // part.chunks if s.device == "cuda" else part.pairs
    return Operation(
        "core", inputs, s.query, saves=() if part.is_ulysses else (*inputs, "core"), extra=kept,
        scratch=max(0, forward - s.query - kept), gradients=gradients, joins=True,
        backward_scratch=max(s.fused, backward - sum(gradients)),
        forward_matmuls=(attention.product,) * 2, backward_matmuls=(attention.product,) * 5,
        attention=attention, forward_context=ahead, backward_context=back,
        hides_context=s.context_method is ContextMethod.ring,
        forward_bytes=3 * passes * s.query + 4 * part.scores, backward_bytes=4 * passes * s.query,
        kernels=8 * part.pairs,
    )  # fmt: skip


def exchanges(part: _Part) -> tuple[tuple[Collective, ...], tuple[Collective, ...]]:
    """Return the collectives over the context group, forward and backward."""
    s, ranks, summed = part.s, part.s.context, part.in_fp32(part.pair)
    if part.is_ulysses:
        both = Collective("all_to_all", part.whole), Collective("all_to_all", s.query)
        return both, both
    if s.context_method is ContextMethod.gather:
        gathered = Collective("all_gather", ranks * part.pair)
        return (gathered,), (gathered, Collective("reduce_scatter", ranks * summed))
    sends = (Collective("send", part.pair),) * (ranks - 1)
    return sends, sends + (Collective("send", summed),) * (ranks - 1)


def _exchanged(part: _Part) -> tuple[int, int]:
    """Return the additional peaks of ring and gather, forward and backward."""
    s, summed = part.s, part.in_fp32(part.pair)
    is_gather = s.context_method is ContextMethod.gather
    if is_gather:
        parts, of_parts = s.context * part.pair, s.context * summed
        forward = max(parts + part.pair + part.forward_peak, parts + part.ending)
        working = parts + part.pair + of_parts + part.backward_peak
        ended = parts + of_parts + summed
    else:
        # The next part is being received, and the gradients of the previous part are being sent.
        is_longer = s.context > 2
        forward = max(2 * part.pair + part.forward_peak, part.pair + part.ending)
        working = (1 + is_longer) * part.pair + (2 + is_longer) * summed + part.backward_peak
        ended = part.pair + 3 * summed
    total = summed + (part.pair if s.element < FP32 else 0)
    return forward, max(working, ended + part.joined, total + part.ending)


def _ulysses(part: _Part) -> tuple[int, int]:
    """Return the additional peaks of ulysses, forward and backward."""
    s, low = part.s, part.s.element < FP32
    replicated = part.pair if part.copies > 1 else 0
    # Copies: ordered by rank, exchanged, and ordered by token; a single sample needs no third copy.
    times = 3 if s.micro_batch > 1 else 2
    attended = part.whole + max(part.forward_peak, part.ending)
    results = part.joined + (s.query if part.chunks > 1 else 0)
    left = part.whole + results + 2 * s.query + part.reordered[0]
    summed = part.in_fp32(part.pair)
    ended = s.query + part.ending + summed + (part.pair if low else 0)
    ended += 2 * part.whole + sum(part.reordered)
    forward = max(replicated + times * part.whole, attended, left)
    return forward, max(times * s.query, s.query + summed + part.backward_peak, ended)
