"""Hugging Face's Llama, Mistral, Qwen2, Qwen3 and OLMo 2: Llama's tensor names, with other parts."""

from launcher.checkpoint.huggingface.decoder import decoder
from launcher.config.schema import BiasesConfig, NormPlacement, QueryKeyNorm

LLAMA = decoder(
    "Llama", "llama", "LlamaForCausalLM",
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}, heads_divide=True,
)  # fmt: skip

MISTRAL = decoder(
    "Mistral", "mistral", "MistralForCausalLM",
    settings={"sliding_window": "sliding_window"}, defaults={"sliding_window": 4096},
)  # fmt: skip

QWEN2 = decoder(
    "Qwen2", "qwen2", "Qwen2ForCausalLM",
    parts={"biases": BiasesConfig(qkv=True, output=False, up=False, down=False, head=False)},
    fixed={"hidden_act": "silu", "use_sliding_window": False}, derived=("head_size",),
)  # fmt: skip

QWEN3 = decoder(
    "Qwen3", "qwen3", "Qwen3ForCausalLM",
    parts={"query_key_norm": QueryKeyNorm.head},
    fixed={"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
    default_head_size=128,
)  # fmt: skip

OLMO2 = decoder(
    "OLMo 2", "olmo2", "Olmo2ForCausalLM",
    parts={"query_key_norm": QueryKeyNorm.projection, "norm_placement": NormPlacement.post},
    defaults={"rms_norm_eps": 1e-5}, fixed={"hidden_act": "silu", "attention_bias": False},
    derived=("head_size",),
)  # fmt: skip
