"""Document boundaries inside packed samples, where attention and learned positions start again.

Pipeline stages exchange nothing for this: each stage gets the tokens of its micro-batch.
"""

from typing import Any

import torch
from torch import Tensor

from launcher.parallel.context import ContextParallel


class Documents:
    """The document boundaries of the current micro-batch on a rank, read by its layers.

    `ends` (B, T) marks the last tokens of documents; `positions` (B, T) counts from the start of a document.
    Both are None if attention does not stop at documents. `masks` are made from `ends` (models/masks.py).
    With context parallelism `ends` covers whole sequences, and `positions` (B, T/C) this rank's tokens.
    """

    def __init__(self, end_of_document: int | None, context: ContextParallel | None = None) -> None:
        self.end_of_document = end_of_document  # last token of a document; None: do not separate documents
        self.context = context
        self.ends: Tensor | None = None
        self.positions: Tensor | None = None
        self.masks: dict[Any, Tensor] = {}

    def begin(self, tokens: Tensor) -> None:
        """Set the boundaries of a micro-batch, tokens (B, T) or (B, T/C), before its forward pass.

        Collective over the context group: an all-gather of a byte per token.
        """
        if self.end_of_document is None:
            return
        self.ends, self.masks = tokens == self.end_of_document, {}
        if self.context is None:
            self.positions = positions_in_documents(self.ends)
            return
        self.ends = self.context.whole(self.ends.byte()).bool()
        places = self.context.positions(self.ends.shape[1], tokens.device)
        self.positions = positions_in_documents(self.ends)[:, places]


def attention_mask(ends: Tensor) -> Tensor:
    """Return the causal mask (B, 1, T, T) within documents; `ends` (B, T) marks their last tokens."""
    documents = ends.cumsum(1) - ends.long()
    same = documents[:, :, None] == documents[:, None, :]
    return same.tril().unsqueeze(1)


def positions_in_documents(ends: Tensor) -> Tensor:
    """Return positions (B, T) that start from 0 in every document, from `ends` (B, T) as above."""
    places = torch.arange(ends.shape[1], device=ends.device).expand(ends.shape)
    begins = ends.roll(1, 1)
    begins[:, 0] = True
    starts = torch.where(begins, places, 0).cummax(1).values
    return places - starts
