"""The arithmetic of the reference: exact, or with the roundings of a model whose tensors are bf16.

A layer reads tensors in bf16, computes in fp32 and writes its result in bf16, and so are its gradients.
`rounded` marks a tensor that a layer reads or writes, so that one process of fp32 arithmetic makes the same
roundings. The places of the roundings are those of torch's CPU kernels (2.11 and 2.13).

Several ways of computing are equally right: a sum may be made in parts, as tensor ranks do, and then each
part is rounded. `equivalent` lists such ways. The distance of their results is what rounding alone does to a
quantity; parity/tolerance.py derives the bounds from it.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from launcher.config.layout import Layout


def to_bf16(x: Tensor) -> Tensor:
    """Return fp32 numbers rounded to the nearest bf16 numbers."""
    return x.bfloat16().float()


@dataclass(frozen=True)
class Arithmetic:
    """How the reference computes: whether tensors are rounded to bf16, and in which order sums are made.

    `parts` is the number of parts of a product's sum, each of them rounded; with more than one, the gradients
    of micro-batches are added in reverse. With `fused` a bias is added
    before the product is rounded, in a row-parallel layer only with `fuses_rows`: several tensor ranks sum
    rounded products. With `gradients_in_bf16` the gradients of micro-batches are added in bf16.
    """

    is_rounded: bool = False
    parts: int = 1
    fused: bool = True
    fuses_rows: bool = True
    gradients_in_bf16: bool = False

    def rounded(self, x: Tensor) -> Tensor:
        """Return x as a layer reads or writes it; its gradient is rounded as well."""
        return _Rounded.apply(x, True, True) if self.is_rounded else x  # type: ignore[no-untyped-call]

    def value(self, x: Tensor) -> Tensor:
        """Return x rounded, with its gradient as it is."""
        return _Rounded.apply(x, True, False) if self.is_rounded else x  # type: ignore[no-untyped-call]

    def gradient(self, x: Tensor) -> Tensor:
        """Return x as it is, with its gradient rounded."""
        return _Rounded.apply(x, False, True) if self.is_rounded else x  # type: ignore[no-untyped-call]

    def scaled(self, x: Tensor, factor: float) -> Tensor:
        """Return x, whose gradient is rounded, multiplied by `factor`, and rounded again."""
        return _ScaledGradient.apply(x, factor) if self.is_rounded else x  # type: ignore[no-untyped-call]

    def product(self, x: Tensor, weight: Tensor, *, splits_inputs: bool = False) -> Tensor:
        """Return x W^T for a weight (outputs, inputs).

        In parts, either inputs or outputs are split: then the result, or the gradient of x, is a sum of
        rounded parts.
        """
        if not self.is_rounded:
            return x @ weight.T
        if splits_inputs:
            pairs = zip(x.tensor_split(self.parts, -1), weight.tensor_split(self.parts, 1), strict=True)
            partial = [self.rounded(self.rounded(columns) @ rows.T) for columns, rows in pairs]
            return self.rounded(torch.stack(partial).sum(0)) if self.parts > 1 else partial[0]
        pieces = [self.rounded(x) @ rows.T for rows in weight.tensor_split(self.parts)]
        return self.rounded(torch.cat(pieces, -1))

    def with_bias(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, splits_inputs: bool) -> Tensor:
        """Return x W^T + b."""
        if bias is None:
            return self.product(x, weight, splits_inputs=splits_inputs)
        if self.is_rounded and self.fused and (self.fuses_rows or not splits_inputs):
            return self.rounded(self.rounded(x) @ weight.T + bias)
        return self.rounded(self.product(x, weight, splits_inputs=splits_inputs) + bias)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        """Return the layer norm of the last dimension."""
        if self.is_rounded:
            y: Tensor = _LayerNorm.apply(self.rounded(x), weight, bias, epsilon, self.parts)  # type: ignore[no-untyped-call]
            return self.rounded(y)
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight + bias

    def mixed(self, scores: Tensor, values: Tensor) -> Tensor:
        """Return softmax(scores) @ values; scores (heads, T, T) may be -inf."""
        if not self.is_rounded:
            return scores.softmax(-1) @ values
        mixed: Tensor = _Mixed.apply(scores, values)  # type: ignore[no-untyped-call]
        return mixed

    def total(self, gradients: list[Tensor], ranks: int) -> Tensor:
        """Return the sum of all micro-batches' gradients: on each of `ranks` data ranks, then over the ranks.

        The ranks exchange bf16 numbers, so each of their sums is rounded.
        """
        ordered = gradients if self.parts == 1 else gradients[::-1]
        if not self.is_rounded or ranks == 1:
            return self._sum(ordered, in_bf16=self.gradients_in_bf16)
        of_ranks = [self._sum(ordered[rank::ranks], in_bf16=self.gradients_in_bf16) for rank in range(ranks)]
        return self._sum([to_bf16(gradient) for gradient in of_ranks], in_bf16=True)

    @staticmethod
    def _sum(gradients: list[Tensor], *, in_bf16: bool) -> Tensor:
        total, *others = gradients
        for gradient in others:
            total = to_bf16(total + gradient) if in_bf16 else total + gradient
        return total


EXACT = Arithmetic()
BF16 = Arithmetic(is_rounded=True)


def equivalent(arithmetic: Arithmetic, layout: Layout) -> list[Arithmetic]:
    """Return ways to compute that are as right as a rounded `arithmetic` in this layout.

    Compiled blocks, and kernels of GPUs, round fewer tensors: there, rounding none is right too.
    """
    parts = max(2, layout.tensor)
    ways = [replace(arithmetic, parts=number, fused=False) for number in (parts, parts + 1)]
    return [*ways, EXACT] if layout.compiled or layout.device == "cuda" else ways


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: bool, gradient: bool) -> Tensor:
        ctx.gradient = gradient
        return to_bf16(x) if value else x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return to_bf16(grad) if ctx.gradient else grad, None, None


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return to_bf16(to_bf16(grad) * ctx.factor), None


class _LayerNorm(torch.autograd.Function):
    """Keeps mean and deviation in bf16, and adds the gradients of weight and bias row by row in bf16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float, parts: int) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        scale = (x.var(-1, correction=0, keepdim=True) + epsilon).rsqrt()
        ctx.save_for_backward(x, weight, to_bf16(mean), to_bf16(scale))
        ctx.parts = parts
        return (x - mean) * scale * weight + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        normed = (x - mean) * scale
        weighted = grad * weight
        inner = weighted - weighted.mean(-1, keepdim=True)
        of_x = scale * (inner - normed * (weighted * normed).mean(-1, keepdim=True))
        of_weight, of_bias = (_row_sums(rows, ctx.parts) for rows in (grad * normed, grad))
        return of_x, of_weight, of_bias, None, None


class _Mixed(torch.autograd.Function):
    """Flash attention's roundings: of exponentials before they are divided by their sum, and of P and dS."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, values: Tensor) -> Tensor:
        exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
        total = exponentials.sum(-1, keepdim=True)
        mixed = to_bf16(to_bf16(exponentials) @ values / total)
        ctx.save_for_backward(exponentials / total, values, mixed)
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        weights, values, mixed = ctx.saved_tensors
        grad = to_bf16(grad)
        of_scores = weights * (grad @ values.transpose(-2, -1) - (grad * mixed).sum(-1, keepdim=True))
        return to_bf16(of_scores), to_bf16(weights).transpose(-2, -1) @ grad


def _row_sums(rows: Tensor, parts: int) -> Tensor:
    """Return the sum of all rows (..., H), added one by one in bf16, in parts."""
    totals = []
    for part in rows.flatten(0, -2).tensor_split(parts):
        total = torch.zeros(rows.shape[-1])
        for row in part:
            total = to_bf16(total + row)
        totals.append(total)
    return to_bf16(torch.stack(totals).sum(0))
