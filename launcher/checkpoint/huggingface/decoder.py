"""The tensor names that Llama introduced, and the converters of the model types that use them."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from launcher.checkpoint.huggingface.converter import (
    TEXT,
    Converter,
    Entry,
    NotConvertible,
    head,
    matrix,
    vector,
)
from launcher.checkpoint.huggingface.rope import read_rope, write_rope
from launcher.config.schema import BiasesConfig, MLPKind, ModelConfig, NormKind, PositionKind
from launcher.config.shape import (
    has_norm_after,
    has_norm_before,
    head_size,
    kv_heads,
    layer_has_experts,
    qkv_sizes,
    query_key_norm_sizes,
    window_of,
)

Settings = dict[str, Any]
Read = Callable[[Settings], Settings]
Write = Callable[[ModelConfig], Settings]
ExpertEntries = Callable[[ModelConfig, str, str], Iterator[Entry]]  # of their layer and our block
SWIGLU = {"norm": NormKind.rms_norm, "positions": PositionKind.rope, "mlp": MLPKind.swiglu}
NO_BIASES = BiasesConfig(qkv=False, output=False, up=False, down=False, head=False)


def decoder(
    title: str,
    model_type: str,
    architecture: str,
    *,
    parts: Settings | None = None,
    free: tuple[str, ...] = (),
    settings: dict[str, str] | None = None,
    defaults: Settings | None = None,
    fixed: Settings | None = None,
    derived: tuple[str, ...] = (),
    read: Read = read_rope,
    write: Write = write_rope,
    implied: Callable[[ModelConfig], Settings] = lambda _: {},
    default_head_size: int | None = None,
    added: float = 0.0,
    experts: ExpertEntries | None = None,
    inside: tuple[tuple[str, str], ...] = (),
    left_out: tuple[str, ...] = (),
    heads_divide: bool = False,
) -> Converter:
    """Return the converter of a model type with Llama's tensor names; the arguments state how it differs.

    `parts` are further parts, and `free` those that `read` and `write` handle. `added` is what our norm
    weights have more than theirs. `experts` yields the router and the experts of a layer.
    `default_head_size` is the meaning of an absent head_dim; None: the hidden size over the heads.
    """
    all_parts = {**TEXT, **SWIGLU, "biases": NO_BIASES, **(parts or {})}
    if "head_size" not in derived:
        read, write = _with_head_size(read, write, default_head_size)
    return Converter(
        title=title,
        model_type=model_type,
        architecture=architecture,
        prefix="model.",
        parts={name: value for name, value in all_parts.items() if name not in {*(settings or {}), *free}},
        settings={**SETTINGS, **(settings or {})},
        defaults={**DEFAULTS, **(defaults or {})},
        fixed={"hidden_act": "silu"} if fixed is None else fixed,
        derived=derived,
        entries=partial(entries, added=added, experts=experts),
        read=read,
        write=lambda m: {"num_key_value_heads": kv_heads(m), **write(m)},
        implied=implied,
        inside=inside,
        left_out=left_out,
        heads_divide=heads_divide,
    )


def _with_head_size(read: Read, write: Write, default: int | None) -> tuple[Read, Write]:
    """Return `read` and `write` extended by the size of a head; `default` is as in `decoder`."""
    return (
        lambda theirs: {"head_size": _head_size(theirs, default), **read(theirs)},
        lambda m: {"head_dim": head_size(m), **write(m)},
    )


SETTINGS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_sequence_length": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "norm_epsilon": "rms_norm_eps",
}
DEFAULTS: Settings = {"num_key_value_heads": None, "tie_word_embeddings": False, "rms_norm_eps": 1e-6}


def _head_size(theirs: Settings, default: int | None) -> int | None:
    size, heads = theirs.get("head_dim") or default, theirs["num_attention_heads"]
    return None if size is None or size * heads == theirs["hidden_size"] else size


def entries(m: ModelConfig, added: float, experts: ExpertEntries | None = None) -> Iterator[Entry]:
    h = m.hidden_size
    yield matrix("model.embed_tokens.weight", "embedding.weight", m.vocab_size, h)
    for index in range(m.num_layers):
        layer, block = f"model.layers.{index}", f"blocks.{index}"
        norms = _norms(m, layer, block, added)
        yield from norms[:1] if has_norm_before(m) else []
        yield from _attention(m, f"{layer}.self_attn", f"{block}.attention", added)
        yield from norms[1:2] if has_norm_before(m) else norms[:1]
        yield from norms[2:3]
        is_sparse = experts is not None and layer_has_experts(m, index)
        yield from experts(m, layer, block) if experts is not None and is_sparse else _mlp(m, layer, block)
        yield from norms[3:] if has_norm_before(m) else norms[1:]
    yield vector("model.norm.weight", "final_norm.weight", h, added=added)
    yield from head(m)


def _mlp(m: ModelConfig, layer: str, block: str) -> Iterator[Entry]:
    h, f = m.hidden_size, m.ffn_hidden_size
    for name, first in (("gate", 0), ("up", f)):
        yield matrix(f"{layer}.mlp.{name}_proj.weight", f"{block}.mlp.gate_up.weight", f, h, first)
    yield matrix(f"{layer}.mlp.down_proj.weight", f"{block}.mlp.down.weight", h, f)


def _norms(m: ModelConfig, layer: str, block: str, added: float) -> list[Entry]:
    """Return the norms of a block in forward order. Without a norm after, Llama names the second one post."""
    names = {"input_layernorm": "attention_norm"} if has_norm_before(m) else {}
    if has_norm_after(m):
        names["post_attention_layernorm"] = "attention_output_norm"
        if has_norm_before(m):
            names["pre_feedforward_layernorm"] = "mlp_norm"
        names["post_feedforward_layernorm"] = "mlp_output_norm"
    else:
        names["post_attention_layernorm"] = "mlp_norm"
    weights = {f"{layer}.{theirs}.weight": f"{block}.{ours}.weight" for theirs, ours in names.items()}
    return [vector(theirs, ours, m.hidden_size, added=added) for theirs, ours in weights.items()]


def _attention(m: ModelConfig, theirs: str, ours: str, added: float) -> Iterator[Entry]:
    first = 0
    for name, rows in zip("qkv", qkv_sizes(m), strict=True):
        yield matrix(f"{theirs}.{name}_proj.weight", f"{ours}.qkv.weight", rows, m.hidden_size, first)
        if m.biases.qkv:
            yield vector(f"{theirs}.{name}_proj.bias", f"{ours}.qkv.bias", rows, first)
        first += rows
    for name, size in zip(("query", "key"), query_key_norm_sizes(m), strict=False):
        yield vector(f"{theirs}.{name[0]}_norm.weight", f"{ours}.{name}_norm.weight", size, added=added)
    yield matrix(f"{theirs}.o_proj.weight", f"{ours}.output.weight", m.hidden_size, qkv_sizes(m)[0])


SLIDING, FULL = "sliding_attention", "full_attention"


def read_windows(theirs: Settings, default_every: int, window: int) -> Settings:
    """Return our fields of alternating windows. Raises NotConvertible for a pattern that we do not have."""
    layers = theirs["num_hidden_layers"]
    every = theirs.get("sliding_window_pattern") or default_every
    kinds = theirs.get("layer_types") or [SLIDING if (i + 1) % every else FULL for i in range(layers)]
    full = [index for index, kind in enumerate(kinds) if kind == FULL]
    every = full[0] + 1 if full else layers + 1
    if kinds != [SLIDING if (i + 1) % every else FULL for i in range(layers)]:
        raise NotConvertible("layer_types is not a pattern with full attention in every n-th layer")
    if every == 1:
        return {"sliding_window": None, "full_attention_every": None}
    sliding = theirs.get("sliding_window", window)
    return {"sliding_window": sliding, "full_attention_every": every if full else None}


def write_windows(m: ModelConfig) -> Settings:
    kinds = [FULL if window_of(m, layer) is None else SLIDING for layer in range(m.num_layers)]
    # transformers wants a number, also where no layer uses it.
    return {"sliding_window": m.sliding_window or m.max_sequence_length, "layer_types": kinds}
