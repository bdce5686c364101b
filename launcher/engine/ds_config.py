"""RunConfig and Layout -> the dict DeepSpeed is given. Pure."""

from typing import Any

from launcher.config.layout import Layout
from launcher.config.schema import Dtype, RunConfig
from launcher.models.arithmetic import reduce_bucket


def deepspeed_config(run: RunConfig, layout: Layout) -> dict[str, Any]:
    """The DeepSpeed config of a run, with `deepspeed.*` of the run laid over it."""
    emitted: dict[str, Any] = {
        # Micro-batch and accumulation only: DeepSpeed derives the third side of the triangle.
        "train_micro_batch_size_per_gpu": run.training.micro_batch_size,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": clipping(run, layout),
        "zero_optimization": _zero(run, layout),
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW serves offloaded states too, without DeepSpeed's half-minute build.
        "zero_force_ds_cpu_optimizer": False,
        # Otherwise the pipeline engine splits activations over the tensor ranks by itself.
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
        **_precision(run),
    }
    return merged(emitted, run.deepspeed)


def clipping(run: RunConfig, layout: Layout) -> float:
    """The norm DeepSpeed clips at; 0 is off. DeepSpeed's default is 1.0, so it is always said.

    Under ZeRO-0 the engine clips itself (engine/flat.py): DeepSpeed would not report the norm.
    """
    return 0.0 if layout.zero_stage == 0 else run.optimizer.gradient_clipping or 0.0


def _zero(run: RunConfig, layout: Layout) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": layout.zero_stage, "reduce_bucket_size": reduce_bucket(run.model)}
    # Pinning host memory needs a GPU to copy to.
    pinned = layout.device == "cuda"
    if run.parallelism.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    if run.parallelism.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    return zero


def _precision(run: RunConfig) -> dict[str, Any]:
    if run.precision.dtype is Dtype.fp32:
        return {}
    fp32_accumulation = {"data_types": {"grad_accum_dtype": "fp32"}}
    if run.precision.dtype is Dtype.bf16:
        return {"bf16": {"enabled": True}, **fp32_accumulation}
    power = run.precision.initial_loss_scale_power
    return {"fp16": {"enabled": True, "initial_scale_power": power}, **fp32_accumulation}


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, section by section; neither is changed."""
    result = dict(base)
    for key, value in over.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result
