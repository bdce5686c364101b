"""How far apart two right runs may be. Derived from the arithmetic, not chosen to pass.

Two orders of adding n numbers differ by at most about lambda sqrt(n) u relative to their size, with u the
unit roundoff and a probability that falls as exp(-lambda^2 / 2) (Higham and Mary, SIAM J. Sci. Comput. 41,
2019, theorem 3.1). A run and its reference each err by that much: twice the bound. Lengths of successive
reductions add up. Layouts whose sums are added in the same order come out far below.
"""

from dataclasses import dataclass
from math import sqrt

from launcher.config.schema import Dtype, RunConfig
from launcher.config.shape import output_size, sequence_length

LAMBDA = 3.0
UNIT_ROUNDOFF = {Dtype.fp32: 2.0**-24, Dtype.bf16: 2.0**-8, Dtype.fp16: 2.0**-11}
ROUNDINGS_PER_BLOCK = 11  # outputs written in the training dtype: norms, projections, products, sums


@dataclass(frozen=True)
class Tolerance:
    """Relative differences allowed after the first step; those after step k are k times as large."""

    loss: float
    output: float  # of a layer, in the L2 norm; of a micro-batch's loss too
    gradient: float  # of a tensor, in the L2 norm; of the global norm too


def tolerance(run: RunConfig) -> Tolerance:
    """That of a run in its own precision against fp32."""
    u = UNIT_ROUNDOFF[run.precision.dtype]
    if run.precision.dtype is Dtype.fp32:
        forward = forward_length(run)
        tokens = run.training.global_batch_size * sequence_length(run)
        return Tolerance(_bound(u, forward), _bound(u, forward), _bound(u, 3 * forward + tokens))
    # Products accumulate in fp32; what is rounded to 8 or 11 bits is every tensor that is written. The loss
    # is a mean over all tokens of independently rounded values.
    roundings = ROUNDINGS_PER_BLOCK * run.model.num_layers + 4
    return Tolerance(_bound(u, roundings) / 4, _bound(u, roundings), _bound(u, 3 * roundings))


def forward_length(run: RunConfig) -> int:
    """The lengths of the reductions one after the other, from a token to its loss, added up."""
    m = run.model
    h, head = m.hidden_size, m.hidden_size // m.num_heads
    block = 2 * h + h + head + sequence_length(run) + h + h + m.ffn_hidden_size
    patches = m.image_channels * m.patch_size**2  # of a vit
    return m.num_layers * block + h + h + output_size(m) + patches


def _bound(u: float, length: int) -> float:
    return 2 * LAMBDA * u * sqrt(length)
