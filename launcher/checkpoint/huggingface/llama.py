"""Hugging Face's Llama."""

from collections.abc import Iterator
from typing import Any

from launcher.checkpoint.huggingface.adapter import TEXT, Adapter, Entry, NotConvertible, head, matrix, vector
from launcher.config.schema import BiasesConfig, MLPKind, ModelConfig, NormKind, PositionKind
from launcher.config.shape import head_size, kv_heads, qkv_sizes


def _entries(m: ModelConfig) -> Iterator[Entry]:
    h, f = m.hidden_size, m.ffn_hidden_size
    yield matrix("model.embed_tokens.weight", "embedding.weight", m.vocab_size, h)
    for index in range(m.num_layers):
        layer, block = f"model.layers.{index}", f"blocks.{index}"
        yield vector(f"{layer}.input_layernorm.weight", f"{block}.attention_norm.weight", h)
        first = 0
        for name, rows in zip("qkv", qkv_sizes(m), strict=True):
            ours = f"{block}.attention.qkv.weight"
            yield matrix(f"{layer}.self_attn.{name}_proj.weight", ours, rows, h, first)
            first += rows
        ours = f"{block}.attention.output.weight"
        yield matrix(f"{layer}.self_attn.o_proj.weight", ours, h, qkv_sizes(m)[0])
        yield vector(f"{layer}.post_attention_layernorm.weight", f"{block}.mlp_norm.weight", h)
        for name, first in (("gate", 0), ("up", f)):
            yield matrix(f"{layer}.mlp.{name}_proj.weight", f"{block}.mlp.gate_up.weight", f, h, first)
        yield matrix(f"{layer}.mlp.down_proj.weight", f"{block}.mlp.down.weight", h, f)
    yield vector("model.norm.weight", "final_norm.weight", h)
    yield from head(m)


def _read(theirs: dict[str, Any]) -> dict[str, Any]:
    size, heads = theirs.get("head_dim"), theirs["num_attention_heads"]
    is_derived = size is None or size * heads == theirs["hidden_size"]
    return {"rope_theta": _rope_theta(theirs), "head_size": None if is_derived else size}


def _rope_theta(theirs: dict[str, Any]) -> float:
    # rope_parameters since transformers 5; before it rope_theta, and rope_scaling for anything special.
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise NotConvertible(f"its rotary positions are scaled ({kind}), and the launcher's are not")
    return float(rope.get("rope_theta", theirs.get("rope_theta", 10000.0)))


def _write(m: ModelConfig) -> dict[str, Any]:
    # rope_parameters for transformers 5, rope_theta for earlier versions.
    rope = {
        "rope_parameters": {"rope_type": "default", "rope_theta": m.rope_theta},
        "rope_theta": m.rope_theta,
    }
    return {"num_key_value_heads": kv_heads(m), "head_dim": head_size(m), **rope}


ADAPTER = Adapter(
    title="Llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    parts={
        **TEXT,
        "norm": NormKind.rms_norm,
        "positions": PositionKind.rope,
        "mlp": MLPKind.swiglu,
        "biases": BiasesConfig(qkv=False, output=False, up=False, down=False, head=False),
    },
    settings={
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "ffn_hidden_size": "intermediate_size",
        "vocab_size": "vocab_size",
        "max_sequence_length": "max_position_embeddings",
        "tie_embeddings": "tie_word_embeddings",
        "norm_epsilon": "rms_norm_eps",
    },
    defaults={"num_key_value_heads": None, "tie_word_embeddings": False, "rms_norm_eps": 1e-6},
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    derived=(),
    entries=_entries,
    read=_read,
    write=_write,
)
