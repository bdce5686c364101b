"""Hugging Face's GPT-NeoX, which Pythia uses: parallel residual, and a part of each head rotated.

GPT-NeoX-20B has the tanh form of GELU, Pythia the exact one.
"""

from collections.abc import Iterator
from typing import Any

from launcher.checkpoint.huggingface.converter import TEXT, Converter, Entry, NotConvertible, matrix, norm
from launcher.checkpoint.huggingface.rope import read_scaling, rope_parameters, rope_settings
from launcher.config.schema import BiasesConfig, MLPKind, ModelConfig, NormKind, PositionKind, ResidualKind
from launcher.config.shape import head_size, qkv_sizes
from launcher.parallel.boxes import Box

_LINEAR = {
    "attention.dense": "attention.output",
    "mlp.dense_h_to_4h": "mlp.up",
    "mlp.dense_4h_to_h": "mlp.down",
}
# Their names of both forms of GELU; the first of each is written.
_ACTIVATIONS = {
    "gelu": MLPKind.gelu_erf,
    "gelu_fast": MLPKind.gelu, "gelu_new": MLPKind.gelu, "gelu_pytorch_tanh": MLPKind.gelu,
}  # fmt: skip


def _entries(m: ModelConfig) -> Iterator[Entry]:
    h, f = m.hidden_size, m.ffn_hidden_size
    yield matrix("gpt_neox.embed_in.weight", "embedding.weight", m.vocab_size, h)
    for index in range(m.num_layers):
        layer, block = f"gpt_neox.layers.{index}", f"blocks.{index}"
        yield from norm(f"{layer}.input_layernorm", f"{block}.attention_norm", h)
        yield from norm(f"{layer}.post_attention_layernorm", f"{block}.mlp_norm", h)
        yield from _fused(m, f"{layer}.attention.query_key_value", f"{block}.attention.qkv")
        for (theirs, ours), (rows, columns) in zip(_LINEAR.items(), ((h, h), (f, h), (h, f)), strict=True):
            yield matrix(f"{layer}.{theirs}.weight", f"{block}.{ours}.weight", rows, columns)
            yield Entry(f"{layer}.{theirs}.bias", f"{block}.{ours}.bias", Box((0,), (rows,)))
    yield from norm("gpt_neox.final_layer_norm", "final_norm", h)
    if not m.tie_embeddings:
        yield matrix("embed_out.weight", "head.weight", m.vocab_size, h)


def _fused(m: ModelConfig, theirs: str, ours: str) -> Iterator[Entry]:
    """Yield the fused projection: theirs has query, key and value of one head beside each other."""
    size, total = head_size(m), sum(qkv_sizes(m))
    for kind, columns in (("weight", (m.hidden_size,)), ("bias", ())):
        for piece in range(3 * m.num_heads):
            head, part = divmod(piece, 3)
            offsets = ((part * m.num_heads + head) * size, *(0 for _ in columns))
            box = Box(offsets, (size, *columns))
            yield Entry(f"{theirs}.{kind}", f"{ours}.{kind}", box, first_row=piece * size, rows=total)


def _read(theirs: dict[str, Any]) -> dict[str, Any]:
    rope, activation = rope_settings(theirs), theirs.get("hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise NotConvertible(f"hidden_act is {activation!r}, and the launcher's gpt_neox has {known}")
    fraction = rope.get("partial_rotary_factor", theirs.get("rotary_pct", 0.25))
    theta = rope.get("rope_theta", theirs.get("rotary_emb_base", theirs.get("rope_theta", 10000.0)))
    is_parallel = theirs.get("use_parallel_residual", True)
    return {
        "rope_theta": float(theta),
        "rope_scaling": read_scaling(rope, theirs),
        "rotary_fraction": float(fraction),
        "residual": ResidualKind.parallel if is_parallel else ResidualKind.sequential,
        "mlp": _ACTIVATIONS[activation],
    }


def _write(m: ModelConfig) -> dict[str, Any]:
    return {
        "rope_parameters": {**rope_parameters(m), "partial_rotary_factor": m.rotary_fraction},
        "rotary_pct": m.rotary_fraction,
        "rotary_emb_base": m.rope_theta,
        "use_parallel_residual": m.residual is ResidualKind.parallel,
        "attention_dropout": m.dropout,
        "hidden_act": next(name for name, kind in _ACTIVATIONS.items() if kind is m.mlp),
    }


def _implied(m: ModelConfig) -> dict[str, Any]:
    return {"mlp": m.mlp if m.mlp in _ACTIVATIONS.values() else MLPKind.gelu_erf}


GPT_NEOX = Converter(
    title="GPT-NeoX",
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    parts={
        **{name: value for name, value in TEXT.items() if name not in ("rotary_fraction", "residual")},
        "norm": NormKind.layer_norm,
        "positions": PositionKind.rope,
        "biases": BiasesConfig(qkv=True, output=True, up=True, down=True, head=False),
    },
    settings={
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "ffn_hidden_size": "intermediate_size",
        "vocab_size": "vocab_size",
        "max_sequence_length": "max_position_embeddings",
        "tie_embeddings": "tie_word_embeddings",
        "norm_epsilon": "layer_norm_eps",
        "dropout": "hidden_dropout",
    },
    defaults={"tie_word_embeddings": False, "layer_norm_eps": 1e-5, "hidden_dropout": 0.0},
    fixed={"attention_bias": True},
    derived=("num_kv_heads", "head_size"),
    entries=_entries,
    read=_read,
    write=_write,
    implied=_implied,
    head="embed_out.weight",
    heads_divide=True,
)
