"""Stretches of flattened shards, put where their boxes say, are the logical tensor: each element once."""

from math import prod

import torch
from hypothesis import given
from hypothesis import strategies as st

from launcher.checkpoint.boxes import Box, flat_blocks
from launcher.checkpoint.flat_ranges import logical_views
from launcher.parallel.mesh import Axis
from launcher.parallel.sharding import LogicalTensor, padded_length, split

SHAPES = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)


@given(shape=SHAPES, cut=st.data())
def test_blocks_are_the_elements_in_order(shape: tuple[int, ...], cut: st.DataObject) -> None:
    full = torch.arange(prod(shape)).view(shape)
    start = cut.draw(st.integers(0, full.numel()))
    stop = cut.draw(st.integers(start, full.numel()))
    boxes = list(flat_blocks(shape, start, stop))
    elements = [full[box.within(Box((0,) * len(shape), shape))].reshape(-1) for box in boxes]
    assert torch.cat([torch.empty(0, dtype=torch.int64), *elements]).tolist() == list(range(start, stop))
    assert len(boxes) <= 2 * len(shape) + 1


@st.composite
def logical_tensors(draw: st.DrawFn) -> tuple[LogicalTensor, int]:
    """And the number of tensor ranks."""
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


@given(found=logical_tensors(), data_ranks=st.integers(1, 5))
def test_all_ranks_together_cover_the_logical_tensor_once(
    found: tuple[LogicalTensor, int], data_ranks: int
) -> None:
    logical, ranks = found
    full = torch.arange(prod(logical.shape), dtype=torch.float32).view(logical.shape) + 1
    covered, put = torch.zeros(logical.shape), torch.zeros(logical.shape)
    whole = Box((0,) * len(logical.shape), logical.shape)
    for rank in range(ranks if logical.is_split else 1):
        axis = Axis(rank, ranks)
        shard = split(full, logical, axis).contiguous()
        flat, size = shard.view(-1), -(-shard.numel() // data_ranks)
        for start in range(0, shard.numel(), size):
            stretch = flat[start : start + size]
            for box, view in logical_views(stretch, start, tuple(shard.shape), logical, axis):
                covered[box.within(whole)] += 1
                put[box.within(whole)] = view
    assert covered.eq(1).all()
    assert torch.equal(put, full)


def test_views_write_through() -> None:
    logical = LogicalTensor("w", (4, 6), 1, (4, 2))
    flat = torch.zeros(12)
    for box, view in logical_views(flat, 0, (4, 3), logical, Axis(1, 2)):
        view.fill_(box.offsets[1] + 1)
    assert flat.view(4, 3)[0].tolist() == [3, 3, 6]


def test_overlap_of_boxes() -> None:
    one, other = Box((2, 0), (3, 4)), Box((4, 2), (5, 5))
    assert one.overlap(other) == Box((4, 2), (1, 2))
    assert one.overlap(Box((5, 0), (1, 1))) is None
