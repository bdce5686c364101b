"""Process mesh: pipeline x data x tensor coordinates of each rank, process groups, and DeepSpeed's mpu.

Each sequence is split over context ranks. They are an inner factor of the data axis: ZeRO and the pipeline
see one data group, with data x context ranks. Experts are folded over that group (arXiv 2504.14960), so that
an expert group may contain context ranks of one or several data ranks.

The rank arithmetic is pure. Only `ProcessMesh.create` creates process groups.
"""

from dataclasses import dataclass
from itertools import product

import torch.distributed as dist

from launcher.config.layout import Layout

Group = dist.ProcessGroup


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the three axes. Consecutive ranks differ first in tensor, then in data, then in pipeline.

    The ranks are `arange(world).view(pipeline, data, tensor)`, as in DeepSpeed (pipe, data, model). A tensor
    group has neighbouring ranks, which lie on one node. `data` counts the context ranks: consecutive ones on
    the data axis are the context ranks of the same samples.
    """

    pipeline: int = 1
    data: int = 1
    tensor: int = 1
    expert: int = 1  # neighbouring ranks of the data axis that hold different experts; divides `data`
    context: int = 1

    @classmethod
    def of(cls, layout: Layout) -> "MeshShape":
        return cls(layout.pipeline, layout.gradient_ranks, layout.tensor, layout.expert, layout.context)

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data * self.tensor

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """Return (pipeline stage, data-parallel rank, tensor-parallel rank) of a global rank."""
        assert 0 <= rank < self.world_size
        stage, within = divmod(rank, self.data * self.tensor)
        return (stage, *divmod(within, self.tensor))

    def rank(self, pipeline: int, data: int, tensor: int) -> int:
        return (pipeline * self.data + data) * self.tensor + tensor

    def tensor_groups(self) -> list[list[int]]:
        """Return the global ranks of each tensor-parallel group, ordered by tensor-parallel rank."""
        places = product(range(self.pipeline), range(self.data))
        return [[self.rank(p, d, t) for t in range(self.tensor)] for p, d in places]

    def data_groups(self) -> list[list[int]]:
        """Return the global ranks of each data-parallel group, ordered by data-parallel rank."""
        places = product(range(self.pipeline), range(self.tensor))
        return [[self.rank(p, d, t) for d in range(self.data)] for p, t in places]

    def context_groups(self) -> list[list[int]]:
        """Return the global ranks of each context-parallel group, ordered by context-parallel rank."""
        size = self.context
        return [group[i : i + size] for group in self.data_groups() for i in range(0, self.data, size)]

    def expert_groups(self) -> list[list[int]]:
        """Return the global ranks of each group that holds all experts once, ordered by expert rank."""
        return [
            group[start : start + self.expert]
            for group in self.data_groups()
            for start in range(0, self.data, self.expert)
        ]

    def expert_data_groups(self) -> list[list[int]]:
        """Return the global ranks of each group that holds the same experts, ordered by data rank."""
        return [group[first :: self.expert] for group in self.data_groups() for first in range(self.expert)]


@dataclass(frozen=True)
class Axis:
    """This rank's index on an axis of the mesh; `group` is None only without torch.distributed."""

    rank: int = 0
    size: int = 1
    group: Group | None = None

    @property
    def group_name(self) -> str:
        """torch's name of the group, the form in which a compiled graph holds it."""
        assert self.group is not None
        return self.group.group_name


ONE_RANK = Axis()


@dataclass(frozen=True)
class ProcessMesh:
    """The mesh as seen by one rank. Has the methods that DeepSpeed calls on an `mpu`."""

    shape: MeshShape
    rank: int
    tensor: Axis
    data: Axis  # with the context ranks
    stage: int = 0
    expert: Axis = ONE_RANK  # the ranks of the data axis that together hold all experts once
    expert_data: Axis | None = None  # None: the data axis, since all data ranks hold the same experts
    context: Axis = ONE_RANK

    @property
    def holders_of_experts(self) -> Axis:
        """Return the axis of the data ranks that hold the same experts."""
        return self.expert_data or self.data

    @classmethod
    def create(cls, shape: MeshShape) -> "ProcessMesh":
        """Create all process groups and return this rank's mesh. Collective over the world; call it once."""
        rank = dist.get_rank()
        assert shape.world_size == dist.get_world_size(), shape
        stage, data_rank, tensor_rank = shape.coordinates(rank)
        tensor = Axis(tensor_rank, shape.tensor, _create_groups(shape.tensor_groups(), rank))
        data = Axis(data_rank, shape.data, _create_groups(shape.data_groups(), rank))
        context = ONE_RANK
        if shape.context > 1:
            group = _create_groups(shape.context_groups(), rank)
            context = Axis(data_rank % shape.context, shape.context, group)
        if shape.expert == 1:
            return cls(shape, rank, tensor, data, stage, context=context)
        copy, place = divmod(data_rank, shape.expert)
        expert = Axis(place, shape.expert, _create_groups(shape.expert_groups(), rank))
        copies = shape.data // shape.expert
        expert_data = Axis(copy, copies, _create_groups(shape.expert_data_groups(), rank))
        return cls(shape, rank, tensor, data, stage, expert, expert_data, context)

    @classmethod
    def single(cls) -> "ProcessMesh":
        """Return the mesh of a single process, without torch.distributed."""
        return cls(MeshShape(), rank=0, tensor=Axis(), data=Axis())

    @property
    def batch(self) -> Axis:
        """The axis over which the samples of a batch are divided, without a group: data without context."""
        return Axis(self.data.rank // self.context.size, self.data.size // self.context.size)

    # Methods of the mpu that DeepSpeed's flat engine gets. DeepSpeed calls tensor parallelism "model
    # parallel". The pipeline engine of DeepSpeed gets a topology instead and builds its own process groups.
    def get_model_parallel_rank(self) -> int:
        return self.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self.tensor.size

    def get_model_parallel_group(self) -> Group | None:
        return self.tensor.group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self.data.size

    def get_data_parallel_group(self) -> Group | None:
        return self.data.group

    def get_data_parallel_group_ranks(self) -> list[int]:
        shape = self.shape
        return [shape.rank(self.stage, data, self.tensor.rank) for data in range(shape.data)]


def _create_groups(groups: list[list[int]], rank: int) -> Group:
    """Create all groups, in the same order on every rank; return the group that contains `rank`.

    Groups of a single rank are created too: DeepSpeed takes None for the whole world, and its bf16 gradient
    norm would then be too large by sqrt(data-parallel size).
    """
    group_of_rank: Group | None = None
    for ranks in groups:
        group: Group = dist.new_group(ranks)
        if rank in ranks:
            group_of_rank = group
    assert group_of_rank is not None
    return group_of_rank
