"""Measure where a rank spends its time: every call of torch.distributed is timed under its group's name."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch.distributed as dist
from torch.profiler import record_function

# Not isend and irecv: torch compares the functions of a P2POp with its own.
TIMED = (
    "all_reduce",
    "all_reduce_coalesced",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_gather",
    "reduce_scatter",
    "reduce",
    "all_to_all_single",
    "send",
    "recv",
    "batch_isend_irecv",
    "broadcast",
    "barrier",
    "all_gather_object",
    "broadcast_object_list",
)


class Stopwatch:
    """Seconds by name since `restart`: waiting for collectives, and calls wrapped by `timed`."""

    def __init__(self, group_name: Callable[[dist.ProcessGroup | None], str]) -> None:
        self.seconds: dict[str, float] = {}
        # While a profiler records: the label of a call in the trace, by function and group.
        self.label: Callable[[str, dist.ProcessGroup | None], str] | None = None
        self._group_name = group_name
        self._depth = 0  # collectives call one another

    def restart(self) -> None:
        self.seconds.clear()

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def mark(self) -> Any:
        """Return the present moment, for `add_since`."""
        return time.perf_counter()

    def add_since(self, mark: Any, name: str) -> None:
        self.add(name, time.perf_counter() - mark)

    @contextmanager
    def timing_collectives(self) -> Iterator[None]:
        """Time torch.distributed while entered. DeepSpeed copies some functions: enter before its init."""
        originals = {name: getattr(dist, name) for name in TIMED}
        for name, function in originals.items():
            setattr(dist, name, self._timed_collective(function))
        try:
            yield
        finally:
            for name, function in originals.items():
                setattr(dist, name, function)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with its time counted under `name`, without the collectives inside it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            before = sum(self.seconds.values())
            started = time.perf_counter()
            result = function(*args, **kwargs)
            elapsed = time.perf_counter() - started
            self.add(name, elapsed - (sum(self.seconds.values()) - before))
            return result

        return call

    def _timed_collective(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._depth:
                return function(*args, **kwargs)
            self._depth += 1
            started = self.mark()
            group = kwargs.get("group") or _group_among(args)
            label = self.label and self.label(function.__name__, group)
            try:
                with recorded(label):
                    result = function(*args, **kwargs)
            finally:
                self._depth -= 1
            name = self._group_name(group)
            self.add_since(started, name)
            if isinstance(result, list):
                return [_TimedWork(work, self, name, label) for work in result]
            # A dist.Work, or the torch._C.Future of all_reduce_coalesced.
            return _TimedWork(result, self, name, label) if hasattr(result, "wait") else result

        return call


def _group_among(arguments: tuple[Any, ...]) -> dist.ProcessGroup | None:
    """Return the group in the arguments of a collective, or of the first operation of a batch of sends."""
    for argument in arguments:
        if isinstance(argument, dist.ProcessGroup):
            return argument
        if isinstance(argument, list) and argument and isinstance(argument[0], dist.P2POp):
            group: dist.ProcessGroup | None = argument[0].group
            return group
    return None


def recorded(label: str | None) -> AbstractContextManager[object]:
    """Return a context that a profiler shows as `label`; nothing without a label."""
    return nullcontext() if label is None else record_function(label)


class _TimedWork:
    """The handle of an asynchronous collective; waiting for it is timed too."""

    def __init__(self, work: Any, stopwatch: Stopwatch, name: str, label: str | None) -> None:
        self._work, self._stopwatch, self._name, self._label = work, stopwatch, name, label

    def wait(self, *args: Any) -> Any:
        started = self._stopwatch.mark()
        with recorded(self._label):
            result = self._work.wait(*args)
        self._stopwatch.add_since(started, self._name)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
