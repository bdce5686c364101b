"""End child processes when their parent ends, with prctl on Linux. Elsewhere these functions do nothing."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_KERNEL_PATIENCE = 5.0  # seconds; in uninterruptible sleep (a dead NFS mount) a process survives SIGKILL


def die_with(parent: int) -> None:
    """Make the kernel kill this process as soon as its parent ends, even by SIGKILL."""
    if sys.platform != "linux":
        return
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the prctl call
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def no_grandchildren_left(patience: float) -> Iterator[None]:
    """On exit, end all processes that the children started inside this block have left behind.

    Leftover processes get `patience` seconds to end by themselves: multiprocessing's resource tracker does,
    and frees shared memory. Then they get SIGKILL, which W&B's system monitor needs. Other threads must not
    start processes while the block runs: they would be ended as leftovers.
    """
    if sys.platform != "linux":
        yield
        return
    existing = _children()
    # A subreaper inherits all orphaned descendants, whatever session or process group they moved to.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        _end_leftovers(existing, patience)
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _end_leftovers(existing: set[int], patience: float) -> None:
    deadline = time.monotonic() + patience
    while (leftovers := _children() - existing) and time.monotonic() < deadline + _KERNEL_PATIENCE:
        for pid in leftovers:
            if time.monotonic() >= deadline:
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)


def _children() -> set[int]:
    children = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        # The process name stands in parentheses and may itself contain spaces and parentheses. The fields
        # after it are the state and the parent's pid.
        with suppress(OSError):  # the process ended in the meantime
            if int(stat.read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                children.add(int(stat.parent.name))
    return children


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
