"""Access to the fragment of every weight and optimizer state that this rank holds, as views.

Only this module knows how DeepSpeed partitions them: not at all under ZeRO-0, flat over the data ranks under
ZeRO-1 and 2 (and in BF16_Optimizer), parameter by parameter under ZeRO-3. Frozen weights (LoRA) have neither
master weights nor optimizer states: they are whole, or under ZeRO-3 partitioned, in the model's precision.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.utils import lazy_init_hp_params_optimizer_state
from torch import Tensor, nn

from launcher.engine.optimizer import is_trained
from launcher.parallel.sharding import WEIGHT, LogicalTensor, logical_of

if TYPE_CHECKING:
    from launcher.engine.base import Engine


@dataclass(frozen=True)
class Fragment:
    """Elements from `start` on of one parameter's flattened shard on this tensor rank.

    In fp32, except frozen weights, which are in the model's precision.
    """

    logical: LogicalTensor
    shard_shape: tuple[int, ...]
    start: int
    tensors: dict[str, Tensor]  # by WEIGHT or torch's name of the optimizer state, each (numel,)
    is_tied_copy: bool  # a copy of a weight that an earlier pipeline stage holds
    is_frozen: bool = False

    def narrowed(self, start: int, numel: int) -> "Fragment":
        """Return elements start .. start + numel, counted within this fragment."""
        tensors = {key: tensor.narrow(0, start, numel) for key, tensor in self.tensors.items()}
        return replace(self, start=self.start + start, tensors=tensors)


def fragments(engine: "Engine", keys: list[str]) -> Iterator[Fragment]:
    """Yield every fragment that this rank holds, with the optimizer states `keys`. No collective.

    A frozen fragment has only its weight.
    """
    if keys:
        find_states(engine, keys)
    for parameter in engine.module.parameters():
        shape, is_frozen = tuple(getattr(parameter, "ds_shape", parameter.shape)), not is_trained(parameter)
        stretch = _frozen_stretch(engine, parameter) if is_frozen else _stretch(engine, parameter, keys)
        if stretch is not None:
            start, tensors = stretch
            tied = bool(getattr(parameter, "ds_pipe_replicated", False))
            yield Fragment(logical_of(parameter), shape, start, tensors, tied, is_frozen)


def trained_fragments(engine: "Engine", keys: list[str]) -> Iterator[Fragment]:
    """Yield the fragments that training changes."""
    return (fragment for fragment in fragments(engine, keys) if not fragment.is_frozen)


def _frozen_stretch(engine: "Engine", parameter: nn.Parameter) -> tuple[int, dict[str, Tensor]] | None:
    if engine.zero_stage < 3:
        return 0, {WEIGHT: parameter.detach().view(-1)}
    partitioned: Any = parameter
    start, numel = _partition(engine, partitioned)
    return None if numel <= 0 else (start, {WEIGHT: partitioned.ds_tensor.detach().narrow(0, 0, numel)})


def _partition(engine: "Engine", partitioned: Any) -> tuple[int, int]:
    """Return where this data rank's partition of a parameter starts, and its elements without padding.

    A small weight's partitions on the last ranks hold only padding.
    """
    size = partitioned.ds_tensor.ds_numel
    start = engine.deepspeed.optimizer._get_param_partition_rank(partitioned) * size
    return start, min(size, partitioned.ds_numel - start)


def _stretch(
    engine: "Engine", parameter: nn.Parameter, keys: list[str]
) -> tuple[int, dict[str, Tensor]] | None:
    zero: Any = engine.deepspeed.optimizer
    if engine.zero_stage == 0:
        state = engine.optimizer.state[parameter]
        return 0, {WEIGHT: parameter.detach().view(-1), **{key: state[key].view(-1) for key in keys}}
    if engine.zero_stage == 3:
        start, numel = _partition(engine, parameter)
        if numel <= 0:
            return None
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
    """Return the optimizer steps taken: fewer than the run's steps if fp16 skipped some; 0 for SGD."""
    counts = [int(state["step"]) for state in engine.optimizer.state.values() if "step" in state]
    return max(counts, default=0)


@torch.no_grad()
def make_states(engine: "Engine", keys: list[str], updates: int) -> None:
    """Give every partition zero optimizer states after `updates` steps; restoring fills them in."""
    for partition in partitions(engine):
        state: dict[str, Tensor] = {key: torch.zeros_like(partition) for key in keys}
        if isinstance(engine.optimizer, torch.optim.AdamW):
            state["step"] = torch.tensor(float(updates), device=partition.device)
        engine.optimizer.state[partition] = state
    link_states(engine)


def find_states(engine: "Engine", keys: list[str]) -> None:
    """Make the states `keys` of every parameter accessible: zeros if all steps so far were skipped."""
    if engine.optimizer.state:
        link_states(engine)
    else:
        make_states(engine, keys, updates=0)


@torch.no_grad()
def update_model_weights(engine: "Engine") -> None:
    """Copy the master weights into the model weights. Collective over the data group."""
    zero: Any = engine.deepspeed.optimizer
    if engine.zero_stage == 0:
        return  # the model weights are the master weights
    if engine.zero_stage < 3:
        zero.update_lp_params()
        return
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def link_states(engine: "Engine") -> None:
    """Let DeepSpeed find the states of every parameter group under ZeRO-1 and 2.

    DeepSpeed links all groups after the first group has stepped, when the other groups have no states yet,
    and never again (DeepSpeed 0.19.8, stage_1_and_2.py, _optimizer_step).
    """
    zero: Any = engine.deepspeed.optimizer
    if engine.zero_stage in (1, 2):
        groups = getattr(zero, "bit16_groups", None) or zero.bf16_groups
        for group, partition in zip(groups, partitions(engine), strict=True):
            lazy_init_hp_params_optimizer_state(group, partition, zero.optimizer.state)


def partitions(engine: "Engine") -> list[nn.Parameter]:
    """Return the tensors that torch's optimizer updates: parameters, or this rank's flat fp32 partitions."""
    zero: Any = engine.deepspeed.optimizer
    if engine.zero_stage == 0:
        return list(filter(is_trained, engine.module.parameters()))
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    return next(list(partitions) for name in names if (partitions := getattr(zero, name, None)))


# The settings of the scaler, such as its window, are those of the run: a checkpoint must not restore them.
_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def dynamic_loss_scaler(engine: "Engine") -> Any:
    """Return DeepSpeed's dynamic loss scaler of fp16; None with a static scale and in other precisions."""
    scaler = getattr(engine.deepspeed.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


def loss_scaler(engine: "Engine") -> dict[str, float]:
    """Return the state of fp16's dynamic loss scaler; empty without one."""
    scaler = dynamic_loss_scaler(engine)
    return {} if scaler is None else {name: getattr(scaler, name) for name in _SCALER_STATE}


def set_loss_scaler(engine: "Engine", numbers: dict[str, float]) -> None:
    """Restore the state that loss_scaler returned, within the limits that this run sets.

    A run with a static loss scale neither saves nor restores a state.
    """
    scaler = dynamic_loss_scaler(engine)
    if scaler is None or not numbers.keys() >= set(_SCALER_STATE):
        return
    for name in _SCALER_STATE:
        setattr(scaler, name, numbers[name])
    scaler.cur_scale = max(scaler.cur_scale, scaler.min_scale)
    scaler.cur_hysteresis = min(scaler.cur_hysteresis, scaler.delayed_shift)
