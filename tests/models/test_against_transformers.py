"""Our models against transformers from the same weights: logits, loss and gradients, also over two ranks.

This file maps the names and shapes of transformers to logical tensors by itself.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.config.numbers import IGNORED_LABEL
from launcher.config.schema import ModelConfig, PositionKind
from launcher.parallel.mesh import ProcessMesh
from launcher.parallel.sharding import logical_of, merge
from tests.distributed import mesh, pool
from tests.models.small import batch, build, by_name, small
from tests.parallel.shards import split

LOGITS_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 1e-4  # of a tensor's largest value

Weights = dict[str, Tensor]


def from_llama(theirs: Weights, layers: int) -> Weights:
    """Return the tensors of LlamaForCausalLM as ours. The map is linear, so it also maps gradients."""
    ours = {
        "embedding.weight": theirs["model.embed_tokens.weight"],
        "final_norm.weight": theirs["model.norm.weight"],
        "head.weight": theirs["lm_head.weight"],
    }
    for index in range(layers):
        block, layer = f"blocks.{index}", f"model.layers.{index}"
        q, k, v = (theirs[f"{layer}.self_attn.{x}_proj.weight"] for x in "qkv")
        gate, up = (theirs[f"{layer}.mlp.{x}_proj.weight"] for x in ("gate", "up"))
        ours |= {
            f"{block}.attention_norm.weight": theirs[f"{layer}.input_layernorm.weight"],
            f"{block}.attention.qkv.weight": torch.cat([q, k, v]),
            f"{block}.attention.output.weight": theirs[f"{layer}.self_attn.o_proj.weight"],
            f"{block}.mlp_norm.weight": theirs[f"{layer}.post_attention_layernorm.weight"],
            f"{block}.mlp.gate_up.weight": torch.cat([gate, up]),
            f"{block}.mlp.down.weight": theirs[f"{layer}.mlp.down_proj.weight"],
        }
    return ours


def from_gpt2(theirs: Weights, layers: int) -> Weights:
    """Return the tensors of GPT2LMHeadModel as ours. Its Conv1D weights are (inputs, outputs)."""
    names = {
        "attention_norm": "ln_1",
        "attention.qkv": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    ours = {
        "embedding.weight": theirs["transformer.wte.weight"],
        "positions.weight": theirs["transformer.wpe.weight"],
        "final_norm.weight": theirs["transformer.ln_f.weight"],
        "final_norm.bias": theirs["transformer.ln_f.bias"],
    }
    for index in range(layers):
        for mine, other in names.items():
            for kind in ("weight", "bias"):
                tensor = theirs[f"transformer.h.{index}.{other}.{kind}"]
                ours[f"blocks.{index}.{mine}.{kind}"] = tensor.T if tensor.dim() == 2 else tensor
    return ours


def transformers_llama(model: ModelConfig) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads,
            head_dim=model.head_size,
            intermediate_size=model.ffn_hidden_size,
            vocab_size=model.vocab_size,
            max_position_embeddings=model.max_sequence_length,
            rms_norm_eps=model.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
            tie_word_embeddings=model.tie_embeddings,
        )
    )


def transformers_gpt2(model: ModelConfig) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=model.hidden_size,
            n_layer=model.num_layers,
            n_head=model.num_heads,
            n_inner=model.ffn_hidden_size,
            vocab_size=model.vocab_size,
            n_positions=model.max_sequence_length,
            layer_norm_epsilon=model.norm_epsilon,
            tie_word_embeddings=model.tie_embeddings,
            embd_pdrop=model.dropout,
            attn_pdrop=model.dropout,
            resid_pdrop=model.dropout,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


Build = Callable[[ModelConfig], nn.Module]
THEIRS: dict[PositionKind, tuple[Build, Callable[[Weights, int], Weights]]] = {
    PositionKind.rope: (transformers_llama, from_llama),
    PositionKind.learned: (transformers_gpt2, from_gpt2),
}
# Query heads and vocabulary that two and four ranks split evenly, and not; heads shared, and not.
MODELS = {
    "llama": small("llama"),
    "llama, even vocabulary, no grouping": small("llama", vocab_size=64, num_kv_heads=None),
    "llama, one KV head to four": small("llama", num_kv_heads=2),
    "llama, larger heads": small("llama", head_size=6),
    "gpt": small("gpt"),
    "gpt, even vocabulary": small("gpt", vocab_size=64),
}
models = pytest.mark.parametrize("name", MODELS)


def with_all_weights_random(theirs: nn.Module) -> nn.Module:
    """Randomise norms and biases too, which start at ones and zeros."""
    torch.manual_seed(7)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    return theirs


@cache
def reference(name: str) -> tuple[Weights, Tensor, float, Weights]:
    """Return weights by our names, and the logits, loss and gradients of transformers."""
    model = MODELS[name]
    make, ours = THEIRS[model.positions]
    theirs = with_all_weights_random(make(model)).eval()
    tokens, labels = batch(model.vocab_size)
    result = theirs(tokens, labels=labels, shift_labels=labels)
    result.loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    weights = {name: p.detach() for name, p in theirs.named_parameters()}
    layers = model.num_layers
    return ours(weights, layers), result.logits.detach(), result.loss.item(), ours(gradients, layers)


def with_weights(
    model: ModelConfig, weights: Weights, ranks: ProcessMesh | None = None, *, sequence_parallel: bool = False
) -> Any:
    """Return our model with this rank's shards of all weights."""
    ours = build(model, ranks, sequence_parallel=sequence_parallel)
    parameters = by_name(ours)
    assert parameters.keys() == weights.keys()
    axis = (ranks or ProcessMesh.single()).tensor
    for name, parameter in parameters.items():
        assert tuple(weights[name].shape) == logical_of(parameter).shape, name
        parameter.data.copy_(split(weights[name], logical_of(parameter), axis))
    return ours


def assert_gradients(actual: Weights, expected: Weights) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        atol = GRADIENT_TOLERANCE * float(gradient.abs().max())
        assert float((actual[name] - gradient).abs().max()) <= atol, name


@models
def test_on_one_process(name: str) -> None:
    weights, logits, loss, gradients = reference(name)
    model = MODELS[name]
    ours = with_weights(model, weights)
    tokens, labels = batch(model.vocab_size)
    torch.testing.assert_close(ours.logits(tokens), logits, rtol=0, atol=LOGITS_TOLERANCE)
    ours.loss.labels_per_micro_batch = int((labels != IGNORED_LABEL).sum())
    our_loss = ours(tokens, labels)
    assert our_loss.item() == pytest.approx(loss, abs=1e-5)
    our_loss.backward()
    assert_gradients({n: p.grad for n, p in by_name(ours).items() if p.grad is not None}, gradients)


Split = tuple[Tensor, float, Weights]


def of_rank(rank: int, world: int, model: ModelConfig, weights: Weights, sequence_parallel: bool) -> Split:
    """Return logits gathered over the ranks, the loss and this rank's gradients."""
    ranks = mesh(tensor=world)
    ours = with_weights(model, weights, ranks, sequence_parallel=sequence_parallel)
    tokens, labels = batch(model.vocab_size)
    mine = ours.logits(tokens)
    parts = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(parts, mine.detach().contiguous(), group=ranks.tensor.group)
    ours.loss.labels_per_micro_batch = int((labels != IGNORED_LABEL).sum())
    loss = ours(tokens, labels)
    loss.backward()
    own = {name: p.grad for name, p in by_name(ours).items() if p.grad is not None}
    return torch.cat(parts, dim=-1)[..., : model.vocab_size], loss.item(), own


@models
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_over_two_tensor_ranks(name: str, sequence_parallel: bool) -> None:
    weights, logits, loss, gradients = reference(name)
    model = MODELS[name]
    found = pool(2).run(of_rank, model, weights, sequence_parallel)
    for our_logits, our_loss, _ in found:
        torch.testing.assert_close(our_logits, logits, rtol=0, atol=LOGITS_TOLERANCE)
        assert our_loss == pytest.approx(loss, abs=1e-5)
    logicals = {name: logical_of(p) for name, p in by_name(build(model)).items()}
    merged = {name: merge([own[name] for *_, own in found], logicals[name]) for name in gradients}
    assert_gradients(merged, gradients)


def test_dropout_is_where_gpt2_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor replaces dropout in both models, so that a dropout in only one of them shows."""
    attention = F.scaled_dot_product_attention

    def attend(*inputs: Any, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:
        return attention(*inputs, **kwargs) * (1 + dropout_p)

    def drop(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * (1 + p) if training else x

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(F, "dropout", drop)
    model = small("gpt", dropout=0.3)
    theirs = with_all_weights_random(transformers_gpt2(model)).train()
    ours = with_weights(model, from_gpt2(dict(theirs.named_parameters()), model.num_layers))
    tokens, _ = batch(model.vocab_size)
    torch.testing.assert_close(ours.logits(tokens), theirs(tokens).logits, rtol=0, atol=LOGITS_TOLERANCE)
    assert (ours.eval().logits(tokens) - theirs(tokens).logits).abs().max() > 100 * LOGITS_TOLERANCE


# What the comparison is worth: each of these small misreadings of the other's format has to show.


def swap_gate_and_up(weights: Weights) -> Weights:
    return {n: torch.cat(w.chunk(2)[::-1]) if "gate_up" in n else w for n, w in weights.items()}


def swap_keys_and_values(weights: Weights) -> Weights:
    def swapped(w: Tensor) -> Tensor:
        q, k, v = w.split([32, 16, 16])
        return torch.cat([q, v, k])

    return {n: swapped(w) if "qkv" in n else w for n, w in weights.items()}


def interleave_rotary(weights: Weights) -> Weights:
    """Reorder queries as in the original Llama, whose rotary pairs are neighbours (head size 4)."""

    def interleaved(w: Tensor) -> Tensor:
        q, rest = w.split([32, 32])
        return torch.cat([q.unflatten(0, (8, 2, 2)).transpose(1, 2).flatten(0, 2), rest])

    return {n: interleaved(w) if "qkv" in n else w for n, w in weights.items()}


@pytest.mark.parametrize("misread", [swap_gate_and_up, swap_keys_and_values, interleave_rotary])
def test_the_comparison_sees(misread: Callable[[Weights], Weights]) -> None:
    weights, logits, _, _ = reference("llama")
    ours = with_weights(MODELS["llama"], misread(weights))
    assert (ours.logits(batch(61)[0]) - logits).abs().max() > 100 * LOGITS_TOLERANCE


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"rope_theta": 10000.0}),
        ("llama", {"norm_epsilon": 1e-2}),
        ("gpt", {"norm_epsilon": 1e-2}),
    ],
)
def test_the_comparison_sees_a_setting(name: str, change: dict[str, float]) -> None:
    weights, logits, _, _ = reference(name)
    model = small(name, **change)
    assert (with_weights(model, weights).logits(batch(61)[0]) - logits).abs().max() > 10 * LOGITS_TOLERANCE
