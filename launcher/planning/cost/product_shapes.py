"""Corrections of the planned time of a matrix product, from products measured on the card. Pure."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, cached_property
from math import exp, log, log2
from typing import NamedTuple

from launcher.config.card_rules import shape_of
from launcher.planning.cost.operations import Matmul

# Distance in doublings of m, n and k at which a measurement counts 1 / e. Among 0.25 to 3 it predicts each
# product of the H100's file best from the others.
REACH = 1.5
# Weight of the formula; a measurement has at most the weight 1. Far from measurements the formula decides.
PRIOR = 0.1


class MeasuredShape(NamedTuple):
    """Place of a measured product, and the logarithm of its measured over its planned seconds."""

    place: tuple[float, float, float]
    error: float


class MeasuredShapes(tuple[MeasuredShape, ...]):
    """Measured products. Their hash is computed once: it is part of the key of each cached time."""

    @cached_property
    def _hash(self) -> int:
        return super().__hash__()

    def __hash__(self) -> int:
        return self._hash


NO_SHAPES = MeasuredShapes()


def measured_shapes(rates: Mapping[str, float], planned: Callable[[Matmul], float]) -> MeasuredShapes:
    """Return the measured products of `rates` (FLOP/s by shape); `planned` returns seconds by the formula."""
    measured = []
    for name, per_s in rates.items():
        shape = shape_of(name)
        assert shape is not None, "validation refuses other names"
        product = Matmul(*shape)
        measured.append(MeasuredShape(_place(*shape), log(product.flops / per_s / planned(product))))
    return MeasuredShapes(measured)


@cache
def correction(shapes: MeasuredShapes, m: int, n: int, k: int) -> float:
    """Return the factor of the planned seconds, from the weighted mean of the errors near this shape."""
    place = _place(m, n, k)
    weights = [exp(-_squared_distance(shape.place, place) / REACH**2) for shape in shapes]
    errors = (weight * shape.error for weight, shape in zip(weights, shapes, strict=True))
    return exp(sum(errors) / (PRIOR + sum(weights)))


def _place(m: int, n: int, k: int) -> tuple[float, float, float]:
    """Return a place where a product and its transpose are the same."""
    return log2(max(m, n)), log2(min(m, n)), log2(k)


def _squared_distance(a: Sequence[float], b: Sequence[float]) -> float:
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
