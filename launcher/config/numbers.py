"""The valid range of every number in a config."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf

from launcher.config.errors import refusal, value_of

BYTE_VALUES = 256


@dataclass(frozen=True)
class Range:
    """A range of valid numbers."""

    words: str  # the error message for other numbers
    holds: Callable[[float], bool]  # whether a number is valid; false for nan


COUNT = Range("must be at least 1", lambda value: value >= 1)
NOT_NEGATIVE = Range("must be at least 0", lambda value: value >= 0)
FROM_0 = Range("must be a finite number, 0 or more", lambda value: 0 <= value < inf)
ABOVE_0 = Range("must be a finite number above 0", lambda value: 0 < value < inf)
BELOW_1 = Range("must be 0 or more and below 1", lambda value: 0 <= value < 1)
SHARE = Range("must be from 0 to 1", lambda value: 0 <= value <= 1)
SHARE_ABOVE_0 = Range("must be above 0 and at most 1", lambda value: 0 < value <= 1)
POWER = Range(
    "must be from 0 to 127, because 2**127 is float32's largest power of two", lambda value: 0 <= value <= 127
)
LEAD = Range("must be from 0 to 65535, the seconds that Slurm accepts", lambda value: 0 <= value <= 65535)
SEED = Range("must be 0 or more and below 2 to the 63", lambda value: 0 <= value < 2**63)

# Each number field of a run, with its range and a valid value. training.seed may be any integer.
NUMBERS: dict[str, tuple[Range, str]] = {
    "model.hidden_size": (COUNT, "128"), "model.num_layers": (COUNT, "1"), "model.num_heads": (COUNT, "1"),
    "model.num_kv_heads": (COUNT, "null"), "model.head_size": (COUNT, "null"),
    "model.ffn_hidden_size": (COUNT, "512"),
    # Whether these may be 0 depends on model.inputs.
    "model.vocab_size": (NOT_NEGATIVE, str(BYTE_VALUES)), "model.max_sequence_length": (NOT_NEGATIVE, "128"),
    "model.num_classes": (NOT_NEGATIVE, "0"), "model.image_size": (NOT_NEGATIVE, "0"),
    "model.image_channels": (NOT_NEGATIVE, "0"), "model.patch_size": (NOT_NEGATIVE, "0"),
    "model.dropout": (BELOW_1, "0.1"), "model.norm_epsilon": (ABOVE_0, "1e-5"),
    "model.rope_theta": (ABOVE_0, "10000"), "model.init_std": (FROM_0, "0.02"),
    "parallelism.tensor": (COUNT, "1"), "parallelism.pipeline": (COUNT, "1"),
    "parallelism.data": (COUNT, "null"),
    "hardware.nodes": (COUNT, "1"), "hardware.accelerators_per_node": (COUNT, "null"),
    "hardware.memory_bytes": (ABOVE_0, "null"), "hardware.peak_flops.fp32": (ABOVE_0, "null"),
    "hardware.peak_flops.bf16": (ABOVE_0, "null"), "hardware.peak_flops.fp16": (ABOVE_0, "null"),
    "hardware.gemm_efficiency": (SHARE_ABOVE_0, "null"), "hardware.memory_bandwidth_gb_s": (ABOVE_0, "null"),
    "hardware.bandwidth_intra_node_gb_s": (ABOVE_0, "null"),
    "hardware.bandwidth_inter_node_gb_s": (ABOVE_0, "null"),
    "hardware.host_bandwidth_gb_s": (ABOVE_0, "null"), "hardware.cores": (COUNT, "null"),
    "checkpoint.interval_steps": (COUNT, "null"), "checkpoint.interval_minutes": (ABOVE_0, "null"),
    "checkpoint.keep_last": (COUNT, "1"), "checkpoint.keep_every_steps": (COUNT, "null"),
    "checkpoint.stop_grace_seconds": (ABOVE_0, "null"), "checkpoint.max_file_gb": (ABOVE_0, "2"),
    "data.validation_fraction": (SHARE, "0.05"), "data.test_fraction": (BELOW_1, "0"),
    "data.sequence_length": (COUNT, "null"), "data.end_of_document": (NOT_NEGATIVE, "null"),
    "data.num_workers": (NOT_NEGATIVE, "1"), "data.prefetch": (COUNT, "2"),
    "optimizer.lr": (ABOVE_0, "1e-3"), "optimizer.weight_decay": (FROM_0, "0"),
    "optimizer.gradient_clipping": (ABOVE_0, "null (off)"), "optimizer.beta1": (BELOW_1, "0.9"),
    "optimizer.beta2": (BELOW_1, "0.95"), "optimizer.epsilon": (FROM_0, "1e-8"),
    "optimizer.momentum": (BELOW_1, "0.9"),
    # No upper limit: a short trial of a long schedule may have more warm-up steps than the run has steps.
    "scheduler.warmup_steps": (NOT_NEGATIVE, "0"), "scheduler.decay_steps": (COUNT, "1"),
    "scheduler.min_lr_ratio": (SHARE, "0"),
    "precision.initial_loss_scale_power": (POWER, "16"),
    "logging.interval": (COUNT, "1"),
    "training.steps": (NOT_NEGATIVE, "200"),
    "verify.steps": (COUNT, "3"),
    "plan.tokens": (ABOVE_0, "null"),
    "guard.max_skips": (COUNT, "10"), "guard.spike_window": (COUNT, "128"),
    "guard.spike_score": (ABOVE_0, "8"),
    "launch.timeout_minutes": (ABOVE_0, "30"), "launch.slow_rank_seconds": (ABOVE_0, "60"),
    "launch.max_restarts": (NOT_NEGATIVE, "3"),
    "guard.replica_interval": (NOT_NEGATIVE, "100"),
    "slurm.cpus_per_task": (COUNT, "null"), "slurm.max_parallel": (COUNT, "null"),
    "slurm.signal_seconds": (LEAD, "120"),
    "training.stop_at": (COUNT, "null"), "training.global_batch_size": (COUNT, "16"),
    "training.micro_batch_size": (COUNT, "1"),
    "training.validation_interval": (NOT_NEGATIVE, "0 (only at the end)"),
    "training.validation_batches": (COUNT, "1"),
}  # fmt: skip

GENERATE_NUMBERS: dict[str, tuple[Range, str]] = {
    "max_new_tokens": (COUNT, "1"), "temperature": (FROM_0, "0 (always the most likely token)"),
    "top_k": (NOT_NEGATIVE, "0 (off)"), "seed": (SEED, "0"),
}  # fmt: skip
PREPARE_NUMBERS: dict[str, tuple[Range, str]] = {
    "tokenizer.train_mb": (ABOVE_0, "512"), "vocab": (COUNT, "32000"), "max_line_mb": (ABOVE_0, "256"),
    "workers": (COUNT, "1"),
}  # fmt: skip
COMPARE_NUMBERS: dict[str, tuple[Range, str]] = {"compare.ranks": (COUNT, "4"), "compare.steps": (COUNT, "8")}
CALIBRATE_NUMBERS: dict[str, tuple[Range, str]] = {"rounds": (COUNT, "5"), "most_ranks": (COUNT, "null")}
REPLAY_NUMBERS: dict[str, tuple[Range, str]] = {"step": (COUNT, "1"), "samples": (COUNT, "8")}
EXCHANGE_NUMBERS: dict[str, tuple[Range, str]] = {"max_file_gb": (ABOVE_0, "2")}


def refuse_numbers_out_of_range(config: object, numbers: Mapping[str, tuple[Range, str]]) -> None:
    """Raise ConfigError for the first number in `config` outside its range; null is always valid."""
    for field, (valid, example) in numbers.items():
        value = value_of(config, field)
        assert value is None or isinstance(value, (int, float))
        if value is not None and not valid.holds(value):
            raise refusal(config, field, valid.words, f"{field}={example}")
