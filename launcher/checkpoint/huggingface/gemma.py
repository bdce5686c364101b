"""Hugging Face's Gemma 2, and the text models of Gemma 3. Their norms multiply by 1 + weight.

Gemma 3 of 4 billion parameters and more reads images too: only the text part of these models is imported.
"""

from typing import Any

from launcher.checkpoint.huggingface.converter import NotConvertible
from launcher.checkpoint.huggingface.decoder import FULL, SLIDING, decoder, read_windows, write_windows
from launcher.checkpoint.huggingface.rope import (
    first_number,
    read_rope,
    read_scaling,
    rope_parameters,
    rope_settings,
    write_rope,
)
from launcher.config.schema import MLPKind, ModelConfig, NormPlacement, QueryKeyNorm, RopeScalingKind
from launcher.config.shape import head_size

Settings = dict[str, Any]
HEAD_SIZE = 256


def _read_common(theirs: Settings) -> Settings:
    if theirs.get("use_bidirectional_attention"):
        raise NotConvertible("use_bidirectional_attention is set, and the launcher's model is causal")
    if (
        theirs.get("hidden_act", "gelu_pytorch_tanh") != "gelu_pytorch_tanh"
        and "hidden_activation" not in theirs
    ):
        raise NotConvertible(
            f"hidden_act is {theirs['hidden_act']!r}, and the launcher's is 'gelu_pytorch_tanh'"
        )
    size, scale = theirs.get("head_dim", HEAD_SIZE), theirs.get("query_pre_attn_scalar", HEAD_SIZE)
    return {"attention_scale_size": None if scale == size else float(scale)}


def _write_common(m: ModelConfig) -> Settings:
    scale = m.attention_scale_size or head_size(m)
    return {"query_pre_attn_scalar": int(scale) if scale == int(scale) else scale, **write_windows(m)}


def _read_2(theirs: Settings) -> Settings:
    return {**_read_common(theirs), **read_windows(theirs, 2, 4096), **read_rope(theirs)}


def _write_2(m: ModelConfig) -> Settings:
    return {**_write_common(m), **write_rope(m)}


def _read_3(theirs: Settings) -> Settings:
    """Read also the rotary positions of layers with a window, which differ from the others."""
    rope, windows = rope_settings(theirs), read_windows(theirs, 6, 4096)
    full = rope.get(FULL, {}) if FULL in rope or SLIDING in rope else rope
    local = rope.get(SLIDING) or {"rope_theta": theirs.get("rope_local_base_freq", 10000.0)}
    if local.get("rope_type", "default") != "default" and local != full:
        raise NotConvertible("the rotary positions of its layers with a window are scaled")
    fields: Settings = {
        "rope_theta": first_number(full.get("rope_theta"), theirs.get("rope_theta"), 1e6),
        "rope_scaling": read_scaling(full, theirs),
        "local_rope_theta": float(local.get("rope_theta", 10000.0)),
    }
    if local == full or windows["sliding_window"] is None:
        fields["local_rope_theta"] = None
    return {**_read_common(theirs), **windows, **fields}


def _write_3(m: ModelConfig) -> Settings:
    full = rope_parameters(m)
    local = {"rope_type": "default", "rope_theta": m.local_rope_theta} if m.local_rope_theta else full
    old: Settings = {"rope_theta": m.rope_theta, "rope_local_base_freq": local["rope_theta"]}
    if m.rope_scaling.kind is not RopeScalingKind.none:
        old["rope_scaling"] = full
    return {**_write_common(m), "rope_parameters": {FULL: full, SLIDING: local}, **old}


def _implied(m: ModelConfig) -> Settings:
    return {"embedding_scale": m.hidden_size**0.5}


_FREE = ("sliding_window", "full_attention_every", "attention_scale_size")
_FIXED = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}

GEMMA2 = decoder(
    "Gemma 2", "gemma2", "Gemma2ForCausalLM",
    parts={"mlp": MLPKind.geglu, "norm_placement": NormPlacement.sandwich},
    free=_FREE,
    settings={"logit_soft_cap": "final_logit_softcapping", "attention_soft_cap": "attn_logit_softcapping"},
    defaults={"tie_word_embeddings": True, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    fixed=_FIXED, read=_read_2, write=_write_2, implied=_implied, default_head_size=HEAD_SIZE, added=1.0,
    heads_divide=True,
)  # fmt: skip

# The sizes of Gemma 3 4B's text part, which its config.json leaves out.
SIZES_OF_TEXT_PART = {
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208,
    "max_position_embeddings": 131072,
}  # fmt: skip
_IMAGES = ("vision_tower.", "multi_modal_projector.")

# transformers' Gemma 3 reads attn_logit_softcapping and does not use it.
GEMMA3 = decoder(
    "Gemma 3", "gemma3_text", "Gemma3ForCausalLM",
    parts={
        "mlp": MLPKind.geglu,
        "norm_placement": NormPlacement.sandwich,
        "query_key_norm": QueryKeyNorm.head,
    },
    free=(*_FREE, "local_rope_theta"),
    settings={"logit_soft_cap": "final_logit_softcapping"},
    defaults={"tie_word_embeddings": True, "final_logit_softcapping": None},
    fixed={**_FIXED, "attn_logit_softcapping": None},
    read=_read_3, write=_write_3, implied=_implied, default_head_size=HEAD_SIZE, added=1.0,
    heads_divide=True,
    inside=(("language_model.", ""), ("model.language_model.", "model.")),
    left_out=(*_IMAGES, *(f"model.{name}" for name in _IMAGES)),
)  # fmt: skip
