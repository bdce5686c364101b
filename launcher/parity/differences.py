"""A layout's trace against the reference's: what differs by more than it may, and by how much. Pure."""

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

U32 = 2.0**-24  # masters, states and updates are fp32 in every precision
TINY = 1e-30

# What is compared, in the order in which a step computes it. A replica is what ranks hold alike.
Kind = Literal[
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
    "dropout",  # masks: parity/dropout.py
]


@dataclass(frozen=True)
class Difference:
    """One quantity of one step. Within bounds while measured <= allowed."""

    step: int  # from 1; 0 is the start
    kind: Kind
    name: str  # of the tensor or layer; the kind for scalars
    measured: float
    allowed: float

    @property
    def excess(self) -> float:
        """measured / allowed; infinite for NaN."""
        ratio = self.measured / max(self.allowed, TINY)
        return ratio if ratio == ratio else float("inf")

    @property
    def ok(self) -> bool:
        return self.excess <= 1.0


def applied_gradients(run: RunConfig, trace: list[StepTrace]) -> None:
    """Fill in each step's gradients before clipping, from what plain SGD did to the weights.

    Works on every engine alike: w' = w - lr c g, with c = min(1, clip / norm) and the norm it reported.
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
    """Every quantity of every step, in forward order within a step.

    Under plain SGD both trained on by themselves, and what they may differ by grows with each step. Else
    each step of `expected` started from the weights of `trace`: where a gradient is zero but for rounding, as
    a key's bias is, Adam moves a weight by whole updates whose signs are chance, and two runs part.
    """
    found = []
    for number, (step, right) in enumerate(zip(trace, expected, strict=True)):
        # Steps since both computed with the same weights. In low precision ranks compute with rounded ones.
        apart = 1 if run.precision.dtype is Dtype.fp32 and not plain_sgd else number
        found += _missing(number, "weight", step.weights, right.weights)
        order = in_forward_order(run, [name for name in right.weights if name in step.weights])
        if number == 0:
            found += [_initial(name, step, right) for name in order]
        else:
            found += _batch_losses(run, number, apart, step, right, allowed)
            found += _scalars(number, apart, step, right, allowed)
            if plain_sgd:
                found += _outputs(run, number, step, right, allowed)
                found += [_gradient(run, number, name, step, right, allowed) for name in order]
            else:
                found += [_weight(run, number, name, trace, expected, allowed) for name in order]
                found += _states(number, step, right, allowed)
        found += [_tied_copy(run, number, name, trace, expected, allowed) for name in step.tied]
        found += _replicas(number, step)
    return found


def expected_batch_losses(run: RunConfig, data_size: int, right: StepTrace) -> list[list[float]]:
    """[data rank][micro-batch] from the losses of single samples, which are dealt out micro-batch-wise."""
    losses, size = right.batch_losses[0], run.training.micro_batch_size
    batches = [sum(losses[i : i + size]) / size for i in range(0, len(losses), size)]
    return [batches[rank::data_size] for rank in range(data_size)]


def in_forward_order(run: RunConfig, names: list[str]) -> list[str]:
    """Names of tensors or layers in the order in which a forward pass uses them."""
    prefixes = parameter_order(run.model)

    def place(name: str) -> tuple[int, str]:
        return next(
            (i for i, p in enumerate(prefixes) if f"{name}.".startswith(f"{p}.")), len(prefixes)
        ), name

    return sorted(names, key=place)


def _missing(number: int, kind: Kind, got: Weights, right: Weights) -> list[Difference]:
    return [Difference(number, kind, name, inf, 1.0) for name in sorted(right.keys() ^ got.keys())]


def _initial(name: str, step: StepTrace, right: StepTrace) -> Difference:
    weight = right.weights[name]
    measured = float((step.weights[name] - weight).norm())
    return Difference(0, "weight", name, measured, U32 * float(weight.norm()))


def _batch_losses(
    run: RunConfig, number: int, apart: int, step: StepTrace, right: StepTrace, allowed: Tolerance
) -> list[Difference]:
    found = []
    expected = expected_batch_losses(run, len(step.batch_losses), right)
    for rank, (got, wanted) in enumerate(zip(step.batch_losses, expected, strict=True)):
        if len(got) != len(wanted):
            found.append(Difference(number, "batch_loss", f"data rank {rank}", inf, 1.0))
            continue
        for index, (loss, correct) in enumerate(zip(got, wanted, strict=True)):
            name = f"data rank {rank}, micro-batch {index}"
            measured = abs(loss - correct) / abs(correct)
            found.append(Difference(number, "batch_loss", name, measured, apart * allowed.output))
    return found


def _outputs(
    run: RunConfig, number: int, step: StepTrace, right: StepTrace, allowed: Tolerance
) -> list[Difference]:
    found = _missing(number, "output", step.outputs, right.outputs)
    for name in in_forward_order(run, [name for name in right.outputs if name in step.outputs]):
        wanted = right.outputs[name]
        measured = float((step.outputs[name] - wanted).norm() / wanted.norm().clamp(min=TINY))
        found.append(Difference(number, "output", name, measured, number * allowed.output))
    return found


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
    # Read off two fp32 weights: their own rounding, over the learning rate and the clip.
    clip = run.optimizer.gradient_clipping or float("inf")
    reading = (
        2 * U32 * float(right.weights[name].norm()) / (run.optimizer.lr * min(1.0, clip / right.grad_norm))
    )
    bound = number * allowed.gradient + reading / size
    return Difference(number, "gradient", name, float((g - expected).norm()) / size, bound)


def _weight(
    run: RunConfig,
    number: int,
    name: str,
    trace: list[StepTrace],
    expected: list[StepTrace],
    allowed: Tolerance,
) -> Difference:
    """The L2 norm of the difference, against what the allowed gradients could do to this update."""
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
    """As _weight. Not bit by bit: stages lay out gradients differently, so more than two data ranks add
    them up in another order.
    """
    difference = float((trace[number].tied[name] - trace[number].weights[name]).norm())
    return Difference(number, "tied_copy", name, difference, _drift(run, number, name, expected, allowed))


def _drift(run: RunConfig, number: int, name: str, expected: list[StepTrace], allowed: Tolerance) -> float:
    bound = U32 * (number + 1) * expected[number].weights[name].abs()
    for past in range(1, number + 1):
        bound = bound + run.optimizer.lr * _update_error(run, past, name, expected, allowed)
    return float(bound.norm())


def _update_error(
    run: RunConfig, number: int, name: str, expected: list[StepTrace], allowed: Tolerance
) -> Tensor:
    """By how much an update of one step, over the learning rate, may be off, element by element."""
    step = expected[number]
    error = number * allowed.gradient * _rms(_clipped(run, step, name))
    if run.optimizer.name is OptimizerName.sgd:
        return torch.full_like(step.weights[name], error / (1 - (run.optimizer.momentum or 0.0)))
    assert run.optimizer.beta2 is not None
    variance = step.states[f"{name}.exp_avg_sq"] / (1 - run.optimizer.beta2**number)
    # Adam divides by the gradient's size: where that is near zero the update's sign is rounding, and
    # two of size 1 may point apart.
    return (2 * error / (variance.sqrt() + (run.optimizer.epsilon or 0.0))).clamp(max=2.0)


def _states(number: int, step: StepTrace, right: StepTrace, allowed: Tolerance) -> list[Difference]:
    found = _missing(number, "state", step.states, right.states)
    for key in right.states.keys() & step.states.keys():
        expected = right.states[key]
        # A second moment has twice a gradient's relative error.
        power = 2 if key.endswith("_sq") else 1
        measured = float((step.states[key] - expected).norm()) / max(float(expected.norm()), TINY)
        found.append(Difference(number, "state", key, measured, power * number * allowed.gradient + 4 * U32))
    return found


def _replicas(number: int, step: StepTrace) -> list[Difference]:
    """Ranks that compute the same from the same numbers: not one bit may differ."""
    spreads: list[tuple[Kind, Weights, dict[str, float]]] = [
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
