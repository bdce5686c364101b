"""Find input files in directories, and count the files that are left out, by reason.

Copies that a system or an editor makes beside a file, and files that are reached by two names, would add text
that nobody asked for. They are left out, and every command that leaves files out prints the counts.
"""

import os
import shlex
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath

from launcher.config.errors import ConfigError, typed_text
from launcher.text import whole

HIDDEN, COPY, TWICE, EMPTY = "hidden", "backup copies", "the same file by another name", "empty"
NOT_A_FILE = "not regular files"
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
    for path in sorted(_walk(root, field)):
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


def first_of_each(paths: Iterable[Path], left_out: LeftOut) -> list[Path]:
    """Return the paths without those of a file that has come before, by a link or a second glob."""
    first: dict[tuple[int, int], Path] = {}
    for path in paths:
        status = path.stat()
        if first.setdefault((status.st_dev, status.st_ino), path) is not path:
            left_out[TWICE] += 1
    return list(first.values())


def _walk(root: Path, field: str) -> Iterator[Path]:
    """Yield what is below a directory except directories. A link to a directory above it is not followed."""

    def refuse(error: OSError) -> None:
        why = f"{error.filename} cannot be read: {error.strerror}"
        raise ConfigError(field, root, why, f"a directory without {error.filename}, or the right to read it")

    for directory, subdirectories, names in os.walk(root, onerror=refuse, followlinks=True):
        above = os.path.realpath(directory)
        subdirectories[:] = [
            name
            for name in subdirectories
            if not os.path.islink(link := os.path.join(directory, name))
            or os.path.commonpath([above, target := os.path.realpath(link)]) != target
        ]
        yield from (Path(directory, name) for name in names)


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
    """Return what to type to train on text that only `launcher prepare` reads."""
    name = source.name.partition(".")[0] or "web"
    target = f"corpora/{name}"
    train = shlex.join(["launcher", "data=tokens", typed_text("data.train", target)])
    return f"{shlex.join(['launcher', 'prepare', str(source), target])}; then {train}"
