"""Let DeepSpeed's ZeRO optimizers train bf16 weights without a copy: precision.states=bf16.

DeepSpeed 0.19.8 keeps bf16 "master" weights beside equal model weights, and copies all gradients once more
for the optimizer step. Here the master weights are the rank's part of the model weights, and under ZeRO-1 and
2 the optimizer reads the gradients where they are.
"""

from bisect import bisect_right
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from launcher.engine.state import Fragment, fragments, partitions
from launcher.engine.stochastic import Conditions, CounterRange, StochasticOptimizer
from launcher.engine.update_guard import clip_factor, combined, norms
from launcher.parallel.sharding import WEIGHT, seed_of

_GAP = 0  # the counter of padding, which no tensor has


def install(engine: Any) -> None:
    """Prepare an engine whose optimizer is a StochasticOptimizer, after update_guard.install."""
    zero, guard, random, mesh = engine.deepspeed.optimizer, engine.guard, engine.random, engine.mesh
    assert isinstance(engine.optimizer, StochasticOptimizer)
    limit, zero.clip_grad = zero.clip_grad or torch.inf, 0.0
    _share_weights(zero)
    conditions = engine.optimizer.conditions = Conditions(
        seed=random.seed,
        step=lambda: random.step,
        kept=lambda: guard.skipped == 0,
        factor=lambda: clip_factor(guard.norm, limit),
        counter_ranges=_counter_ranges(engine),
        compiled=engine.layout.compiles_updates,
    )
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        return

    @torch.no_grad()
    def step(closure: Any = None) -> None:
        """Do what DeepSpeed's step does, without copies, and leave the decision to the device."""
        guard.judge(combined(norms(zero, mesh), dist.group.WORLD, guard.device))
        zero.overflow, zero._global_grad_norm = False, guard.norm
        for index, partition in enumerate(zero.single_partition_of_fp32_groups):
            conditions.pieces[partition] = zero.averaged_gradients[index]
            zero.averaged_gradients[index] = zero.all_grad_tensors[index] = None
        zero.optimizer.step()
        zero._lazy_init_hp_params_optimizer_state()
        zero.update_lp_params()

    zero.step = step


def _share_weights(zero: Any) -> None:
    """Let each master partition be the rank's part of the model weights, which it equals."""
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        pairs = zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True)
        for master, weights in pairs:
            master.data = weights.data
        return
    for index, master in enumerate(zero.single_partition_of_fp32_groups):
        rank = dist.get_rank(zero.real_dp_process_group[index])
        master.data = zero.parallel_partitioned_bit16_groups[index][rank].data
        for mapping in (parameter._hp_mapping for parameter in zero.bit16_groups[index]):
            if mapping is not None:
                address = mapping.hp_fragment_address
                mapping.hp_fragment = master.detach().narrow(0, address.start, address.numel)


def _counter_ranges(engine: Any) -> dict[Tensor, list[CounterRange]]:
    """Return the counter ranges of each partition, in order; each element of a tensor has its own counter."""
    held: dict[int, list[Fragment]] = {}
    flat = sorted(partitions(engine), key=Tensor.data_ptr)
    starts = [partition.data_ptr() for partition in flat]
    for fragment in sorted(fragments(engine, []), key=_address):
        held.setdefault(bisect_right(starts, _address(fragment)) - 1, []).append(fragment)
    return {
        partition: _gapless(partition, held.get(index, []), engine) for index, partition in enumerate(flat)
    }


def _gapless(partition: Tensor, held: list[Fragment], engine: Any) -> list[CounterRange]:
    result, end = [], 0
    for fragment in held:
        weight, logical = fragment.tensors[WEIGHT], fragment.logical
        start = (weight.data_ptr() - partition.data_ptr()) // weight.element_size()
        # Tensor ranks round their copies of a whole tensor alike.
        tensor_rank = engine.mesh.tensor.rank if logical.is_split else 0
        first = seed_of(engine.random.seed, "rounding", logical.name, tensor_rank)
        result += [CounterRange(start - end, _GAP), CounterRange(weight.numel(), first + fragment.start)]
        end = start + weight.numel()
    return [s for s in (*result, CounterRange(partition.numel() - end, _GAP)) if s.numel]


def _address(fragment: Fragment) -> int:
    return fragment.tensors[WEIGHT].data_ptr()
