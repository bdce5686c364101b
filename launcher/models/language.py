"""GPT and Llama as an ordered list of layers, for the flat module and for DeepSpeed's pipeline alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from launcher.config.schema import Family, ModelConfig
from launcher.models.blocks import BlockContext, HiddenDropout, Norm, TransformerBlock
from launcher.models.documents import Documents
from launcher.parallel.layers import (
    TensorParallel,
    VocabParallelEmbedding,
    VocabParallelHead,
    mean_loss,
    vocab_parallel_cross_entropy,
)
from launcher.parallel.sharding import LogicalTensor, normal

TIED_EMBEDDING = "embedding"

Loss = Callable[[Tensor, Tensor], Tensor]  # (model output, labels) -> scalar


@dataclass(frozen=True)
class Layer:
    """One entry of a model's list: `module(*arguments)` maps one tensor to one tensor.

    Layers with the same `tied` key share one weight; the one with `project` uses it as the output head.
    """

    module: type[nn.Module]
    arguments: tuple[Any, ...]
    tied: str | None = None
    project: bool = False

    def build(self) -> nn.Module:
        return self.module(*self.arguments)


class LearnedPositions(nn.Module):
    """Adds a learned vector per position, then drops out: (B, T, H) or (B, T/tp, H) -> the same.

    A position is counted from the sample's beginning, or from the document's (models/documents.py).
    """

    def __init__(self, name: str, positions: int, model: ModelConfig, context: BlockContext) -> None:
        super().__init__()
        self.tp, self.documents = context.tp, context.documents
        shape = (positions, model.hidden_size)
        self.weight = self.tp.initializer.parameter(
            LogicalTensor(f"{name}.weight", shape), normal(model.init_std)
        )
        self.dropout = HiddenDropout(model.dropout, context)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        stretches, own = (self.tp.axis.size, self.tp.axis.rank) if self.tp.sequence_parallel else (1, 0)
        used = self.tp.replicated(self.weight[: stretches * length])
        if self.documents.positions is not None:
            used = F.embedding(self.documents.positions, used)
        return self.dropout(x + used[..., own * length : (own + 1) * length, :])  # type: ignore[no-any-return]


def language_layers(model: ModelConfig, context: BlockContext) -> list[Layer]:
    """Tokens (B, T) in, this tensor rank's logits (B, T, V/tp) out."""
    tp = context.tp
    tied = TIED_EMBEDDING if model.tie_embeddings else None
    vocabulary = (model.vocab_size, model.hidden_size, tp, model.init_std)
    positions = [Layer(LearnedPositions, ("positions", model.max_sequence_length, model, context))]
    return [
        Layer(VocabParallelEmbedding, ("embedding", *vocabulary), tied),
        *(positions if model.family is Family.gpt else []),
        *(Layer(TransformerBlock, (f"blocks.{index}", model, context)) for index in range(model.num_layers)),
        Layer(Norm, ("final_norm", model, tp)),
        Layer(VocabParallelEmbedding, ("embedding", *vocabulary), tied, project=True)
        if tied
        else Layer(VocabParallelHead, ("head", *vocabulary)),
    ]


def language_loss(model: ModelConfig, tp: TensorParallel) -> Loss:
    """(logits (B, T, V/tp), labels (B, T)) -> mean cross-entropy, a scalar in nats per token."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return mean_loss(vocab_parallel_cross_entropy(logits, labels, model.vocab_size, tp.axis), labels)

    return loss


class FlatModel(nn.Module):
    """The layers one after the other in one module, with the loss at the end."""

    def __init__(self, layers: Sequence[Layer], loss: Loss, documents: Documents) -> None:
        super().__init__()
        self.loss, self.documents = loss, documents
        self.layers = nn.ModuleList()
        self._calls: list[tuple[int, bool]] = []
        tied: dict[str, int] = {}
        for layer in layers:
            if layer.tied is None or layer.tied not in tied:
                self.layers.append(layer.build())
                index = len(self.layers) - 1
                if layer.tied is not None:
                    tied[layer.tied] = index
            else:
                index = tied[layer.tied]
            self._calls.append((index, layer.project))

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Inputs and their labels, as the layers and the loss take them -> the loss."""
        return self.loss(self.logits(inputs), labels)

    def logits(self, inputs: Tensor) -> Tensor:
        """Tokens (B, T) -> this tensor rank's logits (B, T, V/tp); of images, see models/vision.py."""
        self.documents.begin(inputs)
        x = inputs
        for index, project in self._calls:
            x = self.layers[index](x, project=True) if project else self.layers[index](x)
        return x
