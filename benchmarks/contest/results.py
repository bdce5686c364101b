"""Results of a class: ratios by round, their spread, and whether targets are met. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

from benchmarks.contest.classes import Class
from benchmarks.contest.ranks import Turn

# Relative differences of the losses of the first steps. Autocast and bf16 weights round differently.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-3}
FIRST_STEP_TARGET_S = 4.0  # of our command on CPU


@dataclass
class Measured:
    """Measurement of a contestant in one class."""

    label: str
    failed: str = ""
    seconds: list[float] = field(default_factory=list)  # per step, by round
    losses: list[float] = field(default_factory=list)  # of the first steps
    warm_s: float = 0.0  # seconds per step after the first
    first_step_s: float | None = None
    peak_bytes: int | None = None
    operators: dict[str, float] = field(default_factory=dict)  # milliseconds per step on rank 0

    def add(self, turn: Turn) -> None:
        self.seconds.append(turn.seconds)
        if turn.peak_bytes is not None:
            self.peak_bytes = max(self.peak_bytes or 0, turn.peak_bytes)


@dataclass(frozen=True)
class Comparison:
    """Our speed and memory over those of one peer."""

    peer: Measured
    ratios: list[float]  # of our tokens per second to the peer's, by round
    target: float | None
    loss_difference: float | None  # the largest relative difference of the losses of the first steps
    tolerance: float
    memory: float | None  # our peak over the peer's
    memory_target: float | None

    @property
    def has_same_losses(self) -> bool:
        return self.loss_difference is not None and self.loss_difference <= self.tolerance

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def spread(self) -> tuple[float, float]:
        """The first and the third quartile of the ratios."""
        if len(self.ratios) < 2:
            return self.ratios[0], self.ratios[0]
        low, _, high = quantiles(self.ratios, n=4, method="inclusive")
        return low, high

    @property
    def is_met(self) -> bool | None:
        return None if self.target is None or not self.ratios else self.ratio >= self.target

    @property
    def memory_is_met(self) -> bool | None:
        if self.memory is None or self.memory_target is None:
            return None
        return self.memory <= self.memory_target


@dataclass(frozen=True)
class ClassResult:
    """Measurements of all contestants of a class on one model; the first is ours."""

    model: str
    shape: Class
    precision: str
    tokens: int  # of a step over all ranks
    measured: list[Measured]

    @property
    def ours(self) -> Measured:
        return self.measured[0]

    def comparisons(self) -> Iterator[Comparison]:
        for peer, measured in zip(self.shape.peers, self.measured[1:], strict=True):
            ratios = [
                theirs / ours for ours, theirs in zip(self.ours.seconds, measured.seconds, strict=False)
            ]
            yield Comparison(
                peer=measured,
                ratios=ratios,
                target=peer.target,
                loss_difference=_difference(self.ours.losses, measured.losses),
                tolerance=TOLERANCE[self.precision],
                memory=_over(self.ours.peak_bytes, measured.peak_bytes),
                memory_target=self.shape.memory_target if measured is self._memory_rival() else None,
            )

    def _memory_rival(self) -> Measured | None:
        """Return the peer that our peak is held against: the named peer, or the peer with the lowest peak."""
        peers = [peer for peer in self.measured[1:] if peer.peak_bytes is not None]
        if self.shape.memory_peer is not None:
            peers = [peer for peer in peers if peer.label == self.shape.memory_peer]
        return min(peers, key=lambda peer: peer.peak_bytes or 0, default=None)

    def tokens_per_s(self, measured: Measured) -> float:
        return self.tokens / median(measured.seconds)

    def problems(self) -> list[str]:
        """Return the reasons why the comparison is not fair: peers that failed or compute something else."""
        place = f"{self.model}, {self.shape.name}"
        failed = [f"{place}: {m.failed.splitlines()[0]}" for m in self.measured if m.failed]
        return failed + [
            f"{place}: the first losses of {c.peer.label} differ from ours by {c.loss_difference:.1e}"
            for c in self.comparisons()
            if not c.peer.failed and c.loss_difference is not None and not c.has_same_losses
        ]


def _difference(ours: list[float], theirs: list[float]) -> float | None:
    pairs = zip(ours, theirs, strict=False)
    return max((abs(their_loss / loss - 1) for loss, their_loss in pairs), default=None)


def _over(ours: int | None, theirs: int | None) -> float | None:
    return None if ours is None or not theirs else ours / theirs


def as_json(result: ClassResult) -> dict[str, Any]:
    """Return the class as plain values: seconds per step by round, bytes, losses of the first steps."""
    by_label = {c.peer.label: c for c in result.comparisons()}
    return {
        "model": result.model,
        "class": result.shape.name,
        "ranks": result.shape.ranks,
        "tokens_per_step": result.tokens,
        "contestants": [
            {**vars(m), "against_ours": _comparison_json(by_label.get(m.label))} for m in result.measured
        ],
    }


def _comparison_json(comparison: Comparison | None) -> dict[str, Any] | None:
    if comparison is None or not comparison.ratios:
        return None
    return {
        "ratio": comparison.ratio,
        "quartiles": list(comparison.spread),
        "ratios": comparison.ratios,
        "target": comparison.target,
        "met": comparison.is_met,
        "loss_difference": comparison.loss_difference,
        "memory_ratio": comparison.memory,
        "memory_target": comparison.memory_target,
        "memory_met": comparison.memory_is_met,
    }
