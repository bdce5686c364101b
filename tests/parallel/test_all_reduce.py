"""Sums, maxima and minima over ranks against one process. Two ranks on a CPU swap whole tensors."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from launcher.engine.allocations import Allocations, CollectiveCall
from launcher.parallel.all_reduce import all_reduce_
from tests.distributed import mesh, pool

REDUCTIONS = {
    dist.ReduceOp.SUM: lambda x: x.sum(0),
    dist.ReduceOp.MAX: lambda x: x.amax(0),
    dist.ReduceOp.MIN: lambda x: x.amin(0),
}


def inputs(world: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return the input of each rank, equal on all ranks; sums are exact in every dtype."""
    return torch.randint(-9, 10, (world, *shape), generator=torch.Generator().manual_seed(1)).to(dtype)


def wrong_reductions(
    rank: int, world: int, dtype: torch.dtype, shape: tuple[int, ...], asynchronous: bool
) -> list[Any]:
    found = []
    for operation, expected in REDUCTIONS.items():
        given = inputs(world, dtype, shape)
        own = given[rank].clone()
        handle = all_reduce_(own, mesh(tensor=world).tensor.group, operation, asynchronous=asynchronous)
        assert (handle is not None) == asynchronous
        if handle is not None:
            handle.wait()
        if not torch.equal(own, expected(given)):
            found.append((operation, own))
    return found


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_each_rank_has_the_result(
    world: int, dtype: torch.dtype, shape: tuple[int, ...], asynchronous: bool
) -> None:
    assert pool(world).run(wrong_reductions, dtype, shape, asynchronous) == [[]] * world


def not_numbers(rank: int, world: int) -> list[bool]:
    x = torch.tensor([float("nan") if rank == 1 else 1.0, 2.0])
    all_reduce_(x, mesh(tensor=world).tensor.group)
    return x.isnan().tolist()


@pytest.mark.parametrize("world", [2, 4])
def test_a_nan_of_one_rank_reaches_all(world: int) -> None:
    assert pool(world).run(not_numbers) == [[True, False]] * world


def counted(rank: int, world: int, elements: int) -> dict[CollectiveCall, int]:
    group, splits = mesh(tensor=world).tensor.group, [elements - 1, 1] if rank == 0 else [1, elements - 1]
    with Allocations() as allocations:
        all_reduce_(torch.ones(elements), group)
        dist.all_to_all_single(torch.empty(elements), torch.ones(elements), splits, splits, group=group)
    return dict(allocations.collectives)


def test_an_exchange_counts_as_an_all_reduce_and_uneven_parts_do_not() -> None:
    expected = {CollectiveCall("", "all_reduce", 40): 1, CollectiveCall("", "all_to_all", 40): 1}
    assert pool(2).run(counted, 10) == [expected] * 2
