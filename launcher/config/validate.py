"""Rules across fields. Pure: reads the config and the world, raises ConfigError, changes nothing.

Each rule is a function of the run alone, listed in RULES; what depends on the world size is in layout.py.
"""

import math
import re
import shlex
from collections.abc import Callable, Mapping

from launcher.config import numbers, shape
from launcher.config.attention_rules import check_rotary, check_window
from launcher.config.card_rules import check_shapes
from launcher.config.context_rules import check_context
from launcher.config.deepspeed_rules import check_deepspeed
from launcher.config.errors import (
    ConfigError,
    as_typed,
    hydra_text,
    quoted_setting,
    refusal,
    settings,
    typed_text,
    value_of,
)
from launcher.config.expert_rules import check_expert_parallelism, check_experts
from launcher.config.finetune_rules import check_lora
from launcher.config.layout import Layout, resolve_layout
from launcher.config.paths import check_paths
from launcher.config.schema import (
    AttentionKind,
    CalibrateConfig,
    ComparedRunConfig,
    CorpusSource,
    Dtype,
    EvaluateConfig,
    GenerateConfig,
    InputKind,
    OptimizerName,
    ParallelismConfig,
    PrepareConfig,
    ReplayConfig,
    RunConfig,
    SchedulerName,
    StatesDtype,
)
from launcher.config.slurm_rules import check_slurm
from launcher.config.world import World
from launcher.text import plural, whole

EXAMPLE_GLOB = "corpus/**/*.txt"
EXAMPLE_PREFIX = "corpora/web"
EXAMPLE_CHATS = "chats.jsonl"
_WANDB_PROJECT_LENGTH, _WANDB_TAG_LENGTH = 128, 64  # characters
LEAST_WEIGHT = 1e-9
MOST_VALUES_AHEAD = 2**30  # token ids or pixels of 8 bytes


def validate(run: RunConfig, world: World) -> Layout:
    """Check every rule and return the layout of the run. Raises ConfigError at the first rule that fails."""
    check_values(run)
    return validate_layout(run, world)


def check_values(run: RunConfig) -> None:
    """Check each value on its own. Raises ConfigError."""
    check_numbers(run)
    check_shapes(run)
    check_paths(run)


def validate_layout(run: RunConfig, world: World) -> Layout:
    """Like `validate` without check_values: for the search, which changes only the fields of a layout."""
    for rule in RULES:
        rule(run)
    layout = resolve_layout(run, world)
    check_fp16_has_a_gpu(run, layout)
    return layout


def validate_generate(config: GenerateConfig) -> str:
    """Check the settings of `launcher generate`; return the run's directory. Raises ConfigError."""
    check_paths(config)
    if config.run.dir is None:
        why = "sampling needs the directory of a run"
        raise refusal(config, "run.dir", why, "run.dir=runs/NAME (as the run printed it)")
    if not config.prompt:
        raise refusal(config, "prompt", "the prompt is empty", shlex.quote('prompt="import "'))
    numbers.refuse_out_of_bounds(config)
    return config.run.dir


def validate_replay(config: ReplayConfig) -> tuple[str, int]:
    """Check the settings of `launcher replay`; return the directory and the step. Raises ConfigError."""
    if config.run.dir is None:
        why = "`launcher replay` needs the directory of a run"
        raise refusal(config, "run.dir", why, "run.dir=runs/NAME step=1")
    if config.step is None:
        why = "name the step to repeat, such as a step with a loss spike in metrics.jsonl"
        raise refusal(config, "step", why, "step=1")
    numbers.refuse_out_of_bounds(config)
    check_paths(config)
    return config.run.dir, config.step


def validate_evaluate(config: EvaluateConfig) -> str:
    """Check the settings of `launcher evaluate`; return the directory of the weights. Raises ConfigError."""
    if config.run.dir is None:
        why = "`launcher evaluate` needs the directory of a run or a checkpoint"
        raise refusal(config, "run.dir", why, "run.dir=runs/NAME")
    numbers.refuse_out_of_bounds(config)
    check_paths(config)
    if config.parallelism.auto:
        why = "`launcher evaluate` cannot choose a layout"
        raise refusal(config, "parallelism.auto", why, "parallelism=single", "parallelism=tp2")
    if not config.tasks:
        for field in ("task_dir", "few_shot"):
            if value_of(config, field) is not None:
                why = "this setting needs tasks"
                raise refusal(config, field, why, "tasks=[NAME]", f"{field}=null")
    return config.run.dir


def validate_prepare(config: PrepareConfig) -> None:
    """Check the settings of `launcher prepare`. Raises ConfigError."""
    numbers.refuse_out_of_bounds(config)
    check_paths(config)
    t = config.tokenizer
    if t.train is not None and t.path is not None:
        why = "tokenizer.path and tokenizer.train cannot be set together"
        raise refusal(config, "tokenizer.train", why, "tokenizer.train=null", "tokenizer.path=null")
    if t.train is None and config.vocab != PrepareConfig.vocab:
        why = "only a tokenizer that is trained has a vocabulary to choose"
        unused = f"vocab={PrepareConfig.vocab}"
        trained = [f"tokenizer.train=bpe vocab={config.vocab}"] if t.path is None else []
        raise refusal(config, "vocab", why, *trained, unused)
    if t.train is not None and config.vocab <= numbers.BYTE_VALUES:
        why = f"must be at least {numbers.BYTE_VALUES + 1}: the byte values and the end-of-document token"
        raise refusal(config, "vocab", why, f"vocab={numbers.BYTE_VALUES + 1} (or more)")
    if config.chat and t.train is not None:
        why = "a tokenizer is trained on text, and chat=true reads conversations"
        raise refusal(config, "tokenizer.train", why, "tokenizer.train=null", "chat=false")
    if config.chat_template is not None and not config.chat:
        why = "a chat template needs conversations"
        raise refusal(config, "chat_template", why, "chat=true", "chat_template=null")
    if t.end_of_document is not None and t.path is None:
        why = "this setting needs tokenizer.path"
        raise refusal(config, "tokenizer.end_of_document", why, "tokenizer.end_of_document=null")


def validate_compare(config: ComparedRunConfig) -> None:
    """Check the settings of `launcher compare` besides the run. Raises ConfigError."""
    numbers.refuse_out_of_bounds(config)
    check_paths(config)
    if config.compare.ranks == 1:
        raise refusal(config, "compare.ranks", "must be at least 2", "compare.ranks=2", "compare.ranks=4")
    for name in ("data", "context", "tensor", "pipeline", "expert", "zero_stage", "auto"):
        default = 1 if name == "data" else getattr(ParallelismConfig(), name)
        if getattr(config.parallelism, name) != default:
            why = "`launcher compare` takes the layouts from compare.layouts"
            raise refusal(config, f"parallelism.{name}", why, *settings(f"parallelism.{name}", [default]))
    if (path := config.checkpoint.resume) not in ("auto", "none"):
        why = "`launcher compare` trains every layout from step 1"
        weights = f"checkpoint.resume=auto {typed_text('checkpoint.init_from', path)} (its weights)"
        raise refusal(config, "checkpoint.resume", why, "checkpoint.resume=auto", weights)


def validate_calibrate(config: CalibrateConfig) -> None:
    """Check the settings of `launcher calibrate`. Raises ConfigError."""
    numbers.refuse_out_of_bounds(config)
    check_paths(config)
    if not re.fullmatch(r"\w[\w.-]*", config.name):
        why = "may contain only letters, digits, _, - and ., and must not begin with - or ."
        raise refusal(config, "name", why, "name=this_machine")


def check_numbers(run: RunConfig) -> None:
    numbers.refuse_out_of_bounds(run)


def check_inputs(run: RunConfig) -> None:
    """Check that the model has the settings of its kind of inputs, and none of the other kind."""
    m = run.model
    text = {"model.vocab_size": numbers.BYTE_VALUES, "model.max_sequence_length": 128}
    examples = {"num_classes": 10, "image_size": 8, "image_channels": 1, "patch_size": 2}
    images = {f"model.{name}": example for name, example in examples.items()}
    is_vision = m.inputs is InputKind.patches
    unused = f"not used with model.inputs={m.inputs.name}"
    for field, example in (images if is_vision else text).items():
        if value_of(run, field) == 0:
            raise refusal(run, field, numbers.COUNT.words, f"{field}={example}")
    for field in text if is_vision else images:
        if value_of(run, field) != 0:
            raise refusal(run, field, unused, f"{field}=0")
    if is_vision != (m.pooling is not None):
        why = "model.inputs=patches needs this setting" if is_vision else unused
        values = ["class_token", "mean"] if is_vision else ["null"]
        raise refusal(run, "model.pooling", why, *settings("model.pooling", values))
    if is_vision and m.embedding_scale != 1.0:
        raise refusal(run, "model.embedding_scale", unused, "model.embedding_scale=1")
    if is_vision and m.tie_embeddings:
        why = "model.inputs=patches has no token embedding to share with the head"
        raise refusal(run, "model.tie_embeddings", why, "model.tie_embeddings=false")
    if is_vision and m.image_channels not in (1, 3):
        why = "images are grey (1) or red, green, blue (3)"
        raise refusal(run, "model.image_channels", why, "model.image_channels=1", "model.image_channels=3")
    if is_vision and m.image_size % m.patch_size:
        why = f"does not divide model.image_size={m.image_size}"
        close = shape.nearest(shape.divisors(m.image_size), m.patch_size)
        raise refusal(run, "model.patch_size", why, *settings("model.patch_size", close))


def check_parts(run: RunConfig) -> None:
    """Check for parts that would have nothing to learn from, or would see the token that they predict."""
    m = run.model
    if m.attention is AttentionKind.full and m.inputs is InputKind.tokens:
        why = "every position would see the token it predicts"
        raise refusal(run, "model.attention", why, "model.attention=causal")
    if m.attention is AttentionKind.causal and shape.has_class_token(m):
        why = "the class token comes first and would see no patch"
        raise refusal(run, "model.attention", why, "model.attention=full", "model.pooling=mean")
    if m.biases.head and m.tie_embeddings:
        why = "a head that shares the embedding's weight has no bias"
        raise refusal(run, "model.biases.head", why, "model.biases.head=false", "model.tie_embeddings=false")


def check_images(run: RunConfig) -> None:
    """Check that patches are cut from images, and tokens from text."""
    m, d = run.model, run.data
    if (m.inputs is InputKind.patches) != shape.is_of_images(run):
        needs, remedy = "text", f"model={'vit_tiny' if d.source is CorpusSource.digits else 'vit_b16'}"
        if m.inputs is InputKind.patches:
            is_for_digits = (m.image_size, m.image_channels) == (8, 1) and m.num_classes >= 10
            images = "data=digits" if is_for_digits else "data=image_folder data.train=images/train"
            needs, remedy = "images", images
        raise refusal(run, "data.source", f"model.inputs={m.inputs.name} needs {needs}", remedy)
    if not shape.is_of_images(run):
        return
    if d.sequence_length is not None:
        why = "an image has as many tokens as patches"
        raise refusal(run, "data.sequence_length", why, "data.sequence_length=null")
    if d.document_attention:
        why = "document attention needs text, and this run has images"
        raise refusal(run, "data.document_attention", why, "data.document_attention=false")
    if d.source is CorpusSource.image_folder:
        if d.train is None:
            raise refusal(run, "data.train", "data=image_folder needs images", "data.train=images/train")
        return
    if m.image_size != 8:
        whole = "" if 8 % m.patch_size == 0 else " model.patch_size=2"
        why = "data=digits are scans of 8 x 8 pixels"
        raise refusal(run, "model.image_size", why, f"model.image_size=8{whole}")
    if m.image_channels != 1:
        raise refusal(run, "model.image_channels", "data=digits are grey", "model.image_channels=1")
    if m.num_classes < 10:
        raise refusal(run, "model.num_classes", "data=digits has 10 classes", "model.num_classes=10")


def check_heads(run: RunConfig) -> None:
    """Check that the heads fit the hidden size, rotary positions and the key/value heads."""
    m, multiple = run.model, shape.head_size_multiple(run)
    remedies = [
        *settings("model.num_heads", shape.nearest(shape.legal_heads(run), m.num_heads)),
        *settings("model.hidden_size", shape.multiples_around(m.hidden_size, m.num_heads * multiple)),
    ]
    if m.head_size is None and m.hidden_size % m.num_heads:
        raise refusal(run, "model.num_heads", f"does not divide model.hidden_size={m.hidden_size}", *remedies)
    if shape.head_size(m) % multiple:
        why = f"the head size is {shape.head_size(m)}, and rotary positions need an even head size"
        if m.head_size is not None:
            even = settings("model.head_size", shape.multiples_around(m.head_size, multiple))
            raise refusal(run, "model.head_size", why, *even)
        raise refusal(run, "model.num_heads", why, *remedies)
    if m.num_heads % shape.kv_heads(m):
        legal = [heads for heads in shape.divisors(m.num_heads) if heads % run.parallelism.tensor == 0]
        remedies = settings("model.num_kv_heads", shape.nearest(legal, shape.kv_heads(m)) or ["null"])
        why = f"does not divide model.num_heads={m.num_heads}"
        raise refusal(run, "model.num_kv_heads", why, *remedies)


def check_tensor_divides(run: RunConfig) -> None:
    m, tensor = run.model, run.parallelism.tensor
    counts = {"attention heads": m.num_heads, "KV heads": shape.kv_heads(m)}
    if shape.has_dense_mlp(m):
        counts["FFN columns"] = m.ffn_hidden_size
    for name, count in counts.items():
        if count % tensor:
            remedies = settings(
                "parallelism.tensor", shape.nearest(shape.legal_tensor_sizes(run) or [1], tensor)
            )
            why = f"{count} {name} cannot be split {tensor} ways"
            raise refusal(run, "parallelism.tensor", why, *remedies)


def check_schedule(run: RunConfig) -> None:
    if shape.stages_per_rank(run) > 1 and run.parallelism.pipeline == 1:
        why = "this schedule needs parallelism.pipeline of 2 or more"
        deeper = [size for size in shape.legal_pipeline_sizes(run) if size > 1]
        more = settings("parallelism.pipeline", deeper[:1])
        raise refusal(run, "parallelism.pipeline_schedule", why, "parallelism.pipeline_schedule=1f1b", *more)


def check_pipeline(run: RunConfig) -> None:
    p, layers, of_each = run.parallelism, run.model.num_layers, shape.stages_per_rank(run)
    if p.pipeline > 1 and p.zero_stage > 1:
        why = f"with parallelism.pipeline={p.pipeline}, DeepSpeed supports ZeRO-0 and ZeRO-1 only"
        no_offload = " parallelism.offload_parameters=false" if p.offload_parameters else ""
        schedule = " parallelism.pipeline_schedule=1f1b" if of_each > 1 else ""
        remedies = f"parallelism.zero_stage=1{no_offload}", f"parallelism.pipeline=1{schedule}"
        raise refusal(run, "parallelism.zero_stage", why, *remedies)
    if p.pipeline * of_each > layers:
        why = f"{plural(layers, 'layer')} cannot fill {p.pipeline * of_each} stages"
        legal = shape.legal_pipeline_sizes(run)
        one_by_one = f"parallelism.pipeline_schedule=1f1b parallelism.pipeline={min(layers, p.pipeline)}"
        fewest = f"parallelism.pipeline={legal[-1]}" + (" (or fewer)" if legal[1:] else "") if legal else None
        raise refusal(run, "parallelism.pipeline", why, fewest or one_by_one)


def check_zero(run: RunConfig) -> None:
    p = run.parallelism
    if p.offload_parameters and p.zero_stage != 3:
        zero_3 = ["parallelism.zero_stage=3 parallelism.offload_optimizer=true"] if p.pipeline == 1 else []
        why = f"only ZeRO-3 partitions the weights, not ZeRO-{p.zero_stage}"
        remedies = *zero_3, "parallelism.offload_parameters=false"
        raise refusal(run, "parallelism.offload_parameters", why, *remedies)
    if p.offload_parameters and not p.offload_optimizer:
        why = "the optimizer steps on the offloaded weights and must be with them"
        raise refusal(run, "parallelism.offload_parameters", why, "parallelism.offload_optimizer=true")
    if p.offload_optimizer and p.zero_stage == 0:
        why = "ZeRO-0 has no partitioned optimizer to offload"
        remedies = "parallelism.zero_stage=1", "parallelism.offload_optimizer=false"
        raise refusal(run, "parallelism.offload_optimizer", why, *remedies)


def check_states(run: RunConfig) -> None:
    p, accumulation = run.parallelism, run.deepspeed.get("data_types", {}).get("grad_accum_dtype")
    if run.precision.states is not StatesDtype.bf16:
        return
    if run.precision.dtype is not Dtype.bf16:
        why = f"needs bf16 weights, but precision.dtype={run.precision.dtype.name}"
        raise refusal(run, "precision.states", why, "precision=bf16_states", "precision.states=fp32")
    if p.offload_optimizer:
        why = "offloaded states are fp32 here: DeepSpeed's CPU optimizer would round bf16 states to nearest"
        off = ["parallelism.offload_optimizer=false"]
        off += ["parallelism.offload_parameters=false"] if p.offload_parameters else []
        raise refusal(run, "precision.states", why, " ".join(off), "precision=bf16")
    if accumulation not in (None, "bf16"):
        why = "gradients of bf16 states are summed in bf16"
        remedies = "deepspeed.data_types.grad_accum_dtype=bf16", "precision=bf16"
        raise ConfigError("deepspeed.data_types.grad_accum_dtype", accumulation, why, " or ".join(remedies))


def check_sequence(run: RunConfig) -> None:
    p, length, longest = run.parallelism, shape.sequence_length(run), run.model.max_sequence_length
    is_vision = run.model.inputs is InputKind.patches
    if not is_vision and length > longest:
        why = f"longer than model.max_sequence_length={longest}"
        remedies = f"data.sequence_length={longest}", f"model.max_sequence_length={length}"
        raise refusal(run, "data.sequence_length", why, *remedies)
    if not p.sequence_parallel:
        return
    off = "parallelism.sequence_parallel=false"
    if p.tensor == 1:
        why = "sequence parallelism needs parallelism.tensor of 2 or more"
        more = settings("parallelism.tensor", shape.legal_tensor_sizes(run)[:1])
        raise refusal(run, "parallelism.sequence_parallel", why, off, *more)
    if length % p.tensor:
        shorter = [n for n in shape.multiples_around(length, p.tensor) if n <= longest]
        pooled = shape.has_class_token(run.model) and (length - 1) % p.tensor == 0
        why = f"sequences of {length} tokens cannot be split {p.tensor} ways"
        more = settings("data.sequence_length", shorter) + (["model.pooling=mean"] if pooled else [])
        raise refusal(run, "parallelism.sequence_parallel", why, *more, off)


def check_vocabulary(run: RunConfig) -> None:
    is_bytes = run.data.source in (CorpusSource.stdlib, CorpusSource.text)
    if is_bytes and run.model.vocab_size < numbers.BYTE_VALUES:
        why = f"the corpus is bytes, which have {numbers.BYTE_VALUES} values"
        raise refusal(run, "model.vocab_size", why, f"model.vocab_size={numbers.BYTE_VALUES}")


def check_documents(run: RunConfig) -> None:
    end, size = run.data.end_of_document, run.model.vocab_size
    source = run.data.source
    for field in ("data.tokenizer", "data.end_of_document"):
        if value_of(run, field) is not None and source not in (CorpusSource.tokens, CorpusSource.chat):
            why = f"data={source.name} has no token files"
            raise refusal(run, field, why, f"{field}=null")
    if run.data.chat_template is not None and source is not CorpusSource.chat:
        why = f"data={source.name} has no conversations"
        raise refusal(run, "data.chat_template", why, "data.chat_template=null")
    if end is not None and end >= size:
        why = f"not a token of model.vocab_size={size}"
        raise refusal(run, "data.end_of_document", why, f"model.vocab_size={end + 1} (or more)")


def check_data(run: RunConfig) -> None:
    d = run.data
    if d.validation is None and d.validation_fraction in (0, 1):
        why = f"leaves no text to {'validate on' if d.validation_fraction == 0 else 'train on'}"
        raise refusal(run, "data.validation_fraction", why, "data.validation_fraction=0.05")
    if d.source is CorpusSource.text and d.train is None:
        why = "data=text needs files to train on"
        raise refusal(run, "data.train", why, shlex.quote(f'data.train="{EXAMPLE_GLOB}"'))
    if d.source is CorpusSource.chat and d.train is None:
        raise refusal(run, "data.train", "data=chat needs conversations", f"data.train={EXAMPLE_CHATS}")
    if d.source is CorpusSource.tokens and d.train is None and not d.sources:
        raise refusal(run, "data.train", "data=tokens needs token files", f"data.train={EXAMPLE_PREFIX}")
    if d.validation is None and d.validation_fraction + d.test_fraction >= 1:
        why = f"with data.validation_fraction={d.validation_fraction} it leaves nothing to train on"
        raise refusal(run, "data.test_fraction", why, "data.test_fraction=0")
    if d.source in (CorpusSource.stdlib, CorpusSource.text) and (d.test is not None or d.test_fraction > 0):
        field = "data.test_fraction" if d.test is None else "data.test"
        none = {"data.test_fraction": 0, "data.test": "null"}
        raise refusal(run, field, f"data={d.source.name} cannot have a test part", f"{field}={none[field]}")
    globs = {"data.train": d.train, "data.validation": d.validation}
    given = [field for field, glob in globs.items() if glob is not None]
    if d.source is CorpusSource.digits and given + (["data.test"] if d.test is not None else []):
        field = (given or ["data.test"])[0]
        raise refusal(run, field, f"data=digits does not use {field}", f"{field}=null")
    if d.source is CorpusSource.stdlib and given:
        files = [f"{field}={hydra_text(globs[field] or EXAMPLE_GLOB)}" for field in {"data.train", *given}]
        unset = " ".join(f"{field}=null" for field in given)
        text = " ".join(["data=text", *map(shlex.quote, sorted(files))])
        raise refusal(run, given[0], f"data=stdlib does not use {given[0]}", unset, text)


def check_read_ahead(run: RunConfig) -> None:
    """Check that the batches that are read ahead are not too large, counted in values over all ranks."""
    m, t = run.model, run.training
    is_vision = m.inputs is InputKind.patches
    of_sample = m.image_size**2 * m.image_channels if is_vision else shape.sequence_length(run) + 1
    of_batch = of_sample * (run.data.prefetch + 1)
    if t.global_batch_size * of_batch > MOST_VALUES_AHEAD:
        largest = 2 ** int(math.log2(max(1, MOST_VALUES_AHEAD // of_batch)))
        values = f"{of_batch * t.global_batch_size:.3g}"
        why = f"with data.prefetch={run.data.prefetch}, the batches in memory would have {values} values; "
        why += f"the maximum is {MOST_VALUES_AHEAD:.3g}"
        remedy = f"training.global_batch_size={largest} (or fewer)"
        raise refusal(run, "training.global_batch_size", why, remedy)


def check_blend(run: RunConfig) -> None:
    d = run.data
    parts: dict[str, Mapping[str, object]]
    parts = {"sources": d.sources, "weights": d.weights, "validation_sources": d.validation_sources}
    named = {f"data.{name}": by_name for name, by_name in parts.items()}
    given = [field for field, by_name in named.items() if by_name]
    if not given:
        return
    if d.source is not CorpusSource.tokens:
        why = f"{given[0]} needs data=tokens"
        names = sorted({*d.sources, *d.weights, *d.validation_sources})
        sources = [f"data.sources.{name}={EXAMPLE_PREFIX}" for name in names if name not in d.sources]
        weights = [f"data.weights.{name}=1" for name in names if name not in d.weights]
        raise refusal(run, given[0], why, " ".join(["data=tokens", *sources, *weights]))
    for field in ("data.train", "data.validation", "data.test"):
        if value_of(run, field) is not None:
            raise refusal(run, field, f"{field} and data.sources cannot be set together", f"{field}=null")
    for field, by_name in named.items():
        if strange := [name for name in by_name if not re.fullmatch(r"[A-Za-z0-9_-]+", name)]:
            why = f"{strange[0]!r} also names metrics: only letters, digits, _ and - are possible"
            raise refusal(run, field, why, "another name")
        if missing := [name for name in by_name if name not in d.sources]:
            why = f"{missing[0]} is not among data.sources"
            raise refusal(run, field, why, f"data.sources.{missing[0]}={EXAMPLE_PREFIX}")
    for name in d.sources:
        if d.weights.get(name) == 0 and len(d.sources) > 1:
            why = f"a weight of 0 uses no sample of {name}, and each of data.sources needs a weight above 0"
            leave_out = f"{shlex.quote(f'~data.sources.{name}')} {shlex.quote(f'~data.weights.{name}')}"
            raise refusal(run, "data.weights", why, f"{leave_out} (leaves {name} out, the nearest to 0)")
        if not 0 < d.weights.get(name, 0) < math.inf:
            why = f"a weight above 0 is needed for each of data.sources, and {name} has none"
            raise refusal(run, "data.weights", why, f"data.weights.{name}=1")
        if not LEAST_WEIGHT <= d.weights[name] <= 1 / LEAST_WEIGHT:
            why = f"each must be from {LEAST_WEIGHT:g} to {1 / LEAST_WEIGHT:g}"
            raise refusal(run, "data.weights", why, f"data.weights.{name}=1")
    if (period := sum(shape.blend_weights(list(d.weights.values())))) > shape.LONGEST_PERIOD:
        most = whole(shape.LONGEST_PERIOD)
        why = f"as whole numbers the weights add up to {whole(period)}; the maximum is {most}"
        total = sum(d.weights.values())
        rounded = {name: max(1, round(weight / total * 10_000)) for name, weight in d.weights.items()}
        raise refusal(run, "data.weights", why, shlex.quote(f"data.weights={as_typed(rounded)}"))


def check_optimizer(run: RunConfig) -> None:
    used_by = {
        OptimizerName.adamw: ("optimizer.beta1", "optimizer.beta2", "optimizer.epsilon"),
        OptimizerName.sgd: ("optimizer.momentum",),
    }
    chosen = run.optimizer.name
    for optimizer, fields in used_by.items():
        for field in fields:
            is_set = value_of(run, field) is not None
            if optimizer is chosen and not is_set:
                why = f"{chosen.name} needs this setting"
                raise refusal(run, field, why, f"{field}={numbers.BOUNDS[field].example}")
            if optimizer is not chosen and is_set:
                why = f"not a setting of {chosen.name}"
                raise refusal(run, field, why, f"optimizer={optimizer.name}", f"{field}=null")


def check_scheduler(run: RunConfig) -> None:
    s, steps = run.scheduler, run.training.steps
    if s.name is not SchedulerName.wsd:
        if s.decay_steps is not None:
            why = f"this is a setting of scheduler=wsd, not of scheduler={s.name.name}"
            raise refusal(run, "scheduler.decay_steps", why, "scheduler=wsd", "scheduler.decay_steps=null")
        return
    room = steps - s.warmup_steps
    if s.decay_steps is None or s.decay_steps > room:
        decay = s.decay_steps or 1
        longer = f"training.steps={s.warmup_steps + decay} (or more)"
        sum_of_steps = f"{s.warmup_steps} warm-up steps + {decay} decay steps"
        why = "scheduler=wsd needs this setting"
        if s.decay_steps:
            why = f"{sum_of_steps} exceed training.steps={steps}"
        remedies = [f"scheduler.decay_steps={room} (or fewer)"] if room >= 1 else []
        if decay > room:
            remedies.append(longer if s.decay_steps else f"{longer} scheduler.decay_steps={decay}")
        raise refusal(run, "scheduler.decay_steps", why, *remedies)


def check_stop(run: RunConfig) -> None:
    t = run.training
    if t.stop_at is not None and t.stop_at > t.steps:
        why = f"must be at most training.steps={t.steps}"
        raise refusal(run, "training.stop_at", why, f"training.stop_at={t.steps} (or fewer)")


def check_profile(run: RunConfig) -> None:
    """Check that the run has the steps to profile. A resumed run may have taken them before it stopped."""
    first, steps, t = run.profile.first_step, run.profile.steps, run.training
    if not run.profile.enabled:
        return
    last, setting = t.steps, "training.steps"
    if t.stop_at is not None:
        last, setting = t.stop_at, "training.stop_at"
    if last == 0:
        why = "training.steps=0 only validates, and the profiler records training steps"
        raise refusal(run, "profile.enabled", why, "profile.enabled=false")
    why = f"the run ends at step {last} ({setting}={last})"
    if steps > last:
        raise refusal(run, "profile.steps", why, f"profile.steps={last} (or fewer)")
    if first is not None and first + steps - 1 > last:
        why = f"{why}, and profile.steps={steps}"
        latest = f"profile.first_step={last - steps + 1} (or lower)"
        raise refusal(run, "profile.first_step", why, "profile.first_step=null", latest)


def check_wandb(run: RunConfig) -> None:
    """Refuse what W&B refuses, by the rules of its client (wandb/sdk/wandb_settings.py)."""
    project, tags = run.logging.wandb.project, run.logging.wandb.tags
    if match := re.search(r"[/\\#?%:]", project):
        valid = re.sub(r"[/\\#?%:]", "-", project)
        why = f"a W&B project name may not contain {match[0]}"
        raise refusal(run, "logging.wandb.project", why, typed_text("logging.wandb.project", valid))
    if not 1 <= len(project) <= _WANDB_PROJECT_LENGTH:
        why = f"it has {len(project)} characters; W&B takes 1 to {_WANDB_PROJECT_LENGTH}"
        shorter = project[:_WANDB_PROJECT_LENGTH] or "launcher"
        raise refusal(run, "logging.wandb.project", why, typed_text("logging.wandb.project", shorter))
    for number, tag in enumerate(tags, 1):
        if not 1 <= len(tag) <= _WANDB_TAG_LENGTH:
            why = f"tag {number} has {len(tag)} characters; W&B takes 1 to {_WANDB_TAG_LENGTH}"
            kept = ", ".join(hydra_text(tag[:_WANDB_TAG_LENGTH]) for tag in tags if tag)
            raise refusal(run, "logging.wandb.tags", why, quoted_setting("logging.wandb.tags", f"[{kept}]"))


def check_fp16_has_a_gpu(run: RunConfig, layout: Layout) -> None:
    if run.precision.dtype is Dtype.fp16 and layout.device == "cpu":
        why = "DeepSpeed trains fp16 on GPUs only, and this run is on CPU"
        raise refusal(run, "precision.dtype", why, "precision=bf16", "precision=fp32")


RULES: tuple[Callable[[RunConfig], None], ...] = (
    check_inputs,
    check_parts,
    check_images,
    check_heads,
    check_rotary,
    check_window,
    check_tensor_divides,
    check_experts,
    check_expert_parallelism,
    check_schedule,
    check_pipeline,
    check_zero,
    check_sequence,
    check_context,
    check_vocabulary,
    check_documents,
    check_read_ahead,
    check_blend,
    check_data,
    check_optimizer,
    check_scheduler,
    check_stop,
    check_profile,
    check_deepspeed,
    check_states,
    check_lora,
    check_wandb,
    check_slurm,
)
