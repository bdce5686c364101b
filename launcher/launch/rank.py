"""What a rank's process does around its work: signals, its log, and handing its failure to the parent."""

import faulthandler
import gc
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from launcher.config.errors import ConfigError
from launcher.launch.orphans import die_with

STOPPED = 128 + signal.SIGTERM
# From the parent: end once what would be lost is saved, as SIGTERM asks, too; and end now.
STOP, END = signal.SIGUSR1, signal.SIGUSR2
# What these do to the ranks the parent decides.
COORDINATED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, STOP}


@dataclass(frozen=True)
class Failure:
    """Why a rank ended. Built of plain text, since an exception need not survive pickling."""

    rank: int
    when: float  # time.monotonic(), one clock for all processes of a machine
    secondary: bool  # a consequence of another rank's end, or of a stop, as far as can be told
    detail: str
    refusal: tuple[str, str | None, str, str] | None = None  # the fields of a ConfigError


def rank_main(
    target: Callable[[int], None], rank: int, log: Path | None, parent: int, failures: Connection
) -> None:
    """Run `target(rank)` as a process of its own; its failure, if any, is sent to `failures`."""
    try:
        die_with(parent)
        if log is not None:
            _redirect_output(log)
        faulthandler.enable(file=2)
        # What a fork brought stays shared with the parent, and none of its finalizers runs here, where it
        # would swallow the exception of a signal that comes just then.
        gc.freeze()
        _handle_signals()
        target(rank)
    except SystemExit:
        raise  # its code says it all: multiprocessing exits with it
    except BaseException as error:
        failure = failure_of(rank, error)
        if log is not None and failure.refusal is None:
            print(failure.detail.partition("\n")[2], file=sys.stderr, flush=True)
        failures.send(failure)
        raise SystemExit(1) from None


class _Stopped(SystemExit):
    """Raised in the main thread by SIGTERM, STOP and END, so that `finally` blocks run."""


class StopRequest:
    """Whether this process was asked to stop. Entered, it takes note of STOP and SIGTERM, and goes on.

    SIGTERM reaches a rank that torchrun or srun started, and any rank where it is sent to a process group.
    """

    def __init__(self) -> None:
        self.asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._note) for number in (STOP, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True


def _redirect_output(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    # What sys holds so far may not write to 1 and 2 (under pytest), and buffers what SIGKILL would then lose.
    sys.stdout, sys.stderr = _lines_to(1), _lines_to(2)


def _lines_to(descriptor: int) -> TextIO:
    return open(descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


def _handle_signals() -> None:
    # Ctrl-C and a closing terminal reach the whole process group; only the parent is to act on them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in (signal.SIGTERM, STOP, END):
        signal.signal(number, _stop)
    signal.pthread_sigmask(
        signal.SIG_UNBLOCK, COORDINATED | {END}
    )  # the parent blocked them before it forked


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    for number in (signal.SIGTERM, STOP, END):
        signal.signal(number, lambda *_: None)  # a second one must not cut the clean-up short
    raise _Stopped(STOPPED)


def failure_of(rank: int, error: BaseException) -> Failure:
    """What became of `rank`, from the exception that ended its work."""
    when = time.monotonic()
    if isinstance(error, ConfigError):
        refusal = (error.field, None if error.value is None else str(error.value), error.why, error.remedy)
        return Failure(rank, when, False, str(error), refusal)
    # From the second frame on: the first is our caller's.
    frames = error.__traceback__.tb_next if error.__traceback__ else None
    text = "".join(traceback.format_exception(type(error), error, frames)).rstrip()
    return Failure(rank, when, _is_consequence(error), f"failed:\n{text}")


# torch's own types, by name since torch is not imported here, and what gloo and NCCL say in RuntimeErrors.
_LOST_PEERS_TYPES = {"DistError", "DistBackendError", "DistNetworkError", "DistStoreError"}
_LOST_PEERS_TEXT = re.compile(
    r"connection (was )?(closed|reset|refused|aborted)|broken pipe|socket (is )?closed|pair closure"
    r"|\bgloo\b|\bnccl|timed out (waiting|after)",
    re.IGNORECASE,
)


def _is_consequence(error: BaseException) -> bool:
    """Whether a stop, or the end of another rank, seems to have come first; decides what is shown only."""
    # The oldest link: an error whose clean-up then waits in vain for the others is still a cause of its own.
    *_, origin = chain = list(_chain(error))
    names = {base.__name__ for base in type(origin).__mro__}
    return (
        any(isinstance(link, _Stopped) for link in chain)
        or isinstance(origin, ConnectionError)
        or not names.isdisjoint(_LOST_PEERS_TYPES)
        or (isinstance(origin, RuntimeError) and _LOST_PEERS_TEXT.search(str(origin)) is not None)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
