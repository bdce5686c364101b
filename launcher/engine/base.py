"""What the training loop sees of an engine, and what both kinds share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
)
from torch import Tensor, nn

from launcher.engine.state import link_states
from launcher.models.language import Loss
from launcher.models.vision import ClassificationLoss
from launcher.parallel.mesh import Axis, ProcessMesh
from launcher.parallel.random import DropoutRandom
from launcher.parallel.sharding import LogicalTensor, logical_of, merge

MicroBatches = Iterable[Any]  # each token ids (B, T+1), or inputs and labels


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step, the same on every rank: mean loss in nats, gradient norm before clipping."""

    loss: float
    grad_norm: float


class Engine(ABC):
    """One DeepSpeed engine in one layout. One per process: DeepSpeed leaks what it is asked to rebuild."""

    deepspeed: Any  # DeepSpeed's own engine, which ships no types
    random: DropoutRandom
    loss: Loss

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, mesh: ProcessMesh, zero_stage: int
    ):
        self.module, self.optimizer, self.mesh, self.zero_stage = module, optimizer, mesh, zero_stage

    @property
    def reads_data(self) -> bool:
        """Whether this rank takes anything of the batches it is given: not on an inner pipeline stage."""
        return True

    @abstractmethod
    def train_batch(self, batches: MicroBatches) -> StepResult:
        """One optimizer step over this data rank's micro-batches. Collective over the world."""

    @abstractmethod
    def eval_batch(self, batches: MicroBatches) -> float:
        """The mean loss over all data ranks' micro-batches, without dropout. Collective over the world."""

    def accuracy(self) -> float | None:
        """The share of right answers in eval_batch since the last call; None for a model that has none.

        Collective over the world: one all-reduce of two numbers.
        """
        if not isinstance(self.loss, ClassificationLoss):
            return None
        # On the stage that has the loss, and alike on all its tensor ranks.
        own = [self.loss.right, self.loss.seen] if self.mesh.tensor.rank == 0 else [0, 0]
        self.loss.right = self.loss.seen = 0
        right, seen = counted(own)
        return right / seen

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's parameters, those held for a tie with an earlier pipeline stage left out."""
        return (p for p in self.module.parameters() if not getattr(p, "ds_pipe_replicated", False))

    def full_weights(self) -> Iterator[tuple[LogicalTensor, Tensor]]:
        """This stage's logical tensors in fp32 on the CPU, one at a time.

        Collective over the stage: all its data and tensor ranks iterate to the end, and all get the tensors.
        """
        return self._logical(self.master)

    def full_states(self, key: str) -> Iterator[tuple[LogicalTensor, Tensor]]:
        """The optimizer's state `key` (torch's name) of each of this stage's tensors; as full_weights."""
        link_states(self)
        return self._logical(lambda parameter: self._state(parameter, key))

    def _logical(self, shard_of: Callable[[nn.Parameter], Tensor]) -> Iterator[tuple[LogicalTensor, Tensor]]:
        for parameter in self.parameters():
            logical = logical_of(parameter)
            yield logical, gather_logical(shard_of(parameter), logical, self.mesh.tensor).cpu()

    # DeepSpeed's two answer None under ZeRO-0, where torch itself holds what is asked for.

    def master(self, parameter: nn.Parameter) -> Tensor:
        """This tensor rank's whole shard in fp32. Collective over the data group."""
        full = parameter.detach() if self.zero_stage == 0 else safe_get_full_fp32_param(parameter)
        assert full is not None
        return full.float()

    def _state(self, parameter: nn.Parameter, key: str) -> Tensor:
        """The state of this tensor rank's whole shard. Collective over the data group."""
        if self.zero_stage == 0:
            full = self.optimizer.state[parameter][key]
        else:
            full = safe_get_full_optimizer_state(parameter, key)
        assert isinstance(full, Tensor)
        return full.float()


def counted(own: list[int]) -> list[int]:
    """Each number summed over the world. Collective."""
    total = torch.tensor(own, dtype=torch.int64)
    dist.all_reduce(total)
    return [int(number) for number in total]


def gather_logical(shard: Tensor, logical: LogicalTensor, axis: Axis) -> Tensor:
    """The logical tensor from every tensor rank's shard. Collective: all-gather over the axis, if split."""
    if not logical.is_split or axis.size == 1:
        return merge([shard], logical)
    shards = [torch.empty_like(shard) for _ in range(axis.size)]
    dist.all_gather(shards, shard.contiguous(), group=axis.group)
    return merge(shards, logical)


def to_inputs(batch: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T+1) token ids -> tokens (B, T) and the labels they predict (B, T); a pair of arrays as it is."""
    inputs, labels = batch if isinstance(batch, tuple) else (batch[:, :-1], batch[:, 1:])
    on_device = [torch.from_numpy(np.ascontiguousarray(one)) for one in (inputs, labels)]
    return on_device[0].to(device, non_blocking=True), on_device[1].to(device, non_blocking=True)
