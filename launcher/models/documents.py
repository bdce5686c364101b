"""Where documents begin inside a packed sample, for attention and positions that stop there.

Nothing travels between pipeline stages for it: each stage is given the tokens of its micro-batch.
"""

import torch
from torch import Tensor


class Documents:
    """The boundaries in one rank's micro-batch in hand, which its layers ask for.

    `mask` (B, 1, T, T) says which positions (last) each one attends to, `positions` (B, T) counts from the
    document's beginning. Both None: a sample is one document, or of no interest.
    """

    def __init__(self, end_of_document: int | None) -> None:
        self.end_of_document = end_of_document  # the token that ends each, as its last; None: never
        self.mask: Tensor | None = None
        self.positions: Tensor | None = None

    def begin(self, tokens: Tensor) -> None:
        """Take up a micro-batch, tokens (B, T), before its forward pass."""
        if self.end_of_document is not None:
            ends = tokens == self.end_of_document
            self.mask, self.positions = attention_mask(ends), positions_in_documents(ends)


def attention_mask(ends: Tensor) -> Tensor:
    """`ends` (B, T), true at the last token of a document -> (B, 1, T, T): causal, and the same document."""
    documents = ends.cumsum(1) - ends.long()
    same = documents[:, :, None] == documents[:, None, :]
    return same.tril().unsqueeze(1)


def positions_in_documents(ends: Tensor) -> Tensor:
    """`ends` (B, T), true at the last token of a document -> (B, T), from 0 at its first."""
    places = torch.arange(ends.shape[1], device=ends.device).expand(ends.shape)
    begins = ends.roll(1, 1)
    begins[:, 0] = True
    starts = torch.where(begins, places, 0).cummax(1).values
    return places - starts
