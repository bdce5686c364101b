"""Scores, softmax and mixed values of attention: torch's fused kernel, or with a soft cap its steps."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from launcher.parallel.loss_kernels import soft_capped


class Kernel(NamedTuple):
    """Attention's settings. `scale` None is 1 / sqrt(head size); `device` is where the model runs."""

    is_causal: bool
    scale: float | None
    cap: float | None
    device: str


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, kernel: Kernel) -> Tensor:
    """Return the mixed values (B, T, N, D) of q (B, T, N, D), and k and v (B, T, K, D).

    `mask` is added to the scores and replaces the causal mask.
    """
    is_causal, scale, cap, device = kernel
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # CUDA's fused kernel with a mask takes no groups: the math kernel would keep all scores.
    if groups > 1 and (cap is not None or (mask is not None and device == "cuda")):
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    if cap is not None:
        mixed = _capped(q, k, v, mask, dropout, scale or q.shape[-1] ** -0.5, cap)
    else:
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal and mask is None, dropout_p=dropout,
            enable_gqa=k.shape[1] != q.shape[1], scale=scale,
        )  # fmt: skip
    return mixed.transpose(1, 2)


def _capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scale: float, cap: float
) -> Tensor:
    """Return (B, N, T, D) from scores with a soft cap, whose tanh and softmax (B, N, T, T) are kept."""
    scores = soft_capped(q @ k.transpose(2, 3) * scale, cap)
    weights = (scores if mask is None else scores + mask).softmax(-1, dtype=torch.float32).to(q.dtype)
    return (F.dropout(weights, dropout) if dropout else weights) @ v
