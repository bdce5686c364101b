"""Each model of conf/model that is on the Hugging Face Hub, against its config.json there, in old form."""

from dataclasses import replace
from typing import Any

import pytest

from launcher.checkpoint.huggingface import NotConvertible, converter_of, model_of
from launcher.config.schema import MLPKind, ResidualKind, RopeScalingKind
from tests.models.test_arithmetic import shipped

LLAMA3 = {
    "model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "num_attention_heads": 32,
}  # fmt: skip
SCALED = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "hidden_act": "silu", "attention_bias": False, "head_dim": 128,
    "num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000, "rope_scaling": None, "sliding_window": None, "use_sliding_window": False,
    "max_window_layers": 28,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "llama3_1_8b": {
        **LLAMA3, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
        "tie_word_embeddings": False, "rope_scaling": {**SCALED, "factor": 8.0},
    },
    "llama3_2_1b": {
        **LLAMA3, "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "head_dim": 64,
        "tie_word_embeddings": True, "rope_scaling": {**SCALED, "factor": 32.0},
    },
    "qwen3_0_6b": {
        **QWEN3, "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
        "intermediate_size": 3072, "tie_word_embeddings": True,
    },
    "qwen3_8b": {
        **QWEN3, "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
        "intermediate_size": 12288, "tie_word_embeddings": False,
    },
    "mistral_7b": {
        "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": False, "vocab_size": 32000,
    },
    "gemma2_2b": {
        "model_type": "gemma2", "attention_bias": False, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216,
        "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26,
        "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "sliding_window": 4096, "vocab_size": 256000,
    },
    "olmo2_7b": {
        "model_type": "olmo2", "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100352,
    },
}  # fmt: skip
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral_8x7b": {
        **PUBLISHED["mistral_7b"], "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2,
        "output_router_logits": False, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
        "sliding_window": None,
    },
    "qwen3_30b_a3b": {
        **QWEN3, "model_type": "qwen3_moe", "decoder_sparse_step": 1, "hidden_size": 2048,
        "intermediate_size": 6144, "mlp_only_layers": [], "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "tie_word_embeddings": False,
    },
}  # fmt: skip
GPT_NEOX_20B = {
    "model_type": "gpt_neox", "hidden_act": "gelu_fast", "hidden_size": 6144, "intermediate_size": 24576,
    "layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "num_attention_heads": 64,
    "num_hidden_layers": 44, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
    "vocab_size": 50432,
}  # fmt: skip
GEMMA3_4B = {
    **PUBLISHED["gemma2_2b"], "model_type": "gemma3_text", "attn_logit_softcapping": None,
    "final_logit_softcapping": None, "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024,
    "sliding_window_pattern": 6, "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "vocab_size": 262208,
}  # fmt: skip
PYTHIA_1B = {
    "model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 2048, "intermediate_size": 8192,
    "layer_norm_eps": 1e-5, "max_position_embeddings": 2048, "num_attention_heads": 8,
    "num_hidden_layers": 16, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
    "use_parallel_residual": True, "vocab_size": 50304,
}  # fmt: skip


def test_each_shipped_model_is_the_published_one(subtests: pytest.Subtests) -> None:
    for name, config in PUBLISHED.items():
        with subtests.test(name):
            ours = shipped(name)
            heads = ours.num_kv_heads or ours.num_heads
            assert model_of(config) == replace(ours, num_kv_heads=heads)
            assert converter_of(ours).model_type == config["model_type"]


def test_each_shipped_mixture_is_the_published_one(subtests: pytest.Subtests) -> None:
    """Their load-balancing loss is another, so that its factor is set here and not read there."""
    for name, config in MIXTURES.items():
        with subtests.test(name):
            ours, theirs = shipped(name), model_of(config)
            loss = ours.experts.auxiliary_loss
            assert replace(theirs, experts=replace(theirs.experts, auxiliary_loss=loss)) == ours
            assert converter_of(ours).model_type == config["model_type"]


def test_what_a_converter_writes_it_reads(subtests: pytest.Subtests) -> None:
    configs = PUBLISHED | MIXTURES
    configs |= {"Gemma 3": GEMMA3_4B, "Pythia": PYTHIA_1B, "GPT-NeoX": GPT_NEOX_20B}
    for name, config in configs.items():
        with subtests.test(name):
            model = model_of(config)
            converter = converter_of(model)
            written = converter.config_json(model, "bfloat16", {})
            assert model_of(written) == replace(model, num_kv_heads=written.get("num_key_value_heads"))


def test_the_text_part_of_a_gemma_3_that_reads_images() -> None:
    """Its config.json leaves out what is the default of transformers."""
    text = {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    }  # fmt: skip
    found = model_of({"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 1152}})
    expected = replace(model_of(GEMMA3_4B), ffn_hidden_size=10240, max_sequence_length=131072)
    assert found == expected


def test_old_settings_of_gemma_3_and_of_pythia() -> None:
    gemma = model_of(GEMMA3_4B)
    assert (gemma.sliding_window, gemma.full_attention_every) == (1024, 6)
    assert (gemma.rope_theta, gemma.local_rope_theta) == (1e6, 1e4)
    assert (gemma.rope_scaling.kind, gemma.rope_scaling.factor) == (RopeScalingKind.linear, 8.0)
    pythia = model_of(PYTHIA_1B)
    assert (pythia.rotary_fraction, pythia.residual) == (0.25, ResidualKind.parallel)
    assert (pythia.mlp, model_of(GPT_NEOX_20B).mlp) == (MLPKind.gelu_erf, MLPKind.gelu)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "windows from a layer on": ({**QWEN3, "use_sliding_window": True}, "use_sliding_window is True"),
    "another pattern": (
        {**GEMMA3_4B, "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 32},
        "layer_types is not a pattern",
    ),
    "attention to later tokens": ({**GEMMA3_4B, "use_bidirectional_attention": True}, "bidirectional"),
    "a cap that transformers ignores": (
        {**GEMMA3_4B, "attn_logit_softcapping": 50.0},
        "attn_logit_softcapping is 50.0",
    ),
    "yarn without truncation": (
        {**PUBLISHED["qwen3_8b"], "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "truncate": False}},
        "yarn without truncation",
    ),
    "another activation": ({**PYTHIA_1B, "hidden_act": "relu"}, "hidden_act is 'relu'"),
}


def test_what_our_parts_cannot_express_is_refused_by_name(subtests: pytest.Subtests) -> None:
    for name, (config, message) in REFUSED.items():
        with subtests.test(name), pytest.raises(NotConvertible, match=message):
            model_of(config)
