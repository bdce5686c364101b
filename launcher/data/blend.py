"""Blends: decide which source each sample comes from, exact to one sample at any prefix.

Let w be the share of a source. Of the first n samples, the source gives w * n, rounded down or up. Such a
schedule exists for any shares: "proportionate progress" (Baruah, Cohen, Plaxton & Varvel, Algorithmica 15,
1996). Sample j of the source must be placed between position j / w and position (j + 1) / w; scheduling the
earliest deadline first meets all these deadlines. With integer weights, the schedule repeats after a period
equal to the sum of the weights, so one period determines the source of any sample.
"""

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from launcher.config.sequence_order import Part
from launcher.config.shape import blend_weights
from launcher.data.sampler import MicroBatch, Samples

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Schedule:
    """The periodic order in which several sources give samples."""

    weights: tuple[int, ...]  # one integer per source, without a common divisor

    @property
    def period(self) -> int:
        return sum(self.weights)

    def counts(self, samples: int) -> list[int]:
        """Return how many of the first `samples` samples come from each source."""
        periods, rest = divmod(samples, self.period)
        rest_counts = np.bincount(period_order(self.weights)[0][:rest], minlength=len(self.weights)).tolist()
        return [periods * weight + count for weight, count in zip(self.weights, rest_counts, strict=True)]

    def locate(self, indices: Indices) -> tuple[Indices, Indices]:
        """Return for samples `indices` (B,) the source number (B,) and the index within the source (B,)."""
        periods, rest = np.divmod(indices, self.period)
        sources, places = (column[rest] for column in period_order(self.weights))
        return sources, places + periods * np.array(self.weights)[sources]


@lru_cache(maxsize=4)
def period_order(weights: tuple[int, ...]) -> tuple[Indices, Indices]:
    """Return for each sample of one period the source number (period,) and the index in the source (period,).

    Of all sources that may give the next sample, the source with the earliest deadline gives it.
    """
    period = sum(weights)
    sources, places = np.empty(period, np.int64), np.empty(period, np.int64)
    counts = [0] * len(weights)  # samples that each source has given so far
    # Both heaps hold (sample, source). `waiting`: the first sample that the source may give next.
    # `ready`: the deadline, the sample before which the source must have given its next one.
    waiting = [(0, source) for source in range(len(weights))]
    ready: list[tuple[int, int]] = []
    for sample in range(period):
        while waiting and waiting[0][0] <= sample:
            _, source = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(counts[source] + 1) * period // weights[source]), source))
        _, source = heapq.heappop(ready)
        sources[sample], places[sample] = source, counts[source]
        counts[source] += 1
        heapq.heappush(waiting, (counts[source] * period // weights[source], source))
    return sources, places


@dataclass(frozen=True)
class Segment:
    """The part of a run that uses one blend, from sample `start` until the next segment starts."""

    start: int
    weights: dict[str, float]  # by source name

    @property
    def names(self) -> list[str]:
        return sorted(self.weights)

    @property
    def schedule(self) -> Schedule:
        return Schedule(tuple(blend_weights([self.weights[name] for name in self.names])))


@dataclass(frozen=True, eq=False)  # eq: samples have no single truth value
class Blend:
    """An endless sequence of samples from several sources; each source counts its own epochs.

    `segments` are the blends of the run so far, in order. Samples are taken from the last segment only. A
    source continues after the last sample that it gave in the earlier segments.
    """

    sources: Mapping[str, Samples]
    segments: Sequence[Segment]

    @cached_property
    def _before(self) -> Counter[str]:
        """Return how many samples each source gave before the last segment."""
        given: Counter[str] = Counter()
        for segment, next_segment in pairwise(self.segments):
            counts = segment.schedule.counts(next_segment.start - segment.start)
            given.update(dict(zip(segment.names, counts, strict=True)))
        return given

    def take(self, indices: Indices, part: Part | None = None) -> MicroBatch:
        """Return the micro-batch of samples `indices` (B,), or its `part`.

        Raises ConfigError for unusable data.
        """
        located = self.locate(indices)
        if len(located) == 1:
            [(name, (_, places))] = located.items()
            return self.sources[name].take(places, part)
        taken = [(rows, self.sources[name].take(places, part)) for name, (rows, places) in located.items()]
        order = np.argsort(np.concatenate([rows for rows, _ in taken]))
        pairs = [batch for _, batch in taken if isinstance(batch, tuple)]
        if pairs:
            inputs, labels = (np.concatenate(arrays)[order] for arrays in zip(*pairs, strict=True))
            return inputs, labels
        return np.concatenate([batch for _, batch in taken if not isinstance(batch, tuple)])[order]

    def count_labels(self, indices: Indices) -> int:
        """Return how many labels of samples `indices` (B,) count."""
        return sum(
            self.sources[name].count_labels(places) for name, (_, places) in self.locate(indices).items()
        )

    def locate(self, indices: Indices) -> dict[str, tuple[Indices, Indices]]:
        """Return for each source its rows in `indices` (B,) and the index of each sample in the source."""
        segment = self.segments[-1]
        assert int(indices.min()) >= segment.start, "samples of earlier segments are never read again"
        sources, places = segment.schedule.locate(indices - segment.start)
        return {
            name: ((sources == number).nonzero()[0], places[sources == number] + self._before[name])
            for number, name in enumerate(segment.names)
            if (sources == number).any()
        }

    def epochs(self, samples: int) -> dict[str, float]:
        """Return for each source the epochs that the run has read after its first `samples` samples."""
        segment = self.segments[-1]
        counts = segment.schedule.counts(samples - segment.start)
        return {
            name: (count + self._before[name]) / len(self.sources[name])
            for name, count in zip(segment.names, counts, strict=True)
        }
