"""Tiny random models of transformers' own classes, at least one for each model type of the launcher."""

from typing import Any

import torch
from torch import nn

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 48,
    "vocab_size": 61, "max_position_embeddings": 24, "pad_token_id": None, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 4}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 8,
    "beta_fast": 2.0, "beta_slow": 0.5,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
GEMMA = {**SIZES, **GROUPED, "head_dim": 6, "query_pre_attn_scalar": 9, "sliding_window": 5}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
}

# The name of the config class in transformers, without Config, and its settings.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": (
        "GPT2",
        {
            "n_embd": 32, "n_layer": 4, "n_head": 8, "n_inner": 48, "vocab_size": 61, "n_positions": 24,
            "bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        },
    ),
    "Llama 2": ("Llama", SIZES),
    "Llama 3": ("Llama", {**SIZES, **GROUPED, "head_dim": 6, "rope_parameters": {"rope_theta": 5e5}}),
    "Llama 3.1": ("Llama", {**SIZES, **GROUPED, "rope_parameters": LLAMA3}),
    "Llama 3.2": ("Llama", {**SIZES, **GROUPED, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "Llama, linear": ("Llama", {**SIZES, "rope_parameters": LINEAR}),
    "Llama, yarn": ("Llama", {**SIZES, "rope_parameters": YARN}),
    "Mistral": ("Mistral", {**SIZES, **GROUPED, "sliding_window": 5}),
    "Mistral without a window": ("Mistral", {**SIZES, **GROUPED, "sliding_window": None}),
    "Qwen2.5": ("Qwen2", {**SIZES, **GROUPED, "tie_word_embeddings": True}),
    "Qwen2.5, yarn": ("Qwen2", {**SIZES, **GROUPED, "rope_parameters": YARN}),
    "Qwen3": ("Qwen3", {**SIZES, **GROUPED, "head_dim": 6}),
    "Mixtral": (
        "Mixtral", {**SIZES, **GROUPED, "num_local_experts": 5, "sliding_window": None},
    ),
    "Qwen3-MoE": (
        "Qwen3Moe",
        {
            **SIZES, **GROUPED, "head_dim": 6, "num_experts": 6, "num_experts_per_tok": 3,
            "moe_intermediate_size": 20, "norm_topk_prob": True,
        },
    ),
    "Qwen3-MoE, a dense layer": (
        "Qwen3Moe",
        {
            **SIZES, **GROUPED, "head_dim": 6, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 20, "mlp_only_layers": [0], "norm_topk_prob": False,
        },
    ),
    "OLMo 2": ("Olmo2", {**SIZES, **GROUPED}),
    "Gemma 2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "Gemma 3": (
        "Gemma3Text",
        {**GEMMA, "num_hidden_layers": 4, "sliding_window_pattern": 2, "rope_parameters": GEMMA3_ROPE},
    ),
    "Pythia": ("GPTNeoX", {**SIZES, "rope_parameters": {"partial_rotary_factor": 0.5}}),
    "GPT-NeoX 20B": (
        "GPTNeoX", {**SIZES, "hidden_act": "gelu_fast", "rope_parameters": {"partial_rotary_factor": 0.5}},
    ),
    "GPT-NeoX, sequential": (
        "GPTNeoX",
        {**SIZES, "use_parallel_residual": False, "rope_parameters": {"partial_rotary_factor": 1.0}},
    ),
}  # fmt: skip
QUICK = ("Llama 3.2", "Gemma 2")  # of tests that train


def transformers_model(family: str, **changes: Any) -> nn.Module:
    """Return a model of transformers with random weights, also for norms and biases."""
    import transformers

    name, settings = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(settings | changes))
    torch.manual_seed(7)
    # The other kinds of attention leave out Gemma's soft cap.
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()
