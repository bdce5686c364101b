"""Find the files of a text corpus, split them into training and validation, and read their bytes.

Tokens are the bytes of the text as UTF-8, without a byte order mark. A zero byte ends each file. A file that
contains a zero byte is refused, because the text behind it would be another document.
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
from launcher.data.input_files import (
    COPY,
    EMPTY,
    NOT_A_FILE,
    TWICE,
    LeftOut,
    closest_directory,
    is_copy,
    matching,
    prepare_commands,
)
from launcher.data.reading import COMPRESSED, encoding_of
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


def tokens_digest(tokens: npt.NDArray[np.uint8]) -> str:
    """Return a digest of the tokens, which does not depend on the path of the files."""
    return f"{len(tokens)}-{zlib.crc32(tokens.data):08x}"


@dataclass(frozen=True, order=True)
class _TextFile:
    """A file of the corpus; its `name` decides its order and its part (training or validation)."""

    name: str  # POSIX path relative to the root of the search, so a corpus that is moved keeps its split
    path: Path


def corpus_files(data: DataConfig, left_out: LeftOut | None = None) -> tuple[list[Path], list[Path]]:
    """Return the files of (train, validation), each in corpus order, without reading their content.

    The lists are disjoint, with one exception: a single file without a validation glob is in both lists, and
    `load_corpus` then splits its bytes. Files that `data.validation` matches are never trained on.
    Adds the number of files that are not read to `left_out`, by reason.
    Raises ConfigError if a field matches no usable file or a file cannot be read.
    """
    left_out = Counter() if left_out is None else left_out
    if data.source is CorpusSource.stdlib:
        candidates = _stdlib_files()
    else:
        assert data.train is not None, "validated with the config"
        candidates = _text_files("data.train", data.train, left_out)
    if data.validation is None:
        train, validation = _split(candidates, data.validation_fraction)
    else:
        validation = _text_files("data.validation", data.validation, left_out)
        train = _without(candidates, validation, data.validation)
        left_out["files of data.validation"] += len(candidates) - len(train)
    return [file.path for file in train], [file.path for file in validation]


def token_counts(data: DataConfig, left_out: LeftOut) -> tuple[int, int]:
    """Return the number of tokens of (train, validation); reads the files. Raises ConfigError."""
    train, validation = corpus_files(data, left_out)
    if train == validation:
        total = sum(map(len, _documents("data.train", train)))
        cut = _tail_start(total, data.validation_fraction)
        return cut, total - cut
    train_tokens = sum(map(len, _documents("data.train", train)))
    return train_tokens, sum(map(len, _documents("data.validation", validation)))


def load_corpus(data: DataConfig) -> Corpus:
    """Return the tokens of all files; a zero byte follows the text of each file.

    If the corpus is a single file without a validation glob, the last `data.validation_fraction` of its
    tokens is the validation part. Raises ConfigError as `corpus_files` does.
    """
    train, validation = corpus_files(data)
    tokens = np.frombuffer(b"".join(_documents("data.train", train)), dtype=np.uint8)
    if train == validation:
        cut = _tail_start(len(tokens), data.validation_fraction)
        return Corpus(train=tokens[:cut], validation=tokens[cut:])
    held_out = np.frombuffer(b"".join(_documents("data.validation", validation)), dtype=np.uint8)
    return Corpus(train=tokens, validation=held_out)


def text_documents(field: str, pattern: str, left_out: LeftOut) -> Iterator[bytes]:
    """Yield the text of each file that `pattern`, the value of `field`, names, as UTF-8 and without its end.

    Raises ConfigError as corpus_files does.
    """
    files = [file.path for file in _text_files(field, pattern, left_out)]
    return (document.removesuffix(_END) for document in _documents(field, files))


def _stdlib_files() -> list[_TextFile]:
    root, value = Path(sysconfig.get_paths()["stdlib"]), CorpusSource.stdlib.value
    files = _usable(_walk_python(root), "data.source", value, Counter())
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


def _text_files(field: str, pattern: str, left_out: LeftOut) -> list[_TextFile]:
    root, relative = _fixed_root(pattern)
    matches = list(matching(root, relative, field, left_out))
    candidates = [_TextFile(path.relative_to(root).as_posix(), path) for path in matches]
    if not is_copy(Path(pattern)):
        kept = [file for file in candidates if not is_copy(Path(file.name)) or file.path.is_dir()]
        left_out[COPY] += len(candidates) - len(kept)
        candidates = kept
    files = _usable(candidates, field, pattern, left_out)
    _refuse_other_formats(files, field, pattern, root)
    if not files:
        empty = any(map(os.path.isfile, matches))
        why = "every matched file is empty" if empty else "the glob matches no file"
        why += f" (searched in {Path.cwd() / root})"
        raise ConfigError(field, pattern, why, _glob_remedy(field, pattern, root))
    return files


def _refuse_other_formats(files: list[_TextFile], field: str, pattern: str, root: Path) -> None:
    """Raise ConfigError for files that only `launcher prepare` reads."""
    endings = {file.path.suffix.lower() for file in files}
    # JSON among other files may be source text.
    refused = next((file.path for file in files if _needs_prepare(file.path)), None)
    if endings == {".json"}:
        refused = files[0].path
    if refused is not None:
        source = root if glob.has_magic(pattern) else refused
        kind = "compressed" if refused.suffix.lower() in COMPRESSED else "a file of records"
        why = f"{refused} is {kind}, and data=text trains on the bytes of files as they are"
        raise ConfigError(field, pattern, why, prepare_commands(source))


def _needs_prepare(path: Path) -> bool:
    return path.suffix.lower() in (*COMPRESSED, ".jsonl", ".ndjson", ".parquet")


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
    directory = closest_directory((Path(os.path.expanduser(pattern)), root, *root.parents))
    entries = sorted(filter(_holds_text, directory.iterdir())) if directory else []
    suffixes = Counter(entry.suffix for entry in entries if not _needs_prepare(entry))
    if directory and not suffixes and entries:
        # The working directory has more than this corpus.
        return prepare_commands(entries[0] if directory.samefile(".") else directory)
    if not suffixes:
        # In a directory without text, or outside the user's directories: a glob to adapt.
        example = directory or Path("corpus")
        return f"'{field}=\"{example / '**' / '*.txt'}\"' or another glob that matches files with text"
    suffix, count = min(suffixes.items(), key=lambda item: (-item[1], item[0]))
    matching = Path(glob.escape(str(directory)), f"*{suffix}")
    return f"'{field}=\"{matching}\"' ({plural(count, 'file')})"


def _holds_text(entry: Path) -> bool:
    # A wildcard does not match a leading dot.
    return (
        not entry.name.startswith(".")
        and not is_copy(entry)
        and os.path.isfile(entry)
        and os.path.getsize(entry) > 0
    )


def _usable(candidates: Iterable[_TextFile], field: str, value: str, left_out: LeftOut) -> list[_TextFile]:
    """Return the non-empty regular files, each once, in corpus order; count the others in `left_out`.

    Raises ConfigError for a file that cannot be read. If such a file were left out, the run would train on
    another corpus than `field` names, and nodes with different permissions would train on different corpora.
    """
    usable: dict[tuple[int, int], _TextFile] = {}
    for file in sorted(set(candidates)):
        try:
            status = os.stat(file.path)
            if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
                if not stat.S_ISDIR(status.st_mode):
                    left_out[EMPTY if stat.S_ISREG(status.st_mode) else NOT_A_FILE] += 1
                continue
            if not os.access(file.path, os.R_OK):
                raise PermissionError("permission denied")
        except OSError as error:
            why = f"{file.path} cannot be read: {error.strerror or error}"
            remedy = f"make {file.path} readable, or set {field} to files without it"
            raise ConfigError(field, value, why, remedy) from error
        left_out[TWICE] += usable.setdefault((status.st_dev, status.st_ino), file) is not file
    return list(usable.values())


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


def _tail_start(tokens: int, fraction: float) -> int:
    return tokens - max(1, int(tokens * fraction))


def _documents(field: str, files: list[Path]) -> Iterator[bytes]:
    """Yield the text of each file as UTF-8, and the byte that ends it. Raises ConfigError about `field`."""
    for path in files:
        text = path.read_bytes()
        encoding, mark = encoding_of(text[:4])
        if encoding != "utf-8":
            try:
                text = text.decode(encoding).encode()
            except UnicodeError as error:
                why = f"{path} begins as {encoding.upper()}, but its text is not valid: {error}"
                raise ConfigError(field, str(path), why, f"{field} set to files without {path}") from None
        else:
            text = text[mark:]
        if (place := text.find(_END)) >= 0:
            why = f"{path} contains a zero byte (byte {place}), the token that ends a document"
            remedy = "UTF-8 files without zero bytes (UTF-16 needs a byte order mark)"
            raise ConfigError(field, str(path), why, remedy)
        yield text + _END
