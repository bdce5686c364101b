"""Rules of `deepspeed.*`: keys that DeepSpeed would refuse or misuse in this run. Pure, like validate.py."""

from typing import Any

from launcher.config.deepspeed_keys import check_passthrough
from launcher.config.errors import ConfigError
from launcher.config.layout import effective_zero_stage
from launcher.config.schema import Dtype, RunConfig
from launcher.config.shape import has_lora

_ZERO = "zero_optimization"


def check_deepspeed(run: RunConfig) -> None:
    """Check the keys of `deepspeed.*`, and that this run can use them (asserts of DeepSpeed 0.19.8)."""
    check_passthrough(run.deepspeed)
    _check_sections(run)
    _check_accumulation(run)
    _check_division(run)
    _check_experts(run)


def _check_sections(run: RunConfig) -> None:
    p, dtype = run.parallelism, run.precision.dtype
    switches = {
        "bf16": (dtype is Dtype.bf16, "precision=bf16"),
        "fp16": (dtype is Dtype.fp16, "precision=fp16"),
        f"{_ZERO}.offload_param": (p.offload_parameters, "parallelism=zero3_offload"),
        f"{_ZERO}.offload_optimizer": (p.offload_optimizer, "parallelism.offload_optimizer=true"),
    }
    for section, (is_on, remedy) in switches.items():
        outer, _, inner = section.rpartition(".")
        if inner in (run.deepspeed.get(outer, {}) if outer else run.deepspeed) and not is_on:
            raise ConfigError(f"deepspeed.{section}", None, "this run does not use this section", remedy)


def _check_accumulation(run: RunConfig) -> None:
    field, accumulation = "deepspeed.data_types.grad_accum_dtype", _accumulation(run)
    if effective_zero_stage(run)[0] == 0 and accumulation not in (None, "fp32"):
        why = "without ZeRO, DeepSpeed sums gradients only in the precision of the weights, fp32"
        raise ConfigError(field, accumulation, why, f"{field}=fp32")


def _check_division(run: RunConfig) -> None:
    """Check that gradients are divided before they are reduced only where DeepSpeed can do so."""
    stage, _ = effective_zero_stage(run)
    if stage < 2:
        return
    zero, keys = run.deepspeed.get(_ZERO, {}), run.deepspeed
    scatters, quantizes = zero.get("reduce_scatter", True), zero.get("zero_quantized_gradients", False)
    scatter_field = f"deepspeed.{_ZERO}.reduce_scatter"
    if stage == 3 and quantizes and not scatters:
        why = f"deepspeed.{_ZERO}.zero_quantized_gradients=true needs reduce-scatter"
        remedies = f"{scatter_field}=true", f"deepspeed.{_ZERO}.zero_quantized_gradients=false"
        raise ConfigError(scatter_field, False, why, " or ".join(remedies))
    can_all_reduce = run.parallelism.expert == 1 and not quantizes
    all_reduce = [f"{scatter_field}=false"] if can_all_reduce else []
    field = "deepspeed.prescale_gradients"
    if keys.get("prescale_gradients", False) and scatters:
        why = f"DeepSpeed's ZeRO-{stage} does not support it with reduce-scatter"
        raise ConfigError(field, True, why, " or ".join([f"{field}=false", *all_reduce]))
    field, factor = "deepspeed.gradient_predivide_factor", keys.get("gradient_predivide_factor", 1.0)
    if factor != 1.0 and stage == 3:
        # Without reduce-scatter a factor equal to the data ranks is never multiplied back (stage3.py).
        why = "DeepSpeed's ZeRO-3 does not support it"
        raise ConfigError(field, factor, why, f"{field}=1.0")
    if factor != 1.0 and scatters:
        why = "DeepSpeed's ZeRO-2 does not support it with reduce-scatter"
        raise ConfigError(field, factor, why, " or ".join([f"{field}=1.0", *all_reduce]))


def _check_experts(run: RunConfig) -> None:
    """Check the settings with which DeepSpeed's optimizer of ZeRO-1 and 2 takes distributed experts."""
    stage, _ = effective_zero_stage(run)
    # DeepSpeed does not see frozen experts (LoRA) as experts: see engine/expert_groups.py.
    if run.parallelism.expert == 1 or has_lora(run) or _uses_bf16_optimizer(run, stage):
        return
    keys = {1: ["reduce_scatter"], 2: ["reduce_scatter", "contiguous_gradients"]}
    for key in keys.get(stage, []):
        field = f"deepspeed.{_ZERO}.{key}"
        if not run.deepspeed.get(_ZERO, {}).get(key, True):
            why = f"DeepSpeed's ZeRO-{stage} needs it with parallelism.expert={run.parallelism.expert}"
            raise ConfigError(field, False, why, f"{field}=true or parallelism.expert=1")


def _uses_bf16_optimizer(run: RunConfig, stage: int) -> bool:
    """Return whether DeepSpeed takes its BF16_Optimizer for a run whose states are fp32 and on the device."""
    return stage == 1 and run.precision.dtype is Dtype.bf16 and _accumulation(run) in (None, "fp32")


def _accumulation(run: RunConfig) -> Any:
    return run.deepspeed.get("data_types", {}).get("grad_accum_dtype")
