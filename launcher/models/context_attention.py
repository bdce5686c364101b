"""Causal attention over sequences that context-parallel ranks share: ring, gather and ulysses.

Shapes: B batch, T sequence, C context ranks, N query heads and K key/value heads of a tensor rank, D head
size. A rank has q (B, T/C, N, D), k and v (B, T/C, K, D) in the order of config/sequence_order.py, and gets
(B, T/C, N, D). A sequence is cut into chunks, and attention runs pair by pair of chunks of queries and keys
(attention_pairs.py), so that no rank ever holds the scores or the mask of a whole sequence.

| method | forward | backward |
|---|---|---|
| ring | C - 1 sends of keys and values | C - 1 sends of keys and values, and of their gradients |
| gather | an all-gather of keys and values | the same again, and a reduce-scatter of their gradients |
| ulysses | all-to-alls of queries, keys and values, and of the result | the same of their gradients |

Ring and gather add up the gradients of keys and values of several ranks in fp32, and send fp32.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from launcher.config.schema import ContextMethod
from launcher.models.attention_kernel import Kernel
from launcher.models.attention_pairs import HIDDEN, Pair, attend_pair, pair_gradients
from launcher.parallel.collectives import named_axis
from launcher.parallel.context import (
    ContextParallel,
    all_gather_parts,
    finish,
    heads_for_sequence,
    pass_on_start,
    reduce_scatter_parts,
    sequence_for_heads,
)
from launcher.parallel.mesh import Axis
from launcher.parallel.sharding import seed_of

# The result (B, T/C, N, D); q, k and v of this rank's heads in one tensor, and the result of these heads
# (both under ulysses, else empty); the log-sum-exps. The last three are kept for the backward pass.
AttentionResults = tuple[Tensor, Tensor, Tensor, Tensor]
KeysValues = Tensor | tuple[Tensor, ...]  # keys and values, each (B, L, K, D)
Visits = Iterator[tuple[int, Tensor]]  # a rank, and its keys and values (2, B, T/C, K, D)


class ContextSettings(NamedTuple):
    """Settings of the attention as numbers and texts, the only types that an operator of a graph takes."""

    method: str
    rank: int
    size: int
    group: str  # torch's name of the process group
    scale: float | None
    cap: float | None
    device: str
    dropout: float

    @property
    def context(self) -> ContextParallel:
        group = named_axis(self.group, self.size).group
        return ContextParallel(Axis(self.rank, self.size, group), ContextMethod[self.method])

    @property
    def is_ulysses(self) -> bool:
        return self.method == ContextMethod.ulysses.name


def context_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, dropout: float, seed: Tensor | int | None,
    kernel: Kernel, context: ContextParallel,
) -> Tensor:  # fmt: skip
    """Return causal attention of this rank's queries to the keys of all context ranks, (B, T/C, N, D).

    `first` is the first position that each query sees: (B or 1, T/C), under ulysses (B or 1, T); None: the
    start of the sequence. Collective over the context group, forward and backward: see the table above.
    """
    axis = context.axis
    settings = ContextSettings(
        context.method.name, axis.rank, axis.size, axis.group_name, kernel.scale, kernel.cap, kernel.device,
        dropout,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        mixed: Tensor = torch.ops.launcher.context_attention(q, k, v, first, seed, *settings)[0]
        return mixed
    mixed = _ContextAttention.apply(q, k, v, first, seed, settings)  # type: ignore[no-untyped-call]
    return mixed


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, seed: int | None,
        settings: ContextSettings,
    ) -> Tensor:  # fmt: skip
        results = attend(q, k, v, first, seed, settings)
        _keep(ctx, q, k, v, first, seed, settings, results)
        return results[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        arguments = *ctx.saved_tensors, ctx.seed, ctx.kv_heads, ctx.settings
        return *gradients(gradient, *arguments), None, None, None


def _keep(
    ctx: Any, q: Tensor, k: Tensor, v: Tensor, first: Any, seed: Any, settings: ContextSettings,
    results: AttentionResults,
) -> None:  # fmt: skip
    """Keep the inputs of the backward pass; ulysses needs no q, k, v and result of this rank's tokens."""
    mixed, *of_heads = results
    ctx.seed, ctx.settings, ctx.kv_heads = seed, settings, k.shape[2]
    if settings.is_ulysses:
        q, k, v, mixed = (x.new_empty(0) for x in (q, k, v, mixed))
    ctx.save_for_backward(q, k, v, first, mixed, *of_heads)


def attend(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, seed: Tensor | int | None,
    settings: ContextSettings,
) -> AttentionResults:  # fmt: skip
    """Return the result, and the tensors of the forward pass that the backward pass needs."""
    context, rules = settings.context, Rules(settings, first, seed)
    if settings.is_ulysses:
        whole = heads_for_sequence([q, *_replicated(k, v, context.axis.size)], context.axis)
        of_heads = _split(whole, q.shape[2], k.shape[2], context.axis.size)
        queries = Queries(of_heads[0], rules.chunks_of_whole_sequences, rules)
        queries.attend(rules.chunks_of_whole_sequences, of_heads[1:])
        core, sums = queries.result()
        [mixed] = sequence_for_heads([core], context.axis)
        return mixed, whole, core, sums
    queries = Queries(q, context.chunks_of(context.axis.rank), rules)
    for rank, keys_values in _visits(torch.stack([k, v]), context):
        queries.attend(context.chunks_of(rank), keys_values)
    mixed, sums = queries.result()
    return mixed, q.new_empty(0), q.new_empty(0), sums


def gradients(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, mixed: Tensor, whole: Tensor,
    core: Tensor, sums: Tensor, seed: Tensor | int | None, kv_heads: int, settings: ContextSettings,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v from the gradient of the result, (B, T/C, N, D)."""
    context, rules = settings.context, Rules(settings, first, seed)
    if settings.is_ulysses:
        return _gradients_of_heads(gradient, whole, core, sums, kv_heads, rules)
    queries = QueryGradients(gradient, q, mixed, sums, context.chunks_of(context.axis.rank), rules)
    # No variable refers to this rank's keys and values, so that _visits can free them.
    visits = _visits(torch.stack([k, v]), context)
    is_gather = context.method is ContextMethod.gather
    total = (_gradients_of_gathered if is_gather else _gradients_of_ring)(queries, visits, context)
    of_k, of_v = total.to(k.dtype)
    return queries.result(), of_k, of_v


def _gradients_of_gathered(queries: "QueryGradients", visits: Visits, context: ContextParallel) -> Tensor:
    """Return the gradients (2, B, T/C, K, D) of this rank's keys and values, in fp32."""
    of_parts = torch.empty(0)
    for rank, keys_values in visits:
        if not of_parts.numel():
            shape = context.axis.size, *keys_values.shape
            of_parts = torch.zeros(shape, dtype=torch.float32, device=keys_values.device)
        queries.add(context.chunks_of(rank), keys_values, of_parts[rank])
    return reduce_scatter_parts(of_parts, context.axis)


def _gradients_of_ring(queries: "QueryGradients", visits: Visits, context: ContextParallel) -> Tensor:
    """Return the gradients (2, B, T/C, K, D) of this rank's keys and values, in fp32.

    The gradients of a part are sent around the ring one rank behind the part, and each rank adds the
    gradients from its queries.
    """
    axis, exchange, of_this_rank = context.axis, None, torch.empty(0)
    for rank, keys_values in visits:
        of_part = torch.zeros(keys_values.shape, dtype=torch.float32, device=keys_values.device)
        queries.add(context.chunks_of(rank), keys_values, of_part)
        if rank == axis.rank:
            of_this_rank = of_part
            continue
        if exchange is not None:
            of_part += finish(exchange)
        exchange = pass_on_start(of_part, axis)
    assert exchange is not None
    of_this_rank += finish(exchange)
    return of_this_rank


def _visits(keys_values: Tensor, context: ContextParallel) -> Visits:
    """Yield each rank with its keys and values (2, B, T/C, K, D); `keys_values` are those of this rank.

    Collective over the context group. In the ring the next part is sent while the caller computes.
    """
    axis = context.axis
    if context.method is ContextMethod.gather:
        yield from enumerate(all_gather_parts(keys_values, axis))
        return
    for step in range(axis.size):
        exchange = pass_on_start(keys_values, axis) if step + 1 < axis.size else None
        yield (axis.rank - step) % axis.size, keys_values
        if exchange is not None:
            keys_values = finish(exchange)


def _replicated(k: Tensor, v: Tensor, ranks: int) -> list[Tensor]:
    """Return k and v with each head repeated, so that the ranks divide the number of heads."""
    times = _copies(k.shape[2], ranks)
    return [x if times == 1 else x.repeat_interleave(times, 2) for x in (k, v)]


def _copies(kv_heads: int, ranks: int) -> int:
    return ranks // math.gcd(kv_heads, ranks)


def _split(whole: Tensor, heads: int, kv_heads: int, ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of q, k and v of this rank's heads; `heads` and `kv_heads` count all context ranks."""
    local = kv_heads * _copies(kv_heads, ranks) // ranks
    q, k, v = whole.split([heads // ranks, local, local], 2)
    return q, k, v


def _gradients_of_heads(
    gradient: Tensor, whole: Tensor, core: Tensor, sums: Tensor, kv_heads: int, rules: "Rules"
) -> tuple[Tensor, Tensor, Tensor]:
    axis, copies = rules.settings.context.axis, _copies(kv_heads, rules.settings.size)
    q, k, v = _split(whole, core.shape[2] * axis.size, kv_heads, axis.size)
    of_core = heads_for_sequence([gradient], axis)
    chunks = rules.chunks_of_whole_sequences
    queries = QueryGradients(of_core, q, core, sums, chunks, rules)
    of_keys_values = torch.zeros((2, *k.shape), dtype=torch.float32, device=k.device)
    queries.add(chunks, (k, v), of_keys_values)
    of_q, of_k, of_v = sequence_for_heads([queries.result(), *of_keys_values.to(k.dtype)], axis)
    if copies > 1:
        of_k, of_v = (_summed_copies(x, kv_heads, copies) for x in (of_k, of_v))
    return of_q, of_k, of_v


def _summed_copies(x: Tensor, kv_heads: int, copies: int) -> Tensor:
    """Return the gradients of key/value heads: the sums over their copies."""
    summed: Tensor = x.unflatten(2, (kv_heads, copies)).sum(3)
    return summed


@dataclass(frozen=True)
class Rules:
    """The keys to which a query attends, and the dropout of the softmax."""

    settings: ContextSettings
    first: Tensor | None
    seed: Tensor | int | None

    @property
    def chunks_of_whole_sequences(self) -> tuple[int, ...]:
        """The chunks under ulysses: one, or if pairs need a mask one per rank, so that the mask is small."""
        return (0,) if self.first is None else tuple(range(self.settings.size))

    def pair(self, chunk: int, queries: slice, of_keys: int, dtype: torch.dtype) -> Pair:
        """Return the rules of a pair: the queries of `chunk`, and the keys of the chunk `of_keys`.

        `queries` is the place of these queries in `first`. torch's fused kernel on CPU takes a mask, in the
        precision `dtype` of the scores; the fused kernel on CUDA takes none.
        """
        s = self.settings
        kernel = Kernel(True, s.scale, s.cap, s.device)
        seed = None if self.seed is None else seed_of(int(self.seed), chunk, of_keys)
        is_diagonal = chunk == of_keys
        if self.first is None:
            return Pair(kernel, is_diagonal, None, s.dropout, seed)
        first, size = self.first[:, queries], queries.stop - queries.start
        keys = torch.arange(of_keys * size, (of_keys + 1) * size, device=first.device)
        sees = keys >= first.unsqueeze(-1)
        if is_diagonal:
            sees = sees.tril()
        dtype = dtype if s.device == "cpu" else torch.float32
        mask = torch.zeros(sees.shape, dtype=dtype, device=first.device).masked_fill_(~sees, HIDDEN)
        return Pair(kernel, is_diagonal, mask.unsqueeze(1), s.dropout, seed)


def _chunks(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return views of the chunks, (B, heads, T/chunks, D), of x (B, T, heads, D)."""
    return x.transpose(1, 2).chunk(count, 2)


class Queries:
    """Queries (B, L, N, D) of chunks, and the result of their attention to all keys so far."""

    def __init__(self, q: Tensor, chunks: tuple[int, ...], rules: Rules) -> None:
        self._q, self._chunks, self._rules = _chunks(q, len(chunks)), chunks, rules
        self._size, self._dtype = q.shape[1] // len(chunks), q.dtype
        self._mixed: list[Tensor | None] = [None] * len(chunks)
        self._sums: list[Tensor] = [q.new_empty(0)] * len(chunks)

    def attend(self, chunks: tuple[int, ...], keys_values: KeysValues) -> None:
        """Attend to the keys and values (B, L, K, D) of `chunks` that are not later than the queries."""
        pieces = (_chunks(x, len(chunks)) for x in keys_values)
        for of_keys, k, v in zip(chunks, *pieces, strict=True):
            for place, chunk in enumerate(self._chunks):
                if of_keys <= chunk:
                    self._join(place, k, v, of_keys)

    def _join(self, place: int, k: Tensor, v: Tensor, of_keys: int) -> None:
        rows = slice(place * self._size, (place + 1) * self._size)
        pair = self._rules.pair(self._chunks[place], rows, of_keys, self._dtype)
        mixed, sums = attend_pair(self._q[place], k, v, pair)
        before = self._mixed[place]
        if before is None:
            self._mixed[place], self._sums[place] = mixed, sums
            return
        total = torch.logaddexp(self._sums[place], sums)
        share = (self._sums[place] - total).exp_().unsqueeze(-1)
        joined = before.float().mul_(share)
        self._mixed[place] = joined.addcmul_(mixed.float(), (sums - total).exp_().unsqueeze(-1))
        self._sums[place] = total

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the mixed values (B, L, N, D) and the log-sum-exps (B, N, L)."""
        mixed = [x.to(self._dtype).transpose(1, 2) for x in self._mixed if x is not None]
        return _joined(mixed, 1), _joined(self._sums, 2)


class QueryGradients:
    """Gradients of queries (B, L, N, D) of chunks, summed over all keys so far."""

    def __init__(
        self, gradient: Tensor, q: Tensor, mixed: Tensor, sums: Tensor, chunks: tuple[int, ...], rules: Rules
    ) -> None:
        count = len(chunks)
        self._gradient, self._q, self._mixed = (_chunks(x, count) for x in (gradient, q, mixed))
        self._sums, self._chunks, self._rules = sums.chunk(count, 2), chunks, rules
        self._size, self._dtype = q.shape[1] // count, q.dtype
        self._of_q: list[Tensor | None] = [None] * count

    def add(self, chunks: tuple[int, ...], keys_values: KeysValues, total: Tensor) -> None:
        """Add the gradients of keys and values (B, L, K, D) to `total`, (2, B, L, K, D) in fp32."""
        pieces, totals = ((_chunks(x, len(chunks)) for x in of_both) for of_both in (keys_values, total))
        for of_keys, k, v, total_k, total_v in zip(chunks, *pieces, *totals, strict=True):
            for place, chunk in enumerate(self._chunks):
                if of_keys <= chunk:
                    self._add(place, k, v, of_keys, total_k, total_v)

    def _add(self, place: int, k: Tensor, v: Tensor, of_keys: int, total_k: Tensor, total_v: Tensor) -> None:
        rows = slice(place * self._size, (place + 1) * self._size)
        pair = self._rules.pair(self._chunks[place], rows, of_keys, self._dtype)
        of_result = self._gradient[place], self._q[place], k, v, self._mixed[place], self._sums[place]
        of_q, of_k, of_v = pair_gradients(*of_result, pair)
        before = self._of_q[place]
        self._of_q[place] = of_q if before is None else before.float().add_(of_q)
        total_k += of_k
        total_v += of_v

    def result(self) -> Tensor:
        return _joined([x.to(self._dtype).transpose(1, 2) for x in self._of_q if x is not None], 1)


def _joined(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


@torch.library.custom_op("launcher::context_attention", mutates_args=())
def _operator(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, seed: Tensor | None, method: str, rank: int,
    size: int, group: str, scale: float | None, cap: float | None, device: str, dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    settings = ContextSettings(method, rank, size, group, scale, cap, device, dropout)
    mixed, whole, core, sums = (x.contiguous() for x in attend(q, k, v, first, seed, settings))
    return mixed, whole, core, sums


@_operator.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, seed: Tensor | None, *numbers: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings = ContextSettings(*numbers)
    batch, length, heads, channels = q.shape
    mixed = torch.empty_like(q, memory_format=torch.contiguous_format)
    if not settings.is_ulysses:
        nothing = q.new_empty(0)
        return mixed, nothing, q.new_empty(0), q.new_empty(batch, heads, length, dtype=torch.float32)
    size = settings.size
    kv_heads = k.shape[2] * _copies(k.shape[2], size) // size
    whole = q.new_empty(batch, length * size, heads // size + 2 * kv_heads, channels)
    core = q.new_empty(batch, length * size, heads // size, channels)
    return mixed, whole, core, q.new_empty(batch, heads // size, length * size, dtype=torch.float32)


@torch.library.custom_op("launcher::context_attention_backward", mutates_args=())
def _backward_operator(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, mixed: Tensor, whole: Tensor,
    core: Tensor, sums: Tensor, seed: Tensor | None, kv_heads: int, method: str, rank: int, size: int,
    group: str, scale: float | None, cap: float | None, device: str, dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    settings = ContextSettings(method, rank, size, group, scale, cap, device, dropout)
    results = gradients(gradient, q, k, v, first, mixed, whole, core, sums, seed, kv_heads, settings)
    of_q, of_k, of_v = (x.contiguous() for x in results)
    return of_q, of_k, of_v.clone() if of_v._base is not None else of_v


@_backward_operator.register_fake
def _(gradient: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads = arguments[9]
    batch, length, _, channels = gradient.shape
    of_k, of_v = (gradient.new_empty(batch, length, kv_heads, channels) for _ in range(2))
    return torch.empty_like(gradient, memory_format=torch.contiguous_format), of_k, of_v


def _keep_of_operator(ctx: Any, inputs: tuple[Any, ...], output: AttentionResults) -> None:
    q, k, v, first, seed, *numbers = inputs
    _keep(ctx, q, k, v, first, seed, ContextSettings(*numbers), output)


def _backward_of_operator(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    operator, settings = torch.ops.launcher.context_attention_backward, ctx.settings
    results = operator(gradient, *ctx.saved_tensors, ctx.seed, ctx.kv_heads, *settings)
    return *results, *(None,) * (2 + len(settings))


_operator.register_autograd(_backward_of_operator, setup_context=_keep_of_operator)
