"""Hugging Face's GPT-2."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from launcher.checkpoint.huggingface.converter import TEXT, Converter, Entry, head, matrix, norm, vector
from launcher.config.schema import BiasesConfig, MLPKind, ModelConfig, NormKind, PositionKind


def _entries(m: ModelConfig) -> Iterator[Entry]:
    h, f = m.hidden_size, m.ffn_hidden_size
    yield matrix("transformer.wte.weight", "embedding.weight", m.vocab_size, h)
    yield matrix("transformer.wpe.weight", "positions.weight", m.max_sequence_length, h)
    for index in range(m.num_layers):
        layer, block = f"transformer.h.{index}", f"blocks.{index}"
        yield from norm(f"{layer}.ln_1", f"{block}.attention_norm", h)
        yield from _conv1d(f"{layer}.attn.c_attn", f"{block}.attention.qkv", 3 * h, h)
        yield from _conv1d(f"{layer}.attn.c_proj", f"{block}.attention.output", h, h)
        yield from norm(f"{layer}.ln_2", f"{block}.mlp_norm", h)
        yield from _conv1d(f"{layer}.mlp.c_fc", f"{block}.mlp.up", f, h)
        yield from _conv1d(f"{layer}.mlp.c_proj", f"{block}.mlp.down", h, f)
    yield from norm("transformer.ln_f", "final_norm", h)
    yield from head(m)


def _conv1d(theirs: str, ours: str, outputs: int, inputs: int) -> Iterator[Entry]:
    """Yield a projection, whose weight GPT-2 stores as (inputs, outputs)."""
    yield replace(matrix(f"{theirs}.weight", f"{ours}.weight", outputs, inputs), transposed=True)
    yield vector(f"{theirs}.bias", f"{ours}.bias", outputs)


def _read(theirs: dict[str, Any]) -> dict[str, Any]:
    return {"ffn_hidden_size": theirs.get("n_inner") or 4 * theirs["n_embd"]}


def _write(m: ModelConfig) -> dict[str, Any]:
    return {"n_inner": m.ffn_hidden_size, "attn_pdrop": m.dropout, "embd_pdrop": m.dropout}


GPT2 = Converter(
    title="GPT-2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    parts={
        **TEXT,
        "norm": NormKind.layer_norm,
        "positions": PositionKind.learned,
        "mlp": MLPKind.gelu,
        "biases": BiasesConfig(qkv=True, output=True, up=True, down=True, head=False),
    },
    settings={
        "hidden_size": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "vocab_size": "vocab_size",
        "max_sequence_length": "n_positions",
        "tie_embeddings": "tie_word_embeddings",
        "norm_epsilon": "layer_norm_epsilon",
        "dropout": "resid_pdrop",
    },
    defaults={"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1},
    fixed={
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    derived=("num_kv_heads", "head_size"),
    entries=_entries,
    read=_read,
    write=_write,
    heads_divide=True,
)
