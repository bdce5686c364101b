"""Shrink a run to laptop size and keep the kind of everything that can break. Pure."""

import copy
import math
from dataclasses import fields

from launcher.config.errors import as_typed
from launcher.config.layout import Layout
from launcher.config.schema import (
    ContextMethod,
    CorpusSource,
    Device,
    Dtype,
    InputKind,
    ModelConfig,
    Pooling,
    RunConfig,
    SchedulerConfig,
    SchedulerName,
)
from launcher.config.shape import head_size, kv_heads, output_size, sequence_length, stages_per_rank

MOST_RANKS = 8  # on CPU; on GPUs one for each
HEAD_SIZE, MANY_HEADS = 8, 16  # above so many, heads are half the size
SEQUENCE_PER_RANK = 8
BLOCKS_PER_STAGE = 2
VOCABULARY = 256
CLASSES = 10
LORA_RANK = 3


def shrink(run: RunConfig, layout: Layout, *, gpus: int = 0) -> tuple[RunConfig, list[str]]:
    """Return the small run and the changed fields, a line each: `old -> new`.

    Kept: the model's parts, every axis above 1 (at most 8 ranks in all), ZeRO stage, sequence parallelism,
    checkpointing, offload, tying, accumulation above 1, grouped KV heads, a head size that is not
    hidden_size / num_heads, layers that do not divide over the stages, vocabularies that do not divide over
    the tensor ranks, active gradient clipping. The small run uses `gpus` GPUs of this machine, or its CPU.
    """
    small = copy.deepcopy(run)
    p, most = small.parallelism, min(gpus, MOST_RANKS) if gpus else MOST_RANKS
    axes = layout.pipeline, layout.data, layout.tensor, layout.context
    p.pipeline, p.data, p.tensor, p.context = shrunk_axes(*axes, most=most)
    _shrink_model(small, run, layout)
    _shrink_training(small, layout)
    if run.precision.dtype is Dtype.fp16:
        small.precision.dtype = Dtype.fp32  # DeepSpeed trains fp16 on GPUs only
    small.hardware.device = Device.cuda if gpus else Device.cpu
    small.hardware.nodes, small.hardware.accelerators_per_node = 1, None
    if small.parallelism.zero_stage == 3:
        # At the default threshold every weight of a small model would stay whole on every rank.
        small.deepspeed.setdefault("zero_optimization", {})["stage3_param_persistence_threshold"] = 0
    return small, _changes(run, small)


def shrunk_axes(*axes: int, most: int = MOST_RANKS) -> tuple[int, ...]:
    """Return the axes, of which the largest is halved until all fit in `most` ranks."""
    small = list(axes)
    while math.prod(small) > most and max(small) > 2:
        largest = max(range(len(small)), key=lambda axis: small[axis])
        small[largest] = max(2, small[largest] // 2)
    return tuple(small)


def _shrink_model(small: RunConfig, run: RunConfig, layout: Layout) -> None:
    m, tensor, stages = small.model, small.parallelism.tensor, small.parallelism.pipeline
    heads_per_kv_head = min(2, run.model.num_heads // kv_heads(run.model))
    kv_heads_per_rank = min(2, kv_heads(run.model) // layout.tensor)
    if run.parallelism.context_method is ContextMethod.ulysses:
        # Each context rank has query heads of its own, and key/value heads perhaps not.
        context, heads = small.parallelism.context, heads_per_kv_head * kv_heads_per_rank
        if heads_per_kv_head > 1:
            heads_per_kv_head *= context // math.gcd(heads, context)
        else:
            kv_heads_per_rank *= context // math.gcd(heads, context)
    small_kv_heads = tensor * kv_heads_per_rank
    m.num_heads = small_kv_heads * heads_per_kv_head
    m.num_kv_heads = None if run.model.num_kv_heads is None else small_kv_heads
    per_head = HEAD_SIZE if m.num_heads <= MANY_HEADS else HEAD_SIZE // 2
    m.hidden_size = per_head * m.num_heads
    if m.head_size is not None:
        fills = head_size(run.model) * run.model.num_heads == run.model.hidden_size
        m.head_size = per_head if fills else per_head * 3 // 2
    m.ffn_hidden_size = tensor * (m.hidden_size // tensor + 3)
    uneven = run.model.num_layers % (layout.pipeline * stages_per_rank(run)) != 0
    m.num_layers = stages * BLOCKS_PER_STAGE + (1 if uneven else 0)
    divides = output_size(run.model) % layout.tensor == 0
    if m.inputs is InputKind.patches:
        m.num_classes = -(-CLASSES // tensor) * tensor + (0 if divides else 1)
        # With a class token, only an odd side can make the sequence divide by the tensor ranks.
        odd = m.pooling is Pooling.class_token and small.parallelism.sequence_parallel
        m.patch_size = min(2, m.patch_size)
        m.image_size = m.patch_size * (3 if odd else 4)
    else:
        m.vocab_size = -(-VOCABULARY // tensor) * tensor + (0 if divides else 1)
        parts = tensor * small.parallelism.context
        m.max_sequence_length = parts * max(SEQUENCE_PER_RANK, 16 // parts)
        whole = sequence_length(run) == run.model.max_sequence_length
        small.data.sequence_length = None if whole else parts * 4
    if small.data.end_of_document is not None or small.data.source is CorpusSource.tokens:
        small.data.end_of_document = 0
    _shrink_attention(small, run)
    # At the usual 0.02 the blocks of a small model add almost nothing to the residual stream.
    m.init_std = 0.1


def _shrink_attention(small: RunConfig, run: RunConfig) -> None:
    """Make windows, scaled positions and soft caps such that they change the numbers of short sequences."""
    m, length = small.model, sequence_length(small)
    if m.sliding_window is not None:
        m.sliding_window = max(1, 3 * length // 8)
    if m.full_attention_every is not None:
        m.full_attention_every = min(2, m.full_attention_every)
    if m.rope_scaling.original_length is not None:
        m.rope_scaling.original_length = max(1, length // 2)
    if m.attention_scale_size is not None:
        m.attention_scale_size *= head_size(m) / head_size(run.model)
    for name in ("attention_soft_cap", "logit_soft_cap"):
        if getattr(m, name) is not None:
            setattr(m, name, min(1.0, getattr(m, name)))
    m.embedding_scale = min(8.0, m.embedding_scale)


def _shrink_training(small: RunConfig, layout: Layout) -> None:
    t, p = small.training, small.parallelism
    assert p.data is not None
    # Odd, so that a wrong factor of it is not mistaken for an axis: most axes are powers of two.
    accumulation = 1 if layout.accumulation == 1 else 2 * p.pipeline + 1
    t.micro_batch_size = min(2, t.micro_batch_size)
    t.global_batch_size = t.micro_batch_size * p.data * accumulation
    t.steps, t.stop_at = small.verify.steps, None
    lora = small.finetune.lora
    if lora.rank and lora.rank > LORA_RANK:
        # alpha / rank stays.
        lora.rank, lora.alpha = LORA_RANK, lora.alpha * LORA_RANK / lora.rank
    # Every step uses optimizer.lr.
    small.scheduler = SchedulerConfig(name=SchedulerName.constant)
    if small.optimizer.gradient_clipping is not None:
        # A tiny model's gradient norm may be below the run's limit, and clipping would go untested.
        small.optimizer.gradient_clipping = min(0.5, small.optimizer.gradient_clipping)


def _changes(run: RunConfig, small: RunConfig) -> list[str]:
    lines = []
    for group in ("parallelism", "model", "data", "training", "optimizer", "precision"):
        old, new = getattr(run, group), getattr(small, group)
        for name in (field.name for field in fields(old)):
            before, after = getattr(old, name), getattr(new, name)
            if before != after and before is not None:
                lines.append(f"{group}.{name} {as_typed(before)} -> {as_typed(after)}")
    return lines


def parameter_order(model: ModelConfig) -> list[str]:
    """Return prefixes of the logical names in forward order."""
    parts = "attention_norm attention.qkv attention.query_norm attention.key_norm attention.output".split()
    parts += "attention_output_norm mlp_norm mlp.up mlp.gate_up mlp.down mlp_output_norm".split()
    blocks = [f"blocks.{index}.{part}" for index in range(model.num_layers) for part in parts]
    return ["embedding", "patches", "positions", *blocks, "final_norm", "head"]
