"""Run functions in forked processes, a few at a time, each with a time limit."""

import json
import os
import select
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, NamedTuple


class Work(NamedTuple):
    """A function to call in a process of its own, which returns JSON; and seconds until it is killed."""

    function: Callable[[], Any]
    limit: float


class Ended(NamedTuple):
    """The answer of a function; None if it was killed, crashed (`error`), or took too long (`timed_out`)."""

    answer: Any
    error: str
    timed_out: bool
    seconds: float


Plan = Generator[Work, Ended, Any]  # work in sequence; its return value is the result


@dataclass
class _Running:
    plan: Plan
    pid: int
    file: IO[str]
    started: float
    limit: float


def results(plans: Iterable[Plan], jobs: int) -> Iterator[Any]:
    """Yield the result of each plan, `jobs` at a time. A plan is taken when a place is free."""
    waiting, running = iter(plans), list[_Running]()
    try:
        while True:
            while len(running) < jobs and (plan := next(waiting, None)) is not None:
                yield from _advance(plan, None, running)
            if not running:
                return
            select.select([], [], [], 0.02)
            for child in list(running):
                ended = _ended(child)
                if ended is not None:
                    running.remove(child)
                    yield from _advance(child.plan, ended, running)
    finally:
        for child in running:
            _kill(child)


def _advance(plan: Plan, ended: Ended | None, running: list[_Running]) -> Iterator[Any]:
    try:
        work = next(plan) if ended is None else plan.send(ended)
    except StopIteration as stop:
        yield stop.value
        return
    file = tempfile.TemporaryFile("w+")  # noqa: SIM115
    pid = os.fork()
    if pid == 0:
        _child(work.function, file)
    running.append(_Running(plan, pid, file, time.monotonic(), work.limit))


def _child(function: Callable[[], Any], file: IO[str]) -> None:
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        answer, error = None, ""
        try:
            answer = function()
        except BaseException:
            error = traceback.format_exc()[-2000:]
        json.dump([answer, error], file)
        file.flush()
        code = 0
    finally:
        os._exit(code)


def _ended(child: _Running) -> Ended | None:
    seconds = time.monotonic() - child.started
    pid, status = os.waitpid(child.pid, os.WNOHANG)
    if not pid:
        if seconds < child.limit:
            return None
        _kill(child)
        return Ended(None, f"no end within {child.limit:.0f} s", True, seconds)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)  # ranks that are left
    child.file.seek(0)
    text = child.file.read()
    child.file.close()
    if not text:
        return Ended(None, f"ended with status {os.waitstatus_to_exitcode(status)}", False, seconds)
    answer, error = json.loads(text)
    return Ended(answer, error, False, seconds)


def _kill(child: _Running) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.kill(child.pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(child.pid, 0)
    child.file.close()
