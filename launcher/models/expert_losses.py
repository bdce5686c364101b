"""The auxiliary losses of a router, and their way into its gradients.

Both are means of numbers that depend on one sequence or on one token. So the mean over micro-batches and data
ranks is the mean over the global batch, in every layout. The context ranks of a sequence add up how many of
its tokens chose each expert; the mean over context ranks is then the loss of the whole sequence. The
load-balancing loss over a whole batch (Fedus et al., arXiv 2101.03961) is a product of two means and has no
such form.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.parallel.mesh import ONE_RANK, Axis


def load_balancing_loss(shares: Tensor, chosen: Tensor, context: Axis = ONE_RANK) -> Tensor:
    """Return the balance loss of sequences of DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20).

    It is the mean over sequences of the sum over experts of f P. f is E / k times the share of the sequence's
    tokens that chose the expert; P is the mean over tokens of the expert's share of the scores. The loss is 1
    if all experts are used alike. `shares` is (B, T, E), `chosen` (B, T, k).

    With context ranks T counts the tokens of this rank. f covers the whole sequence and P the part, so that
    the mean over the ranks is the loss. Collective over the context group: an all-reduce of (B, E).
    """
    experts, top_k = shares.shape[-1], chosen.shape[-1]
    uses = torch.zeros_like(shares[:, 0]).scatter_add_(-1, chosen.flatten(1), _ones(shares, chosen))
    if context.size > 1:
        dist.all_reduce(uses, group=context.group)
    tokens = chosen.shape[1] * context.size
    return (uses * (experts / (top_k * tokens)) * shares.mean(1)).sum(-1).mean()


def _ones(shares: Tensor, chosen: Tensor) -> Tensor:
    return shares.new_ones(()).expand(chosen.flatten(1).shape)


def z_loss(logits: Tensor) -> Tensor:
    """Return the mean over tokens of the squared logsumexp of logits (B, T, E) (arXiv 2202.08906, eq. 5)."""
    return logits.logsumexp(-1).square().mean()


def with_loss(x: Tensor, loss: Tensor) -> Tensor:
    """Return x; its backward pass also starts the backward pass of `loss`, with a gradient of 1.

    So the losses of a pipeline stage need no path to the loss on the last stage.
    """
    return _WithLoss.apply(x, loss)  # type: ignore[no-any-return,no-untyped-call]


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        [loss] = ctx.saved_tensors
        return gradient, torch.ones_like(loss)
