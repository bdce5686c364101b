"""Sort tokens by expert, and multiply the rows of each expert with its weights.

N tokens run through k experts each: N k rows, sorted by expert. E experts.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from launcher.parallel.mesh import Axis


@dataclass(frozen=True)
class Order:
    """The order of the rows: `rows[i]` is the place of sorted row i among the N k rows of all tokens."""

    rows: Tensor  # (N k,)
    places: Tensor  # (N k,), the inverse
    sizes: list[int]  # rows of each expert
    top_k: int


def sorted_by_expert(chosen: Tensor, count: int) -> Order:
    """Return the order of the rows of chosen experts (N, k)."""
    experts = chosen.flatten()
    rows = experts.argsort(stable=True)
    places = torch.empty_like(rows)
    places[rows] = torch.arange(len(rows), device=rows.device)
    return Order(rows, places, rows_of_each(experts, count), chosen.shape[-1])


def rows_of_each(experts: Tensor, count: int) -> list[int]:
    """Return the number of rows of each expert, on the host: on a GPU this waits for the router."""
    return torch.bincount(experts, minlength=count).tolist()


def spread(tokens: Tensor, order: Order) -> Tensor:
    """Return a row for each expert of each token, sorted by expert: (N, H) -> (N k, H)."""
    return _Spread.apply(tokens, order)  # type: ignore[no-any-return,no-untyped-call]


def collect(y: Tensor, weights: Tensor, order: Order) -> Tensor:
    """Return the weighted sum over the experts of each token: (N k, H), (N, k) -> (N, H)."""
    by_token = _Unsort.apply(y, order).unflatten(0, (-1, order.top_k))  # type: ignore[no-untyped-call]
    return torch.bmm(weights.to(y.dtype).unsqueeze(1), by_token).squeeze(1)


def unsorted(y: Tensor, order: Order) -> Tensor:
    """Return sorted rows in the order that they had before: (N k, H) -> the same."""
    return _Unsort.apply(y, order)  # type: ignore[no-any-return,no-untyped-call]


def grouped_linear(x: Tensor, weight: Tensor, order: Order) -> Tensor:
    """Return each sorted row times the weight of its expert: (N k, in), (E out, in) -> (N k, out).

    An expert without rows multiplies nothing, and its weight gets a gradient of zeros. Frozen weights (LoRA)
    get none, and the rows are not kept for one. In bf16 on GPUs from Hopper on, one kernel multiplies all
    experts (torch's grouped_mm); elsewhere there is a product for each.

    The weight itself is kept for the backward pass, not a view by expert: ZeRO-3 frees a gathered weight by
    `weight.data = torch.empty(0)`, and a view would keep the memory of every layer.
    """
    return _GroupedLinear.apply(x, weight, order.sizes)  # type: ignore[no-any-return,no-untyped-call]


class _Spread(torch.autograd.Function):
    """Copies each token to its places. Backward gathers and adds in a fixed order, unlike index_add."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(order.places)
        ctx.top_k = order.top_k
        return tokens[order.rows // order.top_k]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        [places] = ctx.saved_tensors
        return gradient[places].unflatten(0, (-1, ctx.top_k)).sum(1), None


class _Unsort(torch.autograd.Function):
    """Brings sorted rows back into the order of the tokens. Backward sorts the gradient's rows."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Order) -> Tensor:
        ctx.save_for_backward(order.rows)
        return y[order.places]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        [rows] = ctx.saved_tensors
        return gradient[rows], None


class _GroupedLinear(torch.autograd.Function):
    """A product for each expert, written into its stretch of one result, so that no copy joins them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.sizes, of_experts = sizes, _by_expert(weight, sizes)
        ctx.kernel = _kernel_for(x, of_experts)
        if ctx.kernel is not None:
            ends = _ends(sizes, x.device)
            return ctx.kernel(x, of_experts.transpose(1, 2), offs=ends)  # type: ignore[no-any-return]
        y = x.new_empty(len(x), of_experts.shape[1])
        for expert, rows in _stretches(sizes):
            torch.mm(x[rows], of_experts[expert].t(), out=y[rows])
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        gradient, of_experts = gradient.contiguous(), _by_expert(weight, ctx.sizes)
        # Chosen again: ZeRO-3 may have gathered the weight to an address that is aligned differently.
        if ctx.kernel is not None and (kernel := _kernel_for(gradient, of_experts)) is not None:
            of_x, of_weights = _kernel_gradients(kernel, ctx.sizes, x, of_experts, gradient)
        else:
            of_x, of_weights = _loop_gradients(ctx.sizes, x, of_experts, gradient)
        return of_x, None if of_weights is None else of_weights.view_as(weight), None


def _by_expert(weight: Tensor, sizes: list[int]) -> Tensor:
    """Return the view (E, out, in) of the weight (E out, in) of all experts."""
    return weight.view(len(sizes), -1, weight.shape[-1])


def _loop_gradients(
    sizes: list[int], x: Tensor | None, of_experts: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x and of the weights (E, out, in). Without `x` the weights are frozen."""
    of_x = gradient.new_empty(len(gradient), of_experts.shape[2])
    of_weights = None if x is None else torch.empty_like(of_experts)
    for expert, rows in _stretches(sizes):
        torch.mm(gradient[rows], of_experts[expert], out=of_x[rows])
        if of_weights is not None and x is not None:
            torch.mm(gradient[rows].t(), x[rows], out=of_weights[expert])  # zeros without rows
    return of_x, of_weights


GroupedKernel = Callable[..., Tensor]
# From this compute capability on torch has a kernel; below it, and on CPUs, torch runs a loop and waits for
# the sizes (torch 2.9 to 2.13, GroupedMMUtils.h).
_FIRST_CAPABILITY = 9, 0
_ALIGNMENT = 16  # bytes: of the start of a tensor and of each row


def _kernel_for(x: Tensor, weights: Tensor) -> GroupedKernel | None:
    """Return torch's grouped product if it has a kernel for these tensors; None: multiply in a loop."""
    is_low = x.dtype is weights.dtype is torch.bfloat16
    if not (x.is_cuda and is_low and len(x) and _capability(x.device) >= _FIRST_CAPABILITY):
        return None
    return grouped_kernel() if _is_aligned(x, weights) else None


def grouped_kernel() -> GroupedKernel:
    """Return torch's grouped product, which is private in torch 2.8 and 2.9."""
    return getattr(F, "grouped_mm", None) or torch._grouped_mm


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _is_aligned(x: Tensor, weights: Tensor) -> bool:
    """Whether tensors and rows start at multiples of 16 bytes; a fragment of a flat buffer may not."""
    rows = (length * x.element_size() for length in weights.shape[1:])
    return not any(number % _ALIGNMENT for number in (x.data_ptr(), weights.data_ptr(), *rows))


def _ends(sizes: list[int], device: torch.device) -> Tensor:
    """Return the end of the stretch of each expert, int32. The host does not wait for the GPU."""
    ends = torch.tensor(list(accumulate(sizes)), dtype=torch.int32)
    return ends.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ends


def _stretches(sizes: list[int]) -> Iterator[tuple[int, slice]]:
    """Yield each expert and its stretch of the sorted rows."""
    start = 0
    for expert, size in enumerate(sizes):
        yield expert, slice(start, start + size)
        start += size


def exchanged_rows(order: Order, count: int, axis: Axis, device: torch.device) -> "Exchange":
    """Return the exchange that sends the sorted rows of all ranks of the axis to the ranks of their experts.

    Each rank holds count / axis.size experts, in order. Collective over the axis: an all-to-all of the
    numbers of rows. A rank without rows takes part in all collectives.
    """
    sent = torch.tensor(order.sizes, dtype=torch.int64, device=device)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=axis.group)
    by_source = received.view(axis.size, -1)
    experts = torch.arange(by_source.shape[1], device=device).repeat(axis.size)
    experts = experts.repeat_interleave(received)
    received_sizes: list[int] = by_source.sum(1).tolist()
    sent_sizes: list[int] = sent.view(axis.size, -1).sum(1).tolist()
    return Exchange(axis, sent_sizes, received_sizes, sorted_by_expert(experts[:, None], count // axis.size))


@dataclass(frozen=True)
class Exchange:
    """Rows that this rank sends to each rank of the axis, and receives from it."""

    axis: Axis
    sent: list[int]
    received: list[int]
    order: Order  # order of the received rows by expert of this rank

    def dispatch(self, rows: Tensor) -> Tensor:
        """Return the rows of this rank's experts, by source: all-to-all forward, its reverse backward."""
        return _AllToAll.apply(rows, self.sent, self.received, self.axis)  # type: ignore[no-any-return,no-untyped-call]

    def combine(self, rows: Tensor) -> Tensor:
        """Return the rows of this rank's tokens by expert: all-to-all forward, its reverse backward."""
        return _AllToAll.apply(rows, self.received, self.sent, self.axis)  # type: ignore[no-any-return,no-untyped-call]


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
        ctx.sent, ctx.received, ctx.axis = sent, received, axis
        return _all_to_all(rows, sent, received, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradient, ctx.received, ctx.sent, ctx.axis), None, None, None


def _all_to_all(rows: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
    result = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=axis.group)
    return result


def _kernel_gradients(
    kernel: GroupedKernel, sizes: list[int], x: Tensor | None, of_experts: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return what _loop_gradients returns, by torch's grouped product."""
    ends = _ends(sizes, gradient.device)
    of_x = kernel(gradient, of_experts, offs=ends)
    if x is None:
        return of_x, None
    of_weights = kernel(gradient.t(), x, offs=ends)
    for expert in (expert for expert, size in enumerate(sizes) if not size):
        of_weights[expert].zero_()  # the kernel promises nothing for a sum of no rows
    return of_x, of_weights
