"""Bounds on the difference between two correct runs that start a step from the same weights and states.

fp32: two summation orders of n numbers differ, relative to the size of the sum, by at most about
lambda sqrt(n) u, where u is the unit roundoff. The probability of exceeding the bound falls as
exp(-lambda^2 / 2) (Higham and Mary, SIAM J. Sci. Comput. 41, 2019, theorem 3.1). The run and the reference
both have this error: the allowed difference is twice the bound. Lengths of successive reductions are added.

bf16: the reference makes the roundings of the run, and is computed once more in each equivalent order of
summation (parity/rounding.py). The distances between them are measured for each tensor, and the allowed
difference is a multiple of the largest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt

import torch
from torch import Tensor

from launcher.config.schema import RunConfig
from launcher.config.shape import output_size, sequence_length
from launcher.parity.step_trace import StepTrace

LAMBDA = 3.0
UNIT_ROUNDOFF = 2.0**-24  # of fp32
# Of a tensor of n elements: SPREAD (1 + SMALL / sqrt(n)) times the largest measured distance. The distance is
# the L2 norm of the errors of the elements that are rounded the other way, about n / 7: its own deviation is
# about 1 / sqrt(2 n / 7) of it.
SPREAD, SMALL = 2.0, 8.0
SQUARES = 2.0  # a second moment's distance is that of its few largest elements: it deviates more
LEAST = 2.0**-11  # the distance if a few elements in a hundred are rounded the other way
ULP = 2.0**-7  # of bf16, relative to the number at most: the distance if one of one element is
# A loss is one number, not a norm: its distance may be small by chance. So the root mean square over all
# micro-batches and orders is multiplied.
DEVIATIONS = 8.0
# Rounding a logit the other way moves the loss of its label by about so much: rare if labels are few.
LOGIT = 2.0**-8
SHARED = 4.0  # times the largest distance of the loss of a step, of the few that are measured
# Factors of the distance of the whole gradient. In most models the rounding errors hardly point along the
# gradient: the norms differ by less than half of SPREAD times the distance. With a few images they do, and
# then the norms differ by up to the distance.
NORM_LEAST, NORM_MOST = SPREAD / 2, 1.5


@dataclass(frozen=True)
class Tolerance:
    """Relative differences allowed in one step. Tensors that are not listed by name have the common bound."""

    loss: float  # of each micro-batch and of an evaluation
    output: float  # L2 norm of a layer's output
    gradient: float  # L2 norm of a tensor's gradient
    norm: float  # of all gradients
    score: float  # absolute: of two experts' scores, which lie between 0 and 1
    outputs: Mapping[str, float] = field(default_factory=dict)
    gradients: Mapping[str, float] = field(default_factory=dict)
    states: Mapping[str, float] = field(default_factory=dict)
    step_loss: float | None = None  # of the step; None: as of a micro-batch
    scores: Mapping[str, float] = field(default_factory=dict)

    def of_step_loss(self) -> float:
        return self.loss if self.step_loss is None else self.step_loss

    def of_score(self, name: str) -> float:
        return self.scores.get(name, self.score)

    def of_output(self, name: str) -> float:
        return self.outputs.get(name, self.output)

    def of_gradient(self, name: str) -> float:
        return self.gradients.get(name, self.gradient)

    def of_state(self, key: str) -> float:
        """Return the bound of an optimizer state; a second moment has twice a gradient's relative error."""
        return self.states.get(key, (2 if key.endswith("_sq") else 1) * self.gradient)


def tolerance(run: RunConfig) -> Tolerance:
    """Return the bounds of any step of a run in fp32."""
    forward, tokens = forward_length(run), run.training.global_batch_size * sequence_length(run)
    gradient = _bound(UNIT_ROUNDOFF, 3 * forward + tokens)
    output = _bound(UNIT_ROUNDOFF, forward)
    return Tolerance(loss=output, output=output, gradient=gradient, norm=gradient, score=2 * output)


def measured_tolerance(
    right: StepTrace,
    others: list[StepTrace],
    labels: float,
    of_norms: float | None = None,
    of_losses: float | None = None,
) -> Tolerance:
    """Return the bounds of a step in bf16 by the distances of `others` from `right`, in other orders.

    `labels` is the mean number of labels of a micro-batch that count. `of_norms` is the `norm_distance` of
    all steps and `of_losses` their `loss_distance`; None: of this step.
    """

    def bounds(kind: str) -> dict[str, float]:
        tensors: dict[str, Tensor] = getattr(right, kind)
        return {
            name: _of_spread(max(_distance(getattr(other, kind)[name], tensor) for other in others), tensor)
            for name, tensor in tensors.items()
        }

    whole = max(_distance_of_all(other, right) for other in others)
    along = norm_distance([right], [[other] for other in others]) if of_norms is None else of_norms
    if of_losses is None:
        of_losses = loss_distance([right], [[other] for other in others])
    loss = max(DEVIATIONS * of_losses, LOGIT / labels, LEAST / 8)
    gradients = bounds("gradients")
    scores = {
        name: SPREAD * max(float((other.scores[name] - tensor).abs().max()) for other in others)
        for name, tensor in right.scores.items()
    }
    return Tolerance(
        loss=loss,
        step_loss=max(_of_mean(loss, *_losses(right, others)), LEAST / 8),
        output=LEAST,
        gradient=LEAST,
        norm=max(min(NORM_MOST * whole, max(NORM_LEAST * whole, DEVIATIONS * along)), LEAST / 8),
        score=LEAST,
        scores={name: max(bound, LEAST) for name, bound in scores.items()},
        outputs=bounds("outputs"),
        gradients=gradients,
        states={key: _of_state(key, bound, gradients) for key, bound in bounds("states").items()},
    )


def _of_state(key: str, bound: float, gradients: dict[str, float]) -> float:
    """Return the bound of a state with the measured `bound`: at least the bound given by its gradient.

    The measured distance of a few numbers may be small by chance, and that of their squares more so.
    """
    squares = SQUARES if key.endswith("_sq") else 1.0
    return squares * max(bound, gradients.get(key.rpartition(".")[0], 0.0))


def norm_distance(right: list[StepTrace], others: list[list[StepTrace]]) -> float:
    """Return the root mean square of the relative distances of the gradient norms: all orders, all steps."""
    pairs = [(step, each) for steps in others for step, each in zip(steps, right, strict=True)]
    distances = [step.grad_norm / each.grad_norm - 1 for step, each in pairs if each.grad_norm]
    return sqrt(sum(distance**2 for distance in distances) / max(1, len(distances)))


def loss_distance(right: list[StepTrace], others: list[list[StepTrace]]) -> float:
    """Return the root mean square of the relative distances of samples' losses: all orders, all steps.

    Of a step with a single sample it could be small by chance.
    """
    pairs = [_losses(step, same) for step, *same in zip(right, *others, strict=True)]
    distances = torch.cat([(of_others / losses - 1).flatten() for losses, of_others in pairs])
    return float(distances.square().mean().sqrt()) if len(distances) else 0.0


def _losses(step: StepTrace, others: list[StepTrace]) -> tuple[Tensor, Tensor]:
    """Return the losses (samples,) of the samples with labels that count, and those of the others."""
    losses = torch.tensor(step.batch_losses).flatten()
    counts = losses != 0  # the loss of a sample without labels that count is exactly 0
    of_others = torch.stack([torch.tensor(other.batch_losses).flatten() for other in others])
    return losses[counts], of_others[:, counts]


def _of_mean(loss: float, losses: Tensor, of_others: Tensor) -> float:
    """Return the bound of the mean of `losses` (samples,) if each has the bound `loss`.

    Rounding errors of samples are independent, so most of them cancel. Errors that all samples share do not
    cancel: the distances of the means of the other orders, `of_others` (orders, samples), show them.
    """
    weights = losses / losses.sum()
    shared = float((of_others.sum(1) / losses.sum() - 1).abs().max())
    return min(loss, max(loss * float(weights.norm()), SHARED * shared))


def _of_spread(distance: float, tensor: Tensor) -> float:
    root = sqrt(max(tensor.numel(), 1))
    return max(SPREAD * (1 + SMALL / root) * distance, LEAST, ULP / root)


def _distance(x: Tensor, right: Tensor) -> float:
    """Return the L2 norm of the difference relative to that of `right`; 0 if both are zero."""
    difference, size = float((x - right).norm()), float(right.norm())
    return difference / size if size or difference else 0.0


def _distance_of_all(step: StepTrace, right: StepTrace) -> float:
    squares = sum(float((step.gradients[n] - g).square().sum()) for n, g in right.gradients.items())
    return sqrt(squares) / right.grad_norm


def forward_length(run: RunConfig) -> int:
    """Return the sum of the lengths of all successive reductions on the way from a token to its loss."""
    m = run.model
    h, head = m.hidden_size, m.hidden_size // m.num_heads
    # The router adds up H numbers, and a token the results of its experts.
    columns = max(m.ffn_hidden_size, h + m.experts.top_k * m.experts.ffn_hidden_size)
    block = 2 * h + h + head + sequence_length(run) + h + h + columns
    patches = m.image_channels * m.patch_size**2  # 0 for language models
    return m.num_layers * block + h + h + output_size(m) + patches


def _bound(u: float, length: int) -> float:
    return 2 * LAMBDA * u * sqrt(length)
