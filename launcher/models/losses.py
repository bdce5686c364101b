"""The losses: next-token prediction, and classification with a count of correct answers."""

from collections.abc import Callable

import torch
from torch import Tensor

from launcher.config.schema import ModelConfig
from launcher.parallel.layers import (
    IGNORED_LABEL,
    TensorParallel,
    mean_loss,
    vocab_parallel_cross_entropy,
    vocab_parallel_hits,
)

Loss = Callable[[Tensor, Tensor], Tensor]  # (model output, labels) -> scalar


def language_loss(model: ModelConfig, tp: TensorParallel) -> Loss:
    """Return the mean cross-entropy: (logits (B, T, V/tp), labels (B, T)) -> nats per token."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return mean_loss(vocab_parallel_cross_entropy(logits, labels, model.vocab_size, tp.axis), labels)

    return loss


class ClassificationLoss:
    """(logits (B, 1, classes/tp), labels (B, 1)) -> nats per image. Without gradients, counts hits too."""

    def __init__(self, model: ModelConfig, tp: TensorParallel) -> None:
        self._classes, self._axis = model.num_classes, tp.axis
        self.right, self.seen = 0, 0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            hits = vocab_parallel_hits(logits, labels, self._classes, self._axis)
            counted = labels != IGNORED_LABEL
            self.right, self.seen = self.right + int((hits & counted).sum()), self.seen + int(counted.sum())
        return mean_loss(vocab_parallel_cross_entropy(logits, labels, self._classes, self._axis), labels)
