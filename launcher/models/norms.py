"""LayerNorm and RMSNorm over the hidden size, and RMSNorm of queries and keys."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.config.schema import ModelConfig, NormKind, QueryKeyNorm
from launcher.config.shape import head_size
from launcher.parallel.collectives import copy_region, reduce_region
from launcher.parallel.initializer import ones, zeros
from launcher.parallel.layers import TensorParallel
from launcher.parallel.sharding import LogicalTensor


class Norm(nn.Module):
    """Normalise the last dimension H: LayerNorm with weight and bias, or RMSNorm with weight only."""

    def __init__(self, name: str, model: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.tp, self.epsilon = tp, model.norm_epsilon
        make, shape = tp.initializer.parameter, (model.hidden_size,)
        self.weight = make(LogicalTensor(f"{name}.weight", shape), ones)
        has_bias = model.norm is NormKind.layer_norm
        self.bias = make(LogicalTensor(f"{name}.bias", shape), zeros) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        shape = (x.shape[-1],)
        if self.bias is None:
            return F.rms_norm(x, shape, self.tp.replicated(self.weight), self.epsilon)
        if not self.tp.sequence_parallel:
            return F.layer_norm(x, shape, self.weight, self.bias, self.epsilon)
        # One all-reduce for both gradients: of so few numbers each takes only latency.
        weight, bias = self.tp.replicated(torch.stack([self.weight, self.bias])).unbind()
        return F.layer_norm(x, shape, weight, bias, self.epsilon)


class HeadNorm(nn.Module):
    """RMSNorm of queries or keys (B, T, heads/tp, D): of each head, or of all `heads` of the model together.

    Of each head: all tensor ranks hold one weight (D,), which each applies to its own heads, so that its
    gradient is all-reduced. Of all heads: the weight (heads D,) is split like the heads, and the sums of
    squares (B, T, 1) are all-reduced over the tensor ranks, forward and backward.
    """

    def __init__(self, name: str, model: ModelConfig, heads: int, tp: TensorParallel) -> None:
        super().__init__()
        self.tp, self.epsilon = tp, model.norm_epsilon
        self.width = head_size(model)
        self.joins_heads = model.query_key_norm is QueryKeyNorm.projection
        logical = LogicalTensor(f"{name}.weight", (self.width,))
        if self.joins_heads:
            self.width *= heads
            logical = LogicalTensor(f"{name}.weight", (self.width,), 0, (self.width,))
        self.weight = tp.initializer.parameter(logical, ones)

    def forward(self, x: Tensor) -> Tensor:
        axis = self.tp.axis
        if not self.joins_heads:
            return F.rms_norm(x, (self.width,), copy_region(self.weight, axis), self.epsilon)
        flat = x.flatten(2)
        if axis.size == 1:
            return F.rms_norm(flat, (self.width,), self.weight, self.epsilon).view_as(x)
        squares = flat.float().square().sum(-1, keepdim=True)
        mean = copy_region(reduce_region(squares, axis), axis) / self.width
        normed = (flat * torch.rsqrt(mean + self.epsilon)).to(x.dtype) * self.weight
        return normed.view_as(x)
