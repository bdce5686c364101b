"""Simulate a micro-batch of a rank that computes on one stream and communicates on another. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class LayerCost:
    """Weights that are gathered and used together, and the seconds of a micro-batch in them."""

    forward: float
    backward: float
    elements: int  # of its weights, whose gradients are reduced
    gather: float = 0.0  # seconds; 0 if every rank holds the weights
    gather_again: float = 0.0  # in the backward pass


def micro_batch(
    layers: Sequence[LayerCost], *, ahead: int, bucket: int, reduction: Callable[[int], float]
) -> float:
    """Return the seconds from the first gather to the last reduction.

    A layer waits for its weights. Its start begins the gathers of the `ahead` layers after it (DeepSpeed
    0.19.8, partitioned_param_coordinator.py, fetch_sub_module). Gradients are reduced as soon as `bucket`
    elements have one (stage3.py, reduce_independent_p_g_buckets_and_remove_grads). The collectives share one
    link, so they run one after the other, in the order in which they are begun.
    """
    passes = [(layer.forward, layer.gather) for layer in layers]
    passes += [(layer.backward, layer.gather_again) for layer in reversed(layers)]
    finished = accumulate(layer.elements for layer in reversed(layers))
    gradients = [0] * len(layers) + [later // bucket for later in finished]
    computing = communicating = 0.0
    ready: list[float] = []  # when the weights of a pass have arrived
    for index, (seconds, _) in enumerate(passes):
        if index == 0:
            communicating = _gather(passes[:1], 0.0, 0.0, ready)
        computing = max(computing, ready[index])
        begun = len(ready)
        communicating = _gather(passes[begun : index + 1 + ahead], computing, communicating, ready)
        computing += seconds
        full = gradients[index] - gradients[index - 1] if index else 0
        if full:
            communicating = max(communicating, computing) + full * reduction(bucket)
    rest = sum(layer.elements for layer in layers) % bucket
    return max(communicating, computing) + (reduction(rest) if rest else 0.0)


def _gather(
    passes: Sequence[tuple[float, float]], begun: float, communicating: float, ready: list[float]
) -> float:
    """Append when each pass has its weights; return when the link is free."""
    for _, gather in passes:
        if gather:
            communicating = max(communicating, begun) + gather
        ready.append(communicating if gather else begun)
    return communicating
