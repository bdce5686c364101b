"""The auxiliary losses of a router, and their way into its gradients.

Both are means over sequences or tokens of numbers that one sequence or one token decides. So the mean over
micro-batches and data ranks is the mean over the global batch, in every layout. Context ranks, which share
each sequence, add up the uses of its experts: then the mean over them too is that of the whole sequences. The
load-balancing loss over
a whole batch (Fedus et al., arXiv 2101.03961) is a product of two means and has no such form.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.parallel.mesh import ONE_RANK, Axis


def load_balancing_loss(shares: Tensor, chosen: Tensor, context: Axis = ONE_RANK) -> Tensor:
    """Return the balance loss of sequences of DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20).

    For each sequence the sum over experts of f P, where f is the share of the tokens that chose the expert
    times E / k, and P the mean share of the expert in a token's scores; then the mean over sequences. The
    loss is 1 if all experts are alike. `shares` is (B, T, E), `chosen` (B, T, k).

    With context ranks T are the tokens of this rank: f is that of whole sequences and P that of the part, so
    that the mean over the ranks is the loss. Collective over the context group: an all-reduce of (B, E).
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
    """Return x; its backward pass also starts that of `loss`, with a gradient of 1.

    So a loss of any pipeline stage gets its gradients without a way to the last stage.
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
