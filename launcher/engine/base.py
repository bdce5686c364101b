"""The interface of an engine to the training loop, and the code that both engines share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from launcher.config.layout import Layout
from launcher.config.numbers import IGNORED_LABEL
from launcher.engine import bf16_states, direct_update
from launcher.engine.gradient_passes import lighten
from launcher.engine.optimizer import is_trained
from launcher.engine.state import dynamic_loss_scaler, find_states, make_states
from launcher.engine.stochastic import StochasticOptimizer
from launcher.engine.update_guard import UpdateGuard, install
from launcher.models.block_context import BlockContext
from launcher.models.losses import ClassificationLoss, LanguageLoss
from launcher.models.selection_bias import balance
from launcher.parallel.all_reduce import all_reduce_
from launcher.parallel.buckets import has_one_gradient
from launcher.parallel.mesh import Axis, ProcessMesh
from launcher.parallel.sharding import LogicalTensor, logical_of, merge

MicroBatches = Iterable[Any]  # each is token ids (B, T+1), or inputs and labels


@dataclass(frozen=True)
class StepResult:
    """Loss, norm and fate of one optimizer step. All stay on the device: reading them waits for the step."""

    loss: Tensor  # this rank's share of the mean over all labels, in nats; see Engine.loss_share
    grad_norm: Tensor  # before clipping, the same on every rank
    skipped: Tensor  # 1 if the step changed no weight because its gradients are not usable, else 0; alike
    labels: int | None  # labels of the global batch, as passed to train_batch


class Engine(ABC):
    """A DeepSpeed engine in one layout. Build one per process: DeepSpeed leaks engines that are rebuilt."""

    loss_name = "loss"  # the attribute of the module that computes the loss

    def __init__(
        self,
        deepspeed_engine: Any,  # DeepSpeed ships no types
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        layout: Layout,
        mesh: ProcessMesh,
        loss: LanguageLoss,
        context: BlockContext,
        device: torch.device,
    ):
        self.deepspeed, self.module, self.optimizer = deepspeed_engine, module, optimizer
        self.layout = layout
        self.mesh, self.zero_stage, self.device = mesh, layout.zero_stage, device
        self.loss, self.random, self.blocks = loss, context.random, context.blocks
        self.guard = UpdateGuard(device)
        lighten(deepspeed_engine)
        if layout.zero_stage > 0:
            install(self.guard, deepspeed_engine.optimizer, mesh)
        if isinstance(optimizer, StochasticOptimizer):
            bf16_states.install(self)
        if isinstance(deepspeed_engine.optimizer, BF16_Optimizer) and has_one_gradient(layout):
            direct_update.install(self)
        if any(group.get("momentum") for group in optimizer.param_groups):
            # torch would leave the buffers uninitialised if it skipped the first step.
            make_states(self, ["momentum_buffer"], updates=0)

    @property
    def reads_data(self) -> bool:
        """Whether this rank uses the batches that it is given: an inner pipeline stage does not."""
        return True

    @property
    @abstractmethod
    def loss_share(self) -> tuple[int, int]:
        """(index, count) of this rank's share of the loss: the global loss is the mean of `count` shares."""

    @abstractmethod
    def train_batch(self, batches: MicroBatches, labels: int | None = None) -> StepResult:
        """Take one optimizer step over this data rank's micro-batches. Collective over the world.

        `labels` is the number of labels of the global batch that are not ignored; None: no label is ignored.
        """

    @abstractmethod
    def eval_batch(self, batches: MicroBatches, labels: int | None = None) -> Tensor:
        """Return the mean loss of all data ranks' labels, without dropout, on the device. Collective.

        `labels` as in train_batch.
        """

    def _balance_experts(self) -> None:
        """Update the biases for the choice of experts, if there are any. Collective over the data group."""
        balance(self.module, self.mesh.data, 1.0 - self.guard.skipped)

    def _count(self, labels: int | None) -> None:
        """Set the number by which the losses of the next global batch are divided.

        A batch without a label has the loss 0 and gradients of 0.
        """
        micro_batches = self.layout.accumulation * self.mesh.data.size
        self.loss.labels_per_micro_batch = None if labels is None else max(labels, 1) / micro_batches

    def _to_device(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return inputs and labels on the device, from token ids (B, T+1) or from a pair of both."""
        inputs, labels = batch if isinstance(batch, tuple) else (batch[:, :-1], batch[:, 1:])
        if self.loss.labels_per_micro_batch is None:
            assert not (labels == IGNORED_LABEL).any(), "the caller must pass the number of labels that count"
        return to_device(inputs, self.device), to_device(labels, self.device)

    def begin_shape(self) -> None:  # noqa: B027  (only a pipeline keeps buffers of one shape)
        """Get ready for micro-batches of another shape than before. Collective over the world."""

    def mean_loss(self, loss: Tensor) -> float:
        """Read the global loss of a StepResult. Collective over the data group."""
        if self.loss_share[1] == 1:
            return float(loss)
        return float(mean_over(loss, self.mesh.data))

    def accuracy(self) -> float | None:
        """Return and reset the share of right answers of eval_batch; None without classes. Collective."""
        if not isinstance(self.loss, ClassificationLoss):
            return None
        # Only the stage that computes the loss counts, and all its tensor ranks count the same.
        counts = [self.loss.right, self.loss.seen] if self.mesh.tensor.rank == 0 else [0, 0]
        self.loss.right = self.loss.seen = 0
        right, seen = world_sums(counts)
        return right / seen

    @property
    def lowers_loss_scale(self) -> bool:
        """Whether fp16's loss scale can still be lowered, so that gradients that overflow are expected."""
        scaler = dynamic_loss_scaler(self)
        return scaler is not None and scaler.cur_scale > scaler.min_scale

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield this rank's parameters, without copies of weights tied to an earlier pipeline stage."""
        return (p for p in self.module.parameters() if not getattr(p, "ds_pipe_replicated", False))

    def full_weights(self) -> Iterator[tuple[LogicalTensor, Tensor]]:
        """Yield this stage's logical tensors in fp32 on the CPU. Collective over the stage's ranks."""
        return self._logical(self.parameters(), self.master)

    def full_states(self, key: str) -> Iterator[tuple[LogicalTensor, Tensor]]:
        """Yield the optimizer state `key` (torch's name) of each of this stage's tensors, as full_weights."""
        find_states(self, [key])
        trained = filter(is_trained, self.parameters())
        return self._logical(trained, lambda parameter: self._state(parameter, key))

    def _logical(
        self, parameters: Iterable[nn.Parameter], shard_of: Callable[[nn.Parameter], Tensor]
    ) -> Iterator[tuple[LogicalTensor, Tensor]]:
        for parameter in parameters:
            logical = logical_of(parameter)
            yield logical, gather_logical(shard_of(parameter), logical, self.mesh).cpu()

    # Under ZeRO-0 DeepSpeed's safe_get functions return None: torch's optimizer holds the states itself.

    def master(self, parameter: nn.Parameter) -> Tensor:
        """Return this tensor rank's whole shard in fp32. Collective over the data group."""
        if not is_trained(parameter) and self.zero_stage == 3:
            with GatheredParameters([parameter]):
                return parameter.detach().clone().float()
        is_whole = self.zero_stage == 0 or not is_trained(parameter)
        full = parameter.detach() if is_whole else safe_get_full_fp32_param(parameter)
        assert full is not None
        return full.float()

    def _state(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Return the state of this tensor rank's whole shard. Collective over the data group."""
        if self.zero_stage == 0:
            full = self.optimizer.state[parameter][key]
        else:
            full = safe_get_full_optimizer_state(parameter, key)
        assert isinstance(full, Tensor)
        return full.float()


def mean_over(value: Tensor, axis: Axis) -> Tensor:
    """Return the mean of `value` over the axis, on the device. Collective over the axis."""
    if axis.size == 1:
        return value
    mean = value.clone()
    all_reduce_(mean, axis.group)
    return mean / axis.size


def world_sums(counts: list[int]) -> list[int]:
    """Return each number summed over all ranks. Collective over the world."""
    total = torch.tensor(counts, dtype=torch.int64)
    dist.all_reduce(total)
    return [int(number) for number in total]


def gather_logical(shard: Tensor, logical: LogicalTensor, mesh: ProcessMesh) -> Tensor:
    """Return the logical tensor of all tensor ranks' shards, and of all expert ranks' parts.

    Collective: an all-gather over the tensor group if it is split, and over the expert group if it has parts.
    """
    shards = _gathered(shard, mesh.tensor) if logical.is_split else [shard]
    part = merge(shards, logical)
    return torch.cat(_gathered(part, mesh.expert)) if logical.is_part else part


def _gathered(tensor: Tensor, axis: Axis) -> list[Tensor]:
    if axis.size == 1:
        return [tensor]
    tensors = [torch.empty_like(tensor) for _ in range(axis.size)]
    dist.all_gather(tensors, tensor.contiguous(), group=axis.group)
    return tensors


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # a copy from pageable memory could wait for the GPU
    return tensor.to(device, non_blocking=True)
