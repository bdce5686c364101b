"""Find the rank that the other ranks wait for, and warn once if it stays the slowest. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from launcher.runtime.metrics.rows import Row

SLOW = 1.5  # times the work of the median of the other ranks
COSTLY = 0.1  # smallest share of the step time, and
NOTICEABLE = 0.005  # smallest number of seconds per step that the slow rank costs
ROWS = 3  # a whole job that was suspended, as with Ctrl-Z, looks like a slow rank in one row


@dataclass(frozen=True)
class Slowest:
    """The rank that works longest in a step."""

    rank: int
    seconds: float  # of work in a step
    others: float  # the median of the other ranks

    @property
    def ratio(self) -> float:
        return self.seconds / max(self.others, 1e-9)


def slowest(work: Sequence[float]) -> Slowest:
    """Return the slowest of at least two ranks, from the seconds of work of each."""
    rank = max(range(len(work)), key=work.__getitem__)
    return Slowest(rank, work[rank], median([*work[:rank], *work[rank + 1 :]]))


class SlowRankWatch:
    """Warns of a rank that stays slow for `patience` seconds; again only after the rank has recovered.

    `expected` is the planned work of each rank in any unit, because pipeline stages are not equal. A rank is
    slow only if both its seconds of work and its seconds per planned work are too high.
    """

    def __init__(self, hosts: Sequence[str], expected: Sequence[float], patience: float) -> None:
        mean = sum(expected) / len(expected)
        self._shares = [each / mean for each in expected]
        self._hosts, self._patience = hosts, patience
        self._suspect: int | None = None
        self._rows, self._seconds = 0, 0.0
        self._reported: int | None = None

    def after(self, work: Sequence[float], step_seconds: float, steps: int) -> tuple[Row, list[str]]:
        """Return the metrics of a logged row, which covers `steps` steps, and the lines to print."""
        if len(work) == 1 or not any(work):
            return {}, []
        worst = slowest(work)
        row: Row = {"perf/slowest_rank": worst.rank, "perf/slowest_over_median": worst.ratio}
        suspect = worst.rank if self._is_slow(work, worst, step_seconds) else None
        if suspect != self._suspect:
            self._suspect, self._rows, self._seconds = suspect, 0, 0.0
        self._rows += 1
        self._seconds += step_seconds * steps
        if self._suspect == self._reported or self._rows < ROWS or self._seconds < self._patience:
            return row, []
        recovered, self._reported = self._reported, self._suspect
        if self._reported is None:
            return row, [f"note     rank {recovered} on {self._hosts[recovered or 0]} is no longer slow"]
        return row, [self._warning(worst)]

    def _is_slow(self, work: Sequence[float], worst: Slowest, step_seconds: float) -> bool:
        relative = slowest([each / share for each, share in zip(work, self._shares, strict=True)])
        lost = worst.seconds - worst.others
        return (
            relative.rank == worst.rank
            and min(worst.ratio, relative.ratio) >= SLOW
            and lost >= max(COSTLY * step_seconds, NOTICEABLE)
        )

    def _warning(self, worst: Slowest) -> str:
        return (
            f"warning  the other ranks wait for rank {worst.rank} on {self._hosts[worst.rank]}: "
            f"{worst.seconds:.3g} s of work per step, {worst.ratio:.1f} times the median of the other ranks "
            f"({worst.others:.3g} s), for {self._seconds:.0f} s now"
        )
