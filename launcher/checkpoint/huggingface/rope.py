"""Rotary positions in a Hugging Face config.json: read and written. Imports no torch."""

import math
from typing import Any

from launcher.checkpoint.huggingface.converter import NotConvertible
from launcher.config.schema import ModelConfig, RopeScalingConfig, RopeScalingKind

Settings = dict[str, Any]


def read_rope(theirs: Settings, theta: float = 10000.0) -> Settings:
    """Return our fields `rope_theta` and `rope_scaling`; `theta` is the default. Raises NotConvertible."""
    rope = rope_settings(theirs)
    if rope.get("partial_rotary_factor", theirs.get("partial_rotary_factor") or 1.0) != 1.0:
        raise NotConvertible("it rotates a part of each head, which this model type of the launcher does not")
    return {
        "rope_theta": first_number(rope.get("rope_theta"), theirs.get("rope_theta"), theta),
        "rope_scaling": read_scaling(rope, theirs),
    }


def first_number(*values: Any) -> float:
    """Return the first value that is not null."""
    return float(next(value for value in values if value is not None))


def rope_settings(theirs: Settings) -> Settings:
    """Return rope_parameters (since transformers 5), else rope_scaling, which holds anything special."""
    return theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}


def read_scaling(rope: Settings, theirs: Settings) -> RopeScalingConfig:
    """Return the scaling that `rope` describes. Raises NotConvertible for a kind that we do not have."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return RopeScalingConfig()
    if kind not in ("linear", "llama3", "yarn"):
        why = ": its frequencies depend on the length of each batch" if kind == "dynamic" else ""
        raise NotConvertible(
            f"its rotary positions are scaled by {kind!r}, which the launcher does not have{why}"
        )
    if rope.get("truncate", True) is not True:
        raise NotConvertible("its rotary positions are scaled by yarn without truncation")
    longest, name = theirs["max_position_embeddings"], "original_max_position_embeddings"
    original = theirs.get(name, rope.get(name, longest))
    factor = first_number(rope.get("factor"), longest / original)
    if kind == "linear":
        return RopeScalingConfig(RopeScalingKind.linear, factor)
    scaling = RopeScalingConfig(RopeScalingKind[kind], factor, original)
    if kind == "llama3":
        scaling.low_frequency_factor = float(rope["low_freq_factor"])
        scaling.high_frequency_factor = float(rope["high_freq_factor"])
        return scaling
    scaling.beta_fast = first_number(rope.get("beta_fast"), 32)
    scaling.beta_slow = first_number(rope.get("beta_slow"), 1)
    scaling.attention_factor = _attention_factor(rope, factor)
    return scaling


def _attention_factor(rope: Settings, factor: float) -> float | None:
    """Return the factor of rotated channels that is set, directly or by DeepSeek's `mscale`; else None."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    scales = rope.get("mscale"), rope.get("mscale_all_dim")
    if not all(scales):
        return None
    above, below = (0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0 for scale in scales if scale)
    return above / below


def write_rope(m: ModelConfig) -> Settings:
    """Return rope_parameters for transformers 5, and rope_theta and rope_scaling for earlier versions."""
    parameters = rope_parameters(m)
    scaled = m.rope_scaling.kind is not RopeScalingKind.none
    scaling = {"rope_scaling": parameters} if scaled else {}
    return {"rope_parameters": parameters, "rope_theta": m.rope_theta, **scaling}


def rope_parameters(m: ModelConfig) -> Settings:
    """Return the entry `rope_parameters` of a config.json."""
    s, theta = m.rope_scaling, {"rope_theta": m.rope_theta}
    if s.kind is RopeScalingKind.none:
        return {"rope_type": "default", **theta}
    kind = {"rope_type": s.kind.name, "factor": s.factor, **theta}
    if s.kind is RopeScalingKind.linear:
        return kind
    kind["original_max_position_embeddings"] = s.original_length
    if s.kind is RopeScalingKind.llama3:
        return {
            **kind,
            "low_freq_factor": s.low_frequency_factor,
            "high_freq_factor": s.high_frequency_factor,
        }
    factor = {} if s.attention_factor is None else {"attention_factor": s.attention_factor}
    return {**kind, "beta_fast": s.beta_fast, "beta_slow": s.beta_slow, **factor}
