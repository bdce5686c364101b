"""Average gradients over the data ranks, bucket by bucket, during the backward pass.

DeepSpeed 0.19.8 begins the reduction of ZeRO-0 and BF16_Optimizer after the last backward pass, in copies of
all gradients (runtime/engine.py, allreduce_gradients). Here a bucket of whole weights is reduced as soon as
the last micro-batch has made their gradients, as in PyTorch's DDP (Li et al., arXiv 2006.15704). fp32
gradients are reduced in place; on a CPU those of a bucket are moved into one buffer before. fp32 sums of bf16
gradients are sent in bf16, in a copy of one bucket.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from launcher.parallel.buckets import buckets


class OverlappedReduction:
    """Reduces the gradients of the last micro-batch of each step. Creation registers hooks on the weights.

    `parameters` are trained and in the order of the modules. `is_last` tells whether a backward pass is the
    last of its step. `gradient_of` returns the sum of a weight's gradients. All ranks reduce the same buckets
    in the same order, whichever gradient arrives first.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        gradient_of: Callable[[nn.Parameter], Tensor],
        is_last: Callable[[], bool],
        *,
        group: dist.ProcessGroup,
        sent: torch.dtype,
        filled: int,
    ) -> None:
        sizes = [parameter.numel() for parameter in parameters]
        self._buckets = [[parameters[place] for place in bucket] for bucket in buckets(sizes, filled)]
        self._gradient_of, self._is_last, self._group, self._sent = gradient_of, is_last, group, sent
        self._bucket_of = {p: index for index, bucket in enumerate(self._buckets) for p in bucket}
        self._running: list[_Running] = []
        self._begin_step()
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    def finish(self) -> None:
        """Reduce the buckets that are left, and wait. Collective over the data group.

        These are the buckets with a weight that got no gradient: `gradient_of` must return zeros for it.
        """
        while self._begun < len(self._buckets):
            self._begin_bucket()
        self._end_running()
        self._begin_step()

    def _begin_step(self) -> None:
        self._missing = [len(bucket) for bucket in self._buckets]
        self._begun = 0

    def _arrived(self, parameter: nn.Parameter) -> None:
        """Count the gradient of a weight; begin the buckets that are complete, in their order."""
        if not self._is_last():
            return
        self._missing[self._bucket_of[parameter]] -= 1
        while self._begun < len(self._buckets) and not self._missing[self._begun]:
            self._begin_bucket()

    @torch.no_grad()
    def _begin_bucket(self) -> None:
        bucket = self._buckets[self._begun]
        self._begun += 1
        gradients = [self._gradient_of(parameter) for parameter in bucket]
        is_cast = gradients[0].dtype != self._sent
        if is_cast:
            self._end_running()  # frees its copy: no more than one bucket is copied at a time
        elif len(bucket) == 1 or gradients[0].device.type != "cpu":
            self._running.append(_Running(self._average(gradients)))
            return
        # Gloo would copy the tensors of a coalesced all-reduce into such a buffer, and back.
        buffer, parts = joined(gradients, self._sent)
        is_moved = not is_cast and gradients[0] is bucket[0].grad
        if is_moved:
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part
        copies = None if is_moved else (gradients, parts)
        self._running.append(_Running(self._average([buffer]), copies))

    def _average(self, tensors: list[Tensor]) -> Any:
        """Begin the all-reduce of some tensors together, and return its handle."""
        average = dist.ReduceOp.AVG
        if len(tensors) == 1:
            return dist.all_reduce(tensors[0], op=average, group=self._group, async_op=True)
        return dist.all_reduce_coalesced(tensors, op=average, group=self._group, async_op=True)

    @torch.no_grad()
    def _end_running(self) -> None:
        for running in self._running:
            running.end()
        self._running.clear()


class _Running(NamedTuple):
    """The all-reduce of one bucket, and the copies that its result needs: targets and sources."""

    work: Any
    copies: tuple[list[Tensor], list[Tensor]] | None = None

    def end(self) -> None:
        """Wait for the averages. On a GPU the computing stream waits, not the host."""
        self.work.wait()
        if self.copies is not None:
            torch._foreach_copy_(*self.copies)


def joined(tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Return a copy of all tensors in one buffer, and its parts in their shapes."""
    sizes = [tensor.numel() for tensor in tensors]
    buffer = torch.empty(sum(sizes), dtype=dtype, device=tensors[0].device)
    parts = [part.view_as(whole) for part, whole in zip(buffer.split(sizes), tensors, strict=True)]
    torch._foreach_copy_(parts, tensors)
    return buffer, parts
