"""Seconds of a micro-batch in the parts of a model: computation, and waits for other ranks. Pure."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
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
    waiting: float = 0.0  # waiting for tensor ranks
    hidden: float = 0.0  # collectives over tensor ranks that run while the rank computes
    host: float = 0.0  # of the host to start the operations; runs beside the device
    _: KW_ONLY
    exchanging: float = 0.0  # exchanging rows with the other ranks of the expert group
    context: float = 0.0  # waiting for context ranks
    context_hidden: float = 0.0  # exchanges with context ranks that run while the rank computes

    @property
    def total(self) -> float:
        return self.compute + self.waiting + self.exchanging + self.context

    def __add__(self, other: "PassTime") -> "PassTime":
        others = vars(other)
        return PassTime(**{name: seconds + others[name] for name, seconds in vars(self).items()})

    def times(self, count: int) -> "PassTime":
        return PassTime(**{name: seconds * count for name, seconds in vars(self).items()})


def scaled(seconds: PassTime, scale: float) -> PassTime:
    """Return the time with the seconds of computation multiplied, and those of waiting unchanged."""
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


@dataclass(frozen=True)
class PassGroups:
    """The groups whose ranks exchange tensors within a pass."""

    tensor: GroupShape
    context: GroupShape


@cache
def part_times(
    sizes: Sizes, rates: AnyRates, groups: PassGroups, expert: GroupShape = ALONE, *, waits: bool = False
) -> PartTimes:
    """Return the times of the parts; `waits`: ranks wait for each other even without these groups."""
    model = parts(sizes)
    waits = waits or max(groups.tensor.ranks, groups.context.ranks, expert.ranks) > 1
    scale = rates.scale(model.block.flops, waits=waits)

    def both(part: ModelPart) -> tuple[PassTime, PassTime]:
        # Only blocks are compiled, and their norms and activations are slow where they are not.
        compiled = sizes.compiled or part in (model.embedding, model.head)
        forward = forward_pass(part.program, rates, groups, compiled=compiled)
        backward = backward_pass(part, rates, groups, compiled=compiled)
        sent = [call for operation in part.program for call in operation.forward_exchange]
        again = [call for operation in part.again for call in operation.forward_exchange]
        back = again + [call for operation in part.program for call in operation.backward_exchange]
        forward, backward = scaled(forward, scale), scaled(backward, scale)
        return exchanging(forward, sent, rates, expert), exchanging(backward, back, rates, expert)

    dense = both(model.dense)
    sparse = dense if model.sparse is model.dense else both(model.sparse)
    return PartTimes(both(model.embedding), dense, sparse, both(model.head), rates.micro_batch_s)


def forward_pass(
    operations: Sequence[Operation], rates: AnyRates, groups: PassGroups, *, compiled: bool
) -> PassTime:
    compute = waiting = context = hidden = 0.0
    for operation in operations:
        products = sum(_products(operation.forward_matmuls, operation, rates))
        waits, beside = _context(operation, operation.forward_context, products, rates, groups.context)
        context, hidden = context + waits, hidden + beside
        compute += products
        is_compiled = compiled and not operation.is_eager
        compute += rates.pointwise(operation.forward_bytes, operation.kernels, compiled=is_compiled)
        waiting += sum(
            rates.collective(collective, groups.tensor) for collective in operation.forward_traffic
        )
    host = sum(_starting(operation, rates, compiled=compiled) for operation in operations)
    return PassTime(compute, waiting, host=host, context=context, context_hidden=hidden)


def _starting(operation: Operation, rates: AnyRates, *, compiled: bool) -> float:
    """Return the host's seconds to start the kernels of an operation in the forward pass."""
    is_bare = operation.is_loop or (compiled and not operation.is_eager)
    return rates.starting(operation.kernels, compiled=is_bare)


def _context(
    operation: Operation,
    calls: Sequence[Collective],
    products: float,
    rates: AnyRates,
    group: GroupShape,
    *,
    is_backward: bool = False,
) -> tuple[float, float]:
    """Return seconds of exchanges with context ranks: waited for, and hidden behind `products` seconds.

    In the ring a part is received while the rank computes with the part before. No part is received while it
    computes with the last part: a share of 1 / ranks of the products hides nothing. In the backward pass the
    last gradients are sent after all products.
    """
    each = [rates.passing_on(call, group) for call in calls]
    seconds = sum(each)
    if not (operation.hides_context and rates.overlaps):
        return seconds, 0.0
    travels = seconds - each[-1] if is_backward else seconds
    beside = min(travels, products * (1 - 1 / group.ranks))
    return seconds - beside, beside


def backward_pass(part: ModelPart, rates: AnyRates, groups: PassGroups, *, compiled: bool) -> PassTime:
    """Return the time of the backward pass, with recomputation.

    A column layer's collective runs beside the product of its weight's gradient (parallel/layers.py).
    """
    again = forward_pass(part.again, rates, groups, compiled=compiled)
    compute, waiting, hidden = again.compute, again.waiting, 0.0
    context, context_hidden = again.context, again.context_hidden
    for operation in part.program:
        products = _products(operation.backward_matmuls, operation, rates)
        compute += sum(products)
        calls = operation.backward_context
        waits, beside = _context(operation, calls, sum(products), rates, groups.context, is_backward=True)
        context, context_hidden = context + waits, context_hidden + beside
        is_compiled = compiled and not operation.is_eager
        compute += rates.pointwise(operation.backward_bytes, 2 * operation.kernels, compiled=is_compiled)
        waiting += sum(
            rates.collective(collective, groups.tensor) for collective in operation.backward_traffic
        )
        for collective in operation.overlapped_traffic:
            seconds = rates.collective(collective, groups.tensor)
            beside = min(seconds, products[-1]) if rates.overlaps and products else 0.0
            waiting, hidden = waiting + seconds - beside, hidden + beside
    host = again.host + 2 * sum(_starting(operation, rates, compiled=compiled) for operation in part.program)
    return PassTime(compute, waiting, hidden, host, context=context, context_hidden=context_hidden)


def _products(matmuls: Sequence[Matmul], operation: Operation, rates: AnyRates) -> list[float]:
    if operation.attention is not None and matmuls:
        return [rates.attention(operation.attention, len(matmuls))]
    return [rates.product(matmul) for matmul in matmuls]
