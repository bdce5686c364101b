"""A model as one ordered list of layers, made of the parts its config names.

The flat module and DeepSpeed's pipeline run the same list.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from launcher.config.schema import InputKind, ModelConfig, PositionKind
from launcher.config.shape import output_size
from launcher.models.block_context import BlockContext
from launcher.models.blocks import TransformerBlock
from launcher.models.documents import Documents
from launcher.models.losses import ClassificationLoss, LanguageLoss
from launcher.models.norms import Norm
from launcher.models.positions import LearnedPositions
from launcher.models.vision import PatchEmbedding, Pool
from launcher.parallel.layers import VocabParallelEmbedding, VocabParallelHead

TIED_EMBEDDING = "embedding"


@dataclass(frozen=True)
class Layer:
    """An entry of a model's list: `module(*arguments)` maps one tensor to one tensor.

    Layers with the same `tied` key share one weight. The output head is run by the loss, with the labels.
    """

    module: type[nn.Module]
    arguments: tuple[Any, ...]
    tied: str | None = None
    is_head: bool = False

    def build(self) -> nn.Module:
        return self.module(*self.arguments)


def model_layers(model: ModelConfig, context: BlockContext) -> list[Layer]:
    """Return the layers in order, from the inputs to the output head.

    Tokens (B, T) become hidden states (B, T, H), or (B, T/tp, H) under sequence parallelism, and images
    (B, C, S, S) become (B, 1, H). The head projects them to this tensor rank's logits.
    """
    layers = range(model.num_layers)
    blocks = [Layer(TransformerBlock, (f"blocks.{layer}", model, context, layer)) for layer in layers]
    final_norm = Layer(Norm, ("final_norm", model, context.tp))
    return [*_first_layers(model, context), *blocks, final_norm, *_last_layers(model, context)]


def _first_layers(model: ModelConfig, context: BlockContext) -> list[Layer]:
    """Return the layers before the first block: embedding or patches, then learned positions."""
    if model.inputs is InputKind.patches:
        layers = [Layer(PatchEmbedding, ("patches", model, context))]
    else:
        layers = [_embedding(model, context)]
    if model.positions is PositionKind.learned:
        layers.append(Layer(LearnedPositions, ("positions", model, context)))
    return layers


def _last_layers(model: ModelConfig, context: BlockContext) -> list[Layer]:
    """Return the layers after the final norm: the head, and before it the pooling of an image's patches."""
    if model.tie_embeddings:
        return [replace(_embedding(model, context), is_head=True)]
    # Pooled, there is no sequence to split.
    is_pooled = model.inputs is InputKind.patches
    tp = replace(context.tp, sequence_parallel=False) if is_pooled else context.tp
    sizes = (output_size(model), model.hidden_size)
    arguments = ("head", *sizes, tp, model.init_std, 1.0, model.logit_soft_cap, model.biases.head)
    head = Layer(VocabParallelHead, arguments, is_head=True)
    return [Layer(Pool, (model, context.tp)), head] if is_pooled else [head]


def _embedding(model: ModelConfig, context: BlockContext) -> Layer:
    sizes = (model.vocab_size, model.hidden_size)
    ends = (model.embedding_scale, model.logit_soft_cap)
    arguments = ("embedding", *sizes, context.tp, model.init_std, *ends)
    return Layer(VocabParallelEmbedding, arguments, TIED_EMBEDDING if model.tie_embeddings else None)


def model_loss(model: ModelConfig, context: BlockContext) -> LanguageLoss:
    """Return the loss: (the head's input, labels) -> mean cross-entropy, a scalar in nats."""
    return ClassificationLoss(model, context.tp) if model.inputs is InputKind.patches else LanguageLoss()


def flat_model(model: ModelConfig, context: BlockContext) -> "FlatModel":
    """Return the whole model in one module."""
    return FlatModel(model_layers(model, context), model_loss(model, context), context.documents)


class FlatModel(nn.Module):
    """All layers in one module, run in order, with the loss at the end."""

    def __init__(self, layers: Sequence[Layer], loss: LanguageLoss, documents: Documents) -> None:
        super().__init__()
        self.loss, self.documents = loss, documents
        self.layers = nn.ModuleList()
        self._calls: list[int] = []
        tied: dict[str, int] = {}
        for layer in layers:
            index = len(self.layers) if layer.tied is None else tied.setdefault(layer.tied, len(self.layers))
            if index == len(self.layers):
                self.layers.append(layer.build())
            if layer.is_head:
                loss.head = self.layers[index]
            else:
                self._calls.append(index)

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of inputs and their labels."""
        return self.loss(self.hidden(inputs), labels)

    def logits(self, inputs: Tensor) -> Tensor:
        """Return this tensor rank's logits: tokens (B, T) -> (B, T, V/tp), images -> (B, 1, classes/tp)."""
        return self.loss.head(self.hidden(inputs), project=True)  # type: ignore[no-any-return]

    def hidden(self, inputs: Tensor) -> Tensor:
        """Return the input of the head: tokens (B, T) -> (B, T, H) or (B, T/tp, H), images -> (B, 1, H)."""
        self.documents.begin(inputs)
        x = inputs
        for index in self._calls:
            x = self.layers[index](x)
        return x
