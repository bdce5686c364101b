"""Compiled blocks in tests: torch's own counters, and a backend that traces but does not call g++."""

import torch
import torch._dynamo.utils
import torch._inductor.compile_fx
from torch import Tensor

from launcher.parallel import compiling
from launcher.parallel.compiling import Function
from launcher.parallel.loss_kernels import LossKernels


def trace_only() -> None:
    """Compile by a backend that runs the traced forward and backward graphs operation by operation."""
    compiling.compiled = lambda body: torch.compile(body, backend="aot_eager", fullgraph=True, dynamic=False)


def forget_graphs() -> None:
    """Forget all graphs of this process, and count from zero."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    _of_loss.clear()
    LossKernels.__call__ = _counted  # type: ignore[method-assign]


def graphs_and_breaks() -> tuple[int, int]:
    """Return how many graphs torch has compiled beside the loss, and how many times it broke a graph."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"] - sum(_of_loss), sum(counters["graph_break"].values())


_call = LossKernels.__call__
_of_loss: list[int] = []  # graphs that calls of the loss compiled


def _counted(self: LossKernels, function: Function, *arguments: object) -> Tensor | None:
    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    result = _call(self, function, *arguments)
    _of_loss.append(counters["unique_graphs"] - before)
    return result
