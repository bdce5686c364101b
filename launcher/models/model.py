"""The layers and the loss of a run's model, of whichever family."""

from launcher.config.schema import Family, ModelConfig
from launcher.models.blocks import BlockContext
from launcher.models.language import FlatModel, Layer, Loss, language_layers, language_loss
from launcher.models.vision import ClassificationLoss, vision_layers


def model_layers(model: ModelConfig, context: BlockContext) -> list[Layer]:
    """In order, from the inputs to this tensor rank's logits."""
    return (vision_layers if model.family is Family.vit else language_layers)(model, context)


def model_loss(model: ModelConfig, context: BlockContext) -> Loss:
    """(logits, labels) -> mean cross-entropy, a scalar in nats."""
    if model.family is Family.vit:
        return ClassificationLoss(model, context.tp)
    return language_loss(model, context.tp)


def flat_model(model: ModelConfig, context: BlockContext) -> FlatModel:
    """All of it in one module."""
    return FlatModel(model_layers(model, context), model_loss(model, context), context.documents)
