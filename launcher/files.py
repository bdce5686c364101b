"""Write files and directories so that a crash leaves the old content or the new, and never a part of it.

All functions give one durability. The content is written beside its place and synced to the disk (fsync),
then renamed, then the directory that holds the name is synced. Content and name survive a power failure once
the function returns.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PARTIAL = ".partial"  # suffix of a directory that is not complete


def write_text(path: Path, text: str) -> None:
    with replacing(path) as aside:
        aside.write_text(text)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path to write to; the file written there becomes `path` unless an exception is raised."""
    # Not PARTIAL: that is for directories, which are deleted as such when a crash leaves them.
    aside = path.with_name(f"{path.name}.tmp")
    yield aside
    sync(aside)
    rename(aside, path)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory to fill; it becomes `path` unless an exception is raised."""
    aside = partial_path(path)
    if aside.exists():
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    yield aside
    for entry in (aside, *aside.rglob("*")):
        sync(entry)
    rename(aside, path)


def delete_directory(path: Path) -> None:
    """Delete the directory; a crash leaves all of it, or a remainder whose name ends in PARTIAL."""
    aside = partial_path(path)
    path.rename(aside)
    shutil.rmtree(aside)


def json_lines(path: Path) -> list[Any]:
    """Return the JSON values of a file's lines, without a line that a crash cut short; [] without a file."""
    values = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
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
