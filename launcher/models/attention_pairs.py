"""Attention of a chunk of queries to a chunk of keys; results over several chunks of keys can be joined.

Let o be the mixed values of a query over some keys, and l the log-sum-exp of its scores. The results over
several chunks of keys are added with the weights exp(l - L), where L is the log-sum-exp over all these keys,
as in ring attention (arXiv 2310.01889). The gradients of a pair of chunks are computed from the joined o and
L (FlashAttention, arXiv 2205.14135).

Shapes: queries (B, N, Q, D) and keys and values (B, K, S, D), N a multiple of K; log-sum-exps (B, N, Q).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.models.attention_kernel import Kernel
from launcher.parallel.loss_kernels import soft_capped
from launcher.parallel.random import seeded
from launcher.parallel.sharding import seed_of

# Mask of hidden scores, in place of minus infinity. If a query attends to no key of a pair, its result then
# gets the weight 0 when it is joined; with minus infinity torch's fused kernel returns the log-sum-exp 0.
HIDDEN = -1e30
_SCORES = 1 << 22  # scores that exist at the same time without a fused kernel
_LARGEST_HEAD = 256  # of FlashAttention on CUDA


@dataclass(frozen=True)
class Pair:
    """The rules of a pair of chunks: the keys to which a query attends, and the dropout of the softmax."""

    kernel: Kernel
    is_diagonal: bool  # a query attends to the keys up to its own place in the chunk
    mask: Tensor | None = None  # (B or 1, 1, Q, S), added to the scores; with a mask is_diagonal is ignored
    dropout: float = 0.0
    seed: int | None = None  # None: no dropout

    @property
    def is_fused(self) -> bool:
        """Whether torch has a fused kernel that also returns the log-sum-exp."""
        has_kernel = self.kernel.device == "cpu" or self.mask is None
        return has_kernel and self.kernel.cap is None and self.seed is None


def attend_pair(q: Tensor, k: Tensor, v: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    """Return the mixed values (B, N, Q, D) and the log-sum-exp of each query in fp32 (B, N, Q)."""
    if not pair.is_fused or _lacks_cuda_kernel(q, pair):
        return _attend_rows(q, k, v, pair)
    causal, scale = pair.is_diagonal and pair.mask is None, pair.kernel.scale
    if pair.kernel.device == "cpu":
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        mixed, sums = attention(q, k, v, 0.0, causal, attn_mask=pair.mask, scale=scale)
        return mixed, sums
    attention = torch.ops.aten._scaled_dot_product_flash_attention
    groups = q.shape[1] // k.shape[1]
    mixed, sums, *_ = attention(q, _repeated(k, groups), _repeated(v, groups), 0.0, causal, scale=scale)
    return mixed, sums


def pair_gradients(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, mixed: Tensor, sums: Tensor, pair: Pair
) -> tuple[Tensor, Tensor, Tensor]:
    """Return this pair's part of the gradients of q, k and v.

    `gradient` is the gradient of `mixed` (B, N, Q, D); `mixed` and `sums` are joined over all keys.
    """
    if not pair.is_fused or _lacks_cuda_kernel(q, pair):
        return _gradients_of_rows(gradient, q, k, v, mixed, sums, pair)
    causal, scale = pair.is_diagonal and pair.mask is None, pair.kernel.scale
    if pair.kernel.device == "cpu":
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        arguments = gradient, q, k, v, mixed, sums, 0.0, causal
        of_q, of_k, of_v = backward(*arguments, attn_mask=pair.mask, scale=scale)
        return of_q, of_k, of_v
    groups, none = q.shape[1] // k.shape[1], torch.zeros(2, dtype=torch.uint64, device=q.device)
    of_q, of_k, of_v = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        gradient, q, _repeated(k, groups), _repeated(v, groups), mixed, sums, None, None,
        q.shape[2], k.shape[2], 0.0, causal, none, none[:0], scale=scale,
    )  # fmt: skip
    return of_q, _summed(of_k, groups), _summed(of_v, groups)


def _lacks_cuda_kernel(q: Tensor, pair: Pair) -> bool:
    """Return whether q is on a GPU and not of a precision and head size that FlashAttention takes there."""
    size = q.shape[-1]
    is_taken = q.dtype is not torch.float32 and size % 8 == 0 and size <= _LARGEST_HEAD
    return pair.kernel.device == "cuda" and not is_taken


def _repeated(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def _summed(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.unflatten(1, (-1, groups)).sum(2)


def _rows(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Yield the stretches of queries whose scores exist at the same time."""
    at_once = max(1, _SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    yield from (slice(first, first + at_once) for first in range(0, q.shape[2], at_once))


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """Group query heads by key/value head: (B, N, Q, D) -> (B, K, N/K, Q, D)."""
    grouped: Tensor = x.unflatten(1, (kv_heads, -1))
    return grouped


def _scores(q: Tensor, k: Tensor, rows: slice, pair: Pair) -> tuple[Tensor, Tensor | None]:
    """Return the masked scores (B, K, N/K, rows, S) in fp32; with a soft cap also those before the mask."""
    scale, cap = pair.kernel.scale or q.shape[-1] ** -0.5, pair.kernel.cap
    scores = (_grouped(q[:, :, rows], k.shape[1]) @ k.unsqueeze(2).transpose(3, 4)).float() * scale
    capped = None
    if cap is not None:
        capped = soft_capped(scores, cap)
        scores = capped
    if pair.mask is not None:
        scores = scores + pair.mask[:, :, rows].unsqueeze(1)
    elif pair.is_diagonal:
        places = torch.arange(q.shape[2], device=q.device)
        later = places > places[rows, None]
        scores = scores.masked_fill(later, HIDDEN)
    return scores, capped


def _dropout_factors(weights: Tensor, pair: Pair, rows: slice) -> Tensor | None:
    """Return 0 or 1 / (1 - dropout) for each weight (B, K, N/K, rows, S); None without dropout."""
    if pair.seed is None:
        return None
    with seeded(seed_of(pair.seed, rows.start) % 2**63, weights.device):
        factors = F.dropout(torch.ones_like(weights).flatten(1, 2), pair.dropout)
    return factors.view_as(weights)


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    mixed, sums = [], []
    for rows in _rows(q, k):
        scores, _ = _scores(q, k, rows, pair)
        total = scores.logsumexp(-1)
        weights = (scores - total.unsqueeze(-1)).exp()
        if (factors := _dropout_factors(weights, pair, rows)) is not None:
            weights = weights * factors
        mixed.append((weights.to(v.dtype) @ v.unsqueeze(2)).flatten(1, 2))
        sums.append(total.flatten(1, 2))
    return torch.cat(mixed, 2), torch.cat(sums, 2)


def _gradients_of_rows(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, mixed: Tensor, sums: Tensor, pair: Pair
) -> tuple[Tensor, Tensor, Tensor]:
    heads, of_q = k.shape[1], []
    of_k = of_v = torch.zeros((), device=k.device)
    scale, cap = pair.kernel.scale or q.shape[-1] ** -0.5, pair.kernel.cap
    for rows in _rows(q, k):
        scores, capped = _scores(q, k, rows, pair)
        weights = (scores - _grouped(sums.unsqueeze(-1)[:, :, rows], heads)).exp()
        factors = _dropout_factors(weights, pair, rows)
        outer, inner = (_grouped(x[:, :, rows], heads).float() for x in (gradient, mixed))
        dropped = weights if factors is None else weights * factors
        of_v = of_v + (dropped.transpose(3, 4) @ outer).sum(2)
        of_weights = outer @ v.float().unsqueeze(2).transpose(3, 4)
        if factors is not None:
            of_weights = of_weights * factors
        of_scores = weights * (of_weights - (outer * inner).sum(-1, keepdim=True)) * scale
        if capped is not None and cap is not None:
            of_scores = of_scores * (1 - (capped / cap).square())
        of_q.append((of_scores @ k.float().unsqueeze(2)).flatten(1, 2))
        rows_of_q = _grouped(q[:, :, rows], heads).float()
        of_k = of_k + (of_scores.transpose(3, 4) @ rows_of_q).sum(2)
    return torch.cat(of_q, 2).to(q.dtype), of_k, of_v
