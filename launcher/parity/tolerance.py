"""Bounds on the difference between two correct runs, derived from floating-point arithmetic.

Two summation orders of n numbers differ, relative to the size of the sum, by at most about lambda sqrt(n) u,
where u is the unit roundoff. The probability of exceeding the bound falls as exp(-lambda^2 / 2) (Higham and
Mary, SIAM J. Sci. Comput. 41, 2019, theorem 3.1). The run and the reference both have this error, so the
allowed difference is twice the bound. The lengths of successive reductions are added. Layouts that add in the
same order as the reference stay far below the bound.
"""

from dataclasses import dataclass
from math import sqrt

from launcher.config.schema import Dtype, RunConfig, StatesDtype
from launcher.config.shape import output_size, sequence_length

LAMBDA = 3.0
UNIT_ROUNDOFF = {Dtype.fp32: 2.0**-24, Dtype.bf16: 2.0**-8, Dtype.fp16: 2.0**-11}
ROUNDINGS_PER_BLOCK = 11  # tensors rounded to the training dtype: norms, projections, products, sums


@dataclass(frozen=True)
class Tolerance:
    """Relative differences allowed after the first step; after step k they are k times as large."""

    loss: float
    output: float  # L2 norm of a layer's output; also the loss of a micro-batch
    gradient: float  # L2 norm of a tensor's gradient; also the global gradient norm


def tolerance(run: RunConfig) -> Tolerance:
    """Return the tolerance of a run in its precision against the fp32 reference."""
    u = UNIT_ROUNDOFF[run.precision.dtype]
    if run.precision.dtype is Dtype.fp32:
        forward, tokens = forward_length(run), run.training.global_batch_size * sequence_length(run)
        return Tolerance(_bound(u, forward), _bound(u, forward), _bound(u, 3 * forward + tokens))
    # Matrix products accumulate in fp32; each tensor that is written is rounded to 8 or 11 bits. The loss is
    # the mean over all tokens of values that are rounded independently.
    roundings = ROUNDINGS_PER_BLOCK * run.model.num_layers + 4
    of_gradient = 3 * roundings
    if run.precision.states is StatesDtype.bf16:  # the gradients of all micro-batches are added in bf16
        of_gradient += run.training.global_batch_size // run.training.micro_batch_size
    return Tolerance(_bound(u, roundings) / 4, _bound(u, roundings), _bound(u, of_gradient))


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
