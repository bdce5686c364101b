"""Compare the trace of a layout with the trace of the reference. Pure."""

from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Literal

import torch
from torch import Tensor

from launcher.config.schema import Dtype, OptimizerName, RunConfig
from launcher.parity.shrink import parameter_order
from launcher.parity.step_trace import StepTrace, Weights
from launcher.parity.tolerance import Tolerance

U32 = 2.0**-24  # unit roundoff of fp32, in which every precision keeps master weights, states and updates
TINY = 1e-30

# The compared quantities, in the order in which a step computes them. A replica is a tensor or number that
# several ranks should hold with equal values.
DifferenceKind = Literal[
    "batch_loss",
    "output",
    "output_replica",
    "loss",
    "grad_norm",
    "norm_replica",
    "gradient",
    "weight",
    "state",
    "replica",
    "data_replica",
    "tied_copy",
    "dropout",  # dropout masks: see parity/dropout.py
]


@dataclass(frozen=True)
class Difference:
    """The difference in one quantity of one step; within bounds if measured <= allowed."""

    step: int  # counted from 1; 0 for the initial weights
    kind: DifferenceKind
    name: str  # of the tensor or layer; for scalars, of the quantity
    measured: float
    allowed: float

    @property
    def excess(self) -> float:
        """The ratio measured / allowed; infinite for NaN."""
        ratio = self.measured / max(self.allowed, TINY)
        return ratio if ratio == ratio else float("inf")

    @property
    def ok(self) -> bool:
        return self.excess <= 1.0


def applied_gradients(run: RunConfig, trace: list[StepTrace]) -> None:
    """Compute each step's gradients before clipping from its weight updates under plain SGD.

    Modifies `trace`. Works for every engine: w' = w - lr c g, with c = min(1, clip / reported norm).
    """
    for before, step in pairwise(trace):
        clip = run.optimizer.gradient_clipping
        scale = 1.0 if clip is None else min(1.0, clip / (step.grad_norm + 1e-6))
        factor = 1.0 / (run.optimizer.lr * scale)
        step.gradients = {
            name: (before.weights[name] - after) * factor for name, after in step.weights.items()
        }


def compare(
    run: RunConfig, trace: list[StepTrace], expected: list[StepTrace], allowed: Tolerance, *, plain_sgd: bool
) -> list[Difference]:
    """Return the difference in every quantity of every step, in forward order within a step.

    With `plain_sgd` both runs trained independently, and the allowed difference grows with each step.
    Otherwise each step of `expected` started from the weights of `trace`: where a gradient is zero except for
    rounding, as for a key's bias, Adam makes full-size updates of random sign, and two correct runs diverge.
    """
    differences = []
    for number, (step, right) in enumerate(zip(trace, expected, strict=True)):
        # Steps since both runs had equal weights. In low precision ranks compute with rounded weights.
        apart = 1 if run.precision.dtype is Dtype.fp32 and not plain_sgd else number
        differences += _missing(number, "weight", step.weights, right.weights)
        order = in_forward_order(run, [name for name in right.weights if name in step.weights])
        if number == 0:
            differences += [_initial(name, step, right) for name in order]
        else:
            differences += _batch_losses(run, number, apart, step, right, allowed)
            differences += _scalars(number, apart, step, right, allowed)
            if plain_sgd:
                differences += _outputs(run, number, step, right, allowed)
                differences += [_gradient(run, number, name, step, right, allowed) for name in order]
            else:
                differences += [_weight(run, number, name, trace, expected, allowed) for name in order]
                differences += _states(number, step, right, allowed)
        differences += [_tied_copy(run, number, name, trace, expected, allowed) for name in step.tied]
        differences += _replicas(number, step)
    return differences


def expected_batch_losses(run: RunConfig, data_size: int, right: StepTrace) -> list[list[float]]:
    """Return losses[data rank][micro-batch] from the reference's losses of single samples.

    Micro-batches are assigned to data ranks in turn.
    """
    losses, size = right.batch_losses[0], run.training.micro_batch_size
    batches = [sum(losses[i : i + size]) / size for i in range(0, len(losses), size)]
    return [batches[rank::data_size] for rank in range(data_size)]


def in_forward_order(run: RunConfig, names: list[str]) -> list[str]:
    """Sort names of tensors or layers by the order in which a forward pass uses them."""
    prefixes = parameter_order(run.model)

    def place(name: str) -> tuple[int, str]:
        return next(
            (i for i, p in enumerate(prefixes) if f"{name}.".startswith(f"{p}.")), len(prefixes)
        ), name

    return sorted(names, key=place)


def _missing(number: int, kind: DifferenceKind, got: Weights, right: Weights) -> list[Difference]:
    return [Difference(number, kind, name, inf, 1.0) for name in sorted(right.keys() ^ got.keys())]


def _initial(name: str, step: StepTrace, right: StepTrace) -> Difference:
    weight = right.weights[name]
    measured = float((step.weights[name] - weight).norm())
    return Difference(0, "weight", name, measured, U32 * float(weight.norm()))


def _batch_losses(
    run: RunConfig, number: int, apart: int, step: StepTrace, right: StepTrace, allowed: Tolerance
) -> list[Difference]:
    differences = []
    expected = expected_batch_losses(run, len(step.batch_losses), right)
    for rank, (losses, expected_losses) in enumerate(zip(step.batch_losses, expected, strict=True)):
        if len(losses) != len(expected_losses):
            differences.append(Difference(number, "batch_loss", f"data rank {rank}", inf, 1.0))
            continue
        for index, (loss, correct) in enumerate(zip(losses, expected_losses, strict=True)):
            name = f"data rank {rank}, micro-batch {index}"
            measured = abs(loss - correct) / abs(correct)
            differences.append(Difference(number, "batch_loss", name, measured, apart * allowed.output))
    return differences


def _outputs(
    run: RunConfig, number: int, step: StepTrace, right: StepTrace, allowed: Tolerance
) -> list[Difference]:
    differences = _missing(number, "output", step.outputs, right.outputs)
    for name in in_forward_order(run, [name for name in right.outputs if name in step.outputs]):
        expected = right.outputs[name]
        measured = float((step.outputs[name] - expected).norm() / expected.norm().clamp(min=TINY))
        differences.append(Difference(number, "output", name, measured, number * allowed.output))
    return differences


def _scalars(
    number: int, apart: int, step: StepTrace, right: StepTrace, allowed: Tolerance
) -> list[Difference]:
    loss = abs(step.loss - right.loss) / abs(right.loss)
    norm = abs(step.grad_norm - right.grad_norm) / max(right.grad_norm, TINY)
    return [
        Difference(number, "loss", "loss", loss, apart * allowed.loss),
        Difference(number, "grad_norm", "grad_norm", norm, apart * allowed.gradient),
        Difference(number, "norm_replica", "grad_norm", step.norm_spread, 4 * U32 * right.grad_norm),
    ]


def _gradient(
    run: RunConfig, number: int, name: str, step: StepTrace, right: StepTrace, allowed: Tolerance
) -> Difference:
    g, expected = step.gradients[name], right.gradients[name]
    size = max(float(expected.norm()), TINY)
    # The gradient is computed from two fp32 weights: their rounding errors, divided by the learning rate and
    # the clipping factor, are allowed as well.
    clip = run.optimizer.gradient_clipping or float("inf")
    weight_rounding = (
        2 * U32 * float(right.weights[name].norm()) / (run.optimizer.lr * min(1.0, clip / right.grad_norm))
    )
    bound = number * allowed.gradient + weight_rounding / size
    return Difference(number, "gradient", name, float((g - expected).norm()) / size, bound)


def _weight(
    run: RunConfig,
    number: int,
    name: str,
    trace: list[StepTrace],
    expected: list[StepTrace],
    allowed: Tolerance,
) -> Difference:
    """Compare an updated weight; the bound is the L2 norm of the error that allowed gradients can cause."""
    difference = float((trace[number].weights[name] - expected[number].weights[name]).norm())
    rounding = 2 * U32 * expected[number].weights[name].abs()
    update = run.optimizer.lr * _update_error(run, number, name, expected, allowed)
    return Difference(number, "weight", name, difference, float((rounding + update).norm()))


def _tied_copy(
    run: RunConfig,
    number: int,
    name: str,
    trace: list[StepTrace],
    expected: list[StepTrace],
    allowed: Tolerance,
) -> Difference:
    """Compare the copy of a tied weight with the weight; the bound is as for two independent runs.

    Bitwise equality is not required: stages lay out gradients differently, so that more than two data ranks
    add them in another order.
    """
    difference = float((trace[number].tied[name] - trace[number].weights[name]).norm())
    return Difference(number, "tied_copy", name, difference, _drift(run, number, name, expected, allowed))


def _drift(run: RunConfig, number: int, name: str, expected: list[StepTrace], allowed: Tolerance) -> float:
    """Return the allowed L2 norm of the difference between two weights after `number` steps apart."""
    bound = U32 * (number + 1) * expected[number].weights[name].abs()
    for past in range(1, number + 1):
        bound = bound + run.optimizer.lr * _update_error(run, past, name, expected, allowed)
    return float(bound.norm())


def _update_error(
    run: RunConfig, number: int, name: str, expected: list[StepTrace], allowed: Tolerance
) -> Tensor:
    """Return the allowed error of one step's update, divided by the learning rate, for each element."""
    step = expected[number]
    error = number * allowed.gradient * _rms(_clipped(run, step, name))
    if run.optimizer.name is OptimizerName.sgd:
        return torch.full_like(step.weights[name], error / (1 - (run.optimizer.momentum or 0.0)))
    assert run.optimizer.beta2 is not None
    variance = step.states[f"{name}.exp_avg_sq"] / (1 - run.optimizer.beta2**number)
    # Adam divides by the size of the gradient. Where the gradient is near zero, rounding decides the sign of
    # the update, and two updates of size 1 may have opposite signs: hence the maximum of 2.
    return (2 * error / (variance.sqrt() + (run.optimizer.epsilon or 0.0))).clamp(max=2.0)


def _states(number: int, step: StepTrace, right: StepTrace, allowed: Tolerance) -> list[Difference]:
    differences = _missing(number, "state", step.states, right.states)
    for key in right.states.keys() & step.states.keys():
        expected = right.states[key]
        # A second moment has twice a gradient's relative error.
        power = 2 if key.endswith("_sq") else 1
        measured = float((step.states[key] - expected).norm()) / max(float(expected.norm()), TINY)
        differences.append(
            Difference(number, "state", key, measured, power * number * allowed.gradient + 4 * U32)
        )
    return differences


def _replicas(number: int, step: StepTrace) -> list[Difference]:
    """Compare the replicas of a step: they are computed from equal numbers, and must agree bitwise."""
    spreads: list[tuple[DifferenceKind, Weights, dict[str, float]]] = [
        ("output_replica", step.outputs, step.output_spread),
        ("replica", step.weights, step.replica_spread),
        ("data_replica", step.weights, step.data_spread),
    ]
    return [
        Difference(number, kind, name, spread, U32 * float(values[name].abs().max()))
        for kind, values, by_name in spreads
        for name, spread in by_name.items()
    ]


def _clipped(run: RunConfig, step: StepTrace, name: str) -> Tensor:
    clip = run.optimizer.gradient_clipping or float("inf")
    return step.gradients[name] * min(1.0, clip / step.grad_norm)


def _rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())
