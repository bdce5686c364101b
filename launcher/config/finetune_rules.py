"""Rules of adapters (LoRA). Pure, like validate.py."""

from collections.abc import Iterable
from difflib import get_close_matches

from launcher.config.errors import quoted_setting, refusal
from launcher.config.schema import InputKind, RunConfig, StatesDtype
from launcher.config.shape import has_lora

TARGETS = ("qkv", "output", "up", "down")
# Names of the same projections in Hugging Face models.
_THEIRS = {
    **{"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "c_attn": "qkv", "query_key_value": "qkv"},
    **{"o_proj": "output", "c_proj": "output", "dense": "output", "gate": "up", "gate_proj": "up"},
    **{"up_proj": "up", "gate_up": "up", "c_fc": "up", "down_proj": "down"},
}
_FIELD = "finetune.lora.targets"


def check_lora(run: RunConfig) -> None:
    """Check that the adapters have projections to adapt, and weights that can be frozen."""
    if not has_lora(run):
        return
    off, targets = "finetune.lora.rank=null", run.finetune.lora.targets
    if run.model.inputs is InputKind.patches:
        why = "adapters are for language models, and this run has model.inputs=patches"
        raise refusal(run, "finetune.lora.rank", why, off)
    if run.precision.states is StatesDtype.bf16:
        why = "adapters are trained with fp32 states; frozen weights have no states in any precision"
        raise refusal(run, "precision.states", why, "precision=bf16", off)
    if not targets:
        why = "adapters need at least one projection"
        raise refusal(run, _FIELD, why, _setting(TARGETS), off)
    if unknown := [name for name in targets if name not in TARGETS]:
        why = f"{unknown[0]!r} is no projection of a block: {', '.join(TARGETS)}"
        known = [name for name in map(_nearest, targets) if name is not None]
        fitting = list(dict.fromkeys(known)) or list(TARGETS)
        raise refusal(run, _FIELD, why, _setting(fitting))
    if len(set(targets)) < len(targets):
        why = "a projection is named twice"
        raise refusal(run, _FIELD, why, _setting(dict.fromkeys(targets)))


def _setting(targets: Iterable[str]) -> str:
    return quoted_setting(_FIELD, f"[{','.join(targets)}]")


def _nearest(name: str) -> str | None:
    """Return the target that a name means; None if no target is close."""
    if name in TARGETS or name in _THEIRS:
        return _THEIRS.get(name, name)
    return next(iter(get_close_matches(name, TARGETS, n=1)), None)


def adapter_warnings(run: RunConfig) -> list[str]:
    """Return what to print if adapters would be trained on weights that are drawn."""
    starts = run.checkpoint.init_from is not None or run.checkpoint.resume not in ("auto", "none")
    if not has_lora(run) or starts:
        return []
    why = "the adapters are trained on random weights"
    return [f"warning  finetune.lora.rank={run.finetune.lora.rank} without checkpoint.init_from: {why}\n"
            "  try: checkpoint.init_from=PATH of a model, as published or imported"]  # fmt: skip
