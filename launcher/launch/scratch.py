"""Temporary directories that are removed even if their process is killed: at the next start, then."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX, _OWNER = "launcher-", "owner"


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """Yield a temporary directory, and remove it on exit. Before, remove the directories of killed processes.

    The directory holds a file that this process locks, and with it the ranks that it forks. The kernel frees
    the lock when the last of them ends. A process id would not do: containers may share the directory, and
    each counts its own processes.
    """
    remove_abandoned()
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name:
        folder = Path(name)
        unlocked = folder / f".{_OWNER}"
        with unlocked.open("w") as lock:
            with suppress(OSError):  # a file system without locks: the directory is not removed after a kill
                fcntl.flock(lock, fcntl.LOCK_EX)
                unlocked.rename(folder / _OWNER)
            yield folder


def remove_abandoned() -> None:
    """Remove the temporary directories of this user's killed processes."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if folder.lstat().st_uid != os.getuid():
                continue
            with (folder / _OWNER).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError if its owner is alive
                shutil.rmtree(folder, ignore_errors=True)
