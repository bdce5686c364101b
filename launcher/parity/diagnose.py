"""What a difference looks like, and what that usually means. Pure."""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.parity.compare import Difference, in_forward_order
from launcher.parity.trace import StepTrace

CLOSE = 0.02  # a ratio this near to sqrt(2) is not 1 or 2


@dataclass(frozen=True)
class Diagnosis:
    """`shape` of the difference in words, and its usual `meaning`."""

    shape: str
    meaning: str


def diagnose(
    run: RunConfig,
    layout: Layout,
    failed: list[Difference],
    trace: list[StepTrace],
    expected: list[StepTrace],
) -> Diagnosis:
    """The first step that failed, read in the order in which causes precede effects."""
    first = [difference for difference in failed if difference.step == failed[0].step]
    step, right = trace[first[0].step - 1], expected[first[0].step - 1]
    kinds = {difference.kind for difference in first}
    if "replica" in kinds:
        names = in_forward_order(run, [d.name for d in first if d.kind == "replica"])
        return Diagnosis(
            f"{_some(names)} differs between tensor ranks that should hold it alike",
            "a gradient that every tensor rank computes in part is not summed over them "
            "(under sequence parallelism: norm weights, positions, row biases)",
        )
    gradients = in_forward_order(run, [d.name for d in first if d.kind == "gradient"])
    if "loss" in kinds:
        return _wrong_loss(layout, step, right, gradients)
    if gradients:
        return _wrong_gradients(run, layout, step, right, gradients)
    if kinds == {"grad_norm"}:
        ratio = _ratio(step.grad_norm / right.grad_norm, layout)
        return Diagnosis(
            f"every gradient is right and the reported norm is {ratio}",
            "the norm is not that of the logical gradients: shards left out, or replicas counted twice",
        )
    return Diagnosis(
        "the gradients are right and what the optimizer made of them is not",
        "another optimizer, learning rate, weight decay or state than the reference's",
    )


def _wrong_loss(layout: Layout, step: StepTrace, right: StepTrace, gradients: list[str]) -> Diagnosis:
    ratio = step.loss / right.loss
    named = _constant(ratio, layout)
    if named is not None:
        return Diagnosis(
            f"the loss is {named}", "the loss is averaged or summed over the wrong ranks or micro-batches"
        )
    return Diagnosis(
        f"the loss itself differs, {step.loss:.6f} instead of {right.loss:.6f}",
        "the forward pass computes something else: a missing reduction, a wrong shard, mask, position or "
        "initial weight, or other data than the reference's",
    )


def _wrong_gradients(
    run: RunConfig, layout: Layout, step: StepTrace, right: StepTrace, names: list[str]
) -> Diagnosis:
    ratios = {name: _best_ratio(step.gradients[name], right.gradients[name]) for name in names}
    parallel = all(residual < CLOSE for _, residual in ratios.values())
    spread = max(r for r, _ in ratios.values()) - min(r for r, _ in ratios.values())
    ratio = ratios[names[0]][0]
    everything = len(names) == len(right.gradients)
    if parallel and everything and spread < CLOSE:
        return Diagnosis(
            f"every gradient is {_ratio(ratio, layout)}",
            "gradients are averaged once too often or too rarely, over data ranks or micro-batches; or, "
            "if only the norm is off, clipping used another norm than it reports",
        )
    if parallel:
        return Diagnosis(
            f"{_some(names)}: a constant ratio, {_ratio(ratio, layout)}; the others are right",
            "these gradients miss a sum over the tensor ranks, or have one too many",
        )
    shards = {
        name: _wrong_shards(step.gradients[name], right.gradients[name], layout.tensor) for name in names
    }
    if all(0 < len(wrong) < layout.tensor for wrong in shards.values()):
        return Diagnosis(
            f"{_some(names)}: only in the part of tensor rank {sorted(shards[names[0]])[0]}",
            "one shard is wrong: its place, its mask or its padding",
        )
    return Diagnosis(
        f"{_some(names)}: no constant ratio",
        "the forward pass is right and the backward pass is not: a missing reduction of an input's gradient, "
        "a micro-batch left out, or a tied weight updated in one place only",
    )


def _best_ratio(got: Tensor, right: Tensor) -> tuple[float, float]:
    """The r that makes r * right closest to got, and what is left over relative to got."""
    ratio = float((got * right).sum() / right.square().sum())
    return ratio, float((got - ratio * right).norm() / got.norm().clamp(min=1e-30))


def _wrong_shards(got: Tensor, right: Tensor, ranks: int) -> set[int]:
    """Which of the even pieces along the first dimension differ noticeably."""
    pieces = zip(got.tensor_split(ranks), right.tensor_split(ranks), strict=True)
    size = right.norm()
    return {rank for rank, (a, b) in enumerate(pieces) if torch.linalg.vector_norm(a - b) > CLOSE * size}


def _constant(ratio: float, layout: Layout) -> str | None:
    """The ratio as a power of an axis of the layout, if it is one."""
    sizes = {
        "tensor": layout.tensor,
        "data": layout.data,
        "pipeline": layout.pipeline,
        "accumulation": layout.accumulation,
    }
    for name, size in sizes.items():
        for text, value in (
            (f"{name} size ({size})", size),
            (f"1 / {name} size (1/{size})", 1 / size),
            (f"sqrt({name} size) ({sqrt(size):.3f})", sqrt(size)),
            (f"1 / sqrt({name} size) ({1 / sqrt(size):.3f})", 1 / sqrt(size)),
        ):
            if size > 1 and abs(ratio / value - 1) < CLOSE:
                return f"the right one times {text}"
    return None


def _ratio(ratio: float, layout: Layout) -> str:
    return _constant(ratio, layout) or f"the right one times {ratio:.4f}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
