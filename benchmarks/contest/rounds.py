"""Run the contestants of a class in alternating turns."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from benchmarks.contest.job import Job
from benchmarks.contest.ranks import ContestantFailed, Ranks
from benchmarks.contest.results import Measured

_OF_OPERATORS = 20  # steps in which operators are timed
_WARM_UP = 2  # steps after the first, which makes the optimizer's states; their losses are compared too
_MOST_STEPS = 20

T = TypeVar("T")
Report = Callable[[ContestantFailed], None]


@dataclass(frozen=True)
class Timing:
    """How long a class is timed: rounds until `deadline`, but at least and at most so many."""

    deadline: float  # time.monotonic()
    least_rounds: int
    most_rounds: int
    turn_s: float  # a turn has as many of our steps as fit
    settling: int  # steps at the start of a turn that are not timed

    def goes_on(self, rounds: int) -> bool:
        enough = rounds >= self.least_rounds and time.monotonic() >= self.deadline
        return not enough and rounds < self.most_rounds


def measure_memory(job: Job, threads: int) -> int:
    """Return the peak bytes of tensors of the fullest rank in a few steps, in ranks of their own."""
    with running(replace(job, counts_memory=True), threads) as ranks:
        ranks.first_step()
        ranks.turn(_WARM_UP)
        return max(reply["peak_bytes"] for reply in ranks.end())


def measure_operators(job: Job, threads: int) -> dict[str, float]:
    """Return milliseconds per step by operator on rank 0, in ranks of their own."""
    with running(replace(job, times_operators=True), threads) as ranks:
        ranks.first_step()
        ranks.turn(_OF_OPERATORS)
        times: dict[str, float] = ranks.end()[0]["operators"]
    return times


def measure_times(
    jobs: list[Job],
    threads: int,
    timing: Timing,
    *,
    resident: bool,
    failed: Report,
) -> list[Measured]:
    """Time the contestants in rounds; the first job is ours. A peer that fails is reported and left out."""
    return (_resident if resident else _restarted)(jobs, threads, timing, failed)


def _resident(jobs: list[Job], threads: int, timing: Timing, failed: Report) -> list[Measured]:
    """Time contestants that all stay alive, and sleep while another has its turn."""
    measured = [Measured(job.label) for job in jobs]
    with ExitStack() as stack:
        alive: list[tuple[Ranks, Measured]] = []
        for job, result in zip(jobs, measured, strict=True):
            try:
                ranks = stack.enter_context(running(job, threads))
                _start(ranks, result)
                alive.append((ranks, result))
            except ContestantFailed as error:
                _leave_out(result, error, failed, is_ours=job is jobs[0])
        steps = _steps_per_turn(alive[0][1], timing)
        number = 0
        while timing.goes_on(number):
            for ranks, result in _rotated(alive, number):
                try:
                    result.add(ranks.turn(steps, settling=timing.settling))
                except ContestantFailed as error:
                    _leave_out(result, error, failed, is_ours=result is measured[0])
            alive = [(ranks, result) for ranks, result in alive if not result.failed]
            number += 1
        for ranks, _ in alive:
            ranks.end()
    return measured


def _restarted(jobs: list[Job], threads: int, timing: Timing, failed: Report) -> list[Measured]:
    """Each turn starts the contestant anew: they do not fit the memory of one GPU together."""
    measured, number, steps = [Measured(job.label) for job in jobs], 0, 0
    while timing.goes_on(number):
        for job, result in _rotated(list(zip(jobs, measured, strict=True)), number):
            if result.failed:
                continue
            try:
                with running(job, threads) as ranks:
                    _start(ranks, result)
                    steps = steps or _steps_per_turn(result, timing)
                    result.add(ranks.turn(steps, settling=timing.settling))
                    ranks.end()
            except ContestantFailed as error:
                _leave_out(result, error, failed, is_ours=job is jobs[0])
        number += 1
    return measured


def _start(ranks: Ranks, result: Measured) -> None:
    first, seconds = ranks.first_step()
    warm = ranks.turn(_WARM_UP)
    result.first_step_s = min(seconds, result.first_step_s or seconds)
    result.losses, result.warm_s = [*first.losses, *warm.losses], warm.seconds
    result.peak_bytes = warm.peak_bytes


def _leave_out(result: Measured, error: ContestantFailed, failed: Report, *, is_ours: bool) -> None:
    if is_ours:
        raise error
    result.failed = str(error)
    failed(error)


def _steps_per_turn(result: Measured, timing: Timing) -> int:
    return max(1, min(_MOST_STEPS, round(timing.turn_s / result.warm_s)))


def _rotated(items: list[T], number: int) -> list[T]:
    """Return the items from another first item in each round, so that none always follows the same."""
    first = number % len(items)
    return items[first:] + items[:first]


@contextmanager
def running(job: Job, threads: int) -> Iterator[Ranks]:
    with TemporaryDirectory(prefix="benchmark-") as folder:
        ranks = Ranks(job, Path(folder), threads)
        try:
            yield ranks
        finally:
            ranks.kill()
