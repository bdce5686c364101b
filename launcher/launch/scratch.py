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
    try:
        with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name:
            folder = Path(name)
            unlocked = folder / f".{_OWNER}"
            with unlocked.open("w") as lock:
                with suppress(OSError):  # a file system without locks: a kill leaves the directory behind
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    unlocked.rename(folder / _OWNER)
                yield folder
    finally:
        remove_abandoned()  # of ranks that were killed


@contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """Let this process, and processes that it starts in the block, make their temporary files in `folder`."""
    variable, directory = os.environ.get("TMPDIR"), tempfile.tempdir
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = directory
        if variable is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = variable


def remove_abandoned() -> None:
    """Remove the temporary directories of this user's killed processes."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if folder.lstat().st_uid != os.getuid():
                continue
            with (folder / _OWNER).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError if its owner is alive
                shutil.rmtree(folder, ignore_errors=True)
