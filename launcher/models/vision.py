"""The Vision Transformer (Dosovitskiy et al., arXiv 2010.11929) as an ordered list of the shared blocks.

Images are cut into square patches, which are its tokens: T of them, with the class token if it has one.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.config.schema import ModelConfig, Pooling
from launcher.config.shape import vision_tokens
from launcher.models.blocks import BlockContext, Norm, TransformerBlock
from launcher.models.language import Layer, LearnedPositions
from launcher.parallel.collectives import reduce_region
from launcher.parallel.layers import (
    TensorParallel,
    VocabParallelHead,
    mean_loss,
    vocab_parallel_cross_entropy,
    vocab_parallel_hits,
)
from launcher.parallel.sharding import LogicalTensor, normal, zeros


class PatchEmbedding(nn.Module):
    """Images (B, C, S, S) of bytes -> (B, T, H), or this rank's (B, T/tp, H) under sequence parallelism.

    Pixels become -1 to 1, and a patch one projection of all of its own. The weights are whole on every rank.
    """

    def __init__(self, name: str, model: ModelConfig, context: BlockContext) -> None:
        super().__init__()
        self.tp, self.model = context.tp, model
        pixels = model.image_channels * model.patch_size**2
        make, draw = self.tp.initializer.parameter, normal(model.init_std)
        self.weight = make(LogicalTensor(f"{name}.weight", (model.hidden_size, pixels)), draw)
        self.bias = make(LogicalTensor(f"{name}.bias", (model.hidden_size,)), zeros)
        has_token = model.pooling is Pooling.class_token
        token = LogicalTensor(f"{name}.class_token", (model.hidden_size,))
        self.class_token = make(token, draw) if has_token else None

    def forward(self, images: Tensor) -> Tensor:
        size = self.model.patch_size
        patches = images.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5)
        x = patches.flatten(3).flatten(1, 2).to(self.weight.dtype) / 127.5 - 1.0
        if self.class_token is not None:
            x = F.pad(x, (0, 0, 1, 0))  # a place for it, before all patches
        first = 0
        if self.tp.sequence_parallel:
            length = x.shape[1] // self.tp.axis.size
            first = self.tp.axis.rank * length
            x = x[:, first : first + length]
        y = F.linear(x, self.tp.replicated(self.weight), self.tp.replicated(self.bias))
        if self.class_token is None:
            return y
        # On every rank, though one alone has the place: the gradient's all-reduce takes them all.
        place = torch.arange(first, first + y.shape[1], device=y.device) == 0
        return torch.where(place[:, None], self.tp.replicated(self.class_token), y)


class Pool(nn.Module):
    """What the head sees, the class token or the mean: (B, T, H) or (B, T/tp, H) -> (B, 1, H).

    Under sequence parallelism an all-reduce; all tensor ranks then hold the same.
    """

    def __init__(self, model: ModelConfig, tp: TensorParallel) -> None:
        super().__init__()
        self.model, self.tp = model, tp

    def forward(self, x: Tensor) -> Tensor:
        if self.model.pooling is Pooling.mean:
            own = x.sum(1, keepdim=True) / vision_tokens(self.model)
        else:
            own = x[:, :1]
        if not self.tp.sequence_parallel:
            return own
        if self.model.pooling is Pooling.class_token and self.tp.axis.rank > 0:
            own = own * 0.0
        return reduce_region(own, self.tp.axis)


def vision_layers(model: ModelConfig, context: BlockContext) -> list[Layer]:
    """Images (B, C, S, S) in, this tensor rank's logits (B, 1, classes/tp) out."""
    # Pooled, there is no sequence to split.
    head_tp = replace(context.tp, sequence_parallel=False)
    return [
        Layer(PatchEmbedding, ("patches", model, context)),
        Layer(LearnedPositions, ("positions", vision_tokens(model), model, context)),
        *(Layer(TransformerBlock, (f"blocks.{index}", model, context)) for index in range(model.num_layers)),
        Layer(Norm, ("final_norm", model, context.tp)),
        Layer(Pool, (model, context.tp)),
        Layer(
            VocabParallelHead, ("head", model.num_classes, model.hidden_size, head_tp, model.init_std, True)
        ),
    ]


class ClassificationLoss:
    """(logits (B, 1, classes/tp), labels (B, 1)) -> mean cross-entropy, a scalar in nats per image.

    Without gradients, that is in validation, it counts right answers too.
    """

    def __init__(self, model: ModelConfig, tp: TensorParallel) -> None:
        self._classes, self._axis = model.num_classes, tp.axis
        self.right, self.seen = 0, 0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            hits = vocab_parallel_hits(logits, labels, self._classes, self._axis)
            self.right, self.seen = self.right + int(hits.sum()), self.seen + hits.numel()
        return mean_loss(vocab_parallel_cross_entropy(logits, labels, self._classes, self._axis), labels)
