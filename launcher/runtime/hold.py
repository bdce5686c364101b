"""The lock on a run directory, flock(2) on a file that names its holder: only one process trains a run."""

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
_PATIENCE = 5.0  # seconds to wait for a holder that is about to end
_PATIENCE_SAME_JOB = 150.0  # a file server frees the lock of a lost node when its lease ends
_POLL = 0.2
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


@dataclass(frozen=True)
class Holder:
    host: str
    process: int
    job: str | None  # Slurm's job id
    since: str

    def describe(self) -> str:
        job = f"job {self.job}, " if self.job else ""
        return f"process {self.process} on {self.host} ({job}since {self.since})"


@contextmanager
def held(run_dir: Path) -> Iterator[list[str]]:
    """Make and hold the directory; yield notes to the user. Raises ConfigError if it is held, or OSError."""
    run_dir.mkdir(parents=True, exist_ok=True)
    job, now = os.environ.get("SLURM_JOB_ID"), time.strftime("%Y-%m-%d %H:%M:%S")
    me = Holder(socket.gethostname(), os.getpid(), job, now)
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


def _holder_in(file: IO[str]) -> Holder | None:
    file.seek(0)
    try:
        return Holder(**json.loads(file.read()))
    except (ValueError, TypeError):
        return None  # the holder has not written its name yet


def _refusal(run_dir: Path, other: Holder | None) -> ConfigError:
    why = f"{other.describe() if other else 'another process'} is training this run"
    stop = f"`scancel {other.job}`" if other and other.job else "stop that process with Ctrl-C"
    return ConfigError("run.dir", run_dir, why, f"another run.dir, or {stop} (it saves a checkpoint)")
