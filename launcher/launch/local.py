"""Start the ranks of this machine, watch them, and end them all before returning."""

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
from types import FrameType
from typing import Literal

from launcher.config.errors import ConfigError
from launcher.config.secrets import variables_read, without_values
from launcher.launch.memory_kills import memory_kills
from launcher.launch.orphans import no_grandchildren_left
from launcher.launch.rank import (
    COORDINATED,
    END_SIGNAL,
    EXCEPTION,
    STOP_SIGNAL,
    STOPPED_EXIT_CODE,
    FailureReport,
    rank_main,
)
from launcher.text import duration

SAVING = "saving the current step, then stopping (a second Ctrl-C stops at once and does not save)"
_POLL = 0.1
_SETTLING = 0.3  # seconds to wait after a failure: another rank may have failed before
# Seconds to wait while all failures are lost connections: the rank that caused them may still be cleaning up.
_SETTLING_SECONDARY = 3.0
_LOG_LINES = 40  # enough for faulthandler's output, whose first lines say where the rank crashed
_LOG_TAIL = 16384  # bytes
# Seconds after a stop signal in which a Ctrl-C is the same stop: a wrapper may forward the Ctrl-C that the
# terminal sent to all of its processes.
AGAIN = 1.0


class RankFailure(Exception):
    """Raised for the first failed rank; `secondary` if it probably only lost a rank that ended before.

    `stopping` if a stop signal arrived too, `out_of_memory` if the kernel killed the rank for its memory, and
    `halted` if a guard of the run ended it.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        detail: str,
        *,
        secondary: bool = False,
        stopping: bool = False,
        out_of_memory: bool = False,
        halted: bool = False,
    ) -> None:
        self.rank, self.world_size, self.secondary = rank, world_size, secondary
        self.detail = without_values(detail)
        self.stopping, self.out_of_memory, self.halted = stopping, out_of_memory, halted
        super().__init__(f"rank {rank} of {world_size} {self.detail}")

    def with_advice(self, remedy: str) -> "RankFailure":
        first, *others = self.detail.split("\n", 1)
        detail = "\n".join([first, f"  try: {remedy}", *others])
        return RankFailure(self.rank, self.world_size, detail, stopping=self.stopping, out_of_memory=True)

    @property
    def reason(self) -> str:
        """The failure in one line: the last line of a traceback, or the first line of another text."""
        lines = str(self).splitlines()
        return f"{lines[0]} {lines[-1]}" if self.detail.startswith(EXCEPTION) else lines[0]


class Stopped(SystemExit):
    """Raised once all ranks have ended after SIGTERM, SIGHUP or SIGUSR1; `number` is the signal's number."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        self.exit_code = 128 + number
        super().__init__(self.exit_code)


def start_method_for(device: str) -> Literal["fork", "spawn"]:
    """Return "fork" for CPU ranks, which then share their imports; CUDA cannot be forked safely."""
    return "fork" if device == "cpu" else "spawn"


def run_local_ranks(
    target: Callable[[int], None],
    world_size: int,
    *,
    log_dir: Path,
    start_method: Literal["fork", "spawn"],
    local_ranks: range | None = None,
    failure_grace: float = 3.0,
    stop_grace: float = 5.0,
    save_grace: float = 0.0,
    stopped_limit: float = 600.0,
) -> None:
    """Run `target(rank)` in one process per rank; return once all have succeeded. Main thread only.

    `local_ranks` are the ranks to start here; None: all `world_size`. Rank 0 keeps the terminal, rank N
    writes to `log_dir/rank_N.log`. If a rank fails, the others get END_SIGNAL, which raises SystemExit in
    them, and SIGKILL after `failure_grace` seconds. If this process gets a stop signal, the ranks first get
    STOP_SIGNAL and `save_grace` seconds to end by themselves (see StopRequest), then END_SIGNAL and
    `stop_grace` seconds; a Ctrl-C at least AGAIN seconds later kills them at once. Ranks that are all stopped
    by SIGSTOP have nobody who notices it: after `stopped_limit` seconds they fail. On Linux the children of
    ranks end as well, and all ranks end even if this process is killed. Ranks share this process group:
    Ctrl-Z suspends them all.

    Raises:
        RankFailure: a rank raised, exited with a non-zero code or was killed; the first, if several did.
        ConfigError: raised by the rank that failed first; or log_dir cannot be created.
        KeyboardInterrupt: after Ctrl-C, once every rank has ended.
        Stopped: after SIGTERM (code 143), SIGHUP (129) or SIGUSR1 (138), once all ranks have ended; if all
            ranks stopped by themselves, for a rank of another node. `__cause__` is a failure during the stop.
        OSError: a process cannot be started.
    """
    _prepare(log_dir, start_method)
    ranks, kills_before = list[_Rank](), memory_kills()
    with _recorded_stops() as stops, no_grandchildren_left(patience=failure_grace):
        try:
            _start(ranks, target, local_ranks or range(world_size), log_dir, start_method)
            failure = _watch(ranks, stops, kills_before, stopped_limit)
            all_stopped_themselves = all(rank.process.exitcode == STOPPED_EXIT_CODE for rank in ranks)
        finally:
            if stops and save_grace:
                _save_and_stop(ranks, save_grace, stops)
            _end(ranks, stop_grace if stops else failure_grace, stops)
    if stops and (failure is None or failure.secondary):
        raise _stop(stops[0]) from _failure_during_stop(ranks, world_size)
    if all_stopped_themselves:
        raise Stopped(signal.SIGTERM)
    if failure is not None:
        raise _as_error(failure, world_size, stopping=bool(stops))


def _prepare(log_dir: Path, start_method: str) -> None:
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"the logs of the ranks cannot be written there: {error.strerror}"
        remedy = "a run.dir you may write to; a command without run.dir writes to TMPDIR"
        raise ConfigError(str(log_dir), None, why, remedy) from None
    if start_method == "spawn":
        # Here, because the start of rank 0 would do it and unblock the signals that _start blocks.
        resource_tracker.ensure_running()


def _stop(number: int) -> KeyboardInterrupt | Stopped:
    return KeyboardInterrupt() if number == signal.SIGINT else Stopped(number)


def _failure_during_stop(ranks: "list[_Rank]", world_size: int) -> BaseException | None:
    failed = _first_failure(ranks)
    return _as_error(failed, world_size, stopping=True) if failed else None


@dataclass
class _Rank:
    number: int
    process: BaseProcess
    failures: Connection
    log: Path | None
    log_start: int  # bytes; earlier runs may have written to the same log
    descriptors: set[int]  # of this process, for communication with the rank
    failure: FailureReport | None = None


def _start(
    ranks: list[_Rank],
    target: Callable[[int], None],
    local_ranks: range,
    log_dir: Path,
    start_method: Literal["fork", "spawn"],
) -> None:
    """Start the ranks. Append each at once: if a later start fails, the caller ends the others."""
    context: ForkContext | SpawnContext = ForkContext() if start_method == "fork" else SpawnContext()
    # A rank inherits this process's handlers. It must not receive a signal before it has set its own.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, COORDINATED | {END_SIGNAL})
    try:
        for number in local_ranks:
            log = log_dir / f"rank_{number}.log" if number else None
            log_start = log.stat().st_size if log and log.exists() else 0
            failures, sender = context.Pipe(duplex=False)
            # A forked rank inherits the descriptors of the ranks before it.
            inherited = {failures.fileno()}.union(*(rank.descriptors for rank in ranks))
            arguments = (
                target,
                number,
                log,
                os.getpid(),
                sender,
                inherited if start_method == "fork" else (),
                tuple(variables_read()) if start_method == "spawn" else (),  # a forked rank has them
            )
            process = context.Process(target=rank_main, args=arguments, name=f"rank {number}")
            before = _open_descriptors()
            process.start()
            descriptors = {failures.fileno(), *(_open_descriptors() - before)}
            sender.close()
            ranks.append(_Rank(number, process, failures, log, log_start, descriptors))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _open_descriptors() -> set[int]:
    """Return this process's open descriptors, without the descriptor that reads their list."""
    descriptors = set()
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):
            os.fstat(int(name))
            descriptors.add(int(name))
    return descriptors


def _watch(
    ranks: list[_Rank], stops: list[int], kills_before: int | None, stopped_limit: float
) -> FailureReport | None:
    """Wait until all ranks have ended, a rank fails or a stop signal arrives; return the first failure."""
    first_noticed: float | None = None
    stopped = 0.0
    while True:
        # Count pauses instead of reading a clock: Ctrl-Z stops this process together with its ranks.
        running = _running(ranks)
        stopped = stopped + _POLL if running and all(map(_is_stopped, running)) else 0.0
        if stopped > stopped_limit:
            return _stopped_too_long(running, stopped_limit)
        ended = [rank for rank in ranks if rank.process.exitcode is not None]
        # Receive only now: all reports of the ranks in `ended` have arrived.
        _receive_failures(ranks)
        for rank in ended:
            rank.failure = rank.failure or _failure_from_exit_code(rank, kills_before)
        first = _first_failure(ranks)
        if first is not None:
            first_noticed = first_noticed or time.monotonic()
            if time.monotonic() - first_noticed >= (_SETTLING_SECONDARY if first.secondary else _SETTLING):
                return first
        if stops or len(ended) == len(ranks):
            return first
        _wait_briefly(ranks)


def _save_and_stop(ranks: list[_Rank], grace: float, stops: list[int]) -> None:
    """Ask all ranks to save and stop; wait for their end, for at most `grace` seconds or until Ctrl-C."""
    print(f"launcher: {SAVING}", file=sys.stderr, flush=True)
    _signal(ranks, STOP_SIGNAL)
    deadline = time.monotonic() + grace
    while _running(ranks) and time.monotonic() < deadline and signal.SIGINT not in stops[1:]:
        _wait_briefly(ranks)
        _receive_failures(ranks)


def _end(ranks: list[_Rank], grace: float, stops: list[int]) -> None:
    """End all ranks: send END_SIGNAL, wait `grace` seconds, send SIGKILL. A further Ctrl-C kills at once."""
    handled = min(len(stops), 1)
    _signal(ranks, END_SIGNAL)
    deadline = time.monotonic() + grace
    while _running(ranks) and time.monotonic() < deadline and signal.SIGINT not in stops[handled:]:
        _wait_briefly(ranks)
        _receive_failures(ranks)
    for rank in ranks:
        rank.process.kill()
        rank.process.join()
    _receive_failures(ranks)


def _signal(ranks: list[_Rank], number: int) -> None:
    for rank in _running(ranks):
        assert rank.process.pid is not None
        # Safe: a rank that has just ended is still a zombie, so no other process has its pid.
        os.kill(rank.process.pid, number)


def _running(ranks: list[_Rank]) -> list[_Rank]:
    return [rank for rank in ranks if rank.process.exitcode is None]


def _wait_briefly(ranks: list[_Rank]) -> None:
    """Wait for a rank's end or report. Limited: a child of a dead rank keeps the rank's sentinel open."""
    sentinels: list[Connection | int] = [rank.process.sentinel for rank in _running(ranks)]
    wait(sentinels + [rank.failures for rank in ranks if not rank.failures.closed], timeout=_POLL)


def _receive_failures(ranks: list[_Rank]) -> None:
    for rank in ranks:
        if not rank.failures.closed and rank.failures.poll():
            with suppress(EOFError, OSError):  # the rank sent no report, or was killed while it sent one
                rank.failure = rank.failures.recv()
            rank.failures.close()


def _first_failure(ranks: list[_Rank]) -> FailureReport | None:
    """Return the failure that caused the others; else a stopped rank, whose connection they may have lost."""
    failures = [rank.failure for rank in ranks if rank.failure is not None]
    return min(
        failures, key=lambda failure: (failure.secondary, not failure.stopped, failure.when), default=None
    )


def _failure_from_exit_code(rank: _Rank, kills_before: int | None) -> FailureReport | None:
    """Return the failure of a rank that ended without a report; None if its exit code is 0."""
    code = rank.process.exitcode
    if not code:
        return None
    out_of_memory = (
        -code == signal.SIGKILL and kills_before is not None and (memory_kills() or 0) > kills_before
    )
    if out_of_memory:
        detail = "was killed by the kernel's out-of-memory killer (SIGKILL)"
    elif code < 0:
        name = next((candidate.name for candidate in signal.Signals if candidate == -code), f"signal {-code}")
        detail = f"was killed by {name}" + (
            " (perhaps out of memory; see dmesg)" if name == "SIGKILL" else ""
        )
    else:
        detail = f"exited with code {code}" + (
            " (stopped by SIGTERM or SIGUSR1)" if code == STOPPED_EXIT_CODE else ""
        )
    return FailureReport(
        rank.number,
        time.monotonic(),
        secondary=code == STOPPED_EXIT_CODE,
        detail=detail + _log_tail(rank),
        out_of_memory=out_of_memory,
        stopped=code == STOPPED_EXIT_CODE,
    )


def _is_stopped(rank: _Rank) -> bool:
    """Return whether the rank's process is stopped, by SIGSTOP or SIGTSTP; False where there is no /proc."""
    try:
        stat = Path(f"/proc/{rank.process.pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "T"


def _stopped_too_long(ranks: list[_Rank], limit: float) -> FailureReport:
    alike = f", like all {len(ranks)} running ranks" if len(ranks) > 1 else ""
    detail = f"was stopped by SIGSTOP or SIGTSTP for {duration(limit)}{alike}"
    return FailureReport(ranks[0].number, time.monotonic(), False, detail)


def _log_tail(rank: _Rank) -> str:
    if rank.log is None or not rank.log.is_file():
        return ""
    with rank.log.open("rb") as log:
        log.seek(max(rank.log_start, log.seek(0, os.SEEK_END) - _LOG_TAIL))
        lines = log.read().decode(errors="replace").splitlines()[-_LOG_LINES:]
    return "\n".join(["", f"the end of {rank.log}:", *lines]) if lines else ""


def _as_error(failure: FailureReport, world_size: int, *, stopping: bool) -> RankFailure | ConfigError:
    if failure.refusal is not None:
        return ConfigError(*failure.refusal)
    return RankFailure(
        failure.rank,
        world_size,
        failure.detail,
        secondary=failure.secondary,
        stopping=stopping,
        out_of_memory=failure.out_of_memory,
        halted=failure.halted,
    )


@contextmanager
def _recorded_stops() -> Iterator[list[int]]:
    """Record stop signals in the yielded list, in order of arrival, instead of being interrupted by them.

    A Ctrl-C within AGAIN seconds of the first signal is left out.
    """
    stops: list[int] = []
    first = 0.0

    def record(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        first = first or time.monotonic()
        if not stops or number != signal.SIGINT or time.monotonic() - first >= AGAIN:
            stops.append(number)

    previous = {number: signal.getsignal(number) for number in COORDINATED}
    # nohup and background jobs of scripts ignore some of these signals on purpose: leave them ignored. None
    # means that the handler was not installed from Python.
    handled = [number for number, handler in previous.items() if handler not in (signal.SIG_IGN, None)]
    for number in handled:
        signal.signal(number, record)
    try:
        yield stops
    finally:
        for number in handled:
            signal.signal(number, previous[number])
