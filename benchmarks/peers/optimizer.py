"""AdamW and clipping, as the launcher configures them: vectors are not decayed, the fused update of torch."""

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from benchmarks.contest.job import AdamW, Job


def adamw(job: Job, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer; a fused update takes either DTensors or plain tensors, so they are apart."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault((parameter.dim() > 1, isinstance(parameter, DTensor)), []).append(parameter)
    settings: AdamW = job.adamw
    return torch.optim.AdamW(
        [
            {"params": group, "weight_decay": settings.weight_decay if is_matrix else 0.0}
            for (is_matrix, _), group in groups.items()
        ],
        lr=settings.lr, betas=settings.betas, eps=settings.epsilon, fused=True,
    )  # fmt: skip


def clip_sharded(gradients: Mapping[Tensor, bool], limit: float, group: dist.ProcessGroup | None) -> None:
    """Clip to the L2 norm over the ranks of the group. Collective: an all-reduce of one number.

    The values say whether a gradient counts on this rank: a shard on every rank, a replicated gradient on
    one rank only.
    """
    counted = [gradient for gradient, counts in gradients.items() if counts]
    square = torch.stack(torch._foreach_norm(counted)).square().sum()
    dist.all_reduce(square, group=group)
    torch._foreach_mul_(list(gradients), (limit / (square.sqrt() + 1e-6)).clamp(max=1.0))
