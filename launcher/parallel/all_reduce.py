"""All-reduces in place. Two ranks on a CPU send each other the whole tensor, in one round.

Gloo's own all-reduce takes several rounds: 1.5 to 5 times as long for tensors up to 1 MB
(`python -m benchmarks.exchange`). Both send as many bytes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

_COMBINES: dict[Any, Callable[..., Tensor]] = {
    dist.ReduceOp.SUM: torch.add,
    dist.ReduceOp.MAX: torch.maximum,
    dist.ReduceOp.MIN: torch.minimum,
}


class Handle(Protocol):
    """A collective that runs; `wait` ends it."""

    def wait(self) -> object: ...


def all_reduce_(
    x: Tensor,
    group: dist.ProcessGroup | None,
    operation: Any = dist.ReduceOp.SUM,
    *,
    asynchronous: bool = False,
) -> Handle | None:
    """All-reduce a contiguous tensor in place; return a handle if `asynchronous`."""
    if not sends_whole(x, group):
        handle: Handle | None = dist.all_reduce(x, op=operation, group=group, async_op=asynchronous)
        return handle
    received, rank = torch.empty_like(x), dist.get_rank(group)
    splits = [0 if other == rank else x.numel() for other in range(2)]
    flat = received.view(-1), x.view(-1)
    work = dist.all_to_all_single(*flat, splits, splits, group=group, async_op=True)
    combination = _Combination(work, _COMBINES[operation], x, received)
    if asynchronous:
        return combination
    combination.wait()
    return None


def sends_whole(x: Tensor, group: dist.ProcessGroup | None) -> bool:
    """Return whether each rank of the group sends x to the other rank, and combines both itself."""
    return x.device.type == "cpu" and dist.get_world_size(group) == 2


class _Combination(NamedTuple):
    """The exchange of two tensors, which `combine` then makes one, on both ranks alike."""

    work: Any
    combine: Callable[..., Tensor]
    own: Tensor
    received: Tensor

    def wait(self) -> None:
        self.work.wait()
        self.combine(self.own, self.received, out=self.own)
