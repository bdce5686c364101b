"""Rates that `launcher calibrate` measured on a machine, in place of those from data sheets. Pure."""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

from launcher.config.schema import Dtype, HardwareConfig, MeasuredRates, Point
from launcher.planning.cost.operations import BYTES, Collective, Matmul
from launcher.planning.cost.rates import Rates, Shares, specified
from launcher.planning.cost.traffic import GroupShape

Curve = tuple[tuple[float, float], ...]  # (size, per second), in rising order of size


@dataclass(frozen=True)
class CalibratedRates:
    """Of one rank among as many as run. The same questions as Rates answers (rates.py)."""

    products: Curve
    elementwise: Curve
    memory: float  # bytes per second of an optimizer's update
    operation_s: float
    step_s: float
    micro_batch_s: float
    zero_3_block_s: float
    scales: Curve
    collectives: tuple[tuple[str, int, Curve], ...]
    crowding: float  # ranks to a core, where there are more ranks than cores
    shares: Shares
    element: int

    @property
    def host(self) -> float:
        return self.memory

    def product(self, matmul: Matmul) -> float:
        """Seconds, at the rate of products of its size."""
        return matmul.flops / interpolated(self.products, matmul.flops / matmul.count)

    def moving(self, size: float, kernels: int = 1) -> float:
        """Seconds to read and write `size` bytes in some operations, each on a part of them."""
        if not kernels:
            return 0.0
        # An operation reads one tensor and writes another.
        rate = interpolated(self.elementwise, max(size / kernels / 2, 1.0))
        return size / rate + kernels * self.operation_s

    def scale(self, flops: float) -> float:
        """What the passes of a model with blocks of `flops` take, over their operations one by one."""
        if not self.scales:
            return 1.0
        smallest, largest = self.scales[0][0], self.scales[-1][0]
        return interpolated(self.scales, min(max(flops, smallest), largest))

    def collective(self, one: Collective, group: GroupShape) -> float:
        """Seconds, as groups of this many ranks took, or of the nearest number that was measured."""
        if group.ranks == 1:
            return 0.0
        alike = [
            (abs(ranks - group.ranks), curve) for kind, ranks, curve in self.collectives if kind == one.kind
        ]
        assert alike, f"calibration measures {one.kind}"
        return one.size / interpolated(min(alike)[1], one.size)


AnyRates = Rates | CalibratedRates


def rates_of(
    hardware: HardwareConfig, dtype: Dtype, world: int, shares: Shares | None = None
) -> AnyRates | None:
    """What was measured of this hardware, else what data sheets say; None where there is neither."""
    return calibrated(hardware, dtype, world) or specified(hardware, dtype, shares)


def calibrated(hardware: HardwareConfig, dtype: Dtype, world: int) -> CalibratedRates | None:
    """For `world` ranks on this machine; None where nothing was measured.

    More ranks than cores compute as those that have a core each, and take turns.
    """
    measured = sorted(hardware.measured, key=lambda one: one.ranks)
    if not measured or not getattr(measured[0].products, dtype.name):
        return None
    at_once = min(world, hardware.cores or world)
    computing = max((one for one in measured if one.ranks <= at_once), key=_ranks, default=measured[0])
    talking = max((one for one in measured if one.ranks <= world), key=_ranks, default=measured[0])
    return CalibratedRates(
        products=_curve(getattr(computing.products, dtype.name)),
        elementwise=_curve(computing.elementwise),
        memory=computing.stream,
        operation_s=computing.operation_s,
        step_s=computing.step_s,
        micro_batch_s=computing.micro_batch_s,
        zero_3_block_s=computing.zero_3_block_s,
        scales=tuple(sorted((one.flops, one.factor) for one in computing.scales)),
        collectives=_collectives(measured, talking),
        crowding=world / at_once,
        shares=Shares(overlap=0.0),
        element=BYTES[dtype],
    )


def _ranks(one: MeasuredRates) -> int:
    return one.ranks


def _collectives(measured: Sequence[MeasuredRates], own: MeasuredRates) -> tuple[tuple[str, int, Curve], ...]:
    """Those measured with as many ranks; of group sizes that only others have, theirs."""
    found: dict[tuple[str, int], Curve] = {}
    for one in (*measured, own):
        for collective in one.collectives:
            found[collective.kind, collective.ranks] = _curve(collective.points)
    return tuple((kind, ranks, curve) for (kind, ranks), curve in sorted(found.items()))


def _curve(points: Sequence[Point]) -> Curve:
    return tuple(sorted((point.size, point.per_s) for point in points))


def interpolated(curve: Curve, size: float) -> float:
    """Straight between points in logarithms; beyond the last as there, below the first as for one size."""
    sizes = [point[0] for point in curve]
    place = bisect(sizes, size)
    if place == 0:
        return curve[0][1] * size / curve[0][0]
    if place == len(curve):
        return curve[-1][1]
    (low, slow), (high, fast) = curve[place - 1], curve[place]
    part = (log(size) - log(low)) / (log(high) - log(low))
    return exp(log(slow) * (1 - part) + log(fast) * part)
