"""Shrink a run to laptop size and keep the kind of everything that can break. Pure."""

import copy
import math
from dataclasses import fields
from itertools import combinations
from typing import NamedTuple

from launcher.config.context_rules import length_multiple
from launcher.config.errors import as_typed
from launcher.config.layout import Layout
from launcher.config.schema import (
    ContextMethod,
    CorpusSource,
    Device,
    Dtype,
    InputKind,
    ModelConfig,
    PipelineSchedule,
    ProfileConfig,
    RunConfig,
    SchedulerConfig,
    SchedulerName,
)
from launcher.config.shape import (
    has_class_token,
    has_experts,
    head_size,
    kv_heads,
    least_micro_batches,
    output_size,
    rotary_size,
    sequence_length,
    stages_per_rank,
)
from launcher.models.arithmetic import parameters

MOST_RANKS = 8  # on CPU; on GPUs one rank for each GPU
MOST_AXES = 3  # above 1, of two ranks each
HEAD_SIZE, MANY_HEADS = 8, 16  # with more heads than MANY_HEADS, heads are half the size
SEQUENCE_PER_RANK = 8
BLOCKS_PER_STAGE = 2
VOCABULARY = 256
CLASSES = 10
LORA_RANK = 3
LONG = 4096  # positions of the long samples
EXPERTS = 6
BUCKETS = 5  # of gradients, about
LEAST_BIAS = 0.05  # smallest step of the biases of experts that changes choices in a few steps
LEAST_LOSS = 0.1  # smallest factor of an auxiliary loss of experts that is not 0


class LayoutAxes(NamedTuple):
    """The ranks on each axis of a small run."""

    pipeline: int
    data: int
    tensor: int
    context: int

    @classmethod
    def of(cls, layout: Layout) -> "LayoutAxes":
        return cls(layout.pipeline, layout.data, layout.tensor, layout.context)

    def __str__(self) -> str:
        """The axes above 1, such as `pipeline x tensor`."""
        return " x ".join(name for name, size in self._asdict().items() if size > 1)


def shrink(run: RunConfig, layout: Layout, *, gpus: int = 0) -> tuple[RunConfig, list[str]]:
    """Return the small run and the changed fields, a line each: `old -> new`.

    Kept: the model's parts, every axis above 1 (at most 8 ranks in all; of four axes three, see small_axes),
    ZeRO stage, sequence parallelism, checkpointing, offload, tying, accumulation above 1, grouped KV heads, a
    head size that is not hidden_size / num_heads, layers that do not divide over the stages, vocabularies
    that do not divide over the tensor ranks, active gradient clipping. The small run uses `gpus` GPUs of this
    machine, or its CPU.
    """
    small = shrunk_to(small_axes(layout, _most(gpus))[0], run, layout, gpus=gpus)
    return small, _changes(run, small)


def other_axes(run: RunConfig, layout: Layout, *, gpus: int = 0) -> list[RunConfig]:
    """Return further small runs, each without another axis; none unless four axes are above 1."""
    return [shrunk_to(axes, run, layout, gpus=gpus) for axes in small_axes(layout, _most(gpus))[1:]]


def shrunk_to(axes: LayoutAxes, run: RunConfig, layout: Layout, *, gpus: int = 0) -> RunConfig:
    """Return the small run on axes of these sizes."""
    small = copy.deepcopy(run)
    p = small.parallelism
    p.pipeline, p.data, p.tensor, p.context = axes
    if p.pipeline == 1:
        p.pipeline_schedule = PipelineSchedule["1f1b"]
    p.sequence_parallel = p.sequence_parallel and p.tensor > 1
    _shrink_model(small, run, layout)
    _shrink_training(small, layout)
    if run.precision.dtype is Dtype.fp16:
        small.precision.dtype = Dtype.fp32  # DeepSpeed trains fp16 on GPUs only
        small.deepspeed.pop("fp16", None)
    # training.steps bounds the steps to profile, and parallelism.expert the imbalance.
    small.profile, small.plan.expert_imbalance = ProfileConfig(), 1.0
    small.hardware.device = Device.cuda if gpus else Device.cpu
    small.hardware.nodes, small.hardware.accelerators_per_node = 1, None
    zero = small.deepspeed.setdefault("zero_optimization", {})
    if layout.pipeline == 1 and layout.zero_stage < 3:
        # The gradients of a small model would all fit into one bucket.
        zero["reduce_bucket_size"] = parameters(small.model) // BUCKETS
    if small.parallelism.zero_stage == 3:
        # At the default threshold every weight of a small model would stay whole on every rank.
        zero["stage3_param_persistence_threshold"] = 0
    return small


def _most(gpus: int) -> int:
    return min(gpus, MOST_RANKS) if gpus else MOST_RANKS


def small_axes(layout: Layout, most: int = MOST_RANKS) -> list[LayoutAxes]:
    """Return the axes of the small runs: of one run, or of four where four axes are above 1.

    Four axes of two ranks are 16 ranks. So each of four runs leaves out another axis: every three axes, and
    with them every pair, meet in one of the runs. The first run leaves out the data axis: its context ranks
    average gradients and share optimizer states as data ranks do. Expert ranks are data ranks, so with them
    the first run leaves out the pipeline.
    """
    sizes = LayoutAxes.of(layout)._asdict()
    last = ["pipeline", "tensor", "data"] if layout.expert == 1 else ["data", "tensor", "pipeline"]
    order = ["context", *last]
    large = [name for name in order if sizes[name] > 1]
    kept = combinations(large, MOST_AXES) if len(large) > MOST_AXES else [tuple(large)]
    return [
        _fitted(LayoutAxes(**{name: size if name in names else 1 for name, size in sizes.items()}), most)
        for names in kept
    ]


def _fitted(axes: LayoutAxes, most: int) -> LayoutAxes:
    """Return the axes, halved until all fit in `most` ranks: context ranks last."""
    pipeline, data, tensor, context = axes
    least = math.prod(min(2, size) for size in (pipeline, data, tensor))
    while context > 2 and context * least > most:
        context = max(2, context // 2)
    return LayoutAxes(*shrunk_axes(pipeline, data, tensor, most // context), context)


def shrunk_axes(pipeline: int, data: int, tensor: int, most: int = MOST_RANKS) -> tuple[int, int, int]:
    """Return the axes, halved until all fit in `most` ranks: data down to 2, then tensor, then pipeline.

    Data ranks are alike, and so are tensor ranks beyond the second. Inner pipeline stages have code of their
    own, and a pipeline of 2 has none.
    """
    axes = {"data": data, "tensor": tensor, "pipeline": pipeline}
    for axis in axes:
        while math.prod(axes.values()) > most and axes[axis] > 2:
            axes[axis] = max(2, axes[axis] // 2)
    return axes["pipeline"], axes["data"], axes["tensor"]


def inner_stages(run: RunConfig, layout: Layout, small: RunConfig, *, gpus: int = 0) -> RunConfig | None:
    """Return a second small run, with inner stages on one data rank, if `small` has lost them; else None.

    Beside the stages it has two context ranks or, without any, two tensor ranks.
    """
    pipeline = min(4, layout.pipeline)
    if small.parallelism.pipeline >= pipeline or pipeline * 2 > _most(gpus):
        return None
    context = min(2, layout.context)
    tensor = min(2, layout.tensor) if context == 1 else 1
    return shrunk_to(LayoutAxes(pipeline, 1, tensor, context), run, layout, gpus=gpus)


def long_samples(run: RunConfig, layout: Layout, small: RunConfig) -> RunConfig | None:
    """Return a small run with samples as long as those of `run`, at most LONG; None for images.

    It has one layer per stage and one micro-batch per data rank if the schedule allows it. Windows and scaled
    positions are those of `run`.
    """
    whole = sequence_length(run)
    if small.model.inputs is InputKind.patches or whole <= sequence_length(small):
        return None
    long = copy.deepcopy(small)
    m, p, t = long.model, long.parallelism, long.training
    stages = p.pipeline * stages_per_rank(run)
    m.num_layers = max(
        stages, 2 if m.full_attention_every else 1, m.experts.first_dense_layers + m.experts.every
    )
    # The reference keeps the scores of all positions: (heads, length, length) in each layer.
    scores = m.num_heads * m.num_layers
    most = LONG if scores <= 8 else LONG // 2 if scores <= 32 else LONG // 4
    multiple = math.lcm(p.tensor, length_multiple(long))
    length = min(most, whole) // multiple * multiple
    m.max_sequence_length, long.data.sequence_length = length, None
    for name in ("sliding_window", "rope_theta", "local_rope_theta"):
        setattr(m, name, getattr(run.model, name))
    if m.sliding_window is not None:
        m.sliding_window = min(m.sliding_window, 3 * length // 8)
    if m.rope_scaling.original_length is not None:
        m.rope_scaling.original_length = min(run.model.rope_scaling.original_length or length, length // 2)
    t.micro_batch_size, t.steps, long.verify.steps = 1, 1, 1
    assert p.data is not None
    t.global_batch_size = p.data * max(1, least_micro_batches(run) if stages_per_rank(run) > 1 else 1)
    return long


def _shrink_model(small: RunConfig, run: RunConfig, layout: Layout) -> None:
    m, tensor = small.model, small.parallelism.tensor
    heads_per_kv_head = min(2, run.model.num_heads // kv_heads(run.model))
    kv_heads_per_rank = min(2, kv_heads(run.model) // layout.tensor)
    if run.parallelism.context_method is ContextMethod.ulysses:
        # Each context rank needs its own query heads; key/value heads may be copied.
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
    if m.rotary_fraction < 1.0:
        # Channels are rotated in pairs.
        m.rotary_fraction = max(2, rotary_size(m)) / head_size(m)
    m.ffn_hidden_size = tensor * (m.hidden_size // tensor + 3)
    m.num_layers = _layers(small, run, layout)
    if has_experts(m):
        _shrink_experts(small)
    divides = output_size(run.model) % layout.tensor == 0
    if m.inputs is InputKind.patches:
        m.num_classes = -(-CLASSES // tensor) * tensor + (0 if divides else 1)
        _shrink_images(small)
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


def _shrink_images(small: RunConfig) -> None:
    """Shrink images and patches so that tensor ranks can share the sequence; digits stay 8 x 8 pixels."""
    m, is_of_digits = small.model, small.data.source is CorpusSource.digits
    m.patch_size = min(2, m.patch_size)
    ranks = small.parallelism.tensor if small.parallelism.sequence_parallel else 1
    sides = (m.image_size // m.patch_size, 8, 4, 2, 1) if is_of_digits else (4, *range(3, 4 + ranks))
    side = next((side for side in sides if (side**2 + has_class_token(m)) % ranks == 0), sides[0])
    if is_of_digits:
        m.patch_size = m.image_size // side
    else:
        m.image_size = side * m.patch_size


def _layers(small: RunConfig, run: RunConfig, layout: Layout) -> int:
    """Return the number of layers: a few per stage, one more if the stages do not divide `run`'s layers.

    If windows or experts are in every n-th layer, stages begin at different places of the pattern. Else a
    stage that wrongly counts only its own layers would still compute the right layers.
    """
    stages = small.parallelism.pipeline
    if run.model.num_layers % (layout.pipeline * stages_per_rank(run)) != 0:
        return stages * BLOCKS_PER_STAGE + 1  # the first stage has one more
    has_pattern = run.model.full_attention_every is not None or run.model.experts.every > 1
    is_hidden = has_pattern and stages > 1 and stages_per_rank(small) == 1
    return stages * (BLOCKS_PER_STAGE + is_hidden)


def _shrink_experts(small: RunConfig) -> None:
    """Shrink the experts; keep dense and sparse layers, several experts per token, and the losses."""
    m, e, p = small.model, small.model.experts, small.parallelism
    tensor = p.tensor
    is_chosen_from = e.top_k < e.count
    e.top_k = min(2, e.top_k)
    e.count = max(e.top_k + is_chosen_from, min(EXPERTS, e.count)) if is_chosen_from else e.top_k
    ranks = (p.data or 1) * p.context
    shared = math.gcd(p.expert, ranks)
    p.expert = ranks if p.expert > 1 and shared == 1 else shared
    e.count = max(1, e.count // p.expert) * p.expert
    e.ffn_hidden_size = tensor * (m.hidden_size // tensor // 2 + 1)
    e.shared, e.first_dense_layers, e.every = min(2, e.shared), min(1, e.first_dense_layers), min(2, e.every)
    m.num_layers = max(m.num_layers, e.first_dense_layers + e.every)
    e.auxiliary_loss = max(LEAST_LOSS, e.auxiliary_loss) if e.auxiliary_loss else 0.0
    e.z_loss = max(LEAST_LOSS, e.z_loss) if e.z_loss else 0.0
    e.bias_balancing = max(LEAST_BIAS, e.bias_balancing) if e.bias_balancing else 0.0


def _shrink_attention(small: RunConfig, run: RunConfig) -> None:
    """Shrink windows, scaled positions and soft caps so that they have an effect on short sequences."""
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
    # Odd: a wrong factor of the accumulation is then not mistaken for an axis, mostly a power of two.
    accumulation = 1 if layout.accumulation == 1 else 2 * p.pipeline + 1
    t.micro_batch_size = min(2, t.micro_batch_size)
    t.global_batch_size = t.micro_batch_size * p.data * accumulation
    t.steps, t.stop_at = small.verify.steps, None
    lora = small.finetune.lora
    if lora.rank and lora.rank > LORA_RANK:
        # Keep alpha / rank.
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
    parts += "attention_output_norm mlp_norm mlp.router mlp.experts mlp.shared".split()
    parts += "mlp.up mlp.gate_up mlp.down mlp_output_norm".split()
    blocks = [f"blocks.{index}.{part}" for index in range(model.num_layers) for part in parts]
    return ["embedding", "patches", "positions", *blocks, "final_norm", "head"]
