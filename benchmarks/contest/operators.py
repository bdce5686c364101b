"""Time of torch's operators in a step, by torch's profiler, to see why a contestant is slower.

The profiler slows the steps, so that operators are timed in ranks of their own, which take no part in the
comparison.
"""

import time
from collections.abc import Mapping
from typing import Any

from benchmarks.contest.job import Job

MOST_ROWS = 25
OUTSIDE = "outside operators"  # Python, and waiting for other ranks


class OperatorTimes:
    """Times the operators of a rank from `begin` on. Create it in the thread that trains."""

    def __init__(self, job: Job) -> None:
        self._is_wanted, self._cuda = job.times_operators, job.device == "cuda"
        self._profile: Any = None
        self._started = 0.0

    def begin(self) -> None:
        """Begin to time; later calls have no effect."""
        if not self._is_wanted or self._profile is not None:
            return
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._profile = profile(activities=kinds)
        self._profile.start()
        self._started = time.perf_counter()

    def end(self, steps: int) -> dict[str, float] | None:
        """Return milliseconds per step by operator, each without the operators that it calls."""
        if self._profile is None:
            return None
        wall = 1e3 * (time.perf_counter() - self._started) / steps
        self._profile.stop()
        kind = "self_device_time_total" if self._cuda else "self_cpu_time_total"
        events = self._profile.key_averages()
        times = {event.key: getattr(event, kind) / 1e3 / steps for event in events}
        return {**times, OUTSIDE: wall - sum(times.values())}


def operator_table(title: str, times: Mapping[str, Mapping[str, float]]) -> str:
    """Return a Markdown table: the operators that take most, by contestant, in milliseconds per step."""
    most: dict[str, float] = {}
    for of_one in times.values():
        for name, value in of_one.items():
            most[name] = max(most.get(name, 0.0), value)
    names = sorted(most, key=lambda name: -most[name])[:MOST_ROWS]
    ones = times.values()
    rows = [
        *((name, [one.get(name, 0.0) for one in ones]) for name in names),
        ("other operators", [sum(value for name, value in one.items() if name not in names) for one in ones]),
        ("whole step", [sum(one.values()) for one in ones]),
    ]
    header = f"| {title}, ms per step of rank 0 | {' | '.join(times)} |"
    lines = [f"| {name} | {' | '.join(f'{value:.2f}' for value in values)} |" for name, values in rows]
    return "\n".join([header, "|---" * (len(times) + 1) + "|", *lines])
