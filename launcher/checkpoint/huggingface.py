"""Hugging Face's Llama and GPT-2: their settings and tensors in our terms, and back. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from launcher.checkpoint.boxes import Box, whole
from launcher.config.schema import Family, ModelConfig


@dataclass(frozen=True)
class Format:
    """How transformers writes a model of one family into config.json.

    `fields` gives their name of each of ours, `defaults` what an absent one means, and `fixed` what they
    can vary and our model does not.
    """

    model_type: str
    architecture: str
    fields: dict[str, str]
    defaults: dict[str, Any]
    fixed: dict[str, Any]


FORMATS = {
    Family.llama: Format(
        "llama",
        "LlamaForCausalLM",
        {
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
        {"num_key_value_heads": None, "tie_word_embeddings": False, "rms_norm_eps": 1e-6},
        {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    ),
    Family.gpt: Format(
        "gpt2",
        "GPT2LMHeadModel",
        {
            "hidden_size": "n_embd",
            "num_layers": "n_layer",
            "num_heads": "n_head",
            "ffn_hidden_size": "n_inner",
            "vocab_size": "vocab_size",
            "max_sequence_length": "n_positions",
            "tie_embeddings": "tie_word_embeddings",
            "norm_epsilon": "layer_norm_epsilon",
            "dropout": "resid_pdrop",
        },
        {"n_inner": None, "tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1},
        {
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    ),
}


class NotOurs(Exception):
    """Their model is not one that the launcher can build; says why."""


def model_of(theirs: dict[str, Any]) -> ModelConfig:
    """The model that a config.json describes. Raises NotOurs."""
    family = next((f for f, known in FORMATS.items() if known.model_type == theirs.get("model_type")), None)
    if family is None:
        raise NotOurs(f"model_type is {theirs.get('model_type')!r}, and only gpt2 and llama are known")
    form = FORMATS[family]
    for key, value in form.fixed.items():
        if theirs.get(key, value) != value:
            raise NotOurs(f"{key} is {theirs[key]!r}, and the launcher's {form.model_type} has {value!r}")
    values: dict[str, Any] = {}
    for ours, key in form.fields.items():
        if key not in theirs and key not in form.defaults:
            raise NotOurs(f"{key} is missing")
        values[ours] = theirs.get(key, form.defaults.get(key))
    model = ModelConfig(family=family, **values)
    model.ffn_hidden_size = model.ffn_hidden_size or 4 * model.hidden_size
    if family is Family.llama:
        model.rope_theta = _rope_theta(theirs)
        if (size := theirs.get("head_dim")) not in (None, model.hidden_size // model.num_heads):
            raise NotOurs(f"head_dim is {size}, and not hidden_size / num_attention_heads")
    return model


def _rope_theta(theirs: dict[str, Any]) -> float:
    # rope_parameters since transformers 5; before it rope_theta, and rope_scaling for anything special.
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise NotOurs(f"its rotary positions are scaled ({kind}), and the launcher's are not")
    return float(rope.get("rope_theta", theirs.get("rope_theta", 10000.0)))


def config_json(model: ModelConfig, dtype: str, base: dict[str, Any] | None) -> dict[str, Any]:
    """What from_pretrained needs; token ids and the like are taken over from `base`, where there is one."""
    form = FORMATS[model.family]
    ours: dict[str, Any] = {key: getattr(model, field) for field, key in form.fields.items()}
    if model.family is Family.llama:
        ours["num_key_value_heads"] = model.num_kv_heads or model.num_heads
        # The first for transformers 5, the second for those before it.
        ours["rope_parameters"] = {"rope_type": "default", "rope_theta": model.rope_theta}
        ours["rope_theta"] = model.rope_theta
    else:
        ours |= {"attn_pdrop": model.dropout, "embd_pdrop": model.dropout}
    # Their defaults are GPT-2's and Llama's own tokens, which another vocabulary may not have.
    kept = base or {"bos_token_id": None, "eos_token_id": None}
    return {
        **kept,
        "architectures": [form.architecture],
        "model_type": form.model_type,
        **form.fixed,
        **ours,
        "dtype": dtype,
    }


@dataclass(frozen=True)
class Entry:
    """One tensor of theirs: `box` of the logical tensor `ours`, or that box's transpose."""

    theirs: str
    ours: str
    box: Box
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.box.sizes[::-1] if self.transposed else self.box.sizes


def entries(model: ModelConfig) -> Iterator[Entry]:
    """Every tensor of theirs, in forward order; together they cover every logical tensor once."""
    yield from _llama(model) if model.family is Family.llama else _gpt2(model)


def _llama(m: ModelConfig) -> Iterator[Entry]:
    hidden, ffn = m.hidden_size, m.ffn_hidden_size
    kv = hidden // m.num_heads * (m.num_kv_heads or m.num_heads)
    yield Entry("model.embed_tokens.weight", "embedding.weight", whole((m.vocab_size, hidden)))
    for index in range(m.num_layers):
        layer, block = f"model.layers.{index}", f"blocks.{index}"
        yield Entry(f"{layer}.input_layernorm.weight", f"{block}.attention_norm.weight", whole((hidden,)))
        for name, start, rows in (("q", 0, hidden), ("k", hidden, kv), ("v", hidden + kv, kv)):
            box = Box((start, 0), (rows, hidden))
            yield Entry(f"{layer}.self_attn.{name}_proj.weight", f"{block}.attention.qkv.weight", box)
        yield Entry(
            f"{layer}.self_attn.o_proj.weight", f"{block}.attention.output.weight", whole((hidden, hidden))
        )
        yield Entry(f"{layer}.post_attention_layernorm.weight", f"{block}.mlp_norm.weight", whole((hidden,)))
        for name, start in (("gate", 0), ("up", ffn)):
            box = Box((start, 0), (ffn, hidden))
            yield Entry(f"{layer}.mlp.{name}_proj.weight", f"{block}.mlp.gate_up.weight", box)
        yield Entry(f"{layer}.mlp.down_proj.weight", f"{block}.mlp.down.weight", whole((hidden, ffn)))
    yield Entry("model.norm.weight", "final_norm.weight", whole((hidden,)))
    if not m.tie_embeddings:
        yield Entry("lm_head.weight", "head.weight", whole((m.vocab_size, hidden)))


def _gpt2(m: ModelConfig) -> Iterator[Entry]:
    hidden, ffn = m.hidden_size, m.ffn_hidden_size
    yield Entry("transformer.wte.weight", "embedding.weight", whole((m.vocab_size, hidden)))
    yield Entry("transformer.wpe.weight", "positions.weight", whole((m.max_sequence_length, hidden)))
    for index in range(m.num_layers):
        layer, block = f"transformer.h.{index}", f"blocks.{index}"
        yield from _norm(f"{layer}.ln_1", f"{block}.attention_norm", hidden)
        yield from _conv1d(f"{layer}.attn.c_attn", f"{block}.attention.qkv", 3 * hidden, hidden)
        yield from _conv1d(f"{layer}.attn.c_proj", f"{block}.attention.output", hidden, hidden)
        yield from _norm(f"{layer}.ln_2", f"{block}.mlp_norm", hidden)
        yield from _conv1d(f"{layer}.mlp.c_fc", f"{block}.mlp.up", ffn, hidden)
        yield from _conv1d(f"{layer}.mlp.c_proj", f"{block}.mlp.down", hidden, ffn)
    yield from _norm("transformer.ln_f", "final_norm", hidden)
    if not m.tie_embeddings:
        yield Entry("lm_head.weight", "head.weight", whole((m.vocab_size, hidden)))


def _norm(theirs: str, ours: str, size: int) -> Iterator[Entry]:
    for kind in ("weight", "bias"):
        yield Entry(f"{theirs}.{kind}", f"{ours}.{kind}", whole((size,)))


def _conv1d(theirs: str, ours: str, outputs: int, inputs: int) -> Iterator[Entry]:
    """GPT-2's projections keep their weights as (inputs, outputs)."""
    yield Entry(f"{theirs}.weight", f"{ours}.weight", whole((outputs, inputs)), transposed=True)
    yield Entry(f"{theirs}.bias", f"{ours}.bias", whole((outputs,)))


def plain_name(name: str, model: ModelConfig) -> str | None:
    """The name under which `entries` has a tensor found in a file; None for what holds no weight.

    OpenAI's own GPT-2 files lack the prefix, and have the causal mask beside the weights.
    """
    if name.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")):
        return None
    if name == "lm_head.weight":
        return None if model.tie_embeddings else name
    prefix = "model." if model.family is Family.llama else "transformer."
    return name if name.startswith(prefix) else prefix + name
