"""Rotary positions (Su et al., arXiv 2104.09864), applied to queries and keys."""

import torch
from torch import Tensor

from launcher.config.schema import ModelConfig
from launcher.config.shape import head_size

Tables = tuple[Tensor, Tensor]  # cosines and sines, each (T, 1, D/2)


class RotaryTables:
    """The tables of one rank, made once for all layers and steps; part of no state dict."""

    def __init__(self, model: ModelConfig) -> None:
        self._size, self._theta = head_size(model), model.rope_theta
        self._longest: dict[tuple[torch.device, torch.dtype], Tables] = {}

    def of(self, length: int, x: Tensor) -> Tables:
        """Return the tables of the first `length` positions, in the precision and on the device of x."""
        key = x.device, x.dtype
        if key not in self._longest or len(self._longest[key][0]) < length:
            self._longest[key] = tables(length, self._size, self._theta, x)
        cos, sin = self._longest[key]
        return cos[:length], sin[:length]


def tables(length: int, size: int, theta: float, x: Tensor) -> Tables:
    """Return cosines and sines for heads of `size` channels, rounded once from fp32."""
    frequencies = theta ** -(torch.arange(0, size, 2, device=x.device, dtype=torch.float32) / size)
    angles = torch.arange(length, device=x.device, dtype=torch.float32).outer(frequencies).unsqueeze(1)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channels i and i + D/2 of (B, T, heads, D) by their position."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
