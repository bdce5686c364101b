"""The keys of DeepSpeed's config that `deepspeed.*` may set, and the keys that the launcher sets itself.

The keys are a table because importing deepspeed takes seconds, and a typo must be refused at once.
tests/config/test_deepspeed_keys.py compares the table with the config models of the installed DeepSpeed.
"""

import difflib
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.config.errors import ConfigError, as_typed


@dataclass(frozen=True)
class KeyType:
    """The values that DeepSpeed accepts for a key."""

    words: str  # the error message for other values
    holds: Callable[[Any], bool]  # whether a value is accepted
    example: str  # an accepted value


MOST = 1e15  # of every number; nan and inf are refused too


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MOST


def _is_whole(value: Any) -> bool:
    return _is_number(value) and float(value).is_integer()


FLAG = KeyType("must be true or false", lambda value: isinstance(value, bool), "true")
COUNT = KeyType("must be a whole number from 0 to 1e15", lambda value: _is_whole(value) and value >= 0, "1")
SIZE = KeyType("must be a whole number from 1 to 1e15", lambda value: _is_whole(value) and value >= 1, "1")
EVEN = KeyType(
    "must be an even number from 2 to 1e15",
    lambda value: _is_whole(value) and value >= 2 and value % 2 == 0,
    "2",
)
NUMBER = KeyType("must be a number from 0 to 1e15", lambda value: _is_number(value) and value >= 0, "1.0")
FACTOR = KeyType(
    "must be a number above 0, at most 1e15", lambda value: _is_number(value) and value > 1 / MOST, "1.0"
)
SHARE = KeyType("must be from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1, "1.0")
TEXT = KeyType("must be text", lambda value: isinstance(value, str), "info")
NAMES = KeyType("must be a list", lambda value: isinstance(value, list), "[all_reduce]")
DTYPE = KeyType("must be fp32, bf16 or fp16", lambda value: value in ("fp32", "bf16", "fp16"), "fp32")
SECTION = KeyType(
    "this key is a section, which has no value itself", lambda keys: isinstance(keys, Mapping), ""
)


def _keys(**names: str) -> dict[str, KeyType]:
    """Return the type of each key, in alphabetical order, from space-separated key names per type."""
    types = {
        "flag": FLAG, "count": COUNT, "size": SIZE, "even": EVEN, "number": NUMBER, "factor": FACTOR,
        "share": SHARE, "text": TEXT, "names": NAMES, "dtype": DTYPE, "section": SECTION,
    }  # fmt: skip
    return dict(sorted((key, types[name]) for name, keys in names.items() for key in keys.split()))


SECTIONS: dict[str, dict[str, KeyType]] = {
    "zero_optimization": _keys(
        flag="contiguous_gradients reduce_scatter use_multi_rank_bucket_allreduce allgather_partitions "
        "overlap_comm stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential "
        "ignore_unused_parameters round_robin_gradients zero_quantized_weights zero_quantized_gradients "
        "log_trace_cache_warnings enable_sanity_checks",
        size="reduce_bucket_size",
        even="allgather_bucket_size",
        count="sub_group_size stage3_prefetch_bucket_size "
        "stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters "
        "stage3_max_reuse_distance stage3_module_granularity_threshold zero_hpz_partition_size",
        section="offload_param offload_optimizer",
    ),
    "zero_optimization.offload_param": _keys(
        text="nvme_path", count="buffer_count buffer_size max_in_cpu", flag="pin_memory",
    ),
    "zero_optimization.offload_optimizer": _keys(
        text="nvme_path", count="buffer_count", share="ratio",
        flag="pin_memory pipeline_read pipeline_write fast_init",
    ),
    "bf16": _keys(flag="check_grad_overflow"),
    "fp16": _keys(
        number="loss_scale", size="loss_scale_window hysteresis min_loss_scale",
        flag="consecutive_hysteresis",
    ),
    "comms_logger": _keys(flag="enabled prof_all verbose debug", names="prof_ops"),
    "data_types": _keys(dtype="grad_accum_dtype"),
    "flops_profiler": _keys(
        flag="enabled detailed", number="recompute_fwd_factor", text="output_file",
        count="profile_step module_depth top_modules",
    ),
    "aio": _keys(
        size="block_size queue_depth intra_op_parallelism", flag="single_submit overlap_events use_gds",
    ),
}  # fmt: skip

# DeepSpeed also accepts gradient_allreduce_op, but a sum would make the update depend on the layout.
TOP_LEVEL: dict[str, KeyType] = _keys(
    dtype="communication_data_type",
    flag="disable_allgather disable_python_gc dump_state memory_breakdown prescale_gradients "
    "wall_clock_breakdown",
    factor="gradient_predivide_factor", size="steps_per_print", text="log_level",
    section=" ".join(sorted({name.split(".")[0] for name in SECTIONS})),
)  # fmt: skip

# The keys that the launcher sets itself, with the field to set instead; {} is the user's value.
OURS: dict[str, str] = {
    "train_batch_size": "training.global_batch_size={}",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size={}",
    "gradient_accumulation_steps": "training.micro_batch_size=1 (smaller micro-batches, more accumulation)",
    "gradient_clipping": "optimizer.gradient_clipping={}", "optimizer": "optimizer=adamw or optimizer=sgd",
    "scheduler": "scheduler=cosine or another option of the group scheduler",
    "bf16.enabled": "precision=bf16", "bf16.immediate_grad_update": "precision=bf16",
    "bf16.bf16_master_weights_and_grads": "precision=bf16_states",
    "bf16.bf16_optimizer_states": "precision=bf16_states",
    "fp16.enabled": "precision=fp16",
    "fp16.initial_scale_power": "precision.initial_loss_scale_power={}",
    "zero_optimization.stage": "parallelism.zero_stage={}",
    "zero_optimization.offload_optimizer.device": "parallelism.offload_optimizer=true",
    "zero_optimization.offload_param.device": "parallelism=zero3_offload",
    "activation_checkpointing": "parallelism.activation_checkpointing=full",
    "pipeline": "parallelism.pipeline=2", "wandb": "logging=wandb",
}  # fmt: skip


def check_passthrough(keys: Mapping[str, Any], section: str = "") -> None:
    """Raise ConfigError for a key or value that DeepSpeed does not accept, or for a key in OURS."""
    prefix = f"{section}." if section else ""
    types = SECTIONS[section] if section else TOP_LEVEL
    for key, value in keys.items():
        path = f"{prefix}{key}"
        field, shown = f"deepspeed.{path}", as_typed(value)
        if path in OURS:
            why = "the launcher sets this key itself"
            raise ConfigError(field, shown, why, OURS[path].format(shown))
        if key not in types:
            close = difflib.get_close_matches(str(key), types, n=2)
            remedies = [shlex.quote(f"deepspeed.{prefix}{name}={shown}") for name in close]
            names = f"deepspeed.{prefix}NAME, where NAME is one of {', '.join(types)}"
            why = "unknown or unsupported DeepSpeed key"
            raise ConfigError(field, shown, why, " or ".join(remedies) or names)
        if not types[key].holds(value):
            inner = f".{next(iter(SECTIONS[path]))}=VALUE" if path in SECTIONS else f"={types[key].example}"
            ours = OURS.get(f"{path}.stage", OURS.get(f"{path}.enabled")) if value in (1, 2, 3) else None
            instead = f"{ours.format(int(value))} or " if ours else ""
            raise ConfigError(field, shown, types[key].words, f"{instead}{field}{inner}")
        if path in SECTIONS:
            check_passthrough(value, path)
