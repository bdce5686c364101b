"""The lock on a run directory, so that only one process trains a run.

The lock is flock(2) on holder.json, which names the holder, and on the directory itself, so that deleting the
file frees nothing. Where directories cannot be locked, as on NFS, a run whose file was replaced notices it
before its next save: see HeldDirectory.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

from launcher.config.errors import ConfigError
from launcher.config.secrets import without_values
from launcher.files import read_regular
from launcher.launch.local import RankFailure

HOLDER = "holder.json"
STOPPED = "stopped"
_PATIENCE = 5.0  # seconds to wait for a holder that is about to end
_PATIENCE_SAME_JOB = 150.0  # a file server frees the lock of a lost node when its lease ends
_POLL = 0.2
_MOST_BYTES = 2**16  # of holder.json
# Locks of the file system are off; or, on NFS, flock on a directory, which cannot be opened for writing.
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF, errno.EINVAL, errno.EISDIR}


@dataclass(frozen=True)
class Holder:
    host: str
    process: int
    job: str | None  # Slurm's job id
    since: str
    end: str | None = None  # how the holder ended: "" without an error, STOPPED, or the error in a line

    def describe(self) -> str:
        job = f"job {self.job}, " if self.job else ""
        return f"process {self.process} on {self.host} ({job}since {self.since})"


@dataclass(frozen=True)
class HeldDirectory:
    """The path of a held directory, and the inodes of the directory and of its lock file."""

    path: Path
    directory: tuple[int, int]
    lock: tuple[int, int]

    def loss(self) -> str | None:
        """Return why the path no longer leads to the directory that this run holds; None if it does."""
        try:
            if _inode(os.stat(self.path)) != self.directory:
                return "was replaced by another directory while the run trained"
        except (FileNotFoundError, NotADirectoryError):
            return "was moved or deleted while the run trained"
        except OSError:
            return None  # no answer from a file server does not mean that the directory is lost
        try:
            is_held = _inode(os.lstat(self.path / HOLDER)) == self.lock
        except OSError:
            return None  # the file was deleted, and no other process has made it again
        return None if is_held else f"was taken over by another process after its {HOLDER} was deleted"


def is_holder_file(path: Path) -> bool:
    """Return whether a run wrote this holder.json, or was killed before it wrote its name there."""
    try:
        return path.lstat().st_size == 0 or _holder_in(path.parent) is not None
    except OSError:
        return False


@contextmanager
def held(run_dir: Path) -> Iterator[tuple[HeldDirectory, list[str]]]:
    """Make and hold the directory; yield its path and inodes, and notes to the user.

    Raises ConfigError if another process holds the directory, or OSError.
    """
    job, now = os.environ.get("SLURM_JOB_ID"), time.strftime("%Y-%m-%d %H:%M:%S")
    me = Holder(socket.gethostname(), os.getpid(), job, now)
    while True:
        run_dir.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            directory = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, directory)
            # First: a start that is refused makes no holder.json, which the holder would take for a takeover.
            _lock(directory, run_dir, me)
            file = stack.enter_context(_holder_file(run_dir))
            notes = _lock(file.fileno(), run_dir, me)
            held_directory = HeldDirectory(
                run_dir.resolve(), _inode(os.fstat(directory)), _inode(os.fstat(file.fileno()))
            )
            if held_directory.loss() is not None or not os.path.lexists(run_dir / HOLDER):
                continue  # moved or deleted since it was opened: the locks are on something else
            _write(file, me)
            try:
                yield held_directory, notes
            except BaseException as error:
                with suppress(OSError):  # the disk may be full
                    _write(file, replace(me, end=_end_of(error)))
                raise
            with suppress(OSError):
                _write(file, replace(me, end=""))
            return


def holder_of(run_dir: Path) -> tuple[Holder | None, bool | None]:
    """Return the last holder, and whether it still holds the directory; None if there are no locks.

    Raises OSError.
    """
    return _holder_in(run_dir), is_held(run_dir)


def is_held(run_dir: Path) -> bool | None:
    """Return whether a living process holds the directory; None if the file system has no locks."""
    answers = [_is_locked(path) for path in (run_dir, run_dir / HOLDER)]
    return True if True in answers else None if answers == [None, None] else False


def _is_locked(path: Path) -> bool | None:
    """Return whether another process has locked a file or directory; None if it cannot be locked."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def _write(file: IO[str], holder: Holder) -> None:
    file.truncate(0)
    file.write(json.dumps(asdict(holder)) + "\n")
    file.flush()


def _end_of(error: BaseException) -> str:
    """Return what ended the holder, in one line."""
    if not isinstance(error, Exception):  # Ctrl-C, or the SystemExit of a signal
        return STOPPED
    reason = error.reason if isinstance(error, RankFailure) else f"{type(error).__name__}: {error}"
    return without_values(next(iter(reason.strip().splitlines()), ""))


def _holder_file(run_dir: Path) -> IO[str]:
    """Open holder.json, never through a link or as anything but a regular file. Raises OSError."""
    descriptor = os.open(run_dir / HOLDER, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    return os.fdopen(descriptor, "a+")


def _inode(state: os.stat_result) -> tuple[int, int]:
    return state.st_dev, state.st_ino


def _lock(descriptor: int, run_dir: Path, me: Holder) -> list[str]:
    """Lock an open file or directory; return a note if there are no locks. Raises ConfigError if held."""
    deadline = None
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return []
        except BlockingIOError:
            other = _holder_in(run_dir)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return [f"the file system of {run_dir} does not support locks: start this run only once"]
        deadline = deadline or time.monotonic() + _patience(run_dir, me, other)
        if time.monotonic() > deadline:
            raise _refusal(run_dir, other)
        time.sleep(_POLL)


def _patience(run_dir: Path, me: Holder, other: Holder | None) -> float:
    if me.job is None or other is None or me.job != other.job:
        return _PATIENCE
    message = f"{run_dir} is still held by {other.describe()}; waiting up to {_PATIENCE_SAME_JOB:.0f} s"
    print(f"launcher: {message}", file=sys.stderr, flush=True)
    return _PATIENCE_SAME_JOB


def _holder_in(run_dir: Path) -> Holder | None:
    try:
        return Holder(**json.loads(read_regular(run_dir / HOLDER, _MOST_BYTES)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None  # the holder has not written its name yet


def _refusal(run_dir: Path, other: Holder | None) -> ConfigError:
    why = f"{other.describe() if other else 'another process'} is training this run"
    stop = f"`scancel {other.job}`" if other and other.job else "stop that process with Ctrl-C"
    return ConfigError("run.dir", run_dir, why, f"another run.dir, or {stop} (it saves a checkpoint)")
