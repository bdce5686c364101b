"""Boxes of tensors, and a stretch of a flattened one as boxes. Pure, imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Box:
    """A block of a tensor: its first element, and how far it extends in each dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Those that cut it out of the tensor."""
        return tuple(slice(start, start + n) for start, n in zip(self.offsets, self.sizes, strict=True))

    def overlap(self, other: "Box") -> "Box | None":
        """What both cover."""
        first = tuple(map(max, self.offsets, other.offsets))
        ends = [
            min(a + n, b + m)
            for a, n, b, m in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        ]
        sizes = tuple(end - start for start, end in zip(first, ends, strict=True))
        return Box(first, sizes) if all(size > 0 for size in sizes) else None

    def within(self, outer: "Box") -> tuple[slice, ...]:
        """The slices that cut it out of `outer`."""
        starts = [a - b for a, b in zip(self.offsets, outer.offsets, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))


def flat_blocks(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Elements start .. stop of a row-major tensor of `shape`, cut into boxes, in order of memory."""
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
    """All of a tensor."""
    return Box((0,) * len(shape), shape)
