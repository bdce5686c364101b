"""Average gradients over the data ranks, bucket by bucket, during the backward pass.

DeepSpeed 0.19.8 begins the reduction of ZeRO-0 and BF16_Optimizer after the last backward pass, in copies of
all gradients (runtime/engine.py, allreduce_gradients). Here a bucket of whole weights is reduced as soon as
the last micro-batch has made their gradients, as in PyTorch's DDP (Li et al., arXiv 2006.15704). fp32
gradients are reduced in place; fp32 sums of bf16 gradients are sent in bf16, in a copy of one bucket.
"""

from collections.abc import Callable, Sequence
from typing import Any

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
        if gradients[0].dtype != self._sent:
            self._end_running()  # frees its copy: no more than one bucket is copied at a time
        self._running.append(_Running(gradients, self._group, self._sent))

    @torch.no_grad()
    def _end_running(self) -> None:
        for running in self._running:
            running.end()
        self._running.clear()


class _Running:
    """The all-reduce of one bucket, from its creation until `end`."""

    def __init__(self, gradients: list[Tensor], group: dist.ProcessGroup, sent: torch.dtype) -> None:
        self._gradients = self._sent = gradients
        if gradients[0].dtype != sent:
            self._sent = [torch.empty_like(gradient, dtype=sent) for gradient in gradients]
            torch._foreach_copy_(self._sent, gradients)
        average = dist.ReduceOp.AVG
        self._work: Any
        if len(self._sent) == 1:  # gloo copies the tensors of a coalesced all-reduce twice
            self._work = dist.all_reduce(self._sent[0], op=average, group=group, async_op=True)
        else:
            self._work = dist.all_reduce_coalesced(self._sent, op=average, group=group, async_op=True)

    def end(self) -> None:
        """Wait for the averages. On a GPU the computing stream waits, not the host."""
        self._work.wait()
        if self._sent is not self._gradients:
            torch._foreach_copy_(self._gradients, self._sent)
