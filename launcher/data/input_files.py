"""Find input files in directories, and count the files that are left out, by reason.

Copies that a system or an editor makes beside a file, and files that are reached by two names, would add text
that nobody asked for. They are left out, and every command that leaves files out prints the counts.
"""

import glob
import os
import shlex
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath

from launcher.config.errors import ConfigError, typed_text
from launcher.text import whole

HIDDEN, COPY, TWICE, EMPTY = "hidden", "backup copies", "the same file by another name", "empty"
NOT_A_FILE, DIRECTORY_TWICE = "not regular files", "directories by another name"
_COPY_ENDINGS = ("~", ".bak", ".orig", ".swp", ".swo", ".tmp")

LeftOut = Counter[str]  # number of files by reason


def is_hidden(name: PurePath) -> bool:
    """Return whether the file or one of its directories is hidden: ._x of macOS, .ipynb_checkpoints, .git."""
    return any(part.startswith(".") and part != ".." for part in name.parts)


def is_copy(name: PurePath) -> bool:
    """Return whether an editor or an unpacked archive made the file: x~, x.bak, #x#, __MACOSX/x."""
    last = name.name
    return last.endswith(_COPY_ENDINGS) or (last[:1] == last[-1:] == "#") or "__MACOSX" in name.parts


def files_below(root: Path, left_out: LeftOut, field: str) -> list[Path]:
    """Return the files below a directory, sorted, each once; links are followed. Adds to `left_out`.

    Raises ConfigError about `field` for a directory that cannot be read and a link that leads nowhere.
    """
    kept = []
    below = walk(root, field, left_out, hidden=True)
    for path in sorted(directory / name for directory, names in below for name in names):
        name = path.relative_to(root)
        if is_hidden(name):
            left_out[HIDDEN] += 1
        elif is_copy(name):
            left_out[COPY] += 1
        elif path.is_symlink() and not path.exists():
            why = f"{path} is a link to {os.readlink(path)}, which does not exist"
            raise ConfigError(field, root, why, f"delete the link {path}, or restore the file")
        elif not path.is_file():
            left_out[NOT_A_FILE] += 1
        else:
            kept.append(path)
    return first_of_each(kept, left_out)


def not_held_out(
    paths: Iterable[Path], held_out: Iterable[Path], field: str, pattern: str, left_out: LeftOut
) -> list[Path]:
    """Return the training files that are no files of validation or test; count the others in `left_out`.

    Files are compared by their real paths. `pattern` is the value of `field`, which named `paths`.
    Raises ConfigError if no file is left.
    """
    held, named = set(map(os.path.realpath, held_out)), list(paths)
    kept = [path for path in named if os.path.realpath(path) not in held]
    if not kept:
        why = "all of these files are validation or test files, which are never trained on"
        remedy = f"{field}=PATTERN of files that data.validation and data.test do not name"
        raise ConfigError(field, pattern, why, remedy)
    left_out["files of data.validation or data.test"] += len(named) - len(kept)
    return kept


def first_of_each(paths: Iterable[Path], left_out: LeftOut) -> list[Path]:
    """Return the paths without those of a file that has come before, by a link or a second glob."""
    first: dict[tuple[int, int], Path] = {}
    for path in paths:
        status = path.stat()
        if first.setdefault((status.st_dev, status.st_ino), path) is not path:
            left_out[TWICE] += 1
    return list(first.values())


def walk(root: Path, field: str, left_out: LeftOut, *, hidden: bool) -> Iterator[tuple[Path, list[str]]]:
    """Yield each directory from `root` on and the names in it that are not directories.

    Links to directories are followed. Each directory is read once, under a name without links if it has one.
    Hidden files and directories are passed over, unless `hidden`. Raises ConfigError about `field`.
    """
    visited: set[tuple[int, int]] = set()
    directories, links = [root], list[Path]()
    while directories or links:
        directory = directories.pop() if directories else links.pop(0)
        names = []
        try:
            status = directory.stat()
            if (status.st_dev, status.st_ino) in visited:
                left_out[DIRECTORY_TWICE] += 1
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(directory) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if not hidden and entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        (links if entry.is_symlink() else directories).append(directory / entry.name)
                    else:
                        names.append(entry.name)
        except OSError as error:
            why = f"{error.filename} cannot be read: {error.strerror}"
            remedy = f"a directory without {error.filename}, or the right to read it"
            raise ConfigError(field, root, why, remedy) from None
        yield directory, names


def matching(root: Path, pattern: str, field: str, left_out: LeftOut) -> Iterator[Path]:
    """Yield what a glob relative to `root` matches.

    ** enters each directory once. glob.glob follows links that lead back 40 times, which takes forever if a
    directory has two such links.
    """
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from (root / name for name in glob.glob(pattern, root_dir=root))
        return
    at = parts.index("**")
    before, after = parts[:at], os.path.join(*(parts[at + 1 :] or ("*",)))
    bases = [root / name for name in glob.glob(os.path.join(*before), root_dir=root)] if before else [root]
    for base in bases:
        if base.is_dir():
            for directory, _ in walk(base, field, left_out, hidden=False):
                yield from matching(directory, after, field, left_out)


def listed(counts: Mapping[str, int]) -> str:
    """Return the counts by reason for a message: `empty: 1, hidden: 2`."""
    return ", ".join(f"{reason}: {whole(count)}" for reason, count in sorted(counts.items()) if count)


def closest_directory(candidates: Iterable[Path]) -> Path | None:
    """Return the first candidate that is a directory to suggest files from, or None.

    The candidates climb from a path that does not exist. A directory that is shared, or that contains the
    working directory or the home directory, has files that are not the user's.
    """
    here = [Path.cwd(), Path(os.path.expanduser("~"))]
    for candidate in candidates:
        # os.path.isdir, because Path.is_dir raises inside a directory without permission to enter.
        if os.path.isdir(candidate) and os.access(candidate, os.R_OK | os.X_OK):
            real = Path(os.path.realpath(candidate))
            contains_us = any(real in path.parents for path in here)
            return None if contains_us or real.stat().st_mode & stat.S_ISVTX else candidate
    return None


def prepare_commands(source: Path) -> str:
    """Return the commands that train on text that only `launcher prepare` reads."""
    name = source.name.partition(".")[0] or "web"
    target = f"corpora/{name}"
    train = shlex.join(["launcher", "data=tokens", typed_text("data.train", target)])
    return f"{shlex.join(['launcher', 'prepare', str(source), target])}; then {train}"
