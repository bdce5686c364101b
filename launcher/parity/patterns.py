"""Recognise how a result differs from the reference: by a ratio, moved rows or a wrong shard. Pure."""

from math import sqrt

import torch
from torch import Tensor

from launcher.config.layout import Layout

CLOSE = 0.05  # relative; above the rounding of bf16, and small enough to tell sqrt(2) from 1 and 2
CLOSE_LOSSES = 0.003  # relative; losses of different samples differ by more
ROUGH = 0.5  # relative; in bf16 Adam moves elements whose gradient is rounding in either direction
CLOSE_MEAN = 0.3  # relative; of a shift that all losses share, which is little more than rounding to bf16
SAME = 1e-4  # relative; losses of different samples differ by more


def best_ratio(got: Tensor, right: Tensor) -> tuple[float, float]:
    """Return the least-squares r of got = r * right, and the norm of the residual relative to `got`."""
    ratio = float((got * right).sum() / right.square().sum().clamp(min=1e-30))
    return ratio, float((got - ratio * right).norm() / got.norm().clamp(min=1e-30))


def common_ratio(pairs: list[tuple[Tensor, Tensor]], close: float = CLOSE) -> float | None:
    """Return the ratio that all pairs (got, right) have in common; None if they have none."""
    ratios, residuals = zip(*(best_ratio(got, right) for got, right in pairs), strict=True)
    differs = max(residuals) > close or max(ratios) - min(ratios) > close * abs(ratios[0])
    return None if differs else ratios[0]


def rough_ratio(pairs: list[tuple[Tensor, Tensor]]) -> float | None:
    """Return the ratio of all pairs (got, right) together, whose elements have noise; None if it prevails."""
    got, right = (torch.cat([pair[place].flatten() for pair in pairs]) for place in (0, 1))
    ratio, residual = best_ratio(got, right)
    return ratio if residual < ROUGH else None


def named_ratio(ratio: float, layout: Layout) -> tuple[str, list[str]]:
    """Return a ratio to the reference in words, and the layout axes whose sizes explain the ratio."""
    explanations: dict[str, str] = {}
    for name in ("tensor", "data", "context", "pipeline", "accumulation"):
        size: int = getattr(layout, name)
        for text, value in (
            (f"{name} size ({size})", size),
            (f"1 / {name} size (1/{size})", 1 / size),
            (f"sqrt({name} size) ({sqrt(size):.3f})", sqrt(size)),
            (f"1 / sqrt({name} size) ({1 / sqrt(size):.3f})", 1 / sqrt(size)),
        ):
            if size > 1 and abs(ratio / value - 1) < CLOSE:
                explanations.setdefault(name, text)
    return f"the reference times {' or '.join(explanations.values()) or f'{ratio:.4f}'}", list(explanations)


def moved_rows(got: Tensor, right: Tensor) -> list[int] | None:
    """Return the rows of `got` that are at another index in `right`; None if the rows are no permutation."""
    same = (got.flatten(1)[:, None] == right.flatten(1)[None]).all(-1)
    if not bool((same.any(0) & same.any(1)).all()):
        return None
    return [row for row in range(len(got)) if not same[row, row]]


def wrong_shards(got: Tensor, right: Tensor, ranks: int) -> list[int]:
    """Return the ranks whose shard differs, if both tensors are split evenly along their first dimension."""
    pieces = zip(got.tensor_split(ranks), right.tensor_split(ranks), strict=True)
    size = right.norm()
    return [rank for rank, (a, b) in enumerate(pieces) if torch.linalg.vector_norm(a - b) > CLOSE * size]


def same_losses(some: list[float], others: list[float]) -> bool:
    """Return whether two lists of losses agree element by element; empty lists do not."""
    pairs = zip(some, others, strict=True)
    return len(some) > 0 and all(abs(a / b - 1) < SAME for a, b in pairs)


def excess_of_padding(logits: Tensor, padding: int) -> float:
    """Return the increase of the mean loss if `padding` more logits of 0 enter the softmax."""
    total = logits.double().logsumexp(-1)
    padded = torch.cat([total[..., None], total.new_zeros(*total.shape, padding)], -1).logsumexp(-1)
    return float((padded - total).mean())
