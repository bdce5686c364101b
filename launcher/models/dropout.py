"""Dropout from explicit seeds, eager and inside a compiled graph, with the same masks.

A seed is an int, or inside a compiled graph a CPU tensor () of int64, since an int would be a constant of the
graph. There the masks are drawn by custom operators, which call the same functions of torch as eager code.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.models.attention_kernel import Kernel, attend
from launcher.parallel.random import seeded

Seed = int | Tensor


def dropout(x: Tensor, probability: float, seed: Seed) -> Tensor:
    """Return x with each element zero with `probability`, else divided by 1 - probability."""
    if torch.compiler.is_compiling():
        scales: Tensor = torch.ops.launcher.dropout_scales(x.detach(), probability, seed)
        return x * scales
    with seeded(int(seed), x.device):
        return F.dropout(x, probability)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    probability: float,
    seed: Seed | None,
    kernel: Kernel,
) -> Tensor:
    """Return attention over (B, T, heads, D), with dropout of the softmax if there is a seed: see `attend`.

    Inside a compiled graph attention with dropout keeps q, k and v, and runs again in the backward pass.
    """
    if seed is None:
        return attend(q, k, v, mask, 0.0, kernel)
    if torch.compiler.is_compiling():
        mixed: Tensor = torch.ops.launcher.dropped_attention(q, k, v, mask, probability, seed, *kernel)
        return mixed
    with seeded(int(seed), q.device):
        return attend(q, k, v, mask, probability, kernel)


@torch.library.custom_op("launcher::dropout_scales", mutates_args=())
def _dropout_scales(like: Tensor, probability: float, seed: Tensor) -> Tensor:
    """Return the factors of dropout, 0 or 1 / (1 - probability), in the shape and dtype of `like`."""
    with seeded(int(seed), like.device):
        return F.dropout(torch.ones_like(like), probability)


@_dropout_scales.register_fake
def _(like: Tensor, probability: float, seed: Tensor) -> Tensor:
    return torch.empty_like(like)


@torch.library.custom_op("launcher::dropped_attention", mutates_args=())
def _dropped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, probability: float, seed: Tensor,
    is_causal: bool, scale: float | None, cap: float | None, device: str,
) -> Tensor:  # fmt: skip
    with seeded(int(seed), q.device):
        kernel = Kernel(is_causal, scale, cap, device)
        return attend(q, k, v, mask, probability, kernel).contiguous()


@_dropped_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("launcher::dropped_attention_backward", mutates_args=())
def _dropped_attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, probability: float, seed: Tensor,
    is_causal: bool, scale: float | None, cap: float | None, device: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    # An operator runs with autograd's dispatch keys excluded; here autograd itself is wanted.
    autograd = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with autograd, torch.enable_grad(), seeded(int(seed), q.device):
        kernel = Kernel(is_causal, scale, cap, device)
        mixed = attend(inputs[0], inputs[1], inputs[2], mask, probability, kernel)
        of_q, of_k, of_v = torch.autograd.grad(mixed, inputs, gradient)
    return of_q.contiguous(), of_k.contiguous(), of_v.contiguous()


@_dropped_attention_backward.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    of_q, of_k, of_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return of_q, of_k, of_v


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, mask, ctx.probability, seed, *ctx.kernel = inputs
    ctx.save_for_backward(q, k, v, mask, seed)


def _attention_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, mask, seed = ctx.saved_tensors
    backward = torch.ops.launcher.dropped_attention_backward
    gradients = backward(gradient, q, k, v, mask, ctx.probability, seed, *ctx.kernel)
    return *gradients, *(None,) * (3 + len(ctx.kernel))


_dropped_attention.register_autograd(_attention_gradients, setup_context=_keep_inputs)
