"""Prefetching: threads read the batches of the next steps while the current step computes."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt

from launcher.config.sequence_order import Part
from launcher.data.sampler import MicroBatch, Source

# Maps the samples consumed to the sample indices (A, B) of the next step: A accumulation, B micro-batch.
StepIndices = Callable[[int], npt.NDArray[np.int64]]

# The samples consumed before a step, a call that counts its labels, and a call per micro-batch; each call
# reads, or waits for the thread that reads.
_PendingStep = tuple[int, Callable[[], int], list[Callable[[], MicroBatch]]]


class Loader:
    """Reads the micro-batches of one data rank, or a context rank's part of them, step by step.

    The threads end when the context exits.

    The samples of a step depend on `consumed` alone, not on the number of threads or of prefetched steps.
    """

    def __init__(
        self,
        source: Source,
        indices: StepIndices,
        *,
        global_batch_size: int,
        threads: int,
        ahead: int,
        part: Part | None = None,
    ) -> None:
        """Prefetch `ahead` steps with `threads` threads; with 0 threads, read in step() itself."""
        self._source, self._indices, self._size, self._ahead = source, indices, global_batch_size, ahead
        self._part = part
        self._pool = ThreadPoolExecutor(threads, "data") if threads else None
        self._steps: deque[_PendingStep] = deque()
        self.waited = 0.0  # seconds that the last step() waited for its batches
        # Labels of the last step() that count, over all data ranks; None before the first step()
        self.labels: int | None = None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def step(self, consumed: int) -> list[MicroBatch]:
        """Return the A micro-batches of the step after `consumed` samples; reading may raise ConfigError."""
        if not self._steps or self._steps[0][0] != consumed:
            self._steps = deque([self._begin(consumed)])
        _, count, reads = self._steps.popleft()
        while self._pool is not None and len(self._steps) < self._ahead:
            self._steps.append(self._begin(consumed + (len(self._steps) + 1) * self._size))
        started = time.perf_counter()
        batches = [read() for read in reads]
        self.labels = count()
        self.waited = time.perf_counter() - started
        return batches

    def _begin(self, consumed: int) -> _PendingStep:
        take, micro_batches = self._source.take, self._indices(consumed)
        # Of the whole global batch: the masks are read again here instead of communicated in each step.
        count = partial(self._source.count_labels, np.arange(consumed, consumed + self._size))
        reads: list[Callable[[], MicroBatch]] = [
            partial(take, indices, self._part) for indices in micro_batches
        ]
        if self._pool is None:
            return consumed, count, reads
        return consumed, self._pool.submit(count).result, [self._pool.submit(read).result for read in reads]
