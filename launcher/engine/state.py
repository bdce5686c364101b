"""The stretch of every weight and optimizer state that this rank holds, as views to read and to write.

The one place that knows how DeepSpeed partitions them: not at all under ZeRO-0, flat over the data ranks
under ZeRO-1 and 2 (and its BF16_Optimizer), parameter by parameter under ZeRO-3.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.utils import lazy_init_hp_params_optimizer_state
from torch import Tensor, nn

from launcher.parallel.sharding import WEIGHT, LogicalTensor, logical_of

if TYPE_CHECKING:
    from launcher.engine.base import Engine


@dataclass(frozen=True)
class Fragment:
    """Elements `start` and on of one parameter's shard on this tensor rank, flattened, in fp32."""

    logical: LogicalTensor
    shard_shape: tuple[int, ...]
    start: int
    tensors: dict[str, Tensor]  # WEIGHT and torch's names of the optimizer's states, each (numel,)
    is_tied_copy: bool  # of a weight that an earlier pipeline stage holds

    def narrowed(self, start: int, numel: int) -> "Fragment":
        """Its elements start .. start + numel, counted within this fragment."""
        tensors = {key: tensor.narrow(0, start, numel) for key, tensor in self.tensors.items()}
        return Fragment(self.logical, self.shard_shape, self.start + start, tensors, self.is_tied_copy)


def fragments(engine: "Engine", keys: list[str]) -> Iterator[Fragment]:
    """All that this rank holds, with the optimizer states `keys`; no collective."""
    if keys:
        link_states(engine)
    for parameter in engine.module.parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        held = _held(engine, parameter, keys)
        if held is not None:
            start, tensors = held
            tied = bool(getattr(parameter, "ds_pipe_replicated", False))
            yield Fragment(logical_of(parameter), shape, start, tensors, tied)


def _held(engine: "Engine", parameter: nn.Parameter, keys: list[str]) -> tuple[int, dict[str, Tensor]] | None:
    zero: Any = engine.deepspeed.optimizer
    if engine.zero_stage == 0:
        state = engine.optimizer.state[parameter]
        return 0, {WEIGHT: parameter.detach().view(-1), **{key: state[key].view(-1) for key in keys}}
    if engine.zero_stage == 3:
        held: Any = parameter
        size = held.ds_tensor.ds_numel
        start = zero._get_param_partition_rank(parameter) * size
        numel = min(size, held.ds_numel - start)
        if numel <= 0:
            return None  # the last ranks' partitions of a small weight are padding
        tensors = {
            key: zero._get_fp32_opt_state_partition(parameter, False, None if key == WEIGHT else key)[0]
            for key in (WEIGHT, *keys)
        }
        return start, {key: tensor.detach().narrow(0, 0, numel) for key, tensor in tensors.items()}
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    states = {key: mapping.get_optim_state_fragment(key) for key in keys}
    return mapping.lp_fragment_address.start, {WEIGHT: mapping.hp_fragment.detach(), **states}


def updates_made(engine: "Engine") -> int:
    """Optimizer steps so far, which a loss scale may have kept below the run's; 0 where none is counted."""
    counts = [int(state["step"]) for state in engine.optimizer.state.values() if "step" in state]
    return max(counts, default=0)


@torch.no_grad()
def make_states(engine: "Engine", keys: list[str], updates: int) -> None:
    """Give every partition the (zero) optimizer states of a run that has made `updates`, to be filled in."""
    for partition in _partitions(engine):
        state: dict[str, Tensor] = {key: torch.zeros_like(partition) for key in keys}
        if isinstance(engine.optimizer, torch.optim.AdamW):
            state["step"] = torch.tensor(float(updates), device=partition.device)
        engine.optimizer.state[partition] = state
    link_states(engine)


@torch.no_grad()
def take_up(engine: "Engine") -> None:
    """Make the working weights those of the fp32 fragments. Collective over the data group."""
    zero: Any = engine.deepspeed.optimizer
    if engine.zero_stage == 0:
        return  # they are the same
    if engine.zero_stage < 3:
        zero.update_lp_params()
        return
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def link_states(engine: "Engine") -> None:
    """Let DeepSpeed find the states of every parameter group under ZeRO-1 and 2.

    It links all of them after the first group has stepped, when the others have none yet, and never
    again (DeepSpeed 0.19.8, stage_1_and_2.py, _optimizer_step).
    """
    zero: Any = engine.deepspeed.optimizer
    if engine.zero_stage in (1, 2):
        groups = getattr(zero, "bit16_groups", None) or zero.bf16_groups
        for group, partition in zip(groups, _partitions(engine), strict=True):
            lazy_init_hp_params_optimizer_state(group, partition, zero.optimizer.state)


def _partitions(engine: "Engine") -> list[nn.Parameter]:
    """What torch's optimizer steps on: the parameters, or this data rank's flat fp32 partitions."""
    zero: Any = engine.deepspeed.optimizer
    if engine.zero_stage == 0:
        return list(engine.module.parameters())
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    return next(list(found) for name in names if (found := getattr(zero, name, None)))


def loss_scaler(engine: "Engine") -> dict[str, float]:
    """The numbers of fp16's dynamic loss scale; empty in other precisions."""
    scaler = getattr(engine.deepspeed.optimizer, "loss_scaler", None)
    if not engine.deepspeed.fp16_enabled():
        return {}
    return {name: value for name, value in vars(scaler).items() if type(value) in (int, float)}


def set_loss_scaler(engine: "Engine", numbers: dict[str, float]) -> None:
    """Take up what loss_scaler told."""
    if engine.deepspeed.fp16_enabled():
        vars(engine.deepspeed.optimizer.loss_scaler).update(numbers)
