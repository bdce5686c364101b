"""Splitting, merging and drawing logical tensors; `split` is also compared with numpy slices."""

from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from launcher.parallel import sharding
from launcher.parallel.mesh import Axis
from launcher.parallel.sharding import (
    Initializer,
    LogicalTensor,
    logical_of,
    merge,
    normal,
    ones,
    seed_of,
    split,
    zeros,
)
from launcher.parallel.vocabulary import padded_length

RANKS = [1, 2, 3, 4, 8]


@st.composite
def split_tensors(draw: st.DrawFn) -> tuple[LogicalTensor, int]:
    """Draw a logical tensor with one or more segments, and a number of ranks that divides all segments."""
    ranks = draw(st.sampled_from(RANKS))
    segments = tuple(ranks * n for n in draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    shape = draw(st.lists(st.integers(1, 4), min_size=0, max_size=2))
    dim = draw(st.integers(0, len(shape)))
    shape.insert(dim, sum(segments))
    return LogicalTensor("x", tuple(shape), dim, segments), ranks


@st.composite
def padded_tensors(draw: st.DrawFn) -> tuple[LogicalTensor, int]:
    ranks, length = draw(st.sampled_from(RANKS)), draw(st.integers(1, 30))
    shape = draw(st.sampled_from([(length,), (length, 3)]))
    return LogicalTensor("x", shape, 0, (length,), padded_length(length, ranks)), ranks


def filled(logical: LogicalTensor) -> Tensor:
    """Return a tensor of distinct non-zero elements."""
    return torch.arange(1, 1 + int(np.prod(logical.shape))).view(logical.shape)


def shards_of(full: Tensor, logical: LogicalTensor, ranks: int) -> list[Tensor]:
    return [split(full, logical, Axis(rank, ranks)) for rank in range(ranks)]


def expected_shard(full: Tensor, logical: LogicalTensor, ranks: int, rank: int) -> np.ndarray:
    """Return the expected shard, computed index by index."""
    assert logical.split_dim is not None
    starts = np.cumsum([0, *logical.segments])
    rows = [
        start + rank * (length // ranks) + i
        for start, length in zip(starts, logical.segments, strict=False)
        for i in range(length // ranks)
    ]
    return np.take(full.numpy(), rows, axis=logical.split_dim)


@given(split_tensors())
def test_merge_inverts_split(case: tuple[LogicalTensor, int]) -> None:
    logical, ranks = case
    full = filled(logical)
    shards = shards_of(full, logical, ranks)
    assert torch.equal(merge(shards, logical), full)
    assert all(shard.is_contiguous() for shard in shards)


@given(split_tensors())
def test_shards_are_disjoint_and_complete(case: tuple[LogicalTensor, int]) -> None:
    logical, ranks = case
    full = filled(logical)
    shards = shards_of(full, logical, ranks)
    assert len({shard.shape for shard in shards}) == 1
    assert torch.equal(torch.cat([shard.flatten() for shard in shards]).sort().values, full.flatten())


@given(split_tensors())
def test_shard_has_its_part_of_each_segment(case: tuple[LogicalTensor, int]) -> None:
    logical, ranks = case
    full = filled(logical)
    for rank, shard in enumerate(shards_of(full, logical, ranks)):
        assert np.array_equal(shard.numpy(), expected_shard(full, logical, ranks, rank))


@given(padded_tensors())
def test_padding_is_zero_at_the_end_and_removed_by_merge(case: tuple[LogicalTensor, int]) -> None:
    logical, ranks = case
    full = filled(logical)
    shards = shards_of(full, logical, ranks)
    assert {len(shard) for shard in shards} == {padded_length(len(full), ranks) // ranks}
    whole = torch.cat(shards)
    assert torch.equal(whole[: len(full)], full)
    assert not whole[len(full) :].any()
    assert torch.equal(merge(shards, logical), full)


@given(st.sampled_from(RANKS))
def test_tensor_without_split_is_whole_on_every_rank(ranks: int) -> None:
    logical = LogicalTensor("x", (3, 2))
    full = filled(logical)
    shards = shards_of(full, logical, ranks)
    assert all(torch.equal(shard, full) for shard in shards)
    assert torch.equal(merge(shards, logical), full)


@given(length=st.integers(1, 10_000), ranks=st.integers(1, 64), multiple=st.integers(1, 130))
def test_padded_length_is_the_smallest_multiple(length: int, ranks: int, multiple: int) -> None:
    padded = padded_length(length, ranks, multiple)
    assert padded % ranks == 0
    assert padded // ranks % multiple == 0
    assert length <= padded < length + ranks * multiple


def test_refuses_a_split_that_does_not_divide() -> None:
    logical = LogicalTensor("x", (6,), 0, (6,))
    with pytest.raises(AssertionError):
        split(filled(logical), logical, Axis(0, 4))
    with pytest.raises(AssertionError):
        split(filled(logical), replace(logical, padded=7), Axis(0, 4))


def test_refuses_segments_that_do_not_sum_to_the_dimension() -> None:
    with pytest.raises(AssertionError):
        LogicalTensor("x", (6, 2), 0, (2, 2))


def test_refuses_padding_of_several_segments() -> None:
    with pytest.raises(AssertionError):
        LogicalTensor("x", (6, 2), 0, (3, 3), padded=8)


LOGICALS = [
    LogicalTensor("qkv", (32, 5), 0, (16, 8, 8)),
    LogicalTensor("down", (5, 12), 1, (12,)),
    LogicalTensor("embedding", (7, 5), 0, (7,)),  # padded for each number of ranks
    LogicalTensor("norm", (5,)),
]


def drawn(logical: LogicalTensor, ranks: int, seed: int = 1) -> Tensor:
    """Return the full tensor, merged from shards that are each drawn as on a separate rank."""
    if logical.name == "embedding":
        logical = replace(logical, padded=padded_length(7, ranks))
    make = [Initializer(seed, Axis(rank, ranks)).parameter for rank in range(ranks)]
    return merge([parameter(logical, normal(1.0)).detach() for parameter in make], logical)


@pytest.mark.parametrize("logical", LOGICALS, ids=lambda logical: logical.name)
def test_weights_are_equal_in_all_layouts(logical: LogicalTensor) -> None:
    for ranks in (2, 4):
        assert torch.equal(drawn(logical, ranks), drawn(logical, 1))


def test_comparison_of_weights_detects_swapped_shards() -> None:
    def swapped(full: Tensor, logical: LogicalTensor, axis: Axis) -> Tensor:
        return split(full, logical, Axis(axis.size - 1 - axis.rank, axis.size))

    with patch.object(sharding, "split", swapped):
        assert not torch.equal(drawn(LOGICALS[0], 2), drawn(LOGICALS[0], 1))


def test_draws_differ_by_name_and_by_seed() -> None:
    shape = (4, 4)
    draws = [
        drawn(LogicalTensor(name, shape), ranks=1, seed=seed)
        for name in ("blocks.0.mlp.up.weight", "blocks.1.mlp.up.weight", "head.weight")
        for seed in (0, 1, 1234)
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == len(draws)


def test_draws_do_not_use_the_global_generator() -> None:
    before = torch.get_rng_state()
    torch.manual_seed(5)
    first = drawn(LOGICALS[0], 1)
    torch.manual_seed(6)
    state = torch.get_rng_state()
    assert torch.equal(drawn(LOGICALS[0], 1), first)
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(before)


def test_normal_has_the_given_deviation() -> None:
    sample = normal(0.02)((400, 400), torch.Generator().manual_seed(0))
    assert abs(float(sample.mean())) < 2e-4
    assert float(sample.std()) == pytest.approx(0.02, rel=0.01)


def test_constants() -> None:
    generator = torch.Generator()
    assert zeros((2, 3), generator).tolist() == [[0.0] * 3] * 2
    assert ones((2, 3), generator).tolist() == [[1.0] * 3] * 2


# Seeds that existing runs were drawn from: if they change, a seed no longer gives the same model.
def test_golden_seeds() -> None:
    assert seed_of(1234, "embedding.weight") == 3511783451784836908
    assert seed_of(1234, "dropout", 0, 1, "tensor", 2) == 6873237420980087176


# Two shapes, because torch draws fewer than 16 numbers by another algorithm. The test allows a tolerance,
# because processors without AVX2 round the same draw differently.
GOLDEN_DRAWS = [
    ("a.bias", (3,), (-0.0034429682, 0.0202983897, 0.0014507958), 0.0183062173),
    ("embedding.weight", (8, 4), (0.0105389012, 0.0146957012, 0.0122800777), 0.1472692445),
]


@pytest.mark.parametrize(("name", "shape", "first", "total"), GOLDEN_DRAWS)
def test_golden_draw(name: str, shape: tuple[int, ...], first: tuple[float, ...], total: float) -> None:
    weight = Initializer(1234, Axis()).parameter(LogicalTensor(name, shape), normal(0.02)).detach()
    assert weight.flatten()[:3].tolist() == pytest.approx(first, rel=1e-5)
    assert float(weight.double().sum()) == pytest.approx(total, rel=1e-5)


def test_seeds_have_63_bits() -> None:
    seeds = [seed_of(0, index) for index in range(1000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert any(seed >= 2**62 for seed in seeds)
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("logical", LOGICALS, ids=lambda logical: logical.name)
@pytest.mark.parametrize("ranks", [1, 2])
def test_split_parameters_have_deepspeeds_attribute(logical: LogicalTensor, ranks: int) -> None:
    if logical.name == "embedding":
        logical = replace(logical, padded=padded_length(7, ranks))
    parameter = Initializer(1, Axis(0, ranks)).parameter(logical, zeros)
    assert parameter.tensor_model_parallel == (ranks == 2 and logical.name != "norm")  # type: ignore[attr-defined]
    assert logical_of(parameter) is logical
    assert parameter.dtype is torch.float32


@pytest.mark.parametrize("padded", [None, 8])
def test_shard_does_not_keep_the_full_tensor_alive(padded: int | None) -> None:
    logical = LogicalTensor("embedding", (8, 3), 0, (8,), padded)
    shard = Initializer(1, Axis(0, 4)).parameter(logical, ones)
    assert shard.untyped_storage().nbytes() == 2 * 3 * 4
