"""Seconds of a step after its micro-batches: clipping, update, and DeepSpeed's bookkeeping. Pure."""

from launcher.config.layout import Layout
from launcher.config.schema import Dtype, RunConfig, StatesDtype
from launcher.parallel.buckets import reduces_during_backward, updates_directly, uses_bf16_optimizer
from launcher.planning.cost.geometry import Rank
from launcher.planning.cost.measured_rates import AnyRates
from launcher.planning.cost.operations import BYTES, FP32
from launcher.planning.cost.zero_states import partitioned_groups, state_count

# Bytes that a stochastic update moves per element, for the weight and for each state: compiled, in one pass;
# eager, in passes over fp32 values and 64-bit counters.
COMPILED_UPDATE, EAGER_UPDATE = 12, 200


def optimizer_seconds(run: RunConfig, layout: Layout, rank: Rank, rates: AnyRates) -> float:
    """Return seconds of memory traffic after the micro-batches, and of adding up their gradients."""
    element = BYTES[run.precision.dtype]
    whole = share = rank.trained_parameters
    if layout.zero_stage > 0:
        share = sum(elements // ranks for elements, ranks in partitioned_groups(layout, rank))
    states = state_count(run.optimizer)
    if run.precision.states is StatesDtype.bf16:
        # Norm and reduction of bf16 gradients, and the passes of the update over its chunks.
        passes = 1 + (2 if layout.zero_stage < 3 else 1)
        moved = COMPILED_UPDATE if layout.compiles_updates else EAGER_UPDATE
        return (whole * element * passes + share * moved * (1 + states)) / rates.update
    if updates_directly(run, layout):
        return share * _direct_bytes(layout, element, states) / rates.update
    # Read gradients, read and write weights and states.
    update = share * FP32 * (1 + 2 * (1 + states))
    clips = run.optimizer.gradient_clipping is not None
    if layout.zero_stage == 0 or uses_bf16_optimizer(run, layout):
        update += share * FP32 * clips  # the update writes the clipped gradients
        copies = _light_passes(run, layout, whole, share, element)
    else:
        # Norm: read. Clipping: read and write.
        update += share * FP32 * (1 + 2)
        # Gradients are copied into a flat buffer, reduced and set to zero; new weights are cast and copied.
        passes = 4 if layout.zero_stage < 3 else 2
        copies = whole * FP32 * passes + share * (FP32 + element)
        if run.precision.dtype is Dtype.fp32:
            copies += _added(layout, whole * FP32) if layout.zero_stage == 1 else 0
        else:
            # The gradients of each micro-batch are cast and added to the fp32 gradients.
            copies += layout.accumulation * (whole if layout.zero_stage < 3 else 0) * (element + 2 * FP32)
    if run.parallelism.offload_optimizer and layout.device == "cuda":
        # Gradients go to the host and weights come back; the update runs in the host's memory.
        return (share * (FP32 + element) + update) / rates.host + copies / rates.update
    return (update + copies) / rates.update


def _direct_bytes(layout: Layout, element: int, states: int) -> int:
    """Return the bytes per parameter that engine/direct_update.py moves, with the gradient's norm."""
    updated = 2 * FP32 * (1 + states)  # master weight and states, read and written
    if layout.compiles_updates:
        return element + (element + updated + element)
    # The gradient is cast, read, and written as it is clipped; the new weight is cast.
    return element + (element + FP32) + 2 * FP32 + updated + (FP32 + element)


def _added(layout: Layout, size: int) -> int:
    """Return the bytes moved to add gradients of `size` bytes in each micro-batch but the first."""
    return (layout.accumulation - 1) * 3 * size


def _light_passes(run: RunConfig, layout: Layout, whole: int, share: int, element: int) -> float:
    """Return the bytes that ZeRO-0 and BF16_Optimizer move beside the update (engine/gradient_passes.py)."""
    moved: float = whole * FP32  # the norm
    if layout.gradient_ranks > 1 and reduces_during_backward(run, layout):
        # fp32 sums are copied in bf16, which is sent, and copied back; fp32 gradients are reduced in place.
        moved += 0 if layout.zero_stage == 0 else whole * 2 * (FP32 + element)
    elif layout.gradient_ranks > 1:
        # Copied into the buffer that is sent, divided there, and copied back.
        moved += whole * (2 * (FP32 + element) + 2 * element)
    if layout.zero_stage == 0:
        return moved + _added(layout, whole * element)
    # The first gradient of a step is cast into the fp32 sums, the others are added to them.
    moved += whole * (element + FP32) + (layout.accumulation - 1) * whole * (element + 2 * FP32)
    # New weights are cast, and gathered.
    return moved + share * (FP32 + element) + (whole * element if layout.gradient_ranks > 1 else 0)
