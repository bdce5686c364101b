"""A layout's trace against the reference's: what differs by more than it may, and by how much. Pure."""

from dataclasses import dataclass

import torch
from torch import Tensor

from launcher.config.schema import OptimizerName, RunConfig
from launcher.parity.shrink import parameter_order
from launcher.parity.tolerance import Tolerance
from launcher.parity.trace import StepTrace, Weights

U32 = 2.0**-24  # masters, states and updates are fp32 in every precision


@dataclass(frozen=True)
class Difference:
    """One quantity of one step. Within bounds while measured <= allowed."""

    step: int  # from 1
    kind: str  # loss, grad_norm, gradient, weight, state or replica
    name: str  # of the tensor; the kind for the two scalars
    measured: float
    allowed: float

    @property
    def excess(self) -> float:
        """measured / allowed; infinite for NaN."""
        ratio = self.measured / self.allowed
        return ratio if ratio == ratio else float("inf")

    @property
    def ok(self) -> bool:
        return self.excess <= 1.0


def applied_gradients(run: RunConfig, trace: list[StepTrace], start: Weights) -> None:
    """Fill in each step's gradients before clipping, from what plain SGD did to the weights.

    Works on every engine alike: w' = w - lr c g, with c = min(1, clip / norm) and the norm it reported.
    """
    before = start
    for step in trace:
        clip = run.optimizer.gradient_clipping
        scale = 1.0 if clip is None else min(1.0, clip / (step.grad_norm + 1e-6))
        factor = 1.0 / (run.optimizer.lr * scale)
        step.gradients = {name: (before[name] - after) * factor for name, after in step.weights.items()}
        before = step.weights


def compare(
    run: RunConfig, trace: list[StepTrace], expected: list[StepTrace], allowed: Tolerance, *, plain_sgd: bool
) -> list[Difference]:
    """Every quantity of every step, in forward order within a step."""
    assert len(trace) == len(expected)
    found = []
    for index, (step, right) in enumerate(zip(trace, expected, strict=True)):
        number = index + 1
        found += _scalars(number, step, right, allowed)
        order = in_forward_order(run, list(right.weights))
        if step.weights.keys() != right.weights.keys():
            missing = sorted(right.weights.keys() ^ step.weights.keys())
            found += [Difference(number, "weight", name, float("inf"), 1.0) for name in missing]
            order = [name for name in order if name in step.weights]
        if plain_sgd:
            found += [_gradient(run, number, name, step, right, allowed) for name in order]
        else:
            found += [_weight(run, index, name, trace, expected, allowed) for name in order]
            found += _states(number, step, right, allowed)
        found += _replicas(number, step)
    return found


def in_forward_order(run: RunConfig, names: list[str]) -> list[str]:
    prefixes = parameter_order(run.model)

    def place(name: str) -> tuple[int, str]:
        return next((i for i, p in enumerate(prefixes) if name.startswith(f"{p}.")), len(prefixes)), name

    return sorted(names, key=place)


def _scalars(number: int, step: StepTrace, right: StepTrace, allowed: Tolerance) -> list[Difference]:
    loss = abs(step.loss - right.loss) / abs(right.loss)
    norm = abs(step.grad_norm - right.grad_norm) / abs(right.grad_norm)
    return [
        Difference(number, "loss", "loss", loss, number * allowed.loss),
        Difference(number, "grad_norm", "grad_norm", norm, number * allowed.gradient),
    ]


def _gradient(
    run: RunConfig, number: int, name: str, step: StepTrace, right: StepTrace, allowed: Tolerance
) -> Difference:
    g, expected = step.gradients[name], right.gradients[name]
    size = float(expected.norm())
    # Read off two fp32 weights: their own rounding, over the learning rate and the clip.
    clip = run.optimizer.gradient_clipping or float("inf")
    reading = (
        2 * U32 * float(right.weights[name].norm()) / (run.optimizer.lr * min(1.0, clip / right.grad_norm))
    )
    bound = number * allowed.gradient + reading / size
    return Difference(number, "gradient", name, float((g - expected).norm()) / size, bound)


def _weight(
    run: RunConfig,
    index: int,
    name: str,
    trace: list[StepTrace],
    expected: list[StepTrace],
    allowed: Tolerance,
) -> Difference:
    """The L2 norm of the difference, against what the allowed gradients could do to the updates so far."""
    weight = expected[index].weights[name]
    bound = U32 * (index + 2) * weight.abs()
    for past in range(index + 1):
        bound = bound + run.optimizer.lr * _update_error(run, past, name, expected, allowed)
    difference = float((trace[index].weights[name] - weight).norm())
    return Difference(index + 1, "weight", name, difference, float(bound.norm()))


def _update_error(
    run: RunConfig, index: int, name: str, expected: list[StepTrace], allowed: Tolerance
) -> Tensor:
    """By how much an update of one step, over the learning rate, may be off, element by element."""
    step = expected[index]
    error = (index + 1) * allowed.gradient * _rms(_clipped(run, step, name))
    if run.optimizer.name is OptimizerName.sgd:
        return torch.full_like(step.weights[name], error / (1 - (run.optimizer.momentum or 0.0)))
    assert run.optimizer.beta2 is not None
    variance = step.states[f"{name}.exp_avg_sq"] / (1 - run.optimizer.beta2 ** (index + 1))
    # Adam divides by the gradient's size: where that is near zero the update's sign is rounding, and
    # two of size 1 may point apart.
    return (2 * error / (variance.sqrt() + (run.optimizer.epsilon or 0.0))).clamp(max=2.0)


def _states(number: int, step: StepTrace, right: StepTrace, allowed: Tolerance) -> list[Difference]:
    found = []
    for key, expected in right.states.items():
        if key not in step.states:
            found.append(Difference(number, "state", key, float("inf"), 1.0))
            continue
        # A second moment has twice a gradient's relative error.
        power = 2 if key.endswith("_sq") else 1
        measured = float((step.states[key] - expected).norm()) / float(expected.norm())
        found.append(Difference(number, "state", key, measured, power * number * allowed.gradient + 4 * U32))
    return found


def _replicas(number: int, step: StepTrace) -> list[Difference]:
    # Every tensor rank computes the same update from the same numbers: not one bit may differ.
    return [
        Difference(number, "replica", name, spread, U32 * float(step.weights[name].abs().max()))
        for name, spread in step.replica_spread.items()
    ]


def _clipped(run: RunConfig, step: StepTrace, name: str) -> Tensor:
    clip = run.optimizer.gradient_clipping or float("inf")
    return step.gradients[name] * min(1.0, clip / step.grad_norm)


def _rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())
