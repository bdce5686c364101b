"""One run is trained in one place at a time: its directory is held by a lock that ends with its holder.

The lock is flock(2) on a file that also says who holds it. Network file systems pass it on to other nodes;
one that has no locks is told of.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from launcher.config.errors import ConfigError

HOLDER = "holder.json"
_PATIENCE = 5.0  # seconds, for one that is about to end
_PATIENCE_SAME_JOB = 150.0  # a server frees what a lost node held once its lease is over
_POLL = 0.2
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


@dataclass(frozen=True)
class Holder:
    """Who trains a run, for people."""

    host: str
    process: int
    job: str | None  # Slurm's
    since: str

    def describe(self) -> str:
        job = f"job {self.job}, " if self.job else ""
        return f"{job}process {self.process} on {self.host}, since {self.since}"


@contextmanager
def held(run_dir: Path) -> Iterator[list[str]]:
    """Hold the directory, which is made, until the end of the block; yields what to tell the user.

    Raises ConfigError where another process holds it, OSError where it cannot be made or written.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    me = Holder(
        socket.gethostname(),
        os.getpid(),
        os.environ.get("SLURM_JOB_ID"),
        time.strftime("%Y-%m-%d %H:%M:%S"),
    )
    with (run_dir / HOLDER).open("a+") as file:
        notes = _lock(file, run_dir, me)
        file.truncate(0)
        file.write(json.dumps(asdict(me)) + "\n")
        file.flush()
        yield notes


def _lock(file: IO[str], run_dir: Path, me: Holder) -> list[str]:
    deadline = None
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return []
        except BlockingIOError:
            other = _holder_in(file)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return [f"the file system of {run_dir} has no locks: train this run in one place at a time"]
        deadline = deadline or time.monotonic() + _patience(run_dir, me, other)
        if time.monotonic() > deadline:
            raise _refusal(run_dir, other)
        time.sleep(_POLL)


def _patience(run_dir: Path, me: Holder, other: Holder | None) -> float:
    if me.job is None or other is None or me.job != other.job:
        return _PATIENCE
    said = f"{run_dir} is still held by {other.describe()}; waiting for that, {_PATIENCE_SAME_JOB:.0f} s"
    print(f"launcher: {said}", file=sys.stderr, flush=True)
    return _PATIENCE_SAME_JOB


def _holder_in(file: IO[str]) -> Holder | None:
    file.seek(0)
    try:
        return Holder(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None  # it has this moment begun


def _refusal(run_dir: Path, other: Holder | None) -> ConfigError:
    why = "is being trained" + (f" by {other.describe()}" if other else "")
    end = f"`scancel {other.job}`, which saves it" if other and other.job else "Ctrl-C there, which saves it"
    return ConfigError("run.dir", run_dir, why, f"another run.dir, or wait for its end ({end})")
