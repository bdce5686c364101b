"""Fewer passes over the gradients than DeepSpeed 0.19.8 makes between a backward pass and the update."""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from launcher.engine.optimizer import is_trained
from launcher.engine.overlapped_reduction import OverlappedReduction, joined

_WAITING_ELEMENTS = 1 << 26  # gradients in bf16 that may wait to be copied into the fp32 sums


def lighten(deepspeed_engine: Any) -> None:
    """Replace the copies of ZeRO-0 and BF16_Optimizer. Their measured share of a step: docs/benchmarks.md."""
    zero = deepspeed_engine.optimizer
    copies = _accumulate_without_zeros(zero) if isinstance(zero, BF16_Optimizer) else None
    if deepspeed_engine.postscale_gradients() and deepspeed_engine.gradient_predivide_factor() == 1.0:
        _reduce_in_one_buffer(deepspeed_engine)
        is_whole = deepspeed_engine.zero_optimization_stage() == 0 or copies is not None
        if is_whole and not deepspeed_engine.pipeline_parallelism:
            _reduce_during_backward(deepspeed_engine, copies)


def _reduce_during_backward(engine: Any, copies: "_Copies | None") -> None:
    """Reduce all gradients except those of distributed experts bucket by bucket: see OverlappedReduction.

    `copies` are those into BF16_Optimizer's fp32 sums; None: torch's optimizer takes the step (ZeRO-0).
    """
    group = engine.mpu.get_data_parallel_group()
    if dist.get_world_size(group) == 1:
        return
    sums = _sums(engine.optimizer) if copies is not None else {}

    def gradient_of(parameter: nn.Parameter) -> Tensor:
        if copies is None:
            assert parameter.grad is not None
            return parameter.grad
        copies.make()
        return sums[parameter]

    trained = filter(is_trained, engine.module.parameters())
    parameters = [parameter for parameter in trained if getattr(parameter, "allreduce", True)]
    reduction = OverlappedReduction(
        parameters,
        gradient_of,
        engine.is_gradient_accumulation_boundary,
        group=group,
        sent=engine.communication_data_type,
        filled=engine.zero_reduce_bucket_size(),
    )
    owner, name = (engine, "_get_gradients_for_reduction") if copies is None else (
        engine.optimizer, "get_grads_for_reduction"
    )  # fmt: skip
    all_gradients = getattr(owner, name)

    def left_for_deepspeed() -> Any:
        _, of_experts = all_gradients()  # makes zeros for weights without a gradient
        reduction.finish()
        return [], of_experts

    setattr(owner, name, left_for_deepspeed)


def _sums(zero: BF16_Optimizer) -> dict[nn.Parameter, Tensor]:
    """Return the fp32 sum of each weight's gradients, in the weight's shape."""
    return {
        weight: total.view(weight.shape)
        for weights, totals in zip(zero.bf16_groups, zero.fp32_groups_gradients, strict=True)
        for weight, total in zip(weights, totals, strict=True)
    }


def _reduce_in_one_buffer(engine: Any) -> None:
    """Reduce a bucket through one buffer of the type that is sent, and not at all on one data rank.

    DeepSpeed joins the gradients in fp32, casts, sends, casts and copies; on one rank it does so too.
    """

    def allreduce_and_copy(bucket: list[Tensor], group: Any, divisor: float | None = None) -> None:
        """Average the gradients of a bucket. Collective over the group: one all-reduce.

        `divisor` is the number of data ranks also for experts, which fewer ranks hold.
        """
        size = dist.get_world_size(group)
        divisor = divisor or size
        if size == 1:
            if divisor > 1:
                torch._foreach_mul_(bucket, 1 / divisor)
            return
        sent, parts = joined(bucket, engine.communication_data_type)
        dist.all_reduce(sent, group=group)
        sent.mul_(1 / divisor)
        torch._foreach_copy_(bucket, parts)

    engine.allreduce_and_copy = allreduce_and_copy


def _accumulate_without_zeros(zero: BF16_Optimizer) -> "_Copies":
    """Copy the first gradient of a step into the fp32 sums, and add the others to them as they are.

    DeepSpeed sets the sums to zero, casts each gradient to fp32 into a tensor of its own, and adds that.
    """
    copies = _Copies()

    @torch.no_grad()
    def update(weight: Tensor, group: int, index: int, clear_lp_grads: bool) -> None:
        assert not clear_lp_grads  # immediate_grad_update frees the gradient instead
        if weight.grad is None:
            return
        total, has_gradient = zero.fp32_groups_gradients[group][index], zero.fp32_groups_has_gradients[group]
        gradient = weight.grad.view(total.shape)
        if has_gradient[index]:
            total.add_(gradient)
        else:
            copies.add(total, gradient)
        weight._hp_grad, has_gradient[index] = total, True  # type: ignore[attr-defined]  # as DeepSpeed does

    @torch.no_grad()
    def all_gradients() -> Any:
        for sums, has_gradient in zip(
            zero.fp32_groups_gradients, zero.fp32_groups_has_gradients, strict=True
        ):
            for total, has in zip(sums, has_gradient, strict=True):
                if not has:
                    total.zero_()  # it still holds the gradient of an older step
        return zero.non_expert_gradients, getattr(zero, "expert_gradients", {})

    def clear() -> None:
        for index, group in enumerate(zero.fp32_groups_gradients):
            zero.fp32_groups_has_gradients[index] = [False] * len(group)

    zero._update_hp_grad, zero.clear_hp_grads = update, clear
    zero.get_grads_for_reduction = all_gradients
    zero.clear_hp_grads()
    return copies


class _Copies:
    """Copies of a backward pass, made together in few kernels: a model may have hundreds of small weights."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._elements = 0

    def add(self, target: Tensor, source: Tensor) -> None:
        """Copy `source` into `target` before the backward pass ends. Call it within the pass."""
        if not self._pairs:
            torch.autograd.Variable._execution_engine.queue_callback(self.make)
        self._pairs.append((target, source))
        self._elements += source.numel()
        if self._elements > _WAITING_ELEMENTS:
            self.make()

    @torch.no_grad()
    def make(self) -> None:
        """Make the copies that wait."""
        if self._pairs:
            targets, sources = zip(*self._pairs, strict=True)
            torch._foreach_copy_(targets, sources)
        self._pairs, self._elements = [], 0
