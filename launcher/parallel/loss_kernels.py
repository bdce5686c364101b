"""The passes of the loss over a chunk of logits, each compiled to one kernel (torch.compile).

Shapes: n tokens of a chunk, V vocabulary (padded), tp tensor-parallel size. A label that is in none of this
rank's columns has the column -1. `unpadded` counts the columns that are no padding; `cap` is the soft cap.
"""

import time

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from launcher.parallel import compiling
from launcher.parallel.compiling import Function, first_line


class LossKernels:
    """Calls the functions below, compiled.

    They contain no collective, so a rank that cannot compile does not concern the others. With `strict` the
    error is raised. `is_compiled` says whether all ranks compile them if they can, `is_on` whether this rank
    does. `seconds` counts the calls that compiled; `failure` is the compiler's error.
    """

    def __init__(self, *, is_compiled: bool, strict: bool = False) -> None:
        self.is_compiled, self._is_on, self.seconds = is_compiled, is_compiled, 0.0
        self.failure: str | None = None
        self._strict = strict
        self._compiled: dict[Function, Function] = {}

    @property
    def is_on(self) -> bool:
        # As in models/compiled.py: a dispatch mode sees no operation in a compiled function.
        return self._is_on and not is_in_torch_dispatch_mode()

    def __call__(self, function: Function, *arguments: object) -> Tensor | None:
        """Return function(*arguments); None if it cannot be compiled, and then nothing has changed."""
        from torch._dynamo import exc
        from torch._dynamo.utils import counters

        graphs, started = counters["stats"]["unique_graphs"], time.perf_counter()
        if function not in self._compiled:
            self._compiled[function] = compiling.compiled(function)
        try:
            return self._compiled[function](*arguments)
        except (exc.TorchDynamoException, exc.FailOnRecompileLimitHit) as error:
            if self._strict:
                raise
            self._is_on, self.failure = False, first_line(error)
            return None
        finally:
            if counters["stats"]["unique_graphs"] > graphs:
                self.seconds += time.perf_counter() - started


EAGER = LossKernels(is_compiled=False)


def statistics(logits: Tensor, column: Tensor, unpadded: int, cap: float | None) -> Tensor:
    """Return (3, n) in fp32 of the rows of logits (n, V/tp).

    The highest logit, sum(exp(logit - highest)), and label - highest: the label's logit, or column 0's if the
    label is elsewhere.
    """
    values = _real(logits, unpadded, cap)
    # In this form torch's compiler reads the logits once for both (prepare_softmax_online).
    highest = values.amax(1, keepdim=True)
    sums = (values - highest).exp().sum(1, keepdim=True)
    label = logits.gather(1, column.clamp(min=0).unsqueeze(1)).float()
    return torch.cat([highest, sums, (label if cap is None else soft_capped(label, cap)) - highest], 1).t()


def gradient_(
    logits: Tensor, column: Tensor, highest: Tensor, log_sum: Tensor, unpadded: int, cap: float | None
) -> Tensor:
    """Overwrite logits (n, V/tp) with softmax minus one-hot; highest and log_sum (n,) are over all ranks."""
    values = _real(logits, unpadded, cap) - highest.unsqueeze(1) - log_sum.unsqueeze(1)
    is_label = torch.arange(logits.shape[1], device=logits.device) == column.unsqueeze(1)
    slope = values.exp() - is_label.float()
    if cap is not None:
        slope = slope * slope_of_cap(logits.float(), cap)
    return logits.copy_(slope)


def _real(logits: Tensor, unpadded: int, cap: float | None) -> Tensor:
    """Return logits in fp32; those of padding are the lowest number, whose exponential is 0."""
    values = logits.float() if cap is None else soft_capped(logits.float(), cap)
    if unpadded == logits.shape[1]:
        return values
    is_padding = torch.arange(logits.shape[1], device=logits.device) >= unpadded
    return values.masked_fill(is_padding, torch.finfo(torch.float32).min)


def soft_capped(x: Tensor, cap: float) -> Tensor:
    """Return cap * tanh(x / cap) (Gemma 2, arXiv 2408.00118)."""
    return cap * torch.tanh(x / cap)


def slope_of_cap(x: Tensor, cap: float) -> Tensor:
    """Return the derivative of soft_capped at x."""
    return 1.0 - torch.tanh(x / cap).square()
