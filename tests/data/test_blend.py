"""Blends are exact to one sample at any prefix, for any weights, and from any start."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.config.shape import blend_weights, whole_weights
from launcher.data.blend import Blend, Schedule, Segment
from launcher.data.sampler import Samples
from launcher.data.windows import Stretch, Windows


@st.composite
def weights(draw: st.DrawFn) -> list[float]:
    """Draw integer weights, decimal weights, or one very large weight; the period is at most about 20,000."""
    return draw(
        st.lists(st.integers(1, 9), min_size=1, max_size=12)
        | st.lists(st.integers(1, 999).map(lambda n: n / 100), min_size=1, max_size=12)
        | st.lists(st.sampled_from([0.001, 0.002, 1.0, 5.0]), min_size=1, max_size=4)
    )


def schedule_of(weights: list[float]) -> Schedule:
    return Schedule(tuple(whole_weights(weights)))


def order(schedule: Schedule, samples: int, start: int = 0) -> npt.NDArray[np.int64]:
    return schedule.locate(np.arange(start, start + samples))[0]


def largest_deviation(schedule: Schedule, sources: npt.NDArray[np.int64]) -> Fraction:
    """Return the largest |count - share * samples| over all sources and prefixes, exactly."""
    worst = 0
    for source, weight in enumerate(schedule.weights):
        counts = np.cumsum(sources == source)
        samples = np.arange(1, len(sources) + 1)
        worst = max(worst, int(np.abs(counts * schedule.period - weight * samples).max()))
    return Fraction(worst, schedule.period)


class TestSchedule:
    @given(weights())
    @settings(max_examples=60)
    def test_every_prefix_is_exact_to_one_sample(self, given: list[float]) -> None:
        schedule = schedule_of(given)
        assert largest_deviation(schedule, order(schedule, min(schedule.period + 9, 6000))) < 1

    @given(weights(), st.integers(0, 10**15))
    @settings(max_examples=60)
    def test_each_source_gives_its_samples_in_order(self, given: list[float], start: int) -> None:
        schedule = schedule_of(given)
        sources, places = schedule.locate(np.arange(start, start + 300))
        before, after = schedule.counts(start), schedule.counts(start + 300)
        assert (sum(before), sum(after)) == (start, start + 300)
        for source in range(len(given)):
            assert places[sources == source].tolist() == list(range(before[source], after[source]))

    def test_is_a_function_of_the_index(self) -> None:
        schedule = schedule_of([0.7, 0.2, 0.1])
        mixed = np.random.default_rng(0).permutation(5000)
        assert (schedule.locate(mixed)[0] == order(schedule, 5000)[mixed]).all()

    def test_decimal_weights_become_exact_integers(self) -> None:
        assert whole_weights([0.1] * 10) == [1] * 10
        assert whole_weights([0.1, 0.2]) == [1, 2]
        assert whole_weights([0.7, 0.2, 0.1]) == [7, 2, 1]
        assert whole_weights([1e-05, 3]) == [1, 300_000]
        assert schedule_of([0.1, 0.2]).counts(3 * 10**15) == [10**15, 2 * 10**15]

    @pytest.mark.parametrize(
        ("weights", "expected"),
        [
            ([0.3333333, 0.6666667], [33_333, 66_667]),
            ([0.14285714, 0.85714286], [14_286, 85_714]),
            ([1.23456789, 3.3, 2], [18_893, 50_501, 30_606]),
            ([1e-6, 1], [1, 1_000_000]),  # too small to be rounded: refused with the config
        ],
    )
    def test_weights_of_many_digits_are_rounded(self, weights: list[float], expected: list[int]) -> None:
        rounded = blend_weights(weights)
        common = math.gcd(*expected)
        assert rounded == [number // common for number in expected]
        for number, weight in zip(rounded, weights, strict=True):
            assert number / sum(rounded) == pytest.approx(weight / sum(weights), rel=1e-3)

    def test_never_changes(self) -> None:
        # Recorded values: if they change, the data of every existing run change when it resumes.
        schedule = schedule_of([5, 3, 2])
        assert "".join(map(str, order(schedule, 30).tolist())) == "010201010201020101020102010102"
        assert schedule.locate(np.array([10**12]))[1].tolist() == [5 * 10**11]


def samples_of(first: int, windows: int, seed: int | None = None) -> Samples:
    """Return samples of one input token each; the token's value identifies the source and the place."""
    return Samples(Windows([Stretch(np.arange(first, first + windows + 1))], 1), seed)


SOURCES = {"a": samples_of(0, 40), "b": samples_of(1000, 25)}


class TestBlend:
    def test_takes_each_source_in_its_own_order(self) -> None:
        blend = Blend(SOURCES, [Segment(0, {"b": 1, "a": 3})])
        taken = blend.take(np.arange(60))[:, 0]
        assert taken[taken >= 1000].tolist() == list(range(1000, 1015))
        assert taken[taken < 1000].tolist() == [*range(40), *range(5)]  # its second epoch
        assert blend.epochs(60) == {"a": 45 / 40, "b": 15 / 25}

    def test_the_order_of_names_does_not_matter(self) -> None:
        first, second = (Blend(SOURCES, [Segment(0, w)]) for w in ({"a": 3, "b": 1}, {"b": 1, "a": 3}))
        assert (first.take(np.arange(50)) == second.take(np.arange(50))).all()

    def test_a_new_blend_continues_each_source(self) -> None:
        segments = [Segment(0, {"a": 3, "b": 1}), Segment(20, {"a": 1, "b": 1}), Segment(30, {"b": 1})]
        parts = [
            Blend(SOURCES, segments[: n + 1]).take(np.arange(first, last))[:, 0]
            for n, (first, last) in enumerate(pairwise([0, 20, 30, 35]))
        ]
        taken = np.concatenate(parts)
        assert taken[taken < 1000].tolist() == list(range(20))
        assert taken[taken >= 1000].tolist() == list(range(1000, 1015))
        assert Blend(SOURCES, segments).epochs(35) == {"b": 15 / 25}

    @given(
        history=st.lists(
            st.tuples(
                st.integers(1, 70), st.dictionaries(st.sampled_from("abc"), st.integers(1, 9), min_size=1)
            ),
            min_size=1,
            max_size=5,
        )
    )
    def test_no_sample_of_a_source_is_skipped_or_repeated(
        self, history: list[tuple[int, dict[str, int]]]
    ) -> None:
        sources = {name: samples_of(1000 * n, 999) for n, name in enumerate("abc")}
        segments: list[Segment] = []
        start, taken = 0, []
        for samples, chosen in history:
            segments.append(Segment(start, dict(chosen)))
            taken += Blend(sources, segments).take(np.arange(start, start + samples))[:, 0].tolist()
            start += samples
        for n in range(3):
            source = [token for token in taken if token // 1000 == n]
            assert source == list(range(1000 * n, 1000 * n + len(source)))

    def test_a_single_source_keeps_its_order(self) -> None:
        samples = samples_of(0, 50, seed=3)
        blend = Blend({"": samples}, [Segment(0, {"": 1.0})])
        assert (blend.take(np.arange(99)) == samples.take(np.arange(99))).all()
