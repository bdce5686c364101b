"""Initial weights: equal in every layout, and drawn only where a rank holds them."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from launcher.engine.allocations import Allocations
from launcher.parallel import initializer, sharding
from launcher.parallel.initializer import (
    BLOCK,
    BLOCK_BYTES,
    Initializer,
    InitialValues,
    draw_block,
    normal,
    ones,
    zeros,
)
from launcher.parallel.mesh import Axis
from launcher.parallel.sharding import LogicalTensor, logical_of, merge, split_segments
from launcher.parallel.vocabulary import padded_length
from launcher.parity.reference import drawn_weight
from tests.parallel.shards import drawn_as, split

VOCABULARY = 301
LOGICALS = [
    LogicalTensor("qkv", (256, 520), 0, (128, 64, 64)),  # blocks are cut by segments and by the last columns
    LogicalTensor("down", (70, 1200), 1, (1200,)),
    LogicalTensor("embedding", (VOCABULARY, 24), 0, (VOCABULARY,)),  # padded for each number of ranks
    LogicalTensor("positions", (100, 24)),
    LogicalTensor("class_token", (40000,)),
]
logicals = pytest.mark.parametrize("logical", LOGICALS, ids=lambda logical: logical.name)


def on_ranks(logical: LogicalTensor, ranks: int, multiple: int = 1) -> LogicalTensor:
    """Return the tensor with its vocabulary padded to a multiple of `ranks` and of `multiple`."""
    if logical.name != "embedding":
        return logical
    return replace(logical, padded=padded_length(VOCABULARY, ranks * multiple))


def drawn(logical: LogicalTensor, ranks: int, seed: int = 1) -> Tensor:
    """Return the full tensor, merged from shards that are each drawn as on a separate rank."""
    make = [Initializer(seed, Axis(rank, ranks)).parameter for rank in range(ranks)]
    return merge([parameter(logical, normal(1.0)).detach() for parameter in make], logical)


@contextmanager
def counted() -> Iterator[Counter[int]]:
    """Yield the numbers drawn while the context is open, by the seed of their block."""
    numbers: Counter[int] = Counter()

    def draw(seed: int, std: float, sizes: tuple[int, ...]) -> Tensor:
        block = draw_block(seed, std, sizes)
        numbers[seed] += block.numel()
        return block

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initializer, "draw_block", draw)
        yield numbers


@logicals
def test_weights_are_the_independently_drawn_ones_in_all_layouts(logical: LogicalTensor) -> None:
    expected = drawn_weight(1, logical.name, logical.shape, 1.0)
    for ranks in (1, 2, 4):
        for multiple in (1, 128):
            assert torch.equal(drawn(on_ranks(logical, ranks, multiple), ranks), expected), (ranks, multiple)


def test_comparison_of_weights_detects_swapped_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(logical: LogicalTensor, axis: Axis) -> list[tuple[int, int, int]]:
        return split_segments(logical, Axis(axis.size - 1 - axis.rank, axis.size))

    monkeypatch.setattr(sharding, "split_segments", swapped)
    assert not torch.equal(drawn(LOGICALS[0], 2), drawn(LOGICALS[0], 1))


@logicals
def test_a_flat_range_of_a_shard_has_the_values_of_the_shard(logical: LogicalTensor) -> None:
    """As a ZeRO-3 partition does, whose ends lie within a row."""
    axis, logical = Axis(1, 2), on_ranks(logical, 2)
    shard = Initializer(1, axis).parameter(logical, normal(1.0)).detach().flatten()
    for data_ranks in (1, 3, 7):
        size = -(-len(shard) // data_ranks)
        for start in range(0, len(shard), size):
            part = torch.full_like(shard[start : start + size], torch.nan)
            InitialValues(1, logical, axis, normal(1.0)).fill(part, start)
            assert torch.equal(part, shard[start : start + size])


@pytest.mark.parametrize("threads", [2, 5])
@logicals
def test_threads_do_not_change_a_draw(
    logical: LogicalTensor, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = drawn(logical, 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert torch.equal(drawn(logical, 1), alone)


def test_a_failure_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(initializer, "draw_block", fail)
    with pytest.raises(MemoryError):
        drawn(LOGICALS[0], 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_parameter_has_the_rounded_values_of_fp32(dtype: torch.dtype) -> None:
    full = Initializer(1, Axis()).parameter(LOGICALS[0], normal(0.02))
    low = Initializer(1, Axis(), dtype).parameter(LOGICALS[0], normal(0.02))
    assert low.dtype is dtype
    assert torch.equal(low, full.to(dtype))


def test_draws_differ_by_name_by_seed_and_by_block() -> None:
    draws = [
        block
        for name in ("blocks.0.mlp.up.weight", "blocks.1.mlp.up.weight", "head.weight")
        for seed in (0, 1, 1234)
        for block in drawn(LogicalTensor(name, (128, 1024)), ranks=1, seed=seed).split(BLOCK[1], dim=1)
    ]
    corners = {tuple(rows[0, :4].tolist()) for draw in draws for rows in draw.split(BLOCK[0])}
    assert len(corners) == 2 * len(draws)


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
    sample = 0.02 * drawn(LogicalTensor("x", (400, 1100)), 1)
    assert abs(float(sample.mean())) < 2e-4
    assert float(sample.std()) == pytest.approx(0.02, rel=0.01)


def test_constants() -> None:
    make = Initializer(1, Axis()).parameter
    assert make(LogicalTensor("x", (2, 3)), zeros).tolist() == [[0.0] * 3] * 2
    assert make(LogicalTensor("x", (2, 3)), ones).tolist() == [[1.0] * 3] * 2


# Counts: a rank draws each block that it touches once, and no other.


@pytest.mark.parametrize("dim", [0, 1])
def test_tensor_ranks_share_the_numbers_of_a_matrix(dim: int) -> None:
    shape, ranks = (512, 4096), 4
    with counted() as numbers:
        for rank in range(ranks):
            logical = LogicalTensor("w", shape, dim, (shape[dim],))
            Initializer(1, Axis(rank, ranks)).parameter(logical, normal(1.0))
            assert sum(numbers.values()) == (rank + 1) * 512 * 4096 // ranks


def test_a_segment_that_ends_within_a_block_draws_that_block_once() -> None:
    with counted() as numbers:
        Initializer(1, Axis(0, 4)).parameter(LogicalTensor("qkv", (256, 512), 0, (128, 64, 64)), normal(1.0))
    # A rank holds 32 rows of the queries, 16 of the keys and 16 of the values, each in another block.
    assert dict(Counter(numbers.values())) == {BLOCK[0] * BLOCK[1]: 3}


def test_a_flat_range_draws_its_blocks_once() -> None:
    logical, data_ranks = LogicalTensor("w", (1000, 2000)), 6
    size = -(-2_000_000 // data_ranks)
    for start in range(0, 2_000_000, size):
        with counted() as numbers:
            InitialValues(1, logical, Axis(), normal(1.0)).fill(
                torch.empty(min(size, 2_000_000 - start)), start
            )
        assert max(numbers.values()) <= BLOCK[0] * BLOCK[1]  # no block twice
        assert sum(numbers.values()) <= size + 2 * BLOCK[0] * 2000  # blocks of the first and the last row


def test_padding_and_weights_from_files_draw_nothing() -> None:
    embedding = on_ranks(LOGICALS[2], 2, multiple=256)  # the second rank holds 45 rows and 211 of padding
    with counted() as numbers:
        shard = Initializer(1, Axis(1, 2)).parameter(embedding, normal(1.0))
        assert 45 * 24 <= sum(numbers.values()) < (45 + BLOCK[0]) * 24
        assert shard[:45].all()
        assert not shard[45:].any()
        numbers.clear()
        assert not Initializer(1, Axis(), drawn=False).parameter(LOGICALS[0], normal(1.0)).any()
        assert not numbers


def test_host_memory_is_one_shard_while_parameters_move_to_another_device() -> None:
    """The meta device stands for a GPU."""
    make = Initializer(1, Axis(0, 2), torch.bfloat16, torch.device("meta")).parameter
    logical = LogicalTensor("w", (512, 2048), 0, (512,))
    with Allocations() as host:
        parameters = [make(logical, normal(1.0)) for _ in range(4)]
    assert {parameter.device.type for parameter in parameters} == {"meta"}
    assert host.peak == 2 * 256 * 2048 + BLOCK_BYTES
    assert host.live == 0


@logicals
@pytest.mark.parametrize("ranks", [1, 2])
def test_split_parameters_have_deepspeeds_attribute(logical: LogicalTensor, ranks: int) -> None:
    logical = on_ranks(logical, ranks)
    parameter = Initializer(1, Axis(0, ranks)).parameter(logical, zeros)
    assert parameter.tensor_model_parallel == (ranks == 2 and logical.is_split)  # type: ignore[attr-defined]
    assert logical_of(parameter) is logical
    assert parameter.dtype is torch.float32


@logicals
def test_a_parameter_holds_its_shard_only(logical: LogicalTensor) -> None:
    logical = on_ranks(logical, 2)
    full = torch.randn(logical.shape)
    shard = Initializer(1, Axis(1, 2)).parameter(logical, drawn_as(full))
    assert torch.equal(shard, split(full, logical, Axis(1, 2)))
    assert shard.untyped_storage().nbytes() == 4 * shard.numel()


# Two shapes, because torch draws fewer than 16 numbers by another algorithm. The test allows a tolerance,
# because processors without AVX2 round the same draw differently.
GOLDEN_DRAWS = [
    ("a.bias", (3,), (0.0041542901, 0.018238049, 0.0196027458), 0.0419950848),
    ("embedding.weight", (130, 600), (0.0233558249, -0.0096149985, -0.016458733), -0.943660604),
]


@pytest.mark.parametrize(("name", "shape", "first", "total"), GOLDEN_DRAWS)
def test_golden_draw(name: str, shape: tuple[int, ...], first: tuple[float, ...], total: float) -> None:
    weight = Initializer(1234, Axis()).parameter(LogicalTensor(name, shape), normal(0.02)).detach()
    assert weight.flatten()[:3].tolist() == pytest.approx(first, rel=1e-5)
    assert float(weight.double().sum()) == pytest.approx(total, rel=1e-5)
