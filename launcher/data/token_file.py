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

import hashlib
import mmap
import os
import struct
from bisect import bisect_left
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


@dataclass(frozen=True, eq=False)  # eq: arrays have no single truth value
class TokenFile:
    """NAME.bin and NAME.idx, memory-mapped. Opening them reads a few pages, whatever their size."""

    prefix: Path  # the path without .bin or .idx
    tokens: Array  # (tokens,) token ids
    lengths: Array  # (sequences,) tokens of each sequence
    pointers: Array  # (sequences,) byte of NAME.bin where each sequence begins
    documents: Array  # (documents + 1,) first sequence of each document, and the number of sequences

    @property
    def num_documents(self) -> int:
        return len(self.documents) - 1

    def document_start(self, document: int) -> int:
        """Return the index of the document's first token; for `num_documents`, the number of tokens."""
        sequence = int(self.documents[document])
        at_end = sequence == len(self.pointers)
        return len(self.tokens) if at_end else int(self.pointers[sequence]) // self.tokens.itemsize

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
        tokens. Only these 384 KiB are read, so a change of a few tokens may go unnoticed.
        """
        digest = hashlib.sha256()
        index, tokens = (index_path(self.prefix), 2, 2**16), (bin_path(self.prefix), 64, 2**12)
        for path, stretches, length in (index, tokens):
            size = path.stat().st_size
            digest.update(f"{size}/".encode())
            with path.open("rb") as file:
                for number in range(stretches):
                    file.seek(max(0, size - length) * number // (stretches - 1))
                    digest.update(file.read(length))
        return digest.hexdigest()[:16]


def bin_path(prefix: Path) -> Path:
    """Return the path of the tokens, NAME.bin."""
    return prefix.with_name(f"{prefix.name}.bin")


def index_path(prefix: Path) -> Path:
    """Return the path of the index, NAME.idx."""
    return prefix.with_name(f"{prefix.name}.idx")


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
    mapped = np.memmap(index, np.uint8, mode="r")

    def section(start: int, count: int, code: str) -> Array:
        return mapped[start : start + count * np.dtype(code).itemsize].view(code)

    can_be_mapped = bin_size and bin_size % dtype.itemsize == 0
    token_file = TokenFile(
        prefix,
        _map_for_random_access(tokens, dtype) if can_be_mapped else np.empty(0, dtype),
        lengths=section(_HEADER.size, sequences, "<i4"),
        pointers=section(_HEADER.size + 4 * sequences, sequences, "<i8"),
        documents=section(_HEADER.size + 12 * sequences, documents, "<i8"),
    )
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


def _map_for_random_access(path: Path, dtype: np.dtype[Any]) -> Array:
    """Map the tokens without the kernel's read-ahead, as windows are read in random order (see `fetch`)."""
    tokens = np.memmap(path, dtype, mode="r")
    tokens._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    return tokens


def fetch(tokens: Array, first: int, count: int) -> None:
    """Ask the kernel to start reading `count` tokens from index `first` of the file behind `tokens`.

    Without this call, the reads of the pages would wait for each other. Tokens in memory need no fetch.
    """
    mapping = getattr(tokens, "_mmap", None)
    if mapping is not None:
        start, end = first * tokens.itemsize, (first + count) * tokens.itemsize
        aligned = start // mmap.PAGESIZE * mmap.PAGESIZE
        mapping.madvise(mmap.MADV_WILLNEED, aligned, end - aligned)


def _check_order(file: TokenFile) -> None:
    index, itemsize = index_path(file.prefix), np.int64(file.tokens.itemsize)
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
    """Return slices that cover range(count) or, above 262,144, evenly spaced stretches of so many entries."""
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
