"""Find the files of a text corpus, split them into training and validation, and read their bytes.

Tokens are bytes. A zero byte, which text does not contain, ends each file.
The result does not depend on the order in which a file system lists its entries.
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

# Directories that differ between machines: installed packages, and parts of the standard library that
# Linux distributions package separately or leave out. Python 3.13 removed lib2to3.
_EXCLUDED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
)


@dataclass(frozen=True, eq=False)  # eq: arrays have no single truth value
class Corpus:
    """The training and validation text as byte tokens: read-only uint8 arrays of shape (tokens,)."""

    train: npt.NDArray[np.uint8]
    validation: npt.NDArray[np.uint8]

    def digest(self) -> str:
        """Return a digest of the training tokens, which does not depend on the path of the files."""
        return f"{len(self.train)}-{zlib.crc32(self.train.data):08x}"


@dataclass(frozen=True, order=True)
class _TextFile:
    """A file of the corpus; its `name` decides its order and its part (training or validation)."""

    name: str  # POSIX path relative to the root of the search, so a corpus that is moved keeps its split
    path: Path


def corpus_files(data: DataConfig) -> tuple[list[Path], list[Path]]:
    """Return the files of (train, validation), each in corpus order, without reading their content.

    The lists are disjoint, with one exception: a single file without a validation glob is in both lists, and
    `load_corpus` then splits its bytes. Files that `data.validation` matches are never trained on.
    Raises ConfigError if a field matches no usable file or a file cannot be read.
    """
    if data.source is CorpusSource.stdlib:
        candidates = _stdlib_files()
    else:
        assert data.train is not None, "validated with the config"
        candidates = _text_files("data.train", data.train)
    if data.validation is None:
        train, validation = _split(candidates, data.validation_fraction)
    else:
        validation = _text_files("data.validation", data.validation)
        train = _without(candidates, validation, data.validation)
    return [file.path for file in train], [file.path for file in validation]


def token_counts(data: DataConfig) -> tuple[int, int]:
    """Return the number of tokens of (train, validation) from file sizes. Raises ConfigError."""
    train, validation = corpus_files(data)
    if train == validation:
        total = _token_count(train)
        cut = _tail_start(total, data.validation_fraction)
        return cut, total - cut
    return _token_count(train), _token_count(validation)


def load_corpus(data: DataConfig) -> Corpus:
    """Return the tokens of all files; a zero byte follows the text of each file.

    If the corpus is a single file without a validation glob, the last `data.validation_fraction` of its
    tokens is the validation part. Raises ConfigError as `corpus_files` does.
    """
    train, validation = corpus_files(data)
    if train == validation:
        tokens = _read(train)
        cut = _tail_start(len(tokens), data.validation_fraction)
        return Corpus(train=tokens[:cut], validation=tokens[cut:])
    return Corpus(train=_read(train), validation=_read(validation))


def _stdlib_files() -> list[_TextFile]:
    root, value = Path(sysconfig.get_paths()["stdlib"]), CorpusSource.stdlib.value
    files = _usable(_walk_python(root), "data.source", value)
    if not files:
        why = f"this Python installation has no source files in {root}"
        # Quoted for both the shell and Hydra's grammar, like every glob in a message.
        raise ConfigError("data.source", value, why, "data=text 'data.train=\"corpus/**/*.txt\"'")
    return files


def _walk_python(root: Path) -> Iterator[_TextFile]:
    for directory, subdirectories, names in os.walk(root):
        # Changed in place: os.walk descends only into the directories that stay in this list.
        subdirectories[:] = [name for name in subdirectories if name not in _EXCLUDED_DIRECTORIES]
        for path in (Path(directory, name) for name in names if name.endswith(".py")):
            yield _TextFile(path.relative_to(root).as_posix(), path)


def _text_files(field: str, pattern: str) -> list[_TextFile]:
    root, relative = _fixed_root(pattern)
    matches = glob.glob(relative, root_dir=root, recursive=True)
    files = _usable((_TextFile(Path(name).as_posix(), root / name) for name in matches), field, pattern)
    if not files:
        empty = any(os.path.isfile(root / name) for name in matches)
        why = "every matched file is empty" if empty else "the glob matches no file"
        why += f" (searched in {Path.cwd() / root})"
        raise ConfigError(field, pattern, why, _glob_remedy(field, pattern, root))
    return files


def _fixed_root(pattern: str) -> tuple[Path, str]:
    """Return the leading directories of a glob without wildcards, and the rest of the glob."""
    parts = Path(os.path.expanduser(pattern)).parts
    directories = parts[:-1]
    fixed = next((i for i, part in enumerate(directories) if glob.has_magic(part)), len(directories))
    return Path(*parts[:fixed]), os.path.join("", *parts[fixed:])


def _glob_remedy(field: str, pattern: str, root: Path) -> str:
    """Return a setting with a glob that matches files in the closest existing directory.

    Only that directory is listed, not its subdirectories: the tree may be a whole disk.
    """
    candidates = (Path(os.path.expanduser(pattern)), root, *root.parents)
    directory = next((candidate for candidate in candidates if _is_listable(candidate)), Path())
    suffixes = Counter(entry.suffix for entry in directory.iterdir() if _holds_text(entry))
    if not suffixes:
        return f"'{field}=\"{directory / '**' / '*.txt'}\"' or another glob that matches files with text"
    suffix, count = min(suffixes.items(), key=lambda item: (-item[1], item[0]))
    matching = Path(glob.escape(str(directory)), f"*{suffix}")
    return f"'{field}=\"{matching}\"' ({plural(count, 'file')})"


def _is_listable(directory: Path) -> bool:
    # os.path.isdir, because Path.is_dir raises inside a directory without permission to enter.
    return os.path.isdir(directory) and os.access(directory, os.R_OK | os.X_OK)


def _holds_text(entry: Path) -> bool:
    # A wildcard does not match a leading dot.
    return not entry.name.startswith(".") and os.path.isfile(entry) and os.path.getsize(entry) > 0


def _usable(candidates: Iterable[_TextFile], field: str, value: str) -> list[_TextFile]:
    """Return the non-empty regular files, without duplicates, in corpus order.

    Raises ConfigError for a file that cannot be read. If such a file were left out, the run would train on
    another corpus than `field` names, and nodes with different permissions would train on different corpora.
    """
    usable = []
    for file in sorted(set(candidates)):
        try:
            status = os.stat(file.path)
            if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
                continue
            if not os.access(file.path, os.R_OK):
                raise PermissionError("permission denied")
        except OSError as error:
            why = f"{file.path} cannot be read: {error.strerror or error}"
            remedy = f"make {file.path} readable, or set {field} to files without it"
            raise ConfigError(field, value, why, remedy) from error
        usable.append(file)
    return usable


def _split(files: list[_TextFile], fraction: float) -> tuple[list[_TextFile], list[_TextFile]]:
    """Return the files as (train, validation), split by a hash of each file's name.

    A file that is added later does not move other files. Exception: if a part would be empty, the file whose
    hash is closest to that part moves into it.
    """
    if len(files) == 1:
        return files, files
    ranked = sorted(files, key=lambda file: split_key(file.name))
    held_out = sum(split_key(file.name) < fraction for file in ranked)
    held_out = min(max(held_out, 1), len(files) - 1)
    return sorted(ranked[held_out:]), sorted(ranked[:held_out])


def split_key(name: str) -> float:
    """Return a hash of `name` in [0, 1), uniformly distributed over names."""
    # surrogateescape: a Linux file name may be bytes that are not UTF-8, and it must be hashed as well.
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    # 53 bits: exactly a double's mantissa, so the quotient is exact and below 1.
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _without(files: list[_TextFile], held_out: list[_TextFile], pattern: str) -> list[_TextFile]:
    """Return the files whose real path is not held out: two globs may reach a file by two names."""
    held_out_paths = {os.path.realpath(file.path) for file in held_out}
    remaining = [file for file in files if os.path.realpath(file.path) not in held_out_paths]
    if not remaining:
        why = "it matches every training file, and validation files are never trained on"
        remedy = "data.validation=null (holds out data.validation_fraction of the training files)"
        raise ConfigError("data.validation", pattern, why, remedy)
    return remaining


def _token_count(files: list[Path]) -> int:
    return sum(path.stat().st_size + len(_END) for path in files)


def _tail_start(tokens: int, fraction: float) -> int:
    return tokens - max(1, int(tokens * fraction))


def _read(files: list[Path]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(path.read_bytes() + _END for path in files), dtype=np.uint8)
