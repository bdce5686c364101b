"""Rates that `launcher calibrate` measured on a machine, used instead of data sheets. Pure."""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, log

from launcher.config.schema import Dtype, HardwareConfig, MeasuredRates, Point, Scale
from launcher.planning.cost.operations import BYTES, Collective, FusedAttention, Matmul
from launcher.planning.cost.rates import Rates, Shares, specified
from launcher.planning.cost.traffic import GroupShape

RateCurve = tuple[tuple[float, float], ...]  # (size, per second), in rising order of size


@dataclass(frozen=True)
class CalibratedRates:
    """Measured rates of a rank while all ranks run. Has the same methods as Rates (rates.py)."""

    products: RateCurve
    elementwise: RateCurve
    memory: float  # bytes per second in an optimizer update
    operation_s: float
    step_s: float
    micro_batch_s: float
    zero_2_block_s: float
    zero_3_block_s: float
    pipeline_batch_s: float
    scales: RateCurve
    waiting_scales: RateCurve
    collectives: tuple[tuple[str, int, RateCurve], ...]
    crowding: float  # ranks per core, 1 with a core for each rank
    element: int
    overlaps = False  # gloo's threads compute on the cores of the ranks
    beside = 0.0
    tensor_step_s = 0.0  # part of step_s

    @property
    def host(self) -> float:
        return self.memory

    @property
    def update(self) -> float:
        return self.memory

    def product(self, matmul: Matmul) -> float:
        """Return seconds at the rate measured for products of this size."""
        return matmul.flops / interpolated(self.products, matmul.flops / matmul.count)

    def attention(self, attention: FusedAttention, products: int) -> float:
        """Return seconds of the products over all scores: the scales below account for the rest."""
        return products * self.product(attention.product)

    def pointwise(self, size: float, kernels: int, *, compiled: bool) -> float:
        return self.moving(size, kernels)

    def starting(self, kernels: int, *, compiled: bool) -> float:
        return 0.0  # part of operation_s

    def moving(self, size: float, kernels: int = 1) -> float:
        """Return seconds to read and write `size` bytes in `kernels` operations, each on a part of them."""
        if not kernels:
            return 0.0
        # An operation reads a tensor and writes another.
        rate = interpolated(self.elementwise, max(size / kernels / 2, 1.0))
        return size / rate + kernels * self.operation_s

    def scale(self, flops: float, *, waits: bool) -> float:
        """Return the time of a model's passes divided by the sum of its operations, for blocks of `flops`.

        `waits`: ranks wait for each other many times in a step, each time for the slowest. Ranks that share a
        processor wait as well: for one that has no turn.
        """
        alone = _factor(self.scales, flops)
        if not waits or not self.waiting_scales:
            return alone
        return max(alone, _factor(self.waiting_scales, flops))

    def collective(self, collective: Collective, group: GroupShape) -> float:
        """Return seconds from measurements with this number of ranks, or the nearest number measured."""
        if group.ranks == 1:
            return 0.0
        measured = [(ranks, curve) for kind, ranks, curve in self.collectives if kind == collective.kind]
        if not measured and collective.kind == "all_to_all":
            # Files of older calibrations have none. It sends as much as an all-gather of its size.
            return self.collective(replace(collective, kind="all_gather"), group)
        curves = [(abs(ranks - group.ranks), curve) for ranks, curve in measured]
        assert curves, f"calibration measures {collective.kind}"
        return collective.size / interpolated(min(curves)[1], collective.size)

    def passing_on(self, collective: Collective, group: GroupShape) -> float:
        return self.collective(collective, group)


AnyRates = Rates | CalibratedRates


def rates_of(
    hardware: HardwareConfig, dtype: Dtype, world: int, shares: Shares | None = None
) -> AnyRates | None:
    """Return measured rates of this hardware, else rates from its data sheet, else None."""
    return calibrated(hardware, dtype, world) or specified(hardware, dtype, shares)


def calibrated(hardware: HardwareConfig, dtype: Dtype, world: int) -> CalibratedRates | None:
    """Return the measured rates for `world` ranks on this machine; None without measurements.

    More ranks than cores take turns, each at the rate of a rank with its own core. A calibration of a single
    rank measures no collective, and so says nothing about several.
    """
    measured = sorted(hardware.measured, key=lambda rates: rates.ranks)
    if not measured or not getattr(measured[0].products, dtype.name):
        return None
    if world > 1 and not any(rates.collectives for rates in measured):
        return None
    at_once = min(world, hardware.cores or world)
    computing, communicating = _at_most(measured, at_once), _at_most(measured, world)
    scale = hardware.compute_scale
    return CalibratedRates(
        products=_curve(getattr(computing.products, dtype.name), scale),
        elementwise=_curve(computing.elementwise, scale),
        memory=computing.stream,
        operation_s=computing.operation_s * scale,
        step_s=computing.step_s,
        micro_batch_s=computing.micro_batch_s,
        zero_2_block_s=computing.zero_2_block_s,
        zero_3_block_s=computing.zero_3_block_s,
        pipeline_batch_s=computing.pipeline_batch_s,
        scales=_factors(computing.scales),
        waiting_scales=_factors(computing.waiting_scales),
        collectives=_collectives(measured, communicating),
        crowding=world / at_once,
        element=BYTES[dtype],
    )


def _at_most(measured: Sequence[MeasuredRates], ranks: int) -> MeasuredRates:
    """Return the rates with the largest number of ranks up to `ranks`, else with the smallest."""
    few = (rates for rates in measured if rates.ranks <= ranks)
    return max(few, key=lambda rates: rates.ranks, default=measured[0])


def _collectives(
    measured: Sequence[MeasuredRates], preferred: MeasuredRates
) -> tuple[tuple[str, int, RateCurve], ...]:
    """Return (kind, group size, curve) of `preferred`, and of other rates for other group sizes."""
    curves: dict[tuple[str, int], RateCurve] = {}
    for rates in (*measured, preferred):
        for collective in rates.collectives:
            curves[collective.kind, collective.ranks] = _curve(collective.points)
    return tuple((kind, ranks, curve) for (kind, ranks), curve in sorted(curves.items()))


def _factors(scales: Sequence[Scale]) -> RateCurve:
    return tuple(sorted((scale.flops, scale.factor) for scale in scales))


def _factor(factors: RateCurve, flops: float) -> float:
    """Return the factor for blocks of `flops`, of the nearest size beyond the curve's ends; 1 if empty."""
    if not factors:
        return 1.0
    smallest, largest = factors[0][0], factors[-1][0]
    return interpolated(factors, min(max(flops, smallest), largest))


def _curve(points: Sequence[Point], scale: float = 1.0) -> RateCurve:
    return tuple(sorted((point.size, point.per_s / scale) for point in points))


def interpolated(curve: RateCurve, size: float) -> float:
    """Interpolate between logarithms. The rate is constant above the last point, the time below the first."""
    sizes = [point[0] for point in curve]
    place = bisect(sizes, size)
    if place == 0:
        return curve[0][1] * size / curve[0][0]
    if place == len(curve):
        return curve[-1][1]
    (low, slow), (high, fast) = curve[place - 1], curve[place]
    part = (log(size) - log(low)) / (log(high) - log(low))
    return exp(log(slow) * (1 - part) + log(fast) * part)
