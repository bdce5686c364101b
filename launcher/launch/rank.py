"""Run one rank in its process: handle signals, write its log, and send its failure to the parent."""

import faulthandler
import gc
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from launcher.config.errors import ConfigError, NotJoined, RunStopped
from launcher.config.secrets import note_variables, without_values
from launcher.launch.orphans import die_with
from launcher.streams import standard_stream

STOPPED_EXIT_CODE = 128 + signal.SIGTERM
# The parent sends STOP_SIGNAL to ask a rank to save and end, as SIGTERM does, and END_SIGNAL to end it now.
STOP_SIGNAL, END_SIGNAL = signal.SIGUSR1, signal.SIGUSR2
EXCEPTION = "failed:"  # begins the detail of an exception; its traceback follows
# The parent handles these signals and decides what its ranks do.
COORDINATED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, STOP_SIGNAL}


@dataclass(frozen=True)
class FailureReport:
    """Reason why a rank ended, in plain text: not every exception can be pickled."""

    rank: int
    when: float  # time.monotonic(), which all processes of a machine share
    secondary: bool  # probably a consequence of another rank's end, or of a stop
    detail: str
    refusal: tuple[str, str | None, str, str] | None = None  # the fields of a ConfigError
    out_of_memory: bool = False  # the kernel killed the rank because memory ran out
    halted: bool = False  # a guard of the run ended it
    stopped: bool = False  # a stop signal ended it


def rank_main(
    target: Callable[[int], None],
    rank: int,
    log: Path | None,
    parent: int,
    failures: Connection,
    inherited: Collection[int],
    variables: Collection[str],
) -> None:
    """Run `target(rank)`, with output to `log` or the terminal; send a failure, then exit with code 1.

    `inherited` are descriptors of the parent that the rank closes, `variables` the names of the environment
    variables whose values its tracebacks do not show.
    """
    note_variables(variables)
    try:
        die_with(parent)
        for descriptor in inherited:
            os.close(descriptor)
        _open_output(log)
        faulthandler.enable(file=2)
        # Keep objects inherited by fork shared with the parent, and never run their finalizers here. A
        # finalizer would discard the exception of a signal that arrives while it runs.
        gc.freeze()
        _handle_signals()
        target(rank)
    except SystemExit:
        raise  # multiprocessing exits with its code
    except BaseException as error:
        failure = failure_of(rank, error)
        if log is not None and failure.refusal is None:
            print(failure.detail.partition("\n")[2], file=sys.stderr, flush=True)
        failures.send(failure)
        raise SystemExit(1) from None


class _StopSignalReceived(SystemExit):
    """Raised in the main thread on SIGTERM, STOP_SIGNAL and END_SIGNAL, so that `finally` blocks run."""


class StopRequest:
    """A context in which STOP_SIGNAL and SIGTERM only set `asked`, so that training can save and end."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (STOP_SIGNAL, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True


def _open_output(log: Path | None) -> None:
    """Let this rank write to its log, or to the terminal; in neither case may the loss of it end the rank."""
    if log is not None:
        descriptor = _open_log(log)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
    # sys.stdout and sys.stderr may not write to descriptors 1 and 2 (under pytest), and they buffer lines
    # that SIGKILL would lose.
    sys.stdout, sys.stderr = standard_stream(1), standard_stream(2)


def _open_log(log: Path) -> int:
    try:
        return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666)
    except OSError as error:
        print(f"launcher: this rank has no log, because {log} cannot be opened: {error}", file=sys.stderr)
        return os.open(os.devnull, os.O_WRONLY)


def _handle_signals() -> None:
    # Ctrl-C and a closing terminal signal the whole process group; only the parent may act on them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in (signal.SIGTERM, STOP_SIGNAL, END_SIGNAL):
        signal.signal(number, _stop)
    signal.signal(signal.SIGALRM, _stop)
    sys.unraisablehook = _again_if_discarded
    # The parent blocked these signals before it started this process.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, COORDINATED | {END_SIGNAL})


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    for number in (signal.SIGTERM, STOP_SIGNAL, END_SIGNAL):
        signal.signal(number, lambda *_: None)  # a second signal must not interrupt the clean-up
    raise _StopSignalReceived(STOPPED_EXIT_CODE)


def _again_if_discarded(discarded: "sys.UnraisableHookArgs") -> None:
    """Raise a discarded stop again a moment later: Python discards exceptions in finalizers."""
    if isinstance(discarded.exc_value, _StopSignalReceived):
        signal.setitimer(signal.ITIMER_REAL, 0.01)
    else:
        sys.__unraisablehook__(discarded)


def failure_of(rank: int, error: BaseException) -> FailureReport:
    when = time.monotonic()
    if isinstance(error, ConfigError):
        refusal = (error.field, None if error.value is None else str(error.value), error.why, error.remedy)
        return FailureReport(rank, when, False, str(error), refusal)
    if isinstance(error, RunStopped):
        detail = without_values(f"stopped the run: {error}")
        return FailureReport(rank, when, rank > 0, detail, halted=True)
    if isinstance(error, NotJoined):  # the rank that is missing may print the cause first
        return FailureReport(rank, when, True, without_values(f"could not start: {error}"))
    # Leave out the first frame, which is the caller's.
    frames = error.__traceback__.tb_next if error.__traceback__ else None
    text = "".join(traceback.format_exception(type(error), error, frames)).rstrip()
    detail = f"{EXCEPTION}\n{without_values(text)}"
    return FailureReport(rank, when, _is_consequence(error), detail)


# A rank that lost its peers raises one of these torch types (by name, because torch is not imported here) or
# a RuntimeError with a text of gloo or NCCL.
_LOST_PEERS_TYPES = {"DistError", "DistBackendError", "DistNetworkError", "DistStoreError"}
_LOST_PEERS_TEXT = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|socket (is )?closed|pair closure"
    r"|\bgloo\b|\bnccl|timed out (waiting|after)",
    re.IGNORECASE,
)


def _is_consequence(error: BaseException) -> bool:
    """Return whether the error probably follows from a stop or the end of another rank."""
    # Look at the oldest exception of the chain: if the clean-up after an error then loses its peers, the
    # error is still a cause.
    *_, origin = chain = list(_chain(error))
    names = {base.__name__ for base in type(origin).__mro__}
    return (
        any(isinstance(link, _StopSignalReceived) for link in chain)
        or isinstance(origin, ConnectionError)
        or not names.isdisjoint(_LOST_PEERS_TYPES)
        or (isinstance(origin, RuntimeError) and _LOST_PEERS_TEXT.search(str(origin)) is not None)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error, its cause or context, and so on, as a traceback shows them."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
