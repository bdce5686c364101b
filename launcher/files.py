"""Write files and directories so that a crash leaves the old content or the new, and never a part of it.

All functions give one durability. The content is written beside its place and synced to the disk (fsync),
then renamed, then the directory that holds the name is synced. Content and name survive a power failure once
the function returns.
"""

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from itertools import count
from pathlib import Path
from typing import Any

PARTIAL = ".partial"  # suffix of a directory that is not complete
_MARK = ".written-by-launcher"


def write_text(path: Path, text: str) -> None:
    with replacing(path) as aside:
        aside.write_text(text)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path to write to; the file written there becomes `path` unless an exception is raised."""
    # Not PARTIAL: that is for directories, which are deleted as such when a crash leaves them.
    aside = path.with_name(f"{path.name}.tmp")
    aside.unlink(missing_ok=True)  # left by a crash; or a link, whose target must not be written
    yield aside
    sync(aside)
    rename(aside, path)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory to fill; it becomes `path` unless an exception is raised.

    A remainder of an earlier call, which has a file named _MARK, is deleted. Raises FileExistsError for any
    other directory.
    """
    aside = partial_path(path)
    if aside.is_dir() and ((aside / _MARK).is_file() or not any(aside.iterdir())):
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    (aside / _MARK).touch()
    yield aside
    for entry in (aside, *aside.rglob("*")):
        sync(entry)
    rename(aside, path)
    (path / _MARK).unlink()  # last: without the mark, a remainder would count as somebody else's


def delete_directory(path: Path) -> None:
    """Delete the directory; a crash leaves all of it, or a remainder whose name ends in PARTIAL."""
    if path.is_symlink():
        path.unlink()
        return
    aside = partial_path(path)
    make_way(aside, for_directory=True)
    path.rename(aside)
    shutil.rmtree(aside)


def make_way(path: Path, *, for_directory: bool) -> None:
    """Rename what lies at `path` to a free name ending in `.stray` if it is of another kind than is needed.

    A link is always renamed: its target must not be written or deleted.
    """
    is_right = path.is_dir() if for_directory else path.is_file()
    if os.path.lexists(path) and (path.is_symlink() or not is_right):
        names = (path.with_name(f"{path.name}-{number}.stray") for number in count(1))
        path.rename(next(name for name in names if not os.path.lexists(name)))


def json_lines(path: Path) -> list[Any]:
    """Return the JSON values of a file's lines, without lines that are damaged; [] without a file."""
    values = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError, RecursionError):
            values.append(json.loads(line))
    return values


def partial_path(path: Path) -> Path:
    return path.with_name(f"{path.name}{PARTIAL}")


def rename(source: Path, target: Path) -> None:
    """Rename a file or directory whose content is synced already; replaces a file."""
    source.replace(target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Sync the content of a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
)


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading; raise OSError for anything else at this path.

    Nothing else is ever opened: a FIFO would block, and opening a device can act on it.
    """
    _refuse_other_kinds(path, os.lstat(path).st_mode)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        _refuse_other_kinds(path, os.fstat(descriptor).st_mode)  # the path may have changed meanwhile
    except OSError:
        os.close(descriptor)
        raise
    return open(descriptor, "rb")


def read_regular(path: Path, limit: int) -> bytes:
    """Return the content of a regular file. Raises OSError, also for more than `limit` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > limit else file.read(limit + 1)
    if max(size, len(data)) > limit:
        raise OSError(errno.EFBIG, f"is {max(size, len(data))} bytes long, more than {limit}", str(path))
    return data


def _refuse_other_kinds(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "a device")
        raise OSError(errno.EINVAL, f"is {kind} instead of a regular file", str(path))


def what_is_wrong(error: OSError) -> str:
    """Return the end of a sentence that begins with the name of a file which cannot be read."""
    if error.errno == errno.ENOENT:
        return "is missing"
    reason = error.strerror or str(error)
    return reason if reason.startswith("is ") else f"cannot be read: {reason}"
