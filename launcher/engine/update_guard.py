"""One decision, the same on all ranks and in every layout, whether an optimizer may use a step's gradients.

The global gradient norm decides, before the optimizer sees a gradient. DeepSpeed's optimizers differ: under
ZeRO-0 a NaN reaches all weights, under ZeRO-1 to 3 the step is silently left out, and each computes another
norm of very large gradients (DeepSpeed 0.19.8). So all get the norm and the decision from here.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn

from launcher.parallel.all_reduce import all_reduce_
from launcher.parallel.mesh import Group, ProcessMesh
from launcher.parallel.sharding import logical_of

# The squares of larger gradients leave fp32's range, and AdamW keeps a mean of squares.
LARGEST_NORM = 1e18
_PART = 1 << 24  # elements of a low-precision gradient whose norm is computed at once
CLIP_EPSILON = 1e-6  # the same as in DeepSpeed and torch


class UpdateGuard:
    """Judges the gradient norm of each step. The values stay on the device until somebody reads them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.norm = torch.zeros((), device=device)  # of the last step, before clipping
        self.skipped = torch.zeros((), device=device)  # 1 if the last step changed no weight and no state
        self.limit = LARGEST_NORM  # a step whose norm is larger is skipped
        # Steps skipped so far, steps skipped in a row until now, steps since the last skipped step.
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)
        self._is_rehearsal = False

    def restart(self) -> None:
        """Count from zero, as at the start of a run."""
        self.counts = torch.zeros_like(self.counts)

    def judge(self, norm: Tensor) -> None:
        self.norm = norm
        if self._is_rehearsal:
            self.skipped = torch.ones_like(norm)
            return
        is_skipped = ~(norm <= self.limit)  # true for a NaN
        self.skipped = is_skipped.float()
        skipped = is_skipped.long()
        total, in_row, since = self.counts
        self.counts = torch.stack(
            [total + skipped, (in_row + skipped) * skipped, (since + 1) * (1 - skipped)]
        )

    def changes_loss_scale(self, *, overflow: bool) -> bool:
        """Return whether fp16's loss scale follows the last step: not if a finite norm is over the limit."""
        return not self._is_rehearsal and not (overflow and bool(self.norm.isfinite()))

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """A block in which steps change nothing and are not counted: a step is repeated to be examined."""
        norm, skipped, self._is_rehearsal = self.norm, self.skipped, True
        try:
            yield
        finally:
            self.norm, self.skipped, self._is_rehearsal = norm, skipped, False


def install(guard: UpdateGuard, zero: Any, mesh: ProcessMesh) -> None:
    """Let `guard` decide in one of DeepSpeed's ZeRO optimizers, whose own checks it replaces."""
    if isinstance(zero, BF16_Optimizer):
        zero.step = lambda closure=None: _bf16_step(guard, zero, mesh)
        return

    def scaled_norm(*_: Any) -> Tensor:
        """Return the norm as the gradients are scaled, infinity to skip. Collective: a scalar, world."""
        scaled = combined(norms(zero, mesh), dist.group.WORLD, guard.device)
        guard.judge(scaled / zero.loss_scale)
        # The one read of this step: DeepSpeed decides in Python. It does not read a tensor on the CPU again.
        return torch.full((), torch.inf) if guard.skipped else scaled.cpu()

    def update_scale(overflow: bool = False) -> None:
        if guard.changes_loss_scale(overflow=overflow):
            zero.loss_scaler.update_scale(overflow)

    zero.check_overflow = lambda *_, **__: None
    zero._update_scale = update_scale
    if zero.loss_scaler.dynamic:
        # At the lowest scale DeepSpeed would raise an exception. guard.nonfinite decides instead.
        zero.loss_scaler.raise_error_at_min_scale = False
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        zero._get_norm_groups = lambda: [scaled_norm()]
    else:
        zero.scaled_global_norm, zero.check_grad_overflow = scaled_norm, True


@torch.no_grad()
def _bf16_step(guard: UpdateGuard, zero: BF16_Optimizer, mesh: ProcessMesh) -> None:
    """Do what BF16_Optimizer.step does, but leave the decision to the device instead of waiting for it."""
    gradients = [
        (parameter, gradient)
        for group, of_group in zip(zero.bf16_groups, zero.fp32_groups_gradients, strict=True)
        for parameter, gradient in zip(group, of_group, strict=True)
    ]
    model_parallel = zero.mpu.get_model_parallel_group() if zero.mpu else None
    guard.judge(norm_of_whole(gradients, mesh, model_parallel, guard.device))
    zero.overflow, zero._global_grad_norm = False, guard.norm
    if zero.clip_grad:
        clip(zero.optimizer, guard.norm, zero.clip_grad)
    partitions = zero.fp32_groups_flat_partition, zero.fp32_groups_gradient_flat_partition
    for weights, gradient in zip(*partitions, strict=True):
        weights.grad = gradient.to(weights.dtype)
    zero.optimizer.found_inf = guard.skipped
    zero.optimizer.step()
    zero._lazy_init_hp_params_optimizer_state()
    zero.update_lp_params()
    zero.clear_hp_grads()


def norms(zero: Any, mesh: ProcessMesh) -> list[Tensor]:
    """Return the norms of this rank's partitions of the gradients, each counted by one rank only."""
    is_stage_3 = isinstance(zero, DeepSpeedZeroOptimizer_Stage3)
    groups = zero.fp16_groups if is_stage_3 else zero.params_in_partition
    if zero.offload_optimizer if is_stage_3 else zero.cpu_offload:
        offloaded = zero.norm_for_param_grads  # the gradients are in host memory already
        identities = (zero.get_param_id(p) for group in groups for p in group if is_counted(p, mesh))
        return [offloaded[identity] for identity in identities if identity in offloaded]
    # Not strict: a partition without parameters has a gradient of zeros.
    return norms_of(
        gradient
        for index, group in enumerate(groups)
        for parameter, gradient in zip(group, _without_padding(zero.averaged_gradients[index]), strict=False)
        if is_counted(parameter, mesh)
    )


def _without_padding(gradients: Iterable[Tensor]) -> list[Tensor]:
    return [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]


def norm_of_whole(
    gradients: Iterable[tuple[nn.Parameter, Tensor]],
    mesh: ProcessMesh,
    group: Group | None,
    device: torch.device,
) -> Tensor:
    """Return the L2 norm of gradients that each data rank holds whole, apart from distributed experts.

    Every expert counts once: expert ranks hold different experts, whose squares are added up. DeepSpeed
    averages the norms of experts over the data ranks instead (DeepSpeed 0.19.8, get_norm_with_moe_layers).
    Collective: one all-reduce of a scalar over `group`, and one over the expert group.
    """
    counted = [(weight, gradient) for weight, gradient in gradients if is_counted(weight, mesh)]
    of_experts = [gradient for weight, gradient in counted if logical_of(weight).is_part]
    others = norms_of(gradient for weight, gradient in counted if not logical_of(weight).is_part)
    if mesh.expert.size > 1:
        others.append(combined(norms_of(of_experts), mesh.expert.group, device))
    return combined(others, group, device)


def is_counted(parameter: nn.Parameter, mesh: ProcessMesh) -> bool:
    """Whether this rank counts its gradient of `parameter`, of which other ranks may hold copies."""
    is_first_copy = mesh.tensor.rank == 0 or logical_of(parameter).is_split
    return is_first_copy and not getattr(parameter, "ds_pipe_replicated", False)


def norms_of(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Return the L2 norms in fp32. On a CPU torch casts bf16 first: hence parts of such a gradient."""
    parts = [
        part
        for gradient in gradients
        for part in ([gradient] if gradient.dtype is torch.float32 else gradient.reshape(-1).split(_PART))
    ]
    return list(torch._foreach_norm(parts, dtype=torch.float32)) if parts else []


def combined(norms: list[Tensor], group: Group | None, device: torch.device) -> Tensor:
    """Return the L2 norm of all ranks' `norms`. Collective over the group: one all-reduce of a scalar."""
    # fp64: a norm over a whole model adds up more terms than fp32 can keep apart.
    squares = torch.zeros((), dtype=torch.float64, device=device)
    if norms:
        squares = torch.stack([norm.to(device) for norm in norms]).double().square().sum()
    if group is not None:
        all_reduce_(squares, group)
    return squares.sqrt().float()


def clip(optimizer: Any, norm: Tensor, limit: float) -> None:
    """Let torch's fused `optimizer` scale gradients with the global norm `norm` down to `limit`."""
    optimizer.grad_scale = clip_scale(norm, limit)


def clip_scale(norm: Tensor, limit: float) -> Tensor:
    """Return the number by which torch's fused optimizers divide gradients of the global norm `norm`."""
    return ((norm + CLIP_EPSILON) / limit).clamp(min=1.0)


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """Return the factor that scales gradients of the global norm `norm` down to `limit`."""
    return (limit / (norm + CLIP_EPSILON)).clamp(max=1.0)
