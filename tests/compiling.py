"""Compiled blocks in tests: torch's own counters, and a backend that traces but does not call g++."""

import torch
import torch._dynamo.utils
import torch._inductor.compile_fx

import launcher.models.compiled as compiled


def trace_only() -> None:
    """Compile by a backend that runs the traced forward and backward graphs operation by operation."""
    compiled.compiled = lambda body: torch.compile(body, backend="aot_eager", fullgraph=True, dynamic=False)


def forget_graphs() -> None:
    """Forget all graphs of this process, and count from zero."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs_and_breaks() -> tuple[int, int]:
    """Return how many graphs torch has compiled, and how many times it broke a graph."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
