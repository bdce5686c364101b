"""Compare the trace of a layout with the trace of the reference. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Literal

import torch
from torch import Tensor

from launcher.config.schema import OptimizerConfig, OptimizerName, RunConfig, StatesDtype
from launcher.config.shape import has_lora
from launcher.parity.routing import shortfall
from launcher.parity.shrink import parameter_order
from launcher.parity.step_trace import StepTrace, Weights
from launcher.parity.tolerance import Tolerance

U32 = 2.0**-24  # unit roundoff of fp32, in which weights and states are kept, unless precision.states=bf16
U16 = 2.0**-8  # unit roundoff of bf16; stochastic rounding takes either neighbour, an error below 2 U16
# By Hoeffding's inequality a sum of independent errors of mean 0, each from an interval of length d, exceeds
# UNBIASED sqrt(sum of d^2) with a probability below 2 exp(-2 UNBIASED^2) = 3e-8.
UNBIASED = 3.0
TINY = 1e-30
MOMENTA = ("momentum_buffer", "exp_avg")  # of SGD and AdamW

# The compared quantities, in the order in which a step computes them. A replica is a tensor or number that
# several ranks should hold with equal values.
DifferenceKind = Literal[
    "batch_loss",
    "output",
    "choice",  # the experts of each token: see parity/routing.py
    "output_replica",
    "loss",
    "grad_norm",
    "norm_replica",
    "gradient",
    "rounding",  # the sum of the errors by which bf16 weights were rounded, in the direction of the update
    "weight",
    "state",
    "replica",
    "data_replica",
    "tied_copy",
    "dropout",  # dropout masks: see parity/dropout.py
    "restored",  # weights and states after a checkpoint is restored in another layout
    "evaluation",  # the validation loss
    "rank",  # a rank that failed or hung: nothing could be compared
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
        return ratio if ratio == ratio else inf

    @property
    def ok(self) -> bool:
        return self.excess <= 1.0


def applied_gradients(run: RunConfig, trace: list[StepTrace], *, plain_sgd: bool) -> None:
    """Compute each step's gradients before clipping from the update that they made; works for every engine.

    Modifies `trace`. With c = min(1, clip / reported norm), plain SGD shows them in the weights:
    w' = w - lr c g. A momentum shows them too: b' = momentum b + c g under SGD without weight decay, and
    m' = beta1 m + (1 - beta1) c g under AdamW. Otherwise they are not computed.
    """
    for before, step in pairwise(trace):
        scale = _clip_factor(run, step)
        if plain_sgd and not has_bf16_states(run):
            factor = 1.0 / (run.optimizer.lr * scale)
            step.gradients = {name: (before.weights[name] - w) * factor for name, w in step.weights.items()}
        elif (decay := kept_momentum(run.optimizer)) is not None:
            gain = _momentum_gain(run.optimizer)
            step.gradients = {
                name: (momentum_of(step, name) - decay * momentum_of(before, name)) / (gain * scale)
                for name in step.weights
            }


def kept_momentum(optimizer: OptimizerConfig) -> float | None:
    """Return the factor of the momentum before a step; None if the momentum does not show the gradient."""
    if optimizer.name is OptimizerName.adamw:
        return optimizer.beta1
    return optimizer.momentum if optimizer.momentum and not optimizer.weight_decay else None


def _momentum_gain(optimizer: OptimizerConfig) -> float:
    """Return the factor of the gradient in the momentum."""
    return 1.0 - (optimizer.beta1 or 0.0) if optimizer.name is OptimizerName.adamw else 1.0


def has_bf16_states(run: RunConfig) -> bool:
    return run.precision.states is StatesDtype.bf16


def is_frozen(run: RunConfig, name: str) -> bool:
    """Return whether training must not change a weight: with adapters (LoRA) only theirs change."""
    return has_lora(run) and not name.endswith((".lora_a", ".lora_b"))


def momentum_of(step: StepTrace, name: str) -> Tensor:
    """Return the momentum of a weight; zero before the first step, and of frozen weights."""
    key = next((key for key in MOMENTA if f"{name}.{key}" in step.states), None)
    return torch.zeros_like(step.weights[name]) if key is None else step.states[f"{name}.{key}"]


def compare(
    run: RunConfig,
    trace: list[StepTrace],
    expected: list[StepTrace],
    allowed: list[Tolerance],
    *,
    plain_sgd: bool,
) -> list[Difference]:
    """Return the difference in every quantity of every step, in forward order within a step.

    Each step of `expected` started from the weights and states of `trace`, so that differences do not add up.
    `allowed` holds the bounds of each step. With `plain_sgd` the updates show the gradients, and the weights
    would say nothing more.
    """
    differences = []
    for number, (step, right) in enumerate(zip(trace, expected, strict=True)):
        c = _Comparison(run, number, step, right, expected, allowed, trace[max(0, number - 1)], plain_sgd)
        differences += c.unlike("weight", step.weights, right.weights)
        order = in_forward_order(run, c.comparable(step.weights, right.weights))
        if number == 0:
            differences += [c.initial(name) for name in order]
        else:
            differences += [*c.batch_losses(), *c.scalars(), *c.outputs(), *c.choices()]
            differences += [c.gradient(name) for name in order if name in step.gradients]
            if plain_sgd:
                differences += [c.rounding(name) for name in order if has_bf16_states(run)]
            else:
                differences += [*(c.weight(name) for name in order), *c.states()]
        differences += [*(c.tied_copy(name) for name in step.tied), *c.replicas()]
    return differences


def expected_batch_losses(run: RunConfig, data_size: int, right: StepTrace) -> list[list[float]]:
    """Return losses[data rank][micro-batch] from the losses of single samples in the reference."""
    losses, size = right.batch_losses[0], run.training.micro_batch_size
    batches = [sum(losses[i : i + size]) / size for i in range(0, len(losses), size)]
    return [batches[rank::data_size] for rank in range(data_size)]


def in_forward_order(run: RunConfig, names: list[str]) -> list[str]:
    """Sort names of tensors or layers by the order in which a forward pass uses them."""
    prefixes = parameter_order(run.model)

    def place(name: str) -> tuple[int, str]:
        matches = (i for i, prefix in enumerate(prefixes) if f"{name}.".startswith(f"{prefix}."))
        return next(matches, len(prefixes)), name

    return sorted(names, key=place)


@dataclass(frozen=True)
class _Comparison:
    """Compares step `number` of a layout with the same step of the reference."""

    run: RunConfig
    number: int
    step: StepTrace
    right: StepTrace
    expected: list[StepTrace]  # all steps of the reference
    tolerances: list[Tolerance]  # of all steps
    before: StepTrace  # the step before in the layout
    plain_sgd: bool

    @property
    def unit(self) -> float:
        """The unit roundoff of master weights and states."""
        return U16 if has_bf16_states(self.run) else U32

    @property
    def allowed(self) -> Tolerance:
        return self.tolerances[self.number]

    def comparable(self, got: Weights, right: Weights) -> list[str]:
        """Return the names of the tensors that both runs have, with the same shape."""
        return [name for name in right if name in got and got[name].shape == right[name].shape]

    def unlike(self, kind: DifferenceKind, got: Weights, right: Weights) -> list[Difference]:
        """Return an infinite difference for each tensor that one run lacks, or has in another shape."""
        names = sorted({*got, *right} - set(self.comparable(got, right)))
        return [Difference(self.number, kind, name, inf, 1.0) for name in names]

    def initial(self, name: str) -> Difference:
        weight = self.right.weights[name]
        measured = float((self.step.weights[name] - weight).norm())
        return Difference(0, "weight", name, measured, U32 * float(weight.norm()))

    def batch_losses(self) -> Iterator[Difference]:
        bound = self.allowed.loss
        expected = expected_batch_losses(self.run, len(self.step.batch_losses), self.right)
        for rank, (losses, right) in enumerate(zip(self.step.batch_losses, expected, strict=True)):
            if len(losses) != len(right):
                yield Difference(self.number, "batch_loss", f"data rank {rank}", inf, 1.0)
                continue
            for index, (loss, correct) in enumerate(zip(losses, right, strict=True)):
                name = f"data rank {rank}, micro-batch {index}"
                # Exactly 0 if no label of the micro-batch counts: then the layout's loss must be 0 as well.
                measured = abs(loss - correct) / max(abs(correct), TINY)
                yield Difference(self.number, "batch_loss", name, measured, bound)

    def outputs(self) -> Iterator[Difference]:
        got, right = self.step.outputs, self.right.outputs
        yield from self.unlike("output", got, right)
        for name in in_forward_order(self.run, self.comparable(got, right)):
            measured = float((got[name] - right[name]).norm() / right[name].norm().clamp(min=TINY))
            yield Difference(self.number, "output", name, measured, self.allowed.of_output(name))

    def choices(self) -> Iterator[Difference]:
        """Compare the experts of each token with the scores of the reference, which followed the choices."""
        got, right = self.step.choices, self.right.scores
        for name in in_forward_order(self.run, sorted({*got, *right})):
            measured = shortfall(right[name], got[name]) if name in got and name in right else inf
            yield Difference(self.number, "choice", name, measured, self.allowed.of_score(name))

    def scalars(self) -> list[Difference]:
        number, step, right = self.number, self.step, self.right
        loss = abs(step.loss - right.loss) / abs(right.loss)
        norm = abs(step.grad_norm - right.grad_norm) / max(right.grad_norm, TINY)
        return [
            Difference(number, "loss", "loss", loss, self.allowed.of_step_loss()),
            Difference(number, "grad_norm", "grad_norm", norm, self.allowed.norm),
            Difference(number, "norm_replica", "grad_norm", step.norm_spread, 4 * U32 * right.grad_norm),
        ]

    def gradient(self, name: str) -> Difference:
        right = self.right.gradients[name]
        size = max(float(right.norm()), TINY)
        measured = float((self.step.gradients[name] - right).norm()) / size
        bound = self.allowed.of_gradient(name) + self._rounding_of_gradient(name) / size
        return Difference(self.number, "gradient", name, measured, bound)

    def _rounding_of_gradient(self, name: str) -> float:
        """Return how far a gradient may be off because it is computed from two rounded weights or momenta."""
        clip = _clip_factor(self.run, self.right)
        if self.plain_sgd and not has_bf16_states(self.run):
            return 2 * U32 * float(self.right.weights[name].norm()) / (self.run.optimizer.lr * clip)
        two = float(momentum_of(self.step, name).norm() + momentum_of(self.before, name).norm())
        return 2 * self.unit * two / (_momentum_gain(self.run.optimizer) * clip)

    def rounding(self, name: str) -> Difference:
        """Compare the rounded weight with the exact update by the momentum, which is rounded as well."""
        momentum, rate = momentum_of(self.step, name), self.run.optimizer.lr
        exact, moved = self.before.weights[name] - rate * momentum, momentum.sign()
        error = (exact - self.step.weights[name]) * moved
        of_momentum = rate * distance(momentum)
        interval = (distance(exact.abs() + of_momentum) + of_momentum) * moved.abs()
        if bool((error.abs() > 1.001 * interval).any()):
            return Difference(self.number, "rounding", name, inf, 1.0)
        measured, bound = abs(float(error.sum())), UNBIASED * float(interval.norm())
        return Difference(self.number, "rounding", name, measured, bound)

    def weight(self, name: str) -> Difference:
        """Compare an updated weight with the error that allowed gradients cause, element by element.

        Measured is the root mean square of the ratios. So elements whose update rounding decides, because
        their gradient is nearly zero, do not hide errors of the other elements.
        """
        right = self.right.weights[name]
        error = (self.step.weights[name] - right).abs()
        if is_frozen(self.run, name):
            return Difference(self.number, "weight", name, float(error.norm()), TINY)
        bound = 2 * self.unit * right.abs() + self._update_error(self.number, name)
        ratios = torch.where(error == 0, 0.0, error / bound)
        return Difference(self.number, "weight", name, float(ratios.square().mean().sqrt()), 1.0)

    def tied_copy(self, name: str) -> Difference:
        """Compare the copy of a tied weight with the weight; the bound is as for two independent runs.

        Bitwise equality is not required: stages lay out gradients differently, so that more than two data
        ranks add them in another order.
        """
        bound = self.unit * (self.number + 1) * self.right.weights[name].abs()
        for past in range(1, self.number + 1):
            bound = bound + self._update_error(past, name)
        measured = float((self.step.tied[name] - self.step.weights[name]).norm())
        return Difference(self.number, "tied_copy", name, measured, float(bound.norm()))

    def _update_error(self, number: int, name: str) -> Tensor:
        """Return the allowed error of one step's update, for each element."""
        step, optimizer = self.expected[number], self.run.optimizer
        rate = optimizer.lr if step.rate is None else step.rate
        if is_frozen(self.run, name):
            return torch.zeros_like(step.weights[name])
        clipped = step.gradients[name] * _clip_factor(self.run, step)
        error = self.tolerances[number].of_gradient(name) * float(clipped.square().mean().sqrt())
        if optimizer.name is OptimizerName.sgd:
            return torch.full_like(step.weights[name], rate * error / (1 - (optimizer.momentum or 0.0)))
        assert optimizer.beta2 is not None
        variance = step.states[f"{name}.exp_avg_sq"] / (1 - optimizer.beta2**number)
        # Adam divides by the size of the gradient. Where the gradient is near zero, rounding decides the sign
        # of the update, and two updates of size 1 may have opposite signs: hence the maximum of 2.
        return rate * (2 * error / (variance.sqrt() + (optimizer.epsilon or 0.0))).clamp(max=2.0)

    def states(self) -> Iterator[Difference]:
        got, right = self.step.states, self.right.states
        yield from self.unlike("state", got, right)
        for key in self.comparable(got, right):
            measured = float((got[key] - right[key]).norm()) / max(float(right[key].norm()), TINY)
            yield Difference(self.number, "state", key, measured, self.allowed.of_state(key) + 4 * self.unit)

    def replicas(self) -> Iterator[Difference]:
        """Compare the replicas of a step: they are computed from equal numbers, and must agree bitwise."""
        step = self.step
        spreads: tuple[tuple[DifferenceKind, Weights, dict[str, float]], ...] = (
            ("output_replica", step.outputs, step.output_spread),
            ("replica", step.weights, step.replica_spread),
            ("data_replica", step.weights, step.data_spread),
        )
        for kind, values, by_name in spreads:
            for name, spread in by_name.items():
                yield Difference(self.number, kind, name, spread, U32 * float(values[name].abs().max()))


def distance(numbers: Tensor) -> Tensor:
    """Return the distance of the two bf16 numbers around each number."""
    return torch.ldexp(torch.ones_like(numbers), torch.frexp(numbers).exponent - 8)


def _clip_factor(run: RunConfig, step: StepTrace) -> float:
    return min(1.0, (run.optimizer.gradient_clipping or inf) / max(step.grad_norm, TINY))
