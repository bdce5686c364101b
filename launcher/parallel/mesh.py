"""Where each rank stands: pipeline x data x tensor, its groups, and what DeepSpeed asks of an mpu.

The rank arithmetic is pure; `ProcessMesh.create` is the only place that makes process groups.
"""

from dataclasses import dataclass

import torch.distributed as dist

Group = dist.ProcessGroup


@dataclass(frozen=True)
class MeshShape:
    """The sizes of the three axes. Ranks count tensor fastest, then data, then pipeline.

    That is `arange(world).view(pipeline, data, tensor)`, DeepSpeed's own order (pipe, data, model), and
    keeps a tensor group on neighbouring ranks, inside one node.
    """

    pipeline: int = 1
    data: int = 1
    tensor: int = 1

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data * self.tensor

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(pipeline stage, data-parallel rank, tensor-parallel rank) of a global rank."""
        assert 0 <= rank < self.world_size
        stage, within = divmod(rank, self.data * self.tensor)
        return (stage, *divmod(within, self.tensor))

    def rank(self, pipeline: int, data: int, tensor: int) -> int:
        return (pipeline * self.data + data) * self.tensor + tensor

    def tensor_groups(self) -> list[list[int]]:
        """Global ranks of each tensor-parallel group, in tensor-rank order."""
        return [
            [self.rank(p, d, t) for t in range(self.tensor)]
            for p in range(self.pipeline)
            for d in range(self.data)
        ]

    def data_groups(self) -> list[list[int]]:
        """Global ranks of each data-parallel group, in data-rank order."""
        return [
            [self.rank(p, d, t) for d in range(self.data)]
            for p in range(self.pipeline)
            for t in range(self.tensor)
        ]


@dataclass(frozen=True)
class Axis:
    """This rank's place on one axis of the mesh; `group` is None outside torch.distributed only."""

    rank: int = 0
    size: int = 1
    group: Group | None = None


@dataclass(frozen=True)
class ProcessMesh:
    """The mesh seen from one rank. Has the methods DeepSpeed calls on an `mpu`."""

    shape: MeshShape
    rank: int
    tensor: Axis
    data: Axis
    stage: int = 0

    @classmethod
    def create(cls, shape: MeshShape) -> "ProcessMesh":
        """Collective: every rank of the world calls it once, after torch.distributed is initialised."""
        rank = dist.get_rank()
        assert shape.world_size == dist.get_world_size(), shape
        stage, data_rank, tensor_rank = shape.coordinates(rank)
        return cls(
            shape=shape,
            rank=rank,
            tensor=Axis(tensor_rank, shape.tensor, _own_group(shape.tensor_groups(), rank)),
            data=Axis(data_rank, shape.data, _own_group(shape.data_groups(), rank)),
            stage=stage,
        )

    @classmethod
    def single(cls) -> "ProcessMesh":
        """One process, without torch.distributed."""
        return cls(MeshShape(), rank=0, tensor=Axis(), data=Axis())

    # The mpu that DeepSpeed's flat engine is given. "Model parallel" is tensor parallel there; its
    # pipeline engine is given a topology instead and builds a grid of its own.
    def get_model_parallel_rank(self) -> int:
        return self.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self.tensor.size

    def get_model_parallel_group(self) -> Group | None:
        return self.tensor.group

    def get_tensor_model_parallel_rank(self) -> int:
        return self.tensor.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.tensor.size

    def get_tensor_model_parallel_group(self) -> Group | None:
        return self.tensor.group

    def get_data_parallel_rank(self) -> int:
        return self.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self.data.size

    def get_data_parallel_group(self) -> Group | None:
        return self.data.group

    def get_data_parallel_group_ranks(self) -> list[int]:
        shape = self.shape
        return [shape.rank(self.stage, data, self.tensor.rank) for data in range(shape.data)]


def _own_group(groups: list[list[int]], rank: int) -> Group:
    """Make the groups, all of them on every rank in one order, and return the one `rank` is in.

    Groups of one rank are made too: DeepSpeed reads None as the whole world, and its bf16 gradient norm
    would then be sqrt(data-parallel size) too large.
    """
    own: Group | None = None
    for ranks in groups:
        group: Group = dist.new_group(ranks)
        if rank in ranks:
            own = group
    assert own is not None
    return own
