"""Shapes that a wrong tensor or number can have, relative to the right one. Pure."""

from math import sqrt

import torch
from torch import Tensor

from launcher.config.layout import Layout

CLOSE = 0.02  # a ratio this near to sqrt(2) is not 1 or 2
SAME = 1e-4  # two losses of different samples are further apart


def best_ratio(got: Tensor, right: Tensor) -> tuple[float, float]:
    """The r that makes r * right closest to got, and what is left over relative to got."""
    ratio = float((got * right).sum() / right.square().sum().clamp(min=1e-30))
    return ratio, float((got - ratio * right).norm() / got.norm().clamp(min=1e-30))


def common_ratio(pairs: list[tuple[Tensor, Tensor]]) -> float | None:
    """The one ratio of all (got, right), if there is one."""
    ratios = [best_ratio(got, right) for got, right in pairs]
    values = [ratio for ratio, _ in ratios]
    if max(rest for _, rest in ratios) > CLOSE or max(values) - min(values) > CLOSE * abs(values[0]):
        return None
    return values[0]


def named_ratio(ratio: float, layout: Layout) -> tuple[str, list[str]]:
    """The ratio in words, and the axes of the layout that it is a power of."""
    sizes = {
        "tensor": layout.tensor,
        "data": layout.data,
        "pipeline": layout.pipeline,
        "accumulation": layout.accumulation,
    }
    found: dict[str, str] = {}
    for name, size in sizes.items():
        for text, value in (
            (f"{name} size ({size})", size),
            (f"1 / {name} size (1/{size})", 1 / size),
            (f"sqrt({name} size) ({sqrt(size):.3f})", sqrt(size)),
            (f"1 / sqrt({name} size) ({1 / sqrt(size):.3f})", 1 / sqrt(size)),
        ):
            if size > 1 and abs(ratio / value - 1) < CLOSE:
                found.setdefault(name, text)
    return f"the right one times {' or '.join(found.values()) or f'{ratio:.4f}'}", list(found)


def moved_rows(got: Tensor, right: Tensor) -> list[int] | None:
    """The rows of `got` that stand elsewhere in `right`; None if it is not a permutation of its rows."""
    same = (got.flatten(1)[:, None] == right.flatten(1)[None]).all(-1)
    if not bool((same.any(0) & same.any(1)).all()):
        return None
    return [row for row in range(len(got)) if not same[row, row]]


def wrong_shards(got: Tensor, right: Tensor, ranks: int) -> list[int]:
    """Which of the even pieces along the first dimension differ noticeably."""
    pieces = zip(got.tensor_split(ranks), right.tensor_split(ranks), strict=True)
    size = right.norm()
    return [rank for rank, (a, b) in enumerate(pieces) if torch.linalg.vector_norm(a - b) > CLOSE * size]


def same_losses(some: list[float], others: list[float]) -> bool:
    pairs = zip(some, others, strict=True)
    return len(some) > 0 and all(abs(a / b - 1) < SAME for a, b in pairs)


def excess_of_padding(logits: Tensor, padding: int) -> float:
    """By how much the mean loss rises if `padding` columns of logit 0 are predicted too."""
    total = logits.double().logsumexp(-1)
    padded = torch.cat([total[..., None], total.new_zeros(*total.shape, padding)], -1).logsumexp(-1)
    return float((padded - total).mean())
