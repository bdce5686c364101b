"""Rules of rotary positions, their scaling, and sliding windows. Pure, like validate.py."""

from dataclasses import fields

from launcher.config import shape
from launcher.config.errors import as_typed, refusal, settings, value_of
from launcher.config.schema import (
    AttentionKind,
    PositionKind,
    RopeScalingConfig,
    RopeScalingKind,
    RunConfig,
)

_USED = {
    RopeScalingKind.none: (),
    RopeScalingKind.linear: ("factor",),
    RopeScalingKind.llama3: ("factor", "original_length", "low_frequency_factor", "high_frequency_factor"),
    RopeScalingKind.yarn: ("factor", "original_length", "beta_fast", "beta_slow", "attention_factor"),
}
_ROTARY = {"rope_scaling.kind": RopeScalingKind.none, "rotary_fraction": 1.0, "local_rope_theta": None}


def check_rotary(run: RunConfig) -> None:
    """Check that rotary positions have the settings that they need, and other positions none of them."""
    m = run.model
    if m.positions is PositionKind.rope:
        _check_scaling(run)
        _check_fraction(run)
        return
    for name, default in _ROTARY.items():
        if value_of(m, name) != default:
            why = f"model.positions={m.positions.name} has no rotary positions"
            unset = settings(f"model.{name}", [default])
            raise refusal(run, f"model.{name}", why, *unset, "model.positions=rope")


def _check_scaling(run: RunConfig) -> None:
    s, section = run.model.rope_scaling, "model.rope_scaling"
    kind, unset = f"{section}.kind={s.kind.name}", RopeScalingConfig()
    for name in (field.name for field in fields(s) if field.name != "kind"):
        if getattr(s, name) != getattr(unset, name) and name not in _USED[s.kind]:
            remedy = f"{section}.{name}={as_typed(getattr(unset, name))}"
            kinds = [other for other, used in _USED.items() if name in used]
            others = [_with_length(run, other, f"{section}.kind={other.name}") for other in kinds]
            raise refusal(run, f"{section}.{name}", f"{kind} does not use this setting", remedy, *others)
    if "original_length" in _USED[s.kind] and s.original_length is None:
        why = f"{kind} needs the sequence length before scaling"
        raise refusal(run, f"{section}.original_length", why, _with_length(run, s.kind, ""))
    if s.kind is RopeScalingKind.yarn and run.model.rope_theta <= 1:
        why = f"{kind} divides by its logarithm and needs a number above 1"
        raise refusal(run, "model.rope_theta", why, "model.rope_theta=10000")
    for low, high in (("low_frequency_factor", "high_frequency_factor"), ("beta_slow", "beta_fast")):
        if getattr(s, low) >= getattr(s, high):
            why = f"must be above {section}.{low}={getattr(s, low)}"
            raise refusal(run, f"{section}.{high}", why, f"{section}.{high}={4 * getattr(s, low)}")


def _with_length(run: RunConfig, kind: RopeScalingKind, setting: str) -> str:
    """Return the setting, with a sequence length before scaling if `kind` needs it and it is not set."""
    s = run.model.rope_scaling
    if "original_length" not in _USED[kind] or s.original_length is not None:
        return setting
    shorter = max(1, round(run.model.max_sequence_length / s.factor))
    return f"{setting} model.rope_scaling.original_length={shorter}".lstrip()


def _check_fraction(run: RunConfig) -> None:
    size, field = shape.head_size(run.model), "model.rotary_fraction"
    rotated = size * run.model.rotary_fraction
    if rotated != shape.rotary_size(run.model) or rotated < 2:
        why = f"it rotates {rotated:g} of the {size} channels of a head, and channels are rotated in pairs"
        raise refusal(run, field, why, f"{field}={max(2, shape.rotary_size(run.model)) / size}")


def check_window(run: RunConfig) -> None:
    """Check the settings of sliding windows."""
    m = run.model
    for field in ("model.full_attention_every", "model.local_rope_theta"):
        if value_of(run, field) is not None and m.sliding_window is None:
            window = f"model.sliding_window={max(1, m.max_sequence_length // 2)}"
            raise refusal(run, field, "it needs layers with a sliding window", f"{field}=null", window)
    if m.sliding_window is not None and m.attention is not AttentionKind.causal:
        why = "only causal attention has a sliding window"
        raise refusal(run, "model.sliding_window", why, "model.sliding_window=null")
