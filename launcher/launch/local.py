"""Starts the ranks of this machine and outlives them all."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

from launcher.config.errors import ConfigError
from launcher.launch.orphans import no_grandchildren_left
from launcher.launch.rank import COORDINATED, END, STOP, STOPPED, Failure, rank_main

_POLL = 0.1
_SETTLING = 0.3  # after a failure: another rank's may have come first
_SETTLING_SECONDARY = 3.0  # after nothing but lost connections: the cause may still be in its clean-up
_LOG_LINES = 40  # faulthandler begins with where it crashed, which must not be cut off
_LOG_TAIL = 16384  # bytes


class RankFailure(Exception):
    """The rank that failed first, and what it had to say; `secondary` where another's failure came before."""

    def __init__(self, rank: int, world_size: int, detail: str, *, secondary: bool = False) -> None:
        self.rank, self.world_size, self.detail, self.secondary = rank, world_size, detail, secondary
        super().__init__(f"rank {rank} of {world_size} {detail}")


class Stopped(SystemExit):
    """This process was told to stop by SIGTERM, SIGHUP or SIGUSR1, and all ranks have ended."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        self.exit_code = 128 + number
        super().__init__(self.exit_code)


def run_local_ranks(
    target: Callable[[int], None],
    world_size: int,
    *,
    log_dir: Path,
    start_method: Literal["fork", "spawn"],
    here: range | None = None,
    failure_grace: float = 3.0,
    stop_grace: float = 5.0,
    save_grace: float = 0.0,
) -> None:
    """Run `target(rank)` in a process per rank; return once all have succeeded. Main thread only.

    `here` are the ranks of this machine; None: all `world_size`. Rank 0 keeps the terminal, rank N writes
    to `log_dir/rank_N.log`. When a rank fails, the others get
    END, which raises SystemExit in them, and SIGKILL after the grace. When this process is told to stop,
    all get STOP first, and `save_grace` seconds to end by themselves (see StopRequest); a Ctrl-C meanwhile
    kills at once. On Linux the ranks' own children end as well, and the ranks end even if
    this process is killed. Ranks share its process group, so that Ctrl-Z suspends them all.

    Raises:
        RankFailure: a rank raised, exited with a code other than 0, or was killed; of several, the first.
        ConfigError: that of the rank that failed first.
        KeyboardInterrupt: on Ctrl-C, once every rank has ended.
        Stopped: on SIGTERM (code 143), SIGHUP (129) and SIGUSR1 (138), once every rank has ended; also where
            every rank stopped by itself, told by another machine's. What a rank raised while it was being
            stopped is the `__cause__` of either.
        OSError: log_dir cannot be made, or a process cannot be started.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    if start_method == "spawn":
        resource_tracker.ensure_running()  # or starting rank 0 does, and unblocks signals (see _start)
    ranks: list[_Rank] = []
    with _recorded_stops() as stops, no_grandchildren_left(patience=failure_grace):
        try:
            _start(ranks, target, here or range(world_size), log_dir, start_method)
            failure = _watch(ranks, stops)
            by_themselves = all(rank.process.exitcode == STOPPED for rank in ranks)
        finally:
            if stops and save_grace:
                _let_save(ranks, save_grace, stops)
            _end(ranks, stop_grace if stops else failure_grace, stops)
    if stops and (failure is None or failure.secondary):
        # What a rank raised on its way out does not hide the stop, nor is it lost.
        late = _first(ranks)
        stop = KeyboardInterrupt() if stops[0] == signal.SIGINT else Stopped(stops[0])
        raise stop from (_as_error(late, world_size) if late else None)
    if by_themselves:
        raise Stopped(signal.SIGTERM)
    if failure is not None:
        raise _as_error(failure, world_size)


@dataclass
class _Rank:
    number: int
    process: BaseProcess
    failures: Connection
    log: Path | None
    log_start: int  # earlier runs may have written to the same log
    failure: Failure | None = None


def _start(
    ranks: list[_Rank],
    target: Callable[[int], None],
    here: range,
    log_dir: Path,
    start_method: Literal["fork", "spawn"],
) -> None:
    """Append each rank as it starts: if a later one cannot, the caller still ends those before it."""
    context: ForkContext | SpawnContext = ForkContext() if start_method == "fork" else SpawnContext()
    # A rank must not see a signal before it has its own handlers: until then it has this process's.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, COORDINATED | {END})
    try:
        for number in here:
            log = log_dir / f"rank_{number}.log" if number else None
            log_start = log.stat().st_size if log and log.exists() else 0
            failures, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=rank_main, args=(target, number, log, os.getpid(), sender), name=f"rank {number}"
            )
            process.start()
            sender.close()
            ranks.append(_Rank(number, process, failures, log, log_start))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _watch(ranks: list[_Rank], stops: list[int]) -> Failure | None:
    """Wait until all ranks have ended, one has failed or a stop is asked for; return the first failure."""
    noticed: float | None = None
    while True:
        ended = [rank for rank in ranks if rank.process.exitcode is not None]
        _listen(ranks)  # after looking who has ended: what they sent before they did is then here
        for rank in ended:
            rank.failure = rank.failure or _failure_of_exit(rank)
        first = _first(ranks)
        if first is not None:
            noticed = noticed or time.monotonic()
            if time.monotonic() - noticed >= (_SETTLING_SECONDARY if first.secondary else _SETTLING):
                return first
        if stops or len(ended) == len(ranks):
            return first
        _pause(ranks)


def _let_save(ranks: list[_Rank], grace: float, stops: list[int]) -> None:
    """Ask all to stop, and wait for it until the grace is over or somebody asks again."""
    at_once = " (Ctrl-C: at once)" if sys.stdin is not None and sys.stdin.isatty() else ""
    print(f"launcher: stopping once the step in hand is saved{at_once}", file=sys.stderr, flush=True)
    _signal(ranks, STOP)
    deadline = time.monotonic() + grace
    while _running(ranks) and time.monotonic() < deadline and signal.SIGINT not in stops[1:]:
        _pause(ranks)
        _listen(ranks)


def _end(ranks: list[_Rank], grace: float, stops: list[int]) -> None:
    """Leave no rank: END, `grace` seconds, SIGKILL; a Ctrl-C after what led here kills at once."""
    answered = min(len(stops), 1)
    _signal(ranks, END)
    deadline = time.monotonic() + grace
    while _running(ranks) and time.monotonic() < deadline and signal.SIGINT not in stops[answered:]:
        _pause(ranks)
        _listen(ranks)
    for rank in ranks:
        rank.process.kill()
        rank.process.join()
    _listen(ranks)


def _signal(ranks: list[_Rank], number: int) -> None:
    for rank in _running(ranks):
        assert rank.process.pid is not None
        os.kill(rank.process.pid, number)  # a zombie at worst: whoever has ended is not yet waited for


def _running(ranks: list[_Rank]) -> list[_Rank]:
    return [rank for rank in ranks if rank.process.exitcode is None]


def _pause(ranks: list[_Rank]) -> None:
    """Wait for news from the ranks, but only a moment.

    A sentinel stays silent while a forked child of a dead rank holds it open, and signals end no wait.
    """
    news: list[Connection | int] = [rank.process.sentinel for rank in _running(ranks)]
    wait(news + [rank.failures for rank in ranks if not rank.failures.closed], timeout=_POLL)


def _listen(ranks: list[_Rank]) -> None:
    for rank in ranks:
        if not rank.failures.closed and rank.failures.poll():
            with suppress(EOFError, OSError):  # it ended without a word, or was killed in the middle of one
                rank.failure = rank.failures.recv()
            rank.failures.close()


def _first(ranks: list[_Rank]) -> Failure | None:
    failures = [rank.failure for rank in ranks if rank.failure is not None]
    return min(failures, key=lambda failure: (failure.secondary, failure.when), default=None)


def _failure_of_exit(rank: _Rank) -> Failure | None:
    """Of a rank that has ended and reported nothing; None where it succeeded."""
    code = rank.process.exitcode
    if not code:
        return None
    if code < 0:
        name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
        detail = f"was killed by {name}" + (" (out of memory? see dmesg)" if name == "SIGKILL" else "")
    else:
        detail = f"exited with code {code}" + (" (stopped by SIGTERM)" if code == STOPPED else "")
    return Failure(rank.number, time.monotonic(), code == STOPPED, detail + _end_of_log(rank))


def _end_of_log(rank: _Rank) -> str:
    if rank.log is None or not rank.log.exists():
        return ""
    with rank.log.open("rb") as log:
        log.seek(max(rank.log_start, log.seek(0, os.SEEK_END) - _LOG_TAIL))
        lines = log.read().decode(errors="replace").splitlines()[-_LOG_LINES:]
    return "\n".join(["", f"the end of {rank.log}:", *lines]) if lines else ""


def _as_error(failure: Failure, world_size: int) -> RankFailure | ConfigError:
    if failure.refusal is not None:
        return ConfigError(*failure.refusal)
    return RankFailure(failure.rank, world_size, failure.detail, secondary=failure.secondary)


@contextmanager
def _recorded_stops() -> Iterator[list[int]]:
    """Collect the signals that ask for a stop, in order, instead of being interrupted by them."""
    stops: list[int] = []
    previous = {number: signal.getsignal(number) for number in COORDINATED}
    # nohup and scripts that start jobs in the background have some ignored on purpose; None is not Python's.
    ours = [number for number, handler in previous.items() if handler not in (signal.SIG_IGN, None)]
    for number in ours:
        signal.signal(number, lambda received, _: stops.append(received))
    try:
        yield stops
    finally:
        for number in ours:
            signal.signal(number, previous[number])
