"""Seconds of a step after its micro-batches: clipping, update, and DeepSpeed's bookkeeping. Pure."""

from launcher.config.layout import Layout
from launcher.config.schema import Dtype, RunConfig
from launcher.planning.cost.geometry import Rank
from launcher.planning.cost.measured_rates import AnyRates
from launcher.planning.cost.operations import BYTES, FP32
from launcher.planning.cost.zero_states import padded, state_bytes, uses_bf16_optimizer


def optimizer_seconds(run: RunConfig, layout: Layout, rank: Rank, rates: AnyRates) -> float:
    """Return seconds of memory traffic after the micro-batches, and of adding up their gradients."""
    element, data = BYTES[run.precision.dtype], layout.data
    whole = share = rank.parameters
    if layout.zero_stage > 0:
        share = sum(padded(sum(group), 2 * data) for group in rank.groups) // data
    # Read gradients, read and write weights and states.
    update = share * (FP32 + 2 * (FP32 + state_bytes(run.optimizer)))
    if uses_bf16_optimizer(run, layout):
        copies = _bf16_bookkeeping(layout, whole, share)
    else:
        # Norm: read. Clipping: read and write.
        update += share * FP32 * (1 + 2)
        # Gradients are copied into a flat buffer, reduced and set to zero; new weights are cast and copied.
        passes = 4 if layout.zero_stage < 3 else 2
        copies = whole * FP32 * passes + (share * (FP32 + element) if layout.zero_stage else 0)
        if run.precision.dtype is not Dtype.fp32:
            # The gradients of each micro-batch are cast and added to the fp32 gradients.
            copies += layout.accumulation * (whole if layout.zero_stage < 3 else 0) * (element + 2 * FP32)
    if run.parallelism.offload_optimizer and layout.device == "cuda":
        # Gradients go to the host and weights come back; the update runs in the host's memory.
        return (share * (FP32 + element) + update) / rates.host + copies / rates.update
    return (update + copies) / rates.update


def _bf16_bookkeeping(layout: Layout, whole: int, share: int) -> float:
    """Return the bytes that BF16_Optimizer moves beside the update (DeepSpeed 0.19.8, bf16_optimizer.py).

    In three models on an H100, the step beside the computation took the time of 110, 103 and 110 bytes a
    parameter with the update's 28. Here they are 102, because bf16 gradients are no longer kept and zeroed.
    """
    low, high = BYTES[Dtype.bf16], FP32
    # Each micro-batch: cast to fp32 and added (_update_hp_grad).
    added = (low + high) + 3 * high
    # The reduction, also of one rank: copied, cast, scaled, cast, copied (engine.py, allreduce_and_copy).
    reduced = 2 * high + (high + low) + 2 * low + (low + high) + 2 * high
    # The norm, clipping and zeros of all gradients, not of the partition.
    judged = high + 2 * high + high
    # New weights are cast, and copied in the gather (update_lp_params).
    return whole * (layout.accumulation * added + reduced + judged + low) + share * (high + low)
