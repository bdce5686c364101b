"""Order in which gradients are reduced over the data ranks during the backward pass. Pure."""

from collections.abc import Sequence

from launcher.config.layout import Layout
from launcher.config.schema import Dtype, RunConfig, StatesDtype

# Elements that fill a bucket: on a GPU as in Megatron-LM, on a CPU so few that most are reduced early.
FILLED = {"cuda": 40_000_000, "cpu": 2_000_000}


def buckets(sizes: Sequence[int], filled: int) -> list[list[int]]:
    """Return the places in `sizes` of each bucket's weights, in the order in which the buckets are reduced.

    `sizes` is the elements of each weight in the order of the modules. The backward pass reaches the last
    weight first. A weight of at least `filled` elements is a bucket of its own; smaller weights share a
    bucket until it holds as many elements. A bucket is reduced when its first weight has its gradient.
    """
    result: list[list[int]] = []
    shared: list[int] = []
    elements = 0
    for place in range(len(sizes) - 1, -1, -1):
        if sizes[place] >= filled:
            result.append([place])
            continue
        shared.insert(0, place)
        elements += sizes[place]
        if elements >= filled:
            result.append(shared)
            shared, elements = [], 0
    return [*result, shared] if shared else result


def reduces_during_backward(run: RunConfig, layout: Layout) -> bool:
    """Return whether engine/overlapped_reduction.py reduces the gradients, and not DeepSpeed.

    Our reduction divides after it sums. If DeepSpeed is set to divide before, it reduces the gradients.
    """
    divided_before = run.deepspeed.get("prescale_gradients", False)
    divided_before = divided_before or run.deepspeed.get("gradient_predivide_factor", 1.0) != 1.0
    is_whole = layout.zero_stage == 0 or uses_bf16_optimizer(run, layout)
    return layout.pipeline == 1 and is_whole and not divided_before


def uses_bf16_optimizer(run: RunConfig, layout: Layout) -> bool:
    """Return whether DeepSpeed's BF16_Optimizer takes the step, and not its optimizer of ZeRO-1 and 2."""
    is_bf16 = run.precision.dtype is Dtype.bf16 and run.precision.states is StatesDtype.fp32
    return layout.zero_stage == 1 and is_bf16 and not run.parallelism.offload_optimizer


def updates_directly(run: RunConfig, layout: Layout) -> bool:
    """Return whether weights are updated from their bf16 gradients, by engine/direct_update.py."""
    return uses_bf16_optimizer(run, layout) and has_one_gradient(layout)


def has_one_gradient(layout: Layout) -> bool:
    """Return whether a weight gets one gradient in a step, from one micro-batch of one data rank."""
    return layout.gradient_ranks == layout.accumulation == layout.pipeline == 1
