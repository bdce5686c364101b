"""Seconds of a step after its micro-batches: clipping, update, and DeepSpeed's bookkeeping. Pure."""

from launcher.config.layout import Layout
from launcher.config.schema import Dtype, RunConfig, StatesDtype
from launcher.planning.cost.geometry import Rank
from launcher.planning.cost.measured_rates import AnyRates
from launcher.planning.cost.operations import BYTES, FP32
from launcher.planning.cost.zero_states import padded, state_count, uses_bf16_optimizer

# Bytes that a stochastic update moves per element, for the weight and for each state: compiled, in one pass;
# eager, in passes over fp32 values and 64-bit counters.
COMPILED_UPDATE, EAGER_UPDATE = 12, 200


def optimizer_seconds(run: RunConfig, layout: Layout, rank: Rank, rates: AnyRates) -> float:
    """Return seconds of memory traffic after the micro-batches, and of adding up their gradients."""
    element, data = BYTES[run.precision.dtype], layout.data
    whole = share = rank.parameters
    if layout.zero_stage > 0:
        share = sum(padded(sum(group), 2 * data) for group in rank.groups) // data
    states = state_count(run.optimizer)
    if run.precision.states is StatesDtype.bf16:
        # Norm and reduction of bf16 gradients, and the passes of the update over its chunks.
        passes = 1 + (2 if layout.zero_stage < 3 else 1)
        moved = COMPILED_UPDATE if layout.compiled and layout.device == "cuda" else EAGER_UPDATE
        return (whole * element * passes + share * moved * (1 + states)) / rates.update
    # Read gradients, read and write weights and states.
    update = share * FP32 * (1 + 2 * (1 + states))
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
