"""Losses and likeliest tokens of micro-batches, position by position."""

from collections.abc import Sequence

from torch import Tensor

from launcher.engine.base import Engine
from launcher.models.losses import LanguageLoss

TokenScores = tuple[Tensor, Tensor]  # losses in nats, and likeliest next tokens, both (B, T)


def token_scores(engine: Engine, batches: Sequence[tuple[object, object]]) -> list[TokenScores]:
    """Return the scores of each of this data rank's micro-batches, pairs of tokens and labels. Collective.

    Ranks of a pipeline stage that computes no loss return none. A label that is ignored has loss 0.
    """
    scores: list[TokenScores] = []
    loss = getattr(engine.module, engine.loss_name)
    assert isinstance(loss, LanguageLoss)

    def kept(x: Tensor, labels: Tensor) -> Tensor:
        losses, likeliest = loss.head(x, labels=labels, per_token=True)
        scores.append((losses, likeliest))
        total: Tensor = losses.sum()
        return total

    setattr(engine.module, engine.loss_name, kept)
    try:
        engine.begin_shape()
        engine.eval_batch(batches, labels=1)  # the mean is not used
    finally:
        setattr(engine.module, engine.loss_name, loss)
    return scores
