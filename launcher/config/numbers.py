"""The valid range of every number in a config."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from math import inf

from launcher.config.errors import ConfigError

BYTE_VALUES = 256
IGNORED_LABEL = -100  # a label that no loss counts


@dataclass(frozen=True)
class Range:
    """A range of valid numbers."""

    words: str  # the error message for other numbers
    holds: Callable[[float], bool]  # whether a number is valid; false for nan


ANY = Range("must be a number", lambda value: value == value)
COUNT = Range("must be at least 1", lambda value: value >= 1)
NOT_NEGATIVE = Range("must be at least 0", lambda value: value >= 0)
FROM_0 = Range("must be a finite number, 0 or more", lambda value: 0 <= value < inf)
ABOVE_0 = Range("must be a finite number above 0", lambda value: 0 < value < inf)
AT_LEAST_1 = Range("must be a finite number, 1 or more", lambda value: 1 <= value < inf)
BELOW_1 = Range("must be 0 or more and below 1", lambda value: 0 <= value < 1)
SHARE = Range("must be from 0 to 1", lambda value: 0 <= value <= 1)
SHARE_ABOVE_0 = Range("must be above 0 and at most 1", lambda value: 0 < value <= 1)
POWER = Range(
    "must be from 0 to 127, because 2**127 is float32's largest power of two", lambda value: 0 <= value <= 127
)
LEAD = Range("must be from 0 to 65535, the seconds that Slurm accepts", lambda value: 0 <= value <= 65535)
STAGE = Range("the stages are 0 to 3", lambda value: 0 <= value <= 3)
SEED = Range("must be 0 or more and below 2 to the 63", lambda value: 0 <= value < 2**63)


@dataclass(frozen=True)
class Bound:
    """The valid numbers of a field: those in `range` from `least` to `most`, with a valid example."""

    range: Range
    example: str
    most: float  # far above every use, and small enough to check and plan in seconds
    least: float = -inf


YEAR = 525_600  # minutes
_STEPS, _SIZE, _TOKENS = 10**12, 2**24, 2**31
_RANKS, _LOCAL_RANKS, _BATCH = 2**16, 2**10, 2**22
_RATE = {"most": 1e24, "least": 1e-6}  # per second, such that no time of a plan overflows
_SECONDS = {"most": 1e6}

_CURVES = ("products.fp32", "products.bf16", "products.fp16", "elementwise", "collectives[].points")
# The bound of each number field, also in items of lists, of every command.
BOUNDS: dict[str, Bound] = {
    "model.hidden_size": Bound(COUNT, "128", 2**20), "model.num_layers": Bound(COUNT, "1", 2**12),
    "model.num_heads": Bound(COUNT, "1", 2**14), "model.num_kv_heads": Bound(COUNT, "null", 2**14),
    "model.head_size": Bound(COUNT, "null", 2**16), "model.ffn_hidden_size": Bound(COUNT, "512", _SIZE),
    # Whether these may be 0 depends on model.inputs.
    "model.vocab_size": Bound(NOT_NEGATIVE, str(BYTE_VALUES), _TOKENS),
    "model.max_sequence_length": Bound(NOT_NEGATIVE, "128", _SIZE),
    "model.num_classes": Bound(NOT_NEGATIVE, "0", _SIZE), "model.image_size": Bound(NOT_NEGATIVE, "0", 2**15),
    "model.image_channels": Bound(NOT_NEGATIVE, "0", 2**10),
    "model.patch_size": Bound(NOT_NEGATIVE, "0", 2**15),
    "model.dropout": Bound(BELOW_1, "0.1", 1), "model.norm_epsilon": Bound(ABOVE_0, "1e-5", 1e3),
    "model.rope_theta": Bound(ABOVE_0, "10000", 1e30), "model.init_std": Bound(FROM_0, "0.02", 1e6),
    "model.rope_scaling.factor": Bound(AT_LEAST_1, "1", 1e6),
    "model.rope_scaling.original_length": Bound(COUNT, "null", _SIZE),
    "model.rope_scaling.low_frequency_factor": Bound(ABOVE_0, "1", 1e6),
    "model.rope_scaling.high_frequency_factor": Bound(ABOVE_0, "4", 1e6),
    "model.rope_scaling.beta_fast": Bound(ABOVE_0, "32", 1e6),
    "model.rope_scaling.beta_slow": Bound(ABOVE_0, "1", 1e6),
    "model.rope_scaling.attention_factor": Bound(ABOVE_0, "null", 1e6),
    "model.rotary_fraction": Bound(SHARE_ABOVE_0, "1", 1),
    "model.sliding_window": Bound(COUNT, "null", _SIZE),
    "model.full_attention_every": Bound(COUNT, "null", 2**12),
    "model.local_rope_theta": Bound(ABOVE_0, "null", 1e30),
    "model.attention_scale_size": Bound(ABOVE_0, "null", 2**20),
    "model.attention_soft_cap": Bound(ABOVE_0, "null", 1e6),
    "model.logit_soft_cap": Bound(ABOVE_0, "null", 1e6),
    "model.embedding_scale": Bound(ABOVE_0, "1", 1e6),
    "model.experts.count": Bound(NOT_NEGATIVE, "0", 2**12),
    # Whether these may be 0 depends on model.experts.count.
    "model.experts.top_k": Bound(NOT_NEGATIVE, "0", 2**12),
    "model.experts.ffn_hidden_size": Bound(NOT_NEGATIVE, "0", _SIZE),
    "model.experts.shared": Bound(NOT_NEGATIVE, "0", 2**10),
    "model.experts.first_dense_layers": Bound(NOT_NEGATIVE, "0", 2**12),
    "model.experts.every": Bound(COUNT, "1", 2**12),
    "model.experts.scaling": Bound(ABOVE_0, "1", 1e6),
    "model.experts.auxiliary_loss": Bound(FROM_0, "0", 1e6),
    "model.experts.z_loss": Bound(FROM_0, "0", 1e6),
    "model.experts.bias_balancing": Bound(FROM_0, "0", 1e3),
    "parallelism.tensor": Bound(COUNT, "1", 2**10), "parallelism.pipeline": Bound(COUNT, "1", 2**12),
    "parallelism.data": Bound(COUNT, "null", _RANKS), "parallelism.context": Bound(COUNT, "1", 2**10),
    "parallelism.expert": Bound(COUNT, "1", 2**12),
    "parallelism.zero_stage": Bound(STAGE, "1 (or 0, 2, 3)", 3),
    "parallelism.vocabulary_multiple": Bound(COUNT, "null", 2**16),
    "hardware.nodes": Bound(COUNT, "1", _RANKS),
    "hardware.accelerators_per_node": Bound(COUNT, "null", _LOCAL_RANKS),
    "hardware.memory_bytes": Bound(ABOVE_0, "null", 1e18, least=1),
    "hardware.peak_flops.fp32": Bound(ABOVE_0, "null", **_RATE),
    "hardware.peak_flops.bf16": Bound(ABOVE_0, "null", **_RATE),
    "hardware.peak_flops.fp16": Bound(ABOVE_0, "null", **_RATE),
    "hardware.gemm_efficiency": Bound(SHARE_ABOVE_0, "null", 1, least=1e-9),
    "hardware.memory_bandwidth_gb_s": Bound(ABOVE_0, "null", **_RATE),
    "hardware.bandwidth_intra_node_gb_s": Bound(ABOVE_0, "null", **_RATE),
    "hardware.bandwidth_inter_node_gb_s": Bound(ABOVE_0, "null", **_RATE),
    "hardware.host_bandwidth_gb_s": Bound(ABOVE_0, "null", **_RATE),
    "hardware.host_memory_bytes": Bound(ABOVE_0, "null", 1e18, least=1),
    "hardware.cores": Bound(COUNT, "null", _RANKS),
    "hardware.compute_scale": Bound(ABOVE_0, "1", 1e3, least=1e-3),
    "hardware.card.products.fp32": Bound(ABOVE_0, "null", **_RATE),
    "hardware.card.products.bf16": Bound(ABOVE_0, "null", **_RATE),
    "hardware.card.products.fp16": Bound(ABOVE_0, "null", **_RATE),
    "hardware.card.unaligned": Bound(SHARE_ABOVE_0, "null", 1, least=1e-9),
    "hardware.card.attention[].head_size": Bound(COUNT, "128", 2**16),
    "hardware.card.attention[].forward": Bound(ABOVE_0, "1e14", **_RATE),
    "hardware.card.attention[].forward_ramp": Bound(FROM_0, "0", 1e6),
    "hardware.card.attention[].backward": Bound(ABOVE_0, "1e14", **_RATE),
    "hardware.card.attention[].backward_ramp": Bound(FROM_0, "0", 1e6),
    "hardware.card.memory_gb_s": Bound(ABOVE_0, "null", **_RATE),
    "hardware.card.update_gb_s": Bound(ABOVE_0, "null", **_RATE),
    "hardware.card.launch_s": Bound(FROM_0, "null", **_SECONDS),
    "hardware.card.host_gb_s": Bound(ABOVE_0, "null", **_RATE),
    "hardware.card.link_gb_s": Bound(ABOVE_0, "null", **_RATE),
    "hardware.card.gather_gb_s": Bound(ABOVE_0, "null", **_RATE),
    "hardware.card.hop_s": Bound(FROM_0, "null", **_SECONDS),
    "hardware.card.context_bytes": Bound(FROM_0, "null", 1e12),
    "hardware.card.group_bytes": Bound(FROM_0, "null", 1e12),
    "hardware.measured[].ranks": Bound(COUNT, "1", _RANKS),
    "hardware.measured[].stream": Bound(ABOVE_0, "1e10", **_RATE),
    "hardware.measured[].operation_s": Bound(FROM_0, "0", **_SECONDS),
    "hardware.measured[].step_s": Bound(FROM_0, "0", **_SECONDS),
    "hardware.measured[].micro_batch_s": Bound(FROM_0, "0", **_SECONDS),
    "hardware.measured[].zero_2_block_s": Bound(FROM_0, "0", **_SECONDS),
    "hardware.measured[].zero_3_block_s": Bound(FROM_0, "0", **_SECONDS),
    "hardware.measured[].pipeline_batch_s": Bound(FROM_0, "0", **_SECONDS),
    "hardware.measured[].collectives[].ranks": Bound(COUNT, "2", _RANKS),
    "hardware.measured[].scales[].flops": Bound(ABOVE_0, "1e9", 1e30, least=1e-6),
    "hardware.measured[].scales[].factor": Bound(ABOVE_0, "1", 1e9, least=1e-9),
    "hardware.measured[].waiting_scales[].flops": Bound(ABOVE_0, "1e9", 1e30, least=1e-6),
    "hardware.measured[].waiting_scales[].factor": Bound(ABOVE_0, "1", 1e9, least=1e-9),
    **{
        f"hardware.measured[].{points}[].{field}": bound
        for points in _CURVES
        for field, bound in {
            "size": Bound(ABOVE_0, "1e6", 1e30, least=1e-6), "per_s": Bound(ABOVE_0, "1e9", **_RATE),
        }.items()
    },
    "finetune.lora.rank": Bound(NOT_NEGATIVE, "8", 2**16),
    "finetune.lora.alpha": Bound(ABOVE_0, "16", 1e6), "finetune.lora.dropout": Bound(BELOW_1, "0.05", 1),
    "checkpoint.interval_steps": Bound(COUNT, "null", _STEPS),
    "checkpoint.interval_minutes": Bound(ABOVE_0, "null", YEAR),
    "checkpoint.keep_last": Bound(COUNT, "1", 10**6),
    "checkpoint.keep_every_steps": Bound(COUNT, "null", _STEPS),
    "checkpoint.stop_grace_seconds": Bound(ABOVE_0, "null", 86_400),
    "checkpoint.max_file_gb": Bound(ABOVE_0, "2", 1e6),
    "data.validation_fraction": Bound(SHARE, "0.05", 1), "data.test_fraction": Bound(BELOW_1, "0", 1),
    "data.sequence_length": Bound(COUNT, "null", _SIZE),
    "data.end_of_document": Bound(NOT_NEGATIVE, "null", _TOKENS),
    "data.num_workers": Bound(NOT_NEGATIVE, "1", 256), "data.prefetch": Bound(COUNT, "2", 1024),
    "optimizer.lr": Bound(ABOVE_0, "1e-3", 1e9), "optimizer.weight_decay": Bound(FROM_0, "0", 1e9),
    "optimizer.gradient_clipping": Bound(ABOVE_0, "null (off)", 1e30),
    "optimizer.beta1": Bound(BELOW_1, "0.9", 1), "optimizer.beta2": Bound(BELOW_1, "0.95", 1),
    "optimizer.epsilon": Bound(FROM_0, "1e-8", 1e9), "optimizer.momentum": Bound(BELOW_1, "0.9", 1),
    # Not below training.steps: a short trial of a long schedule may have more warm-up steps than it trains.
    "scheduler.warmup_steps": Bound(NOT_NEGATIVE, "0", _STEPS),
    "scheduler.decay_steps": Bound(COUNT, "1", _STEPS), "scheduler.min_lr_ratio": Bound(SHARE, "0", 1),
    "precision.initial_loss_scale_power": Bound(POWER, "16", 127),
    "logging.interval": Bound(COUNT, "1", _STEPS),
    "training.steps": Bound(NOT_NEGATIVE, "200", _STEPS), "training.stop_at": Bound(COUNT, "null", _STEPS),
    "training.global_batch_size": Bound(COUNT, "16", _BATCH),
    "training.micro_batch_size": Bound(COUNT, "1", _BATCH),
    "training.validation_interval": Bound(NOT_NEGATIVE, "0 (only at the end)", _STEPS),
    "training.validation_batches": Bound(COUNT, "1", 10**9),
    "training.seed": Bound(ANY, "1234", 2**63 - 1, least=-(2**63)),
    "verify.steps": Bound(COUNT, "3", 10**4),
    "plan.tokens": Bound(ABOVE_0, "null", 1e24),
    "plan.expert_imbalance": Bound(AT_LEAST_1, "1", 2**12),
    "launch.timeout_minutes": Bound(ABOVE_0, "30", YEAR, least=0.001),
    "launch.slow_rank_seconds": Bound(ABOVE_0, "60", 86_400),
    "launch.max_restarts": Bound(NOT_NEGATIVE, "3", 10**6),
    "guard.max_skips": Bound(COUNT, "10", 10**9), "guard.spike_window": Bound(COUNT, "128", 10**6),
    "guard.spike_score": Bound(ABOVE_0, "8", 1e9),
    "guard.replica_interval": Bound(NOT_NEGATIVE, "100", _STEPS),
    "profile.first_step": Bound(COUNT, "null", _STEPS), "profile.steps": Bound(COUNT, "3", 1000),
    "few_shot": Bound(NOT_NEGATIVE, "null", 10**4), "limit": Bound(COUNT, "null", 10**12),
    "sequence_length": Bound(COUNT, "null", _SIZE), "stride": Bound(COUNT, "null", _SIZE),
    "micro_batch_size": Bound(COUNT, "4", _BATCH),
    "step": Bound(COUNT, "1", _STEPS), "samples": Bound(COUNT, "8", _BATCH),
    "slurm.cpus_per_task": Bound(COUNT, "null", _RANKS), "slurm.max_parallel": Bound(COUNT, "null", _RANKS),
    "slurm.signal_seconds": Bound(LEAD, "120", 65_535),
    "compare.ranks": Bound(COUNT, "4", _LOCAL_RANKS), "compare.steps": Bound(COUNT, "8", 10**6),
    "max_new_tokens": Bound(COUNT, "1", 10**7),
    "temperature": Bound(FROM_0, "0 (always the most likely token)", 1e6),
    "top_k": Bound(NOT_NEGATIVE, "0 (off)", _TOKENS), "seed": Bound(SEED, "0", 2**63 - 1),
    "tokenizer.train_mb": Bound(ABOVE_0, "512", 1e9), "vocab": Bound(COUNT, "32000", _SIZE),
    "max_line_mb": Bound(ABOVE_0, "256", 2048), "workers": Bound(COUNT, "1", _LOCAL_RANKS),
    "rounds": Bound(COUNT, "5", 1000), "most_ranks": Bound(COUNT, "null", _LOCAL_RANKS),
    "max_file_gb": Bound(ABOVE_0, "2", 1e6),
}  # fmt: skip


def numbers_in(config: object, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield each number of a config with its name in BOUNDS; null values are left out."""
    for name, value in vars(config).items():
        if is_dataclass(value):
            yield from numbers_in(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            for item in value:
                if is_dataclass(item):
                    yield from numbers_in(item, f"{prefix}{name}[].")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


def refuse_out_of_bounds(config: object) -> None:
    """Raise ConfigError for the first number of any config that is outside its bounds."""
    for field, value in numbers_in(config):
        bound = BOUNDS[field]
        if not bound.range.holds(value):
            raise ConfigError(field, value, bound.range.words, f"{field}={bound.example}")
        if not bound.least <= value <= bound.most:
            limit = f"most {bound.most}" if value > bound.most else f"least {bound.least}"
            raise ConfigError(field, value, f"must be at {limit}", f"{field}={bound.example}")
