"""Rules across fields. Pure: reads the config and the machine's size, raises ConfigError, changes nothing.

Each rule is a function of the run alone, listed in RULES; what depends on the world size is in layout.py.
"""

from collections.abc import Callable, Iterator
from typing import Any

from launcher.config.deepspeed_keys import check_passthrough
from launcher.config.errors import ConfigError
from launcher.config.layout import Layout, divisors, nearest, resolve_layout
from launcher.config.schema import (
    CorpusSource,
    Dtype,
    Family,
    GenerateConfig,
    OptimizerName,
    RunConfig,
    SchedulerName,
)

BYTE_VALUES = 256


def validate(run: RunConfig, *, gpus: int, cores: int, joined_world: int | None = None) -> Layout:
    """Check every rule and return the resolved layout. Raises ConfigError at the first that fails."""
    for rule in RULES:
        rule(run)
    layout = resolve_layout(run, gpus=gpus, cores=cores, joined_world=joined_world)
    check_fp16_has_a_gpu(run, layout)
    return layout


def kv_heads(run: RunConfig) -> int:
    return run.model.num_kv_heads or run.model.num_heads


def sequence_length(run: RunConfig) -> int:
    """Tokens per sample, T."""
    return run.data.sequence_length or run.model.max_sequence_length


def check_positive(run: RunConfig) -> None:
    for field, value in _positive_fields(run):
        if value is not None and value < 1:
            raise ConfigError(field, value, "must be at least 1", f"{field}=1 or more")


def _positive_fields(run: RunConfig) -> Iterator[tuple[str, int | None]]:
    names = {
        "model": "hidden_size num_layers num_heads num_kv_heads ffn_hidden_size vocab_size "
        "max_sequence_length",
        "parallelism": "tensor pipeline data",
        "hardware": "nodes accelerators_per_node",
        "data": "sequence_length",
        "training": "steps stop_at global_batch_size micro_batch_size validation_batches",
        "logging": "interval",
    }
    for group, fields in names.items():
        for name in fields.split():
            yield f"{group}.{name}", getattr(getattr(run, group), name)


def check_ranges(run: RunConfig) -> None:
    o, s = run.optimizer, run.scheduler
    _within("model.dropout", run.model.dropout, 0, 1, "0 <= p < 1", open_above=True)
    _within("model.norm_epsilon", run.model.norm_epsilon, 0, 1, "a small positive number such as 1e-5")
    _within("optimizer.weight_decay", o.weight_decay, 0, float("inf"), "0 or more")
    for name, value in (("beta1", o.beta1), ("beta2", o.beta2), ("momentum", o.momentum)):
        if value is not None:
            _within(f"optimizer.{name}", value, 0, 1, "0 <= x < 1", open_above=True)
    _within("scheduler.min_lr_ratio", s.min_lr_ratio, 0, 1, "0 to 1")
    _within(
        "scheduler.warmup_steps",
        s.warmup_steps,
        0,
        run.training.steps,
        f"0 to {run.training.steps}, training.steps",
    )
    _within(
        "training.validation_interval",
        run.training.validation_interval,
        0,
        float("inf"),
        "0 (only at the end) or more",
    )
    if not o.lr > 0:
        raise ConfigError("optimizer.lr", o.lr, "must be above 0", "optimizer.lr=1e-3")
    if o.gradient_clipping is not None and not o.gradient_clipping > 0:
        raise ConfigError(
            "optimizer.gradient_clipping", o.gradient_clipping, "must be above 0", "null (off) or 1.0"
        )


def _within(
    field: str, value: float, low: float, high: float, remedy: str, *, open_above: bool = False
) -> None:
    if not (low <= value < high if open_above else low <= value <= high):
        raise ConfigError(field, value, "out of range", remedy)


def check_heads(run: RunConfig) -> None:
    m = run.model
    if m.hidden_size % m.num_heads:
        options = nearest(divisors(m.hidden_size), m.num_heads)
        raise ConfigError(
            "model.num_heads",
            m.num_heads,
            f"does not divide model.hidden_size={m.hidden_size}",
            _either(options),
        )
    if m.num_heads % kv_heads(run):
        options = nearest(divisors(m.num_heads), kv_heads(run))
        raise ConfigError(
            "model.num_kv_heads",
            kv_heads(run),
            f"does not divide model.num_heads={m.num_heads}",
            _either(options),
        )
    if m.family is Family.gpt and m.num_kv_heads not in (None, m.num_heads):
        raise ConfigError(
            "model.num_kv_heads",
            m.num_kv_heads,
            "grouped-query attention is of family llama",
            "null, or model.family=llama",
        )
    head_size = m.hidden_size // m.num_heads
    if m.family is Family.llama and head_size % 2:
        raise ConfigError(
            "model.num_heads",
            m.num_heads,
            f"rotary positions need an even head size, not {head_size}",
            _either([h for h in divisors(m.hidden_size) if m.hidden_size // h % 2 == 0][-2:]),
        )


def check_tensor_divides(run: RunConfig) -> None:
    m, tensor = run.model, run.parallelism.tensor
    counts = {"attention heads": m.num_heads, "KV heads": kv_heads(run), "FFN columns": m.ffn_hidden_size}
    legal = [t for t in divisors(kv_heads(run)) if all(count % t == 0 for count in counts.values())]
    for what, count in counts.items():
        if count % tensor:
            raise ConfigError(
                "parallelism.tensor",
                tensor,
                f"{count} {what} cannot be split {tensor} ways",
                _either(nearest(legal, tensor)),
            )


def check_pipeline(run: RunConfig) -> None:
    p, layers = run.parallelism, run.model.num_layers
    if p.pipeline > layers:
        raise ConfigError(
            "parallelism.pipeline",
            p.pipeline,
            f"{layers} layers cannot fill {p.pipeline} stages",
            f"{layers} or fewer",
        )
    if p.pipeline > 1 and p.zero_stage > 1:
        raise ConfigError(
            "parallelism.zero_stage",
            p.zero_stage,
            f"DeepSpeed's pipeline of {p.pipeline} stages takes ZeRO-1 at most",
            "parallelism.zero_stage=1, or parallelism.pipeline=1",
        )


def check_zero(run: RunConfig) -> None:
    p = run.parallelism
    if not 0 <= p.zero_stage <= 3:
        raise ConfigError(
            "parallelism.zero_stage", p.zero_stage, "the stages are 0 to 3", str(min(max(p.zero_stage, 0), 3))
        )
    if p.offload_optimizer and p.zero_stage == 0:
        raise ConfigError(
            "parallelism.offload_optimizer",
            True,
            "ZeRO-0 has no partitioned optimizer to offload",
            "parallelism.zero_stage=1, 2 or 3",
        )
    if p.offload_parameters and p.zero_stage != 3:
        raise ConfigError(
            "parallelism.offload_parameters",
            True,
            f"only ZeRO-3 partitions the weights, not ZeRO-{p.zero_stage}",
            "parallelism.zero_stage=3, or parallelism.offload_parameters=false",
        )
    if p.offload_parameters and not p.offload_optimizer:
        raise ConfigError(
            "parallelism.offload_parameters",
            True,
            "the optimizer steps on the offloaded weights and must be with them",
            "parallelism.offload_optimizer=true",
        )


def check_sequence(run: RunConfig) -> None:
    p, length = run.parallelism, sequence_length(run)
    if length > run.model.max_sequence_length:
        raise ConfigError(
            "data.sequence_length",
            length,
            f"longer than model.max_sequence_length={run.model.max_sequence_length}",
            f"data.sequence_length={run.model.max_sequence_length}",
        )
    if p.sequence_parallel and p.tensor == 1:
        raise ConfigError(
            "parallelism.sequence_parallel",
            True,
            "splits the sequence over tensor-parallel ranks; there is one",
            "parallelism.sequence_parallel=false, or parallelism.tensor=2",
        )
    if p.sequence_parallel and length % p.tensor:
        down = length - length % p.tensor
        raise ConfigError(
            "data.sequence_length",
            length,
            f"sequence parallelism cannot split it {p.tensor} ways",
            _either([n for n in (down, down + p.tensor) if 0 < n <= run.model.max_sequence_length]),
        )


def check_vocabulary(run: RunConfig) -> None:
    if run.model.vocab_size < BYTE_VALUES:
        raise ConfigError(
            "model.vocab_size",
            run.model.vocab_size,
            f"the corpus is bytes: {BYTE_VALUES} values",
            str(BYTE_VALUES),
        )


def check_data(run: RunConfig) -> None:
    d = run.data
    _within("data.validation_fraction", d.validation_fraction, 0, 1, "above 0 and below 1, such as 0.05")
    if d.validation is None and d.validation_fraction in (0, 1):
        raise ConfigError(
            "data.validation_fraction", d.validation_fraction, "leaves one side without text", "0.05"
        )
    if d.source is CorpusSource.text and not d.train:
        raise ConfigError(
            "data.train", "null", "data=text needs your files", "a glob: 'data.train=\"corpus/**/*.txt\"'"
        )
    if d.source is CorpusSource.stdlib and (d.train or d.validation):
        field = "data.train" if d.train else "data.validation"
        raise ConfigError(field, d.train or d.validation, "data=stdlib brings its own text", "data=text")


def check_optimizer(run: RunConfig) -> None:
    o = run.optimizer
    adamw = {"beta1": o.beta1, "beta2": o.beta2, "epsilon": o.epsilon}
    sgd = {"momentum": o.momentum}
    needed, foreign = (adamw, sgd) if o.name is OptimizerName.adamw else (sgd, adamw)
    for name, value in needed.items():
        if value is None:
            raise ConfigError(
                f"optimizer.{name}", "null", f"{o.name.value} needs it", f"optimizer={o.name.value} sets it"
            )
    for name, value in foreign.items():
        if value is not None:
            other = "sgd" if o.name is OptimizerName.adamw else "adamw"
            raise ConfigError(
                f"optimizer.{name}",
                value,
                f"not a setting of {o.name.value}",
                f"optimizer={other}, or leave it out",
            )


def check_scheduler(run: RunConfig) -> None:
    s, steps = run.scheduler, run.training.steps
    if s.name is not SchedulerName.wsd:
        if s.decay_steps is not None:
            raise ConfigError(
                "scheduler.decay_steps",
                s.decay_steps,
                f"not a setting of {s.name.value}",
                "scheduler=wsd, or leave it out",
            )
        return
    room = steps - s.warmup_steps
    if s.decay_steps is None or not 1 <= s.decay_steps <= room:
        raise ConfigError(
            "scheduler.decay_steps",
            "null" if s.decay_steps is None else s.decay_steps,
            f"wsd decays within training.steps={steps} after {s.warmup_steps} warm-up steps",
            f"1 to {room}",
        )


def check_stop(run: RunConfig) -> None:
    t = run.training
    if t.stop_at is not None and t.stop_at > t.steps:
        raise ConfigError(
            "training.stop_at",
            t.stop_at,
            f"after the last step, training.steps={t.steps}",
            f"{t.steps} or less",
        )


def check_deepspeed(run: RunConfig) -> None:
    check_passthrough(run.deepspeed)


def check_fp16_has_a_gpu(run: RunConfig, layout: Layout) -> None:
    if run.precision.dtype is Dtype.fp16 and layout.device == "cpu":
        raise ConfigError(
            "precision.dtype",
            "fp16",
            "DeepSpeed trains fp16 on GPUs only",
            "precision=bf16 or precision=fp32",
        )


RULES: tuple[Callable[[RunConfig], None], ...] = (
    check_positive,
    check_ranges,
    check_heads,
    check_tensor_divides,
    check_pipeline,
    check_zero,
    check_sequence,
    check_vocabulary,
    check_data,
    check_optimizer,
    check_scheduler,
    check_stop,
    check_deepspeed,
)


def _either(options: list[Any]) -> str:
    return " or ".join(str(option) for option in options)


def validate_generate(config: GenerateConfig) -> str:
    """Check what `launcher generate` is given; return the run's directory. Raises ConfigError."""
    if config.run.dir is None:
        raise ConfigError(
            "run.dir", "null", "which run to sample from?", "run.dir=runs/NAME, of a finished run"
        )
    if not config.prompt:
        raise ConfigError(
            "prompt", "''", "the model continues a text, and this one is empty", 'prompt="import "'
        )
    _within("max_new_tokens", config.max_new_tokens, 1, float("inf"), "1 or more")
    _within("temperature", config.temperature, 0, float("inf"), "0 (always the likeliest) or more")
    _within("top_k", config.top_k, 0, float("inf"), "0 (off) or more")
    return config.run.dir
