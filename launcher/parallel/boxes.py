"""Boxes: contiguous n-dimensional slices of a tensor. Pure, imports no torch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from random import SystemRandom

_PRIME = 2**127 - 1


@dataclass(frozen=True)
class Box:
    """A rectangular slice of a tensor: the index of its first element, and its size in each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The Python slices that select this box from the whole tensor."""
        return tuple(slice(start, start + n) for start, n in zip(self.offsets, self.sizes, strict=True))

    def overlap(self, other: "Box") -> "Box | None":
        """Return the intersection with `other`, or None if it is empty."""
        first = tuple(map(max, self.offsets, other.offsets))
        pairs = zip(self.slices, other.slices, strict=True)
        sizes = tuple(min(a.stop, b.stop) - max(a.start, b.start) for a, b in pairs)
        return Box(first, sizes) if all(size > 0 for size in sizes) else None

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """Return the Python slices that select this box from a tensor that holds only the box `outer`."""
        starts = [a - b for a, b in zip(self.offsets, outer.offsets, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))


def flat_blocks(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Yield boxes, at most 2n - 1 for n dimensions, that cover the flat range start .. stop in order."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield Box((start,), (stop - start,))
        return
    inner = prod(shape[1:])
    while start < stop:
        row, column = divmod(start, inner)
        whole_rows = (stop - start) // inner if column == 0 else 0
        if whole_rows:
            yield Box((row, *(0 for _ in shape[1:])), (whole_rows, *shape[1:]))
            start += whole_rows * inner
            continue
        end = min(inner, column + stop - start)
        for box in flat_blocks(shape[1:], column, end):
            yield Box((row, *box.offsets), (1, *box.sizes))
        start += end - column


def whole(shape: tuple[int, ...]) -> Box:
    """Return the box that covers a whole tensor of `shape`."""
    return Box((0,) * len(shape), shape)


def is_tiling(shape: tuple[int, ...], boxes: Iterable[Box]) -> bool:
    """Return whether the boxes cover each element of a tensor of `shape` exactly once, in linear time.

    Give the element at index (i, j, ...) the weight x^i y^j ... at a random point (x, y, ...) modulo a prime.
    The weight of a box is then a product of (x^stop - x^start) / (x - 1). If the boxes are no tiling, the
    difference between the sum of their weights and the weight of the whole tensor is a polynomial that is
    not zero, and a random point is a root with a probability of at most its degree / 2^127 (Schwartz-Zippel).
    """
    point = [SystemRandom().randrange(2, _PRIME) for _ in shape]
    power = cache(lambda dimension, exponent: pow(point[dimension], exponent, _PRIME))

    def weight(box: Box) -> int:  # without the divisors (x - 1), which all boxes share
        product = 1
        for dimension, (start, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
            product = product * (power(dimension, start + size) - power(dimension, start)) % _PRIME
        return product

    return (sum(map(weight, boxes)) - weight(whole(shape))) % _PRIME == 0
