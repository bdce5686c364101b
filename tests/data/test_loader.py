"""Prefetching changes when batches are read, and never which batches."""

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.blend import Blend, Segment
from launcher.data.loader import Loader
from launcher.data.sampler import Samples, Source, sample_indices
from launcher.data.windows import Stretch, Windows


def samples_of(first: int, windows: int, seed: str | None = None) -> Samples:
    return Samples(Windows([Stretch(np.arange(first, first + windows + 1))], 1), seed)


def loader_of(
    source: Source, size: int, micro: int = 1, rank: int = 0, ranks: int = 1, threads: int = 1, ahead: int = 2
) -> Loader:
    def indices(consumed: int) -> npt.NDArray[np.int64]:
        return sample_indices(
            samples_consumed=consumed,
            global_batch_size=size,
            micro_batch_size=micro,
            data_rank=rank,
            data_size=ranks,
        )

    return Loader(source, indices, global_batch_size=size, threads=threads, ahead=ahead)


@st.composite
def starts(draw: st.DrawFn) -> dict[str, Any]:
    """Draw one start of a run: its layout, batch size, loader settings and numbers of steps."""
    ranks, micro, accumulation = (draw(st.integers(1, 3)) for _ in range(3))
    return {
        "ranks": ranks, "micro": micro, "size": ranks * micro * accumulation,
        "threads": draw(st.integers(0, 3)), "ahead": draw(st.integers(1, 3)),
        "steps": draw(st.integers(1, 4)), "unsaved": draw(st.integers(0, 3)),
    }  # fmt: skip


SOURCES = {"a": samples_of(0, 40, "a"), "b": samples_of(1000, 25, "b")}
HISTORY = [Segment(0, {"a": 3, "b": 2})]


@given(st.lists(starts(), min_size=1, max_size=5))
@settings(max_examples=60)
def test_any_sequence_of_starts_reads_the_same_samples_as_one_uninterrupted_run(
    sequence: list[dict[str, Any]],
) -> None:
    """Layout, batch size, threads and prefetching change at each start. Unsaved steps are repeated."""
    source, consumed, taken = Blend(SOURCES, HISTORY), 0, []
    for start in sequence:
        layout = {name: start[name] for name in ("size", "micro", "ranks", "threads", "ahead")}
        loaders = [loader_of(source, rank=rank, **layout) for rank in range(start["ranks"])]
        for step in range(start["steps"] + start["unsaved"]):
            by_rank = [loader.step(consumed + step * start["size"]) for loader in loaders]
            if step < start["steps"]:
                taken += [batch for batches in zip(*by_rank, strict=True) for batch in batches]
        for loader in loaders:
            loader.__exit__(None, None, None)
        consumed += start["steps"] * start["size"]
    alone = Blend(SOURCES, HISTORY).take(np.arange(consumed))
    assert np.concatenate(taken).tolist() == alone.tolist()


def test_a_jump_reads_the_requested_samples() -> None:
    source = samples_of(0, 1000)
    with loader_of(source, 4) as loader:
        for consumed in (0, 4, 40, 44, 0, 400):
            [first, *_] = loader.step(consumed)
            assert first[0, 0] == consumed


def test_prefetches_while_the_step_computes() -> None:
    read: list[int] = []
    all_read = threading.Event()

    class Recorded:
        def take(self, indices: npt.NDArray[np.int64], part: None = None) -> npt.NDArray[np.int64]:
            read.append(int(indices[0]))
            if len(read) == 6:
                all_read.set()
            return indices

        def count_labels(self, indices: npt.NDArray[np.int64]) -> int:
            return int(indices.sum())

    with loader_of(Recorded(), 2, ahead=2) as loader:
        loader.step(0)
        assert all_read.wait(10)
        assert sorted(read) == [0, 1, 2, 3, 4, 5]
        assert loader.labels == 0 + 1
        loader.step(2)
        assert loader.labels == 2 + 3
        assert loader.waited < 10


@pytest.mark.parametrize("threads", [0, 2])
def test_an_exception_while_reading_is_raised_in_the_step_of_the_sample(threads: int) -> None:
    class Broken:
        def take(self, indices: npt.NDArray[np.int64], part: None = None) -> npt.NDArray[np.int64]:
            if indices[0] >= 4:
                raise ValueError("no such sample")
            return indices

        def count_labels(self, indices: npt.NDArray[np.int64]) -> int:
            return len(indices)

    with loader_of(Broken(), 2, threads=threads) as loader:
        loader.step(0)
        loader.step(2)
        with pytest.raises(ValueError, match="no such sample"):
            loader.step(4)


def test_its_threads_end_with_the_context() -> None:
    before = threading.active_count()
    with loader_of(samples_of(0, 100), 8, threads=3) as loader:
        loader.step(0)
        assert threading.active_count() > before
    assert threading.active_count() == before
