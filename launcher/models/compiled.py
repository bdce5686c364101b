"""Run the bodies of all transformer blocks of a rank through one compiled function (torch.compile)."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from launcher.parallel import compiling
from launcher.parallel.compiling import first_line
from launcher.parallel.loss_kernels import LossKernels
from launcher.parallel.mesh import Axis

Body = Callable[..., Tensor]  # body(block, *inputs)
Call = Callable[..., Tensor]  # call(body, block, *inputs) runs the body, and may recompute it


class BlockRunner:
    """Runs the body of every block: compiled once for all blocks of a rank, or eager.

    A body is compiled whole, without a graph break, for fixed shapes: once for training, once for validation.
    Blocks with experts share a body that ends before the experts.
    If the compiler fails on a rank, all ranks of its tensor and context groups run the block again, eager,
    and stay eager:
    a compiled backward pass may call its collectives in another order. With `strict` the error is raised
    instead. `seconds` counts the calls that compiled, also those of the loss; `failure` is the compiler's
    error.
    """

    def __init__(
        self, tensor: Axis, context: Axis, loss: LossKernels, *, is_compiled: bool, strict: bool = False
    ) -> None:
        self._seconds, self._loss = 0.0, loss
        self.failure: str | None = None
        self._axes, self._is_on, self._strict = (tensor, context), is_compiled, strict
        self._compiled: dict[Body, Body] = {}

    @property
    def seconds(self) -> float:
        return self._seconds + self._loss.seconds

    @property
    def problem(self) -> str | None:
        """The failure of the compiler, and whether blocks or loss run eager after it; None without one."""
        if self.failure:
            return f"transformer blocks run eager: {self.failure}"
        return f"the loss runs eager: {self._loss.failure}" if self._loss.failure else None

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Context manager without compiled bodies, for hooks on the modules inside a block."""
        was_on, self._is_on = self._is_on, False
        try:
            yield
        finally:
            self._is_on = was_on

    def __call__(self, call: Call, body: Body, block: nn.Module, *inputs: Tensor | int | None) -> Tensor:
        """Return call(body, block, *inputs).

        Collective over the tensor and the context group in a call that compiles.
        """
        # A dispatch mode that looks at every operation (engine/allocations.py) sees none in a compiled body.
        if not self._is_on or is_in_torch_dispatch_mode():
            return call(body, block, *inputs)
        from torch._dynamo import exc
        from torch._dynamo.utils import counters

        if body not in self._compiled:
            self._compiled[body] = compiling.compiled(body)
        graphs, started, failure = counters["stats"]["unique_graphs"], time.perf_counter(), None
        try:
            output = call(self._compiled[body], block, *map(_as_tensor, inputs))
        except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:
            if self._strict:
                raise
            failure = first_line(error)
            output = call(body, block, *inputs)  # takes part in the collectives of ranks that could compile
        if failure is None and counters["stats"]["unique_graphs"] == graphs:
            return output
        self._agree(failure)
        self._seconds += time.perf_counter() - started
        return call(body, block, *inputs) if self.failure else output

    def _agree(self, failure: str | None) -> None:
        """Stop compiling if a rank could not compile. Collective over the tensor and the context group."""
        failed = torch.tensor(int(failure is not None))
        for axis in self._axes:
            if axis.size > 1:
                dist.all_reduce(failed, dist.ReduceOp.MAX, axis.group)
        if failed:
            self.failure, self._is_on = failure or "another rank could not compile", False


def _as_tensor(value: Tensor | int | None) -> Tensor | None:
    """Return an int as a tensor (): as an int it would be a constant, and each value be compiled again."""
    return torch.tensor(value) if isinstance(value, int) else value
