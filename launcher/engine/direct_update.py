"""Update weights from their bf16 gradients, without the fp32 sums of DeepSpeed's BF16_Optimizer.

One data rank with one micro-batch per step has nothing to sum. DeepSpeed 0.19.8 still keeps an fp32 copy of
every gradient: 4 bytes per parameter during the whole step. It also writes each gradient to this copy,
rewrites it when it clips, and casts the new weights in a pass of its own. Here a weight is updated from the
bf16 gradient that autograd left; consecutive small weights are joined first. In compiled runs on a GPU one
kernel reads the gradient, updates the master weight and its states, and writes the bf16 weight.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from launcher.engine.state import make_states
from launcher.engine.stochastic import (
    UpdateFunction,
    adamw_arithmetic,
    sgd_arithmetic,
    warn_of_eager_update,
)
from launcher.engine.update_guard import clip_scale, norm_of_whole
from launcher.models.arithmetic import CAST_AT_ONCE, UPDATED_ALONE


@dataclass(frozen=True)
class UpdatePiece:
    """Consecutive weights of a parameter group that are updated together."""

    start: int  # in the group's flat weights
    numel: int
    weights: tuple[nn.Parameter, ...]


def pieces_of(weights: Sequence[nn.Parameter]) -> list[UpdatePiece]:
    """Return each large weight alone, and each run of smaller ones together."""
    parts: list[tuple[nn.Parameter, ...]] = []
    for is_large, neighbours in groupby(weights, lambda weight: weight.numel() >= UPDATED_ALONE):
        alike = tuple(neighbours)
        parts += [(weight,) for weight in alike] if is_large else [alike]
    pieces, start = [], 0
    for part in parts:
        pieces.append(UpdatePiece(start, sum(weight.numel() for weight in part), part))
        start += pieces[-1].numel
    return pieces


def install(engine: Any) -> None:
    """Replace the step of an engine's BF16_Optimizer, and free its fp32 sums."""
    zero = engine.deepspeed.optimizer
    for sums in (
        zero.fp32_groups_gradients, zero.fp32_groups_gradient_dict, zero.fp32_groups_gradients_flat,
        zero.fp32_groups_actual_gradients_flat, zero.fp32_groups_gradient_flat_partition,
        zero.fp32_groups_has_gradients, zero.non_expert_gradients,
        *getattr(zero, "expert_gradients", {}).values(),
    ):  # fmt: skip
        sums.clear()
    zero.accumulate_hp_grads_and_remove_lp = lambda *_: None  # the gradient stays at its weight
    zero.step = DirectUpdate(engine).step


class DirectUpdate:
    """The step of a BF16_Optimizer whose weights each have one gradient, or none."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._zero = engine, engine.deepspeed.optimizer
        self._pieces = [pieces_of(weights) for weights in self._zero.bf16_groups]
        self._compiled: bool = engine.layout.compiles_updates

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Judge the gradient norm, update all weights and free the gradients.

        Collective: the norm's all-reduce of a scalar over the model-parallel ranks. The host does not wait.
        """
        assert closure is None
        zero, guard, mesh = self._zero, self._engine.guard, self._engine.mesh
        gradients = [
            (weight, weight.grad)
            for weights in zero.bf16_groups
            for weight in weights
            if weight.grad is not None
        ]
        model_parallel = zero.mpu.get_model_parallel_group() if zero.mpu else None
        guard.judge(norm_of_whole(gradients, mesh, model_parallel, guard.device))
        zero.overflow, zero._global_grad_norm = False, guard.norm
        del gradients  # so that a gradient is freed once its weight is updated
        if isinstance(zero.optimizer, torch.optim.AdamW) and not zero.optimizer.state:
            make_states(self._engine, ["exp_avg", "exp_avg_sq"], updates=0)
        for index, group in enumerate(zero.optimizer.param_groups):
            self._update_group(group, index)

    def _update_group(self, group: dict[str, Any], index: int) -> None:
        master, weights = self._zero.fp32_groups_flat_partition[index], self._zero.bf16_groups_flat[index]
        guard, state = self._engine.guard, self._zero.optimizer.state[master]
        rule = _AdamW(group, state) if "betas" in group else _SGD(group, state)
        kept, scale = guard.skipped == 0, clip_scale(guard.norm, self._zero.clip_grad or torch.inf)
        arithmetic = rule.arithmetic(kept.device) if self._compiled else None
        held = [master.detach(), *(state[name] for name in rule.names)]
        for piece in self._pieces[index]:
            low = weights.narrow(0, piece.start, piece.numel)
            tensors = [tensor.narrow(0, piece.start, piece.numel) for tensor in held]
            gradient = _taken(piece)
            if not self._update_in_one_pass(arithmetic, low, tensors, gradient, kept, scale):
                for part, *chunk in zip(*(t.split(CAST_AT_ONCE) for t in (gradient, *tensors)), strict=True):
                    rule.update(chunk, part.float(), scale, guard.skipped)
                low.copy_(tensors[0])
        if "step" in state:
            state["step"] += kept

    def _update_in_one_pass(
        self, arithmetic: tuple[UpdateFunction, list[Tensor]] | None, *tensors: Any
    ) -> bool:
        """Update a piece with one kernel; return whether it could be compiled. A failure changes nothing."""
        from torch._dynamo import exc

        if self._compiled and arithmetic is not None:
            try:
                compiled_update()(*arithmetic, *tensors)
            except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:
                self._compiled = False
                warn_of_eager_update(error)
        return self._compiled


def _taken(piece: UpdatePiece) -> Tensor:
    """Return the gradients of a piece as one flat tensor, and remove them from the weights."""
    gradients = []
    for weight in piece.weights:
        # As in all other layouts, a weight without a gradient has zeros: it still decays.
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        gradients.append(gradient.reshape(-1))
        weight.grad = None
    return gradients[0] if len(gradients) == 1 else torch.cat(gradients)


class _AdamW:
    names = ("exp_avg", "exp_avg_sq")

    def __init__(self, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        self._group, self._updates = group, state["step"]

    def arithmetic(self, device: torch.device) -> tuple[UpdateFunction, list[Tensor]]:
        return adamw_arithmetic(self._group, self._updates, device)

    def update(self, tensors: list[Tensor], gradient: Tensor, scale: Tensor, skipped: Tensor) -> None:
        """Call torch's fused kernel on a weight and its moments. It divides the gradient by `scale`."""
        weight, mean, square = tensors
        (beta1, beta2), group = self._group["betas"], self._group
        adamw(
            [weight], [gradient], [mean], [square], [], [self._updates.clone()],
            fused=True, grad_scale=scale, found_inf=skipped, amsgrad=False, maximize=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip


class _SGD:
    def __init__(self, group: dict[str, Any], _state: dict[str, Tensor]) -> None:
        self._group = group
        self.names = ("momentum_buffer",) if group["momentum"] else ()

    def arithmetic(self, device: torch.device) -> tuple[UpdateFunction, list[Tensor]]:
        return sgd_arithmetic(self._group, device)

    def update(self, tensors: list[Tensor], gradient: Tensor, scale: Tensor, skipped: Tensor) -> None:
        """Call torch's fused kernel on a weight and its momentum. It divides the gradient by `scale`."""
        weight, *momentum = tensors
        group = self._group
        sgd(
            [weight], [gradient], [*momentum] or [None], fused=True, grad_scale=scale, found_inf=skipped,
            weight_decay=group["weight_decay"], momentum=group["momentum"], lr=group["lr"],
            dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip


def update_(
    arithmetic: UpdateFunction,
    numbers: list[Tensor],
    low: Tensor,
    tensors: list[Tensor],
    gradient: Tensor,
    kept: Tensor,
    scale: Tensor,
) -> None:
    """Update in place, if `kept`, a bf16 weight `low` and `tensors`: its master weight and states in fp32.

    As torch's fused kernels do, it divides the gradient by `scale`.
    """
    exact = arithmetic(gradient.float() / scale, *tensors, *numbers)
    for tensor, value in zip(tensors, exact, strict=True):
        tensor.copy_(torch.where(kept, value, tensor))
    low.copy_(tensors[0])


@cache
def compiled_update() -> Callable[..., None]:
    """Return update_, compiled to one pass over memory for pieces of any size."""
    return torch.compile(update_, fullgraph=True, dynamic=True)
