"""Rank arithmetic against numpy and DeepSpeed's topology; process groups, also of a single rank."""

from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist

from launcher.parallel.mesh import Axis, MeshShape, ProcessMesh
from tests.distributed import mesh, pool, run_fresh

SHAPES = [
    MeshShape(*sizes) for sizes in product(range(1, 17), repeat=3) if sizes[0] * sizes[1] * sizes[2] <= 16
]


def ranks_of(shape: MeshShape) -> np.ndarray:
    return np.arange(shape.world_size).reshape(shape.pipeline, shape.data, shape.tensor)


def test_coordinates_equal_numpy_indices(subtests: pytest.Subtests) -> None:
    for shape in SHAPES:
        with subtests.test(str(shape)):
            ranks = ranks_of(shape)
            for coordinates, rank in np.ndenumerate(ranks):
                assert shape.coordinates(int(rank)) == coordinates
                assert shape.rank(*coordinates) == rank
            assert shape.tensor_groups() == ranks.reshape(-1, shape.tensor).tolist()
            assert shape.data_groups() == ranks.swapaxes(1, 2).reshape(-1, shape.data).tolist()


def test_context_ranks_are_neighbours_on_the_data_axis() -> None:
    shape = MeshShape(pipeline=2, data=6, tensor=2, context=3)
    ranks = ranks_of(shape).reshape(2, 2, 3, 2)
    expected = ranks.transpose(0, 3, 1, 2).reshape(-1, 3).tolist()
    assert sorted(shape.context_groups()) == sorted(expected)
    assert shape.context_groups()[0] == [0, 2, 4]


def context_view(rank: int, world: int) -> tuple[int, int, int, int, list[int]]:
    grid = mesh(data=2, context=2)
    assert grid.context.group is not None
    ranks = dist.get_process_group_ranks(grid.context.group)
    return grid.batch.rank, grid.batch.size, grid.context.rank, grid.data.size, ranks


def test_context_ranks_share_the_samples_of_a_data_rank() -> None:
    views = pool(4).run(context_view)
    assert views == [
        (0, 2, 0, 4, [0, 1]),
        (0, 2, 1, 4, [0, 1]),
        (1, 2, 0, 4, [2, 3]),
        (1, 2, 1, 4, [2, 3]),
    ]


def test_experts_are_folded_over_data_and_context_ranks() -> None:
    """2 data x 2 context x 2 tensor ranks: experts over 2 are context ranks, over 4 also two data ranks."""
    two, four = (MeshShape(data=4, tensor=2, expert=size, context=2) for size in (2, 4))
    assert two.expert_groups() == two.context_groups() == [[0, 2], [4, 6], [1, 3], [5, 7]]
    assert two.expert_data_groups() == [[0, 4], [2, 6], [1, 5], [3, 7]]
    assert four.expert_groups() == four.data_groups() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert four.expert_data_groups() == [[rank] for rank in (0, 2, 4, 6, 1, 3, 5, 7)]


def folded_view(rank: int, world: int) -> list[tuple[int, int, list[int]]]:
    grid = mesh(data=2, context=2, expert=2)
    axes = grid.context, grid.expert, grid.holders_of_experts
    groups = [axis.group for axis in axes]
    return [
        (axis.rank, axis.size, dist.get_process_group_ranks(group))
        for axis, group in zip(axes, groups, strict=True)
        if group is not None
    ]


def test_the_mesh_has_context_and_expert_groups_together() -> None:
    views = pool(4).run(folded_view)
    assert views[0] == [(0, 2, [0, 1]), (0, 2, [0, 1]), (0, 2, [0, 2])]
    assert views[3] == [(1, 2, [2, 3]), (1, 2, [2, 3]), (1, 2, [1, 3])]


def test_refuses_a_rank_outside_the_world() -> None:
    with pytest.raises(AssertionError):
        MeshShape(1, 2, 2).coordinates(4)


def topology_coordinates(rank: int, world: int, init_method: str) -> list[list[tuple[int, int, int]]]:
    from launcher.engine.distributed import prepare_deepspeed

    prepare_deepspeed("cpu")
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    def coordinates(shape: MeshShape) -> list[tuple[int, int, int]]:
        topology = PipeModelDataParallelTopology(shape.pipeline, shape.tensor, shape.data)
        coords = (topology.get_coord(rank) for rank in range(shape.world_size))
        return [(c.pipe, c.data, c.model) for c in coords]

    return [coordinates(shape) for shape in SHAPES]


def test_coordinates_equal_deepspeed_topology() -> None:
    [topologies] = run_fresh(topology_coordinates, 1)
    for shape, coordinates in zip(SHAPES, topologies, strict=True):
        assert [shape.coordinates(rank) for rank in range(shape.world_size)] == coordinates, shape


GroupViews = dict[str, tuple[int, int, list[int], int]]


def mpu_groups(rank: int, world: int, tensor: int, data: int, pipeline: int) -> GroupViews:
    """Return for each mpu axis: rank, size, ranks of the group, and an all-reduced sum of these ranks."""
    mpu = mesh(tensor=tensor, data=data, pipeline=pipeline)

    def view(name: str) -> tuple[int, int, list[int], int]:
        axis_rank, size, group = (
            getattr(mpu, f"get_{name}_parallel_{suffix}")() for suffix in ("rank", "world_size", "group")
        )
        assert isinstance(group, dist.ProcessGroup)  # DeepSpeed takes None for the whole world
        total = torch.tensor(rank)
        dist.all_reduce(total, group=group)
        return axis_rank, size, dist.get_process_group_ranks(group), int(total)

    assert mpu.get_data_parallel_group_ranks() == dist.get_process_group_ranks(mpu.get_data_parallel_group())
    return {name: view(name) for name in ("model", "tensor_model", "data")}


@pytest.mark.parametrize(
    "shape",
    [MeshShape(*sizes) for sizes in product((1, 2, 4), repeat=3) if np.prod(sizes) in (1, 2, 4)],
    ids=str,
)
def test_mpu_returns_process_groups_also_of_one_rank(shape: MeshShape) -> None:
    views = pool(shape.world_size).run(mpu_groups, shape.tensor, shape.data, shape.pipeline)
    ranks = ranks_of(shape)
    for (stage, data, tensor), rank in np.ndenumerate(ranks):
        in_tensor, in_data = ranks[stage, data].tolist(), ranks[stage, :, tensor].tolist()
        of_tensor = (tensor, shape.tensor, in_tensor, sum(in_tensor))
        assert views[rank] == {
            "model": of_tensor,
            "tensor_model": of_tensor,
            "data": (data, shape.data, in_data, sum(in_data)),
        }


def create_too_large_mesh(rank: int, world: int) -> None:
    ProcessMesh.create(MeshShape(pipeline=1, data=1, tensor=world * 2))


def test_refuses_a_mesh_larger_than_the_world() -> None:
    with pytest.raises(AssertionError):
        pool(2).run(create_too_large_mesh)


def test_single_process_needs_no_groups() -> None:
    single = ProcessMesh.single()
    assert (single.rank, single.stage, single.tensor, single.data) == (0, 0, Axis(), Axis())
    assert not dist.is_initialized()
