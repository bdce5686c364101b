"""Which source each sample of a blend comes from: exact to one sample at any prefix.

After n samples a source of share w has given w n of them, rounded down or up. Such a schedule exists for any
shares: "proportionate progress" (Baruah, Cohen, Plaxton & Varvel, Algorithmica 15, 1996). Item j of a source
has to come in a window, from j / w to (j + 1) / w, and the earliest deadline first meets all of them. With
weights in whole numbers it repeats itself after their sum: one period tells of any sample.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from launcher.config.shape import whole_weights
from launcher.data.sampler import MicroBatch, Samples

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Schedule:
    """Of sources of these weights, relative to each other: whole numbers without a common divisor."""

    weights: tuple[int, ...]

    @property
    def period(self) -> int:
        return sum(self.weights)

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` come from each source."""
        periods, rest = divmod(samples, self.period)
        within = np.bincount(one_period(self.weights)[0][:rest], minlength=len(self.weights)).tolist()
        return [periods * weight + more for weight, more in zip(self.weights, within, strict=True)]

    def locate(self, indices: Indices) -> tuple[Indices, Indices]:
        """Samples (B,) to their source (B,), and their place among that source's samples (B,)."""
        periods, rest = np.divmod(indices, self.period)
        sources, places = (of_period[rest] for of_period in one_period(self.weights))
        return sources, places + periods * np.array(self.weights)[sources]


@lru_cache(maxsize=4)
def one_period(weights: tuple[int, ...]) -> tuple[Indices, Indices]:
    """The source of each sample of a period, and its place among that source's: earliest deadline first."""
    period = sum(weights)
    sources, places = np.empty(period, np.int64), np.empty(period, np.int64)
    done = [0] * len(weights)
    coming = [(0, source) for source in range(len(weights))]  # (the sample from which on it may come, source)
    ready: list[tuple[int, int]] = []  # (the sample before which it must have come, source)
    for sample in range(period):
        while coming and coming[0][0] <= sample:
            _, source = heapq.heappop(coming)
            heapq.heappush(ready, (-(-(done[source] + 1) * period // weights[source]), source))
        _, source = heapq.heappop(ready)
        sources[sample], places[sample] = source, done[source]
        done[source] += 1
        heapq.heappush(coming, (done[source] * period // weights[source], source))
    return sources, places


@dataclass(frozen=True)
class Segment:
    """A blend and the sample from which on it counts."""

    start: int
    weights: dict[str, float]

    @property
    def names(self) -> list[str]:
        return sorted(self.weights)

    @property
    def schedule(self) -> Schedule:
        return Schedule(tuple(whole_weights([self.weights[name] for name in self.names])))


@dataclass(frozen=True, eq=False)  # eq: samples have no single truth value
class Blend:
    """An endless sequence of samples from several sources, each going through epochs of its own.

    `segments` are the blends of the run so far, in order; samples are taken from the last. A source goes on
    from where an earlier blend left it.
    """

    sources: Mapping[str, Samples]
    segments: Sequence[Segment]

    @cached_property
    def _before(self) -> dict[str, int]:
        """The samples that each source gave before the last segment."""
        given: dict[str, int] = {}
        for segment, after in zip(self.segments, self.segments[1:], strict=False):
            counts = segment.schedule.counts(after.start - segment.start)
            for name, count in zip(segment.names, counts, strict=True):
                given[name] = given.get(name, 0) + count
        return given

    def take(self, indices: Indices) -> MicroBatch:
        """Samples `indices` (B,)."""
        found = self.locate(indices)
        if len(found) == 1:
            [(name, (_, places))] = found.items()
            return self.sources[name].take(places)
        rows: dict[int, Indices] = {}
        for name, (here, places) in found.items():
            taken = self.sources[name].take(places)
            assert not isinstance(taken, tuple), "blends are of token files"
            rows |= zip(here.tolist(), taken, strict=True)
        return np.stack([rows[row] for row in range(len(indices))])

    def locate(self, indices: Indices) -> dict[str, tuple[Indices, Indices]]:
        """By source: which of the samples (B,) come from it, and their places in its own sequence."""
        segment = self.segments[-1]
        assert int(indices.min()) >= segment.start, "earlier blends are only counted"
        sources, places = segment.schedule.locate(indices - segment.start)
        return {
            name: ((sources == number).nonzero()[0], places[sources == number] + self._before.get(name, 0))
            for number, name in enumerate(segment.names)
            if (sources == number).any()
        }

    def epochs(self, samples: int) -> dict[str, float]:
        """How often the run has gone through each source, `samples` into it."""
        segment = self.segments[-1]
        counts = segment.schedule.counts(samples - segment.start)
        return {
            name: (count + self._before.get(name, 0)) / len(self.sources[name])
            for name, count in zip(segment.names, counts, strict=True)
        }
