"""Hugging Face's Mixtral and Qwen3-MoE: Llama's tensor names, with a router and experts in place of the MLP.

Their load-balancing loss is over a batch and ours of each sequence (docs/experts.md), so that its factor is
not imported. transformers adds the loss only if output_router_logits is set.
"""

from collections.abc import Iterator
from typing import Any

from launcher.checkpoint.huggingface.converter import Entry, NotConvertible, matrix
from launcher.checkpoint.huggingface.decoder import decoder
from launcher.checkpoint.huggingface.rope import read_rope, write_rope
from launcher.config.schema import ExpertsConfig, ModelConfig, QueryKeyNorm
from launcher.config.shape import layer_has_experts

Settings = dict[str, Any]


def _experts(m: ModelConfig, layer: str, ours: str, names: tuple[str, str, str]) -> Iterator[Entry]:
    """Yield the router and the experts; `names` are theirs of gate, up and down projection."""
    e, h, (gate, up, down) = m.experts, m.hidden_size, names
    f = e.ffn_hidden_size
    yield matrix(f"{layer}.gate.weight", f"{ours}.router.weight", e.count, h)
    for expert in range(e.count):
        theirs, first = f"{layer}.experts.{expert}", 2 * f * expert
        yield matrix(f"{theirs}.{gate}.weight", f"{ours}.experts.gate_up.weight", f, h, first)
        yield matrix(f"{theirs}.{up}.weight", f"{ours}.experts.gate_up.weight", f, h, first + f)
        yield matrix(f"{theirs}.{down}.weight", f"{ours}.experts.down.weight", h, f, h * expert)


def _only_in_training(m: ModelConfig) -> Settings:
    """Return the settings that change no logits."""
    return {"auxiliary_loss": m.experts.auxiliary_loss, "z_loss": m.experts.z_loss}


def _mixtral_experts(m: ModelConfig, layer: str, block: str) -> Iterator[Entry]:
    return _experts(m, f"{layer}.block_sparse_moe", f"{block}.mlp", ("w1", "w3", "w2"))


def _read_mixtral(theirs: Settings) -> Settings:
    experts = ExpertsConfig(
        count=theirs["num_local_experts"],
        top_k=theirs["num_experts_per_tok"],
        ffn_hidden_size=theirs["intermediate_size"],
    )
    return {**read_rope(theirs, 1e6), "experts": experts}


def _write_mixtral(m: ModelConfig) -> Settings:
    e = m.experts
    experts = {"num_local_experts": e.count, "num_experts_per_tok": e.top_k}
    return {**write_rope(m), **experts, "router_aux_loss_coef": e.auxiliary_loss}


def _mixtral_implied(m: ModelConfig) -> Settings:
    count, top_k = max(1, m.experts.count), max(1, m.experts.top_k)
    return {"experts": ExpertsConfig(count, top_k, m.ffn_hidden_size, **_only_in_training(m))}


def _qwen_experts(m: ModelConfig, layer: str, block: str) -> Iterator[Entry]:
    return _experts(m, f"{layer}.mlp", f"{block}.mlp", ("gate_proj", "up_proj", "down_proj"))


def _read_qwen(theirs: Settings) -> Settings:
    layers, step = theirs["num_hidden_layers"], theirs.get("decoder_sparse_step") or 1
    dense = theirs.get("mlp_only_layers") or []
    sparse = [layer not in dense and (layer + 1) % step == 0 for layer in range(layers)]
    first, every = _pattern(sparse)
    experts = ExpertsConfig(
        count=theirs["num_experts"] if "num_experts" in theirs else theirs["num_local_experts"],
        top_k=theirs["num_experts_per_tok"],
        ffn_hidden_size=theirs["moe_intermediate_size"],
        first_dense_layers=first,
        every=every,
        normalize_top_k=theirs.get("norm_topk_prob", False),
    )
    return {**read_rope(theirs), "experts": experts}


def _pattern(sparse: list[bool]) -> tuple[int, int]:
    """Return the number of first dense layers, and n of `every n-th`. Raises NotConvertible."""
    for every in range(1, len(sparse) + 1):
        for first in range(len(sparse)):
            if sparse == [i >= first and (i - first + 1) % every == 0 for i in range(len(sparse))]:
                return first, every
    raise NotConvertible("its layers with experts are not every n-th layer after the first dense ones")


def _write_qwen(m: ModelConfig) -> Settings:
    e = m.experts
    return {
        **write_rope(m),
        "num_experts": e.count,
        "num_experts_per_tok": e.top_k,
        "moe_intermediate_size": e.ffn_hidden_size,
        "norm_topk_prob": e.normalize_top_k,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(m.num_layers) if not layer_has_experts(m, i)],
        "router_aux_loss_coef": e.auxiliary_loss,
    }


def _qwen_implied(m: ModelConfig) -> Settings:
    e = m.experts
    sizes = max(1, e.count), max(1, e.top_k), max(1, e.ffn_hidden_size), 0, e.first_dense_layers, e.every
    routing = {"normalize_top_k": e.normalize_top_k, **_only_in_training(m)}
    return {"experts": ExpertsConfig(*sizes, **routing)}


MIXTRAL = decoder(
    "Mixtral", "mixtral", "MixtralForCausalLM",
    settings={"sliding_window": "sliding_window"}, defaults={"sliding_window": None, "rms_norm_eps": 1e-5},
    free=("experts",), read=_read_mixtral, write=_write_mixtral, implied=_mixtral_implied,
    experts=_mixtral_experts,
)  # fmt: skip

QWEN3_MOE = decoder(
    "Qwen3-MoE", "qwen3_moe", "Qwen3MoeForCausalLM",
    parts={"query_key_norm": QueryKeyNorm.head},
    fixed={"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
    free=("experts",), read=_read_qwen, write=_write_qwen, implied=_qwen_implied, experts=_qwen_experts,
)  # fmt: skip
