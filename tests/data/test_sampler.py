"""The order of samples does not depend on the layout or on where a run stops and resumes."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.sampler import Samples, permute, sample_indices
from launcher.data.windows import Stretch, Windows


@dataclass(frozen=True)
class Layout:
    """A way to divide a global batch among data ranks and micro-batches."""

    data_size: int
    micro_batch_size: int


def layouts_of(global_batch_size: int) -> list[Layout]:
    return [
        Layout(data_size, micro)
        for data_size in range(1, global_batch_size + 1)
        for micro in range(1, global_batch_size // data_size + 1)
        if global_batch_size % (data_size * micro) == 0
    ]


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, Layout]]]:
    """Draw (samples consumed before, global batch size, segments); a segment is (steps, layout)."""
    global_batch_size = draw(st.integers(1, 24))
    segment = st.tuples(st.integers(1, 3), st.sampled_from(layouts_of(global_batch_size)))
    return draw(st.integers(0, 10_000)), global_batch_size, draw(st.lists(segment, min_size=1, max_size=4))


def order(size: int, seed: int = 0, epoch: int = 0) -> list[int]:
    return [int(window) for window in permute(np.arange(size), size, seed=seed, epoch=epoch)]


def ramp(windows: int, sequence_length: int, shuffle_seed: int | None) -> Samples:
    """Return samples over the tokens 0, 1, 2, ...; a token's value is its position."""
    return token_samples(np.arange(windows * sequence_length + 1), sequence_length, shuffle_seed)


def token_samples(
    tokens: npt.NDArray[np.integer[Any]], sequence_length: int, shuffle_seed: int | None
) -> Samples:
    return Samples(Windows([Stretch(tokens)], sequence_length), shuffle_seed)


class TestPermutation:
    @given(size=st.integers(1, 5000), seed=st.integers(), epoch=st.integers(0, 2**40))
    def test_is_a_bijection(self, size: int, seed: int, epoch: int) -> None:
        assert sorted(order(size, seed, epoch)) == list(range(size))

    def test_is_a_bijection_of_every_small_size(self) -> None:
        for size in range(1, 300):
            assert sorted(order(size, seed=size)) == list(range(size)), size

    @given(size=st.integers(1, 2**62), seed=st.integers(), data=st.data())
    @settings(max_examples=50)
    def test_needs_no_table(self, size: int, seed: int, data: st.DataObject) -> None:
        positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
        windows = permute(np.array(positions), size, seed=seed, epoch=0)
        assert windows.min() >= 0
        assert windows.max() < size
        assert len(set(windows.tolist())) == len(positions)
        alone = [permute(np.array([position]), size, seed=seed, epoch=0).item() for position in positions]
        assert windows.tolist() == alone

    @given(
        size=st.integers(50, 2000),
        first=st.tuples(st.integers(-5, 5), st.integers(0, 5)),
        second=st.tuples(st.integers(-5, 5), st.integers(0, 5)),
    )
    def test_differs_between_seeds_and_epochs(
        self, size: int, first: tuple[int, int], second: tuple[int, int]
    ) -> None:
        same_places = np.mean(np.array(order(size, *first)) == np.array(order(size, *second)))
        assert (same_places == 1) if first == second else (same_places < 0.2)

    def test_the_digits_of_seed_and_epoch_are_not_joined(self) -> None:
        assert order(100, seed=1, epoch=11) != order(100, seed=11, epoch=1)
        assert order(100, seed=1, epoch=11) != order(100, seed=111, epoch=1)

    def test_all_orders_of_four_are_equally_likely(self) -> None:
        draws, orders = 4800, 24
        counts = Counter(tuple(order(4, seed=3, epoch=epoch)) for epoch in range(draws))
        chi_squared = sum((count - draws / orders) ** 2 / (draws / orders) for count in counts.values())
        assert len(counts) == orders
        assert chi_squared < 50  # 23 degrees of freedom: exceeded once in a thousand seeds

    def test_scatters_neighbours(self) -> None:
        steps = np.diff(order(10_000, seed=1))
        # The mean distance of two uniform draws is a third of the range.
        assert np.abs(steps).mean() == pytest.approx(10_000 / 3, rel=0.05)
        assert len(np.unique(steps)) > 5_000

    def test_never_changes(self) -> None:
        # Recorded values: if they change, the data of every existing run change when it resumes.
        assert order(1) == [0]
        assert order(10, seed=1234) == [2, 9, 3, 1, 5, 8, 0, 7, 4, 6]
        assert order(10, seed=1234, epoch=1) == [8, 3, 0, 2, 4, 9, 7, 5, 6, 1]
        assert order(1000, seed=-7, epoch=3)[:8] == [788, 409, 683, 316, 537, 184, 709, 230]
        large = permute(np.array([0, 1, 10**12]), 10**15 + 37, seed=2**70, epoch=9)
        assert large.tolist() == [134643035035938, 278898415346215, 397185342248937]


class TestSamples:
    @given(tokens=st.integers(2, 400), sequence_length=st.integers(1, 50), seed=st.none() | st.integers())
    def test_an_epoch_covers_every_window_once(
        self, tokens: int, sequence_length: int, seed: int | None
    ) -> None:
        if tokens <= sequence_length:
            return
        samples = token_samples(np.arange(tokens), sequence_length, seed)
        epoch = samples.take(np.arange(len(samples)))
        assert epoch.shape == ((tokens - 1) // sequence_length, sequence_length + 1)
        assert (np.diff(epoch, axis=1) == 1).all()
        assert sorted(epoch[:, 0].tolist()) == list(range(0, tokens - sequence_length, sequence_length))

    def test_without_a_seed_every_epoch_has_the_same_order(self) -> None:
        samples = ramp(windows=3, sequence_length=4, shuffle_seed=None)
        assert samples.places(np.arange(7)).tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert samples.take(np.array([4])).tolist() == [[4, 5, 6, 7, 8]]

    @pytest.mark.parametrize("seed", [0, 5])
    def test_each_epoch_has_a_different_order(self, seed: int) -> None:
        samples = ramp(windows=50, sequence_length=2, shuffle_seed=seed)
        windows = samples.places(np.arange(200)).reshape(4, 50)
        assert windows.tolist() == [order(50, seed, epoch) for epoch in range(4)]

    def test_indices_of_several_epochs_in_any_order(self) -> None:
        samples = ramp(windows=7, sequence_length=2, shuffle_seed=5)
        places = samples.places(np.arange(70))
        mixed = np.random.default_rng(0).permutation(70)
        assert samples.places(mixed).tolist() == places[mixed].tolist()

    def test_bytes_become_int64(self) -> None:
        taken = token_samples(np.array([250, 251, 252, 253, 254], np.uint8), 2, None).take(np.arange(2))
        assert taken.dtype == np.int64
        assert taken.tolist() == [[250, 251, 252], [252, 253, 254]]

    def test_tokens_for_exactly_one_window_are_enough(self) -> None:
        assert len(token_samples(np.zeros(9, np.uint8), 8, 0)) == 1
        assert len(token_samples(np.zeros(16, np.uint8), 8, 0)) == 1
        assert len(token_samples(np.zeros(17, np.uint8), 8, 0)) == 2


class TestSampleIndices:
    @given(runs())
    def test_no_sample_is_skipped_or_repeated_across_layouts(
        self, run: tuple[int, int, list[tuple[int, Layout]]]
    ) -> None:
        start, global_batch_size, segments = run
        consumed = start
        for steps, layout in segments:
            for _ in range(steps):
                batch = list(self.global_batch(consumed, global_batch_size, layout))
                assert batch == list(range(consumed, consumed + global_batch_size))
                consumed += global_batch_size

    @staticmethod
    def global_batch(consumed: int, global_batch_size: int, layout: Layout) -> Iterator[int]:
        """Yield the samples of a step: first pass of rank 0, first pass of rank 1, ..., second pass."""
        ranks = [
            sample_indices(
                samples_consumed=consumed,
                global_batch_size=global_batch_size,
                micro_batch_size=layout.micro_batch_size,
                data_rank=rank,
                data_size=layout.data_size,
            )
            for rank in range(layout.data_size)
        ]
        accumulation = global_batch_size // (layout.micro_batch_size * layout.data_size)
        for indices in ranks:
            assert indices.shape == (accumulation, layout.micro_batch_size)
            assert indices.dtype == np.int64
        for micro_batches in zip(*ranks, strict=True):
            for micro_batch in micro_batches:
                yield from micro_batch.tolist()

    def test_never_changes(self) -> None:
        layout: dict[str, Any] = {"global_batch_size": 12, "micro_batch_size": 2, "data_size": 3}
        indices = [
            sample_indices(samples_consumed=100, data_rank=rank, **layout).tolist() for rank in range(3)
        ]
        assert indices == [
            [[100, 101], [106, 107]],
            [[102, 103], [108, 109]],
            [[104, 105], [110, 111]],
        ]

    @pytest.mark.parametrize("shuffle_seed", [None, 1234])
    @pytest.mark.parametrize("layout", layouts_of(12), ids=str)
    def test_the_ranks_read_the_tokens_of_these_samples(
        self, layout: Layout, shuffle_seed: int | None
    ) -> None:
        # With ten windows and batches of twelve samples, every batch crosses the end of an epoch.
        samples = ramp(windows=10, sequence_length=3, shuffle_seed=shuffle_seed)
        orders = [
            list(range(10)) if shuffle_seed is None else order(10, shuffle_seed, epoch) for epoch in range(5)
        ]
        for step in range(3):
            ranks = [
                [
                    samples.take(indices)
                    for indices in sample_indices(
                        samples_consumed=12 * step,
                        global_batch_size=12,
                        micro_batch_size=layout.micro_batch_size,
                        data_rank=rank,
                        data_size=layout.data_size,
                    )
                ]
                for rank in range(layout.data_size)
            ]
            assert all(batch.shape == (layout.micro_batch_size, 4) for rank in ranks for batch in rank)
            read = np.concatenate([batch for batches in zip(*ranks, strict=True) for batch in batches])
            windows = [orders[i // 10][i % 10] for i in range(12 * step, 12 * step + 12)]
            assert read.tolist() == [list(range(3 * window, 3 * window + 4)) for window in windows]
