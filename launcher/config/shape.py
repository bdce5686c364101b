"""Sizes that follow from a run's model and data. Shared by validation, layout, layers and planner."""

import math
from collections.abc import Sequence
from fractions import Fraction

from launcher.config.schema import (
    CorpusSource,
    InputKind,
    MLPKind,
    ModelConfig,
    NormPlacement,
    PipelineSchedule,
    Pooling,
    PositionKind,
    QueryKeyNorm,
    RunConfig,
)

END_OF_TEXT = 0  # the byte that ends each file of text
LONGEST_PERIOD = 100_000  # samples until a blend repeats; made in a quarter of a second when a run starts
ROUNDING = 1e-3  # the largest relative error of a share of a blend whose exact period would be longer


def kv_heads(model: ModelConfig) -> int:
    """Return the number of key/value heads, K."""
    return model.num_kv_heads or model.num_heads


def head_size(model: ModelConfig) -> int:
    """Return the channels per attention head, D."""
    return model.head_size or model.hidden_size // model.num_heads


def qkv_sizes(model: ModelConfig) -> tuple[int, int, int]:
    """Return the channels of all queries, keys and values: (N D, K D, K D)."""
    size = head_size(model)
    return model.num_heads * size, kv_heads(model) * size, kv_heads(model) * size


def query_key_norm_sizes(model: ModelConfig) -> tuple[int, ...]:
    """Return the lengths of the weights of the norms of queries and of keys, if there are any."""
    if model.query_key_norm is QueryKeyNorm.none:
        return ()
    return (head_size(model),) * 2 if model.query_key_norm is QueryKeyNorm.head else qkv_sizes(model)[:2]


def is_gated(model: ModelConfig) -> bool:
    """Return whether the MLP has a gate beside its up projection."""
    return model.mlp in (MLPKind.swiglu, MLPKind.geglu)


def has_experts(model: ModelConfig) -> bool:
    """Return whether the model is a mixture of experts."""
    return model.experts.count > 0


def layer_has_experts(model: ModelConfig, layer: int) -> bool:
    """Return whether a layer, counted from 0, has experts in place of the MLP."""
    e = model.experts
    sparse = layer - e.first_dense_layers + 1
    return has_experts(model) and sparse > 0 and sparse % e.every == 0


def expert_layers(model: ModelConfig) -> int:
    """Return the number of layers with experts."""
    e = model.experts
    return max(0, model.num_layers - e.first_dense_layers) // e.every if has_experts(model) else 0


def has_dense_mlp(model: ModelConfig) -> bool:
    """Return whether a layer has an MLP of model.ffn_hidden_size."""
    return expert_layers(model) < model.num_layers


def rotary_size(model: ModelConfig) -> int:
    """Return the rotated channels of a head, counted from the first: an even number."""
    return int(head_size(model) * model.rotary_fraction) // 2 * 2


def window_of(model: ModelConfig, layer: int) -> int | None:
    """Return the sliding window of a layer, which is counted from 0; None if it attends to all positions."""
    every = model.full_attention_every
    return None if every is not None and (layer + 1) % every == 0 else model.sliding_window


def windows(model: ModelConfig) -> set[int | None]:
    """Return the different windows of a model's layers."""
    if model.sliding_window is None:
        return {None}
    return {window_of(model, layer) for layer in range(model.num_layers)}


def has_norm_before(model: ModelConfig) -> bool:
    """Return whether attention and MLP have a norm at their input."""
    return model.norm_placement is not NormPlacement.post


def has_norm_after(model: ModelConfig) -> bool:
    """Return whether attention and MLP have a norm at their output."""
    return model.norm_placement is not NormPlacement.pre


def lora_segments(model: ModelConfig) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return, by target of LoRA, the inputs of the projection and the outputs of each of its adapters."""
    h, f, qkv = model.hidden_size, model.ffn_hidden_size, qkv_sizes(model)
    up = (f, f) if is_gated(model) else (f,)
    return {"qkv": (h, qkv), "output": (qkv[0], (h,)), "up": (h, up), "down": (f, (h,))}


def has_lora(run: RunConfig) -> bool:
    return bool(run.finetune.lora.rank)


def has_class_token(model: ModelConfig) -> bool:
    return model.inputs is InputKind.patches and model.pooling is Pooling.class_token


def position_count(model: ModelConfig) -> int:
    """Return the longest sequence the model takes; learned positions have a vector for each place."""
    return vision_tokens(model) if model.inputs is InputKind.patches else model.max_sequence_length


def sequence_length(run: RunConfig) -> int:
    """Return the tokens per sample, T."""
    if run.model.inputs is InputKind.patches:
        return vision_tokens(run.model)
    return run.data.sequence_length or run.model.max_sequence_length


def vision_tokens(model: ModelConfig) -> int:
    """Return the number of patches of an image, plus 1 for a class token."""
    patches: int = (model.image_size // model.patch_size) ** 2
    return patches + has_class_token(model)


def output_size(model: ModelConfig) -> int:
    """Return the number of logits per position: tokens or classes."""
    return model.num_classes if model.inputs is InputKind.patches else model.vocab_size


def vocabulary_multiple(run: RunConfig, device: str) -> int:
    """Return the number that divides the logits of a tensor rank, with padding; `device` is cpu or cuda.

    Tensor cores multiply 50257 columns at an eighth of the speed of 50304 (H100, bf16, measured). Classes of
    images are few and are not padded for speed.
    """
    if run.model.inputs is InputKind.patches:
        return 1
    return run.parallelism.vocabulary_multiple or (128 if device == "cuda" else 1)


def end_of_document(run: RunConfig) -> int | None:
    """Return the token that ends each document; None where it is not known."""
    end = run.data.end_of_document
    return END_OF_TEXT if end is None and run.data.source is not CorpusSource.tokens else end


def is_of_images(run: RunConfig) -> bool:
    return run.data.source in (CorpusSource.digits, CorpusSource.image_folder)


def may_read_token_files(run: RunConfig) -> bool:
    return run.data.source in (CorpusSource.tokens, CorpusSource.chat)


def stages_per_rank(run: RunConfig) -> int:
    """Return the number of pipeline stages that a rank holds."""
    return 2 if run.parallelism.pipeline_schedule is PipelineSchedule.dualpipev else 1


def least_micro_batches(run: RunConfig) -> int:
    """Return the minimum of micro-batches per step for the pipeline schedule."""
    return 1 if stages_per_rank(run) == 1 else 2 * run.parallelism.pipeline


def legal_tensor_sizes(run: RunConfig) -> list[int]:
    """Return the tensor-parallel sizes that divide heads, FFN and sequence, ascending."""
    m, split = run.model, run.parallelism.sequence_parallel
    columns = m.ffn_hidden_size if has_dense_mlp(m) else 0, m.experts.ffn_hidden_size
    sizes = divisors(math.gcd(m.num_heads, kv_heads(m), *columns))
    return [size for size in sizes if size > 1 and sequence_length(run) % size == 0] if split else sizes


def legal_pipeline_sizes(run: RunConfig) -> list[int]:
    """Return the pipeline sizes that the layers can fill and that ZeRO allows."""
    if run.parallelism.zero_stage > 1:
        return [1]
    stages = stages_per_rank(run)
    return list(range(stages, run.model.num_layers // stages + 1))


def legal_heads(run: RunConfig) -> list[int]:
    """Return the numbers of heads that fit the model's other sizes and the tensor-parallel size."""
    m, multiple = run.model, math.lcm(run.model.num_kv_heads or 1, run.parallelism.tensor)
    fitting = [heads for heads in divisors(m.hidden_size) if heads % multiple == 0]
    return [heads for heads in fitting if m.hidden_size // heads % head_size_multiple(run) == 0]


def head_size_multiple(run: RunConfig) -> int:
    """Return 2 for rotary positions, which rotate pairs of channels, else 1."""
    return 2 if run.model.positions is PositionKind.rope else 1


def whole_weights(weights: Sequence[float]) -> list[int]:
    """Return the smallest integers in the same ratio; 0.1 means exactly 1/10."""
    typed = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in typed))
    whole = [int(weight * scale) for weight in typed]
    return [number // math.gcd(*whole) for number in whole]


def blend_weights(weights: Sequence[float]) -> list[int]:
    """Return integers of sum at most LONGEST_PERIOD in the same ratio, with an error of at most 0.1% each.

    Where there are none, return the exact integers, whose sum is larger.
    """
    exact, total = whole_weights(weights), sum(weights)
    rounded = [round(weight / total * LONGEST_PERIOD) for weight in weights]
    is_close = all(
        abs(number * total - weight * sum(rounded)) <= ROUNDING * weight * sum(rounded)
        for number, weight in zip(rounded, weights, strict=True)
    )
    if sum(exact) <= LONGEST_PERIOD or sum(rounded) > LONGEST_PERIOD or not is_close:
        return exact
    return [number // math.gcd(*rounded) for number in rounded]


def divisors(n: int) -> list[int]:
    """Return the divisors of n > 0, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]


def multiples_around(n: int, factor: int) -> list[int]:
    """Return the positive multiples of `factor` just below (or at) and just above n."""
    below = n // factor * factor
    return [multiple for multiple in (below, below + factor) if multiple]


def nearest(options: list[int], value: int, count: int = 2) -> list[int]:
    """Return the `count` options closest to `value`, ascending."""
    return sorted(sorted(options, key=lambda option: (abs(option - value), option))[:count])
