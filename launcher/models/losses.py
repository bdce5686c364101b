"""The losses: next-token prediction, and classification with a count of correct answers."""

import torch
from torch import Tensor, nn

from launcher.config.numbers import IGNORED_LABEL
from launcher.config.schema import ModelConfig
from launcher.parallel.cross_entropy import mean_loss, vocab_parallel_hits
from launcher.parallel.layers import TensorParallel


class LanguageLoss:
    """(hidden (B, T, H) or (B, T/tp, H), labels (B, T)) -> cross-entropy of a micro-batch in nats per token.

    `head` projects to the vocabulary and computes the losses: the logits never exist as a whole. It is set
    by whoever builds the layers.
    The sum of the losses is divided by `labels_per_micro_batch`, not by the labels of this micro-batch: then
    the mean over all micro-batches and data ranks, which DeepSpeed takes, is the mean over all labels of the
    global batch. None: no label is ignored, and both are the same.
    """

    head: nn.Module
    labels_per_micro_batch: float | None = None

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        return mean_loss(self.head(x, labels=labels), labels, self.labels_per_micro_batch)


class ClassificationLoss(LanguageLoss):
    """(pooled (B, 1, H), labels (B, 1)) -> nats per image. Without gradients, counts hits too."""

    def __init__(self, model: ModelConfig, tp: TensorParallel) -> None:
        self._classes, self._axis = model.num_classes, tp.axis
        self.right, self.seen = 0, 0

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            hits = vocab_parallel_hits(self.head(x, project=True), labels, self._classes, self._axis)
            counted = labels != IGNORED_LABEL
            self.right, self.seen = self.right + int((hits & counted).sum()), self.seen + int(counted.sum())
        return super().__call__(x, labels)
