"""Attention masks: causal, within documents, within a sliding window. Made once for all layers of a rank."""

import torch
from torch import Tensor

from launcher.config.schema import AttentionKind, ContextMethod, ModelConfig
from launcher.models.documents import Documents, attention_mask, positions_in_documents
from launcher.parallel.context import ContextParallel

Made = dict[tuple[int | None, torch.device, torch.dtype], Tensor]


class AttentionMasks:
    """Masks that are added to the attention scores of a rank: 0 where a position attends, else -inf.

    A mask is (T, T). If attention stops at documents it is (B, 1, T, T), made for each micro-batch. With
    context parallelism it is instead the first position to which each query attends (context_attention.py).
    """

    def __init__(
        self, model: ModelConfig, documents: Documents, context: ContextParallel | None = None
    ) -> None:
        self.documents, self.context = documents, context
        self._is_causal = model.attention is AttentionKind.causal
        # The fused kernel makes a causal mask itself; the path with a soft cap does not.
        self._is_explicit = model.attention_soft_cap is not None and self._is_causal
        self._longest: Made = {}

    def of(self, length: int, window: int | None, x: Tensor) -> Tensor | None:
        """Return the mask of `length` positions in the precision of x; None where the kernel needs none."""
        if window is not None and window >= length:
            window = None
        if self.context is not None:
            return self._first_seen(length, window, x.device, self.context)
        if self.documents.ends is not None:
            key = window, x.device, x.dtype
            if key not in self.documents.masks:
                allowed = attention_mask(self.documents.ends)
                self.documents.masks[key] = additive(allowed, window, x.dtype)
            return self.documents.masks[key]
        return self._constant(length, window, x) if window is not None or self._is_explicit else None

    def _first_seen(
        self, length: int, window: int | None, device: torch.device, context: ContextParallel
    ) -> Tensor | None:
        """Return the first position to which each query attends; None if that is the first token for all.

        The shape is (B or 1, T/C), or under ulysses, which attends in whole sequences, (B or 1, T).
        """
        ends = self.documents.ends
        if ends is None and window is None:
            return None
        key = window, device, torch.long
        made = self._longest if ends is None else self.documents.masks
        is_whole = context.method is ContextMethod.ulysses
        # Places differ with the length: an evaluation has windows of many lengths.
        if key not in made or made[key].shape[1] != (length if is_whole else length // context.axis.size):
            places = torch.arange(length, device=device) if is_whole else context.positions(length, device)
            starts = torch.zeros_like(places).unsqueeze(0)
            if ends is not None:
                starts = places - positions_in_documents(ends)[:, places]
            made[key] = starts if window is None else torch.maximum(starts, places - window + 1)
        return made[key]

    def _constant(self, length: int, window: int | None, x: Tensor) -> Tensor:
        key = window, x.device, x.dtype
        if key not in self._longest or len(self._longest[key]) < length:
            allowed = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            self._longest[key] = additive(allowed, window, x.dtype)
        # CUDA's kernels need aligned rows. Only sequences shorter than the longest are copied.
        return self._longest[key][:length, :length].contiguous()


def additive(allowed: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return (..., T, T): 0 where a position attends within the window, itself counted, else -inf."""
    if window is not None:
        allowed = allowed.triu(1 - window)
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill_(~allowed, float("-inf"))
