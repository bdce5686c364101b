"""Which files are the corpus, how they are split, and their bytes.

Tokens are bytes. A zero byte, which text does not contain, ends each file.
Nothing here depends on the order in which a file system lists its entries.
"""

import glob
import hashlib
import os
import stat
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from launcher.config.errors import ConfigError
from launcher.config.schema import CorpusSource, DataConfig
from launcher.config.shape import END_OF_TEXT
from launcher.text import plural

_END = bytes([END_OF_TEXT])

# Quoted for a shell and for Hydra's grammar both, as every glob shown to the user is.
_EXAMPLE_GLOB = "'data.train=\"corpus/**/*.txt\"'"

# What differs between machines: installed packages, and the parts that distributions package
# apart or leave out. lib2to3 is gone from Python 3.13.
_NOT_STDLIB = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
)


@dataclass(frozen=True, eq=False)  # eq: arrays have no single truth value
class Corpus:
    """Both parts as byte tokens: uint8, shapes (train tokens,) and (validation tokens,); read-only."""

    train: npt.NDArray[np.uint8]
    validation: npt.NDArray[np.uint8]

    def digest(self) -> str:
        """Of the training tokens: the same for the same text, wherever it lies."""
        return f"{len(self.train)}-{zlib.crc32(self.train.data):08x}"


@dataclass(frozen=True, order=True)
class _Named:
    """A file and its posix path relative to where the search began, which orders and splits the corpus.

    The relative path, so that a corpus moved to another directory is still the same corpus.
    """

    name: str
    path: Path


def corpus_files(data: DataConfig) -> tuple[list[Path], list[Path]]:
    """The files of (train, validation), each in corpus order; no file's content is read.

    Disjoint, except that a single file without a validation glob is in both lists:
    `load_corpus` then splits its bytes. Files that `data.validation` matches are never trained on.
    """
    found = _training_candidates(data)
    if data.validation is None:
        train, validation = _split(found, _checked_fraction(data))
    else:
        validation = _text_files("data.validation", data.validation)
        train = _without(found, validation, data.validation)
    return [file.path for file in train], [file.path for file in validation]


def token_counts(data: DataConfig) -> tuple[int, int]:
    """The tokens `load_corpus` would give (train, validation), from file sizes alone."""
    train, validation = corpus_files(data)
    if train == validation:
        total = _token_count(train)
        cut = _tail_start(total, data.validation_fraction)
        return cut, total - cut
    return _token_count(train), _token_count(validation)


def load_corpus(data: DataConfig) -> Corpus:
    """Read every file, ending each with a zero byte.

    A single file without a validation glob gives its last `validation_fraction` to validation.
    """
    train, validation = corpus_files(data)
    if train == validation:
        tokens = _read(train)
        cut = _tail_start(len(tokens), data.validation_fraction)
        return Corpus(train=tokens[:cut], validation=tokens[cut:])
    return Corpus(train=_read(train), validation=_read(validation))


def _training_candidates(data: DataConfig) -> list[_Named]:
    if data.source is CorpusSource.stdlib:
        if data.train is not None:
            raise ConfigError(
                "data.train",
                data.train,
                "data.source=stdlib has its files already",
                "data=text, or data.train=null",
            )
        return _stdlib_files()
    if data.train is None:
        raise ConfigError(
            "data.train", None, "data.source=text reads your own files; none are named", _EXAMPLE_GLOB
        )
    return _text_files("data.train", data.train)


def _stdlib_files() -> list[_Named]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _usable(_walk_python(root), "data.source", CorpusSource.stdlib.value)
    if not files:
        raise ConfigError(
            "data.source",
            CorpusSource.stdlib.value,
            f"this Python keeps no source text in {root}",
            f"data=text {_EXAMPLE_GLOB}",
        )
    return files


def _walk_python(root: Path) -> Iterator[_Named]:
    for directory, subdirectories, names in os.walk(root):
        # In place: this is how os.walk is told not to descend.
        subdirectories[:] = [name for name in subdirectories if name not in _NOT_STDLIB]
        for name in names:
            if name.endswith(".py"):
                path = Path(directory, name)
                yield _Named(path.relative_to(root).as_posix(), path)


def _text_files(field: str, pattern: str) -> list[_Named]:
    root, relative = _fixed_root(pattern)
    matches = glob.glob(relative, root_dir=root, recursive=True)
    files = _usable((_Named(Path(name).as_posix(), root / name) for name in matches), field, pattern)
    if not files:
        why = "every file it matches is empty" if _matches_files(root, matches) else "matches no file"
        raise ConfigError(
            field, pattern, f"{why} (looked in {Path.cwd() / root})", _nearest(field, pattern, root)
        )
    return files


def _fixed_root(pattern: str) -> tuple[Path, str]:
    """The leading directories of a glob that hold no wildcard, and the rest of it."""
    parts = Path(os.path.expanduser(pattern)).parts
    directories = parts[:-1]
    fixed = next((i for i, part in enumerate(directories) if glob.has_magic(part)), len(directories))
    return Path(*parts[:fixed]), os.path.join("", *parts[fixed:])


def _matches_files(root: Path, matches: Iterable[str]) -> bool:
    return any(os.path.isfile(root / name) for name in matches)


def _nearest(field: str, pattern: str, root: Path) -> str:
    """A glob that does match, looking no deeper than one directory: the tree may be a whole disk."""
    candidates = (Path(os.path.expanduser(pattern)), root, *root.parents)
    place = next((place for place in candidates if _is_listable(place)), Path())
    kinds = Counter(entry.suffix for entry in place.iterdir() if _holds_text(entry))
    if not kinds:
        return f"a glob that matches a file with text in it, such as '{field}=\"{place / '**' / '*.txt'}\"'"
    suffix, count = min(kinds.items(), key=lambda kind: (-kind[1], kind[0]))
    nearest = Path(glob.escape(str(place)), f"*{suffix}")
    return f"'{field}=\"{nearest}\"' ({plural(count, 'file')})"


def _is_listable(place: Path) -> bool:
    # os.path and not Path.is_dir: the latter raises below a directory that may not be entered.
    return os.path.isdir(place) and os.access(place, os.R_OK | os.X_OK)


def _holds_text(entry: Path) -> bool:
    # A wildcard does not match a leading dot.
    return not entry.name.startswith(".") and os.path.isfile(entry) and os.path.getsize(entry) > 0


def _usable(candidates: Iterable[_Named], field: str, value: str) -> list[_Named]:
    """The non-empty regular files, in corpus order, each once.

    A file that cannot be read refuses the run: leaving it out would train on another corpus
    than the one named, and not on the same one on every node.
    """
    usable = []
    for file in sorted(set(candidates)):
        try:
            status = os.stat(file.path)
        except OSError as error:
            raise _unreadable(field, value, file.path, error.strerror or str(error)) from error
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            continue
        if not os.access(file.path, os.R_OK):
            raise _unreadable(field, value, file.path, "permission denied")
        usable.append(file)
    return usable


def _unreadable(field: str, value: str, path: Path, reason: str) -> ConfigError:
    remedy = f"make {path} readable, or choose files that leave it out"
    return ConfigError(field, value, f"{path} cannot be read: {reason}", remedy)


def _checked_fraction(data: DataConfig) -> float:
    if not 0 < data.validation_fraction < 1:
        raise ConfigError(
            "data.validation_fraction",
            data.validation_fraction,
            "the share of the training files to hold out lies between 0 and 1, neither included",
            "data.validation_fraction=0.05",
        )
    return data.validation_fraction


def _split(files: list[_Named], fraction: float) -> tuple[list[_Named], list[_Named]]:
    """Split by file, each by its name alone: a file added later moves none of the others.

    The exception is a part that would be empty, which takes the file nearest to its side.
    """
    if len(files) == 1:
        return files, files
    ranked = sorted(files, key=lambda file: split_key(file.name))
    held_out = sum(split_key(file.name) < fraction for file in ranked)
    held_out = min(max(held_out, 1), len(files) - 1)
    return sorted(ranked[held_out:]), sorted(ranked[:held_out])


def split_key(name: str) -> float:
    """In [0, 1), uniform over names."""
    # surrogateescape: on Linux a file name is any bytes, and those that are not UTF-8 still have to hash.
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    # 53 bits: exactly a double's mantissa, so the quotient is exact and below 1.
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _without(files: list[_Named], held_out: list[_Named], pattern: str) -> list[_Named]:
    """The files not held out, compared by real path: globs may reach one file by two names."""
    held_out_paths = {os.path.realpath(file.path) for file in held_out}
    left = [file for file in files if os.path.realpath(file.path) not in held_out_paths]
    if not left:
        raise ConfigError(
            "data.validation",
            pattern,
            "holds every training file, and what is validated on is never trained on",
            "data.validation=null, which holds out data.validation_fraction of the training files",
        )
    return left


def _token_count(files: list[Path]) -> int:
    return sum(path.stat().st_size + len(_END) for path in files)


def _tail_start(tokens: int, fraction: float) -> int:
    return tokens - max(1, int(tokens * fraction))


def _read(files: list[Path]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(path.read_bytes() + _END for path in files), dtype=np.uint8)
