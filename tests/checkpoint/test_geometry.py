"""The boxes of all flattened shards cover each element of the logical tensor exactly once."""

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from launcher.parallel.boxes import Box, flat_blocks
from launcher.parallel.mesh import Axis
from launcher.parallel.sharding import LogicalTensor, logical_views
from launcher.parallel.vocabulary import padded_length
from tests.parallel.shards import split

SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)


@given(shape=SHAPES, cut=st.data())
def test_flat_blocks_cover_the_flat_range_in_order(shape: tuple[int, ...], cut: st.DataObject) -> None:
    full = torch.arange(prod(shape)).view(shape)
    start = cut.draw(st.integers(0, full.numel()))
    stop = cut.draw(st.integers(start, full.numel()))
    boxes = list(flat_blocks(shape, start, stop))
    elements = [full[box.within(Box((0,) * len(shape), shape))].reshape(-1) for box in boxes]
    assert torch.cat([torch.empty(0, dtype=torch.int64), *elements]).tolist() == list(range(start, stop))
    assert len(boxes) <= 2 * len(shape) + 1


@st.composite
def logical_tensors(draw: st.DrawFn) -> tuple[LogicalTensor, int]:
    """Draw a logical tensor and a number of tensor ranks that can hold it."""
    ranks = draw(st.sampled_from([1, 2, 3, 4]))
    shape = list(draw(SHAPES))
    kind = draw(st.sampled_from(["whole", "segments", "padded"]))
    if kind == "whole":
        return LogicalTensor("w", tuple(shape)), ranks
    dim = draw(st.integers(0, len(shape) - 1))
    if kind == "padded":
        padded = padded_length(shape[dim], ranks)
        return LogicalTensor("w", tuple(shape), dim, (shape[dim],), padded), ranks
    segments = tuple(ranks * n for n in draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    shape[dim] = sum(segments)
    return LogicalTensor("w", tuple(shape), dim, segments), ranks


@given(drawn=logical_tensors(), data_ranks=st.integers(1, 5))
def test_all_ranks_cover_the_logical_tensor_exactly_once(
    drawn: tuple[LogicalTensor, int], data_ranks: int
) -> None:
    logical, ranks = drawn
    full = torch.arange(prod(logical.shape), dtype=torch.float32).view(logical.shape) + 1
    covered, assembled = torch.zeros(logical.shape), torch.zeros(logical.shape)
    whole = Box((0,) * len(logical.shape), logical.shape)
    for rank in range(ranks if logical.is_split else 1):
        axis = Axis(rank, ranks)
        shard = split(full, logical, axis).contiguous()
        flat, size = shard.view(-1), -(-shard.numel() // data_ranks)
        for start in range(0, shard.numel(), size):
            fragment = flat[start : start + size]
            for box, view in logical_views(fragment, start, tuple(shard.shape), logical, axis):
                covered[box.within(whole)] += 1
                assembled[box.within(whole)] = view
    assert covered.eq(1).all()
    assert torch.equal(assembled, full)


def test_writing_to_a_view_writes_to_the_flat_tensor() -> None:
    logical = LogicalTensor("w", (4, 6), 1, (4, 2))
    flat = torch.zeros(12)
    for box, view in logical_views(flat, 0, (4, 3), logical, Axis(1, 2)):
        view.fill_(box.offsets[1] + 1)
    assert flat.view(4, 3)[0].tolist() == [3, 3, 6]


def test_overlap_of_boxes() -> None:
    first, second = Box((2, 0), (3, 4)), Box((4, 2), (5, 5))
    assert first.overlap(second) == Box((4, 2), (1, 2))
    assert first.overlap(Box((5, 0), (1, 1))) is None
