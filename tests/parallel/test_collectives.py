"""Forward and backward of each region against sums and slices computed in one process, in fp64.

Every rank draws the inputs of all ranks from the same seed, and computes the expected result from them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from launcher.parallel import collectives
from launcher.parallel.collectives import (
    all_gather_sequence,
    all_reduce,
    copy_region,
    gather_sequence_region,
    reduce_region,
    reduce_region_,
    reduce_scatter_sequence,
    reduce_scatter_sequence_region,
)
from launcher.parallel.mesh import Axis
from tests.distributed import mesh, pool

BATCH, LENGTH, HIDDEN = 3, 8, 5
WORLDS = [1, 2, 4]

Region = Callable[[Tensor, Axis], Tensor]


def shard(x: Tensor, rank: int, world: int) -> Tensor:
    """Return the rank's shard of the sequence: (B, T, H) -> (B, T/world, H)."""
    length = LENGTH // world
    return x[:, rank * length : (rank + 1) * length]


def joined(shards: Tensor) -> Tensor:
    """Return the full sequence: (world, B, T/world, H) -> (B, T, H)."""
    return torch.cat(list(shards), dim=1)


def random(world: int, length: int) -> Tensor:
    """Return a (B, length, H) input for each rank; equal on all ranks."""
    return torch.randn(world, BATCH, length, HIDDEN, dtype=torch.float64)


# Each case: the region, whether its inputs are shards of the sequence, the output expected on rank r from all
# inputs x, and the input gradient expected on rank r from all output gradients g.
Expected = Callable[[Tensor, int, int], Tensor]
CASES: dict[str, tuple[Region, bool, Expected, Expected]] = {
    "copy": (copy_region, False, lambda x, r, w: x[r], lambda g, r, w: g.sum(0)),
    "reduce": (reduce_region, False, lambda x, r, w: x.sum(0), lambda g, r, w: g[r]),
    "gather": (
        gather_sequence_region,
        True,
        lambda x, r, w: joined(x),
        lambda g, r, w: shard(g.sum(0), r, w),
    ),
    "reduce_scatter": (
        reduce_scatter_sequence_region,
        False,
        lambda x, r, w: shard(x.sum(0), r, w),
        lambda g, r, w: joined(g),
    ),
}


def region_errors(rank: int, world: int, case: str) -> dict[str, float]:
    region, takes_shards, output, gradient = CASES[case]
    inputs = random(world, LENGTH // world if takes_shards else LENGTH)
    expected = output(inputs, rank, world)
    gradients = random(world, expected.shape[1])

    local = inputs[rank].clone().requires_grad_()
    result = region(local, mesh(tensor=world).tensor)
    result.backward(gradients[rank])
    assert local.grad is not None
    return {
        "forward": (result - expected).abs().max().item(),
        "backward": float((local.grad - gradient(gradients, rank, world)).abs().max()),
        "input changed": (local - inputs[rank]).abs().max().item(),
    }


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_region(world: int, case: str) -> None:
    for errors in pool(world).run(region_errors, case):
        assert all(error <= 1e-14 for error in errors.values()), errors


@pytest.mark.parametrize("case", CASES)
def test_axis_of_one_rank_is_the_identity(case: str) -> None:
    x = torch.ones(1, 2, 3)
    assert CASES[case][0](x, Axis()) is x


def in_place_errors(rank: int, world: int) -> dict[str, float]:
    inputs, gradient = random(world, LENGTH), random(1, LENGTH)[0]
    local = inputs[rank].clone().requires_grad_()
    new = local * 2
    result = reduce_region_(new, mesh(tensor=world).tensor)
    result.backward(gradient)
    assert local.grad is not None
    return {
        "forward": float((result - 2 * inputs.sum(0)).abs().max()),
        "backward": float((local.grad - 2 * gradient).abs().max()),
        "copied": float(result.data_ptr() != new.data_ptr()),
    }


@pytest.mark.parametrize("world", WORLDS)
def test_new_tensors_are_summed_in_place(world: int) -> None:
    for errors in pool(world).run(in_place_errors):
        assert all(error <= 1e-14 for error in errors.values()), errors


def no_all_reduce(x: Tensor, axis: Axis) -> Tensor:
    return x


def errors_without_backward(rank: int, world: int) -> dict[str, float]:
    """Return the errors of copy_region without the all-reduce of its backward."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "all_reduce", no_all_reduce)
        return region_errors(rank, world, "copy")


def test_comparison_detects_a_missing_backward_all_reduce() -> None:
    for errors in pool(2).run(errors_without_backward):
        assert errors["backward"] > 0.1


def strided_error(rank: int, world: int, case: str) -> float:
    """Return the error with a transposed input and an expanded gradient, as the gradient of a sum."""
    region, takes_shards, output, gradient = CASES[case]
    length = LENGTH // world if takes_shards else LENGTH
    inputs = random(world, length)
    local = inputs[rank].transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    assert not local.is_contiguous()
    result = region(local, mesh(tensor=world).tensor)
    result.sum().backward()
    ones = torch.ones(world, *result.shape, dtype=torch.float64)
    assert local.grad is not None
    forward = (result - output(inputs, rank, world)).abs().max()
    return (forward + (local.grad - gradient(ones, rank, world)).abs().max()).item()


@pytest.mark.parametrize("case", CASES)
def test_regions_accept_non_contiguous_tensors(case: str) -> None:
    assert max(pool(2).run(strided_error, case)) <= 1e-14


def replicated_mlp(x: Tensor, w: dict[str, Tensor], axis: Axis) -> Tensor:
    """Return a two-layer MLP of x; x and the result are equal on all ranks, the weights differ."""
    return reduce_region(torch.tanh(copy_region(x, axis) @ w["in"]) @ w["out"], axis)


def sequence_mlp(x: Tensor, w: dict[str, Tensor], axis: Axis) -> Tensor:
    """Return a two-layer MLP of x; x and the result are shards of the sequence."""
    y = torch.tanh(gather_sequence_region(x, axis) @ w["in"]) @ w["out"]
    return reduce_scatter_sequence_region(y, axis)


def slopes(rank: int, world: int, sequence_parallel: bool) -> tuple[float, float]:
    """Return the slope of a scalar loss along a direction in x, by autograd and by central difference."""
    axis = mesh(tensor=world).tensor
    x, direction, upstream = (random(1, LENGTH)[0] for _ in range(3))
    torch.manual_seed(rank + 1)
    w = {
        "in": torch.randn(HIDDEN, 4, dtype=torch.float64),
        "out": torch.randn(4, HIDDEN, dtype=torch.float64),
    }
    if sequence_parallel:
        x, direction, upstream = (shard(t, rank, world) for t in (x, direction, upstream))
        function = partial(sequence_mlp, w=w, axis=axis)
    else:
        function = partial(replicated_mlp, w=w, axis=axis)

    def sum_over_shards(value: Tensor) -> float:
        return float(all_reduce(value, axis)) if sequence_parallel else float(value)

    def loss(at: Tensor) -> Tensor:
        return (function(at) * upstream).sum()

    point = x.clone().requires_grad_()
    [gradient] = torch.autograd.grad(loss(point), point)
    step = 1e-5
    difference = loss(x + step * direction) - loss(x - step * direction)
    return sum_over_shards((gradient * direction).sum()), sum_over_shards(difference) / (2 * step)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("world", WORLDS)
def test_gradients_equal_finite_differences(world: int, sequence_parallel: bool) -> None:
    for by_autograd, by_difference in pool(world).run(slopes, sequence_parallel):
        assert by_autograd == pytest.approx(by_difference, rel=1e-8)


def adjoint_products(rank: int, world: int) -> tuple[float, float]:
    """Return <gather x, g> and <x, reduce_scatter g>, summed over the ranks."""
    axis = mesh(tensor=world).tensor
    torch.manual_seed(rank)
    x, g = torch.randn(2, LENGTH // world, 3).double(), torch.randn(2, LENGTH, 3).double()
    forward = (all_gather_sequence(x, axis) * g).sum()
    backward = (x * reduce_scatter_sequence(g, axis)).sum()
    return float(all_reduce(forward, axis)), float(all_reduce(backward, axis))


@pytest.mark.parametrize("world", [2, 4])
def test_gather_and_reduce_scatter_are_adjoint(world: int) -> None:
    for forward, backward in pool(world).run(adjoint_products):
        assert forward == pytest.approx(backward, rel=1e-12)


def results_on_a_2d_mesh(rank: int, world: int) -> tuple[Any, ...]:
    """Return the result of each region for an input filled with this rank's number, on a 2 x 2 mesh."""
    axis = mesh(tensor=2, data=2).tensor
    x = torch.full((1, 2, 1), float(rank))
    half = x[:, :1]
    results = (
        reduce_region(x, axis),
        gather_sequence_region(half, axis),
        reduce_scatter_sequence_region(x, axis),
    )
    dist.barrier()
    return tuple(result.flatten().tolist() for result in results)


def test_regions_communicate_within_their_group_only() -> None:
    low, high = ([1.0, 1.0], [0.0, 1.0], [1.0]), ([5.0, 5.0], [2.0, 3.0], [5.0])
    assert pool(4).run(results_on_a_2d_mesh) == [low, low, high, high]
