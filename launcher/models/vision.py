"""The ends of an image classifier: patch embedding and pooling (Dosovitskiy et al., arXiv 2010.11929).

An image is cut into square patches. They are its tokens: T of them, counting the class token if there is one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.config.schema import ModelConfig, Pooling
from launcher.config.shape import has_class_token, vision_tokens
from launcher.models.block_context import BlockContext
from launcher.parallel.collectives import reduce_region
from launcher.parallel.initializer import normal, zeros
from launcher.parallel.layers import TensorParallel
from launcher.parallel.sharding import LogicalTensor


class PatchEmbedding(nn.Module):
    """Project patches: images (B, C, S, S) of bytes -> (B, T, H), or (B, T/tp, H) under sequence parallelism.

    Pixels are scaled to -1..1. Every rank holds the whole weight.
    """

    def __init__(self, name: str, model: ModelConfig, context: BlockContext) -> None:
        super().__init__()
        self.tp, self.model = context.tp, model
        pixels = model.image_channels * model.patch_size**2
        make, draw = self.tp.initializer.parameter, normal(model.init_std)
        self.weight = make(LogicalTensor(f"{name}.weight", (model.hidden_size, pixels)), draw)
        self.bias = make(LogicalTensor(f"{name}.bias", (model.hidden_size,)), zeros)
        token = LogicalTensor(f"{name}.class_token", (model.hidden_size,))
        self.class_token = make(token, draw) if has_class_token(model) else None

    def forward(self, images: Tensor) -> Tensor:
        size = self.model.patch_size
        patches = images.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5)
        x = patches.flatten(3).flatten(1, 2).to(self.weight.dtype) / 127.5 - 1.0
        if self.class_token is not None:
            x = F.pad(x, (0, 0, 1, 0))  # room for the class token, before the patches
        first = 0
        if self.tp.sequence_parallel:
            length = x.shape[1] // self.tp.axis.size
            first = self.tp.axis.rank * length
            x = x[:, first : first + length]
        y = F.linear(x, self.tp.replicated(self.weight), self.tp.replicated(self.bias))
        if self.class_token is None:
            return y
        # Every rank uses class_token, though one rank holds it: all join its gradient's all-reduce.
        place = torch.arange(first, first + y.shape[1], device=y.device) == 0
        return torch.where(place[:, None], self.tp.replicated(self.class_token), y)


class Pool(nn.Module):
    """Reduce a sequence to the class token or the mean: (B, T, H) or (B, T/tp, H) -> (B, 1, H).

    Under sequence parallelism this is an all-reduce, after which all tensor ranks hold the same.
    """

    def __init__(self, model: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.model, self.tp = model, tp

    def forward(self, x: Tensor) -> Tensor:
        is_mean = self.model.pooling is Pooling.mean
        pooled = x.sum(1, keepdim=True) / vision_tokens(self.model) if is_mean else x[:, :1]
        if not self.tp.sequence_parallel:
            return pooled
        if self.model.pooling is Pooling.class_token and self.tp.axis.rank > 0:
            pooled = pooled * 0.0
        return reduce_region(pooled, self.tp.axis)
