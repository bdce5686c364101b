"""The ranks that other tests stand on: results in order, failures with their place, no wedged pool."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import mesh, pool, run_fresh


def total(rank: int, world: int, offset: int) -> torch.Tensor:
    x = torch.tensor([rank + offset])
    dist.all_reduce(x)
    return x


def process_id(rank: int, world: int) -> int:
    return os.getpid()


def fail_on_one(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("the culprit")
    dist.barrier()


def die(rank: int, world: int) -> None:
    os._exit(7)


def hang_on_one(rank: int, world: int) -> None:
    while rank == 1:
        time.sleep(0.1)


def unpicklable(rank: int, world: int) -> object:
    class Local(Exception):
        pass

    raise Local("cannot travel")


def fresh(rank: int, world: int, init_method: str, offset: int) -> tuple[int, int]:
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=world)
    return int(total(rank, world, offset)), os.getpid()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_answer_in_order_and_reduce_together(world: int) -> None:
    assert [int(x) for x in pool(world).run(total, 10)] == [sum(range(10, 10 + world))] * world


def test_ranks_are_kept() -> None:
    first = pool(2).run(process_id)
    assert pool(2).run(process_id) == first
    assert len({*first, os.getpid()}) == 3


def test_a_failure_is_raised_with_its_rank_and_the_pool_works_on() -> None:
    with pytest.raises(ValueError, match="the culprit") as caught:
        pool(2).run(fail_on_one)
    assert "rank 1 of 2" in caught.value.__notes__[0]
    assert "in fail_on_one" in caught.value.__notes__[0]
    assert [int(x) for x in pool(2).run(total, 0)] == [1, 1]


def test_an_exception_that_cannot_travel_is_described() -> None:
    with pytest.raises(RuntimeError, match="Local: cannot travel"):
        pool(1).run(unpicklable)


def test_a_dead_rank_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="died with exit code 7"):
        pool(2).run(die)


def test_a_hanging_rank_is_found() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2 .*\n(.*\n)*.*in hang_on_one"):
        pool(2).run(hang_on_one, timeout=0.5)


def test_fresh_ranks_are_new_each_time() -> None:
    first, second = run_fresh(fresh, 2, 5), run_fresh(fresh, 2, 5)
    assert [value for value, _ in first + second] == [11] * 4
    assert len({process for _, process in first + second}) == 4


def test_fresh_ranks_raise_too() -> None:
    with pytest.raises(ZeroDivisionError):
        run_fresh(lambda rank, world, init_method: 1 / (rank - 1), 2)


def mesh_twice(rank: int, world: int) -> bool:
    return mesh(tensor=2) is mesh(tensor=2)


def test_a_mesh_is_made_once() -> None:
    assert pool(2).run(mesh_twice) == [True, True]
