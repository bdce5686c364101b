"""torch.compile for functions of a rank, as blocks and loss use it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Tensor]


def compiled(function: Function) -> Function:
    """Return the compiled function: whole, for fixed shapes, forward and backward pass at once."""
    from torch._functorch import config

    # By default the backward pass is compiled when it first runs, too late to run eager. New in torch 2.9.
    if hasattr(config, "force_non_lazy_backward_lowering"):
        config.force_non_lazy_backward_lowering = True
    return torch.compile(function, fullgraph=True, dynamic=False)


def first_line(error: BaseException) -> str:
    """Return the first line of a compiler's error, with the type of the error behind it."""
    inner: Any = getattr(error, "inner_exception", error)
    lines = str(inner).strip().splitlines()
    return f"{type(inner).__name__}: {lines[0] if lines else ''}"
