"""Seconds of a micro-batch in the parts of a model: computation, and waits for tensor ranks. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from launcher.planning.cost.measured_rates import AnyRates
from launcher.planning.cost.operations import Collective, Matmul, Operation
from launcher.planning.cost.parts import ModelPart, parts
from launcher.planning.cost.sizes import Sizes
from launcher.planning.cost.traffic import GroupShape

ALONE = GroupShape(1, 1)


@dataclass(frozen=True)
class PassTime:
    """Seconds of a micro-batch in one direction."""

    compute: float = 0.0
    waiting: float = 0.0  # for tensor ranks
    hidden: float = 0.0  # of collectives over tensor ranks that run while the rank computes
    host: float = 0.0  # to start the operations, beside the device
    exchanging: float = 0.0  # rows of tokens with the ranks that share the experts

    @property
    def total(self) -> float:
        return self.compute + self.waiting + self.exchanging

    def __add__(self, other: "PassTime") -> "PassTime":
        return PassTime(
            self.compute + other.compute,
            self.waiting + other.waiting,
            self.hidden + other.hidden,
            self.host + other.host,
            self.exchanging + other.exchanging,
        )

    def times(self, count: int) -> "PassTime":
        return PassTime(
            self.compute * count,
            self.waiting * count,
            self.hidden * count,
            self.host * count,
            self.exchanging * count,
        )


def scaled(seconds: PassTime, scale: float) -> PassTime:
    """Multiply the seconds of computation, and not the wait."""
    return replace(seconds, compute=seconds.compute * scale)


def exchanging(
    seconds: PassTime, calls: Sequence[Collective], rates: AnyRates, expert: GroupShape
) -> PassTime:
    """Return the time of a pass with its collectives over the expert group."""
    return replace(seconds, exchanging=sum(rates.collective(call, expert) for call in calls))


@dataclass(frozen=True)
class PartTimes:
    """Forward and backward pass of a micro-batch, for each part of a model."""

    embedding: tuple[PassTime, PassTime]
    dense: tuple[PassTime, PassTime]  # a block without experts
    sparse: tuple[PassTime, PassTime]  # a block with experts
    head: tuple[PassTime, PassTime]
    overhead: float  # of a micro-batch in any stage


@cache
def part_times(sizes: Sizes, rates: AnyRates, tensor: GroupShape, expert: GroupShape = ALONE) -> PartTimes:
    model = parts(sizes)
    scale = rates.scale(model.block.flops)

    def both(part: ModelPart) -> tuple[PassTime, PassTime]:
        # Only blocks are compiled, and their norms and activations are slow where they are not.
        compiled = sizes.compiled or part in (model.embedding, model.head)
        forward = forward_pass(part.program, rates, tensor, compiled=compiled)
        backward = backward_pass(part, rates, tensor, compiled=compiled)
        sent = [call for operation in part.program for call in operation.forward_exchange]
        again = [call for operation in part.again for call in operation.forward_exchange]
        back = again + [call for operation in part.program for call in operation.backward_exchange]
        forward, backward = scaled(forward, scale), scaled(backward, scale)
        return exchanging(forward, sent, rates, expert), exchanging(backward, back, rates, expert)

    dense = both(model.dense)
    sparse = dense if model.sparse is model.dense else both(model.sparse)
    return PartTimes(both(model.embedding), dense, sparse, both(model.head), rates.micro_batch_s)


def forward_pass(
    operations: Sequence[Operation], rates: AnyRates, tensor: GroupShape, *, compiled: bool
) -> PassTime:
    compute = waiting = 0.0
    for operation in operations:
        compute += sum(_products(operation.forward_matmuls, operation, rates))
        compute += rates.pointwise(operation.forward_bytes, operation.kernels, compiled=compiled)
        waiting += sum(rates.collective(collective, tensor) for collective in operation.forward_traffic)
    return PassTime(compute, waiting, 0.0, rates.starting(sum(operation.kernels for operation in operations)))


def backward_pass(part: ModelPart, rates: AnyRates, tensor: GroupShape, *, compiled: bool) -> PassTime:
    """Return the time with recomputation.

    A column layer's collective runs beside the product of its weight's gradient (parallel/layers.py).
    """
    again = forward_pass(part.again, rates, tensor, compiled=compiled)
    compute, waiting, hidden = again.compute, again.waiting, 0.0
    for operation in part.program:
        products = _products(operation.backward_matmuls, operation, rates)
        compute += sum(products)
        compute += rates.pointwise(operation.backward_bytes, 2 * operation.kernels, compiled=compiled)
        waiting += sum(rates.collective(collective, tensor) for collective in operation.backward_traffic)
        for collective in operation.overlapped_traffic:
            seconds = rates.collective(collective, tensor)
            beside = min(seconds, products[-1]) if rates.overlaps and products else 0.0
            waiting, hidden = waiting + seconds - beside, hidden + beside
    kernels = 2 * sum(operation.kernels for operation in part.program)
    return PassTime(compute, waiting, hidden, again.host + rates.starting(kernels))


def _products(matmuls: Sequence[Matmul], operation: Operation, rates: AnyRates) -> list[float]:
    if operation.attention is not None and matmuls:
        return [rates.attention(operation.attention, len(matmuls))]
    return [rates.product(matmul) for matmul in matmuls]
