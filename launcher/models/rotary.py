"""Rotary positions (Su et al., arXiv 2104.09864), applied to queries and keys, and their scaling."""

import math

import torch
from torch import Tensor

from launcher.config.schema import ModelConfig, RopeScalingConfig, RopeScalingKind
from launcher.config.shape import rotary_size
from launcher.parallel.context import ContextParallel

Tables = tuple[Tensor, Tensor]  # cosines and sines, each (T, 1, R/2) for R rotated channels of a head


class RotaryTables:
    """The tables of one rank, made once for all layers and steps; part of no state dict."""

    def __init__(self, model: ModelConfig, context: ContextParallel | None = None) -> None:
        self._model, self._context = model, context
        self._longest: dict[tuple[torch.device, torch.dtype, bool], Tables] = {}

    def of(self, length: int, x: Tensor, *, has_window: bool = False) -> Tables:
        """Return the tables of the first `length` positions, in the precision and on the device of x.

        With context parallelism: of this rank's positions among them, (T/C, 1, R/2).
        """
        is_local = has_window and self._model.local_rope_theta is not None
        key = x.device, x.dtype, is_local
        if self._context is not None:
            # Places differ with the length: validation may have another.
            places = self._context.positions(length, x.device)
            if key not in self._longest or len(self._longest[key][0]) != len(places):
                self._longest[key] = tables(places, *frequencies(self._model, is_local=is_local), x)
            return self._longest[key]
        if key not in self._longest or len(self._longest[key][0]) < length:
            places = torch.arange(length, device=x.device)
            self._longest[key] = tables(places, *frequencies(self._model, is_local=is_local), x)
        cos, sin = self._longest[key]
        return cos[:length], sin[:length]


def tables(places: Tensor, angles_per_position: Tensor, factor: float, x: Tensor) -> Tables:
    """Return cosines and sines of positions `places` (T,) times `factor`, rounded once from fp32."""
    angles = places.float().outer(angles_per_position.to(x.device)).unsqueeze(1)
    return (angles.cos() * factor).to(x.dtype), (angles.sin() * factor).to(x.dtype)


def frequencies(model: ModelConfig, *, is_local: bool = False) -> tuple[Tensor, float]:
    """Return the angle per position of each rotated pair (R/2,), and the factor of cosines and sines."""
    if is_local:
        assert model.local_rope_theta is not None
        return plain_frequencies(rotary_size(model), model.local_rope_theta), 1.0
    plain = plain_frequencies(rotary_size(model), model.rope_theta)
    return scaled(plain, model.rope_scaling, model.rope_theta), attention_factor(model.rope_scaling)


def plain_frequencies(size: int, theta: float) -> Tensor:
    return theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)


def scaled(plain: Tensor, scaling: RopeScalingConfig, theta: float) -> Tensor:
    """Return the frequencies (R/2,) after scaling: each divided by 1 to `factor`."""
    if scaling.kind is RopeScalingKind.none:
        return plain
    slow = plain / scaling.factor
    if scaling.kind is RopeScalingKind.linear:
        return slow
    weight = _llama3_weight(plain, scaling) if scaling.kind is RopeScalingKind.llama3 else None
    weight = _yarn_weight(len(plain), scaling, theta) if weight is None else weight
    return plain * weight + slow * (1 - weight)


def _llama3_weight(plain: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Return the share of each frequency that is kept: 1 for short wavelengths, 0 for long ones."""
    assert scaling.original_length is not None
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    turns = scaling.original_length * plain / (2 * math.pi)
    return ((turns - low) / (high - low)).clamp(0, 1)


def _yarn_weight(pairs: int, scaling: RopeScalingConfig, theta: float) -> Tensor:
    """Return the share of each frequency that is kept: a ramp over the channels (arXiv 2309.00071)."""
    assert scaling.original_length is not None
    size = 2 * pairs

    def channel(turns: float) -> float:
        """Return the pair that turns so often within the original length."""
        assert scaling.original_length is not None
        return size * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(channel(scaling.beta_fast)), 0)
    last = min(math.ceil(channel(scaling.beta_slow)), size - 1)
    ramp = (torch.arange(pairs, dtype=torch.float32) - first) / (last - first or 0.001)
    return 1 - ramp.clamp(0, 1)


def attention_factor(scaling: RopeScalingConfig) -> float:
    """Return the factor of rotated queries and keys: with yarn 0.1 ln(factor) + 1 if it is not set."""
    if scaling.kind is not RopeScalingKind.yarn:
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channels i and i + R/2 of (B, T, heads, D), where i < R/2, by their position; keep the rest."""
    size = 2 * cos.shape[-1]
    first, second = x[..., : size // 2], x[..., size // 2 : size]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat(rotated if size == x.shape[-1] else [*rotated, x[..., size:]], dim=-1)
