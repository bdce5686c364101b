"""Cross-entropy of the output projection in chunks of tokens: logits of one chunk exist at a time.

Shapes: B batch, T sequence, H hidden, V vocabulary (padded), tp tensor-parallel size, n tokens of a chunk. A
tensor rank holds V/tp columns of the logits, which are never gathered.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from launcher.config.numbers import IGNORED_LABEL
from launcher.parallel.all_reduce import all_reduce_
from launcher.parallel.loss_kernels import EAGER, LossKernels, gradient_, statistics
from launcher.parallel.mesh import Axis
from launcher.parallel.vocabulary import chunk_sizes

# fp16 ends at 65504, which a sum over thousands of tokens may exceed. A power of two rounds nothing.
PRODUCT_SCALE = 2.0**-8


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, vocabulary: int, axis: Axis, device: str,
    cap: float | None = None, kernels: LossKernels = EAGER,
) -> Tensor:  # fmt: skip
    """Return the sum over all labels of the cross-entropy of X W^T + b in nats, a scalar in fp32.

    x (B, T, H), weight (V/tp, H), bias (V/tp,), labels (B, T); an IGNORED_LABEL adds 0. `vocabulary` is the
    unpadded size; padding gets probability zero. `cap` is the logits' soft cap. With compiled `kernels` the
    logits need no memory in fp32. The forward pass also makes the gradients of x, and of weight and bias if
    they are not frozen, while the logits of a chunk exist; the backward pass multiplies them by the gradient
    of the sum.
    Forward: two all-reduces per chunk over `axis`: the maxima, then sums and label logits. Backward: no
    collective; x's gradient is this rank's part of the sum over the tensor ranks.
    """
    arguments = labels, vocabulary, axis, device, cap, kernels, torch.is_grad_enabled()
    loss: Tensor = _LinearCrossEntropy.apply(x, weight, bias, *arguments)  # type: ignore[no-untyped-call]
    return loss


def linear_token_scores(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, vocabulary: int, axis: Axis, device: str,
    cap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the losses (B, T) of labels (B, T) in nats, in fp32, and the likeliest tokens (B, T).

    Arguments as for linear_cross_entropy; an IGNORED_LABEL has loss 0. Of equal logits the lowest token id
    counts. Collective over `axis`: four all-reduces per chunk. Has no backward pass.
    """
    tokens, all_labels = x.flatten(0, -2), labels.flatten()
    losses = torch.empty(len(tokens), dtype=torch.float32, device=x.device)
    likeliest = torch.empty_like(all_labels)
    start = 0
    for size in chunk_sizes(len(tokens), len(weight), device):
        rows = slice(start, start + size)
        logits = x.new_empty(size, len(weight))
        _project(tokens[rows], weight, bias, logits)
        if cap is not None:
            soft_cap_(logits, cap)
        _mask_padding(logits, vocabulary, axis)
        likeliest[rows] = _highest_columns(logits, axis)
        scores = torch.empty_like(logits, dtype=torch.float32)
        losses[rows] = cross_entropy_(
            logits, scores, all_labels[rows], vocabulary, axis, with_gradients=False
        )
        start += size
    return losses.view_as(labels), likeliest.view_as(labels)


def _highest_columns(logits: Tensor, axis: Axis) -> Tensor:
    """Return the column (n,) of the highest of all ranks' logits (n, V/tp), the first of equal ones."""
    values, columns = logits.max(1)
    if axis.size == 1:
        return columns
    highest = _reduced(values.float(), dist.ReduceOp.MAX, axis)
    columns = (columns + axis.rank * logits.shape[1]).masked_fill(values.float() < highest, 2**62)
    return _reduced(columns, dist.ReduceOp.MIN, axis)


def soft_cap_(x: Tensor, cap: float) -> Tensor:
    """Replace x by cap * tanh(x / cap), and return the derivative."""
    tanh = x.div_(cap).tanh_().clone()
    x.mul_(cap)
    return tanh.square_().neg_().add_(1.0)


def mean_loss(total: Tensor, labels: Tensor, counted: float | None = None) -> Tensor:
    """Return the sum `total` of losses divided by `counted` labels; None: by all labels, none is ignored.

    `counted` is a number of the host: counting on the device would be one more pass for each micro-batch.
    """
    return total / (labels.numel() if counted is None else counted)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, vocabulary: int, axis: Axis,
        device: str, cap: float | None, kernels: LossKernels, with_gradients: bool,
    ) -> Tensor:  # fmt: skip
        tokens, all_labels = x.flatten(0, -2), labels.flatten()
        # Not by kernels.is_on: each chunk has collectives, so a rank that cannot compile must have the same.
        sizes = chunk_sizes(len(tokens), len(weight), device, fused=kernels.is_compiled)
        # All chunks use the same memory: on CPU a new allocation of this size costs its page faults.
        logits = x.new_empty(sizes[0], len(weight))
        scores: Tensor | None = None
        gradients = _Gradients(tokens, weight, bias, device) if with_gradients else None
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        start = 0
        for size in sizes:
            rows = slice(start, start + size)
            chunk = logits[:size]
            _project(tokens[rows], weight, bias, chunk)
            some_labels = all_labels[rows]
            arguments = chunk, some_labels, vocabulary, axis, cap
            losses = None
            if kernels.is_on:
                losses = fused_cross_entropy_(*arguments, kernels, with_gradients=with_gradients)
            if losses is None:
                scores = torch.empty_like(logits, dtype=torch.float32) if scores is None else scores
                losses = capped_cross_entropy_(*arguments, scores[:size], with_gradients=with_gradients)
            total += losses.sum()
            if gradients is not None:
                gradients.add(rows, tokens[rows], weight, chunk, some_labels != IGNORED_LABEL)
            start += size
        ctx.gradients, ctx.shape = gradients, x.shape
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the gradients of the head are given out once"
        gradients, ctx.gradients = ctx.gradients, None
        x, weight, bias = gradients.scaled(grad)
        return x.view(ctx.shape), weight, bias, None, None, None, None, None, None, None


def _project(x: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=logits)
    else:
        torch.addmm(bias, x, weight.t(), out=logits)


def capped_cross_entropy_(
    logits: Tensor, labels: Tensor, vocabulary: int, axis: Axis, cap: float | None, scores: Tensor,
    *, with_gradients: bool,
) -> Tensor:  # fmt: skip
    """Do what cross_entropy_ does, to logits with a soft cap."""
    slope = None if cap is None else soft_cap_(logits, cap)
    losses = cross_entropy_(logits, scores, labels, vocabulary, axis, with_gradients=with_gradients)
    if slope is not None and with_gradients:
        logits.mul_(slope)
    return losses


def cross_entropy_(
    logits: Tensor, scores: Tensor, labels: Tensor, vocabulary: int, axis: Axis, *, with_gradients: bool
) -> Tensor:
    """Return the losses (n,) in fp32 of logits (n, V/tp) and labels (n,); 0 for an IGNORED_LABEL.

    Overwrites `logits`, with their gradient (softmax minus one-hot) if asked; rows of ignored labels are not
    zero. `scores` is fp32 memory of the same shape.
    """
    _mask_padding(logits, vocabulary, axis)
    elsewhere, index = _local_labels(logits, labels, axis)
    if logits.dtype is torch.float32:
        torch.log_softmax(logits, -1, out=scores)
    else:
        # Over the input: log_softmax with `dtype` would allocate a third tensor of this size. The kernels
        # write an element only after they have read it (torch 2.13, CPU and CUDA).
        torch.log_softmax(scores.copy_(logits), -1, out=scores)
    picked = scores.gather(1, index).squeeze(1)
    if axis.size == 1:
        losses = -picked
    else:
        # The scores are normalised over this rank's columns only. The logarithm of the sum that they were
        # divided by is recovered at the largest logit, where rounding is smallest.
        local = logits.amax(1).float() - scores.amax(1)
        highest = _reduced(local.clone(), dist.ReduceOp.MAX, axis)
        label_logits = (picked + local - highest).masked_fill(elsewhere, 0.0)
        sums = _reduced(torch.stack([(local - highest).exp(), label_logits]), dist.ReduceOp.SUM, axis)
        log_sum = sums[0].log()
        losses, shift = log_sum - sums[1], local - highest - log_sum
        scores += shift.unsqueeze(1)
        picked += shift
    if with_gradients:
        torch.exp(scores, out=logits)
        # Where the probability is close to 1, expm1 keeps the digits that a subtraction of 1 would lose.
        at_label = torch.where(elsewhere, picked.exp(), picked.expm1())
        logits.scatter_(1, index, at_label.to(logits.dtype).unsqueeze(1))
    return losses.masked_fill(labels == IGNORED_LABEL, 0.0)


def fused_cross_entropy_(
    logits: Tensor, labels: Tensor, vocabulary: int, axis: Axis, cap: float | None, kernels: LossKernels,
    *, with_gradients: bool,
) -> Tensor | None:  # fmt: skip
    """Do what capped_cross_entropy_ does, with the same all-reduces, in two compiled passes over the logits.

    Return None if the first cannot be compiled. Other tensor ranks may do so all the same.
    """
    elsewhere, index = _local_labels(logits, labels, axis)
    column, unpadded = index.squeeze(1).masked_fill(elsewhere, -1), _unpadded(logits, vocabulary, axis)
    if (statistics_of_rows := kernels(statistics, logits, column, unpadded, cap)) is None:
        return None
    highest, sums, label = statistics_of_rows
    if axis.size > 1:
        local, highest = highest, _reduced(highest.clone(), dist.ReduceOp.MAX, axis)
        shift = local - highest
        shares = torch.stack([sums * shift.exp(), (label + shift).masked_fill(elsewhere, 0.0)])
        sums, label = _reduced(shares, dist.ReduceOp.SUM, axis)
    log_sum = sums.log()
    arguments = logits, column, highest, log_sum, unpadded, cap
    if with_gradients and kernels(gradient_, *arguments) is None:
        gradient_(*arguments)
    losses: Tensor = (log_sum - label).masked_fill(labels == IGNORED_LABEL, 0.0)
    return losses


class _Gradients:
    """Gradients of the sum of the losses, not yet multiplied by the gradient of this sum.

    Nothing is divided by the number of tokens yet: in fp16 most probabilities would become zero. Neither x
    nor the weight is kept.
    """

    def __init__(self, tokens: Tensor, weight: Tensor, bias: Tensor | None, device: str) -> None:
        self._device = device
        self._x = torch.empty_like(tokens)
        self._weight_gradient = _sums_for(weight)
        self._bias_gradient = _sums_for(bias)

    def add(self, rows: slice, x: Tensor, weight: Tensor, gradient: Tensor, counted: Tensor) -> None:
        """Add a chunk x (n, H) with the gradient (n, V/tp) of its logits; only `counted` tokens count."""
        counts, outputs = counted.to(gradient.dtype).unsqueeze(1), gradient.t()
        torch.mm(gradient, weight, out=self._x[rows])
        self._x[rows].mul_(counts)
        if self._weight_gradient is not None:
            self._add_to_weight(self._weight_gradient, x, counts, outputs, is_first=rows.start == 0)
        if self._bias_gradient is not None:
            self._bias_gradient += (outputs @ counts).squeeze(1)

    def _add_to_weight(
        self, total: Tensor, x: Tensor, counts: Tensor, outputs: Tensor, *, is_first: bool
    ) -> None:
        if x.dtype is torch.float32:
            # With beta 0 the first chunk overwrites the zeros without reading them.
            torch.addmm(total, outputs, x * counts, beta=int(not is_first), out=total)
        elif self._device == "cuda":
            # CUDA adds bf16 and fp16 products to a sum in fp32; on a CPU torch has no such product.
            add = torch.ops.aten.addmm.dtype_out
            add(total, outputs, x * counts, out_dtype=torch.float32, beta=int(not is_first), out=total)
        else:
            total.add_(outputs @ (x * (counts * PRODUCT_SCALE)), alpha=1 / PRODUCT_SCALE)

    def scaled(self, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the gradients of x, weight and bias, multiplied by the scalar `grad`."""
        dtype = self._x.dtype
        weight = _scaled(self._weight_gradient, grad, dtype)
        return self._x * grad, weight, _scaled(self._bias_gradient, grad, dtype)


def _sums_for(weight: Tensor | None) -> Tensor | None:
    """Return zeros in fp32 for the gradient of a weight; None if there is no weight, or it is frozen."""
    if weight is None or not weight.requires_grad:
        return None
    return torch.zeros_like(weight, dtype=torch.float32)


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return gradient * factor in `dtype`; in fp32 in place, because the gradient has no other user."""
    if gradient is None:
        return None
    out = gradient if dtype is torch.float32 else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor, out=out)


def vocab_parallel_hits(logits: Tensor, labels: Tensor, vocabulary: int, axis: Axis) -> Tensor:
    """Return whether labels have the highest logit, ties included: two all-reduces of (B, T) over `axis`.

    logits (B, T, V/tp), labels (B, T) -> (B, T).
    """
    scores = logits.float().flatten(0, 1)
    _mask_padding(scores, vocabulary, axis)
    highest = _reduced(scores.amax(1), dist.ReduceOp.MAX, axis)
    elsewhere, index = _local_labels(scores, labels.flatten(), axis)
    label_logits = scores.gather(1, index).squeeze(1).masked_fill(elsewhere, 0.0)
    return (_reduced(label_logits, dist.ReduceOp.SUM, axis) >= highest).view_as(labels)


def _mask_padding(logits: Tensor, vocabulary: int, axis: Axis) -> None:
    """Set the logits of padding, at the end of (n, V/tp), to the lowest number, whose exponential is 0."""
    unpadded = _unpadded(logits, vocabulary, axis)
    if unpadded < logits.shape[1]:
        logits[:, unpadded:] = torch.finfo(logits.dtype).min


def _unpadded(logits: Tensor, vocabulary: int, axis: Axis) -> int:
    """Return how many of this rank's columns are no padding."""
    columns = logits.shape[1]
    return min(max(vocabulary - axis.rank * columns, 0), columns)


def _local_labels(logits: Tensor, labels: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Return a mask (n,) of labels in no column of this rank, and each label's column (n, 1), else 0."""
    local = logits.shape[1]
    first = axis.rank * local
    elsewhere = (labels < first) | (labels >= first + local)
    return elsewhere, (labels - first).masked_fill(elsewhere, 0).unsqueeze(1)


def _reduced(x: Tensor, operation: Any, axis: Axis) -> Tensor:
    if axis.size > 1:
        all_reduce_(x, axis.group, operation)
    return x
