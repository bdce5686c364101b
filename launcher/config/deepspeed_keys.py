"""The keys of DeepSpeed's own config that `deepspeed.*` may carry, and those the launcher sets itself.

A table and not an import: importing deepspeed takes seconds, and a typo must be refused at once.
tests/config/test_deepspeed_keys.py holds the table against the installed DeepSpeed's config models.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from launcher.config.errors import ConfigError, as_typed

_SCALARS = """
comms_logger communication_data_type data_types disable_allgather disable_python_gc dump_state log_level
gradient_allreduce_op gradient_predivide_factor memory_breakdown prescale_gradients steps_per_print
wall_clock_breakdown
""".split()

SECTIONS: dict[str, list[str]] = {
    "zero_optimization": """
        contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
        allgather_partitions allgather_bucket_size overlap_comm offload_param offload_optimizer sub_group_size
        stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold
        stage3_max_live_parameters stage3_max_reuse_distance stage3_module_granularity_threshold
        stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential ignore_unused_parameters
        round_robin_gradients zero_hpz_partition_size zero_quantized_weights zero_quantized_gradients
        log_trace_cache_warnings enable_sanity_checks
    """.split(),
    "zero_optimization.offload_param": "nvme_path buffer_count buffer_size max_in_cpu pin_memory".split(),
    "zero_optimization.offload_optimizer": (
        "nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio".split()
    ),
    "bf16": "immediate_grad_update check_grad_overflow".split(),
    "fp16": "loss_scale loss_scale_window hysteresis consecutive_hysteresis min_loss_scale".split(),
    "comms_logger": "enabled prof_all prof_ops verbose debug".split(),
    "data_types": "grad_accum_dtype".split(),
    "flops_profiler": """
        enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file
    """.split(),
    "aio": "block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds".split(),
}

TOP_LEVEL: list[str] = sorted({*_SCALARS, *(name.split(".")[0] for name in SECTIONS)})

# The field to set instead; {} is the value that was typed.
OURS: dict[str, str] = {
    "train_batch_size": "training.global_batch_size={}",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size={}",
    "gradient_accumulation_steps": "derived from training.global_batch_size and training.micro_batch_size",
    "gradient_clipping": "optimizer.gradient_clipping={}",
    "optimizer": "optimizer=adamw or optimizer=sgd",
    "scheduler": "scheduler=cosine or another of the group scheduler",
    "bf16.enabled": "precision=bf16",
    "fp16.enabled": "precision=fp16",
    "fp16.initial_scale_power": "precision.initial_loss_scale_power={}",
    "zero_optimization.stage": "parallelism.zero_stage={}",
    "zero_optimization.offload_optimizer.device": "parallelism.offload_optimizer=true",
    "zero_optimization.offload_param.device": "parallelism=zero3_offload",
    "activation_checkpointing": "parallelism.activation_checkpointing=full",
    "pipeline": "parallelism.pipeline=2",
    "wandb": "logging=wandb",
}


def check_passthrough(extra: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key DeepSpeed does not read, or one that another field of the run sets."""
    _check_section("", extra)


def _check_section(section: str, keys: Mapping[str, Any]) -> None:
    prefix = f"{section}." if section else ""
    allowed = SECTIONS[section] if section else TOP_LEVEL
    for key, value in keys.items():
        path = f"{prefix}{key}"
        shown = as_typed(value)
        if path in OURS:
            why = "the launcher sets this one"
            raise ConfigError(f"deepspeed.{path}", shown, why, OURS[path].format(shown))
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=2)
            remedies = [f"deepspeed.{prefix}{name}={shown}" for name in close]
            names = f"deepspeed.{prefix}NAME, where NAME is one of {', '.join(allowed)}"
            why = "no key of DeepSpeed's that a run may set"
            raise ConfigError(f"deepspeed.{path}", shown, why, " or ".join(remedies) or names)
        if path in SECTIONS:
            if not isinstance(value, Mapping):
                remedy = f"deepspeed.{path}.{SECTIONS[path][0]}=VALUE"
                raise ConfigError(f"deepspeed.{path}", shown, "a section, not a value", remedy)
            _check_section(path, value)
