"""Reading ahead: the batches of the next steps are prepared by threads while this one computes."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import numpy as np
import numpy.typing as npt

from launcher.data.sampler import MicroBatch, Source

Indices = Callable[[int], npt.NDArray[np.int64]]  # samples consumed -> those of the next step (A, B)


@dataclass
class _Step:
    consumed: int
    batches: Sequence[Callable[[], MicroBatch]]  # in order, to wait for or to read


class Loader:
    """The micro-batches of one data rank, step by step. A context: its threads end with it.

    What a step reads depends on `consumed` alone, not on threads or on how far ahead they are.
    """

    def __init__(
        self, source: Source, indices: Indices, *, global_batch_size: int, threads: int, ahead: int
    ) -> None:
        """With no threads a step's batches are read when it asks for them."""
        self._source, self._indices, self._size, self._ahead = source, indices, global_batch_size, ahead
        self._pool = ThreadPoolExecutor(threads, "data") if threads else None
        self._steps: deque[_Step] = deque()
        self.waited = 0.0  # seconds, for the last step's batches

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def step(self, consumed: int) -> list[MicroBatch]:
        """The A micro-batches of the step after `consumed` samples. Raises what reading them raises."""
        if not self._steps or self._steps[0].consumed != consumed:
            self._steps = deque([self._begin(consumed)])
        current = self._steps.popleft()
        while self._pool is not None and len(self._steps) < self._ahead:
            self._steps.append(self._begin(consumed + (len(self._steps) + 1) * self._size))
        started = time.perf_counter()
        batches = [batch() for batch in current.batches]
        self.waited = time.perf_counter() - started
        return batches

    def _begin(self, consumed: int) -> _Step:
        wanted = self._indices(consumed)
        if self._pool is None:
            return _Step(consumed, [partial(self._source.take, one) for one in wanted])
        futures: list[Future[MicroBatch]] = [self._pool.submit(self._source.take, one) for one in wanted]
        return _Step(consumed, [future.result for future in futures])
