"""Where a rank's time goes: every call of torch.distributed timed and put down to its group."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

TIMED = (
    "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather", "send", "recv", "isend",
    "irecv", "batch_isend_irecv", "broadcast",
)  # fmt: skip
GroupName = Callable[[Any], str]


class Stopwatch:
    """Seconds since `restart`, by what a rank waited for; `within` puts other calls down to a name."""

    def __init__(self, group_name: GroupName) -> None:
        self.seconds: dict[str, float] = {}
        self._group_name = group_name
        self._inside = 0  # collectives call one another

    def restart(self) -> None:
        self.seconds.clear()

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @contextmanager
    def timing_collectives(self) -> Iterator[None]:
        """Before DeepSpeed is initialised, which keeps some of these functions."""
        originals = {name: getattr(dist, name) for name in TIMED}
        for name, function in originals.items():
            setattr(dist, name, self._timed(function))
        try:
            yield
        finally:
            for name, function in originals.items():
                setattr(dist, name, function)

    def within(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time put down to `name`, less that of collectives inside."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            before = sum(self.seconds.values())
            started = time.perf_counter()
            result = function(*args, **kwargs)
            elapsed = time.perf_counter() - started
            self.add(name, elapsed - (sum(self.seconds.values()) - before))
            return result

        return timed

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return function(*args, **kwargs)
            self._inside += 1
            started = time.perf_counter()
            try:
                result = function(*args, **kwargs)
            finally:
                self._inside -= 1
            group = kwargs.get("group") or next(
                (one for one in args if isinstance(one, dist.ProcessGroup)), None
            )
            name = self._group_name(group)
            self.add(name, time.perf_counter() - started)
            return _Waited(result, self, name) if isinstance(result, dist.Work) else result

        return timed


class _Waited:
    """A handle whose waiting is timed too."""

    def __init__(self, work: dist.Work, watch: Stopwatch, name: str) -> None:
        self._work, self._watch, self._name = work, watch, name

    def wait(self, *args: Any) -> Any:
        started = time.perf_counter()
        result = self._work.wait(*args)
        self._watch.add(self._name, time.perf_counter() - started)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
