"""Build DeepSpeed's config from RunConfig and Layout. Pure."""

from typing import Any

from launcher.config.layout import Layout
from launcher.config.schema import Dtype, RunConfig, StatesDtype
from launcher.models.arithmetic import prefetched_and_live, reduce_bucket


def deepspeed_config(run: RunConfig, layout: Layout) -> dict[str, Any]:
    """Return the DeepSpeed config of a run; the run's `deepspeed.*` settings override the derived values."""
    derived: dict[str, Any] = {
        # Only micro-batch and accumulation: DeepSpeed computes the global batch size from them.
        "train_micro_batch_size_per_gpu": run.training.micro_batch_size,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": clipping(run, layout),
        "zero_optimization": _zero(run, layout),
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW also updates offloaded states, without DeepSpeed's half-minute compilation.
        "zero_force_ds_cpu_optimizer": False,
        # By default DeepSpeed synchronises the GPU in every micro-batch to measure a throughput.
        "timers": {"throughput": {"enabled": False}},
        # By default the pipeline engine partitions activations over the tensor ranks.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        **_precision(run),
    }
    return merged(derived, run.deepspeed)


def clipping(run: RunConfig, layout: Layout) -> float:
    """Return the gradient norm at which DeepSpeed clips; 0 disables clipping.

    Always set, because DeepSpeed's default is 1.0. Under ZeRO-0 our engine clips instead (engine/flat.py),
    because DeepSpeed would not report the norm.
    """
    return 0.0 if layout.zero_stage == 0 else run.optimizer.gradient_clipping or 0.0


def _zero(run: RunConfig, layout: Layout) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": layout.zero_stage, "reduce_bucket_size": reduce_bucket(run, layout)}
    if run.precision.states is StatesDtype.bf16 and layout.zero_stage == 1:
        # Otherwise DeepSpeed copies all reduced gradients into a second buffer of their size.
        zero["contiguous_gradients"] = False
    if layout.zero_stage == 3:
        prefetched, live = prefetched_and_live(run, layout)
        zero |= {"stage3_prefetch_bucket_size": prefetched, "stage3_max_live_parameters": live}
    # Host memory can be pinned only on a machine with a GPU.
    pinned = layout.device == "cuda"
    if run.parallelism.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    if run.parallelism.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    return zero


def _precision(run: RunConfig) -> dict[str, Any]:
    if run.precision.dtype is Dtype.fp32:
        return {}
    if run.precision.states is StatesDtype.bf16:
        # DeepSpeed sums in `grad` here and zeroes nothing within a step, so a pipeline's head trains.
        bf16_states = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
        return {"bf16": {"enabled": True, **bf16_states}, "data_types": {"grad_accum_dtype": "bf16"}}
    fp32_accumulation = {"data_types": {"grad_accum_dtype": "fp32"}}
    if run.precision.dtype is Dtype.bf16:
        # Gradients go into the fp32 sums as soon as they exist. By default DeepSpeed keeps bf16 ones, and
        # zeroes them when a backward pass reaches the output of its module: then a pipeline's head, which our
        # loss runs behind that output, never gets a gradient.
        return {"bf16": {"enabled": True, "immediate_grad_update": True}, **fp32_accumulation}
    power = run.precision.initial_loss_scale_power
    return {"fp16": {"enabled": True, "initial_scale_power": power}, **fp32_accumulation}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` overridden by the values of `over`, section by section. Neither argument is changed."""
    result = dict(base)
    for key, value in over.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result
