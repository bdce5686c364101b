"""What Linux offers so that no process outlives the one that answers for it. Elsewhere these do nothing."""

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
_KERNEL_PATIENCE = 5.0  # a process in uninterruptible sleep (a dead NFS mount) does not even die of SIGKILL


def die_with(parent: int) -> None:
    """Have the kernel kill this process as soon as its parent is gone, be it by SIGKILL."""
    if sys.platform != "linux":
        return
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before the kernel was asked to watch it
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def no_grandchildren_left(patience: float) -> Iterator[None]:
    """Once the children started inside have ended, whatever they started ends too.

    Leftovers get `patience` seconds to notice by themselves that their parent is gone, as multiprocessing's
    resource tracker does, and frees shared memory. Then SIGKILL ends them: W&B's system monitor, for one.
    Other threads must start no process inside: it would be taken for a leftover.
    """
    if sys.platform != "linux":
        yield
        return
    mine = _children()
    # A subreaper inherits the orphans below it, whatever session or process group they moved to.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        _end_leftovers(mine, patience)
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)


def _end_leftovers(mine: set[int], patience: float) -> None:
    deadline = time.monotonic() + patience
    while (left := _children() - mine) and time.monotonic() < deadline + _KERNEL_PATIENCE:
        for pid in left:
            if time.monotonic() >= deadline:
                os.kill(pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)


def _children() -> set[int]:
    children = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        # The name in parentheses may hold spaces and parentheses; after it come state and parent.
        with suppress(OSError):  # it ended while we looked
            if int(stat.read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                children.add(int(stat.parent.name))
    return children


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
