"""Read and write token files: Megatron-LM's indexed dataset, which GPT-NeoX and NeMo read as well.

NAME.bin, which is memory-mapped, contains the token ids, sequence after sequence. NAME.idx, little-endian,
states where the sequences and documents begin (megatron/core/datasets/indexed_dataset.py):

    MMIDIDX\\0\\0       9 bytes
    version           uint64: 1
    dtype             uint8: a key of DTYPES
    sequences         uint64: n, the number of sequences
    documents         uint64: m, the number of documents plus 1
    lengths           int32 (n,): tokens of each sequence
    pointers          int64 (n,): the byte of NAME.bin where each sequence begins
    document indices  int64 (m,): the first sequence of each document, and n at the end
    modes             int8 (n,): only in multimodal datasets; not read
"""

import errno
import hashlib
import mmap
import os
import resource
import struct
import threading
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from launcher.files import sync

MAGIC = b"MMIDIDX\x00\x00"
DTYPES: dict[int, str] = {
    1: "uint8",
    2: "int8",
    3: "int16",
    4: "int32",
    5: "int64",
    6: "float64",
    7: "float32",
    8: "uint16",
}
_HEADER = struct.Struct("<9sQBQQ")
# The check of the order of sequences reads 64 stretches of 4,096 index entries; up to 262,144 entries, all.
_STRETCHES, _STRETCH = 64, 2**12
_CHUNK = 2**20  # sequences per write of the index

Array = npt.NDArray[Any]


class TokenFileError(Exception):
    """Raised for a token file that cannot be used; names the file and says what is wrong with it."""

    def __init__(self, path: Path, why: str) -> None:
        self.path, self.why = path, why
        super().__init__(f"{path} {why}")


class _Maps:
    """The files that are memory-mapped. The file that was used longest ago is unmapped for another file.

    Each map keeps a file descriptor, and a process may have as few as 1,024. The limit is raised as far as
    the system allows; beyond it, files are mapped again when they are read.
    """

    def __init__(self) -> None:
        self._maps: OrderedDict[Path, Array] = OrderedDict()
        self._lock = threading.Lock()  # several threads read batches
        self._most = 0

    def map(self, path: Path) -> Array:
        """Return the bytes of a file. Raises TokenFileError if it cannot be mapped."""
        with self._lock:
            if path not in self._maps:
                if len(self._maps) >= self._most:
                    self._most = _files_that_may_be_mapped(len(self._maps) + 1)
                while len(self._maps) >= self._most:
                    self._maps.popitem(last=False)  # arrays that are in use keep the map alive
                self._maps[path] = self._mapped(path)
            self._maps.move_to_end(path)
            return self._maps[path]

    def _mapped(self, path: Path) -> Array:
        try:
            mapped = np.memmap(path, np.uint8, mode="r")
            if path.suffix == ".bin":
                # Without the kernel's read-ahead: windows are read in random order (`MappedTokens.fetch`).
                mapped._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
            return mapped
        except OSError as error:
            if error.errno != errno.EMFILE or not self._maps:
                raise TokenFileError(path, f"cannot be read: {error.strerror}") from None
            # Other parts of the process use more descriptors than expected.
            self._maps.clear()
            self._most = max(1, self._most // 2)
            return self._mapped(path)

    def forget(self, *paths: Path) -> None:
        """Unmap files that are opened again, because they may be other files by now."""
        with self._lock:
            for path in paths:
                self._maps.pop(path, None)


def _files_that_may_be_mapped(wanted: int) -> int:
    """Return how many files may be mapped: a third of the limit on open files, which is raised if needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft // 3 < wanted and soft < most:
        soft = min(most, max(2 * soft, 3 * wanted))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, (_MOST_OPEN_FILES if soft == resource.RLIM_INFINITY else soft) // 3)


_MOST_OPEN_FILES = 3 * 2**14  # the kernel allows 65,530 maps per process by default
_MAPS = _Maps()


@dataclass(frozen=True)
class TokenFile:
    """NAME.bin and NAME.idx, memory-mapped. Opening them reads a few pages, whatever their size."""

    prefix: Path  # the path without .bin or .idx
    dtype: np.dtype[Any]  # of the token ids
    bin_size: int  # bytes
    sequences: int
    num_documents: int

    @property
    def tokens(self) -> Array:
        """The token ids (tokens,)."""
        if self.bin_size == 0 or self.bin_size % self.dtype.itemsize:
            return np.empty(0, self.dtype)
        return _MAPS.map(bin_path(self.prefix)).view(self.dtype)

    @property
    def mask(self) -> Array:
        """A byte per token (tokens,): 1 for tokens that are learned. Only files of conversations have it."""
        return _MAPS.map(mask_path(self.prefix))

    @property
    def lengths(self) -> Array:
        """The tokens of each sequence (sequences,)."""
        return self._section(_HEADER.size, self.sequences, "<i4")

    @property
    def pointers(self) -> Array:
        """The byte of NAME.bin where each sequence begins (sequences,)."""
        return self._section(_HEADER.size + 4 * self.sequences, self.sequences, "<i8")

    @property
    def documents(self) -> Array:
        """The first sequence of each document, and the number of sequences (documents + 1,)."""
        return self._section(_HEADER.size + 12 * self.sequences, self.num_documents + 1, "<i8")

    def _section(self, start: int, count: int, code: str) -> Array:
        index = _MAPS.map(index_path(self.prefix))
        return index[start : start + count * np.dtype(code).itemsize].view(code)

    @property
    def num_tokens(self) -> int:
        return self.bin_size // self.dtype.itemsize

    def document_start(self, document: int) -> int:
        """Return the index of the document's first token; for `num_documents`, the number of tokens."""
        sequence = int(self.documents[document])
        at_end = sequence == self.sequences
        return self.num_tokens if at_end else int(self.pointers[sequence]) // self.dtype.itemsize

    def document(self, document: int) -> Array:
        """Return the tokens (length,) of a document."""
        return self.tokens[self.document_start(document) : self.document_start(document + 1)]

    def boundary_near(self, token: int) -> int:
        """Return the start of a document, or the end of the file, that is closest to token index `token`."""
        after = bisect_left(range(self.num_documents), token, key=self.document_start)
        candidates = [self.document_start(document) for document in (max(after - 1, 0), after)]
        return min(candidates, key=lambda start: abs(start - token))

    def digest(self) -> str:
        """Return a digest that identifies the content of the two files.

        It covers both file sizes, the first and last 64 KiB of the index, and 64 stretches of 4 KiB of the
        tokens. Only these 384 KiB are read, so a change of a few tokens may go unnoticed. Of a mask the size
        and 64 stretches of 4 KiB are covered.
        """
        digest = hashlib.sha256()
        files = [(index_path(self.prefix), 2, 2**16), (bin_path(self.prefix), 64, 2**12)]
        if mask_path(self.prefix).exists():
            files.append((mask_path(self.prefix), 64, 2**12))
        for path, stretches, length in files:
            size = path.stat().st_size
            digest.update(f"{size}/".encode())
            with path.open("rb") as file:
                for number in range(stretches):
                    file.seek(max(0, size - length) * number // (stretches - 1))
                    digest.update(file.read(length))
        return digest.hexdigest()[:16]


def bin_path(prefix: Path) -> Path:
    """Return the path of the tokens, NAME.bin."""
    return prefix.parent / f"{prefix.name}.bin"


def mask_path(prefix: Path) -> Path:
    """Return the path of the mask of conversations, NAME.mask."""
    return prefix.parent / f"{prefix.name}.mask"


def index_path(prefix: Path) -> Path:
    """Return the path of the index, NAME.idx."""
    return prefix.parent / f"{prefix.name}.idx"


def open_token_file(prefix: Path) -> TokenFile:
    """Map NAME.bin and NAME.idx.

    Raises TokenFileError if a file is missing, unreadable or cut short, or if the two do not belong together.
    The order of sequences and documents is checked for at most 262,144 entries of the index, in stretches
    that are evenly spaced. Everything else is checked completely.
    """
    index, tokens = index_path(prefix), bin_path(prefix)
    try:
        with index.open("rb") as file:
            header = file.read(_HEADER.size)
        index_size, bin_size = os.path.getsize(index), os.path.getsize(tokens)
        if not os.access(tokens, os.R_OK):
            raise TokenFileError(tokens, "cannot be read: permission denied")
    except OSError as error:
        raise TokenFileError(Path(error.filename), f"cannot be read: {error.strerror}") from None
    dtype, sequences, documents = _parse_header(index, header, index_size)
    _MAPS.forget(index, tokens, mask_path(prefix))
    token_file = TokenFile(prefix, dtype, bin_size, sequences, documents - 1)
    end = int(token_file.pointers[-1]) + int(token_file.lengths[-1]) * dtype.itemsize
    if end != bin_size:
        raise TokenFileError(tokens, f"has {bin_size} bytes, but {index.name} describes {end} bytes")
    if bin_size == 0:
        raise TokenFileError(tokens, "contains no tokens")
    _check_order(token_file)
    return token_file


def _parse_header(index: Path, header: bytes, index_size: int) -> tuple[np.dtype[Any], int, int]:
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise TokenFileError(index, "is not the index of a Megatron indexed dataset")
    _, version, code, sequences, documents = _HEADER.unpack(header)
    if version != 1:
        raise TokenFileError(index, f"has format version {version}, but only version 1 is supported")
    if code not in DTYPES:
        raise TokenFileError(index, f"has dtype code {code}, but only 1 to {max(DTYPES)} are defined")
    expected_size = _HEADER.size + 12 * sequences + 8 * documents
    if index_size not in (expected_size, expected_size + sequences):
        entries = f"{sequences} sequences and {documents} document indices"
        raise TokenFileError(index, f"has {index_size} bytes, but {entries} need {expected_size} bytes")
    if sequences == 0 or documents < 2:
        raise TokenFileError(index, "contains no sequence")
    return np.dtype(DTYPES[code]).newbyteorder("<"), sequences, documents


class MappedTokens:
    """The token ids [start, end) of a token file, which is memory-mapped when they are read."""

    def __init__(self, file: TokenFile, start: int, end: int) -> None:
        self.file, self.start, self.end = file, start, end

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, part: slice) -> Array:
        start, end, step = part.indices(len(self))
        return self.file.tokens[self.start + start : self.start + end : step]

    def __iter__(self) -> Iterator[Any]:
        return iter(self[:])

    def fetch(self, first: int, count: int) -> None:
        """Ask the kernel to start reading `count` token ids from index `first` on.

        Without this call, the reads of the pages would wait for each other.
        """
        size = self.file.dtype.itemsize
        start, end = (self.start + first) * size, (self.start + first + count) * size
        aligned = start // mmap.PAGESIZE * mmap.PAGESIZE
        self.file.tokens._mmap.madvise(mmap.MADV_WILLNEED, aligned, end - aligned)  # type: ignore[attr-defined]


def _check_order(file: TokenFile) -> None:
    index, itemsize = index_path(file.prefix), np.int64(file.dtype.itemsize)
    for part in _checked_slices(len(file.lengths) - 1):
        ends = file.pointers[part] + file.lengths[part] * itemsize
        next_starts = file.pointers[part.start + 1 : part.stop + 1]
        wrong = ((ends != next_starts) | (file.lengths[part] < 0)).nonzero()[0]
        if wrong.size:
            why = f"sequence {part.start + int(wrong[0])} does not end where the next sequence begins"
            raise TokenFileError(index, f"is inconsistent: {why}")
    sequences, documents = len(file.lengths), file.documents
    rising = all(
        (documents[part] <= documents[part.start + 1 : part.stop + 1]).all()
        for part in _checked_slices(len(documents) - 1)
    )
    if int(file.pointers[0]) != 0 or file.lengths[-1] < 0:
        raise TokenFileError(index, "is inconsistent: the first sequence does not begin at byte 0")
    if int(file.documents[0]) != 0 or int(file.documents[-1]) != sequences or not rising:
        raise TokenFileError(index, f"has document indices that do not rise from 0 to {sequences}")


def _checked_slices(count: int) -> list[slice]:
    """Return slices that cover range(count), or 262,144 of its entries in evenly spaced stretches."""
    if count <= _STRETCHES * _STRETCH:
        return [slice(0, count)]
    starts = np.linspace(0, count - _STRETCH, _STRETCHES).astype(np.int64).tolist()
    return [slice(start, start + _STRETCH) for start in starts]


def smallest_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest dtype for token ids: uint8 for 256 ids, otherwise the dtype Megatron-LM chooses."""
    return np.dtype("<u1" if vocab_size <= 2**8 else "<u2" if vocab_size < 65500 else "<i4")


def write_index(path: Path, lengths: Array, dtype: np.dtype[Any]) -> None:
    """Write an .idx for documents of `lengths` (documents,) int32, which may be mapped, and sync it."""
    code = next(code for code, name in DTYPES.items() if np.dtype(name) == dtype)
    with path.open("wb") as file:
        file.write(_HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
        chunks = [slice(first, first + _CHUNK) for first in range(0, len(lengths), _CHUNK)]
        for part in chunks:
            file.write(lengths[part].astype("<i4").tobytes())
        start = 0
        for chunk in (lengths[part] for part in chunks):
            ends = start + np.cumsum(chunk, dtype=np.int64) * dtype.itemsize
            file.write(np.concatenate([[start], ends[:-1]]).astype("<i8").tobytes())
            start = int(ends[-1])
        for first in range(0, len(lengths) + 1, _CHUNK):
            file.write(np.arange(first, min(first + _CHUNK, len(lengths) + 1), dtype="<i8").tobytes())
    sync(path)
