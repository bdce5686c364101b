"""Tensor-parallel layers against nn.Linear and F.embedding in one process, in fp32.

Each rank builds the same unsharded reference from the same seed, slices its expected shards from the
reference, and returns the largest error of each quantity.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.parallel import collectives, layers, sharding
from launcher.parallel.initializer import Initializer, normal
from launcher.parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallel,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from launcher.parallel.mesh import Axis
from launcher.parallel.sharding import LogicalTensor
from tests.distributed import mesh, pool
from tests.parallel.shards import drawn_as

BATCH, LENGTH, HIDDEN = 2, 8, 12
TOLERANCE = 2e-6  # relative to the largest value: fp32 sums of up to 64 products, in another order
WORLDS = [1, 2, 4]

Errors = dict[str, float]


def tensor_parallel(world: int, sequence_parallel: bool) -> TensorParallel:
    axis = mesh(tensor=world).tensor
    return TensorParallel(axis, sequence_parallel, Initializer(0, axis))


def part(x: Tensor, dim: int, rank: int, world: int, segments: tuple[int, ...] | None = None) -> Tensor:
    """Return the concatenation of the rank's even parts of all segments of x."""
    starts, parts = 0, []
    for length in segments or (x.shape[dim],):
        size = length // world
        parts.append(x.narrow(dim, starts + rank * size, size))
        starts += length
    return torch.cat(parts, dim)


def between(x: Tensor, tp: TensorParallel) -> Tensor:
    """Return the activation of a rank between parallel regions: x, or its shard of the sequence."""
    return part(x, 1, tp.axis.rank, tp.axis.size) if tp.sequence_parallel else x


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    worst = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
    return worst.item()


def gradient(x: Tensor | None) -> Tensor:
    assert x is not None
    assert x.grad is not None
    return x.grad


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def column_errors(
    rank: int, world: int, segments: tuple[int, ...], bias: bool, sequence_parallel: bool
) -> Errors:
    plain = nn.Linear(HIDDEN, sum(segments), bias=bias)
    x, upstream = torch.randn(BATCH, LENGTH, HIDDEN), torch.randn(BATCH, LENGTH, sum(segments))
    tp = tensor_parallel(world, sequence_parallel)
    ours = ColumnParallelLinear("up", HIDDEN, segments, tp, bias=bias, draw=drawn_as(plain.weight))
    if ours.bias is not None:
        nn.init.zeros_(
            plain.bias
        )  # as the layer initializes it; test_column_adds_its_bias tests other values

    plain_x, our_x = leaf(x), leaf(between(x, tp))
    y, our_y = plain(plain_x), ours(our_x)
    y.backward(upstream)
    our_y.backward(part(upstream, -1, rank, world, segments))

    errors = {
        "output": error(our_y, part(y, -1, rank, world, segments)),
        "input gradient": error(gradient(our_x), between(gradient(plain_x), tp)),
        "weight": error(ours.weight, part(plain.weight, 0, rank, world, segments)),
        "weight gradient": error(
            gradient(ours.weight), part(gradient(plain.weight), 0, rank, world, segments)
        ),
    }
    if ours.bias is not None:
        errors["bias gradient"] = error(
            gradient(ours.bias), part(gradient(plain.bias), 0, rank, world, segments)
        )
    return errors


def row_errors(rank: int, world: int, bias: bool, sequence_parallel: bool) -> Errors:
    inputs = 16
    plain = nn.Linear(inputs, HIDDEN, bias=bias)
    x, upstream = torch.randn(BATCH, LENGTH, inputs), torch.randn(BATCH, LENGTH, HIDDEN)
    tp = tensor_parallel(world, sequence_parallel)
    ours = RowParallelLinear("down", inputs, HIDDEN, tp, bias=bias, draw=drawn_as(plain.weight))
    if ours.bias is not None:
        ours.bias.data.copy_(plain.bias.detach())

    plain_x, our_x = leaf(x), leaf(part(x, -1, rank, world))
    y, our_y = plain(plain_x), ours(our_x)
    y.backward(upstream)
    our_y.backward(between(upstream, tp))

    errors = {
        "output": error(our_y, between(y, tp)),
        "input gradient": error(gradient(our_x), part(gradient(plain_x), -1, rank, world)),
        "weight": error(ours.weight, part(plain.weight, 1, rank, world)),
        "weight gradient": error(gradient(ours.weight), part(gradient(plain.weight), 1, rank, world)),
    }
    if ours.bias is not None:
        errors["bias gradient"] = error(gradient(ours.bias), gradient(plain.bias))
    return errors


def padded(weight: Tensor, world: int) -> Tensor:
    """Return the weight (V, H) with zero rows appended, up to a multiple of world."""
    return F.pad(weight, (0, 0, 0, -len(weight) % world))


def embedding_errors(rank: int, world: int, vocabulary: int, sequence_parallel: bool) -> Errors:
    weight = torch.randn(vocabulary, HIDDEN, requires_grad=True)
    tokens = torch.randint(vocabulary, (BATCH, LENGTH))
    tokens.view(-1)[:vocabulary] = torch.arange(vocabulary)[
        : BATCH * LENGTH
    ]  # includes the first and last token of each shard
    upstream = torch.randn(BATCH, LENGTH, HIDDEN)
    tp = tensor_parallel(world, sequence_parallel)
    ours = VocabParallelEmbedding("embedding", vocabulary, HIDDEN, tp, std=1.0)
    ours.weight.data.copy_(part(padded(weight, world), 0, rank, world))

    y, our_y = F.embedding(tokens, weight), ours(tokens)
    y.backward(upstream)
    our_y.backward(between(upstream, tp))
    return {
        "output": error(our_y, between(y, tp)),
        "weight gradient": error(
            gradient(ours.weight), part(padded(gradient(weight), world), 0, rank, world)
        ),
    }


def projection_errors(rank: int, world: int, vocabulary: int, sequence_parallel: bool, tied: bool) -> Errors:
    weight = torch.randn(vocabulary, HIDDEN, requires_grad=True)
    whole = padded(weight, world)
    x, upstream = torch.randn(BATCH, LENGTH, HIDDEN), torch.randn(BATCH, LENGTH, len(whole))
    tp = tensor_parallel(world, sequence_parallel)
    module = VocabParallelEmbedding if tied else VocabParallelHead
    ours = module("head", vocabulary, HIDDEN, tp, std=1.0)
    ours.weight.data.copy_(part(whole, 0, rank, world))

    plain_x, our_x = leaf(x), leaf(between(x, tp))
    whole.retain_grad()
    y, our_y = F.linear(plain_x, whole), ours(our_x, project=True)
    y.backward(upstream)
    our_y.backward(part(upstream, -1, rank, world))
    return {
        "output": error(our_y, part(y, -1, rank, world)),
        "input gradient": error(gradient(our_x), between(gradient(plain_x), tp)),
        "weight gradient": error(gradient(ours.weight), part(gradient(whole), 0, rank, world)),
    }


def both_uses_errors(rank: int, world: int, sequence_parallel: bool) -> Errors:
    """Return the errors of a tied embedding, whose look-up and projection add to the same gradient."""
    vocabulary = 10
    weight = torch.randn(vocabulary, HIDDEN, requires_grad=True)
    tokens = torch.randint(vocabulary, (BATCH, LENGTH))
    upstream = F.pad(torch.randn(BATCH, LENGTH, vocabulary), (0, -vocabulary % world))
    tp = tensor_parallel(world, sequence_parallel)
    ours = VocabParallelEmbedding("embedding", vocabulary, HIDDEN, tp, std=1.0)
    ours.weight.data.copy_(part(padded(weight, world), 0, rank, world))

    y = F.linear(F.embedding(tokens, weight).tanh(), weight)
    our_y = ours(ours(tokens).tanh(), project=True)
    y.backward(upstream[..., :vocabulary])
    our_y.backward(part(upstream, -1, rank, world))
    return {
        "output": error(our_y, part(F.pad(y, (0, -vocabulary % world)), -1, rank, world)),
        "weight gradient": error(
            gradient(ours.weight), part(padded(gradient(weight), world), 0, rank, world)
        ),
    }


def assert_equal(all_errors: list[Errors]) -> None:
    for rank, errors in enumerate(all_errors):
        assert all(error <= TOLERANCE for error in errors.values()), (rank, errors)


layouts = pytest.mark.parametrize(
    ("world", "sequence_parallel"),
    [(world, sequence_parallel) for world in WORLDS for sequence_parallel in (False, True)],
)


@layouts
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("segments", [(16,), (16, 8, 8)], ids=["single", "fused"])
def test_column(world: int, sequence_parallel: bool, segments: tuple[int, ...], bias: bool) -> None:
    assert_equal(pool(world).run(column_errors, segments, bias, sequence_parallel))


@layouts
@pytest.mark.parametrize("bias", [False, True])
def test_row(world: int, sequence_parallel: bool, bias: bool) -> None:
    assert_equal(pool(world).run(row_errors, bias, sequence_parallel))


# 8 needs no padding, 10 does; with 5 over 4 ranks the last shard is padding only.
vocabularies = pytest.mark.parametrize("vocabulary", [8, 10, 5])


@layouts
@vocabularies
def test_embedding(world: int, sequence_parallel: bool, vocabulary: int) -> None:
    assert_equal(pool(world).run(embedding_errors, vocabulary, sequence_parallel))


@layouts
@vocabularies
@pytest.mark.parametrize("tied", [False, True])
def test_projection(world: int, sequence_parallel: bool, vocabulary: int, tied: bool) -> None:
    assert_equal(pool(world).run(projection_errors, vocabulary, sequence_parallel, tied))


@layouts
def test_tied_embedding_gradient_sums_both_uses(world: int, sequence_parallel: bool) -> None:
    assert_equal(pool(world).run(both_uses_errors, sequence_parallel))


def drawn_biases(rank: int, world: int) -> list[list[float]]:
    tp = tensor_parallel(world, False)
    column = ColumnParallelLinear("up", HIDDEN, (16,), tp, bias=True, draw=normal(1.0))
    row = RowParallelLinear("down", 16, HIDDEN, tp, bias=True, draw=normal(1.0))
    return [bias.tolist() for bias in (column.bias, row.bias) if bias is not None]


def test_biases_start_at_zero() -> None:
    assert pool(2).run(drawn_biases) == [[[0.0] * 8, [0.0] * HIDDEN]] * 2


def column_output_with_bias(rank: int, world: int) -> float:
    tp = tensor_parallel(world, False)
    plain = nn.Linear(HIDDEN, 16)
    ours = ColumnParallelLinear("up", HIDDEN, (16,), tp, bias=True, draw=drawn_as(plain.weight))
    assert ours.bias is not None
    ours.bias.data.copy_(part(plain.bias, 0, rank, world))
    x = torch.randn(BATCH, LENGTH, HIDDEN)
    return error(ours(x), part(plain(x), -1, rank, world))


@pytest.mark.parametrize("world", WORLDS)
def test_column_adds_its_bias(world: int) -> None:
    assert max(pool(world).run(column_output_with_bias)) <= TOLERANCE


def events_of_backward(rank: int, world: int, sequence_parallel: bool) -> list[str]:
    """Return the collectives and products of a column layer's backward pass, in starting order."""
    events: list[str] = []

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            events.append(f"{name}{' async' if kwargs.get('async_op') else ''}")
            return function(*args, **kwargs)

        return call

    tp = tensor_parallel(world, sequence_parallel)
    ours = ColumnParallelLinear("up", HIDDEN, (16,), tp, bias=False, draw=normal(1.0))
    y = ours(leaf(between(torch.randn(BATCH, LENGTH, HIDDEN), tp)))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather_into_tensor", "all_to_all_single"):
            patch.setattr(dist, name, recorded(name, getattr(dist, name)))
        patch.setattr(Tensor, "matmul", recorded("product", Tensor.matmul))
        y.backward(torch.ones_like(y))
    return events


@pytest.mark.parametrize(
    ("sequence_parallel", "order"),
    [
        (False, ["product", "all_to_all_single async", "product"]),
        (True, ["all_gather_into_tensor async", "product", "all_to_all_single async", "product"]),
    ],
)
def test_weight_gradient_overlaps_collective_of_input_gradient(
    sequence_parallel: bool, order: list[str]
) -> None:
    assert pool(2).run(events_of_backward, sequence_parallel) == [order] * 2


# Mutations: each breaks one operation. The comparison must report errors in exactly the affected quantities.


def identity(x: Tensor, axis: Axis) -> Tensor:
    return x


def no_all_reduce(x: Tensor, group: Any, *, asynchronous: bool) -> Any:
    """Stand for an asynchronous all-reduce, but do not sum."""

    class Done:
        def wait(self) -> None:
            pass

    return Done()


def scatter_without_sum(x: Tensor, axis: Axis, **_: Any) -> tuple[Tensor, Any]:
    """Return this rank's shard of x without the sum over ranks, as a wrong reduce-scatter."""
    return x.chunk(axis.size, dim=1)[axis.rank].contiguous(), None


def bias_of_own_part(x: Tensor, bias: Tensor, axis: Axis) -> Tensor:
    """Add the bias after the reduce-scatter, so that its gradient is that of this rank's part."""
    return collectives.reduce_scatter_sequence_region(x, axis) + bias


def unmasked(x: Tensor, mask: Tensor, value: float) -> Tensor:
    """Return x unmasked, as a wrong masked_fill; indices are still masked, so that they stay legal."""
    return torch.where(mask, torch.zeros_like(x), x) if not x.is_floating_point() else x


def swapped(logical: LogicalTensor, axis: Axis) -> list[tuple[int, int, int]]:
    return split_segments(logical, Axis(axis.size - 1 - axis.rank, axis.size))


def segments_ignored(logical: LogicalTensor, axis: Axis) -> list[tuple[int, int, int]]:
    return split_segments(replace(logical, segments=(sum(logical.segments),)), axis)


split_segments = sharding.split_segments

Mutation = tuple[Any, str, Any]
MUTATIONS: dict[str, tuple[Mutation, Callable[..., Errors], tuple[Any, ...], set[str]]] = {
    "row without all-reduce": (
        (layers, "reduce_region_", identity),
        row_errors,
        (False, False),
        {"output"},
    ),
    "row without its sum, under sequence parallelism": (
        (collectives, "reduce_scatter_start", scatter_without_sum),
        row_errors,
        (False, True),
        {"output"},
    ),
    "bias gradient of one sequence shard only": (
        (layers, "reduce_scatter_biased_region", bias_of_own_part),
        row_errors,
        (True, True),
        {"bias gradient"},
    ),
    "column without backward all-reduce": (
        (layers, "all_reduce_", no_all_reduce),
        column_errors,
        ((16,), False, False),
        {"input gradient"},
    ),
    "column without backward reduction, under sequence parallelism": (
        (
            layers,
            "reduce_scatter_start",
            lambda *a, **k: (scatter_without_sum(*a)[0], no_all_reduce(a[0], None, asynchronous=True)),
        ),
        column_errors,
        ((16,), False, True),
        {"input gradient"},
    ),
    "embedding without mask": (
        (Tensor, "masked_fill", unmasked),
        embedding_errors,
        (8, False),
        {"output", "weight gradient"},
    ),
    "embedding without all-reduce": (
        (layers, "reduce_region_", identity),
        embedding_errors,
        (8, False),
        {"output"},
    ),
    "shards swapped, in a column layer": (
        (sharding, "split_segments", swapped),
        column_errors,
        ((16,), False, False),
        {"output", "input gradient", "weight"},
    ),
    "shards swapped, in a row layer": (
        (sharding, "split_segments", swapped),
        row_errors,
        (False, False),
        {"output", "input gradient", "weight"},
    ),
    "fused segments split as a single segment": (
        (sharding, "split_segments", segments_ignored),
        column_errors,
        ((16, 8, 8), False, False),
        {"output", "input gradient", "weight"},
    ),
}


@contextmanager
def mutated(mutation: Mutation) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*mutation)
        yield


def mutant_errors(rank: int, world: int, name: str) -> Errors:
    mutation, compare, arguments, _ = MUTATIONS[name]
    mesh(tensor=world)
    with mutated(mutation):
        return compare(rank, world, *arguments)


@pytest.mark.parametrize("name", MUTATIONS)
def test_comparison_detects(name: str) -> None:
    for errors in pool(2).run(mutant_errors, name):
        assert {quantity for quantity, error in errors.items() if not error <= 0.01} == MUTATIONS[name][3]
